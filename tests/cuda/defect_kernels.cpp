// Kernels with one defect each, and two that only look as if they had one. The tests want every one of them reported.
#include "cuda/device.h"
#include "entry.h"

namespace pyllama::cuda::tests {

namespace {

unsigned* shared_words() { return reinterpret_cast<unsigned*>(shared_memory()); }

void left_at_barrier(const Words) {
  if (thread_index() == 37) return;
  barrier();
}

void half_of_a_warp_at_barrier(const Words) {
  if (lane() < 16) {
    barrier();
  } else {
    warp_barrier();
  }
}

void one_lane_shuffles_not(const Words w) {
  if (lane() != 5) w.out[thread_index()] = shuffle_xor(thread_index(), 1);
}

void different_collectives(const Words w) { w.out[thread_index()] = lane() % 2 ? ballot(true) : shuffle(7u, 0); }

void mma_in_half_a_warp(const Words) {
  float c[4] = {};
  const uint32_t a[4] = {}, b[2] = {};
  mma_m16n8k16(c, a, b);
}

// Reads what its neighbour wrote without a barrier between.
void no_barrier(const Words w) {
  shared_words()[thread_index()] = w.in[thread_index()];
  w.out[thread_index()] = shared_words()[(thread_index() + 1) % block_size()];
}

// The same within a warp, where lanes often, but not always, run in step.
void no_warp_barrier(const Words w) {
  shared_words()[lane()] = w.in[lane()];
  w.out[lane()] = shared_words()[lane() ^ 1];
}

// Has the barrier between writing and reading, but not the one between reading and writing again.
void no_second_barrier(const Words w) {
  unsigned sum = 0;
  for (unsigned round = 0; round < 4; round++) {
    shared_words()[thread_index()] = w.in[thread_index()] * (round + 1);
    barrier();
    sum += shared_words()[(thread_index() + 33) % block_size()] * (round + 2);
  }
  w.out[thread_index()] = sum;
}

// Blocks that count on the one before them.
void blocks_in_order(const Words w) { w.out[block_index().x] = block_index().x ? w.out[block_index().x - 1] + 1 : 1; }

void copy_read_too_early(const Words w) {
  unsigned char* mine = shared_memory() + 16 * thread_index();
  copy_async_16(mine, w.in + 4 * thread_index());
  copy_commit();
  copy_wait<1>();  // of one group: waits for nothing
  store_16(w.out + 4 * thread_index(), load_16(mine));
}

void copy_not_committed(const Words w) {
  unsigned char* mine = shared_memory() + 16 * thread_index();
  copy_async_16(mine, w.in + 4 * thread_index());
  copy_wait<0>();
  store_16(w.out + 4 * thread_index(), load_16(mine));
}

void copy_misaligned(const Words w) { copy_async_16(shared_memory(), w.in + 1); }
void copy_past_shared(const Words w) { copy_async_16(shared_memory() + 16 * block_size(), w.in); }
void load_misaligned(const Words w) { w.out[0] = load_16(w.in + 2).x; }
void load_past_buffer(const Words w) { w.out[0] = load_stream(reinterpret_cast<const uint4*>(w.in) + 1000).x; }
void load_host_memory(const Words w) {
  alignas(16) const uint4 here{1, 2, 3, 4};
  w.out[0] = load_stream(&here).x;
}
void matrix_misaligned(const Words w) {
  load_matrix_x4(*reinterpret_cast<uint32_t (*)[4]>(w.out), shared_memory() + 8);
}

void shared_not_written(const Words w) { w.out[thread_index()] = shared_words()[thread_index()]; }
void write_past_shared(const Words) { shared_words()[block_size()] = 1; }
void write_before_shared(const Words) { shared_words()[-1] = 1; }
void write_past_buffer(const Words w) { w.out[w.n] = 1; }
void write_before_buffer(const Words w) { w.out[-1] = 1; }

// Early, and lane 3 of block 1 forgets to wait.
void previous_not_waited_for(const Words) {
  if (block_index().x != 1 || thread_index() != 3) wait_for_previous_kernel();
}

int deep(volatile unsigned char* from, int n) {
  volatile unsigned char here[1024];
  here[0] = from ? from[0] : 1;
  return n == 0 ? here[0] : deep(here, n - 1) + here[0];
}
void deep_stack(const Words w) { w.out[0] = static_cast<unsigned>(deep(nullptr, 75)); }

}  // namespace

#define KERNEL(name) {#name, name}
extern const NamedKernel kDefectKernels[] = {
    KERNEL(left_at_barrier),
    KERNEL(half_of_a_warp_at_barrier),
    KERNEL(one_lane_shuffles_not),
    KERNEL(different_collectives),
    KERNEL(mma_in_half_a_warp),
    KERNEL(no_barrier),
    KERNEL(no_warp_barrier),
    KERNEL(no_second_barrier),
    KERNEL(blocks_in_order),
    KERNEL(copy_read_too_early),
    KERNEL(copy_not_committed),
    KERNEL(copy_misaligned),
    KERNEL(copy_past_shared),
    KERNEL(load_misaligned),
    KERNEL(load_past_buffer),
    KERNEL(load_host_memory),
    KERNEL(matrix_misaligned),
    KERNEL(shared_not_written),
    KERNEL(write_past_shared),
    KERNEL(write_before_shared),
    KERNEL(write_past_buffer),
    KERNEL(write_before_buffer),
    KERNEL(previous_not_waited_for),
    KERNEL(deep_stack),
    {nullptr, nullptr},
};

}  // namespace pyllama::cuda::tests
