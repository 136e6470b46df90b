// The angles by which a step's tokens are rotated, as cosines and sines: the same bits as on the CPU. Rotating is
// cache.h's.
#pragma once

#include <cstdint>

#include "cuda/runtime.h"

namespace pyllama {
namespace cuda {

// All pointers are to device memory.
struct RopeAngles {
  const int32_t* pos = nullptr;          // [n_tok]
  const float* inv_freq = nullptr;       // [half_dim]
  float attention_factor = 1.0f;         // multiplies cosines and sines
  int n_tok = 0, half_dim = 0;           // half_dim: head_dim / 2
  float *cos = nullptr, *sin = nullptr;  // [n_tok][half_dim]
};
void rope_angles(Stream& stream, const RopeAngles& args);

}  // namespace cuda
}  // namespace pyllama
