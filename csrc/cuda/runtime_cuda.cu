// runtime.h over the CUDA runtime, which is linked statically and finds the driver by itself when it is first called.
// Maps CUDA's error codes to the kinds of api.h. Has no kernel and knows none.
#include <cuda_runtime.h>
#include <cxxabi.h>

#include <atomic>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>

#include "runtime.h"

namespace pyllama::cuda {
namespace {

// What the driver can run; 0: there is none. Needs no device.
int driver_or_none() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

int kind_of(cudaError_t code) {
  switch (code) {
    case cudaErrorInsufficientDriver:  // also when there is none at all
      return driver_or_none() == 0 ? kPyllamaCudaNoDriver : kPyllamaCudaDriverTooOld;
    case cudaErrorUnsupportedPtxVersion:  // of a newer toolkit than the driver's compiler knows
    case cudaErrorCallRequiresNewerDriver:
    case cudaErrorSystemDriverMismatch:
    case cudaErrorCompatNotSupportedOnDevice:
      return kPyllamaCudaDriverTooOld;
    case cudaErrorStubLibrary:
      return kPyllamaCudaNoDriver;
    case cudaErrorNoDevice:
      return kPyllamaCudaNoDevice;
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorInvalidKernelImage:
      return kPyllamaCudaArchitectureNotBuilt;
    case cudaErrorMemoryAllocation:
      return kPyllamaCudaOutOfMemory;
    case cudaErrorInvalidDevice:
      return kPyllamaCudaBadArgument;
    default:
      return kPyllamaCudaInternal;
  }
}

// After these the device takes no more work from this process, and every later call fails with the same code.
bool breaks_the_context(cudaError_t code) {
  switch (code) {
    case cudaErrorIllegalAddress:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorIllegalInstruction:
    case cudaErrorHardwareStackError:
    case cudaErrorLaunchFailure:
    case cudaErrorLaunchTimeout:
    case cudaErrorAssert:
    case cudaErrorECCUncorrectable:
    case cudaErrorContextIsDestroyed:
      return true;
    default:
      return false;
  }
}

constexpr const char* kNoDriver = "libcuda.so.1 is not there or does not answer";

void check(cudaError_t code, const std::string& what) {
  if (code == cudaSuccess) return;
  cudaGetLastError();  // has been told: the next call must not find it again
  const int kind = kind_of(code);
  if (kind == kPyllamaCudaNoDriver) throw Error(kind, kNoDriver);  // CUDA's own words speak of an old one
  const char* lasting =
      breaks_the_context(code) ? "; this process cannot use the device any more, start a new one" : "";
  throw Error(kind, what + ": " + cudaGetErrorString(code) + " (" + cudaGetErrorName(code) + ")" + lasting);
}

std::string readable(const char* mangled) {
  int status = 0;
  const std::unique_ptr<char, void (*)(void*)> name(abi::__cxa_demangle(mangled, nullptr, nullptr, &status), std::free);
  return status == 0 ? name.get() : mangled;
}

// Launches happen often: their names are made readable only for an error.
void check_launch(cudaError_t code, const char* mangled) {
  if (code != cudaSuccess) check(code, readable(mangled));
}

int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "the current device");
  return device;
}

// Gives the thread back the device that it had.
class OtherDevice {
 public:
  explicit OtherDevice(int device) : before_(current_device()) {
    if (device != before_) use_device(device);
  }
  OtherDevice(const OtherDevice&) = delete;
  OtherDevice& operator=(const OtherDevice&) = delete;
  ~OtherDevice() { cudaSetDevice(before_); }

 private:
  int before_;
};

int attribute(int device, cudaDeviceAttr which) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "device " + std::to_string(device));
  return value;
}

// For calls, which find the stream's device current.
cudaStream_t raw(const Stream& stream) {
  stream.make_current();
  return static_cast<cudaStream_t>(stream.handle());
}
cudaEvent_t raw(const Event& event) { return static_cast<cudaEvent_t>(event.handle()); }
cudaGraphExec_t raw(const Graph& graph) { return static_cast<cudaGraphExec_t>(graph.handle()); }

// Is `word` among those of PYLLAMA_CUDA_DEBUG (docs/GPU.md)?
bool debugging(const std::string& word) {
  const char* words = std::getenv("PYLLAMA_CUDA_DEBUG");
  return words && ("," + std::string(words) + ",").find("," + word + ",") != std::string::npos;
}

std::atomic<bool>& early_starts() {
  // An older driver records an early start as none, or not at all.
  constexpr int kRecordsEarlyStarts = 12030;
  static std::atomic<bool> allowed{!debugging("no-early") && driver_or_none() >= kRecordsEarlyStarts};
  return allowed;
}

// What a kernel is on one device: asked, and its shared memory allowed, once and not at each launch.
struct KnownKernel {
  bool may_start_early;
  size_t shared_bytes;  // that a launch may have
};

KnownKernel know(const void* kernel, int device, size_t shared_bytes, const char* name) {
  constexpr size_t kSharedWithoutAsking = 48 << 10;
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, KnownKernel> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_pair(kernel, device);
  auto found = known.find(key);
  if (found == known.end()) {
    cudaFuncAttributes attributes{};
    check_launch(cudaFuncGetAttributes(&attributes, kernel), name);
    // Code for sm_90 and later alone waits for the kernel before it: what was compiled from the PTX of an older
    // architecture has no such instruction and must not start early, even on a device that could.
    found = known.emplace(key, KnownKernel{attributes.ptxVersion >= 90, kSharedWithoutAsking}).first;
  }
  if (shared_bytes > found->second.shared_bytes) {
    check_launch(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
        name);
    found->second.shared_bytes = shared_bytes;
  }
  return found->second;
}

}  // namespace

bool emulated() { return false; }

void allow_early_starts(bool allowed) { early_starts() = allowed; }

int runtime_version() { return CUDART_VERSION; }

int driver_version() {
  const int version = driver_or_none();
  if (version == 0) throw Error(kPyllamaCudaNoDriver, kNoDriver);
  return version;
}

int device_count() {
  int count = 0;
  check(cudaGetDeviceCount(&count), "looking for devices");
  if (count == 0) throw Error(kPyllamaCudaNoDevice, "the driver counts 0 devices");
  return count;
}

void use_device(int device) { check(cudaSetDevice(device), "device " + std::to_string(device)); }

DeviceProperties properties(int device) {
  cudaDeviceProp found{};
  check(cudaGetDeviceProperties(&found, device), "device " + std::to_string(device));
  return {found.name,
          found.major,
          found.minor,
          found.multiProcessorCount,
          static_cast<size_t>(found.l2CacheSize),
          static_cast<size_t>(attribute(device, cudaDevAttrMaxSharedMemoryPerBlockOptin)),
          found.totalGlobalMem};
}

size_t free_bytes(int device) {
  const OtherDevice other(device);
  size_t found = 0, all = 0;
  check(cudaMemGetInfo(&found, &all), "memory of device " + std::to_string(device));
  return found;
}

// ---- memory

Memory::Memory(size_t bytes, const char* name) : bytes_(bytes) {
  check(cudaMalloc(&data_, bytes), std::string(name) + ", " + std::to_string(bytes) + " bytes");
  static const bool poison = debugging("poison");
  if (!poison) return;
  check(cudaMemset(data_, 0xff, bytes), "poisoning memory");  // NaN in every type
  check(cudaDeviceSynchronize(), "poisoning memory");         // streams do not wait for it
}
// Freeing null would be a call too: it makes a context, and ends a recording.
Memory::~Memory() {
  if (data_) cudaFree(data_);
}

HostMemory::HostMemory(size_t bytes) {
  check(cudaMallocHost(&data_, bytes), std::to_string(bytes) + " bytes of pinned memory");
}
HostMemory::~HostMemory() {
  if (data_) cudaFreeHost(data_);
}

// ---- events and graphs

Event::Event(Clock clock) {
  cudaEvent_t event = nullptr;
  check(cudaEventCreateWithFlags(&event, clock == kTimed ? cudaEventDefault : cudaEventDisableTiming),
        "making an event");
  handle_ = event;
}
Event::~Event() { cudaEventDestroy(raw(*this)); }

double seconds_between(const Event& begin, const Event& end) {
  float milliseconds = 0;
  check(cudaEventElapsedTime(&milliseconds, raw(begin), raw(end)), "the time between two events");
  return milliseconds / 1e3;
}

Graph::~Graph() {
  if (handle_ != nullptr) cudaGraphExecDestroy(raw(*this));
}

// ---- streams

Stream::Stream() : device_(current_device()) {
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "making a stream");
  handle_ = stream;
}
Stream::~Stream() { cudaStreamDestroy(static_cast<cudaStream_t>(handle_)); }

void Stream::make_current() const {
  if (current_device() != device_) use_device(device_);
}

void Stream::copy_to_device(void* device, const void* host, size_t bytes) {
  check(cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, raw(*this)), "copying to the device");
}

void Stream::copy_to_host(void* host, const void* device, size_t bytes) {
  check(cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, raw(*this)), "copying to the host");
}

void Stream::copy_on_device(void* to, const void* from, size_t bytes) {
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, raw(*this)), "copying on the device");
}

void Stream::fill(void* device, unsigned char value, size_t bytes) {
  check(cudaMemsetAsync(device, value, bytes, raw(*this)), "filling memory");
}

void Stream::record(const Event& event) { check(cudaEventRecord(raw(event), raw(*this)), "recording an event"); }

void Stream::wait_for(const Event& event) {
  check(cudaStreamWaitEvent(raw(*this), raw(event), 0), "waiting for an event");
}

void Stream::run(const Graph& graph) { check(cudaGraphLaunch(raw(graph), raw(*this)), "running a graph"); }

void Stream::wait() { check(cudaStreamSynchronize(raw(*this)), "work on the device"); }

void Stream::begin_recording() {
  check(cudaStreamBeginCapture(raw(*this), cudaStreamCaptureModeThreadLocal), "recording a graph");
}

Graph Stream::end_recording() {
  cudaGraph_t recorded = nullptr;
  check(cudaStreamEndCapture(raw(*this), &recorded), "recording a graph");
  if (!recorded) throw Error(kPyllamaCudaInternal, "recording a graph: CUDA gave none and named no error");
  cudaGraphExec_t ready = nullptr;
  const cudaError_t code = cudaGraphInstantiate(&ready, recorded, 0);
  cudaGraphDestroy(recorded);
  check(code, "making a graph ready");
  Graph graph(ready);
  check(cudaGraphUpload(ready, raw(*this)), "making a graph ready");  // now, and not in its first run
  return graph;
}

void Stream::abandon_recording() noexcept {
  cudaGraph_t recorded = nullptr;
  cudaStreamEndCapture(static_cast<cudaStream_t>(handle_), &recorded);
  if (recorded) cudaGraphDestroy(recorded);
  cudaGetLastError();  // what made the recording fail has been thrown already
}

void Stream::launch_kernel(const char* name, const void* kernel, void (*)(const void*, const void*), const void* args,
                           size_t, const LaunchShape& shape) {
  make_current();  // a kernel's attributes are those on the current device
  const KnownKernel known = know(kernel, device_, shape.shared_bytes, name);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(shape.grid.x, shape.grid.y, shape.grid.z);
  config.blockDim = dim3(shape.block, 1, 1);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = raw(*this);
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  if (shape.start == Start::kEarly && known.may_start_early && early_starts()) {
    config.attrs = &early;
    config.numAttrs = 1;
  }
  void* arguments[] = {const_cast<void*>(args)};
  check_launch(cudaLaunchKernelExC(&config, kernel, arguments), name);
}

}  // namespace pyllama::cuda
