// A block takes a tile of 64 or 128 rows over all the keys that they see, page after page; each of its four warps 16 or
// 32 of the rows. Queries lie in shared memory as halves; keys and values of a page come there by asynchronous copies,
// one behind the other, while the ones before them are worked on. They stay in the cache's order (cache.h), which is
// the order of operands: a warp's read is 512 bytes in a row, or, of values, whole rows shuffled so that no two lanes
// meet in a bank. With 32 rows a warp an operand read from shared memory feeds two mma instead of one.
//
// FlashAttention-2's loop (Dao 2023): scores' accumulators are the operand of the second product as they are; sums are
// brought to a new maximum on the way and divided at the end; pages that nobody sees are skipped and only those on the
// diagonal masked. A row's maximum moves only when it has grown by more than 2^kSlack, so that after the first pages
// hardly any warp has to multiply its sums; which rows do is the row's own matter.
//
// registers: attend_many_kernel 255
#include "cuda/attention_many.h"

#include <type_traits>

#include "cuda/attention.cuh"

namespace pyllama {
namespace cuda {

namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
// Weights then are 2^15 at most: a half.
constexpr float kSlack = 5.0f;

struct ManyArgs : AttendStep {
  int least;  // tokens of a span that is not left out
};

// What is known of a row between two pages: registers are short. Weights are 2^(score·factor - top), `total` is their
// sum.
struct RowState {
  float factor;
  int seen;  // keys
  float top, total;
};

// What the block knows all the time.
struct BlockState {
  RowTile tile;
  uint32_t head;     // where the key/value head is in a page
  uint32_t n_pages;  // that the block goes over
  // Keys that the first and the last row of each warp see; none where it has no row.
  int32_t all_see[kWarps], one_sees[kWarps];
};

// Shared memory: queries as halves, the states of rows and block, one place for a page's keys and one for its values,
// each with scales.
template <int kBlocks, bool kBytes, int kTiles>
struct Plan {
  static constexpr int kRows = 16 * kTiles * kWarps;
  static constexpr int kQueryBytes = kRows * kBlocks * 64;
  static constexpr int kCodeBytes = kCachePageTok * 32 * kBlocks * (kBytes ? 1 : 2);
  static constexpr int kScaleBytes = kBytes ? kCachePageTok * kBlocks * 2 : 0;
  static constexpr int kBlockAt = kQueryBytes + kRows * static_cast<int>(sizeof(RowState));
  static constexpr int kKeysAt = kBlockAt + 128;
  static constexpr int kValuesAt = kKeysAt + kCodeBytes + kScaleBytes;
  static constexpr int kSharedBytes = kValuesAt + kCodeBytes + kScaleBytes;

  PYLLAMA_DEVICE static uint8_t* queries() { return shared_memory(); }
  PYLLAMA_DEVICE static RowState* rows() { return reinterpret_cast<RowState*>(shared_memory() + kQueryBytes); }
  PYLLAMA_DEVICE static BlockState& block() { return *reinterpret_cast<BlockState*>(shared_memory() + kBlockAt); }
  PYLLAMA_DEVICE static uint8_t* keys() { return shared_memory() + kKeysAt; }
  PYLLAMA_DEVICE static uint8_t* values() { return shared_memory() + kValuesAt; }
};

// Values lie in rows of 32·kBlocks dimensions, 16 bytes after 16; the four rows that a warp reads at a time would meet
// in the same banks, so those of row r change places by this.
PYLLAMA_DEVICE unsigned value_swizzle(unsigned row) { return 2 * (row % 4); }

// Begins to copy a page's keys or values. Where the page is, is asked for twice: the table is in the first cache, and
// registers are short.
template <int kBlocks, bool kBytes, int kTiles, bool values>
PYLLAMA_DEVICE void copy_page(const ManyArgs& a, unsigned page) {
  using P = Plan<kBlocks, kBytes, kTiles>;
  const BlockState& block = P::block();
  if (page < block.n_pages) {
    const uint8_t* codes = a.io.pages[static_cast<unsigned>(block.tile.span.pages) + page] + block.head;
    const uint8_t* scales = codes + 2 * P::kCodeBytes + (values ? P::kScaleBytes : 0);
    if (values) codes += P::kCodeBytes;
    uint8_t* to = values ? P::values() : P::keys();
    const unsigned thread = thread_index_again();
    constexpr unsigned kRow = 8 * kBlocks;  // of values, in copies of 16 bytes
    PYLLAMA_UNROLL
    for (unsigned i = 0; i < P::kCodeBytes / 16 / kThreads; i++) {
      unsigned place = thread;
      if (values && kThreads % (4 * kRow) == 0) place ^= value_swizzle(thread / kRow);  // the same for all i
      if (values && kThreads % (4 * kRow) != 0) place ^= value_swizzle((thread + i * kThreads) / kRow);
      copy_async_16(to + place * 16 + i * kThreads * 16, codes + thread * 16 + i * kThreads * 16);
    }
    if (kBytes && thread < P::kScaleBytes / 16) {
      copy_async_16(to + P::kCodeBytes + thread * 16, scales + thread * 16);
    }
  }
  copy_commit();
}

// A lane's part of a page's keys or values in 32 dimensions, as add_scores and add_values want it.
template <int kStride, int kCodeBytes>
struct SharedPiece {
  const uint8_t *at, *scales_at;

  PYLLAMA_DEVICE uint4 codes(int i) const { return load_16(at + i * kStride); }
  PYLLAMA_DEVICE half2 scales(int j) const { return as_half2(word(load_16(scales_at + j / 4 * 16), j % 4)); }
};

template <class P, int kBlocks>
PYLLAMA_DEVICE SharedPiece<512 * kBlocks, P::kCodeBytes> keys_in(unsigned lane, int b) {
  return {P::keys() + b * 512 + lane * 16, P::keys() + P::kCodeBytes + b * 128 + lane % 4 * 32};
}
template <class P, int kBlocks>
PYLLAMA_DEVICE SharedPiece<512 * kBlocks, P::kCodeBytes> values_in(unsigned lane, int b) {
  const unsigned g = lane / 4, t = lane % 4;
  return {P::values() + t * (128 * kBlocks) + b * 128 + (g ^ value_swizzle(t)) * 16,
          P::values() + P::kCodeBytes + b * 128 + t * 32};
}

// Sums of weights · values of a warp's rows, for a lane g and g + 8 of each sixteen.
template <int kBlocks, int kTiles>
struct Sums {
  float o[kBlocks][kTiles][4][4];

  PYLLAMA_DEVICE void multiply(int m, const float (&by)[2]) {
    PYLLAMA_UNROLL
    for (int b = 0; b < kBlocks; b++) {
      PYLLAMA_UNROLL
      for (int i = 0; i < 16; i++) o[b][m][i / 4][i % 4] *= by[i % 4 / 2];
    }
  }
};

// Scores of a row, in column `at` and the next, become weights, and its top is raised where this page asks for it.
// Returns what sums so far are to be multiplied by. The four lanes of a row find the same; one writes it, when all have
// read what was there.
PYLLAMA_DEVICE float weigh(float (&s)[kPageTiles][4], int at, RowState& row) {
  const float factor = row.factor, before = row.top;
  float most = minus_infinity();
  PYLLAMA_UNROLL
  for (int j = 0; j < kPageTiles; j++) most = max_of(max_of(most, s[j][at]), s[j][at + 1]);
  most = max_of(most, shuffle_xor(most, 1));
  most = max_of(most, shuffle_xor(most, 2));
  const float wanted = most * factor - kLargestWeight;  // NaN where factor is; weights are then, too
  const float now = wanted > before + kSlack ? wanted : before;
  const float taken = now == minus_infinity() ? 0.0f : now;
  warp_barrier();
  if (thread_index_again() % 4 == 0) row.top = now;
  PYLLAMA_UNROLL
  for (int j = 0; j < kPageTiles; j++) {
    // The product is exact: a power of two.
    s[j][at] = exp2_approx(fma(s[j][at], factor, -taken));
    s[j][at + 1] = exp2_approx(fma(s[j][at + 1], factor, -taken));
  }
  return exp2_approx(before - taken);
}

// Takes keys out of reach that come behind a row; `seen`: how many of the page the rows g and g + 8 see.
PYLLAMA_DEVICE void mask(float (&s)[kPageTiles][4], const int (&seen)[2]) {
  const int t = static_cast<int>(lane()) % 4;
  PYLLAMA_UNROLL
  for (int j = 0; j < kPageTiles; j++) {
    PYLLAMA_UNROLL
    for (int i = 0; i < 4; i++) {
      if (8 * j + 2 * t + i % 2 >= seen[i / 2]) s[j][i] = minus_infinity();
    }
  }
}

// Rows first + g and first + 8 + g of the tile, the m-th sixteen of the warp.
template <int kBlocks, int kTiles>
PYLLAMA_DEVICE void store_rows(const ManyArgs& a, const RowTile& t, int first, const Sums<kBlocks, kTiles>& sums,
                               const RowState* rows, int m) {
  const int g = static_cast<int>(lane()) / 4, column = static_cast<int>(lane()) % 4, head_dim = a.cache.head_dim;
  PYLLAMA_UNROLL
  for (int h = 0; h < 2; h++) {
    const int r = first + 8 * h + g;
    if (r >= t.rows) continue;
    const float inverse = 1.0f / rows[r].total;
    float* to = a.io.o + row_in_step(a, t, r) * head_dim;
    PYLLAMA_UNROLL
    for (int i = 0; i < 2 * kBlocks; i++) {
      const float (&o)[4][4] = sums.o[i / 2][m];
      const int d = i / 2 * 32 + 8 * column + i % 2 * 4, at = 2 * h + i % 2;
      const float4 v{o[0][at] * inverse, o[1][at] * inverse, o[2][at] * inverse, o[3][at] * inverse};
      if (head_dim % 4 == 0) {
        if (d < head_dim) store_16(to + d, bits_as<uint4>(v));
      } else {  // even
        if (d < head_dim) to[d] = v.x, to[d + 1] = v.y;
        if (d + 2 < head_dim) to[d + 2] = v.z, to[d + 3] = v.w;
      }
    }
  }
}

// What the block works on. A span's last rows see most keys: they come first.
template <int kRows>
PYLLAMA_DEVICE RowTile tile_of_block(const ManyArgs& a) {
  const Dim3 block = block_index();
  const DeviceSpan span = a.io.spans[block.z];
  const int kv_head = static_cast<int>(block.x) % a.cache.n_kv_heads;
  const int tiles = span.n_tok < a.least ? 0 : (span.n_tok * a.group + kRows - 1) / kRows;
  const int tile = tiles - 1 - static_cast<int>(block.x) / a.cache.n_kv_heads;
  if (tile < 0) return {span, kv_head, 0, 0};
  return row_tile(a, span, kv_head, tile * kRows, kRows);
}

// Before the first page: queries and what is known of rows, by all threads, for all after the next barrier.
template <int kBlocks, class P>
PYLLAMA_DEVICE void prepare_rows(const ManyArgs& a, const RowTile& t) {
  for (int r = 0; r < P::kRows; r += kQueryRows) {
    prepare_queries<kBlocks>(a, t, r, P::queries(), [](int row) -> float& { return P::rows()[row].factor; });
  }
  const int thread = static_cast<int>(thread_index());
  if (thread < P::kRows) {
    RowState& row = P::rows()[thread];
    row.seen = thread < t.rows ? row_keys(a, t, thread) : 0;
    row.top = minus_infinity();
    row.total = 0.0f;
  }
  if (thread < kWarps) {
    constexpr int kEach = P::kRows / kWarps;
    const int begin = thread * kEach, end = smaller(begin + kEach, t.rows);
    P::block().all_see[thread] = row_keys(a, t, begin);
    P::block().one_sees[thread] = begin < end ? row_keys(a, t, end - 1) : 0;
  }
}

// s += scores of the warp's rows against the keys that are there.
template <int kBlocks, bool kBytes, int kTiles>
PYLLAMA_DEVICE void score_page(float (&s)[kTiles][kPageTiles][4]) {
  using P = Plan<kBlocks, kBytes, kTiles>;
  const unsigned thread = thread_index_again(), lane = thread % 32;
  const int tile = static_cast<int>(thread / 32) * kTiles;
  PYLLAMA_UNROLL_1
  for (int b = 0; b < kBlocks; b++) {
    QueryPair queries[kTiles];
    PYLLAMA_UNROLL
    for (int m = 0; m < kTiles; m++) queries[m] = load_queries<kBlocks>(P::queries(), tile + m, b);
    add_scores<kBytes>(s, queries, keys_in<P, kBlocks>(lane, b));
  }
}

// From scores to sums, with the values that are there; `begin`: the page's first key.
template <int kBlocks, bool kBytes, int kTiles>
PYLLAMA_DEVICE void sum_page(Sums<kBlocks, kTiles>& sums, float (&s)[kTiles][kPageTiles][4], int begin) {
  using P = Plan<kBlocks, kBytes, kTiles>;
  const unsigned thread = thread_index_again(), lane = thread % 32;
  RowState* rows = P::rows() + thread / 32 * 16 * kTiles + lane / 4;
  if (ballot(begin + kCachePageTok > P::block().all_see[thread / 32]) != 0) {
    PYLLAMA_UNROLL
    for (int m = 0; m < kTiles; m++) mask(s[m], {rows[16 * m].seen - begin, rows[16 * m + 8].seen - begin});
  }
  Weights weights[kTiles];
  PYLLAMA_UNROLL
  for (int m = 0; m < kTiles; m++) {
    RowState &near = rows[16 * m], &far = rows[16 * m + 8];
    const float totals[2] = {near.total, far.total};  // weigh has the barrier before they are written
    const float shrink[2] = {weigh(s[m], 0, near), weigh(s[m], 2, far)};
    if (ballot(shrink[0] != 1.0f || shrink[1] != 1.0f) != 0) sums.multiply(m, shrink);
    float total[4] = {0, 0, 0, 0};
    weights[m] = weights_from(s[m], total);
    if (thread_index_again() % 4 == 0) {
      near.total = fma(totals[0], shrink[0], total[0]);
      far.total = fma(totals[1], shrink[1], total[2]);
    }
  }
  PYLLAMA_UNROLL
  for (int b = 0; b < kBlocks; b++) add_values<kBytes>(sums.o[b], weights, values_in<P, kBlocks>(lane, b));
}

template <int kBlocks, bool kBytes, int kTiles>
PYLLAMA_DEVICE void attend_tile(const ManyArgs& a) {
  using P = Plan<kBlocks, kBytes, kTiles>;
  const RowTile t = tile_of_block<P::kRows>(a);
  if (t.rows <= 0) return;
  BlockState& block = P::block();
  if (thread_index_again() == 0) {
    block.tile = t;
    block.head = head_offset(a, t);
    block.n_pages = static_cast<uint32_t>((row_keys(a, t, t.rows - 1) + kCachePageTok - 1) / kCachePageTok);
  }
  barrier();
  copy_page<kBlocks, kBytes, kTiles, false>(a, 0);
  prepare_rows<kBlocks, P>(a, t);
  Sums<kBlocks, kTiles> sums = {};
  // Ballots tell the compiler that a warp stays together.
  for (unsigned page = 0; ballot(page < block.n_pages) != 0; page++) {
    const int begin = static_cast<int>(page) * kCachePageTok;
    copy_wait<0>();  // the keys are there, and nobody needs the values of the page before
    barrier();
    copy_page<kBlocks, kBytes, kTiles, true>(a, page);
    const bool mine = ballot(begin < block.one_sees[warp()]) != 0;
    float s[kTiles][kPageTiles][4] = {};
    if (mine) score_page<kBlocks, kBytes, kTiles>(s);
    copy_wait<0>();  // the same for values
    barrier();
    copy_page<kBlocks, kBytes, kTiles, false>(a, page + 1);
    if (mine) sum_page<kBlocks, kBytes, kTiles>(sums, s, begin);
  }
  warp_barrier();  // a row's state is read by others than who wrote it
  PYLLAMA_UNROLL
  for (int m = 0; m < kTiles; m++) {
    const int row = (static_cast<int>(warp()) * kTiles + m) * 16;
    store_rows(a, block.tile, row, sums, P::rows(), m);
  }
}

template <int kBlocks, bool kBytes, int kTiles>
PYLLAMA_KERNEL PYLLAMA_LAUNCH_BOUNDS(kThreads, 2) void attend_many_kernel(const ManyArgs a) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  if constexpr (kTiles == 1 || kLargeShared) attend_tile<kBlocks, kBytes, kTiles>(a);
}

struct Launch {
  void (*kernel)(ManyArgs);
  int rows, shared_bytes;
};
template <bool kBytes, int kTiles>
Launch launch_of(int blocks) {
  const auto of = [](auto b) {
    using P = Plan<b.value, kBytes, kTiles>;
    return Launch{attend_many_kernel<b.value, kBytes, kTiles>, P::kRows, P::kSharedBytes};
  };
  return blocks == 1   ? of(std::integral_constant<int, 1>{})
         : blocks == 2 ? of(std::integral_constant<int, 2>{})
         : blocks == 3 ? of(std::integral_constant<int, 3>{})
                       : of(std::integral_constant<int, 4>{});
}

// Two blocks of the larger tile want 136 KB of a multiprocessor, which those have that can use it: elsewhere (sm_75,
// 86, 89, 120) tensor cores are slow enough for what 16 rows a warp read of shared memory. And there must be enough
// blocks.
constexpr size_t kTwoLargeBlocks = 136 << 10;

}  // namespace

void attend_many(Stream& stream, const CacheLayout& cache, int layer, const AttendShape& shape,
                 const AttendBuffers& args, int least) {
  const ManyArgs a{attend_step(cache, layer, shape, args), least};
  if (shape.n_spans == 0 || shape.n_tok == 0) return;
  const auto blocks_of = [&](const Launch& l) {
    return (shape.max_span_tok * a.group + l.rows - 1) / l.rows * cache.n_kv_heads;
  };
  const bool q8 = cache.type == CacheType::q8;
  Launch l = q8 ? launch_of<true, 2>(cache.wide / 32) : launch_of<false, 2>(cache.wide / 32);
  if (shape.shared_bytes < kTwoLargeBlocks || blocks_of(l) * shape.n_spans < 2 * shape.multiprocessors) {
    l = q8 ? launch_of<true, 1>(cache.wide / 32) : launch_of<false, 1>(cache.wide / 32);
  }
  const Dim3 grid{static_cast<unsigned>(blocks_of(l)), 1, static_cast<unsigned>(shape.n_spans)};
  launch(stream, l.kernel, a, grid, kThreads, static_cast<size_t>(l.shared_bytes), Start::kEarly);
}

}  // namespace cuda
}  // namespace pyllama
