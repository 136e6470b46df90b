#include "head.h"

#include <algorithm>
#include <cmath>

#include "activations.h"

namespace pyllama {
namespace cpu {

namespace {

constexpr int kRows = 32;       // tokens of one product
constexpr int kFewRows = 8;     // so few come in two halves, whose digits fit the kernels for few tokens of AVX-512
constexpr int kTaskTiles = 16;  // at most

}  // namespace

Head::Head(const Config& config, const ModelWeights& weights, const Kernels& kernels, ThreadPool& pool)
    : config_(config),
      norm_(weights.norm),
      w_(weights.output),
      kernels_(kernels),
      pool_(pool),
      quantized_(weights.output.quantized()),
      digits_(quantized_ ? 2 : 1) {}

void Head::claim(Arena& arena, int max_rows) {
  if (w_.N == 0) return;  // another backend has the head
  const size_t rows = static_cast<size_t>(max_rows) * digits_, threads = static_cast<size_t>(pool_.threads());
  arena.claim(&normed_, static_cast<size_t>(max_rows) * config_.dim);
  arena.claim(&scratch_, threads * kRows * digits_ * kTaskTiles * kTileRows);
  arena.claim(&left_, threads * config_.dim);
  if (!quantized_) return;
  arena.claim(&blocks_, rows * (w_.Kp() / 32 + kRowSkew));
  if (kernels_.tile_tok) arena.claim(&tiles_, count_tiles(static_cast<int>(rows), w_.Kp()));
  if (!info(w_.format).has_offset) return;
  arena.claim(&group_sum_, rows * w_.groups());
  arena.claim(&tile_sum_, static_cast<size_t>(round_up(kernels_.most_tile_offset_tok, 16)) * w_.groups());
}

bool Head::in_tiles(int n) const { return takes_tiles(kernels_, w_, n * digits_); }

void Head::prepare_row(const float* source, int m, int n, float* left) {
  const int dim = config_.dim, blocks = w_.Kp() / 32;
  float* row = normed_ + static_cast<int64_t>(m) * dim;
  kernels_.rmsnorm(source, norm_.vector(), dim, config_.norm_eps, row);
  if (!quantized_) return;
  for (int k = 0; k < dim; k++) left[k] = row[w_.input_order ? w_.input_order[k] : k];
  for (int d = 0; d < digits_; d++) {
    const int64_t r = static_cast<int64_t>(m) * digits_ + d;
    XBlock* x = blocks_ + r * (blocks + kRowSkew);
    kernels_.quantize_row(left, dim, x);
    if (in_tiles(n)) put_in_tiles(x, static_cast<int>(r), n * digits_, blocks, 0, blocks, tiles_);
    if (group_sum_) {
      float* sums = group_sum_ + r * w_.groups();
      sum_groups(x, blocks, w_.group / 32, sums);
      if (in_tiles(n)) put_sums_in_tiles(sums, static_cast<int>(r), w_.groups(), 0, w_.groups(), tile_sum_);
    }
    for (int k = 0; d + 1 < digits_ && k < dim; k++) {
      left[k] = std::fma(-static_cast<float>(x[k / 32].q[k % 32]), x[k / 32].scale, left[k]);
    }
  }
}

void Head::multiply(int n, int tile_begin, int tile_end, float* scratch, float* logits) {
  const int columns = (tile_end - tile_begin) * kTileRows, blocks = w_.Kp() / 32;
  MatmulArgs a{};
  a.w = slice(w_, tile_begin, tile_end);
  a.ldx = config_.dim;
  a.y = scratch;
  a.ldy = columns;
  const int rows = n <= kFewRows && !in_tiles(n) ? kFewRows / 2 : kRows;
  for (int m0 = 0; m0 < n; m0 += rows) {
    const int count = std::min(rows, n - m0);
    const int64_t row = static_cast<int64_t>(m0) * digits_;
    a.M = count * digits_;
    a.x = normed_ + static_cast<int64_t>(m0) * config_.dim;
    if (quantized_) {
      const int64_t ld = blocks + kRowSkew;
      a.xq = {blocks_ + row * ld, ld, group_sum_ ? group_sum_ + row * w_.groups() : nullptr,
              in_tiles(n) ? tiles_ + row / 16 * blocks : nullptr,
              in_tiles(n) && tile_sum_ ? tile_sum_ + row * w_.groups() : nullptr};
    }
    kernels_.matmul(a, 0, tile_end - tile_begin);
    for (int m = 0; m < count; m++) {
      float* out = logits + static_cast<int64_t>(m0 + m) * config_.vocab_size + tile_begin * kTileRows;
      const float* first = scratch + static_cast<int64_t>(m) * digits_ * columns;
      for (int i = 0; i < a.w.N; i++) out[i] = quantized_ ? first[i] + first[columns + i] : first[i];
    }
  }
}

void Head::run(const float* x, const int32_t* rows, int n, float* logits) {
  pool_.run_ranges(n, rows_worth_a_task(config_.dim), [&](int begin, int end, int thread) {
    const int64_t dim = config_.dim;
    for (int m = begin; m < end; m++) prepare_row(x + rows[m] * dim, m, n, left_ + thread * dim);
  });
  const size_t scratch_size = static_cast<size_t>(kRows) * digits_ * kTaskTiles * kTileRows;
  pool_.run_ranges(w_.tiles(), 1, [&](int begin, int end, int thread) {
    for (; begin < end; begin += kTaskTiles) {
      multiply(n, begin, std::min(end, begin + kTaskTiles), scratch_ + thread * scratch_size, logits);
    }
  });
}

}  // namespace cpu
}  // namespace pyllama
