// The kernels of linear_many.cuh, for all formats and shapes of a block, and which of these a product takes.
// Promises for scripts/check_cuda.py are of the large blocks: Codes 0 … 4 are q4 (q4a), q4nl, q8, f16, f32; Offset 0 …
// 2 none, minimums, zero points; Lb1 is groups of 32.
//
// registers: linear_many_kernel 255
//
// loop: WeightKindILNS0_5CodesE0ELNS0_6OffsetE0ELb0EEELi8 4.8 per mma, 64 mma
// loop: WeightKindILNS0_5CodesE0ELNS0_6OffsetE0ELb1EEELi8 5.8 per mma, 64 mma
// loop: WeightKindILNS0_5CodesE0ELNS0_6OffsetE1ELb0EEELi8 5.7 per mma, 64 mma
// loop: WeightKindILNS0_5CodesE0ELNS0_6OffsetE1ELb1EEELi8 6.8 per mma, 64 mma
// loop: WeightKindILNS0_5CodesE0ELNS0_6OffsetE2ELb0EEELi8 4.9 per mma, 64 mma
// loop: WeightKindILNS0_5CodesE0ELNS0_6OffsetE2ELb1EEELi8 6.0 per mma, 64 mma
// loop: WeightKindILNS0_5CodesE1ELNS0_6OffsetE0ELb0EEELi8 6.0 per mma, 64 mma
// loop: WeightKindILNS0_5CodesE1ELNS0_6OffsetE0ELb1EEELi8 7.1 per mma, 64 mma
// loop: WeightKindILNS0_5CodesE2ELNS0_6OffsetE0ELb0EEELi8 4.8 per mma, 64 mma
// loop: WeightKindILNS0_5CodesE2ELNS0_6OffsetE0ELb1EEELi8 5.8 per mma, 64 mma
// loop: WeightKindILNS0_5CodesE3ELNS0_6OffsetE0ELb0EEELi8 2.7 per mma, 64 mma
// loop: WeightKindILNS0_5CodesE3ELNS0_6OffsetE0ELb0EEELi16 2.5 per mma, 128 mma
// loop: WeightKindILNS0_5CodesE4ELNS0_6OffsetE0ELb0EEELi8 2.7 per mma, 64 mma
#include "cuda/linear_many.h"

#include "cuda/device.h"
#include "cuda/linear_many.cuh"
#include "error.h"

namespace pyllama {
namespace cuda {

template <class Kind>
PYLLAMA_KERNEL void PYLLAMA_LAUNCH_BOUNDS(Kind::kThreads, Kind::kBlocks) linear_many_kernel(const ManyArgs args) {
  linear_many_body<Kind>(args);
}

namespace {

Dim3 grid_of(const Fragments& w, int n_tokens, int tiles, int panels) {
  const int tokens = panels * kPanelTokens;
  return {static_cast<unsigned>((n_tokens + tokens - 1) / tokens), static_cast<unsigned>((w.tiles + tiles - 1) / tiles),
          1};
}

template <class Kind>
void launch_shape(Stream& stream, const ManyArgs& args) {
  const Dim3 grid = grid_of(args.w, args.n_tokens, Kind::kWarps * Kind::kTiles, Kind::kPanels);
  launch(stream, linear_many_kernel<Kind>, args, grid, Kind::kThreads, Kind::kSharedBytes, Start::kEarly);
}

template <class Kind>
bool fills(const ManyArgs& args, int multiprocessors) {
  const Dim3 grid = grid_of(args.w, args.n_tokens, Kind::kWarps * Kind::kTiles, Kind::kPanels);
  return args.n_tokens > Kind::kPanels / 2 * kPanelTokens && int64_t{grid.x} * grid.y >= multiprocessors;
}

// Large blocks read least; but few tokens do not fill them, and few rows do not make enough of them.
template <class Weights>
void launch_weights(Stream& stream, const ManyArgs& args, int multiprocessors) {
  if (args.n_tokens <= 2 * kPanelTokens) return launch_shape<ManyKind<Weights, 2>>(stream, args);
  if constexpr (Weights::kCodes == Codes::half) {
    using Largest = ManyKind<Weights, 16>;
    if (fills<Largest>(args, multiprocessors)) return launch_shape<Largest>(stream, args);
  }
  using Large = ManyKind<Weights, 8>;
  if (fills<Large>(args, multiprocessors)) return launch_shape<Large>(stream, args);
  launch_shape<ManyKind<Weights, 4>>(stream, args);
}

void launch_many(Stream& stream, const ManyArgs& args, int multiprocessors) {
  check<std::invalid_argument>(args.n_tokens >= 1, args.n_tokens, " tokens for a product; expected at least 1");
  check<std::invalid_argument>(multiprocessors >= 1, multiprocessors, " multiprocessors; expected at least 1");
  with_weight_kind(args.w, [&](auto kind) { launch_weights<decltype(kind)>(stream, args, multiprocessors); });
}

}  // namespace

void linear_many(Stream& stream, const Fragments& w, const Activations& x, int n_tokens, const StoreRows& out,
                 int multiprocessors) {
  launch_many(stream, {w, x, n_tokens, w.group == 128, false, {out, w.rows}, {}}, multiprocessors);
}

void linear_many(Stream& stream, const Fragments& w, const Activations& x, int n_tokens, const StoreSwiglu& out,
                 int multiprocessors) {
  launch_many(stream, {w, x, n_tokens, w.group == 128, true, {}, {out}}, multiprocessors);
}

}  // namespace cuda
}  // namespace pyllama
