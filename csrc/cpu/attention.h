// Attention of one layer over the key/value pages: where keys and values lie in a page, how the rows of a step are cut
// into tiles that share a key/value head, and which thread takes which keys. The result does not depend on how tiles
// and splits fall to threads.
#pragma once

#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "../backend.h"
#include "activations.h"
#include "dispatch.h"
#include "thread_pool.h"

namespace pyllama {
namespace cpu {

KvLayout kv_layout(KvType type, int head_dim);
KvType kv_type(const std::string& name);  // "f16" or "q8"; std::invalid_argument otherwise

// A page holds one block after another: the key/value heads of layer 0, of layer 1, …
struct PageLayout {
  PageLayout(const Config& config, KvType type);
  int64_t head_offset(int layer, int kv_head) const {
    return (static_cast<int64_t>(layer) * n_kv_heads + kv_head) * head.bytes;
  }

  KvLayout head;
  int n_kv_heads;
  int64_t page_bytes;
};

// The queries of a step.
struct Queries {
  const float* q;          // [n_tok][q_dim]
  const float* norm;       // [head_dim], to norm each head by before it is rotated, or null
  const float *cos, *sin;  // [n_tok][head_dim/2], to rotate them by; null where they are rotated already
};

class Attention {
 public:
  Attention(const Config& config, KvType type, const Kernels& kernels, ThreadPool& pool);

  const PageLayout& layout() const { return layout_; }
  // Cuts the step, for each of the layers' windows; once per step.
  void plan(const Step& step);
  // pages by id; o: [n_tok][q_dim]. Heads that are finished go to `next`, unless it is null, while they are in the
  // cache.
  void run(int layer, const uint8_t* const* pages, const Queries& queries, float* o, Activations* next);

 private:
  struct Tile {
    int span, kv_head, first_row, rows;  // rows count (token, head of the group), token-major
    int begin;                           // the first key of the first page that a row sees something of
    int splits;                          // that rows see something of, from that page's on
    int64_t slot;                        // of its first split's results, when splits run apart
  };
  struct Task {
    int tile, split;  // split counts from the tile's first; -1: all of them
  };
  // What a step is cut into for layers with one window.
  struct Cut {
    int window = kAllKeys;
    std::vector<Tile> tiles;
    std::vector<Task> tasks;
    bool apart = false;
  };
  // Results that are not yet divided: of a tile's rows, maxima and sums, and what their values add up to.
  struct Partial {
    float *max, *sum, *out;
  };
  void cut(Cut& cut, int tile_rows);
  void choose_tiles(Cut& cut);
  int64_t give_tasks(Cut& cut);                                  // returns the slots that they take
  int row_tok(const Tile& tile, int r) const;                    // token of row r within the tile's span
  int row_of_step(const Tile& tile, int r) const;                // token of row r within the step
  int row_column(const Tile& tile, int r) const;                 // where row r's head begins in that token's q and o
  int64_t row_offset(const Tile& tile, int r) const;             // both together
  int row_limit(const Tile& tile, int r) const;                  // row r sees keys before this
  int row_begin(const Cut& cut, const Tile& tile, int r) const;  // and from this on
  static int first_key(const Tile& tile, int split);
  int64_t slot_size() const;  // floats
  Partial partial(int64_t slot);
  const uint8_t* first_keys(int task) const;  // null behind the last task
  void attend(const Task& task, const uint8_t* next, const Partial& result, int thread);
  void combine(const Tile& tile, const Partial& first, int n_slots, float* o);

  const Config& config_;
  const Kernels& kernels_;
  ThreadPool& pool_;
  const PageLayout layout_;
  const int group_;  // query heads that share a key/value head
  const Step* step_ = nullptr;
  std::vector<Cut> cuts_;        // one for each window that layers have
  int slot_rows_ = 0;            // rows that a slot has room for
  std::vector<float> partials_;  // [slot][slot_rows_·(2 + wide)]; a slot for each split or each thread
  std::vector<float> scratch_;   // [thread][scratch_size_]: a tile's q, then the kernel's
  size_t scratch_size_ = 0;
  std::unique_ptr<std::atomic<int>[]> unfinished_;  // splits of a tile that are still to come
  size_t n_unfinished_ = 0;
  // Of the running layer.
  int layer_ = 0;
  const Cut* cut_ = nullptr;
  const uint8_t* const* pages_ = nullptr;
  Queries queries_{};
  Activations* next_ = nullptr;
};

}  // namespace cpu
}  // namespace pyllama
