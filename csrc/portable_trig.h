// sin and cos of our own, so that rotary embeddings have the same bits under every C library and on every device. Plain
// double arithmetic without contraction. |x| up to 2^20·π/2, error below 1e-15 absolute: far more than the float it is
// rounded to.
#pragma once

#include <cmath>

#ifdef __CUDACC__
#define PYLLAMA_PORTABLE __host__ __device__ inline
#else
#define PYLLAMA_PORTABLE inline
#endif

namespace pyllama {

// Reduction by multiples of π/2 in three parts of 33, 33 and 53 bits (Cody and Waite; the multiples of the first two
// are exact for |n| < 2^20), then Taylor series on |r| <= π/4 to degree 17 and 16.
PYLLAMA_PORTABLE void sincos_portable(double x, double* sin_out, double* cos_out) {
  const double n = std::nearbyint(x * 0x1.45f306dc9c883p-1);
  double r = x - n * 0x1.921fb544p+0;
  r = r - n * 0x1.0b4611a6p-34;
  r = r - n * 0x1.3198a2e037073p-69;
  const double z = r * r;
  double s = 1.0 / 355687428096000.0;
  s = s * z - 1.0 / 1307674368000.0;
  s = s * z + 1.0 / 6227020800.0;
  s = s * z - 1.0 / 39916800.0;
  s = s * z + 1.0 / 362880.0;
  s = s * z - 1.0 / 5040.0;
  s = s * z + 1.0 / 120.0;
  s = s * z - 1.0 / 6.0;
  s = r + r * (z * s);
  double c = 1.0 / 20922789888000.0;
  c = c * z - 1.0 / 87178291200.0;
  c = c * z + 1.0 / 479001600.0;
  c = c * z - 1.0 / 3628800.0;
  c = c * z + 1.0 / 40320.0;
  c = c * z - 1.0 / 720.0;
  c = c * z + 1.0 / 24.0;
  c = c * z - 0.5;
  c = 1.0 + z * c;
  switch (static_cast<long long>(n) & 3) {
    case 0:
      *sin_out = s, *cos_out = c;
      break;
    case 1:
      *sin_out = c, *cos_out = -s;
      break;
    case 2:
      *sin_out = -s, *cos_out = -c;
      break;
    default:
      *sin_out = -c, *cos_out = s;
      break;
  }
}

}  // namespace pyllama
