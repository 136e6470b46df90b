#include "attention.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>

namespace pyllama {
namespace cpu {

static_assert(kPageTok == 64, "kernels_attention_page.inc counts on pages of 64");
static_assert(kSplitTok % kPageTok == 0, "a split is whole pages");

namespace {

// Tiles below this many a thread are cut along the keys too, so that threads finish together.
constexpr int kTilesPerThread = 8;
constexpr int kMinTileRows = 24;
// Where a step has fewer tasks for a thread than this, they are cut to as many rows as kernels hold in registers.
constexpr int kTasksPerThread = 4, kFewRows = 8;
// Splits run apart only while their results stay below this: 32 MB of floats.
constexpr int64_t kMaxPartials = int64_t{8} << 20;

// Kernels work on blocks of even size.
int made_even(int rows) { return rows + rows % 2; }

}  // namespace

KvLayout kv_layout(KvType type, int head_dim) {
  KvLayout l{};
  l.type = type;
  l.head_dim = head_dim;
  l.wide = static_cast<int>(round_up(head_dim, 16));
  l.quads = (head_dim + 3) / 4;
  l.groups = (head_dim + 31) / 32;
  const int64_t scales = int64_t{2} * kPageTok * l.groups;
  if (type == KvType::f16) {
    l.values = int64_t{2} * kPageTok * head_dim;
    l.bytes = l.values + int64_t{2} * kPageTok * l.wide;
  } else {
    l.key_scales = int64_t{4} * kPageTok * l.quads;
    l.values = l.key_scales + scales;
    l.value_scales = l.values + static_cast<int64_t>(kPageTok) * l.wide;
    l.bytes = l.value_scales + scales;
  }
  return l;
}

KvType kv_type(const std::string& name) {
  if (name == "f16") return KvType::f16;
  if (name == "q8") return KvType::q8;
  throw std::invalid_argument("kv_dtype='" + name + "': expected f16 or q8");
}

PageLayout::PageLayout(const Config& config, KvType type)
    : head(kv_layout(type, config.head_dim)),
      n_kv_heads(config.n_kv_heads),
      page_bytes(head_offset(config.n_layers, 0)) {}

Attention::Attention(const Config& config, KvType type, const Kernels& kernels, ThreadPool& pool)
    : config_(config),
      kernels_(kernels),
      pool_(pool),
      layout_(config, type),
      group_(config.n_heads / config.n_kv_heads) {}

void Attention::cut(const Step& step, int tile_rows) {
  tiles_.clear();
  for (int s = 0; s < step.n_spans; s++) {
    const int rows = step.spans[s].n_tok * group_, parts = (rows + tile_rows - 1) / tile_rows;
    const int most = tile_rows > kFewRows ? tile_rows : made_even((rows + parts - 1) / parts);
    for (int h = 0; h < config_.n_kv_heads; h++) {
      for (int row = 0; row < rows; row += most) {
        Tile tile{s, h, row, std::min(most, rows - row), 0, 0};
        tile.splits = (row_limit(tile, tile.rows - 1) + kSplitTok - 1) / kSplitTok;
        tiles_.push_back(tile);
      }
    }
  }
  // Long ones first, so that no thread starts one when the others are done.
  std::stable_sort(tiles_.begin(), tiles_.end(), [&](const Tile& a, const Tile& b) {
    return static_cast<int64_t>(a.rows) * row_limit(a, a.rows - 1) >
           static_cast<int64_t>(b.rows) * row_limit(b, b.rows - 1);
  });
}

void Attention::plan(const Step& step) {
  step_ = &step;
  const int threads = pool_.threads();
  const int64_t all_rows = static_cast<int64_t>(step.n_tok) * config_.n_heads;
  const int64_t share = all_rows / (4 * threads) / 12 * 12;
  cut(step, static_cast<int>(std::clamp<int64_t>(share, kMinTileRows, kMaxQueryRows)));
  const auto count = [](int sum, const Tile& tile) { return sum + tile.splits; };
  if (std::accumulate(tiles_.begin(), tiles_.end(), 0, count) < kTasksPerThread * threads) cut(step, kFewRows);
  int64_t splits = 0;
  int most_splits = 1, most_rows = 1;
  for (Tile& tile : tiles_) {
    tile.slot = splits;
    splits += tile.splits;
    most_splits = std::max(most_splits, tile.splits);
    most_rows = std::max(most_rows, tile.rows);
  }
  slot_rows_ = made_even(most_rows);
  const int64_t slot_size = static_cast<int64_t>(slot_rows_) * (layout_.head.wide + 2);
  const int n_tiles = static_cast<int>(tiles_.size());
  apart_ = most_splits > 1 && threads > 1 && n_tiles < kTilesPerThread * threads && splits * slot_size <= kMaxPartials;
  tasks_.clear();
  for (int t = 0; t < n_tiles; t++) {
    const int n = apart_ ? tiles_[static_cast<size_t>(t)].splits : 0;
    for (int split = 0; split < n; split++) tasks_.push_back({t, split});
    if (!apart_) tasks_.push_back({t, -1});
  }
  partials_.resize(static_cast<size_t>(slot_size * (apart_ ? splits : threads)));
  scratch_size_ = static_cast<size_t>(slot_rows_) * static_cast<size_t>(config_.head_dim) +
                  attend_scratch(slot_rows_, layout_.head);
  scratch_.resize(scratch_size_ * static_cast<size_t>(threads));
  if (apart_ && n_unfinished_ < tiles_.size()) {
    unfinished_ = std::make_unique<std::atomic<int>[]>(tiles_.size());
    n_unfinished_ = tiles_.size();
  }
}

int Attention::row_tok(const Tile& tile, int r) const { return (tile.first_row + r) / group_; }

int Attention::row_of_step(const Tile& tile, int r) const { return step_->spans[tile.span].first + row_tok(tile, r); }

int Attention::row_column(const Tile& tile, int r) const {
  return (tile.kv_head * group_ + (tile.first_row + r) % group_) * config_.head_dim;
}

int64_t Attention::row_offset(const Tile& tile, int r) const {
  return static_cast<int64_t>(row_of_step(tile, r)) * config_.q_dim() + row_column(tile, r);
}

int Attention::row_limit(const Tile& tile, int r) const { return step_->spans[tile.span].pos + row_tok(tile, r) + 1; }

Attention::Partial Attention::partial(int64_t slot) {
  const int64_t rows = slot_rows_;
  float* max = partials_.data() + slot * rows * (layout_.head.wide + 2);
  return {max, max + rows, max + 2 * rows};
}

const uint8_t* Attention::first_keys(int task) const {
  if (static_cast<size_t>(task) >= tasks_.size()) return nullptr;
  const Task& job = tasks_[static_cast<size_t>(task)];
  const Tile& tile = tiles_[static_cast<size_t>(job.tile)];
  const int page = std::max(job.split, 0) * (kSplitTok / kPageTok);
  return pages_[step_->spans[tile.span].pages[page]] + layout_.head_offset(layer_, tile.kv_head);
}

void Attention::attend(const Task& task, const uint8_t* next, const Partial& result, int thread) {
  const Tile& tile = tiles_[static_cast<size_t>(task.tile)];
  const int split = task.split;
  float* scratch = scratch_.data() + scratch_size_ * static_cast<size_t>(thread);
  const int rows = made_even(tile.rows);
  int limit[kMaxQueryRows];
  for (int r = 0; r < rows; r++) {
    const bool real = r < tile.rows;
    limit[r] = row_limit(tile, real ? r : tile.rows - 1);
    float* q = scratch + static_cast<int64_t>(r) * config_.head_dim;
    if (real) {
      const int64_t half = config_.head_dim / 2, at = row_of_step(tile, r) * half;
      std::copy_n(queries_.q + row_offset(tile, r), config_.head_dim, q);
      if (queries_.cos) kernels_.rope(q, queries_.cos + at, queries_.sin + at, config_.head_dim);
    } else {
      std::fill_n(q, config_.head_dim, 0.0f);
    }
  }
  AttendArgs a{};
  a.rows = tile.rows;
  a.q = scratch;
  a.limit = limit;
  a.key_begin = std::max(split, 0) * kSplitTok;
  a.key_end = limit[rows - 1];
  if (split >= 0) a.key_end = std::min(a.key_end, a.key_begin + kSplitTok);
  a.pages = pages_;
  a.page_ids = step_->spans[tile.span].pages;
  a.head_offset = layout_.head_offset(layer_, tile.kv_head);
  a.next = next;
  a.layout = layout_.head;
  a.scale = 1.0f / std::sqrt(static_cast<float>(config_.head_dim));
  a.max = result.max;
  a.sum = result.sum;
  a.out = result.out;
  a.scratch = scratch + static_cast<int64_t>(slot_rows_) * config_.head_dim;
  kernels_.attend(a);
}

// Slots of a tile lie behind one another; n_slots 1 when the splits are folded already.
void Attention::combine(const Tile& tile, const Partial& first, int n_slots, float* o) {
  const int64_t stride = static_cast<int64_t>(slot_rows_) * (layout_.head.wide + 2);
  for (int r = 0; r < tile.rows; r++) {
    const int seen = (row_limit(tile, r) + kSplitTok - 1) / kSplitTok;  // a row leaves out splits it sees nothing of
    float* out = o + row_offset(tile, r);
    kernels_.combine(first.max + r, first.sum + r, first.out + static_cast<int64_t>(r) * layout_.head.wide, stride,
                     std::min(n_slots, seen), config_.head_dim, out);
    if (next_) next_->take_part(row_of_step(tile, r), row_column(tile, r), out, config_.head_dim);
  }
}

void Attention::run(int layer, const uint8_t* const* pages, const Queries& queries, float* o, Activations* next) {
  layer_ = layer;
  pages_ = pages;
  queries_ = queries;
  next_ = next;
  if (apart_) {
    for (size_t t = 0; t < tiles_.size(); t++) unfinished_[t].store(tiles_[t].splits, std::memory_order_relaxed);
  }
  pool_.run(static_cast<int>(tasks_.size()), [&](int task, int thread) {
    const Task& job = tasks_[static_cast<size_t>(task)];
    const Tile& tile = tiles_[static_cast<size_t>(job.tile)];
    const bool whole = job.split < 0;
    // Threads that are equally fast take tasks in turns.
    attend(job, first_keys(task + pool_.threads()), partial(whole ? thread : tile.slot + job.split), thread);
    // Whoever finishes a tile's last split combines them: no second region.
    if (whole) {
      combine(tile, partial(thread), 1, o);
    } else if (unfinished_[static_cast<size_t>(job.tile)].fetch_sub(1, std::memory_order_acq_rel) == 1) {
      combine(tile, partial(tile.slot), tile.splits, o);
    }
  });
}

}  // namespace cpu
}  // namespace pyllama
