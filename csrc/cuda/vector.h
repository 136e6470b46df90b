// What happens to single vectors between products, f32 in and out: RMSNorm, SwiGLU. A token's result is the same bits
// whatever else is in the step. Rounding to what products take is theirs (linear_few.h); RoPE is cache.h's.
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

// y = x / sqrt(mean(x²) + eps) · weight; y [n_tok][columns], dense, may be x where x is dense. A row whose squares have
// no finite sum becomes NaN.
void rms_norm(Stream& stream, const Rows& x, const float* weight, float eps, float* y);

// y = silu(gate) · up, where a row of x has gate in its first half and up in its second; y [n_tok][columns/2], dense.
void swiglu(Stream& stream, const Rows& x, float* y);

}  // namespace cuda
}  // namespace pyllama
