// A lane's part of a chunk of weights (fragments.h) in registers: how it is loaded, made into A fragments and scaled.
// What the products of few and of many tokens have in common.
#pragma once

#include "cuda/dequant.cuh"
#include "cuda/fragments.h"

namespace pyllama {
namespace cuda {

// Which codes, scales and offsets a kernel is made for. Groups of 64 and 128 share a kernel.
template <Codes codes, Offset offset, bool group32>
struct WeightKind {
  static constexpr Codes kCodes = codes;
  static constexpr Offset kOffset = offset;
  static constexpr bool kQuantized = codes != Codes::half && codes != Codes::half_pair;
  static constexpr bool kGroup32 = group32;
  static constexpr int kLoads = code_loads(codes);
  static constexpr int kScaleWords = !kQuantized ? 0 : (group32 ? 2 : 1) * (offset == Offset::none ? 1 : 2);
  static constexpr int kParts = codes == Codes::half_pair ? 2 : 1;  // fragments for 16 columns
};

// use(kind) with the WeightKind of a matrix.
template <class Use>
void with_weight_kind(const Fragments& w, const Use& use) {
  const bool group32 = w.group == 32;
  switch (w.kind) {
    case Codes::q4nl:
      return group32 ? use(WeightKind<Codes::q4nl, Offset::none, true>{})
                     : use(WeightKind<Codes::q4nl, Offset::none, false>{});
    case Codes::q8:
      return group32 ? use(WeightKind<Codes::q8, Offset::none, true>{})
                     : use(WeightKind<Codes::q8, Offset::none, false>{});
    case Codes::half:
      return use(WeightKind<Codes::half, Offset::none, false>{});
    case Codes::half_pair:
      return use(WeightKind<Codes::half_pair, Offset::none, false>{});
    case Codes::q4:
      break;
  }
  switch (w.offset) {
    case Offset::none:
      return group32 ? use(WeightKind<Codes::q4, Offset::none, true>{})
                     : use(WeightKind<Codes::q4, Offset::none, false>{});
    case Offset::minimum:
      return group32 ? use(WeightKind<Codes::q4, Offset::minimum, true>{})
                     : use(WeightKind<Codes::q4, Offset::minimum, false>{});
    case Offset::zero_point:
      return group32 ? use(WeightKind<Codes::q4, Offset::zero_point, true>{})
                     : use(WeightKind<Codes::q4, Offset::zero_point, false>{});
  }
}

template <class Kind>
struct WeightChunk {
  uint4 codes[Kind::kLoads];
  uint32_t scales[Kind::kScaleWords ? Kind::kScaleWords : 1];
};

template <class Kind>
PYLLAMA_DEVICE void load_chunk(WeightChunk<Kind>& to, const uint4* codes, const uint32_t* scales, bool valid) {
  PYLLAMA_UNROLL
  for (int load = 0; load < Kind::kLoads; load++) load_stream_if(to.codes[load], codes + load * 32, valid);
  if constexpr (Kind::kQuantized) load_words_if(to.scales, scales, valid);
}

PYLLAMA_DEVICE uint32_t component(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// Fragment f of a chunk without its scale.
template <class Kind>
PYLLAMA_DEVICE void make_fragment(uint32_t (&a)[4], const WeightChunk<Kind>& chunk, int f, const CodeBias& bias,
                                  const uint32_t (&codebook)[4]) {
  if constexpr (Kind::kCodes == Codes::q4) {
    fragment_q4(a, component(chunk.codes[0], f), bias);
  } else if constexpr (Kind::kCodes == Codes::q4nl) {
    fragment_q4nl(a, component(chunk.codes[0], f), codebook);
  } else if constexpr (Kind::kCodes == Codes::q8) {
    const uint4& v = chunk.codes[f / 2];
    fragment_q8(a, component(v, f % 2 * 2), component(v, f % 2 * 2 + 1));
  } else {
    const uint4& v = chunk.codes[f];  // f counts both parts of a pair
    a[0] = v.x, a[1] = v.y, a[2] = v.z, a[3] = v.w;
  }
}

// What to add to codes so that they are c - 8, c, or c - zero point.
template <class Kind>
PYLLAMA_DEVICE CodeBias bias_of(uint32_t offset_word) {
  if constexpr (Kind::kOffset == Offset::none) return {as_half2(kMinus1032), as_half2(kMinus72)};
  if constexpr (Kind::kOffset == Offset::minimum) return {as_half2(kMinus1024), as_half2(kMinus64)};
  return {as_half2(permute_bytes(offset_word, 0, 0x1010)), as_half2(permute_bytes(offset_word, 0, 0x3232))};
}

// acc += factor of the row * (numbers of the tokens): c[0], c[1] are row g, c[2], c[3] row g + 8.
PYLLAMA_DEVICE void add_scaled(float (&acc)[4], const float2& factors, const float (&c)[4]) {
  acc[0] = fma(factors.x, c[0], acc[0]);
  acc[1] = fma(factors.x, c[1], acc[1]);
  acc[2] = fma(factors.y, c[2], acc[2]);
  acc[3] = fma(factors.y, c[3], acc[3]);
}

// The minimums of a chunk as half a fragment more, to be multiplied by the sums of the activations (activations.h):
// columns 0 and 1 meet the sums' high parts and columns 2 and 3 their low parts; the other columns meet zeros.
template <class Kind>
PYLLAMA_DEVICE void minimum_fragment(uint32_t (&a)[2], const WeightChunk<Kind>& chunk) {
  if constexpr (Kind::kGroup32) {
    a[0] = chunk.scales[2], a[1] = chunk.scales[3];
  } else {
    a[0] = permute_bytes(chunk.scales[1], 0, 0x1010), a[1] = permute_bytes(chunk.scales[1], 0, 0x3232);
  }
}

// The codebook by way of 16 bytes of shared memory: compilers fetch an argument anew for each use, half an instruction
// a weight.
PYLLAMA_DEVICE void copy_codebook(uint32_t (&to)[4], const Fragments& w, void* shared) {
  if (thread_index() == 0) store_16(shared, {w.codebook[0], w.codebook[1], w.codebook[2], w.codebook[3]});
  barrier();
  const uint4 v = load_16(shared);
  to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}

}  // namespace cuda
}  // namespace pyllama
