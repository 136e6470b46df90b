// The body of products for 1 to 8 tokens; kernels put their own ends to it as an Epilogue (linear_few.cu has those of a
// plain product and of SwiGLU). Layouts: fragments.h and linear_few.h.
//
// A block of 8 warps makes tiles of 16 rows, one after the other. Warp w sums the chunks w, w + 8, w + 16, … of the
// tile's columns; the eight sums are then added in order. Each warp keeps its next kDepth chunks in registers, also
// over the end of a tile, so that loads are always on their way: 16 KB a block for 4-bit codes, and two blocks fit a
// multiprocessor.
#pragma once

#include "cuda/dequant.cuh"
#include "cuda/linear_few.h"

namespace pyllama {
namespace cuda {

constexpr int kFewWarps = 8;
constexpr int kFewThreads = 32 * kFewWarps;
// Two tiles' sums, since one is added up while the next is made; and a codebook.
constexpr int kFewSharedBytes = 2 * kFewWarps * 32 * 16 + 16;

// Which codes, scales and offsets a kernel is made for. Groups of 64 and 128 share a kernel.
template <Codes codes, Offset offset, bool group32>
struct FewKind {
  static constexpr Codes kCodes = codes;
  static constexpr Offset kOffset = offset;
  static constexpr bool kQuantized = codes != Codes::half && codes != Codes::half_pair;
  static constexpr bool kGroup32 = group32;
  static constexpr int kLoads = code_loads(codes);
  static constexpr int kDepth = kLoads == 1 ? 4 : kLoads == 2 ? 3 : kLoads == 4 ? 2 : 1;  // chunks on their way
  static constexpr int kScaleWords = !kQuantized ? 0 : (group32 ? 2 : 1) * (offset == Offset::none ? 1 : 2);
};

// A lane's part of a chunk.
template <class Kind>
struct FewChunk {
  uint4 codes[Kind::kLoads];
  uint32_t scales[Kind::kScaleWords ? Kind::kScaleWords : 1];
};

// Where a lane reads the chunks of a tile that are its warp's: chunk warp() + 8 i at i strides.
struct FewPlace {
  const uint4* codes;
  const uint32_t* scales;
};

template <class Kind>
PYLLAMA_DEVICE FewPlace place_of(const Fragments& w, int tile) {
  FewPlace at;
  const int64_t chunk = static_cast<int64_t>(tile) * w.chunks + warp();
  at.codes = reinterpret_cast<const uint4*>(w.codes) + chunk * (32 * Kind::kLoads) + lane();
  at.scales = nullptr;
  if constexpr (Kind::kQuantized) {
    const int64_t group = static_cast<int64_t>(tile) * w.scale_groups + (w.group == 128 ? warp() / 2 : warp());
    at.scales = w.scales + (group * 8 + lane() / 4) * Kind::kScaleWords;
  }
  return at;
}

// Chunk warp() + 8 i from a place, if `valid`.
template <class Kind>
PYLLAMA_DEVICE void fetch(FewChunk<Kind>& to, const FewPlace& at, int i, int scale_stride, bool valid) {
  PYLLAMA_UNROLL
  for (int load = 0; load < Kind::kLoads; load++) {
    load_stream_if(to.codes[load], at.codes + (i * kFewWarps * Kind::kLoads + load) * 32, valid);
  }
  if constexpr (Kind::kQuantized) load_words_if(to.scales, at.scales + i * scale_stride, valid);
}

PYLLAMA_DEVICE uint32_t component(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// Fragment f of a chunk without its scale.
template <class Kind>
PYLLAMA_DEVICE void make_fragment(uint32_t (&a)[4], const FewChunk<Kind>& chunk, int f, const CodeBias& bias,
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
PYLLAMA_DEVICE void add_scaled(float (&acc)[4], uint32_t factors, const float (&c)[4]) {
  const float2 s = to_float(as_half2(factors));
  acc[0] = fma(s.x, c[0], acc[0]);
  acc[1] = fma(s.x, c[1], acc[1]);
  acc[2] = fma(s.y, c[2], acc[2]);
  acc[3] = fma(s.y, c[3], acc[3]);
}

// acc += minimum * sum of the activations, for a chunk's two halves: as half a fragment more, whose columns 0 and 1
// meet the sums' high parts and columns 2 and 3 their low parts; the other columns meet zeros.
template <class Kind>
PYLLAMA_DEVICE void add_minimums(float (&acc)[4], const FewChunk<Kind>& chunk, uint32_t sums) {
  uint32_t a[2];
  if constexpr (Kind::kGroup32) {
    a[0] = chunk.scales[2], a[1] = chunk.scales[3];
  } else {
    a[0] = permute_bytes(chunk.scales[1], 0, 0x1010), a[1] = permute_bytes(chunk.scales[1], 0, 0x3232);
  }
  mma_m16n8k8(acc, a, sums);
}

// acc += a chunk of weights * the activations at x and their sums (this lane's token and columns).
template <class Kind>
PYLLAMA_DEVICE void multiply_chunk(float (&acc)[4], const FewChunk<Kind>& chunk, const uint4* x, const uint32_t* sums,
                                   const uint32_t (&codebook)[4]) {
  constexpr int kParts = Kind::kCodes == Codes::half_pair ? 2 : 1;
  float sum[4] = {0, 0, 0, 0};
  if constexpr (Kind::kOffset == Offset::minimum) add_minimums<Kind>(acc, chunk, *sums);
  PYLLAMA_UNROLL
  for (int side = 0; side < 2; side++) {
    const uint4 v = x[side * (kFewTokens * 32 / 8)];
    const uint32_t b[2][2] = {{v.x, v.y}, {v.z, v.w}};
    const int group = Kind::kGroup32 ? side : 0;
    CodeBias bias{};
    if constexpr (Kind::kQuantized) bias = bias_of<Kind>(chunk.scales[Kind::kScaleWords / 2 + group]);
    PYLLAMA_UNROLL
    for (int f = 0; f < 2 * kParts; f++) {
      uint32_t a[4];
      make_fragment<Kind>(a, chunk, 2 * kParts * side + f, bias, codebook);
      if constexpr (Kind::kQuantized) {
        mma_m16n8k16(sum, a, b[f]);
      } else {
        mma_m16n8k16(acc, a, b[f / kParts]);
      }
    }
    if constexpr (Kind::kQuantized) {
      if (!Kind::kGroup32 && side == 0) continue;
      add_scaled(acc, chunk.scales[group], sum);
      for (int i = 0; i < 4; i++) sum[i] = 0;
    }
  }
}

// The eight warps' sums of a tile, added in order by one warp.
PYLLAMA_DEVICE float4 add_warps(const float4* sums) {
  float4 total = sums[lane()];
  for (int w = 1; w < kFewWarps; w++) {
    const float4 v = sums[w * 32 + lane()];
    total.x += v.x, total.y += v.y, total.z += v.z, total.w += v.w;
  }
  return total;
}

// epilogue(row, token, value, value8) has a token's numbers of rows `row` and `row` + 8 of a tile.
template <class Epilogue>
PYLLAMA_DEVICE void finish_tile(const Fragments& w, const Activations& x, int n_tokens, int tile, const float4& total,
                                const Epilogue& epilogue) {
  const int row = 16 * tile + static_cast<int>(lane() / 4), token = static_cast<int>(lane() % 4 * 2);
  const float r0 = w.row_scales[row], r8 = w.row_scales[row + 8];
  if (token < n_tokens) {
    const float s = x.scales[token];
    epilogue(row, token, total.x * r0 * s, total.z * r8 * s);
  }
  if (token + 1 < n_tokens) {
    const float s = x.scales[token + 1];
    epilogue(row, token + 1, total.y * r0 * s, total.w * r8 * s);
  }
}

// The codebook by way of shared memory: compilers fetch an argument anew for each use, half an instruction a weight.
PYLLAMA_DEVICE void copy_codebook(uint32_t (&to)[4], const Fragments& w) {
  uint4* const shared = reinterpret_cast<uint4*>(shared_memory()) + 2 * kFewWarps * 32;
  if (thread_index() == 0) *shared = {w.codebook[0], w.codebook[1], w.codebook[2], w.codebook[3]};
  barrier();
  const uint4 v = *shared;
  to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}

// Grid: any number of blocks up to w.tiles; kFewThreads threads; kFewSharedBytes.
template <class Kind, class Epilogue>
PYLLAMA_DEVICE void linear_few_body(const Fragments& w, const Activations& x, int n_tokens, const Epilogue& epilogue) {
  constexpr int kDepth = Kind::kDepth;
  constexpr int kRound = kDepth * kFewWarps;  // chunks of all warps until a slot is used again
  constexpr int kXStride = kFewWarps * 2 * kFewTokens * 4, kSumsStride = kFewWarps * kFewTokens * 4;
  const int first = static_cast<int>(warp());
  const int rounds = (w.chunks + kRound - 1) / kRound;
  const int scale_stride = (w.group == 128 ? kFewWarps / 2 : kFewWarps) * 8 * Kind::kScaleWords;
  float4* const shared = reinterpret_cast<float4*>(shared_memory());
  uint32_t codebook[4] = {0, 0, 0, 0};
  if constexpr (Kind::kCodes == Codes::q4nl) copy_codebook(codebook, w);

  int tile = static_cast<int>(block_index().x);
  FewPlace next = place_of<Kind>(w, tile);
  FewChunk<Kind> slots[kDepth];
  PYLLAMA_UNROLL
  for (int i = 0; i < kDepth; i++) {
    fetch(slots[i], next, i, scale_stride, first + i * kFewWarps < w.chunks);
  }
  wait_for_previous_kernel();
  let_next_kernel_start();

  // Lanes of tokens that are not there do the last token's work again; nobody reads it.
  const int token = static_cast<int>(lane() / 4) < n_tokens ? static_cast<int>(lane() / 4) : n_tokens - 1;
  const uint4* const my_x =
      reinterpret_cast<const uint4*>(x.values) + (first * 2 * kFewTokens + token) * 4 + lane() % 4;
  const uint32_t* const my_sums = x.sums + (first * kFewTokens + token) * 4 + lane() % 4;

  for (int n = 0; tile < w.tiles; n++) {
    float acc[4] = {0, 0, 0, 0};
    const int next_tile = tile + static_cast<int>(grid_size().x);
    const uint4* x_at = my_x;
    const uint32_t* sums_at = my_sums;
    // Each slot takes its next chunk as soon as it is used: that of the next round, and in the last round of the next
    // tile.
    int left = w.chunks - first;  // chunks from this warp's slot 0 on
    for (int round = 1; round < rounds; round++) {
      next.codes += kRound * 32 * Kind::kLoads;
      if constexpr (Kind::kQuantized) next.scales += kDepth * scale_stride;
      left -= kRound;
      PYLLAMA_UNROLL
      for (int i = 0; i < kDepth; i++) {
        multiply_chunk<Kind>(acc, slots[i], x_at + i * kXStride, sums_at + i * kSumsStride, codebook);
        fetch(slots[i], next, i, scale_stride, i * kFewWarps < left);
      }
      x_at += kDepth * kXStride;
      sums_at += kDepth * kSumsStride;
    }
    next = place_of<Kind>(w, next_tile);
    const int next_left = next_tile < w.tiles ? w.chunks - first : 0;
    PYLLAMA_UNROLL
    for (int i = 0; i < kDepth; i++) {
      if (i * kFewWarps < left) {
        multiply_chunk<Kind>(acc, slots[i], x_at + i * kXStride, sums_at + i * kSumsStride, codebook);
      }
      fetch(slots[i], next, i, scale_stride, i * kFewWarps < next_left);
    }
    float4* const sums = shared + n % 2 * (kFewWarps * 32);
    sums[warp() * 32 + lane()] = {acc[0], acc[1], acc[2], acc[3]};
    barrier();
    // A different warp each time, while the others go on with the next tile.
    if (first == n % kFewWarps) finish_tile(w, x, n_tokens, tile, add_warps(sums), epilogue);
    tile = next_tile;
  }
}

}  // namespace cuda
}  // namespace pyllama
