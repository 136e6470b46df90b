// Keys and values on the device: what a page of kPageTok tokens looks like, and the kernel that writes one step's
// tokens into their pages. Attention reads pages straight into the operands of `mma.m16n8k16`, 16 bytes a lane, 512
// contiguous bytes (keys) or four whole lines of 128 (values) a warp, with no shared memory in between; a prompt's
// attention may copy a page's bytes as they are and read them back the same way. Sums over dimensions, and over the
// keys of a page, do not care in what order the operands hold them, so both are stored in an order in which a lane's
// share is in one piece. tests/cuda/test_attention.py is the second definition, in numpy. No memory management.
#pragma once

#include <cstdint>

#include "cuda/runtime.h"

namespace pyllama {
namespace cuda {

constexpr int kCachePageTok = 64;  // kPageTok of backend.h, which includes more than kernels can
constexpr int kCacheGroup = 32;    // dimensions of a scale of the q8 cache
constexpr int kMaxHeadDim = 128;

enum class CacheType : uint8_t { f16, q8 };

// A page is [layer][kv head] of blocks of `head_bytes`: keys, values, scales of keys, scales of values. `wide` is
// head_dim rounded up to 32; what is beyond head_dim is zero. For token k and dimension d of a block the numbers lie at
//
//   f16 key    512·(k/8·(wide/32) + d/32) + 64·(k%8) + 2·(d%32)
//   f16 value  4·(k/2·wide + d) + 2·(k%2)
//   q8 key     512·(k/16·(wide/32) + d/32) + 64·(k%8) + 16·(d%32/8) + 8·(k/8%2) + d%8
//   q8 value   4·((k/16·4 + k%8/2)·wide + d) + 2·(k/8%2) + k%2
//   scale      2·(64·(d/32) + 16·(k%8/2) + 2·(k/8) + k%2)
//
// A byte b of the q8 cache with its scale s, a half, stands for (b - 128)·s.
//
// Values are always finite, in every page from the moment it is allocated (zero it): what softmax leaves out has weight
// zero, and zero times infinity would not be zero. A token whose value is no finite number, or whose key is none, gets
// NaN keys, so that it is noticed by whoever sees it and by nobody else.
struct CacheLayout {
  CacheType type = CacheType::f16;
  int n_layers = 0, n_kv_heads = 0;
  int head_dim = 0, wide = 0;
  int values = 0, key_scales = 0, value_scales = 0;  // where they begin in a block
  int head_bytes = 0;
  int64_t page_bytes = 0;
};

// Throws std::invalid_argument for a head_dim that no kernel is made for: odd, or beyond kMaxHeadDim.
CacheLayout cache_layout(CacheType type, int n_layers, int n_kv_heads, int head_dim);

// Where the tokens of a step go; all in device memory.
struct Places {
  uint8_t* const* pages = nullptr;             // [n_tok] the page that has the token's slot
  const int32_t* pos = nullptr;                // [n_tok] absolute position
  const float *cos = nullptr, *sin = nullptr;  // [n_tok][head_dim/2]
};

// Norms the heads of a step's queries and keys, where there are norms, rotates them and puts keys and values into their
// pages. Pairs are (i, i + head_dim/2):
// a·cos - b·sin, b·cos + a·sin, neither fused. qkv: f32 [n_tok][stride], a row is the queries of all heads, then keys,
// then values. q: f32 [n_tok][n_heads·head_dim], not qkv itself.
struct RopeAppend {
  const float* qkv = nullptr;
  int64_t stride = 0;
  float* q = nullptr;
  int n_heads = 0;
  const float *q_norm = nullptr, *k_norm = nullptr;  // [head_dim], or null
  float norm_eps = 0;
};
void rope_append(Stream& stream, const CacheLayout& cache, int layer, const Places& places, int n_tok,
                 const RopeAppend& step);

}  // namespace cuda
}  // namespace pyllama
