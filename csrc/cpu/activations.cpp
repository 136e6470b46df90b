#include "activations.h"

#include <algorithm>
#include <cstring>

namespace pyllama {
namespace cpu {

WeightView view(const Weight& w) {
  return {w.format, w.scale_type, w.offset_type,     w.N,     w.K,      w.Kp(),
          w.group,  w.groups(),   w.codebook.data(), w.codes, w.scales, w.offsets};
}

WeightView slice(const Weight& w, int begin, int end) {
  WeightView v = view(w);
  const int64_t row_bytes = static_cast<int64_t>(v.Kp) * info(w.format).code_bits / 8;
  v.codes += begin * kTileRows * row_bytes;
  if (v.scales) v.scales += static_cast<int64_t>(begin) * kTileRows * v.groups * 2;
  if (v.offsets)
    v.offsets += static_cast<int64_t>(begin) * kTileRows * v.groups * (w.offset_type == Number::u8 ? 1 : 2);
  v.N = std::min(w.N, end * kTileRows) - begin * kTileRows;
  return v;
}

Activations::Activations(int max_columns, const Kernels& kernels, ThreadPool& pool)
    : kernels_(kernels), pool_(pool), max_columns_(max_columns) {}

void Activations::claim(Arena& arena, int max_tok) {
  const size_t padded = static_cast<size_t>(round_up(max_columns_, kColumnPad)), tok = static_cast<size_t>(max_tok);
  arena.claim(&reordered_, static_cast<size_t>(pool_.threads()) * static_cast<size_t>(max_columns_));
  arena.claim(&normed_, tok * padded);
  arena.claim(&blocks_, tok * (padded / 32 + kRowSkew));
  if (kernels_.tile_tok) arena.claim(&tiles_, count_tiles(max_tok, static_cast<int>(padded)));
  const int in_tiles = std::min(max_tok, kernels_.most_tile_offset_tok);
  for (size_t i = 0; i < 3; i++) {
    const size_t groups = padded / (32u << i) + 1;
    arena.claim(&sums_[i].rows, tok * groups);
    arena.claim(&sums_[i].tiles, static_cast<size_t>(round_up(in_tiles, 16)) * groups);
  }
}

void Activations::reshape(int M, int K) {
  M_ = M;
  K_ = K;
  Kp_ = static_cast<int>(round_up(K, kColumnPad));
  ld_ = Kp_ / 32 + kRowSkew;
}

bool takes_tiles(const Kernels& kernels, const Weight& w, int M) {
  if (kernels.tile_tok == 0 || !w.quantized()) return false;
  if (info(w.format).has_offset) return M >= kernels.tile_offset_tok && M <= kernels.most_tile_offset_tok;
  return M >= kernels.tile_tok;
}

void put_in_tiles(const XBlock* x, int m, int M, int blocks, int begin, int end, XTile* tiles) {
  XTile* tile = tiles + static_cast<int64_t>(m / 16) * blocks;
  const bool pairs = in_pairs(M - m / 16 * 16);
  for (int b = begin; b < end; b++) {
    if (!pairs) {
      std::memcpy(tile[b].q[m % 16], x[b].q, sizeof x[b].q);
      tile[b].scale[m % 16] = x[b].scale;
      tile[b].shift[m % 16] = x[b].shift;
      continue;
    }
    XPair& pair = reinterpret_cast<XPair*>(tile)[b / 2];
    int8_t* row = pair.q[b % 2 * 8 + m % 16];
    std::memcpy(row + b % 2 * 32, x[b].q, sizeof x[b].q);
    std::memset(row + (1 - b % 2) * 32, 0, sizeof x[b].q);
    pair.scale[b % 2][m % 16] = x[b].scale;
    pair.shift[b % 2][m % 16] = x[b].shift;
  }
}

void sum_groups(const XBlock* x, int blocks, int per_group, float* out) {
  const auto value = [](const XBlock& b) { return static_cast<float>((kDotOrigin - b.start[0]) / 8) * b.scale; };
  for (int b = 0, g = 0; b < blocks; g++) {
    float total = value(x[b++]);
    for (int j = 1; j < per_group && b < blocks; j++) total = total + value(x[b++]);
    out[g] = total;
  }
}

void put_sums_in_tiles(const float* sums, int m, int64_t groups, int64_t begin, int64_t end, float* tile_sums) {
  float* tile = tile_sums + m / 16 * groups * 16 + m % 16;
  for (int64_t g = begin; g < end; g++) tile[g * 16] = sums[g];
}

void Activations::sum_row_groups(int m, int group) {
  const int64_t groups = (K_ + group - 1) / group;
  float* sums = sums_of(group).rows + m * groups;
  sum_groups(blocks_ + m * ld_, Kp_ / 32, group / 32, sums);
  if (sums_in_tiles()) put_sums_in_tiles(sums, m, groups, 0, groups, sums_of(group).tiles);
}

void Activations::prepare_row(int m, int thread, bool quantize, const int32_t* order, const float* norm, float eps) {
  const float* row = source_ + m * ld_source_;
  if (norm) {
    float* y = normed_ + static_cast<int64_t>(m) * K_;
    kernels_.rmsnorm(row, norm, K_, eps, y);
    row = y;
  }
  if (!quantize) return;
  if (order) {
    float* reordered = reordered_ + static_cast<int64_t>(thread) * max_columns_;
    for (int k = 0; k < K_; k++) reordered[k] = row[order[k]];
    row = reordered;
  }
  kernels_.quantize_row(row, K_, blocks_ + m * ld_);
  if (in_tiles_) put_in_tiles(blocks_ + m * ld_, m, M_, Kp_ / 32, 0, Kp_ / 32, tiles_);
}

void Activations::set(const float* x, int64_t ldx, int M, int K, const float* norm, float eps, const Product* products,
                      int n) {
  reshape(M, K);
  source_ = x;
  ld_source_ = ldx;
  rows_ = norm ? normed_ : x;
  ld_rows_ = norm ? K : ldx;
  bool quantize = false;
  bool offset[3] = {};  // groups of 32, 64, 128 that a format with an offset asks for
  in_tiles_ = false;
  for (int i = 0; i < n; i++) {
    const Weight& w = *products[i].w;
    in_tiles_ |= takes_tiles(kernels_, w, M);
    if (!w.quantized() || w.input_order) continue;
    quantize = true;
    if (info(w.format).has_offset) offset[w.group / 64] = true;
  }
  const int rows = in_tiles_ ? static_cast<int>(round_up(rows_worth_a_task(K), 16)) : rows_worth_a_task(K);
  pool_.run_ranges(M, rows, [&](int begin, int end, int thread) {
    for (int m = begin; m < end; m++) {
      prepare_row(m, thread, quantize, nullptr, norm, eps);
      for (int i = 0; i < 3; i++) {
        if (offset[i]) sum_row_groups(m, 32 << i);
      }
    }
  });
}

void Activations::expect(int M, int K, const Weight& w) {
  reshape(M, K);
  rows_ = nullptr;
  part_group_ = info(w.format).has_offset ? w.group : 0;
  in_tiles_ = takes_tiles(kernels_, w, M);
}

void Activations::take_part(int m, int k, const float* x, int n) {
  XBlock* blocks = blocks_ + m * ld_ + k / 32;
  kernels_.quantize_row(x, n, blocks);
  if (in_tiles_) put_in_tiles(blocks_ + m * ld_, m, M_, Kp_ / 32, k / 32, (k + n + 31) / 32, tiles_);
  if (part_group_ != 32) return;
  const int64_t groups = Kp_ / 32, begin = k / 32, end = (k + n + 31) / 32;
  float* sums = sums_of(32).rows + m * groups;
  sum_groups(blocks, static_cast<int>(end - begin), 1, sums + begin);
  if (sums_in_tiles()) put_sums_in_tiles(sums, m, groups, begin, end, sums_of(32).tiles);
}

void Activations::complete() {
  if (part_group_ <= 32) return;
  pool_.run_ranges(M_, rows_worth_a_task(K_), [&](int begin, int end, int) {
    for (int m = begin; m < end; m++) sum_row_groups(m, part_group_);
  });
}

MatmulArgs Activations::arguments(const Product& p) const {
  MatmulArgs a{};
  a.w = view(*p.w);
  a.M = M_;
  const bool in_tiles = in_tiles_ && takes_tiles(kernels_, *p.w, M_);
  a.xq = {blocks_, ld_, nullptr, in_tiles ? tiles_ : nullptr, nullptr};
  if (info(p.w->format).has_offset) {
    a.xq.group_sum = sums_of(p.w->group).rows;
    if (in_tiles) a.xq.tile_sum = sums_of(p.w->group).tiles;
  }
  a.x = rows_;
  a.ldx = ld_rows_;
  a.bias = p.bias;
  a.y = p.y;
  a.ldy = p.ldy;
  a.accumulate = p.accumulate;
  return a;
}

// One tile when few tokens wait for memory; else enough of them to be worth the decoding of a strip.
int Activations::grain(int tiles) const {
  if (M_ <= kernels_.few_tok) return 1;
  const int strip = kernels_.strip_tiles;
  return std::max(1, tiles / (pool_.threads() * 16 * strip)) * strip;
}

// The columns of an act-order import lie in another order: its input is reordered before it is quantized.
void Activations::multiply_reordered(const Product& p) {
  const float* source = source_;
  const int64_t ld_source = ld_source_;
  source_ = rows_;  // normed already
  ld_source_ = ld_rows_;
  pool_.run(M_, [&](int m, int thread) {
    prepare_row(m, thread, true, p.w->input_order, nullptr, 0);
    sum_row_groups(m, p.w->group);
  });
  source_ = source;
  ld_source_ = ld_source;
  const MatmulArgs a = arguments(p);
  const int tiles = p.w->tiles();
  pool_.run_ranges(tiles, grain(tiles), [&](int begin, int end, int) { kernels_.matmul(a, begin, end); });
}

void Activations::multiply(const Product* products, int n) {
  constexpr int kMost = 4;
  MatmulArgs args[kMost];
  int first[kMost + 1] = {0}, count = 0;  // the products' tiles in one row, so that one region does them all
  for (int i = 0; i < n; i++) {
    if (products[i].w->input_order) continue;
    args[count] = arguments(products[i]);
    first[count + 1] = first[count] + products[i].w->tiles();
    count++;
  }
  pool_.run_ranges(first[count], grain(first[count]), [&](int begin, int end, int) {
    for (int i = 0; i < count; i++) {
      const int from = std::max(begin, first[i]), to = std::min(end, first[i + 1]);
      if (from < to) kernels_.matmul(args[i], from - first[i], to - first[i]);
    }
  });
  for (int i = 0; i < n; i++) {  // last: they overwrite the shared int8 rows
    if (products[i].w->input_order) multiply_reordered(products[i]);
  }
}

}  // namespace cpu
}  // namespace pyllama
