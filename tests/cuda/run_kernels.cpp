// Entry points that run the named kernels of this folder on words from Python, and those that say how kernels run: in
// which order of threads (the emulation), with early starts or without.
#include <cstring>
#include <vector>

#ifdef PYLLAMA_CUDA_EMULATION
#include "cuda/emulation/memory.h"
#include "cuda/emulation/order.h"
#include "cuda/emulation/thread.h"
#endif
#include "entry.h"

using namespace pyllama::cuda;
using namespace pyllama::cuda::tests;

namespace {

#ifdef PYLLAMA_CUDA_EMULATION
const NamedKernel* const kTables[] = {kHelperKernels, kDefectKernels};
#else
const NamedKernel* const kTables[] = {kHelperKernels};
#endif

void (*find(const std::string& name))(Words) {
  for (const NamedKernel* table : kTables) {
    for (; table->name; table++) {
      if (name == table->name) return table->kernel;
    }
  }
  throw Error(kPyllamaCudaBadArgument, "no test kernel is called " + name);
}

}  // namespace

PYLLAMA_TEST_ENTRY const char* pyllama_test_error() { return last_error().c_str(); }

#ifdef PYLLAMA_CUDA_EMULATION
PYLLAMA_TEST_ENTRY int set_order(const char* order) {
  return guarded([&] { emulation::set_order(emulation::parse_order(order)); });
}

// One launch fails after so many good ones; -1: none.
PYLLAMA_TEST_ENTRY int fail_after(int64_t launches) {
  return guarded([&] { emulation::fail_after(static_cast<int>(launches)); });
}

// The device's memory is what is taken and so many bytes more; -1: 8 GiB.
PYLLAMA_TEST_ENTRY int leave_memory(int64_t bytes) {
  return guarded([&] {
    emulation::set_memory_bytes(bytes < 0 ? size_t{8} << 30
                                          : emulation::allocated_bytes() + static_cast<size_t>(bytes));
  });
}
#endif

// Fails where there is no device.
PYLLAMA_TEST_ENTRY int allow_early(int64_t allowed) {
  return guarded([&] {
    device_count();
    allow_early_starts(allowed != 0);
  });
}

// out: what it holds before the launch, and after it. launch_shape: grid x, y, z, threads, bytes of shared memory,
// early start.
PYLLAMA_TEST_ENTRY int run_kernel(const char* name, const unsigned* in, size_t in_words, unsigned* out,
                                  size_t out_words, const unsigned* launch_shape) {
  return guarded([&] {
    Stream stream;
    const Memory from(in_words * 4, "in"), to(out_words * 4, "out");
    stream.copy_to_device(from.data(), in, in_words * 4);
    stream.copy_to_device(to.data(), out, out_words * 4);
    const Words args{from.as<unsigned>(), to.as<unsigned>(), static_cast<unsigned>(out_words)};
    const unsigned* s = launch_shape;
    launch(stream, find(name), args, {s[0], s[1], s[2]}, s[3], s[4], s[5] ? Start::kEarly : Start::kAfterPrevious);
    std::vector<unsigned> result(out_words);
    stream.copy_to_host(result.data(), to.data(), out_words * 4);
    stream.wait();
    memcpy(out, result.data(), out_words * 4);
  });
}
