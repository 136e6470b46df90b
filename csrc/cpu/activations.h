// Activations on their way into a matrix: the float rows and, where a weight is quantized, their int8 form with the
// sums that formats with an offset need. And the loop that spreads several weights on one input over the threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../tensor.h"
#include "dispatch.h"
#include "scratch.h"
#include "thread_pool.h"

namespace pyllama {
namespace cpu {

constexpr int kRowSkew = 4;  // blocks between int8 rows, so that rows of 2^n columns do not share the sets of a cache

WeightView view(const Weight& w);
// Rows of K numbers whose norm and rounding take as long as a parallel region costs: fewer are done by one thread.
inline int rows_worth_a_task(int K) { return std::max(1, 8192 / K); }
// The part of a matrix that tiles [begin, end) make.
WeightView slice(const Weight& w, int begin, int end);

// out[g] = Σ q·scale over each group of a weight, ascending from its first 32 columns; x: [blocks].
void sum_groups(const XBlock* x, int blocks, int per_group, float* out);
// Of the sums of row m's groups those in [begin, end) in their places among sixteen tokens', as a tile unit takes them.
void put_sums_in_tiles(const float* sums, int m, int64_t groups, int64_t begin, int64_t end, float* tile_sums);

// Whether a product of M rows wants them as a tile unit does.
bool takes_tiles(const Kernels& kernels, const Weight& w, int M);
// What a tile unit takes: room for up to `max_tok` tokens, and the blocks [begin, end) of row m of M in their places.
inline size_t count_tiles(int max_tok, int columns) {
  return static_cast<size_t>((max_tok + 15) / 16) * static_cast<size_t>(columns / 32) + 1;  // 1: half an XPair is left
}
void put_in_tiles(const XBlock* x, int m, int M, int blocks, int begin, int end, XTile* tiles);

// One product of a group that shares its input: y[m] (+)= W·x[m] + bias.
struct Product {
  const Weight* w;
  float* y;  // [M][ldy]
  int64_t ldy;
  const float* bias = nullptr;  // [N]
  bool accumulate = false;
};

class Activations {
 public:
  Activations(int max_columns, const Kernels& kernels, ThreadPool& pool);

  // Claims what rows of so many tokens take; before the first set().
  void claim(Arena& arena, int max_tok);
  // Takes the rows x[M][ldx] of K columns; they must stay until the products are done. norm: f32[K] or null.
  void set(const float* x, int64_t ldx, int M, int K, const float* norm, float eps, const Product* products, int n);
  // The same in parts, as they are made: M rows of K columns for a product with w, whose parts take_part() brings.
  static bool takes_parts(const Weight& w) { return w.quantized() && !w.input_order; }
  void expect(int M, int K, const Weight& w);
  // The columns [k, k + n) of row m, in any order and from any thread. k is a multiple of 32, and n where more follow.
  void take_part(int m, int k, const float* x, int n);
  // All parts are there.
  void complete();
  // y = W·x for each product, tiles spread over the threads.
  void multiply(const Product* products, int n);
  // Arguments of a product over the current rows, for a caller that spreads tiles itself. Not for weights with
  // input_order.
  MatmulArgs arguments(const Product& p) const;
  // What a run of tiles, as threads take them, is a multiple of.
  int grain(int tiles) const;

 private:
  void prepare_row(int m, int thread, bool quantize, const int32_t* order, const float* norm, float eps);
  void multiply_reordered(const Product& p);
  void reshape(int M, int K);
  void sum_row_groups(int m, int group);
  // Sums of groups of 32, 64 and 128 columns.
  struct Sums {
    float* rows = nullptr;   // [M][ceil(K/group)] sums of q·scale
    float* tiles = nullptr;  // [ceil(M/16)][ceil(K/group)][16]
  };
  const Sums& sums_of(int group) const { return sums_[group / 64]; }
  bool sums_in_tiles() const { return in_tiles_ && M_ <= kernels_.most_tile_offset_tok; }

  const Kernels& kernels_;
  ThreadPool& pool_;
  int M_ = 0, K_ = 0, Kp_ = 0;
  bool in_tiles_ = false;
  int64_t ld_ = 0;
  const float* source_ = nullptr;
  int64_t ld_source_ = 0;
  const float* rows_ = nullptr;  // [M][ld_rows_]: the source, or its normed copy
  int64_t ld_rows_ = 0;
  int part_group_ = 0;  // of parts: the group whose sums are wanted, or 0
  const int max_columns_;
  float* reordered_ = nullptr;  // per thread [max_columns]
  float* normed_ = nullptr;     // [max_tok][max_columns]
  XBlock* blocks_ = nullptr;    // [M][ld_]
  XTile* tiles_ = nullptr;      // [ceil(M/16)][Kp/32]
  Sums sums_[3];
};

}  // namespace cpu
}  // namespace pyllama
