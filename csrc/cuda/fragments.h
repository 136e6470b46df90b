// Weights on the device, in the order in which the lanes of `mma.m16n8k16` want them as its A operand. `to_fragments`
// makes this order from our tiles (docs/FORMAT.md) by one pass over a plain copy of the payload. One layout serves the
// kernels for a few and for many tokens. docs/GPU.md draws it; tests/cuda/test_fragments.py is its second definition,
// in numpy. Here is no memory management: the caller allocates `FragmentSizes` and keeps the bytes alive.
//
// 16 rows x 64 columns are a chunk. Lane 4g + t (g < 8, t < 4) holds rows g and g + 8, and of each half of the chunk
// (32 columns) the columns 8t...8t+7, so that it reads its activations in plain order, 16 bytes at once. Fragment f < 4
// of the chunk is columns c, c+1 (register 0: row g, register 1: row g + 8) and c+2, c+3 (registers 2 and 3), c =
// 32(f/2) + 8t + 4(f%2).
#pragma once

#include <cstdint>

#include "cuda/runtime.h"
#include "formats.h"
#include "tensor.h"

namespace pyllama {
namespace cuda {

constexpr int kChunkColumns = 64;
constexpr int kMaxSources = 3;  // matrices that one product may put side by side (wq wk wv, or gate and up)

// What the codes of a lane look like; its number of 16-byte loads for each chunk is `code_loads`.
enum class Codes : uint8_t {
  q4,         // word f is fragment f; nibbles p and p + 4 are register p's two columns
  q4nl,       // word f is fragment f; nibbles 2p and 2p + 1 are register p's two columns
  q8,         // code + 128; words 2f and 2f + 1 are fragment f, bytes in the order of registers and columns
  half,       // words 4f...4f+3 are fragment f's registers
  half_pair,  // words 8f...8f+3 are the high parts of fragment f, 8f+4...8f+7 what is left (f32)
};
constexpr int code_loads(Codes codes) {
  return codes == Codes::half_pair ? 8 : codes == Codes::half ? 4 : codes == Codes::q8 ? 2 : 1;
}

// What lies beside a scale: nothing, a minimum (q4a, f16 or bf16), or a zero point (q4a, u8).
enum class Offset : uint8_t { none, minimum, zero_point };

// What lies in the scale words of g: first the scales, then, where there are offsets, as many words of them. A word is
// two halves, of rows g and g + 8; but minimums of groups of 32 are the two groups of row g, then those of row g + 8. A
// zero point z is stored as what is added to codes (dequant.cuh): -(1024 + z) of row g, -(64 + z) of row g + 8.
enum class ScaleWord : uint8_t { scale, minimum, two_minimums, zero_point };

// A matrix in device memory. All 16-bit numbers are halves: bf16 and f32 numbers of a row are divided by a power of two
// that brings the row's largest to 2^14 or just above, and `row_scales` has that power (1 where all numbers were f16
// already). This is exact for bf16 numbers down to 2^-32 of the row's largest, and never off by more than 2^-40 of it.
struct Fragments {
  const uint8_t* codes = nullptr;       // [tiles][chunks][code_loads][32 lanes][16 bytes]
  const uint32_t* scales = nullptr;     // [tiles][scale_groups][8 g][scale_words]: see ScaleWord
  const float* row_scales = nullptr;    // [16 * tiles]
  uint32_t codebook[4] = {0, 0, 0, 0};  // q4nl: 16 bytes, each an entry + 128
  int rows = 0;                         // of y; those beyond, up to 16 * tiles, are zeros
  int columns = 0;                      // of x; those beyond, up to 64 * chunks, are zeros
  int tiles = 0, chunks = 0;            // of 16 rows, of 64 columns
  int group = 0;                        // columns of a scale: 32, 64, 128; 0 without
  int scale_groups = 0;                 // groups of 32 lie in pairs, since a chunk has two of them
  int scale_words = 0;                  // for a g and scale group: 1, or 2 for groups of 32; twice with offsets
  int loads = 0;                        // code_loads(kind)
  Codes kind = Codes::half;
  Offset offset = Offset::none;
};

struct FragmentSizes {
  size_t codes_bytes, scales_bytes, row_scales_bytes;
};

// Whether two matrices of equal columns can be put below each other.
bool one_product(const Weight& a, const Weight& b);

// The shape of `n` matrices with equal columns and format, put below each other. Throws FormatError, which names the
// two tensors, when they differ in what one kernel cannot tell apart (format, group, kind of offset, codebook,
// input_order).
Fragments fragments_of(const Weight* const* weights, int n);
FragmentSizes fragment_sizes(const Fragments& shape);

// Writes the fragments at the shape's pointers (device memory of `fragment_sizes`). `weights` are the matrices with
// their pointers in device memory. `row_map` is int32 [16 * tiles] in device memory: the row, counted through all the
// matrices, that lies in row 16 * tile + r, or -1 for zeros; null for all rows in order. It is how RoPE's pairs come to
// be rows g and g + 8. The next kernel of the stream may be one that reads the fragments before
// wait_for_previous_kernel(), as products do.
void to_fragments(Stream& stream, const Weight* const* weights, int n, const int32_t* row_map, const Fragments& shape);

}  // namespace cuda
}  // namespace pyllama
