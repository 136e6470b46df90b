// The SIMD vocabulary in plain C++: sixteen lanes as arrays. It is the definition that the other vocabularies must
// equal bit for bit, and what runs on a processor that has none of them. Explicit fma only; compiled with
// -ffp-contract=off.
//
// The vocabulary: VF/VI are kLanes floats/int32, VB is kLanes×4 bytes as they lie in a weight tile. WU are 4-bit codes
// as they are, WS are signed weights in whatever form the dot product of this instruction set wants; kSignedBias is
// what that form adds to each weight, to be taken back through the accumulator's start value.
#pragma once

#include "half.h"

namespace {

constexpr int kLanes = 16;
constexpr int kDoubles = 2;  // float64s in a register of the compiler's

struct VF {
  float v[kLanes];
};
struct VI {
  int32_t v[kLanes];
};
struct VB {
  uint8_t v[kLanes * 4];
};

#define PYLLAMA_LANES(i) for (int i = 0; i < kLanes; i++)

inline VF vf_load(const float* p) {
  VF r;
  memcpy(r.v, p, sizeof r.v);
  return r;
}
inline void vf_store(float* p, VF a) { memcpy(p, a.v, sizeof a.v); }
inline VF vf_set1(float x) {
  VF r;
  PYLLAMA_LANES(i) r.v[i] = x;
  return r;
}
inline VF vf_add(VF a, VF b) {
  PYLLAMA_LANES(i) a.v[i] = a.v[i] + b.v[i];
  return a;
}
inline VF vf_sub(VF a, VF b) {
  PYLLAMA_LANES(i) a.v[i] = a.v[i] - b.v[i];
  return a;
}
inline VF vf_mul(VF a, VF b) {
  PYLLAMA_LANES(i) a.v[i] = a.v[i] * b.v[i];
  return a;
}
inline VF vf_div(VF a, VF b) {
  PYLLAMA_LANES(i) a.v[i] = a.v[i] / b.v[i];
  return a;
}
inline VF vf_fma(VF a, VF b, VF c) {
  PYLLAMA_LANES(i) c.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]);
  return c;
}
// The second operand where either is NaN, as x86 does.
inline VF vf_max(VF a, VF b) {
  PYLLAMA_LANES(i) a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
  return a;
}
inline VF vf_min(VF a, VF b) {
  PYLLAMA_LANES(i) a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
  return a;
}
// All lanes to one: lanes i and i + kLanes/2 first, then halves of that, down to lanes 0 and 1.
inline float vf_fold_sum(VF a) {
  for (int n = kLanes / 2; n > 0; n /= 2) {
    for (int i = 0; i < n; i++) a.v[i] = a.v[i] + a.v[i + n];
  }
  return a.v[0];
}
inline float vf_fold_max(VF a) {
  for (int n = kLanes / 2; n > 0; n /= 2) {
    for (int i = 0; i < n; i++) a.v[i] = a.v[i] > a.v[i + n] ? a.v[i] : a.v[i + n];
  }
  return a.v[0];
}
inline VF vf_from_i(VI a) {
  VF r;
  PYLLAMA_LANES(i) r.v[i] = static_cast<float>(a.v[i]);
  return r;
}
// The float with these bits.
inline VF vf_bits(VI a) {
  VF r;
  memcpy(r.v, a.v, sizeof r.v);
  return r;
}
// Nearest, ties to even. Arguments are within int32.
inline VI vf_round(VF a) {
  VI r;
  PYLLAMA_LANES(i) r.v[i] = static_cast<int32_t>(__builtin_rintf(a.v[i]));
  return r;
}
// 2^n for n in -127…128; -127 gives 0 and 128 gives infinity.
inline VF vf_exp2i(VI n) {
  VF r;
  PYLLAMA_LANES(i) r.v[i] = pyllama::bits_to_float(static_cast<uint32_t>(n.v[i] + 127) << 23);
  return r;
}
inline VF vf_load_f16(const uint8_t* p) {
  VF r;
  PYLLAMA_LANES(i) {
    uint16_t h;
    memcpy(&h, p + 2 * i, 2);
    r.v[i] = pyllama::f16_to_float(h);
  }
  return r;
}
inline VF vf_load_bf16(const uint8_t* p) {
  VF r;
  PYLLAMA_LANES(i) {
    uint16_t h;
    memcpy(&h, p + 2 * i, 2);
    r.v[i] = pyllama::bf16_to_float(h);
  }
  return r;
}
inline VF vf_load_u8(const uint8_t* p) {
  VF r;
  PYLLAMA_LANES(i) r.v[i] = p[i];
  return r;
}
inline void vf_store_f16(uint16_t* p, VF a) { PYLLAMA_LANES(i) p[i] = pyllama::float_to_f16(a.v[i]); }
// The low bytes of the lanes, which are within int8.
inline void vi_store_i8(int8_t* p, VI a) { PYLLAMA_LANES(i) p[i] = static_cast<int8_t>(a.v[i]); }

inline VI vi_set1(int32_t x) {
  VI r;
  PYLLAMA_LANES(i) r.v[i] = x;
  return r;
}
inline VI vi_add(VI a, VI b) {
  PYLLAMA_LANES(i) a.v[i] = a.v[i] + b.v[i];
  return a;
}

inline VI vi_max(VI a, VI b) {
  PYLLAMA_LANES(i) a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
  return a;
}
inline int32_t vi_fold_sum(VI a) {
  int32_t sum = 0;
  PYLLAMA_LANES(i) sum += a.v[i];
  return sum;
}
inline int32_t vi_fold_max(VI a) {
  int32_t most = a.v[0];
  PYLLAMA_LANES(i) most = a.v[i] > most ? a.v[i] : most;
  return most;
}
// The bits without their sign.
inline VI vi_magnitude(VF a) {
  VI r;
  PYLLAMA_LANES(i) r.v[i] = static_cast<int32_t>(pyllama::float_to_bits(a.v[i]) & 0x7fffffffu);
  return r;
}
inline VI vi_times128(VI a) {
  PYLLAMA_LANES(i) a.v[i] *= 128;
  return a;
}
// 64 numbers of 14 bits as two digits of seven.
inline void vi_store_digits(int8_t* high, int8_t* low, const VI (&n)[64 / kLanes]) {
  for (int i = 0; i < 64; i++) {
    const int32_t x = n[i / kLanes].v[i % kLanes];
    high[i] = static_cast<int8_t>(x >> 7 & 127);
    low[i] = static_cast<int8_t>(x & 127);
  }
}

inline VB vb_load(const uint8_t* p) {
  VB r;
  memcpy(r.v, p, sizeof r.v);
  return r;
}
inline VB vb_low(VB a) {
  for (auto& b : a.v) b = b & 15;
  return a;
}
inline VB vb_high(VB a) {
  for (auto& b : a.v) b = b >> 4;
  return a;
}

using WU = VB;
struct WS {
  int8_t v[kLanes * 4];
};
struct Table {
  int8_t v[16];
};
constexpr int kSignedBias = 0;

inline WU wu_codes(VB codes) { return codes; }
inline Table table_load(const int8_t* codebook) {
  Table t;
  memcpy(t.v, codebook, 16);
  return t;
}
inline WS ws_lookup(const Table& t, VB codes) {
  WS w;
  for (int i = 0; i < kLanes * 4; i++) w.v[i] = t.v[codes.v[i]];
  return w;
}
// Codes of 5 bits: nibbles, and in the plane, at this bit, which of two tables they are looked up in.
inline WS ws_lookup32(const Table& low, const Table& high, VB codes, VB plane, int bit) {
  WS w;
  for (int i = 0; i < kLanes * 4; i++) w.v[i] = (plane.v[i] >> bit & 1 ? high : low).v[codes.v[i]];
  return w;
}
// Four times the weights of codes of 6 bits, less 32: bytes of two nibbles, of which the high ones are wanted or the
// low ones, and a plane with pairs of bits, of which the one of this number is.
inline WS ws_fours(VB bytes, bool high, VB plane, int pair) {
  WS w;
  for (int i = 0; i < kLanes * 4; i++) {
    const int nibble = high ? bytes.v[i] >> 4 : bytes.v[i] & 15, above = plane.v[i] >> (2 * pair) & 3;
    w.v[i] = static_cast<int8_t>(4 * ((above << 4 | nibble) - 32));
  }
  return w;
}
inline WS ws_bytes(VB bytes) {
  WS w;
  memcpy(w.v, bytes.v, sizeof w.v);
  return w;
}

// acc[lane] += Σ_{b<4} w[lane][b] · a[k + b], exact in int32. `k` is a constant, a multiple of four, and 16 bytes from
// a + k/16·16 on can be read.
template <class W>
inline VI dot4(VI acc, const W& w, const int8_t* a, int k) {
  PYLLAMA_LANES(i) {
    for (int b = 0; b < 4; b++) acc.v[i] += static_cast<int32_t>(w.v[4 * i + b]) * a[k + b];
  }
  return acc;
}
inline VI dot_s(VI acc, const WS& w, const int8_t* a, int k) { return dot4(acc, w, a, k); }
// The same of signed bytes as they are with p within 0…127.
inline VI dot_bytes(VI acc, VB bytes, const int8_t* p, int k) { return dot4(acc, ws_bytes(bytes), p, k); }
// With codes, eight such sums of activations within ±127 lie between a begin and an end, both with the same start: what
// they add up to fits into int16, where that is faster.
using DotU = VI;
inline DotU dot_u_begin(VI start) { return start; }
inline DotU dot_u(DotU acc, const WU& w, const int8_t* a, int k) { return dot4(acc, w, a, k); }
inline VI dot_u_end(DotU acc, VI) { return acc; }

constexpr int kTokBlock = 4;      // tokens that share a weight register when there are few
constexpr int kPanelBlock = 2;    // tokens × kPanelRegs accumulators when there are many
constexpr int kDirectRegs = 1;    // registers of rows when there are few tokens
constexpr int kRegisterSums = 8;  // registers of sums that fit beside those of the dot products
constexpr int kPanelRegs = 1;     // registers of rows
constexpr int kBlockRegs = 1;     // attention: registers beside 6 rows of accumulators when there are many rows
constexpr int kFewAccs = 4;       // attention: accumulators when there are few
constexpr int kByteAccs = 4;      // attention: accumulators of integers, with a cache of bytes
constexpr int kMaxFewRows = 16;   // attention: rows up to which a cache of halves is read as it is

}  // namespace
