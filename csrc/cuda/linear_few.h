// y = x W^T for 1 to 8 tokens, by tensor cores, with weights in fragment order (fragments.h): the product of decoding.
// A token's numbers are the same bits whatever the other tokens are and however many, and on any number of
// multiprocessors. Not for prompts: eight tokens fill the matrix instruction's free side, and more would read the
// weights again.
#pragma once

#include <cstdint>

#include "cuda/fragments.h"

namespace pyllama {
namespace cuda {

constexpr int kFewTokens = 8;

// The inputs of products, in device memory. Halves end at 65504, so a token's numbers are divided by a power of two
// that brings the largest into 2^9 … 2^10 (finite ones count; infinities and NaNs stay what they are and reach the
// output). Then the sum of 32 of them is a half too. `sums` has them for the minimums of q4a: of a chunk's two halves
// the high parts (the sum as a half) in word 0 and what is left in word 1.
struct Activations {
  uint8_t* values = nullptr;  // halves [2 * chunks][8 tokens][32 columns]
  uint32_t* sums = nullptr;   // [chunks][8 tokens][4 words], words 2 and 3 zero
  float* scales = nullptr;    // [8 tokens] powers of two
};
struct ActivationSizes {
  size_t values_bytes, sums_bytes, scales_bytes;
};
ActivationSizes activation_sizes(int columns);

// x: f32 [n_tokens][columns], `stride` numbers apart. input_order: null, or the matrix's (docs/FORMAT.md).
void prepare_activations(Stream& stream, const float* x, int64_t stride, int n_tokens, int columns,
                         const int32_t* input_order, const Activations& out);

// What becomes of y: f32 [n_tokens][rows], `stride` numbers apart. y = product (+ bias) (+ residual), in this order.
struct StoreRows {
  float* y = nullptr;
  int64_t stride = 0;
  const float* bias = nullptr;      // [rows] or null
  const float* residual = nullptr;  // as y, and may be y; or null
};

// y = silu(rows g) * rows g + 8: the matrix has gate's rows 8i … 8i + 7 in rows 16i … 16i + 7 and up's in the next
// eight, by to_fragments' row_map. y: f32 [n_tokens][hidden_dim].
struct StoreSwiglu {
  float* y = nullptr;
  int64_t stride = 0;
  int hidden_dim = 0;
};

// The launch's shape follows `multiprocessors`; the numbers do not.
void linear_few(Stream& stream, const Fragments& w, const Activations& x, int n_tokens, const StoreRows& out,
                int multiprocessors);
void linear_few(Stream& stream, const Fragments& w, const Activations& x, int n_tokens, const StoreSwiglu& out,
                int multiprocessors);

}  // namespace cuda
}  // namespace pyllama
