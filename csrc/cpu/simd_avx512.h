// The SIMD vocabulary on AVX-512 with VNNI (Ice Lake, Zen 4 and later): one register holds a whole tile row block.
// simd_scalar.h says what each word means.
#pragma once

// gcc 12 warns of its own _mm512_undefined_* (its bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include "half.h"

namespace {

constexpr int kLanes = 16;
constexpr int kDoubles = 8;  // float64s in a register of the compiler's

using VF = __m512;
using VI = __m512i;
using VB = __m512i;

inline VF vf_load(const float* p) { return _mm512_loadu_ps(p); }
inline void vf_store(float* p, VF a) { _mm512_storeu_ps(p, a); }
inline VF vf_set1(float x) { return _mm512_set1_ps(x); }
inline VF vf_add(VF a, VF b) { return _mm512_add_ps(a, b); }
inline VF vf_sub(VF a, VF b) { return _mm512_sub_ps(a, b); }
inline VF vf_mul(VF a, VF b) { return _mm512_mul_ps(a, b); }
inline VF vf_div(VF a, VF b) { return _mm512_div_ps(a, b); }
inline VF vf_fma(VF a, VF b, VF c) { return _mm512_fmadd_ps(a, b, c); }
inline VF vf_max(VF a, VF b) { return _mm512_max_ps(a, b); }
inline VF vf_min(VF a, VF b) { return _mm512_min_ps(a, b); }
inline float vf_fold_sum(VF a) {
  const __m256 b = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  const __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
  const __m128 d = _mm_add_ps(c, _mm_movehl_ps(c, c));
  return _mm_cvtss_f32(_mm_add_ss(d, _mm_movehdup_ps(d)));
}
inline float vf_fold_max(VF a) {
  const __m256 b = _mm256_max_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  const __m128 c = _mm_max_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
  const __m128 d = _mm_max_ps(c, _mm_movehl_ps(c, c));
  return _mm_cvtss_f32(_mm_max_ss(d, _mm_movehdup_ps(d)));
}
inline VF vf_from_i(VI a) { return _mm512_cvtepi32_ps(a); }
inline VF vf_bits(VI a) { return _mm512_castsi512_ps(a); }
inline VI vf_round(VF a) { return _mm512_cvtps_epi32(a); }
inline VF vf_exp2i(VI n) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(n, _mm512_set1_epi32(127)), 23));
}
inline VF vf_load_f16(const uint8_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline VF vf_load_bf16(const uint8_t* p) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
}
inline VF vf_load_u8(const uint8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline void vf_store_f16(uint16_t* p, VF a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline void vi_store_i8(int8_t* p, VI a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a)); }

inline VI vi_set1(int32_t x) { return _mm512_set1_epi32(x); }
inline VI vi_add(VI a, VI b) { return _mm512_add_epi32(a, b); }
inline VI vi_max(VI a, VI b) { return _mm512_max_epi32(a, b); }
inline int32_t vi_fold_sum(VI a) {
  const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64(a, 1));
  const __m128i b = _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  const __m128i c = _mm_add_epi32(b, _mm_shuffle_epi32(b, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(c, _mm_shuffle_epi32(c, 0xb1)));
}
inline int32_t vi_fold_max(VI a) {
  const __m256i half = _mm256_max_epi32(_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64(a, 1));
  const __m128i b = _mm_max_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  const __m128i c = _mm_max_epi32(b, _mm_shuffle_epi32(b, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(c, _mm_shuffle_epi32(c, 0xb1)));
}
inline VI vi_magnitude(VF a) { return _mm512_and_si512(_mm512_castps_si512(a), _mm512_set1_epi32(0x7fffffff)); }
inline VI vi_times128(VI a) { return _mm512_slli_epi32(a, 7); }
inline void vi_store_digits(int8_t* high, int8_t* low, const VI (&n)[4]) {
  const VI words[2] = {_mm512_packus_epi32(n[0], n[1]), _mm512_packus_epi32(n[2], n[3])};
  const VI mask = _mm512_set1_epi16(127);
  const VI order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);  // packs work in quarters
  const VI h = _mm512_packus_epi16(_mm512_srli_epi16(words[0], 7), _mm512_srli_epi16(words[1], 7));
  const VI l = _mm512_packus_epi16(_mm512_and_si512(words[0], mask), _mm512_and_si512(words[1], mask));
  _mm512_storeu_si512(high, _mm512_permutexvar_epi32(order, h));
  _mm512_storeu_si512(low, _mm512_permutexvar_epi32(order, l));
}

inline VB vb_load(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline VB vb_low(VB a) { return _mm512_and_si512(a, _mm512_set1_epi8(15)); }
inline VB vb_high(VB a) { return _mm512_and_si512(_mm512_srli_epi16(a, 4), _mm512_set1_epi8(15)); }

using WU = __m512i;
using WS = __m512i;     // weight + 128, unsigned
using Table = __m512i;  // the codebook + 128, in each 128-bit part
constexpr int kSignedBias = 128;

inline WU wu_codes(VB codes) { return codes; }
inline Table table_load(const int8_t* codebook) {
  const __m128i t = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codebook));
  return _mm512_xor_si512(_mm512_broadcast_i32x4(t), _mm512_set1_epi8(-128));
}
inline WS ws_lookup(const Table& t, VB codes) { return _mm512_shuffle_epi8(t, codes); }
inline WS ws_bytes(VB bytes) { return _mm512_xor_si512(bytes, _mm512_set1_epi8(-128)); }
inline WS ws_lookup32(const Table& low, const Table& high, VB codes, VB plane, int bit) {
  const __mmask64 above = _mm512_test_epi8_mask(plane, _mm512_set1_epi8(static_cast<char>(1 << bit)));
  return _mm512_mask_shuffle_epi8(_mm512_shuffle_epi8(low, codes), above, high, codes);
}
// Six bits at the top of each byte, and what is below them: a nibble's neighbours and a pair's.
inline __m512i join_six(VB bytes, bool high, VB plane, int pair) {
  const __m512i nibbles = high ? _mm512_srli_epi16(bytes, 2) : _mm512_slli_epi16(bytes, 2);
  const __m512i above = _mm512_slli_epi16(plane, static_cast<unsigned>(6 - 2 * pair));
  return _mm512_ternarylogic_epi64(_mm512_set1_epi8(-64), above, nibbles, 0xca);
}
inline WS ws_fours(VB bytes, bool high, VB plane, int pair) {  // 4 · (code - 32) + 128
  return _mm512_and_si512(join_six(bytes, high, plane, pair), _mm512_set1_epi8(-4));
}

inline VI broadcast4(const int8_t* a) {
  int32_t x;
  memcpy(&x, a, 4);
  return _mm512_set1_epi32(x);
}
inline VI dot_s(VI acc, const WS& w, const int8_t* a, int k) { return _mm512_dpbusd_epi32(acc, w, broadcast4(a + k)); }
inline VI dot_bytes(VI acc, VB bytes, const int8_t* p, int k) {
  return _mm512_dpbusd_epi32(acc, broadcast4(p + k), bytes);
}
using DotU = VI;
inline DotU dot_u_begin(VI start) { return start; }
inline DotU dot_u(DotU acc, const WU& w, const int8_t* a, int k) { return dot_s(acc, w, a, k); }
inline VI dot_u_end(DotU acc, VI) { return acc; }

constexpr int kTokBlock = 8;
constexpr int kPanelBlock = 6;
constexpr int kDirectRegs = 2;  // registers of rows when there are few tokens
constexpr int kRegisterSums = 12;
constexpr int kPanelRegs = 2;
constexpr int kBlockRegs = 4;
constexpr int kFewAccs = 16;
constexpr int kByteAccs = 16;
constexpr int kMaxFewRows = 24;

}  // namespace
