// The body of products for 1 to 8 tokens; kernels put their own ends to it as an Epilogue (linear_few.cu has those of a
// plain product and of SwiGLU). Layouts: fragments.h and linear_few.h.
//
// A block of 8 warps makes tiles of 16 rows, one after the other. Warp w sums the chunks w, w + 8, w + 16, … of the
// tile's columns; the eight sums are then added in order. Each warp keeps its next kDepth chunks in registers, also
// over the end of a tile, so that loads are always on their way: 16 KB a block for 4-bit codes, and two blocks fit a
// multiprocessor.
#pragma once

#include "cuda/chunk.cuh"
#include "cuda/linear_few.h"

namespace pyllama {
namespace cuda {

constexpr int kFewWarps = 8;
constexpr int kFewThreads = 32 * kFewWarps;
// Two tiles' sums, since one is added up while the next is made; and a codebook.
constexpr int kFewSharedBytes = 2 * kFewWarps * 32 * 16 + 16;

template <Codes codes, Offset offset, bool group32>
struct FewKind : WeightKind<codes, offset, group32> {
  static constexpr int kLoads = code_loads(codes);
  static constexpr int kDepth = kLoads == 1 ? 4 : kLoads == 2 ? 3 : kLoads == 4 ? 2 : 1;  // chunks on their way
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
PYLLAMA_DEVICE void fetch(WeightChunk<Kind>& to, const FewPlace& at, int i, int scale_stride, bool valid) {
  load_chunk(to, at.codes + i * kFewWarps * Kind::kLoads * 32, at.scales + i * scale_stride, valid);
}

// acc += a chunk of weights * the activations at x and their sums (this lane's token and columns).
template <class Kind>
PYLLAMA_DEVICE void multiply_chunk(float (&acc)[4], const WeightChunk<Kind>& chunk, const uint4* x,
                                   const uint32_t* sums, const uint32_t (&codebook)[4]) {
  constexpr int kParts = Kind::kCodes == Codes::half_pair ? 2 : 1;
  float sum[4] = {0, 0, 0, 0};
  if constexpr (Kind::kOffset == Offset::minimum) {
    uint32_t minimums[2];
    minimum_fragment<Kind>(minimums, chunk);
    mma_m16n8k8(acc, minimums, *sums);
  }
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
      add_scaled(acc, to_float(as_half2(chunk.scales[group])), sum);
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
  if constexpr (Kind::kCodes == Codes::q4nl) copy_codebook(codebook, w, shared + 2 * kFewWarps * 32);

  int tile = static_cast<int>(block_index().x);
  FewPlace next = place_of<Kind>(w, tile);
  WeightChunk<Kind> slots[kDepth];
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
