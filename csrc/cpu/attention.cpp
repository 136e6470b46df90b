#include "attention.h"

#include <algorithm>
#include <numeric>
#include <set>
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
      group_(config.n_heads / config.n_kv_heads) {
  std::set<int> windows;
  for (int layer = 0; layer < config.n_layers; layer++) windows.insert(config.window(layer));
  for (const int window : windows) {
    cuts_.emplace_back();
    cuts_.back().window = window;
  }
}

void Attention::cut(Cut& cut, int tile_rows) {
  cut.tiles.clear();
  for (int s = 0; s < step_->n_spans; s++) {
    const int rows = step_->spans[s].n_tok * group_, parts = (rows + tile_rows - 1) / tile_rows;
    const int most = tile_rows > kFewRows ? tile_rows : made_even((rows + parts - 1) / parts);
    for (int h = 0; h < config_.n_kv_heads; h++) {
      for (int row = 0; row < rows; row += most) {
        Tile tile{s, h, row, std::min(most, rows - row), 0, 0, 0};
        tile.begin = row_begin(cut, tile, 0) / kPageTok * kPageTok;
        tile.splits = (row_limit(tile, tile.rows - 1) + kSplitTok - 1) / kSplitTok - tile.begin / kSplitTok;
        cut.tiles.push_back(tile);
      }
    }
  }
  // Long ones first, so that no thread starts one when the others are done.
  const auto work = [&](const Tile& tile) {
    return static_cast<int64_t>(tile.rows) * (row_limit(tile, tile.rows - 1) - tile.begin);
  };
  std::stable_sort(cut.tiles.begin(), cut.tiles.end(), [&](const Tile& a, const Tile& b) { return work(a) > work(b); });
}

void Attention::choose_tiles(Cut& c) {
  const int threads = pool_.threads();
  const int64_t all_rows = static_cast<int64_t>(step_->n_tok) * config_.n_heads;
  const int64_t share = all_rows / (4 * threads) / 12 * 12;
  cut(c, static_cast<int>(std::clamp<int64_t>(share, kMinTileRows, kMaxQueryRows)));
  const auto count = [](int sum, const Tile& tile) { return sum + tile.splits; };
  if (std::accumulate(c.tiles.begin(), c.tiles.end(), 0, count) < kTasksPerThread * threads) cut(c, kFewRows);
}

int64_t Attention::give_tasks(Cut& c) {
  const int threads = pool_.threads(), n_tiles = static_cast<int>(c.tiles.size());
  int64_t splits = 0;
  int most_splits = 1;
  for (Tile& tile : c.tiles) {
    tile.slot = splits;
    splits += tile.splits;
    most_splits = std::max(most_splits, tile.splits);
  }
  c.apart =
      most_splits > 1 && threads > 1 && n_tiles < kTilesPerThread * threads && splits * slot_size() <= kMaxPartials;
  c.tasks.clear();
  for (int t = 0; t < n_tiles; t++) {
    const int n = c.apart ? c.tiles[static_cast<size_t>(t)].splits : 0;
    for (int split = 0; split < n; split++) c.tasks.push_back({t, split});
    if (!c.apart) c.tasks.push_back({t, -1});
  }
  return c.apart ? splits : threads;
}

void Attention::plan(const Step& step) {
  step_ = &step;
  int most_rows = 1;
  size_t most_tiles = 0;
  for (Cut& c : cuts_) {
    choose_tiles(c);
    for (const Tile& tile : c.tiles) most_rows = std::max(most_rows, tile.rows);
    most_tiles = std::max(most_tiles, c.tiles.size());
  }
  slot_rows_ = made_even(most_rows);
  int64_t slots = 0;
  bool apart = false;
  for (Cut& c : cuts_) {
    slots = std::max(slots, give_tasks(c));
    apart = apart || c.apart;
  }
  partials_.resize(static_cast<size_t>(slot_size() * slots));
  scratch_size_ = static_cast<size_t>(slot_rows_) * static_cast<size_t>(config_.head_dim) +
                  attend_scratch(slot_rows_, layout_.head);
  scratch_.resize(scratch_size_ * static_cast<size_t>(pool_.threads()));
  if (apart && n_unfinished_ < most_tiles) {
    unfinished_ = std::make_unique<std::atomic<int>[]>(most_tiles);
    n_unfinished_ = most_tiles;
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

int Attention::row_begin(const Cut& cut, const Tile& tile, int r) const {
  return std::max(0, row_limit(tile, r) - cut.window);
}

int Attention::first_key(const Tile& tile, int split) {
  return split <= 0 ? tile.begin : (tile.begin / kSplitTok + split) * kSplitTok;
}

int64_t Attention::slot_size() const { return static_cast<int64_t>(slot_rows_) * (layout_.head.wide + 2); }

Attention::Partial Attention::partial(int64_t slot) {
  float* max = partials_.data() + slot * slot_size();
  return {max, max + slot_rows_, max + 2 * slot_rows_};
}

const uint8_t* Attention::first_keys(int task) const {
  if (static_cast<size_t>(task) >= cut_->tasks.size()) return nullptr;
  const Task& job = cut_->tasks[static_cast<size_t>(task)];
  const Tile& tile = cut_->tiles[static_cast<size_t>(job.tile)];
  const int page = first_key(tile, job.split) / kPageTok;
  return pages_[step_->spans[tile.span].pages[page]] + layout_.head_offset(layer_, tile.kv_head);
}

void Attention::attend(const Task& task, const uint8_t* next, const Partial& result, int thread) {
  const Tile& tile = cut_->tiles[static_cast<size_t>(task.tile)];
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
      if (queries_.norm) kernels_.rmsnorm(q, queries_.norm, config_.head_dim, config_.norm_eps, q);
      if (queries_.cos) kernels_.rope(q, queries_.cos + at, queries_.sin + at, config_.head_dim);
    } else {
      std::fill_n(q, config_.head_dim, 0.0f);
    }
  }
  AttendArgs a{};
  a.rows = tile.rows;
  a.q = scratch;
  a.limit = limit;
  a.window = cut_->window;
  a.key_begin = first_key(tile, task.split);
  a.key_end = limit[rows - 1];
  if (task.split >= 0) a.key_end = std::min(a.key_end, (a.key_begin / kSplitTok + 1) * kSplitTok);
  a.pages = pages_;
  a.page_ids = step_->spans[tile.span].pages;
  a.head_offset = layout_.head_offset(layer_, tile.kv_head);
  a.next = next;
  a.layout = layout_.head;
  a.scale = config_.attention_scale;
  a.max = result.max;
  a.sum = result.sum;
  a.out = result.out;
  a.scratch = scratch + static_cast<int64_t>(slot_rows_) * config_.head_dim;
  kernels_.attend(a);
}

// Slots of a tile lie behind one another; n_slots 1 when the splits are folded already.
void Attention::combine(const Tile& tile, const Partial& first, int n_slots, float* o) {
  const int64_t stride = slot_size();
  const int tile_split = tile.begin / kSplitTok;
  for (int r = 0; r < tile.rows; r++) {
    // A row leaves out splits it sees nothing of.
    const int begin = n_slots == 1 ? 0 : row_begin(*cut_, tile, r) / kSplitTok - tile_split;
    const int end = n_slots == 1 ? 1 : (row_limit(tile, r) + kSplitTok - 1) / kSplitTok - tile_split;
    const int64_t at = begin * stride + r;
    float* out = o + row_offset(tile, r);
    kernels_.combine(first.max + at, first.sum + at,
                     first.out + begin * stride + static_cast<int64_t>(r) * layout_.head.wide, stride, end - begin,
                     config_.head_dim, out);
    if (next_) next_->take_part(row_of_step(tile, r), row_column(tile, r), out, config_.head_dim);
  }
}

void Attention::run(int layer, const uint8_t* const* pages, const Queries& queries, float* o, Activations* next) {
  layer_ = layer;
  pages_ = pages;
  queries_ = queries;
  next_ = next;
  const int window = config_.window(layer);
  cut_ = &*std::find_if(cuts_.begin(), cuts_.end(), [&](const Cut& cut) { return cut.window == window; });
  const std::vector<Tile>& tiles = cut_->tiles;
  if (cut_->apart) {
    for (size_t t = 0; t < tiles.size(); t++) unfinished_[t].store(tiles[t].splits, std::memory_order_relaxed);
  }
  pool_.run(static_cast<int>(cut_->tasks.size()), [&](int task, int thread) {
    const Task& job = cut_->tasks[static_cast<size_t>(task)];
    const Tile& tile = tiles[static_cast<size_t>(job.tile)];
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
