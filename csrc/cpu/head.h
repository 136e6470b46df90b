// The logits: norm and the output matrix, for the rows that want them. The input goes in as two int8 digits instead of
// one, x ≈ q₁·s₁ + q₂·s₂ with the second digit rounding what the first left over: what int8 costs here goes straight
// into the logits (in SmolLM2 it is more than a quarter of the divergence that all int8 activations cause), and in
// decoding the second digit is nearly free, for the weights are read once for both.
#pragma once

#include "../config.h"
#include "dispatch.h"
#include "scratch.h"
#include "thread_pool.h"

namespace pyllama {
namespace cpu {

class Head {
 public:
  Head(const Config& config, const ModelWeights& weights, const Kernels& kernels, ThreadPool& pool);

  // Claims what so many rows take; before the first run().
  void claim(Arena& arena, int max_rows);

  // x: [n_tok][dim], not normed; rows: [n] of them; logits: [n][vocab_size].
  void run(const float* x, const int32_t* rows, int n, float* logits);

 private:
  void prepare_row(const float* x, int m, int n, float* left);
  bool in_tiles(int n) const;
  void multiply(int n, int tile_begin, int tile_end, float* scratch, float* logits);

  const Config& config_;
  const Weight& norm_;
  const Weight& w_;
  const Kernels& kernels_;
  ThreadPool& pool_;
  const bool quantized_;
  const int digits_;            // int8 rows per token
  float* normed_ = nullptr;     // [max_rows][dim]
  XBlock* blocks_ = nullptr;    // [max_rows * digits][ld]
  XTile* tiles_ = nullptr;      // the same for a tile unit
  float* group_sum_ = nullptr;  // [max_rows * digits][groups]; for formats with an offset
  float* tile_sum_ = nullptr;   // [a few rows / 16][groups][16]; the same where a tile unit takes such a format
  float* scratch_ = nullptr;    // per thread [kRows * digits][rows of a task]
  float* left_ = nullptr;       // per thread [dim]: what a row's digits have still to express
};

}  // namespace cpu
}  // namespace pyllama
