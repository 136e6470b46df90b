// A thread makes one angle, in double: a step has a few thousand of them, once for all layers. No early start: in front
// of it is a copy. See rope_angles.h.
//
// registers: rope_angles_kernel 64
#include "cuda/rope_angles.h"

#include "cuda/device.h"
#include "portable_trig.h"

namespace pyllama {
namespace cuda {

namespace {

constexpr unsigned kThreads = 128;

}  // namespace

PYLLAMA_KERNEL void rope_angles_kernel(const RopeAngles args) {
  let_next_kernel_start();
  const int64_t index = static_cast<int64_t>(block_index().x) * kThreads + thread_index();
  if (index >= static_cast<int64_t>(args.n_tok) * args.half_dim) return;
  // The angle is rounded to float first, as the models were trained.
  const float angle = static_cast<float>(args.pos[index / args.half_dim]) * args.inv_freq[index % args.half_dim];
  double sin, cos;
  sincos_portable(angle, &sin, &cos);
  args.cos[index] = static_cast<float>(cos) * args.attention_factor;
  args.sin[index] = static_cast<float>(sin) * args.attention_factor;
}

void rope_angles(Stream& stream, const RopeAngles& args) {
  const int64_t n = static_cast<int64_t>(args.n_tok) * args.half_dim;
  if (n == 0) return;
  launch(stream, rope_angles_kernel, args, {static_cast<unsigned>((n + kThreads - 1) / kThreads)}, kThreads);
}

}  // namespace cuda
}  // namespace pyllama
