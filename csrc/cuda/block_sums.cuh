// Sums, maxima and running sums over the threads of a block, for any number of whole warps. Every thread gets the
// result. `room`: shared memory of 32 numbers, free again when a function returns. Only for operations whose result no
// order changes: integers and maxima.
#pragma once

#include "cuda/device.h"

namespace pyllama {
namespace cuda {

template <class T, class Op>
PYLLAMA_DEVICE T reduce_block(T v, T* room, const Op& op) {
  for (unsigned mask = 16; mask > 0; mask /= 2) v = op(v, shuffle_xor(v, mask));
  if (lane() == 0) room[warp()] = v;
  barrier();
  T all = room[0];
  for (unsigned w = 1; w < block_size() / 32; w++) all = op(all, room[w]);
  barrier();
  return all;
}

PYLLAMA_DEVICE uint64_t sum_block(uint64_t v, uint64_t* room) {
  return reduce_block(v, room, [](uint64_t a, uint64_t b) { return a + b; });
}

// The sum of this thread's number and of those before it.
PYLLAMA_DEVICE uint64_t running_sum_block(uint64_t v, uint64_t* room) {
  for (unsigned delta = 1; delta < 32; delta *= 2) {
    const uint64_t before = shuffle(v, lane() - delta);
    if (lane() >= delta) v += before;
  }
  if (lane() == 31) room[warp()] = v;
  barrier();
  for (unsigned w = 0; w < warp(); w++) v += room[w];
  barrier();
  return v;
}

}  // namespace cuda
}  // namespace pyllama
