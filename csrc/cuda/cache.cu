// Writing the key/value cache: a warp takes one token's query head, or its key and value head, rotates it and stores
// it. Each lane owns dimensions lane, lane + 32, …, so that a scale of the q8 cache is one reduction over the warp. See
// cache.h.
#include "cuda/cache.h"

#include <stdexcept>
#include <string>

#include "backend.h"
#include "cuda/device.h"

namespace pyllama {
namespace cuda {

static_assert(kCachePageTok == kPageTok, "the device's pages are the model's");

CacheLayout cache_layout(CacheType type, int n_layers, int n_kv_heads, int head_dim) {
  if (head_dim < 2 || head_dim > kMaxHeadDim || head_dim % 2 != 0) {
    throw std::invalid_argument("head_dim " + std::to_string(head_dim) + ": the CUDA kernels take even ones up to " +
                                std::to_string(kMaxHeadDim) + "; use device=\"cpu\" for this model");
  }
  CacheLayout l;
  l.type = type;
  l.n_layers = n_layers;
  l.n_kv_heads = n_kv_heads;
  l.head_dim = head_dim;
  l.wide = (head_dim + kCacheGroup - 1) / kCacheGroup * kCacheGroup;
  const int codes = kCachePageTok * l.wide * (type == CacheType::f16 ? 2 : 1);
  const int scales = type == CacheType::f16 ? 0 : kCachePageTok * l.wide / kCacheGroup * 2;
  l.values = codes;
  l.key_scales = 2 * codes;
  l.value_scales = l.key_scales + scales;
  l.head_bytes = l.value_scales + scales;
  l.page_bytes = int64_t{l.head_bytes} * n_kv_heads * n_layers;
  return l;
}

namespace {

constexpr unsigned kWarps = 4;
constexpr int kMaxShare = kMaxHeadDim / 32;  // dimensions of a lane
constexpr uint32_t kInfinity = 0x7f800000;

// The largest value of the q8 cache: 127 times the half 515.5 still is a half.
constexpr float kLargestHalf = 65504.0f, kLargestScale = 515.5f;

struct RopeAppendArgs {
  CacheLayout cache;
  Places places;
  RopeAppend step;
  int layer;
};

PYLLAMA_DEVICE bool is_finite(float x) { return (as_bits(x) & kInfinity) != kInfinity; }
PYLLAMA_DEVICE float clamp(float x, float limit) { return x > limit ? limit : x < -limit ? -limit : x; }

// A head's numbers as they are, or normed.
struct Head {
  const float* x;
  const float* norm;  // [head_dim], or null
  float inverse;      // of the root of the mean square

  PYLLAMA_DEVICE float at(int d) const { return norm ? x[d] * inverse * norm[d] : x[d]; }
};

PYLLAMA_DEVICE Head head_of(const float* x, const float* norm, int head_dim, float eps) {
  if (!norm) return {x, norm, 1.0f};
  float sum = 0.0f;
  for (int d = static_cast<int>(lane()); d < head_dim; d += 32) sum = fma(x[d], x[d], sum);
  for (unsigned i = 16; i > 0; i /= 2) sum += shuffle_xor(sum, i);  // every lane gets the same bits
  return {x, norm, 1.0f / sqrtf(sum / static_cast<float>(head_dim) + eps)};
}

// Dimension d of a head after rotation by its token's angles.
PYLLAMA_DEVICE float rotated(const Head& head, const float* cos, const float* sin, int d, int half_dim) {
  if (d < half_dim) return head.at(d) * cos[d] - head.at(d + half_dim) * sin[d];
  const int i = d - half_dim;
  return head.at(d) * cos[i] + head.at(i) * sin[i];
}

// Byte offsets in a block; `k` is the token's slot in its page.
PYLLAMA_DEVICE int half_key_at(int k, int d, int wide) {
  return 512 * (k / 8 * (wide / 32) + d / 32) + 64 * (k % 8) + 2 * (d % 32);
}
PYLLAMA_DEVICE int half_value_at(int k, int d, int wide) { return 4 * (k / 2 * wide + d) + 2 * (k % 2); }
PYLLAMA_DEVICE int byte_key_at(int k, int d, int wide) {
  return 512 * (k / 16 * (wide / 32) + d / 32) + 64 * (k % 8) + 16 * (d % 32 / 8) + 8 * (k / 8 % 2) + d % 8;
}
PYLLAMA_DEVICE int byte_value_at(int k, int d, int wide) {
  return 4 * ((k / 16 * 4 + k % 8 / 2) * wide + d) + 2 * (k / 8 % 2) + k % 2;
}
PYLLAMA_DEVICE int scale_at(int k, int d) { return 2 * (64 * (d / 32) + 16 * (k % 8 / 2) + 2 * (k / 8) + k % 2); }

PYLLAMA_DEVICE void store_half(uint8_t* p, float x) { *reinterpret_cast<half*>(p) = to_half(x); }

// The smallest half that is at least a 127th of the largest of the warp's 32 numbers.
PYLLAMA_DEVICE half scale_of(float x) {
  uint32_t largest = as_bits(x) & 0x7fffffff;
  for (unsigned i = 16; i > 0; i /= 2) {
    const uint32_t other = shuffle_xor(largest, i);
    largest = other > largest ? other : largest;
  }
  const float wanted = clamp(as_float(largest) / 127.0f, kLargestScale);
  const half nearest = to_half(wanted);
  const uint16_t next = static_cast<uint16_t>(bits_as<uint16_t>(nearest) + 1);
  return to_float(nearest) < wanted ? bits_as<half>(next) : nearest;
}

PYLLAMA_DEVICE uint8_t code_of(float x, half scale) {
  const float s = to_float(scale);
  const float inverse = s > 0.0f ? 1.0f / s : 0.0f;
  const float code = clamp(x * inverse, 127.0f) + 0x1.8p23f;  // rounds to an integer, which ends up in the last bits
  return static_cast<uint8_t>(as_bits(code) + 128);
}

PYLLAMA_DEVICE void append(const RopeAppendArgs& args, int token, int kv_head, const float (&k)[kMaxShare],
                           const float (&v)[kMaxShare]) {
  const CacheLayout& l = args.cache;
  uint8_t* block = args.places.pages[token] + (int64_t{args.layer} * l.n_kv_heads + kv_head) * l.head_bytes;
  const int slot = args.places.pos[token] % kCachePageTok;
  bool good = true;
  for (int i = 0; i < kMaxShare; i++) good = good && is_finite(k[i]) && is_finite(v[i]);
  good = ballot(good) == 0xffffffffu;
  const float nan = as_float(0x7fc00000);
  PYLLAMA_UNROLL
  for (int i = 0; i < kMaxShare; i++) {
    const int d = static_cast<int>(lane()) + 32 * i;
    if (d >= l.wide) break;  // for the whole warp
    const float key = good ? k[i] : 0.0f, value = good ? v[i] : 0.0f;
    if (l.type == CacheType::f16) {
      store_half(block + half_key_at(slot, d, l.wide), good ? clamp(key, kLargestHalf) : nan);
      store_half(block + l.values + half_value_at(slot, d, l.wide), clamp(value, kLargestHalf));
    } else {
      const half key_scale = scale_of(key), value_scale = scale_of(value);
      block[byte_key_at(slot, d, l.wide)] = code_of(key, key_scale);
      block[l.values + byte_value_at(slot, d, l.wide)] = code_of(value, value_scale);
      if (lane() == 0) {
        *reinterpret_cast<half*>(block + l.key_scales + scale_at(slot, d)) = good ? key_scale : to_half(nan);
        *reinterpret_cast<half*>(block + l.value_scales + scale_at(slot, d)) = value_scale;
      }
    }
  }
}

// Grid: tokens, of which there may be more than the 65,535 that y and z take; then heads.
// registers: rope_append_kernel 64
PYLLAMA_KERNEL void rope_append_kernel(const RopeAppendArgs args) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const CacheLayout& l = args.cache;
  const int n_heads = args.step.n_heads;
  const int head = static_cast<int>(block_index().y * kWarps + warp());
  const int token = static_cast<int>(block_index().x);
  if (head >= n_heads + l.n_kv_heads) return;
  const int half_dim = l.head_dim / 2;
  const float* in = args.step.qkv + token * args.step.stride + int64_t{head} * l.head_dim;
  const float* cos = args.places.cos + int64_t{token} * half_dim;
  const float* sin = args.places.sin + int64_t{token} * half_dim;
  const float* norm = head < n_heads ? args.step.q_norm : args.step.k_norm;
  const Head normed = head_of(in, norm, l.head_dim, args.step.norm_eps);
  float x[kMaxShare], v[kMaxShare];
  PYLLAMA_UNROLL
  for (int i = 0; i < kMaxShare; i++) {
    const int d = static_cast<int>(lane()) + 32 * i;
    const bool inside = d < l.head_dim;
    x[i] = inside ? rotated(normed, cos, sin, d, half_dim) : 0.0f;
    v[i] = inside && head >= n_heads ? in[l.n_kv_heads * l.head_dim + d] : 0.0f;
    if (inside && head < n_heads) args.step.q[(int64_t{token} * n_heads + head) * l.head_dim + d] = x[i];
  }
  if (head >= n_heads) append(args, token, head - n_heads, x, v);
}

}  // namespace

void rope_append(Stream& stream, const CacheLayout& cache, int layer, const Places& places, int n_tok,
                 const RopeAppend& step) {
  if (n_tok == 0) return;
  const unsigned warps = static_cast<unsigned>(step.n_heads + cache.n_kv_heads);
  const Dim3 grid{static_cast<unsigned>(n_tok), (warps + kWarps - 1) / kWarps};
  launch(stream, rope_append_kernel, {cache, places, step, layer}, grid, 32 * kWarps, 0, Start::kEarly);
}

}  // namespace cuda
}  // namespace pyllama
