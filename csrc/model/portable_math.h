// log and uniform random numbers that give the same bits with every compiler flag and on every processor that has
// IEEE doubles: only + - * / and integer operations, no libm, no fused operations (the build sets -ffp-contract=off).
// For the sampler alone; kernels have their own float versions. tests/test_sampler.py holds the error bounds.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>

namespace pyllama {

constexpr double kLn2High = 0x1.62e42fefap-1;      // the upper 36 bits of ln 2: n * kLn2High is exact for |n| < 2^16
constexpr double kLn2Low = 0x1.cf79abc9e3b3ap-40;  // ln 2 - kLn2High

inline uint64_t double_bits(double x) {
  uint64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline double bits_double(uint64_t bits) {
  double x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// ln x for normal, positive, finite x, within 2 ulp (absolute 1e-16 near 1).
inline double portable_log(double x) {
  uint64_t bits = double_bits(x);
  // Subtracting the bits of sqrt(1/2) moves the mantissa's range from [1, 2) to [sqrt(1/2), sqrt(2)).
  const uint64_t offset = bits - 0x3fe6a09e667f3bcdu;
  const int64_t exponent = static_cast<int64_t>(offset) >> 52;
  bits -= static_cast<uint64_t>(exponent) << 52;
  const double f = bits_double(bits) - 1.0;
  const double s = f / (2.0 + f);  // ln(1+f) = 2 atanh(s), |s| <= 0.1716
  const double s2 = s * s;
  double p = 1.0 / 23.0;
  for (const double divisor : {21.0, 19.0, 17.0, 15.0, 13.0, 11.0, 9.0, 7.0, 5.0, 3.0}) p = p * s2 + 1.0 / divisor;
  const double n = static_cast<double>(exponent);
  // f - s*f equals 2s; the large terms are added last.
  return n * kLn2High + (f - (s * f - (2.0 * s * s2 * p + n * kLn2Low)));
}

// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel Random Numbers: As Easy as 1, 2, 3; SC 2011).
inline std::array<uint32_t, 4> philox4x32(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * counter[0];
    const uint64_t b = uint64_t{0xCD9E8D57u} * counter[2];
    counter = {static_cast<uint32_t>(b >> 32) ^ counter[1] ^ key[0], static_cast<uint32_t>(b),
               static_cast<uint32_t>(a >> 32) ^ counter[3] ^ key[1], static_cast<uint32_t>(a)};
    key = {key[0] + 0x9E3779B9u, key[1] + 0xBB67AE85u};
  }
  return counter;
}

// 53 random bits that depend on nothing but the arguments.
inline uint64_t uniform_bits(uint64_t seed, uint64_t position) {
  const auto low = [](uint64_t v) { return static_cast<uint32_t>(v); };
  const auto high = [](uint64_t v) { return static_cast<uint32_t>(v >> 32); };
  const auto word = philox4x32({low(position), high(position), 0, 0}, {low(seed), high(seed)});
  return ((uint64_t{word[1]} << 32) | word[0]) >> 11;
}

}  // namespace pyllama
