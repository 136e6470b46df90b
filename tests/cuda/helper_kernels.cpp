// Small kernels that touch every helper of csrc/cuda/device.h. The tests run them through the emulation;
// scripts/check_device.sh compiles this same file with nvcc for every architecture.
#include <cstring>

#include "cuda/device.h"
#include "entry.h"

namespace pyllama::cuda::tests {

PYLLAMA_DEVICE unsigned global_thread() { return block_index().x * block_size() + thread_index(); }

// Seven words a thread: who it is.
PYLLAMA_KERNEL void who_and_where(const Words w) {
  const Dim3 b = block_index(), g = grid_size();
  const unsigned block = b.x + g.x * (b.y + g.y * b.z);
  unsigned* out = w.out + 7 * (block * block_size() + thread_index());
  out[0] = thread_index(), out[1] = lane(), out[2] = warp();
  out[3] = b.x, out[4] = b.y, out[5] = b.z, out[6] = block_size();
}

// in: value and argument of each thread; out: shuffle, shuffle_xor, shuffle_down, ballot, and two words of a double.
PYLLAMA_KERNEL void shuffles(const Words w) {
  const unsigned i = global_thread(), v = w.in[2 * i], argument = w.in[2 * i + 1];
  unsigned* out = w.out + 6 * i;
  out[0] = shuffle(v, argument);
  out[1] = shuffle_xor(v, argument % 32);
  out[2] = shuffle_down(v, argument % 32);
  out[3] = ballot(v & 1);
  const uint2 two = shuffle(uint2{v, ~v}, argument);
  out[4] = two.x, out[5] = two.y;
}

// in: v of each thread; out: the block's sum, by halves of the block in shared memory, in every thread.
PYLLAMA_KERNEL void block_sum(const Words w) {
  unsigned* sums = reinterpret_cast<unsigned*>(shared_memory());
  sums[thread_index()] = w.in[global_thread()];
  for (unsigned n = block_size(); n > 1; n = (n + 1) / 2) {
    barrier();
    if (thread_index() < n / 2) sums[thread_index()] += sums[thread_index() + (n + 1) / 2];
  }
  barrier();
  w.out[global_thread()] = sums[0];
}

// Each block adds its word of `in` to a total; out[0] is the total as the last block to come sees it, out[1] and [2]
// are counters.
PYLLAMA_KERNEL void last_block(const Words w) {
  int* counters = reinterpret_cast<int*>(w.out);
  unsigned* last = reinterpret_cast<unsigned*>(shared_memory());
  if (thread_index() == 0) {
    atomic_add(&counters[1], static_cast<int>(w.in[block_index().x]));
    fence();
    *last = atomic_add(&counters[2], 1) == static_cast<int>(grid_size().x) - 1;
  }
  barrier();
  if (*last && thread_index() == 0) w.out[0] = w.out[1];
}

// in: 65,536 halves' bits or floats' bits in words; out: the same in the other type.
PYLLAMA_KERNEL void convert(const Words w) {
  const unsigned i = global_thread();
  if (4 * i >= w.n) return;
  unsigned* out = w.out + 4 * i;
  const uint16_t bits = static_cast<uint16_t>(w.in[2 * i]);
  const float f = as_float(w.in[2 * i + 1]);
  out[0] = as_bits(to_float(bits_as<half>(bits)));
  out[1] = as_bits(to_float(bits_as<bfloat16>(bits)));
  out[2] = bits_as<uint16_t>(to_half(f));
  out[3] = bits_as<uint16_t>(to_bfloat16(f));
}

// in: a, b, c as pairs of halves; out: a+b, a-b, a·b, a·b+c, (low a, high b), a's sum in float.
PYLLAMA_KERNEL void half_arithmetic(const Words w) {
  const unsigned i = global_thread();
  if (6 * i >= w.n) return;
  const half2 a = as_half2(w.in[3 * i]), b = as_half2(w.in[3 * i + 1]), c = as_half2(w.in[3 * i + 2]);
  unsigned* out = w.out + 6 * i;
  out[0] = as_bits(add(a, b));
  out[1] = as_bits(sub(a, b));
  out[2] = as_bits(mul(a, b));
  out[3] = as_bits(fma(a, b, c));
  out[4] = as_bits(pair(low(a), high(b)));
  const float2 f = to_float(a);
  out[5] = as_bits(to_half2(f.y, fma(f.x, 2.0f, f.y)));
}

// in: a, b, c; out: lop3 of four tables, permute_bytes.
PYLLAMA_KERNEL void bit_tricks(const Words w) {
  const unsigned i = global_thread();
  const unsigned a = w.in[3 * i], b = w.in[3 * i + 1], c = w.in[3 * i + 2];
  unsigned* out = w.out + 5 * i;
  out[0] = lop3<0xea>(a, b, c);
  out[1] = lop3<0x6a>(a, b, c);
  out[2] = lop3<0x96>(a, b, c);
  out[3] = lop3<0x1b>(a, b, c);
  out[4] = permute_bytes(a, b, c);
}

// in, out: 1, 2 or 4 words a thread.
// The same by loads that only even threads make; the others keep what they have.
template <int n>
PYLLAMA_KERNEL void load_if(const Words w) {
  const unsigned i = global_thread();
  uint32_t words[n];
  for (unsigned& word : words) word = i;
  if constexpr (n == 4) {
    uint4 v = load_once_16(w.in + 4 * (i - i % 2));
    load_stream_if(v, reinterpret_cast<const uint4*>(w.in) + i, i % 2 == 0);
    for (int j = 0; j < 4; j++) words[j] = i % 2 ? i : reinterpret_cast<const uint32_t*>(&v)[j];
  }
  load_words_if(words, w.in + n * i, i % 2 == 0);
  for (int j = 0; j < n; j++) w.out[n * i + j] = words[j];
}

// in, out: one float a thread.
PYLLAMA_KERNEL void exponential(const Words w) {
  w.out[global_thread()] = as_bits(exp2_approx(as_float(w.in[global_thread()])));
}

// in: two floats a thread. out: the larger one, and who the thread is.
PYLLAMA_KERNEL void larger_ones(const Words w) {
  const unsigned i = global_thread();
  w.out[2 * i] = as_bits(max_of(as_float(w.in[2 * i]), as_float(w.in[2 * i + 1])));
  w.out[2 * i + 1] = thread_index_again();
}

// in: one exponent a thread.
PYLLAMA_KERNEL void powers_of_two(const Words w) {
  w.out[global_thread()] = as_bits(power_of_two(static_cast<int>(w.in[global_thread()])));
}

template <class T>
PYLLAMA_KERNEL PYLLAMA_LAUNCH_BOUNDS(1024, 1) void read_only_copy(const Words w) {
  reinterpret_cast<T*>(w.out)[global_thread()] = load_read_only(reinterpret_cast<const T*>(w.in) + global_thread());
}

PYLLAMA_KERNEL void wide_copy(const Words w) {
  const unsigned i = global_thread();
  const uint4* in = reinterpret_cast<const uint4*>(w.in);
  prefetch_l2(in + i);
  unsigned char* mine = shared_memory() + 16 * thread_index();
  store_16(mine, load_stream(in + i));
  store_16(w.out + 4 * i, load_16(mine));
}

// One warp. in: A[16][16] (row after row), B[16][8], both 16 bits, then C[16][8] in float; out: C + A·B. A comes in by
// load_matrix_x4, B by load_matrix_x2_trans, or, the other way round, transposed from memory: A by x4_trans, B by x2.
template <bool kBfloat16, bool kTransposed>
PYLLAMA_DEVICE void product(const Words& w) {
  uint16_t* a = reinterpret_cast<uint16_t*>(shared_memory());
  uint16_t* b = a + 256;
  const uint16_t* from = reinterpret_cast<const uint16_t*>(w.in);
  for (unsigned i = lane(); i < 256; i += 32) a[kTransposed ? i % 16 * 16 + i / 16 : i] = from[i];
  for (unsigned i = lane(); i < 128; i += 32) b[kTransposed ? i % 8 * 16 + i / 8 : i] = from[256 + i];
  warp_barrier();
  uint32_t x[4], y[2];
  if (kTransposed) {
    load_matrix_x4_trans(x, a + (lane() % 8 + lane() / 16 * 8) * 16 + lane() / 8 % 2 * 8);
    load_matrix_x2(y, b + lane() % 8 * 16 + lane() / 8 % 2 * 8);
  } else {
    load_matrix_x4(x, a + lane() % 16 * 16 + lane() / 16 * 8);
    load_matrix_x2_trans(y, b + lane() % 16 * 8);
  }
  const float* start = reinterpret_cast<const float*>(w.in + 192);
  const unsigned g = lane() / 4, t = lane() % 4;
  float c[4];
  for (unsigned i = 0; i < 4; i++) c[i] = start[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
  kBfloat16 ? mma_m16n8k16_bf16(c, x, y) : mma_m16n8k16(c, x, y);
  for (unsigned i = 0; i < 4; i++) w.out[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = as_bits(c[i]);
}

// One warp. in: A[16][8], B[8][8], 16 bits; out: A·B in float.
PYLLAMA_KERNEL void mma_half_short(const Words w) {
  const unsigned g = lane() / 4, t = lane() % 4;
  const uint16_t* b = reinterpret_cast<const uint16_t*>(w.in + 64);
  const uint32_t x[2] = {w.in[4 * g + t], w.in[4 * (g + 8) + t]};
  float c[4] = {};
  mma_m16n8k8(c, x, b[16 * t + g] | uint32_t{b[16 * t + 8 + g]} << 16);
  for (unsigned i = 0; i < 4; i++) w.out[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = as_bits(c[i]);
}

PYLLAMA_KERNEL void mma_half(const Words w) { product<false, false>(w); }
PYLLAMA_KERNEL void mma_half_transposed(const Words w) { product<false, true>(w); }
PYLLAMA_KERNEL void mma_bfloat16(const Words w) { product<true, false>(w); }
PYLLAMA_KERNEL void mma_bfloat16_transposed(const Words w) { product<true, true>(w); }

// One block. Sums w.n words for each thread's 16 bytes, rows of `in`, through three stages of asynchronous copies; each
// thread reads what its neighbour copied.
PYLLAMA_KERNEL void staged_sum(const Words w) {
  constexpr unsigned kStages = 3;
  const unsigned n = block_size(), me = thread_index(), rows = w.in[0];
  const uint4* in = reinterpret_cast<const uint4*>(w.in + 4);
  uint4* stages = reinterpret_cast<uint4*>(shared_memory());
  wait_for_previous_kernel();
  const auto fetch = [&](unsigned row) {
    copy_async_16(stages + row % kStages * n + me, in + row * n + me, row < rows);
    copy_commit();
  };
  for (unsigned row = 0; row < kStages - 1; row++) fetch(row);
  uint4 sum{0, 0, 0, 0};
  for (unsigned row = 0; row < rows; row++) {
    copy_wait<kStages - 2>();
    barrier();
    const uint4 v = load_16(stages + row % kStages * n + (me + 1) % n);
    sum = {sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w};
    fetch(row + kStages - 1);
  }
  let_next_kernel_start();
  store_16(w.out + 4 * me, sum);
}

extern const NamedKernel kHelperKernels[] = {
    {"who_and_where", who_and_where},
    {"shuffles", shuffles},
    {"block_sum", block_sum},
    {"last_block", last_block},
    {"convert", convert},
    {"half_arithmetic", half_arithmetic},
    {"bit_tricks", bit_tricks},
    {"load_if_4", load_if<1>},
    {"load_if_8", load_if<2>},
    {"load_if_16", load_if<4>},
    {"exponential", exponential},
    {"larger_ones", larger_ones},
    {"powers_of_two", powers_of_two},
    {"wide_copy", wide_copy},
    {"read_only_copy_4", read_only_copy<float>},
    {"read_only_copy_8", read_only_copy<uint2>},
    {"read_only_copy_16", read_only_copy<float4>},
    {"mma_half_short", mma_half_short},
    {"mma_half", mma_half},
    {"mma_half_transposed", mma_half_transposed},
    {"mma_bfloat16", mma_bfloat16},
    {"mma_bfloat16_transposed", mma_bfloat16_transposed},
    {"staged_sum", staged_sum},
    {nullptr, nullptr},
};

}  // namespace pyllama::cuda::tests
