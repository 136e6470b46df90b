// What the C entry points of tests/cuda/*.cpp share: exceptions become a returned 1 and a message that Python reads
// with pyllama_test_error(). Entry points are extern "C", return int, and take pointers to numpy arrays.
#pragma once

#include <cstddef>
#include <exception>
#include <string>

#include "cuda/runtime.h"

#define PYLLAMA_TEST_ENTRY extern "C" __attribute__((visibility("default")))

namespace pyllama::cuda::tests {

inline std::string& last_error() {
  static thread_local std::string text;
  return text;
}

template <class F>
int guarded(const F& body) {
  try {
    body();
    return 0;
  } catch (const std::exception& e) {
    last_error() = e.what();
    return 1;
  }
}

// Kernels whose argument is "words in, words out", as the tests of helpers and of defects want them.
struct Words {
  const unsigned* in;
  unsigned* out;
  unsigned n;  // words of `out`
};

struct NamedKernel {
  const char* name;
  void (*kernel)(Words);
};

// Each ends with a row without a name.
extern const NamedKernel kHelperKernels[];
extern const NamedKernel kDefectKernels[];

}  // namespace pyllama::cuda::tests
