// Tensor-core instructions on the CPU, from the fragment tables of the PTX manual ("Matrix Fragments for mma.m16n8k16
// with floating point type", "ldmatrix"): which element of which matrix a lane's register holds. Sums are made in
// double and rounded once to float; the hardware keeps fewer bits between its additions, so that its last bits may
// differ.
#pragma once

#include <cstdint>

namespace pyllama::cuda::emulation {

// c += a · b, a 16×16, b 16×8, c 16×8: this lane's fragments. All lanes of the warp call it together.
void mma_half(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
void mma_bfloat16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

// `count` (1, 2 or 4) matrices of 8×8 16-bit elements from shared memory. Lane 8i + r says where row r of matrix i
// begins; what the other lanes say is not looked at. r[i] receives row lane/4, columns 2(lane%4) and the next of matrix
// i, or, transposed, column lane/4 and those rows.
void load_matrices(uint32_t* r, const void* row, unsigned count, bool transposed);

}  // namespace pyllama::cuda::emulation
