// A power of two of our own, for sampling: the same bits in every vector width and on every device. Plain arithmetic
// without contraction.
#pragma once

// Always inlined: objects for an instruction set export nothing (tests/test_objects.py).
#ifdef __CUDACC__
#define PYLLAMA_PORTABLE_EXP2 __host__ __device__ __forceinline__
#else
#define PYLLAMA_PORTABLE_EXP2 __attribute__((always_inline)) inline
#endif

namespace pyllama {

// 2^r for |r| <= 1/2 with the least relative error, 1.1e-12, of all polynomials of degree 8 that are 1 at 0. V: double,
// or a vector of doubles.
template <class V>
PYLLAMA_PORTABLE_EXP2 V exp2_polynomial(V r) {
  V p = r * 0x1.66348367dfc52p-20 + 0x1.00ee06e852cf1p-16;
  p = p * r + 0x1.4306c11a53d76p-13;
  p = p * r + 0x1.5d8729761e27cp-10;
  p = p * r + 0x1.3b2ab7f3b1124p-7;
  p = p * r + 0x1.c6b08defc20b9p-5;
  p = p * r + 0x1.ebfbdff7c5a8ap-3;
  p = p * r + 0x1.62e42fef7a78dp-1;
  return p * r + 1.0;
}

}  // namespace pyllama
