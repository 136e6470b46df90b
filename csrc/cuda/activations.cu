// One block a token: a few kilobytes from the second-level cache, of which the latency is all that counts, so its
// threads keep their part of the row in registers and meet once for the norm and once for the largest number. A warp's
// numbers are half a chunk, 32 columns, whose sum is a tree of shuffles.
//
// registers: activations_kernel 64
#include "cuda/activations.h"

#include <cmath>
#include <stdexcept>

#include "cuda/device.h"

namespace pyllama {
namespace cuda {

namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kKept = 16;    // numbers of a row that a thread keeps; of rows longer than 8192 it reads the rest again
constexpr int kLargest = 9;  // a token's numbers are brought to 2^9 … 2^10

struct ActivationsArgs {
  TokenRows from;
  const float* weight;
  float eps;
  half* values;
  half* sums;
  float* scales;
  int chunks;
};

// Combines a number of each thread, in the same order in all of them: lanes by a tree, then warps in ascending order.
// `shared` has a word for each warp.
template <class T, class F>
PYLLAMA_DEVICE T over_block(T v, T first, T* shared, const F& combine) {
  for (unsigned mask = 16; mask > 0; mask /= 2) v = combine(v, shuffle_xor(v, mask));
  if (lane() == 0) shared[warp()] = v;
  barrier();
  PYLLAMA_UNROLL
  for (int w = 0; w < kWarps; w++) first = combine(first, shared[w]);
  return first;
}

// 1 / root of the mean square; NaN where that is no number.
PYLLAMA_DEVICE float inverse_norm(const ActivationsArgs& args, const float* x, const float (&kept)[kKept]) {
  float squares = 0.0f;
  PYLLAMA_UNROLL
  for (int i = 0; i < kKept; i++) squares = fma(kept[i], kept[i], squares);
  const int columns = args.from.columns;
  for (int k = static_cast<int>(thread_index()) + kKept * kThreads; k < columns; k += kThreads) {
    squares = fma(x[k], x[k], squares);
  }
  float* const shared = reinterpret_cast<float*>(shared_memory());
  const float sum = over_block(squares, 0.0f, shared, [](float a, float b) { return a + b; });
  const float mean = sum / static_cast<float>(columns);
  const bool finite = (as_bits(mean) & 0x7f800000) != 0x7f800000;
  return finite ? 1.0f / sqrtf(mean + args.eps) : as_float(0x7fc00000);
}

// The larger of two |numbers| as bits, which are ordered as the floats are; what is not finite does not count.
PYLLAMA_DEVICE uint32_t larger(uint32_t bits, float value) {
  const uint32_t its = as_bits(value) & 0x7fffffff;
  return its > bits && its < 0x7f800000 ? its : bits;
}

// Half a chunk of a token, one number of each lane: rounded, and their sum in two halves.
PYLLAMA_DEVICE void write_half_chunk(const ActivationsArgs& args, int token, int half_chunk, float value) {
  const int64_t panel = token / kPanelTokens, in_panel = token % kPanelTokens;
  const half rounded = to_half(value);
  args.values[((panel * 2 * args.chunks + half_chunk) * kPanelTokens + in_panel) * 32 + lane()] = rounded;
  float sum = to_float(rounded);
  for (unsigned mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
  const half high = to_half(sum), low = to_half(sum - to_float(high));
  half* const sums = args.sums + ((panel * args.chunks + half_chunk / 2) * kPanelTokens + in_panel) * 8;
  if (lane() < 4) sums[2 * lane() + half_chunk % 2] = lane() == 0 ? high : lane() == 1 ? low : to_half(0.0f);
}

}  // namespace

// Grid: a block for each token; shared: two words for each warp.
template <bool normed>
PYLLAMA_KERNEL void PYLLAMA_LAUNCH_BOUNDS(kThreads, 2) activations_kernel(const ActivationsArgs args) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int token = static_cast<int>(block_index().x), me = static_cast<int>(thread_index());
  const int columns = args.from.columns;
  const int64_t row = args.from.rows ? args.from.rows[token] : token;
  const float* const x = args.from.x + row * args.from.stride;
  const int32_t* const order = args.from.input_order;

  float kept[kKept];
  PYLLAMA_UNROLL
  for (int i = 0; i < kKept; i++) kept[i] = me + i * kThreads < columns ? x[me + i * kThreads] : 0.0f;
  float inverse = 1.0f;
  if constexpr (normed) inverse = inverse_norm(args, x, kept);
  const auto normed_value = [&](float v, int k) { return normed ? v * inverse * args.weight[k] : v; };

  uint32_t largest = 0;
  PYLLAMA_UNROLL
  for (int i = 0; i < kKept; i++) {
    if (me + i * kThreads < columns) kept[i] = normed_value(kept[i], me + i * kThreads);
    largest = larger(largest, kept[i]);
  }
  for (int k = me + kKept * kThreads; k < columns; k += kThreads) largest = larger(largest, normed_value(x[k], k));
  largest = over_block(largest, uint32_t{0}, reinterpret_cast<uint32_t*>(shared_memory()) + kWarps,
                       [](uint32_t a, uint32_t b) { return a > b ? a : b; });
  int exponent = largest ? static_cast<int>(largest >> 23) - 127 - kLargest : 0;
  if (exponent < -100) exponent = -100;
  const float divide = power_of_two(-exponent);
  if (me == 0) args.scales[token] = power_of_two(exponent);

  const auto write = [&](int i, float plain) {
    const int k = me + i * kThreads, half_chunk = static_cast<int>(warp()) + i * kWarps;
    if (half_chunk >= 2 * args.chunks) return;  // the same for a whole warp
    if (order && k < columns) plain = normed_value(x[order[k]], order[k]);
    write_half_chunk(args, token, half_chunk, plain * divide);
  };
  PYLLAMA_UNROLL
  for (int i = 0; i < kKept; i++) write(i, kept[i]);
  for (int i = kKept; i * kWarps < 2 * args.chunks; i++) {
    const int k = me + i * kThreads;
    write(i, k < columns && !order ? normed_value(x[k], k) : 0.0f);
  }
}

namespace {

int chunks_of(int columns) { return (columns + kChunkColumns - 1) / kChunkColumns; }

template <bool normed>
void launch_activations(Stream& stream, const TokenRows& from, const float* weight, float eps, const Activations& out) {
  if (from.n_tokens < 0 || from.columns < 1) throw std::invalid_argument("activations of no columns");
  if (from.n_tokens == 0) return;
  const ActivationsArgs args{from,
                             weight,
                             eps,
                             reinterpret_cast<half*>(out.values),
                             reinterpret_cast<half*>(out.sums),
                             out.scales,
                             chunks_of(from.columns)};
  launch(stream, activations_kernel<normed>, args, Dim3{static_cast<unsigned>(from.n_tokens), 1, 1}, kThreads,
         2 * kWarps * 4, Start::kEarly);
}

}  // namespace

ActivationSizes activation_sizes(int columns, int n_tokens) {
  const size_t chunks = static_cast<size_t>(chunks_of(columns));
  const size_t tokens = static_cast<size_t>((n_tokens + kPanelTokens - 1) / kPanelTokens * kPanelTokens);
  return {chunks * tokens * kChunkColumns * 2, chunks * tokens * 16, tokens * 4};
}

Activations panels_from(const Activations& x, int first, int columns) {
  const ActivationSizes one = activation_sizes(columns, kPanelTokens);
  const size_t n = static_cast<size_t>(first);
  return {x.values + n * one.values_bytes, x.sums + n * one.sums_bytes / 4, x.scales + n * kPanelTokens};
}

void prepare_activations(Stream& stream, const TokenRows& from, const Activations& out) {
  launch_activations<false>(stream, from, nullptr, 0.0f, out);
}

void norm_activations(Stream& stream, const TokenRows& from, const float* weight, float eps, const Activations& out) {
  launch_activations<true>(stream, from, weight, eps, out);
}

}  // namespace cuda
}  // namespace pyllama
