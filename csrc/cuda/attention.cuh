// What attention kernels have in common: rows (a row is one token and one query head of those that share a key/value
// head) and where they lie, queries as operands, and the two products of sixteen rows with a page's keys and values in
// the order of cache.h, wherever a warp reads the page from. No softmax: each kernel has its own way over the pages.
#pragma once

#include <cmath>
#include <stdexcept>
#include <string>

#include "cuda/attention.h"
#include "cuda/device.h"

namespace pyllama {
namespace cuda {

constexpr int kPageTiles = kCachePageTok / 8;  // of 8 keys: the columns of one mma
constexpr int kSteps = kCachePageTok / 16;     // of 16 keys: the depth of one mma
constexpr int kQueryRows = 16;                 // that 128 threads bring to halves at a time
// Weights are 2^10 at most where a page has its largest, so that as halves they are exact to 2^-11 down to 2^-24 of it,
// and lost below 2^-34.
constexpr float kLargestWeight = 10.0f;
constexpr int kLargestQuery = 13;  // queries are brought to 2^13 … 2^14

// What every attention kernel knows of a step.
struct AttendStep {
  AttendBuffers io;
  CacheLayout cache;
  int layer;
  int n_heads, group;  // group: query heads that share a key/value head
  float scale;         // of scores, times log2(e): softmax here is in powers of two
};

inline AttendStep attend_step(const CacheLayout& cache, int layer, const AttendShape& shape, const AttendBuffers& io) {
  if (shape.n_heads % cache.n_kv_heads != 0) {
    throw std::invalid_argument("n_heads " + std::to_string(shape.n_heads) + " is no multiple of n_kv_heads " +
                                std::to_string(cache.n_kv_heads));
  }
  const double scale = shape.scale > 0 ? shape.scale : 1.0 / std::sqrt(static_cast<double>(cache.head_dim));
  const auto in_powers_of_two = static_cast<float>(1.4426950408889634 * scale);
  return {io, cache, layer, shape.n_heads, shape.n_heads / cache.n_kv_heads, in_powers_of_two};
}

PYLLAMA_DEVICE float minus_infinity() { return as_float(0xff800000); }
PYLLAMA_DEVICE int smaller(int a, int b) { return a < b ? a : b; }
PYLLAMA_DEVICE uint32_t word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// Rows of a span and a key/value head that a block works on; none or fewer where the span ends.
struct RowTile {
  DeviceSpan span;
  int kv_head;
  int first_row, rows;
};
PYLLAMA_DEVICE RowTile row_tile(const AttendStep& a, const DeviceSpan& span, int kv_head, int first_row, int most) {
  return {span, kv_head, first_row, smaller(span.n_tok * a.group - first_row, most)};
}
// Keys that row r of the tile sees.
PYLLAMA_DEVICE int row_keys(const AttendStep& a, const RowTile& t, int r) {
  return t.span.pos + (t.first_row + r) / a.group + 1;
}
// Row r as a row of q and o: (token of the step)·n_heads + query head.
PYLLAMA_DEVICE int64_t row_in_step(const AttendStep& a, const RowTile& t, int r) {
  const int token = t.span.first + (t.first_row + r) / a.group;
  return int64_t{token} * a.n_heads + t.kv_head * a.group + (t.first_row + r) % a.group;
}
// Where the tile's head is in a page, in the step's layer. Pages are some megabytes.
PYLLAMA_DEVICE uint32_t head_offset(const AttendStep& a, const RowTile& t) {
  return static_cast<uint32_t>(a.layer * a.cache.n_kv_heads + t.kv_head) * static_cast<uint32_t>(a.cache.head_bytes);
}

// Brings rows first … first + 15 of the tile to halves in shared memory, in the order of operands: a row times scale
// and a power of two, whose inverse becomes factor_of(row), NaN where a query is no finite number. Rows that do not
// exist are zeros. 8 threads a row, 4 dimensions of each 32 a thread.
template <int kBlocks, class FactorOf>
PYLLAMA_DEVICE void prepare_queries(const AttendStep& a, const RowTile& t, int first, uint8_t* queries,
                                    const FactorOf& factor_of) {
  constexpr uint32_t kInfinity = 0x7f800000;
  const int head_dim = a.cache.head_dim;
  const int r = first + static_cast<int>(thread_index()) / 8, part = static_cast<int>(thread_index()) % 8;
  const float* q = a.io.q + (r < t.rows ? row_in_step(a, t, r) : 0) * head_dim;
  float x[4 * kBlocks];
  uint32_t largest = 0;
  PYLLAMA_UNROLL
  for (int i = 0; i < 4 * kBlocks; i++) {
    const int d = i / 4 * 32 + part * 4 + i % 4;
    x[i] = r < t.rows && d < head_dim ? q[d] : 0.0f;
    const uint32_t magnitude = as_bits(x[i]) & 0x7fffffff;
    largest = magnitude > largest ? magnitude : largest;
  }
  for (unsigned i = 1; i < 8; i *= 2) {
    const uint32_t other = shuffle_xor(largest, i);
    largest = other > largest ? other : largest;
  }
  const bool finite = largest < kInfinity;
  const int exponent = static_cast<int>(largest >> 23) - 127;
  const int shift = finite ? kLargestQuery - (exponent < -100 ? -100 : exponent) : 0;
  const float power = power_of_two(shift);
  if (part == 0) factor_of(r) = finite ? power_of_two(-shift) : as_float(0x7fc00000);
  uint8_t* to = queries + r / 16 * (kBlocks * 1024) + part % 2 * 512 + (4 * (r % 8) + part / 2) * 16 + r % 16 / 8 * 4;
  PYLLAMA_UNROLL
  for (int b = 0; b < kBlocks; b++) {
    PYLLAMA_UNROLL
    for (int i = 0; i < 2; i++) {
      const float *both = x + 4 * b + 2 * i, low = both[0] * power, high = both[1] * power;
      *reinterpret_cast<half2*>(to + b * 1024 + i * 8) = to_half2(low * a.scale, high * a.scale);
    }
  }
}

// Queries of sixteen rows in 32 dimensions: the operands of two mma. `tile`: which sixteen, `b`: which 32.
struct QueryPair {
  uint32_t first[4], second[4];
};
template <int kBlocks>
PYLLAMA_DEVICE QueryPair load_queries(const uint8_t* queries, int tile, int b) {
  const uint8_t* from = queries + (tile * kBlocks + b) * 1024 + lane() * 16;
  const uint4 first = load_16(from), second = load_16(from + 512);
  return {{first.x, first.y, first.z, first.w}, {second.x, second.y, second.z, second.w}};
}

// Two bytes less 128 as halves: 1024 + byte is a half whose lowest bits the byte is.
PYLLAMA_DEVICE uint32_t two_bytes(uint32_t w, uint32_t selector) {
  return as_bits(add(as_half2(permute_bytes(w, 0x64646464, selector)), as_half2(0xe480e480)));
}
constexpr uint32_t kLowBytes = 0x4140, kHighBytes = 0x4342;

// What a lane has of a page's keys or values in 32 dimensions: a `piece` gives codes(i), 16 bytes each, 8 times of an
// f16 cache and 4 times of a q8 cache, whose scales(j) are those of keys 8j + 2t and 8j + 2t + 1. Lane 4g + t: of keys
// bytes 16·lane of every 512, of values row t + 4i of pairs of keys, dimensions 4g … 4g + 3.

// s[m][j] += queries[m] · keys over a piece's dimensions, for kTiles times sixteen rows; s[m][j] are rows g, g and g +
// 8, g + 8 at keys 8j + 2t, 8j + 2t + 1.
template <bool kBytes, int kTiles, class Piece>
PYLLAMA_DEVICE void add_scores(float (&s)[kTiles][kPageTiles][4], const QueryPair (&queries)[kTiles],
                               const Piece& keys) {
  PYLLAMA_UNROLL
  for (int j = 0; j < kPageTiles; j++) {
    if constexpr (!kBytes) {
      const uint4 v = keys.codes(j);
      PYLLAMA_UNROLL
      for (int m = 0; m < kTiles; m++) {
        mma_m16n8k16(s[m][j], queries[m].first, {v.x, v.y});
        mma_m16n8k16(s[m][j], queries[m].second, {v.z, v.w});
      }
    } else {
      const uint4 v = keys.codes(j / 2);
      const uint32_t w0 = word(v, j % 2 * 2), w1 = word(v, j % 2 * 2 + 1);
      const uint32_t first[2] = {two_bytes(w0, kLowBytes), two_bytes(w0, kHighBytes)};
      const uint32_t second[2] = {two_bytes(w1, kLowBytes), two_bytes(w1, kHighBytes)};
      const float2 scale = to_float(keys.scales(j));
      float sum[kTiles][4] = {};
      PYLLAMA_UNROLL
      for (int m = 0; m < kTiles; m++) mma_m16n8k16(sum[m], queries[m].first, first);
      PYLLAMA_UNROLL
      for (int m = 0; m < kTiles; m++) mma_m16n8k16(sum[m], queries[m].second, second);
      PYLLAMA_UNROLL
      for (int m = 0; m < kTiles; m++) {
        s[m][j][0] = fma(sum[m][0], scale.x, s[m][j][0]);
        s[m][j][1] = fma(sum[m][1], scale.y, s[m][j][1]);
        s[m][j][2] = fma(sum[m][2], scale.x, s[m][j][2]);
        s[m][j][3] = fma(sum[m][3], scale.y, s[m][j][3]);
      }
    }
  }
}

// A page's weights where scores were, as operands of the product with values.
struct Weights {
  uint32_t p[kSteps][4];
};
// Also adds them up, as they have been rounded: total[0] and total[2] are the sums of rows g and g + 8.
PYLLAMA_DEVICE Weights weights_from(const float (&s)[kPageTiles][4], float (&total)[4]) {
  Weights w;
  PYLLAMA_UNROLL
  for (int i = 0; i < kSteps; i++) {
    w.p[i][0] = as_bits(to_half2(s[2 * i][0], s[2 * i][1]));
    w.p[i][1] = as_bits(to_half2(s[2 * i][2], s[2 * i][3]));
    w.p[i][2] = as_bits(to_half2(s[2 * i + 1][0], s[2 * i + 1][1]));
    w.p[i][3] = as_bits(to_half2(s[2 * i + 1][2], s[2 * i + 1][3]));
    mma_m16n8k16(total, w.p[i], {0x3c003c00, 0x3c003c00});  // times one
  }
  return w;
}

// o[m][i] += weights[m] · values at dimensions 4g + i of the piece's 32.
template <bool kBytes, int kTiles, class Piece>
PYLLAMA_DEVICE void add_values(float (&o)[kTiles][4][4], const Weights (&weights)[kTiles], const Piece& values) {
  PYLLAMA_UNROLL
  for (int s = 0; s < kSteps; s++) {
    const uint4 near = values.codes(kBytes ? s : 2 * s), far = kBytes ? near : values.codes(2 * s + 1);
    PYLLAMA_UNROLL
    for (int i = 0; i < 4; i++) {
      uint32_t v[2] = {word(near, i), word(far, i)};
      if constexpr (kBytes) {
        v[0] = as_bits(mul(as_half2(two_bytes(v[0], kLowBytes)), values.scales(2 * s)));
        v[1] = as_bits(mul(as_half2(two_bytes(v[1], kHighBytes)), values.scales(2 * s + 1)));
      }
      PYLLAMA_UNROLL
      for (int m = 0; m < kTiles; m++) mma_m16n8k16(o[m][i], weights[m].p[s], v);
    }
  }
}

// o's columns 2t and 2t + 1 are dimensions 8t + i and 8t + 4 + i: a row's eight lie side by side.
struct Eight {
  float4 first, second;
};
PYLLAMA_DEVICE Eight eight_of(const float (&o)[4][4], int at) {
  return {{o[0][at], o[1][at], o[2][at], o[3][at]}, {o[0][at + 1], o[1][at + 1], o[2][at + 1], o[3][at + 1]}};
}

}  // namespace cuda
}  // namespace pyllama
