// What happens to single vectors between products, f32 in and out: SwiGLU. A token's result is the same bits whatever
// else is in the step. Norms and rounding are in activations.h, RoPE in cache.h; where gate and up are one matrix, its
// product does this by itself (linear.h).
#pragma once

#include <cstdint>

#include "cuda/runtime.h"

namespace pyllama {
namespace cuda {

// [n_tok][columns] in device memory, rows `stride` numbers apart.
struct Rows {
  const float* x = nullptr;
  int64_t stride = 0;
  int n_tok = 0, columns = 0;
};

// y = silu(gate) · up, where a row of x has gate in its first half and up in its second; y [n_tok][columns/2], dense.
void swiglu(Stream& stream, const Rows& x, float* y);

}  // namespace cuda
}  // namespace pyllama
