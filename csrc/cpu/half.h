// Half-precision numbers in plain C, for the scalar kernels and for code that runs once per row. IEEE, round to
// nearest even, subnormals kept; the vector units' conversions give the same bits.
#pragma once

#include <cstdint>
#include <cstring>

namespace pyllama {

static inline float bits_to_float(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}
static inline uint32_t float_to_bits(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}

static inline float bf16_to_float(uint16_t h) { return bits_to_float(static_cast<uint32_t>(h) << 16); }

static inline float f16_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
  const uint32_t rest = static_cast<uint32_t>(h & 0x7fff) << 13;
  if ((h & 0x7c00) == 0x7c00) return bits_to_float(sign | 0x7f800000 | rest);  // inf, nan
  // 2^112 moves the exponent from bias 15 to bias 127 and makes subnormals normal, exactly.
  return bits_to_float(sign | float_to_bits(bits_to_float(rest) * 0x1p112f));
}

static inline uint16_t float_to_f16(float f) {
  const uint32_t u = float_to_bits(f);
  const uint32_t sign = (u >> 16) & 0x8000;
  uint32_t a = u & 0x7fffffff;
  if (a > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00 | ((a >> 13) & 0x3ff));  // nan, quiet
  if (a >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);                       // rounds to infinity
  if (a < 0x38800000) {  // subnormal half: adding 0.5 leaves the right bits in the low mantissa, rounded to even
    const float shifted = bits_to_float(a) + 0.5f;
    return static_cast<uint16_t>(sign | (float_to_bits(shifted) - 0x3f000000));
  }
  a += 0xfff + ((a >> 13) & 1);
  return static_cast<uint16_t>(sign | ((a - 0x38000000) >> 13));
}

}  // namespace pyllama
