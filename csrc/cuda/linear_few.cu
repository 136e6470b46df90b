// The kernels around linear_few.cuh: activations to halves, and the plain product and SwiGLU of all formats. Promises
// for scripts/check_cuda.py: two blocks fit a multiprocessor; in the inner loop, a lane has 4 chunks of 32 weights, or
// 3 of q8. CodesE0 is how compilers name Codes::q4.
//
// registers: prepare_activations_kernel 40
// registers: linear_few_kernel 128
//
// loop: FewKindILNS0_5CodesE0 2.1 per weight, 128 weights
//
// loop: FewKindILNS0_5CodesE1 3.5 per weight, 128 weights
//
// loop: FewKindILNS0_5CodesE2 2.0 per weight, 96 weights
#include "cuda/linear_few.h"

#include <cmath>

#include "cuda/device.h"
#include "cuda/linear_few.cuh"
#include "error.h"

namespace pyllama {
namespace cuda {

namespace {

constexpr unsigned kPrepareThreads = 512;
constexpr int kLargestActivation = 9;  // a token's numbers are brought to 2^9 … 2^10

struct PrepareArgs {
  const float* x;
  int64_t stride;
  int n_tokens, columns, chunks;
  const int32_t* input_order;
  half* values;
  uint32_t* sums;
  float* scales;
};

struct StoreRowsEpilogue {
  StoreRows out;
  int rows;

  PYLLAMA_DEVICE void store(int row, int token, float value) const {
    if (row >= rows) return;
    const int64_t index = token * out.stride + row;
    if (out.bias) value += out.bias[row];
    if (out.residual) value += out.residual[index];
    out.y[index] = value;
  }
  PYLLAMA_DEVICE void operator()(int row, int token, float value, float value8) const {
    store(row, token, value);
    store(row + 8, token, value8);
  }
};

struct StoreSwigluEpilogue {
  StoreSwiglu out;

  PYLLAMA_DEVICE void operator()(int row, int token, float gate, float up) const {
    const int i = row / 16 * 8 + row % 16;
    if (i < out.hidden_dim) out.y[token * out.stride + i] = gate / (1.0f + expf(-gate)) * up;
  }
};

template <class Epilogue>
struct FewArgs {
  Fragments w;
  Activations x;
  int n_tokens;
  Epilogue epilogue;
};

// The largest |x| of a token among finite numbers, as bits: those of positive floats are ordered as the floats are.
PYLLAMA_DEVICE uint32_t largest_bits(const PrepareArgs& args, const float* x) {
  uint32_t largest = 0;
  for (int k = static_cast<int>(thread_index()); k < args.columns; k += kPrepareThreads) {
    const uint32_t bits = as_bits(x[k]) & 0x7fffffff;
    if (bits > largest && bits < 0x7f800000) largest = bits;
  }
  for (unsigned mask = 16; mask > 0; mask /= 2) {
    const uint32_t other = shuffle_xor(largest, mask);
    largest = other > largest ? other : largest;
  }
  uint32_t* const shared = reinterpret_cast<uint32_t*>(shared_memory());
  if (lane() == 0) shared[warp()] = largest;
  barrier();
  for (unsigned w = 0; w < kPrepareThreads / 32; w++) largest = shared[w] > largest ? shared[w] : largest;
  return largest;
}

}  // namespace

// Grid: a block for each token; shared: a word for each warp.
PYLLAMA_KERNEL void prepare_activations_kernel(const PrepareArgs args) {
  const int token = static_cast<int>(block_index().x);
  const float* const x = args.x + token * args.stride;
  wait_for_previous_kernel();
  let_next_kernel_start();
  const uint32_t largest = largest_bits(args, x);
  int exponent = largest ? static_cast<int>(largest >> 23) - 127 - kLargestActivation : 0;
  if (exponent < -100) exponent = -100;
  const float divide = power_of_two(-exponent);
  if (thread_index() == 0) args.scales[token] = power_of_two(exponent);
  for (int chunk = static_cast<int>(warp()); chunk < args.chunks; chunk += kPrepareThreads / 32) {
    float sums[2];
    for (int side = 0; side < 2; side++) {
      const int k = chunk * kChunkColumns + side * 32 + static_cast<int>(lane());
      const float value = k < args.columns ? x[args.input_order ? args.input_order[k] : k] * divide : 0.0f;
      const half rounded = to_half(value);
      args.values[(static_cast<int64_t>(2 * chunk + side) * kFewTokens + token) * 32 + lane()] = rounded;
      sums[side] = to_float(rounded);
      for (unsigned mask = 16; mask > 0; mask /= 2) sums[side] += shuffle_xor(sums[side], mask);
    }
    const half2 high = to_half2(sums[0], sums[1]);
    const float2 taken = to_float(high);
    const uint32_t low = as_bits(to_half2(sums[0] - taken.x, sums[1] - taken.y));
    if (lane() < 4) {
      args.sums[(static_cast<int64_t>(chunk) * kFewTokens + token) * 4 + lane()] = lane() == 0   ? as_bits(high)
                                                                                   : lane() == 1 ? low
                                                                                                 : 0;
    }
  }
}

template <class Kind, class Epilogue>
PYLLAMA_KERNEL void PYLLAMA_LAUNCH_BOUNDS(kFewThreads, 2) linear_few_kernel(const FewArgs<Epilogue> args) {
  linear_few_body<Kind>(args.w, args.x, args.n_tokens, args.epilogue);
}

namespace {

template <class Kind, class Epilogue>
void launch_kind(Stream& stream, const FewArgs<Epilogue>& args, int multiprocessors) {
  const int most = 2 * multiprocessors;
  const unsigned blocks = static_cast<unsigned>(args.w.tiles < most ? args.w.tiles : most);
  launch(stream, linear_few_kernel<Kind, Epilogue>, args, Dim3{blocks, 1, 1}, kFewThreads, kFewSharedBytes,
         Start::kEarly);
}

template <Codes codes, Offset offset, class Epilogue>
void launch_group(Stream& stream, const FewArgs<Epilogue>& args, int multiprocessors) {
  if (args.w.group == 32) {
    launch_kind<FewKind<codes, offset, true>>(stream, args, multiprocessors);
  } else {
    launch_kind<FewKind<codes, offset, false>>(stream, args, multiprocessors);
  }
}

template <class Epilogue>
void launch_few(Stream& stream, const FewArgs<Epilogue>& args, int multiprocessors) {
  check<std::invalid_argument>(args.n_tokens >= 1 && args.n_tokens <= kFewTokens, args.n_tokens,
                               " tokens for the product of few; expected 1 to ", kFewTokens);
  check<std::invalid_argument>(multiprocessors >= 1, multiprocessors, " multiprocessors; expected at least 1");
  switch (args.w.kind) {
    case Codes::q4nl:
      return launch_group<Codes::q4nl, Offset::none>(stream, args, multiprocessors);
    case Codes::q8:
      return launch_group<Codes::q8, Offset::none>(stream, args, multiprocessors);
    case Codes::half:
      return launch_kind<FewKind<Codes::half, Offset::none, false>>(stream, args, multiprocessors);
    case Codes::half_pair:
      return launch_kind<FewKind<Codes::half_pair, Offset::none, false>>(stream, args, multiprocessors);
    case Codes::q4:
      break;
  }
  switch (args.w.offset) {
    case Offset::none:
      return launch_group<Codes::q4, Offset::none>(stream, args, multiprocessors);
    case Offset::minimum:
      return launch_group<Codes::q4, Offset::minimum>(stream, args, multiprocessors);
    case Offset::zero_point:
      return launch_group<Codes::q4, Offset::zero_point>(stream, args, multiprocessors);
  }
}

}  // namespace

ActivationSizes activation_sizes(int columns) {
  const size_t chunks = (static_cast<size_t>(columns) + kChunkColumns - 1) / kChunkColumns;
  return {chunks * kFewTokens * kChunkColumns * 2, chunks * kFewTokens * 16, kFewTokens * 4};
}

void prepare_activations(Stream& stream, const float* x, int64_t stride, int n_tokens, int columns,
                         const int32_t* input_order, const Activations& out) {
  check<std::invalid_argument>(n_tokens >= 1 && n_tokens <= kFewTokens, n_tokens,
                               " tokens for the product of few; expected 1 to ", kFewTokens);
  const PrepareArgs args{x,
                         stride,
                         n_tokens,
                         columns,
                         (columns + kChunkColumns - 1) / kChunkColumns,
                         input_order,
                         reinterpret_cast<half*>(out.values),
                         out.sums,
                         out.scales};
  launch(stream, prepare_activations_kernel, args, Dim3{static_cast<unsigned>(n_tokens), 1, 1}, kPrepareThreads,
         kPrepareThreads / 32 * 4, Start::kEarly);
}

void linear_few(Stream& stream, const Fragments& w, const Activations& x, int n_tokens, const StoreRows& out,
                int multiprocessors) {
  launch_few(stream, FewArgs<StoreRowsEpilogue>{w, x, n_tokens, {out, w.rows}}, multiprocessors);
}

void linear_few(Stream& stream, const Fragments& w, const Activations& x, int n_tokens, const StoreSwiglu& out,
                int multiprocessors) {
  launch_few(stream, FewArgs<StoreSwigluEpilogue>{w, x, n_tokens, {out}}, multiprocessors);
}

}  // namespace cuda
}  // namespace pyllama
