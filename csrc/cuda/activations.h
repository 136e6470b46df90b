// What products take in: numbers of tokens as halves, in panels of 8 tokens, and the kernels that make them of floats,
// plain or normed (RMSNorm and rounding in one pass, nothing in between in memory). A token's bits depend on its own
// numbers alone. Here is no memory management: the caller allocates `activation_sizes`.
//
// Halves end at 65504, so a token's numbers are divided by a power of two that brings the largest into 2^9 … 2^10
// (finite ones count; infinities and NaNs stay what they are and reach the output). Then the sum of 32 of them is a
// half too.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/fragments.h"
#include "cuda/runtime.h"

namespace pyllama {
namespace cuda {

constexpr int kPanelTokens = 8;

// In device memory, panels one behind the other. `sums` is for the minimums of q4a: of a chunk's two halves the high
// parts (the sum as a half) in word 0 and what is left in word 1. Places of tokens beyond the last are not written: in
// a product they reach only results that nobody stores.
struct Activations {
  uint8_t* values = nullptr;  // halves [panels][2 * chunks][8 tokens][32 columns], columns beyond the last zeros
  uint32_t* sums = nullptr;   // [panels][chunks][8 tokens][4 words], words 2 and 3 zero
  float* scales = nullptr;    // [8 * panels] powers of two
};
struct ActivationSizes {
  size_t values_bytes, sums_bytes, scales_bytes;
};
ActivationSizes activation_sizes(int columns, int n_tokens);
// These from panel `first` on.
Activations panels_from(const Activations& x, int first, int columns);

// Which numbers: f32, those of a token `stride` apart from the next one's.
struct TokenRows {
  const float* x = nullptr;
  int64_t stride = 0;
  int n_tokens = 0, columns = 0;
  const int32_t* rows = nullptr;         // of each token its row of x; or null: token i is row i
  const int32_t* input_order = nullptr;  // the matrix's (docs/FORMAT.md), or null
};

void prepare_activations(Stream& stream, const TokenRows& from, const Activations& out);

// Of y = x / sqrt(mean(x²) + eps) · weight. A token whose squares have no finite sum becomes NaN.
void norm_activations(Stream& stream, const TokenRows& from, const float* weight, float eps, const Activations& out);

}  // namespace cuda
}  // namespace pyllama
