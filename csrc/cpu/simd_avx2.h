// The SIMD vocabulary on AVX2: half a tile row block in a register. simd_scalar.h says what each word means.
// With PYLLAMA_DPBUSD defined to a 256-bit dpbusd intrinsic (AVX-VNNI, or AVX-512-VNNI at 256 bits) the dot products
// use it; otherwise pmaddubsw, which saturates at int16 unless one factor is small: raw 4-bit codes are, and signed
// weights go in as |w| × sign(a, w), at most 128·127·2 (q6 multiplies by four).
#pragma once

#include <immintrin.h>

#include "half.h"

namespace {

constexpr int kLanes = 8;
constexpr int kDoubles = 4;  // float64s in a register of the compiler's

using VF = __m256;
using VI = __m256i;
using VB = __m256i;

inline VF vf_load(const float* p) { return _mm256_loadu_ps(p); }
inline void vf_store(float* p, VF a) { _mm256_storeu_ps(p, a); }
inline VF vf_set1(float x) { return _mm256_set1_ps(x); }
inline VF vf_add(VF a, VF b) { return _mm256_add_ps(a, b); }
inline VF vf_sub(VF a, VF b) { return _mm256_sub_ps(a, b); }
inline VF vf_mul(VF a, VF b) { return _mm256_mul_ps(a, b); }
inline VF vf_div(VF a, VF b) { return _mm256_div_ps(a, b); }
inline VF vf_fma(VF a, VF b, VF c) { return _mm256_fmadd_ps(a, b, c); }
inline VF vf_max(VF a, VF b) { return _mm256_max_ps(a, b); }
inline VF vf_min(VF a, VF b) { return _mm256_min_ps(a, b); }
inline float vf_fold_sum(VF a) {
  const __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}
inline float vf_fold_max(VF a) {
  const __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 c = _mm_max_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_max_ss(c, _mm_movehdup_ps(c)));
}
inline VF vf_from_i(VI a) { return _mm256_cvtepi32_ps(a); }
inline VF vf_bits(VI a) { return _mm256_castsi256_ps(a); }
inline VI vf_round(VF a) { return _mm256_cvtps_epi32(a); }
inline VF vf_exp2i(VI n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}
inline VF vf_load_f16(const uint8_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline VF vf_load_bf16(const uint8_t* p) {
  return _mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
}
inline VF vf_load_u8(const uint8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline void vf_store_f16(uint16_t* p, VF a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline void vi_store_i8(int8_t* p, VI a) {
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
}

inline VI vi_set1(int32_t x) { return _mm256_set1_epi32(x); }
inline VI vi_add(VI a, VI b) { return _mm256_add_epi32(a, b); }
inline VI vi_max(VI a, VI b) { return _mm256_max_epi32(a, b); }
inline int32_t vi_fold_sum(VI a) {
  const __m128i b = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  const __m128i c = _mm_add_epi32(b, _mm_shuffle_epi32(b, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(c, _mm_shuffle_epi32(c, 0xb1)));
}
inline int32_t vi_fold_max(VI a) {
  const __m128i b = _mm_max_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  const __m128i c = _mm_max_epi32(b, _mm_shuffle_epi32(b, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(c, _mm_shuffle_epi32(c, 0xb1)));
}
inline VI vi_magnitude(VF a) { return _mm256_and_si256(_mm256_castps_si256(a), _mm256_set1_epi32(0x7fffffff)); }
inline VI vi_times128(VI a) { return _mm256_slli_epi32(a, 7); }
inline void vi_store_digits(int8_t* high, int8_t* low, const VI (&n)[8]) {
  const VI mask = _mm256_set1_epi16(127);
  const VI order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // packs work in halves
  for (int i = 0; i < 2; i++) {
    const VI a = _mm256_packus_epi32(n[4 * i], n[4 * i + 1]), b = _mm256_packus_epi32(n[4 * i + 2], n[4 * i + 3]);
    const VI h = _mm256_packus_epi16(_mm256_srli_epi16(a, 7), _mm256_srli_epi16(b, 7));
    const VI l = _mm256_packus_epi16(_mm256_and_si256(a, mask), _mm256_and_si256(b, mask));
    _mm256_storeu_si256(reinterpret_cast<VI*>(high) + i, _mm256_permutevar8x32_epi32(h, order));
    _mm256_storeu_si256(reinterpret_cast<VI*>(low) + i, _mm256_permutevar8x32_epi32(l, order));
  }
}

inline VB vb_load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline VB vb_low(VB a) { return _mm256_and_si256(a, _mm256_set1_epi8(15)); }
inline VB vb_high(VB a) { return _mm256_and_si256(_mm256_srli_epi16(a, 4), _mm256_set1_epi8(15)); }

inline VI broadcast4(const int8_t* a) {
  int32_t x;
  memcpy(&x, a, 4);
  return _mm256_set1_epi32(x);
}

using WU = __m256i;
using Table = __m256i;
inline WU wu_codes(VB codes) { return codes; }
inline __m256i look_up32(const Table& low, const Table& high, VB codes, VB plane, int bit) {
  return _mm256_blendv_epi8(_mm256_shuffle_epi8(low, codes), _mm256_shuffle_epi8(high, codes),
                            _mm256_slli_epi16(plane, 7 - bit));
}
// 4 · code of 6 bits.
inline __m256i join_six(VB bytes, bool high, VB plane, int pair) {
  const __m256i nibbles = high ? _mm256_srli_epi16(bytes, 2) : _mm256_slli_epi16(bytes, 2);
  const __m256i above = _mm256_slli_epi16(plane, 6 - 2 * pair);
  return _mm256_or_si256(_mm256_and_si256(nibbles, _mm256_set1_epi8(0x3c)),
                         _mm256_and_si256(above, _mm256_set1_epi8(-64)));
}

#ifdef PYLLAMA_DPBUSD

using WS = __m256i;  // weight + 128, unsigned
constexpr int kSignedBias = 128;

inline Table table_load(const int8_t* codebook) {
  const __m128i t = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codebook));
  return _mm256_xor_si256(_mm256_broadcastsi128_si256(t), _mm256_set1_epi8(-128));
}
inline WS ws_lookup(const Table& t, VB codes) { return _mm256_shuffle_epi8(t, codes); }
inline WS ws_lookup32(const Table& low, const Table& high, VB codes, VB plane, int bit) {
  return look_up32(low, high, codes, plane, bit);
}
inline WS ws_fours(VB bytes, bool high, VB plane, int pair) { return join_six(bytes, high, plane, pair); }
inline WS ws_bytes(VB bytes) { return _mm256_xor_si256(bytes, _mm256_set1_epi8(-128)); }
inline VI dot_s(VI acc, const WS& w, const int8_t* a, int k) { return PYLLAMA_DPBUSD(acc, w, broadcast4(a + k)); }
inline VI dot_bytes(VI acc, VB bytes, const int8_t* p, int k) { return PYLLAMA_DPBUSD(acc, broadcast4(p + k), bytes); }
using DotU = VI;
inline DotU dot_u_begin(VI start) { return start; }
inline DotU dot_u(DotU acc, const WU& w, const int8_t* a, int k) { return dot_s(acc, w, a, k); }
inline VI dot_u_end(DotU acc, VI) { return acc; }
constexpr int kPanelBlock = 6;

#else

struct WS {
  __m256i value, magnitude;
};
constexpr int kSignedBias = 0;

inline Table table_load(const int8_t* codebook) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codebook)));
}
inline WS ws_bytes(VB bytes) { return {bytes, _mm256_abs_epi8(bytes)}; }
inline WS ws_lookup(const Table& t, VB codes) { return ws_bytes(_mm256_shuffle_epi8(t, codes)); }
inline WS ws_lookup32(const Table& low, const Table& high, VB codes, VB plane, int bit) {
  return ws_bytes(look_up32(low, high, codes, plane, bit));
}
inline WS ws_fours(VB bytes, bool high, VB plane, int pair) {
  return ws_bytes(_mm256_xor_si256(join_six(bytes, high, plane, pair), _mm256_set1_epi8(-128)));
}
inline VI add_pairs(VI acc, __m256i words) {
  return _mm256_add_epi32(acc, _mm256_madd_epi16(words, _mm256_set1_epi16(1)));
}
// Left alone, the compiler makes all products first and runs out of registers: half the speed.
inline __m256i in_order(__m256i sum) {
  asm("" : "+x"(sum));
  return sum;
}
using DotU = __m256i;  // int16: eight times two products are within ±8·2·15·127 = ±30,480
inline DotU dot_u_begin(VI) { return _mm256_setzero_si256(); }
inline DotU dot_u(DotU acc, const WU& w, const int8_t* a, int k) {
  acc = _mm256_add_epi16(acc, _mm256_maddubs_epi16(w, broadcast4(a + k)));
  return in_order(acc);
}
inline VI dot_u_end(DotU acc, VI start) { return add_pairs(start, acc); }
inline VI dot_s(VI acc, const WS& w, const int8_t* a, int k) {
  return in_order(add_pairs(acc, _mm256_maddubs_epi16(w.magnitude, _mm256_sign_epi8(broadcast4(a + k), w.value))));
}
inline VI dot_bytes(VI acc, VB bytes, const int8_t* p, int k) {
  return in_order(add_pairs(acc, _mm256_maddubs_epi16(broadcast4(p + k), bytes)));
}
constexpr int kPanelBlock = 3;

#endif
constexpr int kTokBlock = 8;
constexpr int kDirectRegs = 2;  // registers of rows when there are few tokens
constexpr int kRegisterSums = 4;
constexpr int kPanelRegs = 2;
constexpr int kBlockRegs = 2;
constexpr int kFewAccs = 12;
constexpr int kByteAccs = 12;
constexpr int kMaxFewRows = 16;

}  // namespace
