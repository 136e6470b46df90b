// Attention of one layer over the key/value pages: cuts the rows of a step into tiles of rows that share a key/value
// head, runs them over fixed splits of the keys, combines in ascending order. The result does not depend on how tiles
// and splits fall to threads.
#pragma once

#include <vector>

#include "../backend.h"
#include "dispatch.h"
#include "thread_pool.h"

namespace pyllama {
namespace cpu {

class Attention {
 public:
  Attention(const Config& config, const Kernels& kernels, ThreadPool& pool);

  // Cuts the step; once per step.
  void plan(const Step& step);
  // q, o: [n_tok][q_dim]. keys(page), values(page): the layer's part of a page, all heads.
  struct Pages {
    const std::vector<uint16_t*>* pages;  // by page id
    int64_t key_offset, value_offset;     // of this layer, in halves
    int64_t head_stride;                  // halves of one head in either
  };
  void run(const Pages& pages, const float* q, float* o);

 private:
  struct Tile {
    int span, kv_head, first_row, rows;  // rows count (token, head of the group), token-major
    int splits;
    int64_t scratch;  // index of its first split in the scratch, when splits run apart
  };
  int row_tok(const Tile& tile, int r) const;         // token of row r within the tile's span
  int64_t row_offset(const Tile& tile, int r) const;  // of row r's head in q and o
  AttendArgs arguments(const Tile& tile, const float* q) const;
  void attend(const Tile& tile, AttendArgs& a, int split, float* stats, float* outs);
  void combine(const Tile& tile, const AttendArgs& a, const float* stats, const float* outs, float* o);

  const Config& config_;
  const Kernels& kernels_;
  ThreadPool& pool_;
  const Step* step_ = nullptr;
  std::vector<Tile> tiles_;
  std::vector<std::pair<int, int>> tasks_;  // (tile, split) when splits run apart, else (tile, -1)
  bool apart_ = false;
  int max_splits_ = 0;
  const int group_;                  // query heads that share a key/value head
  int wide_;                         // head_dim rounded up to 16
  std::vector<float> stats_, outs_;  // [slot][2][kMaxQueryRows], [slot][kMaxQueryRows][wide]
  // Page addresses of the running layer per span and head: [span][kv_head][page] keys, then values.
  std::vector<const uint16_t*> k_pages_, v_pages_;
  std::vector<int64_t> first_page_;  // of (span, kv_head) in those
};

}  // namespace cpu
}  // namespace pyllama
