// The device's number types where there is no CUDA: half and bfloat16 with the processor's rounding, and its vectors.
// Every operation is computed exactly in double (the error that a double makes is too small to reach a half's rounding)
// and rounded once, to nearest even; subnormals are kept, a NaN becomes the one that the device makes.
#pragma once

#include <cstdint>
#include <cstring>

namespace pyllama::cuda {

struct half {
  uint16_t bits;
};
struct alignas(4) half2 {
  half x, y;
};
struct bfloat16 {
  uint16_t bits;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};

namespace emulation {

template <class To, class From>
To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

inline float half_to_float(half h) {
  const uint32_t sign = static_cast<uint32_t>(h.bits & 0x8000) << 16;
  const uint32_t rest = static_cast<uint32_t>(h.bits & 0x7fff) << 13;
  if ((h.bits & 0x7c00) == 0x7c00) return bit_cast<float>(sign | 0x7f800000 | rest);
  // 2^112 moves the exponent from bias 15 to bias 127 and makes subnormals normal, exactly.
  return bit_cast<float>(sign | bit_cast<uint32_t>(bit_cast<float>(rest) * 0x1p112f));
}

// A double rounded to `mantissa` bits below the leading one, exponents from `lowest` up; the result's bits without
// sign.
inline uint32_t round_magnitude(double magnitude, int mantissa, int lowest) {
  const int exponent = static_cast<int>(bit_cast<uint64_t>(magnitude) >> 52) - 1023;
  const int e = exponent < lowest ? lowest : exponent;
  const double steps = magnitude * bit_cast<double>(static_cast<uint64_t>(1023 + mantissa - e) << 52);
  const double rounded = (steps + 0x1p52) - 0x1p52;  // to an integer, halves to even
  // A normal number's leading one adds 1 to the exponent field, and so does rounding up to the next power of two.
  return (static_cast<uint32_t>(e - lowest) << mantissa) + static_cast<uint32_t>(rounded);
}

inline half round_to_half(double v) {
  if (v != v) return {0x7fff};
  const uint64_t bits = bit_cast<uint64_t>(v), sign = bits >> 63 << 15;
  const double magnitude = bit_cast<double>(bits << 1 >> 1);
  const uint32_t rounded = magnitude >= 65520 ? 0x7c00 : round_magnitude(magnitude, 10, -14);
  return {static_cast<uint16_t>(sign | rounded)};
}

inline float bfloat16_to_float(bfloat16 b) { return bit_cast<float>(static_cast<uint32_t>(b.bits) << 16); }

inline bfloat16 round_to_bfloat16(float v) {
  if (v != v) return {0x7fff};
  const uint32_t bits = bit_cast<uint32_t>(v);
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

}  // namespace emulation
}  // namespace pyllama::cuda
