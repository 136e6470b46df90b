// One block a token for the norm: a few kilobytes from the second-level cache, of which the latency is all that counts,
// so its threads keep their part of the row in registers and meet once. See vector.h.
#include "cuda/vector.h"

#include <cmath>
#include <stdexcept>

#include "cuda/device.h"

namespace pyllama {
namespace cuda {

namespace {

constexpr int kNormThreads = 512, kNormWarps = kNormThreads / 32;
constexpr int kKept = 16;  // numbers of a row that a thread keeps; of rows longer than 8192 it reads the rest again
constexpr int kSwigluThreads = 256;

struct NormArgs {
  Rows x;
  const float* weight;
  float eps;
  float* y;
};

struct SwigluArgs {
  Rows x;
  float* y;
};

// The same in all threads: lanes by a tree, then warps in ascending order.
PYLLAMA_DEVICE float sum_of_block(float v) {
  for (unsigned mask = 16; mask > 0; mask /= 2) v += shuffle_xor(v, mask);
  float* const sums = reinterpret_cast<float*>(shared_memory());
  if (lane() == 0) sums[warp()] = v;
  barrier();
  float sum = 0.0f;
  PYLLAMA_UNROLL
  for (int w = 0; w < kNormWarps; w++) sum += sums[w];
  return sum;
}

// registers: rms_norm_kernel 64
PYLLAMA_KERNEL PYLLAMA_LAUNCH_BOUNDS(kNormThreads, 2) void rms_norm_kernel(const NormArgs args) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int64_t token = block_index().x;
  const int me = static_cast<int>(thread_index()), columns = args.x.columns;
  const float* const x = args.x.x + token * args.x.stride;
  float* const y = args.y + token * columns;
  float kept[kKept];
  float squares = 0.0f;
  PYLLAMA_UNROLL
  for (int i = 0; i < kKept; i++) {
    const int k = me + i * kNormThreads;
    kept[i] = k < columns ? x[k] : 0.0f;
    squares = fma(kept[i], kept[i], squares);
  }
  for (int k = me + kKept * kNormThreads; k < columns; k += kNormThreads) squares = fma(x[k], x[k], squares);
  const float mean = sum_of_block(squares) / static_cast<float>(columns);
  const bool finite = (as_bits(mean) & 0x7f800000) != 0x7f800000;
  const float inverse = finite ? 1.0f / sqrtf(mean + args.eps) : as_float(0x7fc00000);
  PYLLAMA_UNROLL
  for (int i = 0; i < kKept; i++) {
    const int k = me + i * kNormThreads;
    if (k < columns) y[k] = kept[i] * inverse * args.weight[k];
  }
  for (int k = me + kKept * kNormThreads; k < columns; k += kNormThreads) y[k] = x[k] * inverse * args.weight[k];
}

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

}  // namespace

void rms_norm(Stream& stream, const Rows& x, const float* weight, float eps, float* y) {
  if (x.n_tok == 0) return;
  launch(stream, rms_norm_kernel, {x, weight, eps, y}, {static_cast<unsigned>(x.n_tok)}, kNormThreads,
         kNormWarps * sizeof(float), Start::kEarly);
}

void swiglu(Stream& stream, const Rows& x, float* y) {
  if (x.columns % 2 != 0) throw std::invalid_argument("gate and up are halves of a row: its length must be even");
  if (x.n_tok == 0) return;
  const unsigned blocks = static_cast<unsigned>((x.columns / 2 + kSwigluThreads - 1) / kSwigluThreads);
  launch(stream, swiglu_kernel, {x, y}, {static_cast<unsigned>(x.n_tok), blocks}, kSwigluThreads, 0, Start::kEarly);
}

}  // namespace cuda
}  // namespace pyllama
