// Entry points that run the named kernels of this folder on words from Python, and the emulation's own controls.
#include <cstring>
#include <vector>

#include "cuda/emulation/order.h"
#include "entry.h"

using namespace pyllama::cuda;
using namespace pyllama::cuda::tests;

namespace {

void (*find(const std::string& name))(Words) {
  for (const NamedKernel* table : {kHelperKernels, kDefectKernels}) {
    for (; table->name; table++) {
      if (name == table->name) return table->kernel;
    }
  }
  throw Error(kPyllamaCudaBadArgument, "no test kernel is called " + name);
}

}  // namespace

PYLLAMA_TEST_ENTRY const char* pyllama_test_error() { return last_error().c_str(); }

PYLLAMA_TEST_ENTRY int set_order(const char* order) {
  return guarded([&] { emulation::set_order(emulation::parse_order(order)); });
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
