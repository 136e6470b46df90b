#include "attention.h"

#include <algorithm>
#include <cmath>

namespace pyllama {
namespace cpu {

static_assert(kPageTok == 64, "kernels_attention.inc counts on pages of 64");
static_assert(kSplitTok % kPageTok == 0, "a split is whole pages");

Attention::Attention(const Config& config, const Kernels& kernels, ThreadPool& pool)
    : config_(config),
      kernels_(kernels),
      pool_(pool),
      group_(config.n_heads / config.n_kv_heads),
      wide_(static_cast<int>(round_up(config.head_dim, 16))) {}

void Attention::plan(const Step& step) {
  step_ = &step;
  tiles_.clear();
  tasks_.clear();
  max_splits_ = 1;
  int64_t slots = 0;
  for (int s = 0; s < step.n_spans; s++) {
    const Span& span = step.spans[s];
    const int rows = span.n_tok * group_;
    for (int h = 0; h < config_.n_kv_heads; h++) {
      for (int row = 0; row < rows; row += kMaxQueryRows) {
        const int n = std::min(kMaxQueryRows, rows - row);
        const int last = span.pos + (row + n - 1) / group_ + 1;  // keys that the last row sees
        const int splits = (last + kSplitTok - 1) / kSplitTok;
        tiles_.push_back({s, h, row, n, splits, slots});
        slots += splits;
        max_splits_ = std::max(max_splits_, splits);
      }
    }
  }
  // Few tiles over many keys, as in decoding: the splits of one tile go to different threads.
  apart_ = max_splits_ > 1 && pool_.threads() > 1 && static_cast<int>(tiles_.size()) < 8 * pool_.threads();
  for (int t = 0; t < static_cast<int>(tiles_.size()); t++) {
    if (apart_) {
      for (int split = 0; split < tiles_[static_cast<size_t>(t)].splits; split++) tasks_.emplace_back(t, split);
    } else {
      tasks_.emplace_back(t, -1);
    }
  }
  if (!apart_) slots = static_cast<int64_t>(max_splits_) * pool_.threads();
  stats_.resize(static_cast<size_t>(slots * 2 * kMaxQueryRows));
  outs_.resize(static_cast<size_t>(slots * kMaxQueryRows * wide_));
}

int Attention::row_tok(const Tile& tile, int r) const { return (tile.first_row + r) / group_; }

int64_t Attention::row_offset(const Tile& tile, int r) const {
  const int64_t tok = step_->spans[tile.span].first + row_tok(tile, r);
  const int head = tile.kv_head * group_ + (tile.first_row + r) % group_;
  return (tok * config_.n_heads + head) * config_.head_dim;
}

AttendArgs Attention::arguments(const Tile& tile, const float* q) const {
  AttendArgs a{};
  a.rows = tile.rows;
  for (int r = 0; r < tile.rows; r++) {
    a.q[r] = q + row_offset(tile, r);
    a.limit[r] = step_->spans[tile.span].pos + row_tok(tile, r) + 1;
  }
  const int64_t first = first_page_[static_cast<size_t>(tile.span) * config_.n_kv_heads + tile.kv_head];
  a.k_pages = k_pages_.data() + first;
  a.v_pages = v_pages_.data() + first;
  a.head_dim = config_.head_dim;
  a.scale = 1.0f / std::sqrt(static_cast<float>(config_.head_dim));
  return a;
}

void Attention::attend(const Tile& tile, AttendArgs& a, int split, float* stats, float* outs) {
  a.key_begin = split * kSplitTok;
  a.key_end = std::min(a.limit[tile.rows - 1], a.key_begin + kSplitTok);
  a.max = stats;
  a.sum = stats + kMaxQueryRows;
  a.out = outs;
  kernels_.attend(a);
}

void Attention::combine(const Tile& tile, const AttendArgs& a, const float* stats, const float* outs, float* o) {
  for (int r = 0; r < tile.rows; r++) {
    const int splits = (a.limit[r] + kSplitTok - 1) / kSplitTok;  // a row leaves out splits it sees nothing of
    float* out = o + row_offset(tile, r);
    kernels_.combine(stats + r, 2 * kMaxQueryRows, stats + kMaxQueryRows + r, outs + static_cast<int64_t>(r) * wide_,
                     static_cast<int64_t>(kMaxQueryRows) * wide_, splits, config_.head_dim, out);
  }
}

void Attention::run(const Pages& pages, const float* q, float* o) {
  k_pages_.clear();
  v_pages_.clear();
  first_page_.clear();
  for (int s = 0; s < step_->n_spans; s++) {
    const Span& span = step_->spans[s];
    const int n_pages = (span.pos + span.n_tok + kPageTok - 1) / kPageTok;
    for (int h = 0; h < config_.n_kv_heads; h++) {
      first_page_.push_back(static_cast<int64_t>(k_pages_.size()));
      for (int p = 0; p < n_pages; p++) {
        const uint16_t* page = (*pages.pages)[static_cast<size_t>(span.pages[p])];
        k_pages_.push_back(page + pages.key_offset + h * pages.head_stride);
        v_pages_.push_back(page + pages.value_offset + h * pages.head_stride);
      }
    }
  }
  const int64_t stat_size = 2 * kMaxQueryRows, out_size = static_cast<int64_t>(kMaxQueryRows) * wide_;
  pool_.run(static_cast<int>(tasks_.size()), [&](int task, int thread) {
    const Tile& tile = tiles_[static_cast<size_t>(tasks_[static_cast<size_t>(task)].first)];
    AttendArgs a = arguments(tile, q);
    if (apart_) {
      const int split = tasks_[static_cast<size_t>(task)].second;
      const int64_t slot = tile.scratch + split;
      attend(tile, a, split, stats_.data() + slot * stat_size, outs_.data() + slot * out_size);
      return;
    }
    float* stats = stats_.data() + static_cast<int64_t>(thread) * max_splits_ * stat_size;
    float* outs = outs_.data() + static_cast<int64_t>(thread) * max_splits_ * out_size;
    for (int split = 0; split < tile.splits; split++) {
      attend(tile, a, split, stats + split * stat_size, outs + split * out_size);
    }
    combine(tile, a, stats, outs, o);
  });
  if (!apart_) return;
  pool_.run(static_cast<int>(tiles_.size()), [&](int t, int) {
    const Tile& tile = tiles_[static_cast<size_t>(t)];
    combine(tile, arguments(tile, q), stats_.data() + tile.scratch * stat_size, outs_.data() + tile.scratch * out_size,
            o);
  });
}

}  // namespace cpu
}  // namespace pyllama
