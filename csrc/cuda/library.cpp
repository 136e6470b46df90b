// The table of api.h, filled: every function of the library is called through here. Exceptions stop here and become a
// kind and a text for this thread. Computes nothing itself.
#include <algorithm>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

#include "api.h"
#include "read_bandwidth.h"
#include "runtime.h"

namespace {

using namespace pyllama::cuda;

#ifdef PYLLAMA_CUDA_EMULATION
constexpr const char* kArchitectures = "the CPU";
#else
constexpr const char* kArchitectures = PYLLAMA_CUDA_ARCHITECTURES;  // CMakeLists.txt, as given to nvcc
#endif

thread_local std::string last_error;

int fail(int kind, const char* text) noexcept {
  try {
    last_error = text;
  } catch (...) {
    last_error.clear();  // no memory for the words; the kind still tells
  }
  return kind;
}

template <class F>
int guarded(const F& work) noexcept {
  try {
    work();
    return kPyllamaCudaOk;
  } catch (const Error& error) {
    return fail(error.kind, error.what());
  } catch (const std::invalid_argument& error) {
    return fail(kPyllamaCudaBadArgument, error.what());
  } catch (const std::bad_alloc&) {
    return fail(kPyllamaCudaInternal, "out of memory on the host");
  } catch (const std::exception& error) {
    return fail(kPyllamaCudaInternal, error.what());
  } catch (...) {
    return fail(kPyllamaCudaInternal, "an exception that is none of the library's");
  }
}

int build(PyllamaCudaBuild* out) {
  return guarded([&] { *out = {runtime_version(), emulated() ? 1 : 0, kArchitectures}; });
}

int driver(int32_t* version) {
  return guarded([&] { *version = driver_version(); });
}

int count_devices(int32_t* count) {
  return guarded([&] { *count = device_count(); });
}

int describe(int32_t index, PyllamaCudaDevice* out) {
  return guarded([&] {
    const DeviceProperties found = properties(index);
    *out = {};
    memcpy(out->name, found.name.data(), std::min(found.name.size(), sizeof(out->name) - 1));
    out->major = found.major;
    out->minor = found.minor;
    out->multiprocessors = found.multiprocessors;
    out->l2_bytes = static_cast<int32_t>(found.l2_bytes);
    out->shared_bytes = static_cast<int32_t>(found.shared_bytes);
    out->memory_bytes = static_cast<int64_t>(found.memory_bytes);
    out->free_bytes = static_cast<int64_t>(free_bytes(index));
  });
}

int measure_reading(int32_t index, int64_t bytes, int32_t repeats, double* seconds) {
  return guarded([&] { *seconds = read_bandwidth(index, bytes, repeats); });
}

const char* last_text() { return last_error.c_str(); }

const PyllamaCudaTable table = {
    kPyllamaCudaVersion, sizeof(PyllamaCudaTable), last_text, build, driver, count_devices, describe, measure_reading,
};

}  // namespace

extern "C" __attribute__((visibility("default"))) const PyllamaCudaTable* pyllama_cuda_table(void) { return &table; }
