// The two passes over the logits that sampling makes, as plain functions which a device's instruction sets provide: the
// largest logits, and the weights that tokens are drawn by. Weights are integers, so that sums of them do not depend on
// order, threads or vector width. What is done with them is csrc/model/sampler.h's.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pyllama {

constexpr int kVocabBlock = 64;  // tokens that have a maximum and a sum together
// The likeliest token's weight. The others' are multiples of 1, so that a token 2^-45 times as likely has none; what is
// lost by that is less than n·2^-45 of the whole, and n < 2^20 weights have a sum within 64 bits.
constexpr uint64_t kWeightOne = uint64_t{1} << 44;
constexpr int kMaxVocab = (1 << 20) - 1;

inline size_t vocab_blocks(int n) { return (static_cast<size_t>(n) + kVocabBlock - 1) / kVocabBlock; }

struct LargestLogit {
  float value;
  bool finite;  // all of them are; if not, and one is NaN, `value` is anything
};

struct VocabKernels {
  // Of x [n], n > 0; maxima [vocab_blocks(n)].
  LargestLogit (*largest)(const float* x, int n, float* maxima);
  // weights[i] = 2^44 · 2^((x[i] - max)·scale), rounded, for x[i] <= max, -inf included, max finite, scale >= 0 finite;
  // before rounding within 2e-12 of itself. sums: of each block. A block whose maximum is below `lowest` has the sum 0
  // and no weights written. weights [kVocabBlock·vocab_blocks(n)], those from n on are 0; maxima as largest() gave.
  void (*weigh)(const float* x, int n, const float* maxima, double lowest, double max, double scale, uint64_t* weights,
                uint64_t* sums);
};

}  // namespace pyllama
