// The SIMD vocabulary on NEON with the dot product extension (ARMv8.2: Cortex-A76, Neoverse N1, Apple M1 and later): a
// quarter of a tile row block in a register. simd_scalar.h says what each word means. sdot multiplies signed by signed,
// so no weight needs a bias.
#pragma once

#include <arm_neon.h>

#include "half.h"

namespace {

constexpr int kLanes = 4;
constexpr int kDoubles = 2;  // float64s in a register of the compiler's

using VF = float32x4_t;
using VI = int32x4_t;
using VB = uint8x16_t;

inline VF vf_load(const float* p) { return vld1q_f32(p); }
inline void vf_store(float* p, VF a) { vst1q_f32(p, a); }
inline VF vf_set1(float x) { return vdupq_n_f32(x); }
inline VF vf_add(VF a, VF b) { return vaddq_f32(a, b); }
inline VF vf_sub(VF a, VF b) { return vsubq_f32(a, b); }
inline VF vf_mul(VF a, VF b) { return vmulq_f32(a, b); }
inline VF vf_div(VF a, VF b) { return vdivq_f32(a, b); }
inline VF vf_fma(VF a, VF b, VF c) { return vfmaq_f32(c, a, b); }
// Not fmax and fmin, which return NaN where either operand is NaN.
inline VF vf_max(VF a, VF b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
inline VF vf_min(VF a, VF b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
inline float vf_fold_sum(VF a) {
  const float32x2_t b = vadd_f32(vget_low_f32(a), vget_high_f32(a));
  return vget_lane_f32(b, 0) + vget_lane_f32(b, 1);
}
inline float vf_fold_max(VF a) {
  const float32x2_t low = vget_low_f32(a), high = vget_high_f32(a);
  const float32x2_t b = vbsl_f32(vcgt_f32(low, high), low, high);
  return vget_lane_f32(b, 0) > vget_lane_f32(b, 1) ? vget_lane_f32(b, 0) : vget_lane_f32(b, 1);
}
inline VF vf_from_i(VI a) { return vcvtq_f32_s32(a); }
inline VF vf_bits(VI a) { return vreinterpretq_f32_s32(a); }
inline VI vf_round(VF a) { return vcvtnq_s32_f32(a); }
inline VF vf_exp2i(VI n) { return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n, vdupq_n_s32(127)), 23)); }
inline VF vf_load_f16(const uint8_t* p) { return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p))); }
inline VF vf_load_bf16(const uint8_t* p) {
  return vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(vreinterpret_u16_u8(vld1_u8(p))), 16));
}
inline VF vf_load_u8(const uint8_t* p) {
  uint32_t four;
  memcpy(&four, p, 4);
  const uint16x8_t words = vmovl_u8(vcreate_u8(four));
  return vcvtq_f32_u32(vmovl_u16(vget_low_u16(words)));
}
inline void vf_store_f16(uint16_t* p, VF a) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(a))); }
inline void vi_store_i8(int8_t* p, VI a) {
  const int16x4_t words = vmovn_s32(a);
  const int8x8_t bytes = vmovn_s16(vcombine_s16(words, words));
  memcpy(p, &bytes, 4);
}

inline VI vi_set1(int32_t x) { return vdupq_n_s32(x); }
inline VI vi_add(VI a, VI b) { return vaddq_s32(a, b); }
inline VI vi_max(VI a, VI b) { return vmaxq_s32(a, b); }
inline int32_t vi_fold_sum(VI a) { return vaddvq_s32(a); }
inline int32_t vi_fold_max(VI a) { return vmaxvq_s32(a); }
inline VI vi_magnitude(VF a) { return vandq_s32(vreinterpretq_s32_f32(a), vdupq_n_s32(0x7fffffff)); }
inline VI vi_times128(VI a) { return vshlq_n_s32(a, 7); }
inline void vi_store_digits(int8_t* high, int8_t* low, const VI (&n)[16]) {
  for (int i = 0; i < 16; i += 2) {
    const int16x8_t words = vcombine_s16(vmovn_s32(n[i]), vmovn_s32(n[i + 1]));
    vst1_s8(high + 4 * i, vshrn_n_s16(words, 7));
    vst1_s8(low + 4 * i, vmovn_s16(vandq_s16(words, vdupq_n_s16(127))));
  }
}

inline VB vb_load(const uint8_t* p) { return vld1q_u8(p); }
inline VB vb_low(VB a) { return vandq_u8(a, vdupq_n_u8(15)); }
inline VB vb_high(VB a) { return vshrq_n_u8(a, 4); }

using WU = uint8x16_t;
using WS = int8x16_t;
using Table = int8x16_t;
constexpr int kSignedBias = 0;

inline WU wu_codes(VB codes) { return codes; }
inline Table table_load(const int8_t* codebook) { return vld1q_s8(codebook); }
inline WS ws_lookup(const Table& t, VB codes) { return vqtbl1q_s8(t, codes); }
inline WS ws_bytes(VB bytes) { return vreinterpretq_s8_u8(bytes); }
inline WS ws_lookup32(const Table& low, const Table& high, VB codes, VB plane, int bit) {
  const uint8x16_t above = vtstq_u8(plane, vdupq_n_u8(static_cast<uint8_t>(1 << bit)));
  return vbslq_s8(above, vqtbl1q_s8(high, codes), vqtbl1q_s8(low, codes));
}
inline WS ws_fours(VB bytes, bool high, VB plane, int pair) {
  const uint8x16_t nibbles = high ? vshrq_n_u8(bytes, 2) : vshlq_n_u8(bytes, 2);
  const uint8x16_t above = vshlq_u8(plane, vdupq_n_s8(static_cast<int8_t>(6 - 2 * pair)));
  const uint8x16_t joined = vbslq_u8(vdupq_n_u8(0x3c), nibbles, vandq_u8(above, vdupq_n_u8(0xc0)));
  return ws_bytes(veorq_u8(joined, vdupq_n_u8(0x80)));
}

// Sixteen activations come in one register, and a dot product takes four of them; `k` is known when compiling.
inline VI dot_s(VI acc, const WS& w, const int8_t* a, int k) {
  const int8x16_t x = vld1q_s8(a + k / 16 * 16);
  switch (k / 4 % 4) {
    case 0:
      return vdotq_laneq_s32(acc, w, x, 0);
    case 1:
      return vdotq_laneq_s32(acc, w, x, 1);
    case 2:
      return vdotq_laneq_s32(acc, w, x, 2);
    default:
      return vdotq_laneq_s32(acc, w, x, 3);
  }
}
inline VI dot_bytes(VI acc, VB bytes, const int8_t* p, int k) { return dot_s(acc, ws_bytes(bytes), p, k); }
using DotU = VI;
inline DotU dot_u_begin(VI start) { return start; }
inline DotU dot_u(DotU acc, const WU& w, const int8_t* a, int k) { return dot_s(acc, ws_bytes(w), a, k); }
inline VI dot_u_end(DotU acc, VI) { return acc; }

constexpr int kTokBlock = 4;
constexpr int kPanelBlock = 3;
constexpr int kDirectRegs = 4;
constexpr int kRegisterSums = 12;
constexpr int kPanelRegs = 4;
constexpr int kBlockRegs = 4;
constexpr int kFewAccs = 16;
constexpr int kByteAccs = 16;
constexpr int kMaxFewRows = 16;

}  // namespace
