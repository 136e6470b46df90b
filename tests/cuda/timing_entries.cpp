// Kernels of csrc/cuda for the clock: products, attention, norms, copies and empty kernels on random numbers that are
// made in device memory. Each entry fills `seconds` with one launch's mean time in each of some rounds; a round replays
// a graph of many launches between two events, over as many copies of what is read as the caller asks for, so that it
// comes from memory and not from a cache. Nobody looks at results here: other entries are for that. Used by
// benchmarks/gpu.py.
#include <functional>
#include <string>
#include <vector>

#include "cuda/activations.h"
#include "cuda/attention.h"
#include "cuda/device.h"
#include "cuda/linear.h"
#include "entry.h"

using namespace pyllama;
using namespace pyllama::cuda;
using namespace pyllama::cuda::tests;

namespace {

// ---------------------------------------------------------------------------------------------------- random numbers

struct Noise {
  uint32_t* out;
  uint64_t n;
  uint32_t seed, mask, base;
};

// Words of random bits where `mask` has ones, and `base` elsewhere.
PYLLAMA_KERNEL void noise_kernel(const Noise args) {
  const uint64_t stride = uint64_t{grid_size().x} * block_size();
  for (uint64_t i = uint64_t{block_index().x} * block_size() + thread_index(); i < args.n; i += stride) {
    uint32_t x = static_cast<uint32_t>(i) * 0x9e3779b9u + args.seed;
    x = (x ^ (x >> 16)) * 0x85ebca6bu;
    x = (x ^ (x >> 13)) * 0xc2b2ae35u;
    args.out[i] = ((x ^ (x >> 16)) & args.mask) | args.base;
  }
}

enum class Numbers { kBits, kHalves, kFloats };  // halves and floats of 1/2 to 1, either sign

Memory random_memory(Stream& stream, size_t bytes, Numbers numbers, uint32_t seed) {
  Memory memory(bytes + 4, "random numbers");
  Noise args{memory.as<uint32_t>(), (bytes + 3) / 4, seed, ~0u, 0};
  if (numbers == Numbers::kHalves) args.mask = 0x83ff83ff, args.base = 0x38003800;
  if (numbers == Numbers::kFloats) args.mask = 0x807fffff, args.base = 0x3f000000;
  const unsigned blocks = emulated() ? 2 : 1024;
  launch(stream, noise_kernel, args, {blocks, 1, 1}, 256);
  return memory;
}

// ---------------------------------------------------------------------------------------------------- the clock

struct Rounds {
  int launches;  // in a round
  int rounds;
  bool replayed;  // as a graph
};

// once: before the clock, since the first launch of a kernel loads it.
void time_launches(Stream& stream, const Rounds& how, double* seconds, const std::function<void(int)>& launch_one) {
  const auto launch_all = [&] {
    for (int i = 0; i < how.launches; i++) launch_one(i);
  };
  launch_all();
  stream.wait();
  std::vector<Graph> graph;
  if (how.replayed) {
    Recording recording(stream);
    launch_all();
    graph.push_back(recording.finish());
  }
  const auto run = [&] {
    if (how.replayed) {
      stream.run(graph[0]);
    } else {
      launch_all();
    }
  };
  run();
  for (int round = 0; round < how.rounds; round++) {
    const Event begin(Event::kTimed), end(Event::kTimed);
    stream.record(begin);
    run();
    stream.record(end);
    stream.wait();
    seconds[round] = seconds_between(begin, end) / how.launches;
  }
}

// ---------------------------------------------------------------------------------------------------- products

struct Matrix {
  Fragments fragments;
  Memory codes, scales, row_scales;

  Matrix(Stream& stream, const Weight& weight, uint32_t seed) {
    const Weight* one = &weight;
    fragments = fragments_of(&one, 1);
    const FragmentSizes sizes = fragment_sizes(fragments);
    const bool dense = fragments.kind == Codes::half || fragments.kind == Codes::half_pair;
    codes = random_memory(stream, sizes.codes_bytes, dense ? Numbers::kHalves : Numbers::kBits, seed);
    scales = random_memory(stream, sizes.scales_bytes, Numbers::kHalves, seed + 1);
    row_scales = random_memory(stream, sizes.row_scales_bytes, Numbers::kFloats, seed + 2);
    fragments.codes = codes.as<uint8_t>();
    fragments.scales = scales.as<uint32_t>();
    fragments.row_scales = row_scales.as<float>();
  }
};

struct Panels {
  Memory values, sums, scales;

  Panels(int columns, int n_tokens) {
    const ActivationSizes sizes = activation_sizes(columns, n_tokens);
    values = Memory(sizes.values_bytes, "values");
    sums = Memory(sizes.sums_bytes, "sums");
    scales = Memory(sizes.scales_bytes, "scales");
  }
  Activations activations() const { return {values.as<uint8_t>(), sums.as<uint32_t>(), scales.as<float>()}; }
};

struct NothingArgs {
  int unused;
};
PYLLAMA_KERNEL void nothing(const NothingArgs) {
  wait_for_previous_kernel();
  let_next_kernel_start();
}

size_t as_size(int64_t n) { return static_cast<size_t>(n); }

}  // namespace

// what: format, scale_type, offset_type (as in formats.h), rows, columns, group, n_tokens, SwiGLU?, copies, launches,
// rounds. bytes: of a copy's weights. seconds: [rounds].
PYLLAMA_TEST_ENTRY int time_linear(const int64_t* what, int64_t* bytes, double* seconds) {
  return guarded([&] {
    Stream stream;
    Weight weight;
    weight.name = "random";
    weight.format = static_cast<Format>(what[0]);
    weight.scale_type = static_cast<Number>(what[1]);
    weight.offset_type = static_cast<Number>(what[2]);
    weight.N = static_cast<int>(what[3]);
    weight.K = static_cast<int>(what[4]);
    weight.group = static_cast<int>(what[5]);
    for (size_t i = 0; i < 16; i++) weight.codebook[i] = static_cast<int8_t>(16 * i - 127);
    const int n_tokens = static_cast<int>(what[6]), n_copies = static_cast<int>(what[8]);
    std::vector<Matrix> copies;
    for (int i = 0; i < n_copies; i++) copies.emplace_back(stream, weight, static_cast<uint32_t>(i) * 977);
    const FragmentSizes sizes = fragment_sizes(copies[0].fragments);
    *bytes = static_cast<int64_t>(sizes.codes_bytes + sizes.scales_bytes + sizes.row_scales_bytes);
    const Memory x = random_memory(stream, 4 * as_size(n_tokens) * as_size(weight.K), Numbers::kFloats, 1);
    const Memory y(4 * as_size(n_tokens) * as_size(weight.N), "y");
    const Panels panels(weight.K, n_tokens);
    prepare_activations(stream, {x.as<float>(), weight.K, n_tokens, weight.K}, panels.activations());
    const int multiprocessors = properties(stream.device()).multiprocessors;
    time_launches(stream, {static_cast<int>(what[9]), static_cast<int>(what[10]), true}, seconds, [&](int i) {
      const Fragments& f = copies[as_size(i % n_copies)].fragments;
      if (what[7]) {
        linear(stream, f, panels.activations(), n_tokens, StoreSwiglu{y.as<float>(), weight.N / 2, weight.N / 2},
               multiprocessors);
      } else {
        linear(stream, f, panels.activations(), n_tokens, StoreRows{y.as<float>(), weight.N}, multiprocessors);
      }
    });
  });
}

// what: columns, n_tokens, launches, rounds. Norm and rounding of what products take.
PYLLAMA_TEST_ENTRY int time_norm(const int64_t* what, double* seconds) {
  return guarded([&] {
    Stream stream;
    const int columns = static_cast<int>(what[0]), n_tokens = static_cast<int>(what[1]);
    const Memory x = random_memory(stream, 4 * as_size(columns) * as_size(n_tokens), Numbers::kFloats, 1);
    const Memory weight = random_memory(stream, 4 * as_size(columns), Numbers::kFloats, 2);
    const Panels panels(columns, n_tokens);
    time_launches(stream, {static_cast<int>(what[2]), static_cast<int>(what[3]), true}, seconds, [&](int) {
      norm_activations(stream, {x.as<float>(), columns, n_tokens, columns}, weight.as<float>(), 1e-5f,
                       panels.activations());
    });
  });
}

// what: q8?, n_kv_heads, head_dim, n_heads, n_spans, tokens of each, keys of each with these, layers, launches, rounds.
// Launch i reads layer i % layers. bytes: of keys and values that a launch reads once.
PYLLAMA_TEST_ENTRY int time_attend(const int64_t* what, int64_t* bytes, double* seconds) {
  return guarded([&] {
    Stream stream;
    const int n_heads = static_cast<int>(what[3]), n_spans = static_cast<int>(what[4]);
    const int span_tok = static_cast<int>(what[5]), keys = static_cast<int>(what[6]),
              layers = static_cast<int>(what[7]);
    const CacheLayout layout = cache_layout(what[0] ? CacheType::q8 : CacheType::f16, layers, static_cast<int>(what[1]),
                                            static_cast<int>(what[2]));
    const DeviceProperties device = properties(stream.device());
    AttendShape shape;
    shape.n_spans = n_spans;
    shape.max_span_tok = span_tok;
    shape.max_keys = keys;
    shape.n_tok = n_spans * span_tok;
    shape.n_heads = n_heads;
    shape.multiprocessors = device.multiprocessors;
    shape.shared_bytes = device.shared_bytes;
    const int pages = (keys + kCachePageTok - 1) / kCachePageTok;
    shape.n_pages = pages * n_spans;
    *bytes = int64_t{n_spans} * keys * layout.n_kv_heads * layout.head_bytes / kCachePageTok;
    const size_t n_pages = as_size(pages) * as_size(n_spans);
    const Memory cache = random_memory(stream, n_pages * as_size(layout.page_bytes), Numbers::kHalves, 3);
    std::vector<uint8_t*> table(n_pages);
    for (size_t i = 0; i < n_pages; i++) table[i] = cache.as<uint8_t>() + i * as_size(layout.page_bytes);
    std::vector<DeviceSpan> spans;
    for (int i = 0; i < n_spans; i++) spans.push_back({i * span_tok, span_tok, keys - span_tok, i * pages});
    const Memory page_table(n_pages * sizeof(uint8_t*), "page table"),
        device_spans(sizeof(DeviceSpan) * spans.size(), "");
    stream.copy_to_device(page_table.data(), table.data(), page_table.bytes());
    stream.copy_to_device(device_spans.data(), spans.data(), device_spans.bytes());
    const size_t numbers = as_size(shape.n_tok) * as_size(n_heads) * as_size(layout.head_dim);
    const Memory q = random_memory(stream, 4 * numbers, Numbers::kFloats, 4), o(4 * numbers, "o");
    const AttendRoom room = attend_room(layout, shape);
    const Memory partials(room.partials_bytes + 16, "partials"), arrived(room.arrived_bytes + 16, "arrived");
    stream.fill(arrived.data(), 0, arrived.bytes());
    stream.wait();
    const AttendBuffers buffers{
        q.as<float>(),        o.as<float>(),        device_spans.as<DeviceSpan>(), page_table.as<uint8_t*>(),
        partials.as<float>(), arrived.as<int32_t>()};
    time_launches(stream, {static_cast<int>(what[8]), static_cast<int>(what[9]), true}, seconds,
                  [&](int i) { attend(stream, layout, i % layers, shape, buffers); });
  });
}

// Kernels that do nothing, one after another: what a launch costs. what: replayed?, early?, launches, rounds.
PYLLAMA_TEST_ENTRY int time_nothing(const int64_t* what, double* seconds) {
  return guarded([&] {
    Stream stream;
    const Start start = what[1] ? Start::kEarly : Start::kAfterPrevious;
    time_launches(stream, {static_cast<int>(what[2]), static_cast<int>(what[3]), what[0] != 0}, seconds,
                  [&](int) { launch(stream, nothing, {0}, {1, 1, 1}, 32, 0, start); });
  });
}

// A copy from one place on the device to another. what: bytes, rounds.
PYLLAMA_TEST_ENTRY int time_copy(const int64_t* what, double* seconds) {
  return guarded([&] {
    Stream stream;
    const Memory from = random_memory(stream, as_size(what[0]), Numbers::kBits, 5), to(as_size(what[0]), "to");
    time_launches(stream, {1, static_cast<int>(what[1]), false}, seconds,
                  [&](int) { stream.copy_on_device(to.data(), from.data(), to.bytes()); });
  });
}
