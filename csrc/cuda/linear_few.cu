// The kernels around linear_few.cuh: the plain product and SwiGLU of all formats. Promises for
// scripts/check_cuda.py: two blocks fit a multiprocessor; in the inner loop, a lane has 4 chunks of 32 weights, or
// 3 of q8. CodesE0 is how compilers name Codes::q4.
//
// registers: linear_few_kernel 128
//
// loop: FewKindILNS0_5CodesE0 2.1 per weight, 128 weights
//
// loop: FewKindILNS0_5CodesE1 3.5 per weight, 128 weights
//
// loop: FewKindILNS0_5CodesE2 2.0 per weight, 96 weights
#include "cuda/linear_few.h"

#include "cuda/device.h"
#include "cuda/epilogues.cuh"
#include "cuda/linear_few.cuh"
#include "error.h"

namespace pyllama {
namespace cuda {

namespace {

template <class Epilogue>
struct FewArgs {
  Fragments w;
  Activations x;
  int n_tokens;
  Epilogue epilogue;
};

}  // namespace

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

template <class Epilogue>
void launch_few(Stream& stream, const FewArgs<Epilogue>& args, int multiprocessors) {
  check<std::invalid_argument>(args.n_tokens >= 1 && args.n_tokens <= kFewTokens, args.n_tokens,
                               " tokens for the product of few; expected 1 to ", kFewTokens);
  check<std::invalid_argument>(multiprocessors >= 1, multiprocessors, " multiprocessors; expected at least 1");
  with_weight_kind(args.w, [&](auto kind) {
    using Weights = decltype(kind);
    launch_kind<FewKind<Weights::kCodes, Weights::kOffset, Weights::kGroup32>>(stream, args, multiprocessors);
  });
}

}  // namespace

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
