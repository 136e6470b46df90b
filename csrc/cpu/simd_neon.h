// The SIMD vocabulary on NEON with the dot product extension (ARMv8.2: Cortex-A76, Neoverse N1, Apple M1 and later):
// four registers hold a whole tile row block. simd_scalar.h says what each word means. Sixteen lanes rather than four,
// because a tile is then read once and line by line, four independent chains hide the latency of a dot product, and
// one activation loaded serves four dot products. sdot multiplies signed by signed: no bias.
#pragma once

#include <arm_neon.h>

#include "half.h"

namespace {

constexpr int kLanes = 16;

struct VF {
  float32x4_t v[4];
};
struct VI {
  int32x4_t v[4];
};
struct VB {
  uint8x16_t v[4];
};

// A word of four registers from one of a single register; `r` names the result, `i` the register.
#define PYLLAMA_EACH(Type, expression)             \
  Type r;                                          \
  for (int i = 0; i < 4; i++) r.v[i] = expression; \
  return r

inline VF vf_load(const float* p) { PYLLAMA_EACH(VF, vld1q_f32(p + 4 * i)); }
inline void vf_store(float* p, VF a) {
  for (int i = 0; i < 4; i++) vst1q_f32(p + 4 * i, a.v[i]);
}
inline VF vf_set1(float x) { PYLLAMA_EACH(VF, vdupq_n_f32(x)); }
inline VF vf_add(VF a, VF b) { PYLLAMA_EACH(VF, vaddq_f32(a.v[i], b.v[i])); }
inline VF vf_sub(VF a, VF b) { PYLLAMA_EACH(VF, vsubq_f32(a.v[i], b.v[i])); }
inline VF vf_mul(VF a, VF b) { PYLLAMA_EACH(VF, vmulq_f32(a.v[i], b.v[i])); }
inline VF vf_div(VF a, VF b) { PYLLAMA_EACH(VF, vdivq_f32(a.v[i], b.v[i])); }
inline VF vf_fma(VF a, VF b, VF c) { PYLLAMA_EACH(VF, vfmaq_f32(c.v[i], a.v[i], b.v[i])); }
// fmax and fmin would return NaN where one operand is NaN; the definition returns the second.
inline VF vf_max(VF a, VF b) { PYLLAMA_EACH(VF, vbslq_f32(vcgtq_f32(a.v[i], b.v[i]), a.v[i], b.v[i])); }
inline VF vf_min(VF a, VF b) { PYLLAMA_EACH(VF, vbslq_f32(vcltq_f32(a.v[i], b.v[i]), a.v[i], b.v[i])); }
inline float vf_fold_sum(VF a) {
  const float32x4_t b = vaddq_f32(vaddq_f32(a.v[0], a.v[2]), vaddq_f32(a.v[1], a.v[3]));
  const float32x2_t c = vadd_f32(vget_low_f32(b), vget_high_f32(b));
  return vget_lane_f32(c, 0) + vget_lane_f32(c, 1);
}
inline float vf_fold_max(VF a) {
  float v[kLanes];
  vf_store(v, a);
  for (int n = kLanes / 2; n > 0; n /= 2) {
    for (int i = 0; i < n; i++) v[i] = v[i] > v[i + n] ? v[i] : v[i + n];
  }
  return v[0];
}
inline VF vf_from_i(VI a) { PYLLAMA_EACH(VF, vcvtq_f32_s32(a.v[i])); }
inline VF vf_bits(VI a) { PYLLAMA_EACH(VF, vreinterpretq_f32_s32(a.v[i])); }
inline VI vf_round(VF a) { PYLLAMA_EACH(VI, vcvtnq_s32_f32(a.v[i])); }
inline VF vf_exp2i(VI n) {
  PYLLAMA_EACH(VF, vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n.v[i], vdupq_n_s32(127)), 23)));
}
inline VF vf_load_f16(const uint8_t* p) {
  VF r;
  for (int i = 0; i < 4; i += 2) {
    const float16x8_t half = vreinterpretq_f16_u8(vld1q_u8(p + 8 * i));
    r.v[i] = vcvt_f32_f16(vget_low_f16(half));
    r.v[i + 1] = vcvt_high_f32_f16(half);
  }
  return r;
}
// A bf16 is the upper half of a float: zeros are interleaved below it.
inline VF vf_load_bf16(const uint8_t* p) {
  VF r;
  const uint16x8_t zero = vdupq_n_u16(0);
  for (int i = 0; i < 4; i += 2) {
    const uint16x8_t upper = vreinterpretq_u16_u8(vld1q_u8(p + 8 * i));
    r.v[i] = vreinterpretq_f32_u16(vzip1q_u16(zero, upper));
    r.v[i + 1] = vreinterpretq_f32_u16(vzip2q_u16(zero, upper));
  }
  return r;
}
inline VF vf_load_u8(const uint8_t* p) {
  const uint8x16_t bytes = vld1q_u8(p);
  const uint16x8_t low = vmovl_u8(vget_low_u8(bytes)), high = vmovl_high_u8(bytes);
  return {{vcvtq_f32_u32(vmovl_u16(vget_low_u16(low))), vcvtq_f32_u32(vmovl_high_u16(low)),
           vcvtq_f32_u32(vmovl_u16(vget_low_u16(high))), vcvtq_f32_u32(vmovl_high_u16(high))}};
}
inline void vf_store_f16(uint16_t* p, VF a) {
  for (int i = 0; i < 4; i += 2) {
    const float16x8_t half = vcvt_high_f16_f32(vcvt_f16_f32(a.v[i]), a.v[i + 1]);
    vst1q_u16(p + 4 * i, vreinterpretq_u16_f16(half));
  }
}
inline void vi_store_i8(int8_t* p, VI a) {
  const int16x8_t low = vmovn_high_s32(vmovn_s32(a.v[0]), a.v[1]);
  const int16x8_t high = vmovn_high_s32(vmovn_s32(a.v[2]), a.v[3]);
  vst1q_s8(p, vmovn_high_s16(vmovn_s16(low), high));
}

inline VI vi_set1(int32_t x) { PYLLAMA_EACH(VI, vdupq_n_s32(x)); }
inline VI vi_add(VI a, VI b) { PYLLAMA_EACH(VI, vaddq_s32(a.v[i], b.v[i])); }

inline VB vb_load(const uint8_t* p) { PYLLAMA_EACH(VB, vld1q_u8(p + 16 * i)); }
inline void vb_store(uint8_t* p, VB a) {
  for (int i = 0; i < 4; i++) vst1q_u8(p + 16 * i, a.v[i]);
}
inline VB vb_low(VB a) { PYLLAMA_EACH(VB, vandq_u8(a.v[i], vdupq_n_u8(15))); }
inline VB vb_high(VB a) { PYLLAMA_EACH(VB, vshrq_n_u8(a.v[i], 4)); }

using WU = VB;
using WS = VB;
using Table = int8x16_t;
constexpr int kSignedBias = 0;

inline WU wu_codes(VB codes) { return codes; }
inline Table table_load(const int8_t* codebook) { return vld1q_s8(codebook); }
inline WS ws_lookup(const Table& t, VB codes) { PYLLAMA_EACH(WS, vqtbl1q_u8(vreinterpretq_u8_s8(t), codes.v[i])); }
inline WS ws_bytes(VB bytes) { return bytes; }
inline VB ws_pack(const WS& w) { return w; }
inline WS ws_unpack(VB bytes) { return bytes; }

inline VI dot_s(VI acc, const WS& w, const int8_t* a) {
  int32_t four;
  memcpy(&four, a, 4);
  const int8x16_t x = vreinterpretq_s8_s32(vdupq_n_s32(four));
  PYLLAMA_EACH(VI, vdotq_s32(acc.v[i], vreinterpretq_s8_u8(w.v[i]), x));
}
inline VI dot_u(VI acc, const WU& w, const int8_t* a) { return dot_s(acc, w, a); }

#undef PYLLAMA_EACH

constexpr int kTokBlock = 4;
constexpr int kPanelBlock = 4;
constexpr int kDirectRegs = 1;
constexpr int kPanelRegs = 1;
constexpr int kBlockRegs = 1;
constexpr int kFewAccs = 4;

}  // namespace
