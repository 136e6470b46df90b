// A thread a number. See vector.h.
#include "cuda/vector.h"

#include <cmath>
#include <stdexcept>

#include "cuda/device.h"

namespace pyllama {
namespace cuda {

namespace {

constexpr int kSwigluThreads = 256;

struct SwigluArgs {
  Rows x;
  float* y;
};

}  // namespace

// Grid: tokens, of which there may be more than the 65,535 that y takes; then blocks along a row.
// registers: swiglu_kernel 40
PYLLAMA_KERNEL void swiglu_kernel(const SwigluArgs args) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int64_t token = block_index().x;
  const int hidden_dim = args.x.columns / 2;
  const int i = static_cast<int>(block_index().y) * kSwigluThreads + static_cast<int>(thread_index());
  if (i >= hidden_dim) return;
  const float* const gate = args.x.x + token * args.x.stride;
  args.y[token * hidden_dim + i] = gate[i] / (1.0f + expf(-gate[i])) * gate[hidden_dim + i];
}

void swiglu(Stream& stream, const Rows& x, float* y) {
  if (x.columns % 2 != 0) throw std::invalid_argument("gate and up are halves of a row: its length must be even");
  if (x.n_tok == 0) return;
  const unsigned blocks = static_cast<unsigned>((x.columns / 2 + kSwigluThreads - 1) / kSwigluThreads);
  launch(stream, swiglu_kernel, {x, y}, {static_cast<unsigned>(x.n_tok), blocks}, kSwigluThreads, 0, Start::kEarly);
}

}  // namespace cuda
}  // namespace pyllama
