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

#include "cuda/attention.cuh"

namespace pyllama {
namespace cuda {

namespace {

constexpr int kThreads = 32 * kSplitPages;
constexpr int kSplitTok = kSplitPages * kCachePageTok;
static_assert(kTileRows == kQueryRows, "a tile's queries become halves at once");

struct FewArgs : AttendStep {
  int max_splits;
  int total_splits;  // that there is room for
  int max_span_tok;
  int row_tiles;
  int tile_rows;  // rows of a tile, at most: what shared memory is made for
};

// What a block works on.
struct Tile : RowTile {
  int keys;                      // that its last row sees
  int splits;                    // that have one of them
  int first_split, span_splits;  // of the span, among those of all spans
};

PYLLAMA_DEVICE Tile tile_of_block(const FewArgs& a) {
  const Dim3 block = block_index();
  const int kv_head = static_cast<int>(block.x) / a.row_tiles, tile = static_cast<int>(block.x) % a.row_tiles;
  Tile t{row_tile(a, a.io.spans[block.z], kv_head, tile * kTileRows, kTileRows), 0, 0, 0, 0};
  t.keys = row_keys(a, t, t.rows - 1);
  t.splits = (t.keys + kSplitTok - 1) / kSplitTok;
  // No span meets the next one's: that begins n pages later, and ⌊(p + n)/4⌋ + 1 ≥ ⌊p/4⌋ + ⌈n/4⌉.
  t.first_split = t.span.pages / kSplitPages + static_cast<int>(block.z);
  t.span_splits = (t.span.pos + t.span.n_tok + kSplitTok - 1) / kSplitTok;
  return t;
}

// Shared memory: first the queries as halves and a factor for each row; later, in the same
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

// What a lane reads of a page for 32 dimensions, 16 bytes each: 8 times of an f16 cache, 4 times and two of scales of a
// q8 cache.
template <bool kBytes>
struct Piece {
  static constexpr int kLoads = kBytes ? 6 : 8;
  uint4 v[kLoads];

  PYLLAMA_DEVICE uint4 codes(int i) const { return v[i]; }
  PYLLAMA_DEVICE half2 scales(int j) const { return as_half2(word(v[4 + j / 4], j % 4)); }
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
      top = max_of(top, score);
    }
  }
  top = max_of(top, shuffle_xor(top, 1));
  top = max_of(top, shuffle_xor(top, 2));
  top -= kLargestWeight;
  const float taken = top == minus_infinity() ? 0.0f : top;
  PYLLAMA_UNROLL
  for (int j = 0; j < kPageTiles; j++) {
    s[j][at] = exp2_approx(s[j][at] - taken);
    s[j][at + 1] = exp2_approx(s[j][at + 1] - taken);
  }
  return top;
}

PYLLAMA_DEVICE void store_eight(float* to, const Eight& v) {
  store_16(to, bits_as<uint4>(v.first));
  store_16(to + 4, bits_as<uint4>(v.second));
}

// One warp over one page: its part of shared memory gets, for each row, top, Σ 2^(s - top) and Σ 2^(s - top)·v.
// `begin`: the page's first key.
template <int kBlocks, bool kBytes>
PYLLAMA_DEVICE void attend_page(const FewArgs& a, const Tile& t, const uint8_t* block, int begin) {
  constexpr int kAhead = 3;  // pieces on their way from memory
  Piece<kBytes> pieces[kAhead];
  PYLLAMA_UNROLL
  for (int i = 0; i < kAhead - 1; i++) {
    if (i < 2 * kBlocks) load_piece<kBlocks, kBytes>(pieces[i], a.cache, block, i);
  }
  prepare_queries<kBlocks>(a, t, 0, Shared<kBlocks>::queries(),
                           [](int r) -> float& { return Shared<kBlocks>::factors()[r]; });
  barrier();
  const auto next_piece = [&](int i) {
    const int ahead = i + kAhead - 1;
    if (ahead < 2 * kBlocks) load_piece<kBlocks, kBytes>(pieces[ahead % kAhead], a.cache, block, ahead);
  };
  float s[1][kPageTiles][4] = {};
  PYLLAMA_UNROLL
  for (int b = 0; b < kBlocks; b++) {
    next_piece(b);
    const QueryPair queries[1] = {load_queries<kBlocks>(Shared<kBlocks>::queries(), 0, b)};
    add_scores<kBytes>(s, queries, pieces[b % kAhead]);
  }
  const int g = static_cast<int>(lane()) / 4, column = static_cast<int>(lane()) % 4;
  const float* factors = Shared<kBlocks>::factors();
  const float top[2] = {weights_of(s[0], 0, factors[g], row_keys(a, t, g) - begin),
                        weights_of(s[0], 2, factors[g + 8], row_keys(a, t, g + 8) - begin)};
  float total[4] = {0, 0, 0, 0};
  const Weights weights[1] = {weights_from(s[0], total)};
  barrier();  // nobody needs the queries any more
  const int page = static_cast<int>(warp());
  float* out = Shared<kBlocks>::out(page, a.tile_rows) + 8 * column;
  float2* sums = Shared<kBlocks>::sums(page, a.tile_rows);
  if (column == 0 && g < t.rows) sums[g] = {top[0], total[0]};
  if (column == 0 && g + 8 < t.rows) sums[g + 8] = {top[1], total[2]};
  PYLLAMA_UNROLL
  for (int b = 0; b < kBlocks; b++) {
    next_piece(kBlocks + b);
    float o[1][4][4] = {};
    add_values<kBytes>(o, weights, pieces[(kBlocks + b) % kAhead]);
    if (g < t.rows) store_eight(out + g * Shared<kBlocks>::kRow + 32 * b, eight_of(o[0], 0));
    if (g + 8 < t.rows) store_eight(out + (g + 8) * Shared<kBlocks>::kRow + 32 * b, eight_of(o[0], 2));
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
  for (int i = 0; i < n; i++) f.top = max_of(f.top, sums[i * sums_stride].x);
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

PYLLAMA_DEVICE void store_result(const FewArgs& a, int64_t row, int d, const Folded& f) {
  float* o = a.io.o + row * a.cache.head_dim;
  PYLLAMA_UNROLL
  for (int i = 0; i < 4; i++) {
    if (d + i < a.cache.head_dim) o[d + i] = f.out[i] / f.sum;
  }
}

// The tile's number among all of the grid, whatever the split.
PYLLAMA_DEVICE int64_t tile_number() { return int64_t{block_index().z} * grid_size().x + block_index().x; }

// Partials: for each span in its place [tiles of a span][tile_rows][span_splits][wide], a multiple of 128 bytes, so
// that the 16-byte loads of what the splits give are aligned; behind those of all, in the same order, {top, sum}.
struct Partials {
  float* out;
  float2* sums;
};
PYLLAMA_DEVICE Partials partials_of(const FewArgs& a, const Tile& t, int r) {
  const int64_t of_split = int64_t{grid_size().x} * a.tile_rows;
  const int64_t in_span = int64_t{static_cast<int>(block_index().x) * a.tile_rows + r} * t.span_splits;
  const int64_t slot = t.first_split * of_split + in_span;
  return {a.io.partials + slot * a.cache.wide,
          reinterpret_cast<float2*>(a.io.partials + a.total_splits * of_split * a.cache.wide) + slot};
}

// For a tile with more keys than there are splits in the grid, or room: nobody would be the last to arrive, so the
// output would stay what it was and the counter would not come back to zero.
PYLLAMA_DEVICE void store_nan(const FewArgs& a, const Tile& t) {
  const int head_dim = a.cache.head_dim;
  for (int i = static_cast<int>(thread_index()); i < t.rows * head_dim; i += kThreads) {
    a.io.o[row_in_step(a, t, i / head_dim) * head_dim + i % head_dim] = as_float(0x7fc00000);
  }
}

template <int kBlocks, bool kBytes>
PYLLAMA_KERNEL PYLLAMA_LAUNCH_BOUNDS(kThreads, kBytes || kBlocks == 4 ? 2 : 3) void attend_few_kernel(const FewArgs a) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const Tile t = tile_of_block(a);
  const int split = static_cast<int>(block_index().y);
  if (t.rows <= 0 || split >= t.splits || t.span.n_tok > a.max_span_tok) return;
  if (t.splits > a.max_splits || t.first_split + t.span_splits > a.total_splits) {
    if (split == 0) store_nan(a, t);
    return;
  }
  const int first_page = split * kSplitPages;
  const int n_pages = smaller((t.keys + kCachePageTok - 1) / kCachePageTok - first_page, kSplitPages);
  // A warp without a page does the last one again, at no cost to the memory, and nobody asks for what it found.
  const int mine = smaller(static_cast<int>(warp()), n_pages - 1);
  attend_page<kBlocks, kBytes>(a, t, a.io.pages[t.span.pages + first_page + mine] + head_offset(a, t),
                               (first_page + mine) * kCachePageTok);
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
    const Partials to = partials_of(a, t, r);
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
    const Partials from = partials_of(a, t, r);
    store_result(a, row_in_step(a, t, r), d, fold(from.sums, 1, from.out + d, a.cache.wide, t.splits, has_columns));
  }
}

using Kernel = void (*)(FewArgs);
template <bool kBytes>
Kernel kernel_of(int blocks) {
  return blocks == 1   ? attend_few_kernel<1, kBytes>
         : blocks == 2 ? attend_few_kernel<2, kBytes>
         : blocks == 3 ? attend_few_kernel<3, kBytes>
                       : attend_few_kernel<4, kBytes>;
}

int splits_of(const AttendShape& shape) { return (shape.max_keys + kSplitTok - 1) / kSplitTok; }
// Where the last span ends: ⌊p/4⌋ + ⌈n/4⌉ ≤ ⌈(p + n)/4⌉.
int total_splits_of(const AttendShape& shape) {
  return (shape.n_pages + kSplitPages - 1) / kSplitPages + std::max(shape.n_spans - 1, 0);
}
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
  const size_t rows = static_cast<size_t>(row_tiles_of(cache, shape) * cache.n_kv_heads * tile_rows_of(cache, shape));
  return {rows * static_cast<size_t>(total_splits_of(shape)) * static_cast<size_t>(cache.wide + 2) * sizeof(float),
          tiles * sizeof(int32_t)};
}

void attend_few(Stream& stream, const CacheLayout& cache, int layer, const AttendShape& shape,
                const AttendBuffers& args) {
  FewArgs a{attend_step(cache, layer, shape, args),
            splits_of(shape),
            total_splits_of(shape),
            shape.max_span_tok,
            row_tiles_of(cache, shape),
            tile_rows_of(cache, shape)};
  if (shape.n_spans == 0 || shape.n_tok == 0) return;
  const int blocks = cache.wide / 32;
  const Kernel kernel = cache.type == CacheType::q8 ? kernel_of<true>(blocks) : kernel_of<false>(blocks);
  const Dim3 grid{static_cast<unsigned>(a.row_tiles * cache.n_kv_heads), static_cast<unsigned>(a.max_splits),
                  static_cast<unsigned>(shape.n_spans)};
  launch(stream, kernel, a, grid, kThreads, shared_bytes_of(blocks, a.tile_rows), Start::kEarly);
}

}  // namespace cuda
}  // namespace pyllama
