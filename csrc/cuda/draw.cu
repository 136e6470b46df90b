// Three kernels. `largest` finds the maximum of each chunk of 1024 logits; `weigh`, again a block a chunk, makes the
// weights and, where a filter asks for it, their sums by depth below the maximum; `pick`, a block a row, finds where
// the filters cut and which token the random number meets. A cut is a key (a logit, then the lower id), and is found
// without sorting: first the step of depth in which it lies, then, while that has more than a block can list, one of
// 256 ranges of keys, and then the place of each listed key among the others. Which way a cut is found does not change
// what it is, so the host's sampler may find it otherwise.
//
// registers: largest_kernel 40
// registers: weigh_kernel 64
// registers: pick_kernel 64
#include "cuda/draw.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "backend.h"
#include "cuda/block_sums.cuh"
#include "portable_exp2.h"
#include "vocab.h"

namespace pyllama {
namespace cuda {

namespace {

constexpr int kChunk = 1024;
constexpr int kChunkThreads = 256, kShare = kChunk / kChunkThreads;
constexpr int kPickThreads = kChunk;
constexpr int kMaxChunks = (kMaxVocab + kChunk - 1) / kChunk;
constexpr int kSteps = 256;     // of depth below the largest logit; the last one is all that is deeper
constexpr double kNats = 12.0;  // that the steps reach down to
constexpr int kAhead = 8;       // chunks that `pick` loads at once
constexpr uint32_t kInfinity = 0x7f800000;

static_assert(kMaxChunks <= kPickThreads, "a thread of `pick` has a chunk");

// What is kept of a row.
struct Kept {
  uint64_t* weights;     // [chunks][kChunk]
  uint64_t* sums;        // [chunks]
  uint64_t* step_sums;   // [kSteps] weights
  uint64_t* step_sizes;  // [kSteps] tokens
  float* maxima;         // [chunks]; NaN where a logit is not finite
};

PYLLAMA_HOST_DEVICE int chunks_of(int vocab_size) { return (vocab_size + kChunk - 1) / kChunk; }

PYLLAMA_HOST_DEVICE int64_t row_bytes(int chunks) {
  return int64_t{8} * (int64_t{chunks} * kChunk + chunks + 2 * kSteps) + (int64_t{chunks} * 4 + 15) / 16 * 16;
}

PYLLAMA_DEVICE Kept kept_of(const DrawTokens& args, int row) {
  const int chunks = chunks_of(args.vocab_size);
  Kept k;
  k.weights = reinterpret_cast<uint64_t*>(args.room + row * row_bytes(chunks));
  k.sums = k.weights + int64_t{chunks} * kChunk;
  k.step_sums = k.sums + chunks;
  k.step_sizes = k.step_sums + kSteps;
  k.maxima = reinterpret_cast<float*>(k.step_sizes + kSteps);
  return k;
}

PYLLAMA_DEVICE const float* logits_of(const DrawTokens& args, int row) {
  return args.logits + int64_t{row} * args.vocab_size;
}

PYLLAMA_DEVICE bool is_finite(float x) { return (as_bits(x) & kInfinity) != kInfinity; }
// NaN wins.
PYLLAMA_DEVICE float larger(float a, float b) { return a > b || a != a ? a : b; }

PYLLAMA_DEVICE bool filtered(const DrawRow& r) { return r.top_k > 0 || r.top_p < 1.0; }

// Larger is more likely, no two are equal: csrc/model/sampler.cpp's keys.
PYLLAMA_DEVICE uint64_t key_of(float logit, int id) {
  const uint32_t bits = as_bits(logit + 0.0f);  // -0 becomes 0
  const uint32_t ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return (uint64_t{ordered} << 32) | ~static_cast<uint32_t>(id);
}

PYLLAMA_DEVICE int step_of(float max, float logit, float per_logit) {
  const float depth = (max - logit) * per_logit;
  return depth < static_cast<float>(kSteps - 1) ? static_cast<int>(depth) : kSteps - 1;
}

// 2^44 · 2^((logit - max)·scale), rounded to an integer: the bits of vocab.h's weigh().
PYLLAMA_DEVICE uint64_t weight_of(float logit, float max, double scale) {
  double t = (static_cast<double>(logit) - static_cast<double>(max)) * scale;
  t = t > -64.0 ? t : -64.0;
  const double shifted = t + 0x1.8p52;
  const double power = exp2_polynomial(t - (shifted - 0x1.8p52));
  const double scaled = bits_as<double>(bits_as<uint64_t>(power) + (bits_as<uint64_t>(shifted) << 52));
  return bits_as<uint64_t>(scaled + 0x1.8p8) - bits_as<uint64_t>(0x1.8p8);
}

// floor(whole · random / 2^53)
PYLLAMA_DEVICE uint64_t share(uint64_t whole, uint64_t random) {
  const uint64_t a1 = whole >> 32, a0 = whole & 0xffffffffu, b1 = random >> 32, b0 = random & 0xffffffffu;
  const uint64_t low = a0 * b0, first = a1 * b0 + (low >> 32), second = a0 * b1 + (first & 0xffffffffu);
  const uint64_t high = a1 * b1 + (first >> 32) + (second >> 32);
  return high << 11 | (second & 0xffffffffu) >> 21;
}

// The share p < 1 of a whole, rounded up, at least 1.
PYLLAMA_DEVICE uint64_t share_up(uint64_t whole, double p) {
  const double exact = static_cast<double>(whole) * p;
  uint64_t part = static_cast<uint64_t>(exact);
  part += static_cast<double>(part) < exact ? 1 : 0;
  return part < 1 ? 1 : part > whole ? whole : part;
}

PYLLAMA_DEVICE float largest_of_row(const Kept& k, int chunks, float* room) {
  float most = k.maxima[0];
  for (int c = static_cast<int>(thread_index()); c < chunks; c += static_cast<int>(block_size())) {
    most = larger(most, k.maxima[c]);
  }
  return reduce_block(most, room, larger);
}

// Grid: chunks, rows; as of `weigh`.
PYLLAMA_KERNEL void largest_kernel(const DrawTokens args) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int chunk = static_cast<int>(block_index().x), row = static_cast<int>(block_index().y);
  const int me = static_cast<int>(thread_index());
  const Kept k = kept_of(args, row);
  const float* const logits = logits_of(args, row);
  float most = as_float(0xff800000);
  PYLLAMA_UNROLL
  for (int i = 0; i < kShare; i++) {
    const int id = chunk * kChunk + i * kChunkThreads + me;
    const float x = id < args.vocab_size ? logits[id] : logits[chunk * kChunk];
    most = larger(most, is_finite(x) ? x : as_float(0x7fc00000));
  }
  most = reduce_block(most, reinterpret_cast<float*>(shared_memory()), larger);
  if (me == 0) k.maxima[chunk] = most;
  if (chunk == 0) k.step_sums[me] = k.step_sizes[me] = 0;
}
static_assert(kChunkThreads == kSteps, "a thread of `largest` and of `weigh` has a step");

PYLLAMA_KERNEL void weigh_kernel(const DrawTokens args) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int chunk = static_cast<int>(block_index().x), row = static_cast<int>(block_index().y);
  const int me = static_cast<int>(thread_index());
  const DrawRow& r = args.rows[row];
  if (r.greedy) return;
  const Kept k = kept_of(args, row);
  const float* const logits = logits_of(args, row);
  uint64_t* const room = reinterpret_cast<uint64_t*>(shared_memory());
  uint64_t* const step_sums = room + 32;
  uint64_t* const step_sizes = step_sums + kSteps;
  const float max = largest_of_row(k, chunks_of(args.vocab_size), reinterpret_cast<float*>(room));
  if (!is_finite(max)) return;
  step_sums[me] = step_sizes[me] = 0;
  barrier();
  uint64_t sum = 0;
  PYLLAMA_UNROLL
  for (int i = 0; i < kShare; i++) {
    const int id = chunk * kChunk + i * kChunkThreads + me;
    const bool there = id < args.vocab_size;
    const float x = there ? logits[id] : 0.0f;
    const uint64_t weight = there ? weight_of(x, max, r.scale) : 0;
    k.weights[id] = weight;
    sum += weight;
    if (there && filtered(r)) {
      const int step = step_of(max, x, r.per_logit);
      atomic_add(&step_sums[step], weight);
      atomic_add(&step_sizes[step], uint64_t{1});
    }
  }
  sum = sum_block(sum, room);
  if (me == 0) k.sums[chunk] = sum;
  if (step_sizes[me] == 0) return;
  atomic_add(&k.step_sums[me], step_sums[me]);
  atomic_add(&k.step_sizes[me], step_sizes[me]);
}

// ---- `pick`

// Its shared memory.
struct Workplace {
  uint64_t room[32];
  uint64_t keys[kPickThreads], units[kPickThreads];  // that are listed
  uint64_t digit_sums[256], digit_sizes[256];
  uint64_t found;
  int32_t chunk, n_listed;
};

// A row as its block sees it.
struct Row {
  Workplace& work;
  Kept kept;
  DrawRow draw;
  const float* logits;
  int vocab_size, chunks;
  float max;
};

// look(id, logit) for the tokens of a step of depth; all threads at once.
template <class Look>
PYLLAMA_DEVICE void for_each_of_step(const Row& r, int step, const Look& look) {
  for (int first = 0; first < r.chunks; first += kAhead) {
    float x[kAhead];
    bool wanted[kAhead];
    PYLLAMA_UNROLL
    for (int i = 0; i < kAhead; i++) {
      const int chunk = first + i, id = chunk * kChunk + static_cast<int>(thread_index());
      wanted[i] =
          chunk < r.chunks && id < r.vocab_size && step_of(r.max, r.kept.maxima[chunk], r.draw.per_logit) <= step;
      x[i] = wanted[i] ? r.logits[id] : 0.0f;
    }
    PYLLAMA_UNROLL
    for (int i = 0; i < kAhead; i++) {
      if (!wanted[i] || step_of(r.max, x[i], r.draw.per_logit) != step) continue;
      look((first + i) * kChunk + static_cast<int>(thread_index()), x[i]);
    }
  }
}

// The key at which a sum over the tokens of a step, from the largest key down, reaches `need`: of their weights, or of
// one for each token.
PYLLAMA_DEVICE uint64_t find_cut(const Row& r, int step, uint64_t need, bool by_weight) {
  Workplace& work = r.work;
  const unsigned me = thread_index();
  const auto unit_of = [&](int id) { return by_weight ? r.kept.weights[id] : uint64_t{1}; };
  uint64_t low = 0, high = ~uint64_t{0};
  uint64_t n = r.kept.step_sizes[step];
  while (n > static_cast<uint64_t>(kPickThreads)) {
    int shift = 0;
    while ((high - low) >> shift > 255) shift++;
    if (me < 256) work.digit_sums[me] = work.digit_sizes[me] = 0;
    barrier();
    for_each_of_step(r, step, [&](int id, float logit) {
      const uint64_t key = key_of(logit, id);
      if (key < low || key > high) return;
      const uint64_t digit = (key - low) >> shift;
      atomic_add(&work.digit_sums[digit], unit_of(id));
      atomic_add(&work.digit_sizes[digit], uint64_t{1});
    });
    barrier();
    int digit = 255;
    while (work.digit_sums[digit] < need) need -= work.digit_sums[digit--];
    n = work.digit_sizes[digit];
    low += static_cast<uint64_t>(digit) << shift;
    const uint64_t last = low + ((uint64_t{1} << shift) - 1);
    high = last < high ? last : high;
    barrier();
  }
  if (me == 0) work.n_listed = 0;
  barrier();
  for_each_of_step(r, step, [&](int id, float logit) {
    const uint64_t key = key_of(logit, id);
    if (key < low || key > high) return;
    const int place = atomic_add(&work.n_listed, 1);
    work.keys[place] = key;
    work.units[place] = unit_of(id);
  });
  barrier();
  if (me < n) {
    const uint64_t key = work.keys[me];
    uint64_t before = 0;
    for (uint64_t i = 0; i < n; i++) before += work.keys[i] > key ? work.units[i] : 0;
    if (before < need && need - before <= work.units[me]) work.found = key;
  }
  barrier();
  const uint64_t found = work.found;
  barrier();
  return found;
}

// The same over all tokens: `steps` are the sums of each step.
PYLLAMA_DEVICE uint64_t find_cut(const Row& r, const uint64_t* steps, uint64_t need, bool by_weight) {
  int step = 0;
  while (steps[step] < need) need -= steps[step++];
  return find_cut(r, step, need, by_weight);
}

PYLLAMA_DEVICE uint64_t kept_weight(const Row& r, int id, uint64_t floor, uint64_t least) {
  const uint64_t weight = r.kept.weights[id];
  return id < r.vocab_size && weight >= least && key_of(r.logits[id], id) >= floor ? weight : 0;
}

// kept.sums = of the weights from the key `floor` on that are at least `least`; returns their sum. A warp has a chunk.
PYLLAMA_DEVICE uint64_t sum_kept(const Row& r, uint64_t floor, uint64_t least) {
  for (int chunk = static_cast<int>(warp()); chunk < r.chunks; chunk += kPickThreads / 32) {
    uint64_t sum = 0;
    if (key_of(r.kept.maxima[chunk], 0) >= floor) {
      PYLLAMA_UNROLL_8
      for (int i = 0; i < kChunk / 32; i++) {
        sum += kept_weight(r, chunk * kChunk + 32 * i + static_cast<int>(lane()), floor, least);
      }
    }
    for (unsigned mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    if (lane() == 0) r.kept.sums[chunk] = sum;
  }
  barrier();
  const int me = static_cast<int>(thread_index());
  return sum_block(me < r.chunks ? r.kept.sums[me] : 0, r.work.room);
}

// The key below which nothing is kept.
PYLLAMA_DEVICE uint64_t floor_of(const Row& r) {
  uint64_t floor = 0;
  if (r.draw.top_k > 0) floor = find_cut(r, r.kept.step_sizes, static_cast<uint64_t>(r.draw.top_k), false);
  if (!(r.draw.top_p < 1.0)) return floor;
  const uint64_t total = sum_kept(r, floor, 0);
  return find_cut(r, r.kept.step_sums, share_up(total, r.draw.top_p), true);
}

// The lowest id with the largest logit.
PYLLAMA_DEVICE int most_likely(const Row& r) {
  const int me = static_cast<int>(thread_index());
  int* const room = reinterpret_cast<int*>(r.work.room);
  const auto smaller = [](int a, int b) { return a < b ? a : b; };
  const int chunk = reduce_block(me < r.chunks && r.kept.maxima[me] == r.max ? me : kMaxChunks, room, smaller);
  const int id = chunk * kChunk + me;
  return reduce_block(id < r.vocab_size && r.logits[id] == r.max ? id : kMaxVocab, room, smaller);
}

// The token at which the running sum of the kept weights passes the random share of them.
PYLLAMA_DEVICE int drawn(const Row& r) {
  const int me = static_cast<int>(thread_index());
  uint64_t floor = 0;
  if (filtered(r.draw)) floor = floor_of(r);
  if (filtered(r.draw) || r.draw.least > 0) sum_kept(r, floor, r.draw.least);
  const uint64_t sum = me < r.chunks ? r.kept.sums[me] : 0;
  const uint64_t chunks_end = running_sum_block(sum, r.work.room);
  const uint64_t target = share(sum_block(sum, r.work.room), r.draw.random);
  if (chunks_end - sum <= target && target < chunks_end) {
    r.work.chunk = me;
    r.work.found = target - (chunks_end - sum);
  }
  barrier();
  const int id = r.work.chunk * kChunk + me;
  const uint64_t within = r.work.found;
  const uint64_t weight = kept_weight(r, id, floor, r.draw.least);
  const uint64_t end = running_sum_block(weight, r.work.room);
  if (end - weight <= within && within < end) r.work.n_listed = id;
  barrier();
  return r.work.n_listed;
}

// Grid: rows.
PYLLAMA_KERNEL PYLLAMA_LAUNCH_BOUNDS(kPickThreads, 1) void pick_kernel(const DrawTokens args) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int row = static_cast<int>(block_index().x), chunks = chunks_of(args.vocab_size);
  Workplace& work = *reinterpret_cast<Workplace*>(shared_memory());
  const Kept kept = kept_of(args, row);
  const float max = largest_of_row(kept, chunks, reinterpret_cast<float*>(work.room));
  int token = -1;
  if (is_finite(max)) {
    const Row r{work, kept, args.rows[row], logits_of(args, row), args.vocab_size, chunks, max};
    token = r.draw.greedy ? most_likely(r) : drawn(r);
  }
  if (thread_index() == 0) args.tokens[row] = token;
}

}  // namespace

DrawRow draw_row(const Draw& draw, int vocab_size) {
  DrawRow r{};
  r.greedy = draw.temperature == 0;
  if (r.greedy) return r;
  r.scale = std::min(0x1.71547652b82fep0 / draw.temperature, std::numeric_limits<double>::max());
  r.per_logit = static_cast<float>(std::min((kSteps - 1) / (kNats * draw.temperature), 1e38));
  r.top_k = draw.top_k < vocab_size ? draw.top_k : 0;
  r.top_p = draw.top_p;
  const double fixed = draw.min_p + 0x1.8p8, unit = 0x1.8p8;
  std::memcpy(&r.least, &fixed, sizeof fixed);
  uint64_t none;
  std::memcpy(&none, &unit, sizeof unit);
  r.least -= none;
  r.random = draw.random;
  return r;
}

size_t draw_room_bytes(int vocab_size) { return static_cast<size_t>(kDrawRows * row_bytes(chunks_of(vocab_size))); }

void draw_tokens(Stream& stream, const DrawTokens& args) {
  if (args.n_rows < 1 || args.n_rows > kDrawRows) throw std::invalid_argument("draw_tokens takes 1 to 8 rows");
  if (args.vocab_size < 1 || args.vocab_size > kMaxVocab)
    throw std::invalid_argument("vocabulary too large to draw from");
  const unsigned rows = static_cast<unsigned>(args.n_rows);
  const Dim3 chunks{static_cast<unsigned>(chunks_of(args.vocab_size)), rows};
  launch(stream, largest_kernel, args, chunks, kChunkThreads, 32 * 8, Start::kEarly);
  launch(stream, weigh_kernel, args, chunks, kChunkThreads, (32 + 2 * kSteps) * 8, Start::kEarly);
  launch(stream, pick_kernel, args, {rows}, kPickThreads, sizeof(Workplace), Start::kEarly);
}

}  // namespace cuda
}  // namespace pyllama
