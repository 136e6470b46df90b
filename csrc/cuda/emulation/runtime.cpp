// runtime.h on the CPU. A stream is a list of work that nobody does before somebody waits: the latest that a device
// could be, so that a host which reads too early finds poison, and one which overwrites what is still to be copied
// finds that copied.
#include "../runtime.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

#include "memory.h"
#include "thread.h"

namespace pyllama::cuda {

namespace {

using Work = std::function<void()>;

struct StreamState {
  std::deque<Work> work;
  std::unique_ptr<std::vector<Work>> recording;

  void add(Work item) {
    if (recording) {
      recording->push_back(std::move(item));
    } else {
      work.push_back(std::move(item));
    }
  }

  void do_next() {
    const Work item = std::move(work.front());
    work.pop_front();
    item();
  }

  // Work that is no kernel: what comes behind it cannot start early.
  void add_copy(Work item) {
    add([item = std::move(item)] {
      emulation::forget_changes();
      item();
    });
  }

  // What comes after something that failed is not done.
  void finish() {
    emulation::forget_changes();  // nothing is in flight
    try {
      while (!work.empty()) do_next();
    } catch (...) {
      work.clear();
      throw;
    }
  }
};

struct EventState {
  std::shared_ptr<StreamState> stream;  // where it was last recorded
  bool timed = false;
  uint64_t recorded = 0, reached = 0;
  std::chrono::steady_clock::time_point time;
};

using GraphState = std::shared_ptr<const std::vector<Work>>;

// Streams and events are shared with the work that speaks of them.
std::shared_ptr<StreamState>& state_of(const Stream& s) {
  return *static_cast<std::shared_ptr<StreamState>*>(s.handle());
}
std::shared_ptr<EventState>& state_of(const Event& e) { return *static_cast<std::shared_ptr<EventState>*>(e.handle()); }

std::atomic<bool> early_starts{true};

}  // namespace

bool emulated() { return true; }
void allow_early_starts(bool allowed) { early_starts = allowed; }
int driver_version() { return 0; }
int runtime_version() { return 0; }
int device_count() { return 1; }

DeviceProperties properties(int device) {
  use_device(device);
  return {"emulated device", 8, 0, 4, 1 << 20, emulation::kSharedBytes, emulation::memory_bytes()};
}

size_t free_bytes(int device) {
  use_device(device);
  return emulation::memory_bytes() - std::min(emulation::memory_bytes(), emulation::allocated_bytes());
}

void use_device(int device) {
  if (device == 0) return;
  throw Error(kPyllamaCudaNoDevice, "device " + std::to_string(device) + ": the emulation has device 0 only");
}

Memory::Memory(size_t bytes, const char* name) : data_(emulation::allocate(bytes, name)), bytes_(bytes) {}
Memory::~Memory() {
  if (data_) emulation::release(data_);
}

HostMemory::HostMemory(size_t bytes) : data_(::operator new(bytes)) { memset(data_, emulation::kPoison, bytes); }
HostMemory::~HostMemory() { ::operator delete(data_); }

Event::Event(Clock clock) : handle_(new std::shared_ptr<EventState>(std::make_shared<EventState>())) {
  state_of(*this)->timed = clock == kTimed;
}
Event::~Event() { delete &state_of(*this); }

double seconds_between(const Event& begin, const Event& end) {
  if (!state_of(begin)->timed || !state_of(end)->timed)
    throw Error(kPyllamaCudaBadArgument, "the time between two events: one was made without a clock");
  return std::chrono::duration<double>(state_of(end)->time - state_of(begin)->time).count();
}

Graph::~Graph() { delete static_cast<GraphState*>(handle_); }

Stream::Stream() : device_(0), handle_(new std::shared_ptr<StreamState>(std::make_shared<StreamState>())) {}
Stream::~Stream() { delete &state_of(*this); }

void Stream::make_current() const {}

void Stream::copy_to_device(void* device, const void* host, size_t bytes) {
  emulation::check_device_range(device, bytes, "copy_to_device");
  state_of(*this)->add_copy([=] {
    emulation::check_device_range(device, bytes, "copy_to_device");  // nobody has freed it meanwhile
    memcpy(device, host, bytes);
  });
}

void Stream::copy_to_host(void* host, const void* device, size_t bytes) {
  emulation::check_device_range(device, bytes, "copy_to_host");
  if (!state_of(*this)->recording) memset(host, emulation::kPoison, bytes);
  state_of(*this)->add_copy([=] {
    emulation::check_device_range(device, bytes, "copy_to_host");
    memcpy(host, device, bytes);
  });
}

void Stream::copy_on_device(void* to, const void* from, size_t bytes) {
  state_of(*this)->add_copy([=] {
    emulation::check_device_range(to, bytes, "copy_on_device");
    emulation::check_device_range(from, bytes, "copy_on_device");
    memmove(to, from, bytes);
  });
}

void Stream::fill(void* device, unsigned char value, size_t bytes) {
  state_of(*this)->add_copy([=] {
    emulation::check_device_range(device, bytes, "fill");
    memset(device, value, bytes);
  });
}

void Stream::launch_kernel(const char* name, const void* kernel, void (*call)(const void*, const void*),
                           const void* args, size_t args_bytes, const LaunchShape& shape) {
  const auto* bytes = static_cast<const unsigned char*>(args);
  emulation::Launch launch{name, shape, call, kernel, {bytes, bytes + args_bytes}};
  if (!early_starts) launch.shape.start = Start::kAfterPrevious;
  state_of(*this)->add([launch = std::move(launch)] { emulation::run(launch); });
}

void Stream::record(const Event& event) {
  const std::shared_ptr<EventState>& e = state_of(event);
  if (!state_of(*this)->recording) {
    e->stream = state_of(*this);
    e->recorded++;
  }
  state_of(*this)->add([e, number = e->recorded] {
    e->reached = number;
    e->time = std::chrono::steady_clock::now();
  });
}

void Stream::wait_for(const Event& event) {
  const std::shared_ptr<EventState>& e = state_of(event);
  state_of(*this)->add([e, stream = e->stream, number = e->recorded] {
    while (e->reached < number && stream && !stream->work.empty()) stream->do_next();
    emulation::forget_changes();
  });
}

void Stream::run(const Graph& graph) {
  const GraphState work = *static_cast<GraphState*>(graph.handle());
  state_of(*this)->add([work] {
    for (const Work& item : *work) item();
  });
}

void Stream::wait() {
  if (state_of(*this)->recording)
    throw Error(kPyllamaCudaBadArgument, "a stream that is recording cannot be waited for");
  state_of(*this)->finish();
}

void Stream::begin_recording() {
  if (state_of(*this)->recording) throw Error(kPyllamaCudaBadArgument, "the stream is recording already");
  state_of(*this)->recording = std::make_unique<std::vector<Work>>();
}

Graph Stream::end_recording() {
  if (!state_of(*this)->recording) throw Error(kPyllamaCudaBadArgument, "the stream is not recording");
  const std::unique_ptr<std::vector<Work>> work = std::move(state_of(*this)->recording);
  return Graph(new GraphState(std::make_shared<std::vector<Work>>(std::move(*work))));
}

void Stream::abandon_recording() noexcept { state_of(*this)->recording.reset(); }

}  // namespace pyllama::cuda
