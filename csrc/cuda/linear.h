// y = x W^T by tensor cores, for any number of tokens, with weights in fragment order (fragments.h): the door to
// products. Up to 8 tokens go to linear_few.h, of which the time is that of reading weights; more to linear_many.h. The
// two sum in different orders, so a token's bits are one thing in steps of up to 8 and another in longer ones.
#pragma once

#include <cstdint>

#include "cuda/activations.h"
#include "cuda/fragments.h"

namespace pyllama {
namespace cuda {

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

// x: activations of w.columns columns, with w's input_order. The launch's shape follows `multiprocessors`; the numbers
// do not.
void linear(Stream& stream, const Fragments& w, const Activations& x, int n_tokens, const StoreRows& out,
            int multiprocessors);
void linear(Stream& stream, const Fragments& w, const Activations& x, int n_tokens, const StoreSwiglu& out,
            int multiprocessors);

}  // namespace cuda
}  // namespace pyllama
