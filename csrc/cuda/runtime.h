// What the host asks of a device: memory, streams, copies, launches, graphs, properties. Two libraries implement it:
// runtime_cuda.cu over the CUDA runtime, and emulation/runtime.cpp over the CPU, for tests. It includes no CUDA header,
// so that code above it is plain C++. Everything throws Error; nothing prints, aborts or exits.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>
#include <typeinfo>
#include <utility>

#include "../error.h"
#include "api.h"

// Functions for both sides, in headers that plain C++ includes too.
#ifdef __CUDACC__
#define PYLLAMA_HOST_DEVICE __host__ __device__ inline
#else
#define PYLLAMA_HOST_DEVICE inline
#endif

namespace pyllama::cuda {

// kind: a PyllamaCudaKind. What a kernel does wrong shows where its stream is waited for.
struct Error : DeviceError {
  Error(int kind, const std::string& what) : DeviceError(what), kind(kind) {}
  int kind;
};

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

struct DeviceProperties {
  std::string name;
  int major, minor;  // compute capability
  int multiprocessors;
  size_t l2_bytes;
  size_t shared_bytes;  // the most that one block can have
  size_t memory_bytes;
};

bool emulated();
int driver_version();   // 13000: the newest CUDA that the driver runs
int runtime_version();  // of the toolkit that the library was built with; 0 in the emulation
int device_count();     // throws where there is no driver or no device
DeviceProperties properties(int device);
size_t free_bytes(int device);  // makes a context there, which takes some hundred megabytes; properties() does not
void use_device(int device);    // current for this thread, until another is or it calls a stream of another

// Device memory, of the device that is current when it is allocated. Not initialised.
class Memory {
 public:
  Memory() = default;
  Memory(size_t bytes, const char* name);  // name: for errors
  Memory(Memory&& other) noexcept { swap(other); }
  Memory& operator=(Memory&& other) noexcept {
    Memory(std::move(other)).swap(*this);
    return *this;
  }
  ~Memory();

  size_t bytes() const { return bytes_; }
  void* data() const { return data_; }
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void swap(Memory& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
  }

  void* data_ = nullptr;
  size_t bytes_ = 0;
};

// Host memory that the device copies from and to while the host goes on.
class HostMemory {
 public:
  HostMemory() = default;
  explicit HostMemory(size_t bytes);
  HostMemory(HostMemory&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
  HostMemory& operator=(HostMemory&& other) noexcept {
    std::swap(data_, other.data_);
    return *this;
  }
  ~HostMemory();

  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
};

// A point in a stream's work. Of the device that is current, which must be the stream's. Only kTimed ones have a time,
// and cost more.
class Event {
 public:
  enum Clock { kUntimed, kTimed };
  explicit Event(Clock clock = kUntimed);
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  ~Event();

  void* handle() const { return handle_; }

 private:
  void* handle_;
};

// Between two timed events that were recorded and waited for; the emulation's clock means nothing.
double seconds_between(const Event& begin, const Event& end);

// When a kernel may start. `kEarly`: before the one in front of it has ended (programmatic dependent launch, sm_90+;
// elsewhere as kAfterPrevious). All its threads must then call wait_for_previous_kernel() before they touch what an
// earlier kernel writes or reads.
enum class Start { kAfterPrevious, kEarly };

// For tests and measurements: without, kEarly is kAfterPrevious, in the whole process. They are allowed at first,
// unless PYLLAMA_CUDA_DEBUG has the word no-early.
void allow_early_starts(bool allowed);

struct LaunchShape {
  Dim3 grid;
  unsigned block;  // threads
  size_t shared_bytes;
  Start start;
};

// Work recorded from a stream, to be run again and again with the arguments it was recorded with.
class Graph {
 public:
  explicit Graph(void* handle) : handle_(handle) {}
  Graph(Graph&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Graph& operator=(Graph&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Graph();

  void* handle() const { return handle_; }

 private:
  void* handle_;
};

// Work done one after another, while the host goes on. Host memory of a copy must stay as it is until wait(). Belongs
// to the device that was current when it was made; whoever calls it has that device current from then on.
class Stream {
 public:
  Stream();
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  ~Stream();

  void copy_to_device(void* device, const void* host, size_t bytes);
  void copy_to_host(void* host, const void* device, size_t bytes);
  void copy_on_device(void* to, const void* from, size_t bytes);
  void fill(void* device, unsigned char value, size_t bytes);

  void record(const Event& event);    // the event is reached when all work so far is done
  void wait_for(const Event& event);  // later work waits for the event, as it was last recorded
  void run(const Graph& graph);
  void wait();  // until all work is done; throws what went wrong in it

  // Work from here on is recorded and not done, until end_recording(). See Recording.
  void begin_recording();
  Graph end_recording();  // where it throws, the stream has stopped recording
  void abandon_recording() noexcept;

  int device() const { return device_; }
  void make_current() const;  // device(), for this thread

  // Use launch() below. `call` runs the kernel on one thread of the emulation, and is of no use to the device.
  void launch_kernel(const char* name, const void* kernel, void (*call)(const void* kernel, const void* args),
                     const void* args, size_t args_bytes, const LaunchShape& shape);

  void* handle() const { return handle_; }

 private:
  int device_;
  void* handle_;
};

// A recording that ends with its scope: abandoned, unless it was finished, so that an exception between its begin and
// its end leaves a stream that works.
class Recording {
 public:
  explicit Recording(Stream& stream) : stream_(&stream) { stream.begin_recording(); }
  Recording(const Recording&) = delete;
  Recording& operator=(const Recording&) = delete;
  ~Recording() {
    if (stream_) stream_->abandon_recording();
  }

  Graph finish() { return std::exchange(stream_, nullptr)->end_recording(); }

 private:
  Stream* stream_;
};

namespace detail {
template <class T>
struct Same {
  using Type = T;
};
template <class Args>
void call_kernel(const void* kernel, const void* args) {
  reinterpret_cast<void (*)(Args)>(const_cast<void*>(kernel))(*static_cast<const Args*>(args));
}
}  // namespace detail

// Runs PYLLAMA_KERNEL void kernel(const Args args) on a grid of blocks of `block` threads. Errors name the kernel by
// the type of its argument.
template <class Args>
void launch(Stream& stream, void (*kernel)(Args), const typename detail::Same<Args>::Type& args, Dim3 grid,
            unsigned block, size_t shared_bytes = 0, Start start = Start::kAfterPrevious) {
  stream.launch_kernel(typeid(Args).name(), reinterpret_cast<const void*>(kernel), detail::call_kernel<Args>, &args,
                       sizeof(Args), {grid, block, shared_bytes, start});
}

}  // namespace pyllama::cuda
