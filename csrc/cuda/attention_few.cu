// A block takes one tile of 16 rows (tokens and query heads that share a key/value head) over one split of keys; each
// of its warps takes one page of 64 keys, so that a page's softmax needs no running maximum and its result leaves the
// registers at once. Scores are Q·Kᵀ and outputs P·V by mma.m16n8k16 with the rows as its sixteen: most of them idle
// when one token is decoded, but the tensor cores have time (a page is 32 KB and 128 instructions), and sixteen rows
// cost the memory what one does. The scores' accumulators are, as they are, the operand of the second product, and
// pages are in operand order (cache.h), so keys and values go from memory into registers and nowhere else.
//
// FlashAttention's softmax (Dao et al. 2022, algorithm 1) over keys split as in FlashDecoding (2023). Splits meet in
// the block that arrives last; each is added in its order, so nobody's coming late changes a bit.
//
// registers: attend_few_kernel 255
#include "cuda/attention_few.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "cuda/device.h"

namespace pyllama {
namespace cuda {

namespace {

constexpr int kThreads = 32 * kSplitPages;
constexpr int kPageTiles = kCachePageTok / 8;  // of 8 keys: the columns of one mma
constexpr int kSteps = kCachePageTok / 16;     // of 16 keys: the depth of one mma
// Weights are 2^10 at most, so that as halves they are exact to 2^-11 down to 2^-24 of the largest, and lost below
// 2^-34.
constexpr float kLargestWeight = 10.0f;
constexpr int kLargestQuery = 13;  // queries are brought to 2^13 … 2^14
constexpr uint32_t kInfinity = 0x7f800000;

struct AttendArgs {
  AttendBuffers io;
  CacheLayout cache;
  int layer;
  int n_heads, group;  // group: query heads that share a key/value head
  int max_splits;
  int max_span_tok;
  int row_tiles;
  int tile_rows;  // rows of a tile, at most: what shared memory is made for
  float scale;    // log2(e)/√head_dim: softmax here is in powers of two
};

PYLLAMA_DEVICE float minus_infinity() { return as_float(0xff800000); }
PYLLAMA_DEVICE int smaller(int a, int b) { return a < b ? a : b; }
// Of two maxima; a NaN is left out here and shows itself in the weights.
PYLLAMA_DEVICE float larger(float a, float b) { return b > a ? b : a; }

// What a block works on.
struct Tile {
  DeviceSpan span;
  int kv_head;
  int first_row, rows;
  int keys;    // that its last row sees
  int splits;  // that have one of them
};

PYLLAMA_DEVICE Tile tile_of_block(const AttendArgs& a) {
  const Dim3 block = block_index();
  Tile t;
  t.span = a.io.spans[block.z];
  t.kv_head = static_cast<int>(block.x) / a.row_tiles;
  t.first_row = static_cast<int>(block.x) % a.row_tiles * kTileRows;
  t.rows = smaller(t.span.n_tok * a.group - t.first_row, kTileRows);
  t.keys = t.span.pos + (t.first_row + t.rows - 1) / a.group + 1;
  t.splits = (t.keys + kSplitPages * kCachePageTok - 1) / (kSplitPages * kCachePageTok);
  return t;
}
// Keys that row r sees; none where there is no such row.
PYLLAMA_DEVICE int row_keys(const AttendArgs& a, const Tile& t, int r) {
  return r < t.rows ? t.span.pos + (t.first_row + r) / a.group + 1 : 0;
}
// Row r as a row of q and o: (token of the step)·n_heads + query head.
PYLLAMA_DEVICE int64_t row_in_step(const AttendArgs& a, const Tile& t, int r) {
  const int token = t.span.first + (t.first_row + r) / a.group;
  return int64_t{token} * a.n_heads + t.kv_head * a.group + (t.first_row + r) % a.group;
}

// Shared memory: first the queries as halves, in the order of f16 keys, and a factor for each row; later, in the same
// place, what the pages give.
template <int kBlocks>
struct Shared {
  static constexpr int kRow = 32 * kBlocks + 4;  // floats; 4 keep eight rows' stores out of each other's banks
  static constexpr int kQueryBytes = kTileRows * kBlocks * 64;
  PYLLAMA_DEVICE static uint8_t* queries() { return shared_memory(); }
  PYLLAMA_DEVICE static float* factors() { return reinterpret_cast<float*>(shared_memory() + kQueryBytes); }
  // [page][rows][kRow], then [page][rows]{top, sum}.
  PYLLAMA_DEVICE static float* out(int page, int rows) {
    return reinterpret_cast<float*>(shared_memory()) + page * rows * kRow;
  }
  PYLLAMA_DEVICE static float2* sums(int page, int rows) {
    return reinterpret_cast<float2*>(out(kSplitPages, rows)) + page * rows;
  }
};

// Brings the tile's queries to halves: row r times a power of two. 8 threads a row, 4 dimensions of each 32 a thread.
template <int kBlocks>
PYLLAMA_DEVICE void prepare_queries(const AttendArgs& a, const Tile& t) {
  const int head_dim = a.cache.head_dim;
  const int r = static_cast<int>(thread_index()) / 8, part = static_cast<int>(thread_index()) % 8;
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
  const float inverse = power_of_two(-shift);
  if (part == 0) Shared<kBlocks>::factors()[r] = finite ? inverse * a.scale : as_float(0x7fc00000);
  half2* to = reinterpret_cast<half2*>(Shared<kBlocks>::queries() + r / 8 * (kBlocks * 512) + r % 8 * 64 + part * 8);
  PYLLAMA_UNROLL
  for (int b = 0; b < kBlocks; b++) {
    to[b * 128] = to_half2(x[4 * b] * power, x[4 * b + 1] * power);
    to[b * 128 + 1] = to_half2(x[4 * b + 2] * power, x[4 * b + 3] * power);
  }
}

// What a lane reads of a page for 32 dimensions, 16 bytes each: 8 times of an f16 cache, 4 times and two of scales of a
// q8 cache.
template <bool kBytes>
struct Piece {
  static constexpr int kLoads = kBytes ? 6 : 8;
  uint4 v[kLoads];
};

// Pieces 0 … kBlocks-1 are keys, the next kBlocks values.
template <int kBlocks, bool kBytes>
PYLLAMA_DEVICE void load_piece(Piece<kBytes>& to, const CacheLayout& cache, const uint8_t* block, int piece) {
  constexpr int kWide = 32 * kBlocks;
  const int b = piece % kBlocks, g = static_cast<int>(lane()) / 4, t = static_cast<int>(lane()) % 4;
  const bool keys = piece < kBlocks;
  const uint8_t* from;
  int stride;
  if (keys) {
    from = block + b * 512 + lane() * 16;
    stride = kBlocks * 512;
  } else {
    from = block + cache.values + t * kWide * 4 + b * 128 + g * 16;
    stride = 4 * kWide * 4;
  }
  constexpr int kCodes = kBytes ? 4 : 8;
  PYLLAMA_UNROLL
  for (int i = 0; i < kCodes; i++) to.v[i] = load_once_16(from + i * stride);
  if (kBytes) {
    const uint8_t* scales = block + (keys ? cache.key_scales : cache.value_scales) + b * 128 + t * 32;
    to.v[kCodes] = load_once_16(scales);
    to.v[kCodes + 1] = load_once_16(scales + 16);
  }
}

PYLLAMA_DEVICE uint32_t word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// Of a piece of a q8 cache: the scales of keys 8j + 2t and 8j + 2t + 1 (t: the lane's).
PYLLAMA_DEVICE half2 scales_of(const Piece<true>& p, int j) { return as_half2(word(p.v[4 + j / 4], j % 4)); }

// Two bytes less 128 as halves: 1024 + byte is a half whose lowest bits the byte is.
PYLLAMA_DEVICE uint32_t two_bytes(uint32_t w, uint32_t selector) {
  return as_bits(add(as_half2(permute_bytes(w, 0x64646464, selector)), as_half2(0xe480e480)));
}
constexpr uint32_t kLowBytes = 0x4140, kHighBytes = 0x4342;

// The queries of piece b's 32 dimensions as two operands of the products with keys.
template <int kBlocks>
PYLLAMA_DEVICE void load_queries(uint32_t (&first)[4], uint32_t (&second)[4], int b) {
  const uint4 lo = load_16(Shared<kBlocks>::queries() + b * 512 + lane() * 16);
  const uint4 hi = load_16(Shared<kBlocks>::queries() + (kBlocks + b) * 512 + lane() * 16);
  first[0] = lo.x, first[1] = hi.x, first[2] = lo.y, first[3] = hi.y;
  second[0] = lo.z, second[1] = hi.z, second[2] = lo.w, second[3] = hi.w;
}

// s[j] += queries · keys over the 32 dimensions of piece b; s[j] are rows g, g and g + 8, g + 8 at keys 8j + 2t, 8j +
// 2t + 1.
template <int kBlocks>
PYLLAMA_DEVICE void add_scores(float (&s)[kPageTiles][4], const Piece<false>& keys, int b) {
  uint32_t first[4], second[4];
  load_queries<kBlocks>(first, second, b);
  PYLLAMA_UNROLL
  for (int j = 0; j < kPageTiles; j++) {
    mma_m16n8k16(s[j], first, {keys.v[j].x, keys.v[j].y});
    mma_m16n8k16(s[j], second, {keys.v[j].z, keys.v[j].w});
  }
}
template <int kBlocks>
PYLLAMA_DEVICE void add_scores(float (&s)[kPageTiles][4], const Piece<true>& keys, int b) {
  uint32_t first[4], second[4];
  load_queries<kBlocks>(first, second, b);
  PYLLAMA_UNROLL
  for (int j = 0; j < kPageTiles; j++) {
    const uint32_t w0 = word(keys.v[j / 2], j % 2 * 2), w1 = word(keys.v[j / 2], j % 2 * 2 + 1);
    float sum[4] = {0, 0, 0, 0};
    mma_m16n8k16(sum, first, {two_bytes(w0, kLowBytes), two_bytes(w0, kHighBytes)});
    mma_m16n8k16(sum, second, {two_bytes(w1, kLowBytes), two_bytes(w1, kHighBytes)});
    const float2 scale = to_float(scales_of(keys, j));
    s[j][0] = fma(sum[0], scale.x, s[j][0]);
    s[j][1] = fma(sum[1], scale.y, s[j][1]);
    s[j][2] = fma(sum[2], scale.x, s[j][2]);
    s[j][3] = fma(sum[3], scale.y, s[j][3]);
  }
}

// Scores of one row to weights 2^(s - top), zero from key `seen` of the page on; returns top, -infinity where no key is
// seen.
PYLLAMA_DEVICE float weights_of(float (&s)[kPageTiles][4], int at, float factor, int seen) {
  float top = minus_infinity();
  const int t = static_cast<int>(lane()) % 4;
  PYLLAMA_UNROLL
  for (int j = 0; j < kPageTiles; j++) {
    PYLLAMA_UNROLL
    for (int i = 0; i < 2; i++) {
      float& score = s[j][at + i];
      score = 8 * j + 2 * t + i < seen ? score * factor : minus_infinity();
      top = larger(top, score);
    }
  }
  top = larger(top, shuffle_xor(top, 1));
  top = larger(top, shuffle_xor(top, 2));
  top -= kLargestWeight;
  const float taken = top == minus_infinity() ? 0.0f : top;
  PYLLAMA_UNROLL
  for (int j = 0; j < kPageTiles; j++) {
    s[j][at] = exp2_approx(s[j][at] - taken);
    s[j][at + 1] = exp2_approx(s[j][at + 1] - taken);
  }
  return top;
}

// o[i] = weights · values at dimensions 4g + i of the piece's 32.
PYLLAMA_DEVICE void sum_values(float (&o)[4][4], const uint32_t (&p)[kSteps][4], const Piece<false>& values) {
  PYLLAMA_UNROLL
  for (int s = 0; s < kSteps; s++) {
    PYLLAMA_UNROLL
    for (int i = 0; i < 4; i++) mma_m16n8k16(o[i], p[s], {word(values.v[2 * s], i), word(values.v[2 * s + 1], i)});
  }
}
PYLLAMA_DEVICE void sum_values(float (&o)[4][4], const uint32_t (&p)[kSteps][4], const Piece<true>& values) {
  PYLLAMA_UNROLL
  for (int s = 0; s < kSteps; s++) {
    const half2 near = scales_of(values, 2 * s), far = scales_of(values, 2 * s + 1);
    PYLLAMA_UNROLL
    for (int i = 0; i < 4; i++) {
      const uint32_t w = word(values.v[s], i);
      mma_m16n8k16(o[i], p[s],
                   {as_bits(mul(as_half2(two_bytes(w, kLowBytes)), near)),
                    as_bits(mul(as_half2(two_bytes(w, kHighBytes)), far))});
    }
  }
}

// o's columns 2t and 2t + 1 are dimensions 8t + i and 8t + 4 + i: a row's eight lie side by side.
PYLLAMA_DEVICE void store_eight(float* to, const float (&o)[4][4], int at) {
  const float4 first{o[0][at], o[1][at], o[2][at], o[3][at]};
  const float4 second{o[0][at + 1], o[1][at + 1], o[2][at + 1], o[3][at + 1]};
  store_16(to, bits_as<uint4>(first));
  store_16(to + 4, bits_as<uint4>(second));
}

// One warp over one page: its part of shared memory gets, for each row, top, Σ 2^(s - top) and Σ 2^(s - top)·v.
// `begin`: the page's first key.
template <int kBlocks, bool kBytes>
PYLLAMA_DEVICE void attend_page(const AttendArgs& a, const Tile& t, const uint8_t* block, int begin) {
  constexpr int kAhead = 3;  // pieces on their way from memory
  Piece<kBytes> pieces[kAhead];
  PYLLAMA_UNROLL
  for (int i = 0; i < kAhead - 1; i++) {
    if (i < 2 * kBlocks) load_piece<kBlocks, kBytes>(pieces[i], a.cache, block, i);
  }
  prepare_queries<kBlocks>(a, t);
  barrier();
  const auto next_piece = [&](int i) {
    const int ahead = i + kAhead - 1;
    if (ahead < 2 * kBlocks) load_piece<kBlocks, kBytes>(pieces[ahead % kAhead], a.cache, block, ahead);
  };
  float s[kPageTiles][4] = {};
  PYLLAMA_UNROLL
  for (int b = 0; b < kBlocks; b++) {
    next_piece(b);
    add_scores<kBlocks>(s, pieces[b % kAhead], b);
  }
  const int g = static_cast<int>(lane()) / 4, column = static_cast<int>(lane()) % 4;
  const float* factors = Shared<kBlocks>::factors();
  const float top[2] = {weights_of(s, 0, factors[g], row_keys(a, t, g) - begin),
                        weights_of(s, 2, factors[g + 8], row_keys(a, t, g + 8) - begin)};
  uint32_t p[kSteps][4];
  float total[4] = {0, 0, 0, 0};
  PYLLAMA_UNROLL
  for (int i = 0; i < kSteps; i++) {
    p[i][0] = as_bits(to_half2(s[2 * i][0], s[2 * i][1]));
    p[i][1] = as_bits(to_half2(s[2 * i][2], s[2 * i][3]));
    p[i][2] = as_bits(to_half2(s[2 * i + 1][0], s[2 * i + 1][1]));
    p[i][3] = as_bits(to_half2(s[2 * i + 1][2], s[2 * i + 1][3]));
    mma_m16n8k16(total, p[i], {0x3c003c00, 0x3c003c00});  // times one: the sum of what weighs the values
  }
  barrier();  // nobody needs the queries any more
  const int page = static_cast<int>(warp());
  float* out = Shared<kBlocks>::out(page, a.tile_rows) + 8 * column;
  float2* sums = Shared<kBlocks>::sums(page, a.tile_rows);
  if (column == 0 && g < t.rows) sums[g] = {top[0], total[0]};
  if (column == 0 && g + 8 < t.rows) sums[g + 8] = {top[1], total[2]};
  PYLLAMA_UNROLL
  for (int b = 0; b < kBlocks; b++) {
    next_piece(kBlocks + b);
    float o[4][4] = {};
    sum_values(o, p, pieces[(kBlocks + b) % kAhead]);
    if (g < t.rows) store_eight(out + g * Shared<kBlocks>::kRow + 32 * b, o, 0);
    if (g + 8 < t.rows) store_eight(out + (g + 8) * Shared<kBlocks>::kRow + 32 * b, o, 2);
  }
}

// Adds up parts of a row: part i has {top, sum} at sums[i·sums_stride] and this lane's four dimensions at
// out[i·out_stride]. A part that saw no key has top -infinity and adds exactly zero.
struct Folded {
  float top, sum;
  float out[4];
};
PYLLAMA_DEVICE Folded fold(const float2* sums, int64_t sums_stride, const float* out, int64_t out_stride, int n,
                           bool has_columns) {
  Folded f{minus_infinity(), 0.0f, {0.0f, 0.0f, 0.0f, 0.0f}};
  for (int i = 0; i < n; i++) f.top = larger(f.top, sums[i * sums_stride].x);
  const float taken = f.top == minus_infinity() ? 0.0f : f.top;
  PYLLAMA_UNROLL_8
  for (int i = 0; i < n; i++) {
    const float2 part = sums[i * sums_stride];
    const float weight = exp2_approx(part.x - taken);
    f.sum = fma(part.y, weight, f.sum);
    if (!has_columns) continue;
    const float4 v = bits_as<float4>(load_16(out + i * out_stride));
    f.out[0] = fma(v.x, weight, f.out[0]);
    f.out[1] = fma(v.y, weight, f.out[1]);
    f.out[2] = fma(v.z, weight, f.out[2]);
    f.out[3] = fma(v.w, weight, f.out[3]);
  }
  return f;
}

PYLLAMA_DEVICE void store_result(const AttendArgs& a, int64_t row, int d, const Folded& f) {
  float* o = a.io.o + row * a.cache.head_dim;
  PYLLAMA_UNROLL
  for (int i = 0; i < 4; i++) {
    if (d + i < a.cache.head_dim) o[d + i] = f.out[i] / f.sum;
  }
}

// The tile's number among all of the grid, whatever the split.
PYLLAMA_DEVICE int64_t tile_number() { return int64_t{block_index().z} * grid_size().x + block_index().x; }

// Partials: [tiles][tile_rows][max_splits][wide], a multiple of 128 bytes, so that the 16-byte loads of what the splits
// give are aligned; then [tiles][tile_rows][max_splits]{top, sum}.
struct Partials {
  float* out;
  float2* sums;
};
PYLLAMA_DEVICE Partials partials_of(const AttendArgs& a, int r) {
  const int64_t tiles = int64_t{grid_size().z} * grid_size().x, each = a.tile_rows * a.max_splits;
  const int64_t slot = tile_number() * each + r * a.max_splits;
  return {a.io.partials + slot * a.cache.wide,
          reinterpret_cast<float2*>(a.io.partials + tiles * each * a.cache.wide) + slot};
}

// For a tile with more keys than there are splits in the grid: nobody would be the last to arrive, so the output would
// stay what it was and the counter would not come back to zero.
PYLLAMA_DEVICE void store_nan(const AttendArgs& a, const Tile& t) {
  const int head_dim = a.cache.head_dim;
  for (int i = static_cast<int>(thread_index()); i < t.rows * head_dim; i += kThreads) {
    a.io.o[row_in_step(a, t, i / head_dim) * head_dim + i % head_dim] = as_float(0x7fc00000);
  }
}

template <int kBlocks, bool kBytes>
PYLLAMA_KERNEL PYLLAMA_LAUNCH_BOUNDS(kThreads, kBytes ? 2 : 3) void attend_few_kernel(const AttendArgs a) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const Tile t = tile_of_block(a);
  const int split = static_cast<int>(block_index().y);
  if (t.rows <= 0 || split >= t.splits || t.span.n_tok > a.max_span_tok) return;
  if (t.splits > a.max_splits) {
    if (split == 0) store_nan(a, t);
    return;
  }
  const int first_page = split * kSplitPages;
  const int n_pages = smaller((t.keys + kCachePageTok - 1) / kCachePageTok - first_page, kSplitPages);
  // A warp without a page does the last one again, at no cost to the memory, and nobody asks for what it found.
  const int mine = smaller(static_cast<int>(warp()), n_pages - 1);
  const uint8_t* block = a.io.pages[t.span.pages + first_page + mine] +
                         (int64_t{a.layer} * a.cache.n_kv_heads + t.kv_head) * a.cache.head_bytes;
  attend_page<kBlocks, kBytes>(a, t, block, (first_page + mine) * kCachePageTok);
  barrier();

  const int d = static_cast<int>(lane()) * 4;
  const bool has_columns = d < a.cache.wide;
  using S = Shared<kBlocks>;
  for (int r = static_cast<int>(warp()); r < t.rows; r += kSplitPages) {
    const Folded f = fold(S::sums(0, a.tile_rows) + r, a.tile_rows, S::out(0, a.tile_rows) + r * S::kRow + d,
                          a.tile_rows * S::kRow, n_pages, has_columns);
    if (t.splits == 1) {
      store_result(a, row_in_step(a, t, r), d, f);
      continue;
    }
    const Partials to = partials_of(a, r);
    if (lane() == 0) to.sums[split] = {f.top, f.sum};
    if (has_columns) {
      store_16(to.out + int64_t{split} * a.cache.wide + d,
               bits_as<uint4>(float4{f.out[0], f.out[1], f.out[2], f.out[3]}));
    }
  }
  if (t.splits == 1) return;

  // Whoever finishes a tile's last split adds them all up.
  fence();
  barrier();
  int* turn = reinterpret_cast<int*>(shared_memory());
  if (thread_index() == 0) {
    int* arrived = a.io.arrived + tile_number();
    *turn = atomic_add(arrived, 1);
    if (*turn == t.splits - 1) *arrived = 0;  // for the next launch
  }
  barrier();
  if (*turn != t.splits - 1) return;
  fence();
  for (int r = static_cast<int>(warp()); r < t.rows; r += kSplitPages) {
    const Partials from = partials_of(a, r);
    store_result(a, row_in_step(a, t, r), d, fold(from.sums, 1, from.out + d, a.cache.wide, t.splits, has_columns));
  }
}

using Kernel = void (*)(AttendArgs);
template <bool kBytes>
Kernel kernel_of(int blocks) {
  return blocks == 1   ? attend_few_kernel<1, kBytes>
         : blocks == 2 ? attend_few_kernel<2, kBytes>
         : blocks == 3 ? attend_few_kernel<3, kBytes>
                       : attend_few_kernel<4, kBytes>;
}

constexpr int kSplitTok = kSplitPages * kCachePageTok;

int splits_of(const AttendShape& shape) { return (shape.max_keys + kSplitTok - 1) / kSplitTok; }
int row_tiles_of(const CacheLayout& cache, const AttendShape& shape) {
  return (shape.max_span_tok * (shape.n_heads / cache.n_kv_heads) + kTileRows - 1) / kTileRows;
}

size_t shared_bytes_of(int blocks, int tile_rows) {
  const size_t rows = static_cast<size_t>(tile_rows), b = static_cast<size_t>(blocks);
  const size_t queries = kTileRows * b * 64 + kTileRows * sizeof(float);
  const size_t results = kSplitPages * rows * ((32 * b + 4) * sizeof(float) + 2 * sizeof(float));
  return std::max(queries, results);
}

int tile_rows_of(const CacheLayout& cache, const AttendShape& shape) {
  return std::min(kTileRows, shape.max_span_tok * (shape.n_heads / cache.n_kv_heads));
}

}  // namespace

AttendRoom attend_few_room(const CacheLayout& cache, const AttendShape& shape) {
  const size_t tiles = static_cast<size_t>(row_tiles_of(cache, shape) * cache.n_kv_heads * shape.n_spans);
  const size_t rows = tiles * static_cast<size_t>(tile_rows_of(cache, shape));
  return {rows * static_cast<size_t>(splits_of(shape)) * static_cast<size_t>(cache.wide + 2) * sizeof(float),
          tiles * sizeof(int32_t)};
}

void attend_few(Stream& stream, const CacheLayout& cache, int layer, const AttendShape& shape,
                const AttendBuffers& args) {
  if (shape.n_heads % cache.n_kv_heads != 0) {
    throw std::invalid_argument("n_heads " + std::to_string(shape.n_heads) + " is no multiple of n_kv_heads " +
                                std::to_string(cache.n_kv_heads));
  }
  if (shape.n_spans == 0 || shape.n_tok == 0) return;
  AttendArgs a{};
  a.io = args;
  a.cache = cache;
  a.layer = layer;
  a.n_heads = shape.n_heads;
  a.group = shape.n_heads / cache.n_kv_heads;
  a.max_splits = splits_of(shape);
  a.max_span_tok = shape.max_span_tok;
  a.row_tiles = row_tiles_of(cache, shape);
  a.tile_rows = tile_rows_of(cache, shape);
  a.scale = static_cast<float>(1.4426950408889634 / std::sqrt(static_cast<double>(cache.head_dim)));
  const int blocks = cache.wide / 32;
  const Kernel kernel = cache.type == CacheType::q8 ? kernel_of<true>(blocks) : kernel_of<false>(blocks);
  const Dim3 grid{static_cast<unsigned>(a.row_tiles * cache.n_kv_heads), static_cast<unsigned>(a.max_splits),
                  static_cast<unsigned>(shape.n_spans)};
  launch(stream, kernel, a, grid, kThreads, shared_bytes_of(blocks, a.tile_rows), Start::kEarly);
}

}  // namespace cuda
}  // namespace pyllama
