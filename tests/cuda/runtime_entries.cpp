// Entry points that use csrc/cuda/runtime.h as the host does: graphs, events, copies that are still to be done.
#include <cstring>

#include "cuda/device.h"
#include "entry.h"

using namespace pyllama::cuda;
using namespace pyllama::cuda::tests;

namespace {

struct Step {
  int* values;
  const int* table;
  int factor;
};

// values = values · factor + table: not the same in another order of steps.
PYLLAMA_KERNEL void step(const Step s) {
  const unsigned i = thread_index();
  s.values[i] = s.values[i] * s.factor + s.table[i];
}

struct EarlyRead {
  const int* from;
  int* to;
  bool waits;
};

PYLLAMA_KERNEL void early_read(const EarlyRead e) {
  if (e.waits) wait_for_previous_kernel();
  const int value = load_read_only(e.from + thread_index());
  wait_for_previous_kernel();
  e.to[thread_index()] = value;
}

}  // namespace

// Records copy in, two steps, copy out; then runs it `times` times, with another `table` each time. Each run's results,
// and what was in `out` before the stream was waited for, go to out: [times][32], [32].
PYLLAMA_TEST_ENTRY int graph_replay(const int* in, const int* tables, int64_t times, int* out) {
  return guarded([&] {
    constexpr size_t kBytes = 32 * sizeof(int);
    Stream stream;
    const Memory values(kBytes, "values"), table(kBytes, "table");
    HostMemory from(kBytes), to(kBytes);
    Step args{values.as<int>(), table.as<int>(), 3};
    stream.begin_recording();
    stream.copy_to_device(table.data(), from.as<int>(), kBytes);
    launch(stream, step, args, {}, 32);
    args.factor = 5;
    launch(stream, step, args, {}, 32);
    stream.copy_to_host(to.as<int>(), values.data(), kBytes);
    const Graph graph = stream.end_recording();
    args = {nullptr, nullptr, 0};  // they were captured
    memset(to.as<int>(), 0, kBytes);
    stream.copy_to_device(values.data(), in, kBytes);
    stream.wait();
    memcpy(out + 32 * times, to.as<int>(), kBytes);  // recording did nothing
    for (int64_t i = 0; i < times; i++) {
      memcpy(from.as<int>(), tables + 32 * i, kBytes);
      stream.run(graph);
      stream.wait();
      memcpy(out + 32 * i, to.as<int>(), kBytes);
    }
  });
}

// An exception ends a recording; then the stream records and runs out = 5 · in.
PYLLAMA_TEST_ENTRY int abandoned_recording(const int* in, int* out) {
  return guarded([&] {
    constexpr size_t kBytes = 32 * sizeof(int);
    Stream stream;
    const Memory values(kBytes, "values"), table(kBytes, "table");
    stream.copy_to_device(values.data(), in, kBytes);
    stream.fill(table.data(), 0, kBytes);
    Step args{values.as<int>(), table.as<int>(), 3};
    try {
      const Recording recording(stream);
      launch(stream, step, args, {}, 32);
      throw std::runtime_error("between two verbs");
    } catch (const std::runtime_error&) {
      stream.wait();
    }
    Recording recording(stream);
    args.factor = 5;
    launch(stream, step, args, {}, 32);
    const Graph graph = recording.finish();
    stream.run(graph);
    stream.copy_to_host(out, values.data(), kBytes);
    stream.wait();
  });
}

// A kernel writes ones into all bytes of `values`, then one that is started early reads them, or those of `table`.
PYLLAMA_TEST_ENTRY int read_early(const char* how, int* out) {
  return guarded([&] {
    constexpr size_t kBytes = 32 * sizeof(int);
    const std::string name = how;
    Stream stream;
    const Memory values(kBytes, "values"), table(kBytes, "table"), copy(kBytes, "copy");
    stream.fill(values.data(), 0, kBytes);
    stream.fill(copy.data(), 0, kBytes);
    stream.fill(table.data(), 1, kBytes);
    launch(stream, step, {values.as<int>(), table.as<int>(), 1}, {}, 32);
    if (name == "a kernel between") launch(stream, step, {copy.as<int>(), table.as<int>(), 1}, {}, 32);
    if (name == "a copy between") stream.fill(copy.data(), 0, kBytes);
    const Memory& from = name == "other memory" ? table : values;
    launch(stream, early_read, {from.as<int>(), copy.as<int>(), name == "waits"}, {}, 32, 0, Start::kEarly);
    stream.copy_to_host(out, copy.data(), kBytes);
    stream.wait();
  });
}

// out: what the host finds in the copy of in[0] before and after it waits, and in a copy that waited for an event of
// another stream; in[0] is overwritten by in[1] before anybody waits, as a careless host does.
PYLLAMA_TEST_ENTRY int copies_are_late(const int* in, int* out) {
  return guarded([&] {
    Stream first, second;
    Event copied;
    const Memory a(4, "a"), b(4, "b");
    int value = in[0], back = 0, other = 0;
    first.copy_to_device(a.data(), &value, 4);
    first.copy_to_host(&back, a.data(), 4);
    first.record(copied);
    first.fill(a.data(), 0, 4);
    second.wait_for(copied);
    second.copy_on_device(b.data(), a.data(), 4);
    second.copy_to_host(&other, b.data(), 4);
    value = in[1];
    out[0] = back;
    second.wait();
    out[1] = back;
    out[2] = other;
    int end = 1;
    first.copy_to_host(&end, a.data(), 4);
    first.wait();
    out[3] = end;
  });
}

// What is wrong with how the host uses the device: one thing each.
PYLLAMA_TEST_ENTRY int host_defect(const char* which) {
  return guarded([&] {
    const std::string name = which;
    Stream stream;
    Memory memory(64, "weights");
    char host[128] = {};
    const auto is = [&](const char* one) { return name == one; };
    if (is("copy too long")) stream.copy_to_device(memory.data(), host, 65);
    if (is("copy from past the end")) stream.copy_to_host(host, memory.as<char>() + 60, 8);
    if (is("copy to host memory")) stream.copy_to_device(host + 64, host, 4);
    if (is("fill too long")) stream.fill(memory.data(), 0, 65);
    if (is("freed before it is copied")) {
      stream.copy_to_host(host, memory.data(), 64);
      memory = Memory();
    }
    if (is("too much memory")) Memory(size_t{9} << 30, "cache");
    if (is("another device")) use_device(1);
    if (is("time without a clock")) seconds_between(Event(), Event(Event::kTimed));
    if (is("recording twice")) stream.begin_recording(), stream.begin_recording();
    if (is("not recording")) stream.end_recording();
    if (is("waiting while recording")) stream.begin_recording();
    stream.wait();
  });
}
