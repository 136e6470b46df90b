// Everything that kernels ask of the processor they run on, as small named functions: who am I, barriers, shuffles,
// half precision, bit tricks, wide loads, tensor cores, asynchronous copies. Each has a device branch (nvcc: intrinsics
// or inline PTX, with the way around where sm_75 lacks an instruction) and a host branch (g++: the emulation), so that
// one source of a kernel runs on both. No kernel holds an intrinsic, inline PTX or arithmetic on __half of its own. Not
// here: mathematics.
//
// All lanes of a warp reach a collective (barriers, shuffles, ballot, mma, load_matrix) together: no lane may have
// returned.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define PYLLAMA_KERNEL __global__
#define PYLLAMA_DEVICE __device__ __forceinline__
#define PYLLAMA_LAUNCH_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#define PYLLAMA_UNROLL _Pragma("unroll")
#define PYLLAMA_UNROLL_8 _Pragma("unroll 8")
#define PYLLAMA_UNROLL_1 _Pragma("unroll 1")
#define PYLLAMA_ON_DEVICE 1
#else
#include <cmath>

#include "emulation/memory.h"
#include "emulation/numbers.h"
#include "emulation/tensor_core.h"
#include "emulation/thread.h"

#define PYLLAMA_KERNEL
#define PYLLAMA_DEVICE inline
#define PYLLAMA_LAUNCH_BOUNDS(threads, blocks)
#define PYLLAMA_UNROLL
#define PYLLAMA_UNROLL_8
#define PYLLAMA_UNROLL_1
#define PYLLAMA_ON_DEVICE 0
#endif

#include "runtime.h"

namespace pyllama::cuda {

// ------------------------------------------------------------------------------------------------- who and where

#if PYLLAMA_ON_DEVICE

using half = __half;
using half2 = __half2;
using bfloat16 = __nv_bfloat16;

PYLLAMA_DEVICE unsigned thread_index() { return threadIdx.x; }
// thread_index(), asked for anew: where keeping what was computed from it costs a register that is wanted elsewhere.
PYLLAMA_DEVICE unsigned thread_index_again() {
  unsigned i;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(i));
  return i;
}
PYLLAMA_DEVICE unsigned block_size() { return blockDim.x; }
PYLLAMA_DEVICE Dim3 block_index() { return {blockIdx.x, blockIdx.y, blockIdx.z}; }
PYLLAMA_DEVICE Dim3 grid_size() { return {gridDim.x, gridDim.y, gridDim.z}; }

// Whether a block can have more than the 64 KB of sm_75.
#if __CUDA_ARCH__ >= 800
constexpr bool kLargeShared = true;
#else
constexpr bool kLargeShared = false;
#endif

// The block's dynamic shared memory, a multiple of 128 bytes. Undefined at first.
PYLLAMA_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char pyllama_shared[];
  return pyllama_shared;
}

#else

inline unsigned thread_index() { return emulation::this_thread->index; }
inline unsigned thread_index_again() { return thread_index(); }
inline unsigned block_size() { return emulation::this_thread->launch->shape.block; }
inline Dim3 block_index() { return emulation::this_thread->block_index; }
inline Dim3 grid_size() { return emulation::this_thread->launch->shape.grid; }
constexpr bool kLargeShared = true;
inline unsigned char* shared_memory() { return emulation::this_thread->shared; }

#endif

PYLLAMA_DEVICE unsigned lane() { return thread_index() % 32; }
PYLLAMA_DEVICE unsigned warp() { return thread_index() / 32; }

// ------------------------------------------------------------------------------------------------- meeting others

#if PYLLAMA_ON_DEVICE

PYLLAMA_DEVICE void barrier() { __syncthreads(); }
PYLLAMA_DEVICE void warp_barrier() { __syncwarp(); }
PYLLAMA_DEVICE unsigned ballot(bool p) { return __ballot_sync(0xffffffffu, p); }

namespace detail {
// T in words of 32 bits through one shuffle each.
template <class T, class F>
PYLLAMA_DEVICE T shuffle_words(const T& v, const F& shuffle_word) {
  constexpr int kWords = (sizeof(T) + 3) / 4;
  uint32_t words[kWords] = {};
  memcpy(words, &v, sizeof(T));
#pragma unroll
  for (int i = 0; i < kWords; i++) words[i] = shuffle_word(words[i]);
  T result;
  memcpy(&result, words, sizeof(T));
  return result;
}
}  // namespace detail

// What lane `from` (modulo 32) passes as v.
template <class T>
PYLLAMA_DEVICE T shuffle(T v, unsigned from) {
  return detail::shuffle_words(v, [=](uint32_t w) { return __shfl_sync(0xffffffffu, w, int(from)); });
}
template <class T>
PYLLAMA_DEVICE T shuffle_xor(T v, unsigned mask) {
  return detail::shuffle_words(v, [=](uint32_t w) { return __shfl_xor_sync(0xffffffffu, w, int(mask)); });
}
// What lane + delta passes; where that is past the warp's end, v.
template <class T>
PYLLAMA_DEVICE T shuffle_down(T v, unsigned delta) {
  return detail::shuffle_words(v, [=](uint32_t w) { return __shfl_down_sync(0xffffffffu, w, delta); });
}

// What *p was.
PYLLAMA_DEVICE int atomic_add(int* p, int v) { return atomicAdd(p, v); }
PYLLAMA_DEVICE uint64_t atomic_add(uint64_t* p, uint64_t v) {
  return atomicAdd(reinterpret_cast<unsigned long long*>(p), static_cast<unsigned long long>(v));
}
PYLLAMA_DEVICE void fence() { __threadfence(); }

#else

namespace detail {

inline void nothing(void* const*) {}
constexpr emulation::Collective kWarpBarrier{"warp_barrier", false, nothing};

struct Vote {
  bool p;
  unsigned result;
};
inline void count_votes(void* const* operands) {
  unsigned result = 0;
  for (unsigned i = 0; i < 32; i++) result |= unsigned{operands[i] && static_cast<Vote*>(operands[i])->p} << i;
  for (unsigned i = 0; i < 32; i++) {
    if (operands[i]) static_cast<Vote*>(operands[i])->result = result;
  }
}
constexpr emulation::Collective kBallot{"ballot", false, count_votes};

template <class T>
struct Shuffle {
  T v;
  unsigned from;
  T result;
};
template <class T>
void hand_round(void* const* operands) {
  for (unsigned i = 0; i < 32; i++) {
    if (!operands[i]) continue;
    Shuffle<T>& s = *static_cast<Shuffle<T>*>(operands[i]);
    if (operands[s.from]) {
      s.result = static_cast<Shuffle<T>*>(operands[s.from])->v;
    } else {
      memset(static_cast<void*>(&s.result), emulation::kPoison, sizeof s.result);  // the block has no such lane
    }
  }
}
template <class T>
inline constexpr emulation::Collective kShuffle{"shuffle", false, hand_round<T>};

}  // namespace detail

inline void barrier() { emulation::wait_at_barrier(); }
inline void warp_barrier() { emulation::meet(detail::kWarpBarrier, nullptr); }
inline unsigned ballot(bool p) {
  detail::Vote vote{p, 0};
  emulation::meet(detail::kBallot, &vote);
  return vote.result;
}
template <class T>
T shuffle(T v, unsigned from) {
  detail::Shuffle<T> s{v, from % 32, v};
  emulation::meet(detail::kShuffle<T>, &s);
  return s.result;
}
template <class T>
T shuffle_xor(T v, unsigned mask) {
  return shuffle(v, lane() ^ mask);
}
template <class T>
T shuffle_down(T v, unsigned delta) {
  return shuffle(v, lane() + delta < 32 ? lane() + delta : lane());
}

template <class T>
T atomic_add(T* p, T v) {
  emulation::check_access(p, sizeof(T), "atomic_add");
  const T before = *p;
  *p = before + v;
  return before;
}
inline int atomic_add(int* p, int v) { return atomic_add<int>(p, v); }
inline uint64_t atomic_add(uint64_t* p, uint64_t v) { return atomic_add<uint64_t>(p, v); }
inline void fence() {}

#endif

// ------------------------------------------------------------------------------------------------- numbers

// The same bits as another type.
template <class To, class From>
PYLLAMA_DEVICE To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

#if PYLLAMA_ON_DEVICE

PYLLAMA_DEVICE float to_float(half h) { return __half2float(h); }
PYLLAMA_DEVICE float to_float(bfloat16 b) { return __bfloat162float(b); }
PYLLAMA_DEVICE half to_half(float f) { return __float2half_rn(f); }
PYLLAMA_DEVICE bfloat16 to_bfloat16(float f) { return __float2bfloat16_rn(f); }
PYLLAMA_DEVICE half2 pair(half low, half high) { return __halves2half2(low, high); }
PYLLAMA_DEVICE half low(half2 v) { return __low2half(v); }
PYLLAMA_DEVICE half high(half2 v) { return __high2half(v); }

// The _rn forms are never contracted into an fma.
PYLLAMA_DEVICE half2 add(half2 a, half2 b) { return __hadd2_rn(a, b); }
PYLLAMA_DEVICE half2 sub(half2 a, half2 b) { return __hsub2_rn(a, b); }
PYLLAMA_DEVICE half2 mul(half2 a, half2 b) { return __hmul2_rn(a, b); }
PYLLAMA_DEVICE half2 fma(half2 a, half2 b, half2 c) { return __hfma2(a, b, c); }
PYLLAMA_DEVICE float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }

#else

inline float to_float(half h) { return emulation::half_to_float(h); }
inline float to_float(bfloat16 b) { return emulation::bfloat16_to_float(b); }
inline half to_half(float f) { return emulation::round_to_half(double{f}); }
inline bfloat16 to_bfloat16(float f) { return emulation::round_to_bfloat16(f); }
inline half2 pair(half low, half high) { return {low, high}; }
inline half low(half2 v) { return v.x; }
inline half high(half2 v) { return v.y; }

namespace detail {
// Exact in double but for bits that no half's rounding sees (emulation/numbers.h).
template <class F>
half2 each_half(half2 a, half2 b, half2 c, const F& f) {
  const auto one = [&](half x, half y, half z) {
    return emulation::round_to_half(f(double{to_float(x)}, double{to_float(y)}, double{to_float(z)}));
  };
  return {one(a.x, b.x, c.x), one(a.y, b.y, c.y)};
}
}  // namespace detail

inline half2 add(half2 a, half2 b) {
  return detail::each_half(a, b, b, [](double x, double y, double) { return x + y; });
}
inline half2 sub(half2 a, half2 b) {
  return detail::each_half(a, b, b, [](double x, double y, double) { return x - y; });
}
inline half2 mul(half2 a, half2 b) {
  return detail::each_half(a, b, b, [](double x, double y, double) { return x * y; });
}
inline half2 fma(half2 a, half2 b, half2 c) {
  return detail::each_half(a, b, c, [](double x, double y, double z) { return x * y + z; });
}
inline float fma(float a, float b, float c) { return std::fma(a, b, c); }

#endif

PYLLAMA_DEVICE float2 to_float(half2 v) { return {to_float(low(v)), to_float(high(v))}; }
PYLLAMA_DEVICE half2 to_half2(float low, float high) { return pair(to_half(low), to_half(high)); }
PYLLAMA_DEVICE half2 as_half2(uint32_t bits) { return bits_as<half2>(bits); }
PYLLAMA_DEVICE uint32_t as_bits(half2 v) { return bits_as<uint32_t>(v); }
PYLLAMA_DEVICE uint32_t as_bits(float v) { return bits_as<uint32_t>(v); }
PYLLAMA_DEVICE float as_float(uint32_t bits) { return bits_as<float>(bits); }
// 2^exponent for -126 … 127, and 0 at -127.
PYLLAMA_DEVICE float power_of_two(int exponent) { return as_float(static_cast<uint32_t>(exponent + 127) << 23); }

// 2^x to about 2^-22 of it: 0 at -infinity, 1 at 0, NaN for NaN; what would be below 2^-126 is 0.
PYLLAMA_DEVICE float exp2_approx(float x) {
#if PYLLAMA_ON_DEVICE
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  const float y = static_cast<float>(std::exp2(double{x}));
  return y < 0x1p-126f ? 0.0f : y;
#endif
}

// The larger one; where one is NaN, the other.
PYLLAMA_DEVICE float max_of(float a, float b) {
#if PYLLAMA_ON_DEVICE
  return fmaxf(a, b);
#else
  return std::fmax(a, b);
#endif
}

// ------------------------------------------------------------------------------------------------- bits

// Any function of three bits, for all 32 at once: table bit 4a + 2b + c is the result. (0xf0 & 0xcc) | 0xaa is (a & b)
// | c.
template <unsigned table>
PYLLAMA_DEVICE uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  static_assert(table < 256, "eight bits");
#if PYLLAMA_ON_DEVICE
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(d) : "r"(a), "r"(b), "r"(c), "n"(table));
  return d;
#else
  uint32_t d = 0;
  for (unsigned i = 0; i < 8; i++) {
    if (table >> i & 1) d |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  }
  return d;
#endif
}

// Byte i of the result: of the bytes of a (0 to 3) and b (4 to 7) that which nibble i of the selector names; with 8
// added, its top bit eight times.
PYLLAMA_DEVICE uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
#if PYLLAMA_ON_DEVICE
  uint32_t d;  // __byte_perm would clear the selector's sign bits
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
  return d;
#else
  const uint64_t bytes = uint64_t{b} << 32 | a;
  uint32_t d = 0;
  for (unsigned i = 0; i < 4; i++) {
    const unsigned s = selector >> (4 * i);
    const uint32_t byte = static_cast<uint32_t>(bytes >> (8 * (s & 7))) & 0xff;
    d |= (s & 8 ? (byte >> 7) * 0xff : byte) << (8 * i);
  }
  return d;
#endif
}

// ------------------------------------------------------------------------------------------------- memory

// 16 bytes at a time from device or shared memory, p a multiple of 16.
PYLLAMA_DEVICE uint4 load_16(const void* p) {
#if !PYLLAMA_ON_DEVICE
  emulation::check_access(p, 16, "load_16");
#endif
  return *static_cast<const uint4*>(p);
}
PYLLAMA_DEVICE void store_16(void* p, const uint4& v) {
#if !PYLLAMA_ON_DEVICE
  emulation::check_access(p, 16, "store_16");
#endif
  *static_cast<uint4*>(p) = v;
}

// Of memory that no kernel in flight writes: 4, 8 or 16 bytes. In flight is also the one in front of a kernel that was
// started early, until wait_for_previous_kernel().
template <class T>
PYLLAMA_DEVICE T load_read_only(const T* p) {
#if PYLLAMA_ON_DEVICE
  return __ldg(p);
#else
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "a word, two or four");
  emulation::check_device_memory(p, sizeof(T), "load_read_only");
  return *p;
#endif
}

// Of such memory (no kernel in flight writes it, the one in front included) as is read once: past the first cache.
PYLLAMA_DEVICE uint4 load_stream(const uint4* p) {
#if PYLLAMA_ON_DEVICE
  uint4 v;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(p));
  return v;
#else
  emulation::check_device_memory(p, 16, "load_stream");
  return *p;
#endif
}

// Of memory that a kernel before this one wrote and that is read once: as load_stream, but never before
// wait_for_previous_kernel().
PYLLAMA_DEVICE uint4 load_once_16(const void* p) {
#if PYLLAMA_ON_DEVICE
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
#else
  emulation::check_device_memory(p, 16, "load_once_16");
  return *static_cast<const uint4*>(p);
#endif
}

// The same where `valid`; otherwise p is not looked at and `to` stays as it is. No branch.
PYLLAMA_DEVICE void load_stream_if(uint4& to, const uint4* p, bool valid) {
#if PYLLAMA_ON_DEVICE
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %5, 0;\n"
      "@p ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4]; }"
      : "+r"(to.x), "+r"(to.y), "+r"(to.z), "+r"(to.w)
      : "l"(p), "r"(static_cast<int>(valid)));
#else
  if (valid) to = load_stream(p);
#endif
}

// 1, 2 or 4 words at p, a multiple of their size, as load_stream_if does, but kept in the first cache.
template <int n>
PYLLAMA_DEVICE void load_words_if(uint32_t (&to)[n], const uint32_t* p, bool valid) {
  static_assert(n == 1 || n == 2 || n == 4, "a load's widths");
#if PYLLAMA_ON_DEVICE
  const int v = valid;
  if constexpr (n == 1) {
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %2, 0; @p ld.global.nc.u32 %0, [%1]; }"
                 : "+r"(to[0])
                 : "l"(p), "r"(v));
  } else if constexpr (n == 2) {
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %3, 0; @p ld.global.nc.v2.u32 {%0, %1}, [%2]; }"
                 : "+r"(to[0]), "+r"(to[1])
                 : "l"(p), "r"(v));
  } else {
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %5, 0; @p ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4]; }"
                 : "+r"(to[0]), "+r"(to[1]), "+r"(to[2]), "+r"(to[3])
                 : "l"(p), "r"(v));
  }
#else
  if (!valid) return;
  emulation::check_device_memory(p, 4 * n, "load_words_if");
  memcpy(to, p, sizeof to);
#endif
}

PYLLAMA_DEVICE void prefetch_l2(const void* p) {
#if PYLLAMA_ON_DEVICE
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
#else
  emulation::check_device_range(p, 1, "prefetch_l2");  // at any time: the second cache is never behind
#endif
}

#if PYLLAMA_ON_DEVICE
namespace detail {
PYLLAMA_DEVICE unsigned shared_address(const void* p) { return static_cast<unsigned>(__cvta_generic_to_shared(p)); }
}  // namespace detail
#endif

// ------------------------------------------------------------------------------------------------- tensor cores

#if PYLLAMA_ON_DEVICE

// c[16×8] += a[16×16] · b[16×8], half inputs, float sums. With g = lane/4, t = lane%4 a lane holds, two neighbours in a
// register, of a the rows g, g+8, g, g+8 and columns 2t, 2t, 2t+8, 2t+8; of b the rows 2t, 2t+8 of column g; and of c
// the elements (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1).
PYLLAMA_DEVICE void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else  // sm_75 takes half of k at a time
  for (int i = 0; i < 2; i++) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[2 * i]), "r"(a[2 * i + 1]), "r"(b[i]));
  }
#endif
}

// The same with the first eight of k only: c[16×8] += a[16×8] · b[8×8].
PYLLAMA_DEVICE void mma_m16n8k8(float (&c)[4], const uint32_t (&a)[2], uint32_t b) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(b));
}

// mma_m16n8k16 with bfloat16. sm_75 has no such instruction: there by shuffles and fma, right but slow.
PYLLAMA_DEVICE void mma_m16n8k16_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  const unsigned g = lane() / 4, t = lane() % 4;
  for (unsigned i = 0; i < 2; i++) {
    for (unsigned k = 0; k < 4; k++) {
      const uint32_t x[2] = {shuffle(a[2 * i], 4 * g + k), shuffle(a[2 * i + 1], 4 * g + k)};
      const uint32_t y[2] = {shuffle(b[i], 8 * t + k), shuffle(b[i], 8 * t + 4 + k)};
      for (unsigned j = 0; j < 4; j++) {
        c[j] = fma(as_float(x[j / 2] << 16), as_float(y[j % 2] << 16), c[j]);
        c[j] = fma(as_float(x[j / 2] & 0xffff0000u), as_float(y[j % 2] & 0xffff0000u), c[j]);
      }
    }
  }
#endif
}

// Matrices of 8×8 halves from shared memory into fragments. Lane 8i + r passes the address of row r of matrix i, a
// multiple of 16 bytes; r[i] receives row lane/4, columns 2(lane%4) and the next of matrix i; _trans: of the matrix
// transposed.
#define PYLLAMA_LOAD_MATRIX(name, modifier)                                                  \
  PYLLAMA_DEVICE void name(uint32_t (&r)[4], const void* row) {                              \
    asm volatile("ldmatrix.sync.aligned.m8n8.x4" modifier ".shared.b16 {%0,%1,%2,%3}, [%4];" \
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])                            \
                 : "r"(detail::shared_address(row))                                          \
                 : "memory");                                                                \
  }
#define PYLLAMA_LOAD_MATRIX_2(name, modifier)                                          \
  PYLLAMA_DEVICE void name(uint32_t (&r)[2], const void* row) {                        \
    asm volatile("ldmatrix.sync.aligned.m8n8.x2" modifier ".shared.b16 {%0,%1}, [%2];" \
                 : "=r"(r[0]), "=r"(r[1])                                              \
                 : "r"(detail::shared_address(row))                                    \
                 : "memory");                                                          \
  }
PYLLAMA_LOAD_MATRIX(load_matrix_x4, "")
PYLLAMA_LOAD_MATRIX(load_matrix_x4_trans, ".trans")
PYLLAMA_LOAD_MATRIX_2(load_matrix_x2, "")
PYLLAMA_LOAD_MATRIX_2(load_matrix_x2_trans, ".trans")
#undef PYLLAMA_LOAD_MATRIX
#undef PYLLAMA_LOAD_MATRIX_2

#else

inline void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulation::mma_half(c, a, b);
}
inline void mma_m16n8k8(float (&c)[4], const uint32_t (&a)[2], uint32_t b) {
  emulation::mma_half(c, {a[0], a[1], 0, 0}, {b, 0});
}
inline void mma_m16n8k16_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulation::mma_bfloat16(c, a, b);
}
inline void load_matrix_x4(uint32_t (&r)[4], const void* row) { emulation::load_matrices(r, row, 4, false); }
inline void load_matrix_x4_trans(uint32_t (&r)[4], const void* row) { emulation::load_matrices(r, row, 4, true); }
inline void load_matrix_x2(uint32_t (&r)[2], const void* row) { emulation::load_matrices(r, row, 2, false); }
inline void load_matrix_x2_trans(uint32_t (&r)[2], const void* row) { emulation::load_matrices(r, row, 2, true); }

#endif

// ------------------------------------------------------------------------------------------------- asynchronous copies

// 16 bytes from device to shared memory, zeros unless `valid` (then `global` is not looked at). They are there after
// copy_wait() for this thread, and after a barrier behind it for the others. sm_75 copies at once.
PYLLAMA_DEVICE void copy_async_16(void* shared, const void* global, bool valid = true) {
#if !PYLLAMA_ON_DEVICE
  emulation::start_copy(shared, global, valid);
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(detail::shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
#else
  *static_cast<uint4*>(shared) = valid ? *static_cast<const uint4*>(global) : uint4{0, 0, 0, 0};
#endif
}

// Makes a group of the copies since the last one.
PYLLAMA_DEVICE void copy_commit() {
#if !PYLLAMA_ON_DEVICE
  emulation::commit_copies();
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits for all of this thread's groups but the newest n.
template <int n>
PYLLAMA_DEVICE void copy_wait() {
#if !PYLLAMA_ON_DEVICE
  emulation::wait_for_copies(n);
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
#endif
}

// ------------------------------------------------------------------------------------------------- the kernel before
// and after

// For kernels launched with Start::kEarly: what earlier kernels wrote may be read after this, and what they read be
// written.
PYLLAMA_DEVICE void wait_for_previous_kernel() {
#if !PYLLAMA_ON_DEVICE
  emulation::this_thread->waited_for_previous = true;
#elif __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel may start, as far as its own wait_for_previous_kernel(), once all blocks have said so or ended.
PYLLAMA_DEVICE void let_next_kernel_start() {
#if PYLLAMA_ON_DEVICE && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#ifdef PYLLAMA_CUDA_LATE_ENDS  // for tests: what comes after is late enough to be missed by who does not wait
  __nanosleep(20000);
#endif
#endif
}

}  // namespace pyllama::cuda
