// SwiGLU of csrc/cuda/vector.h for the tests. shape: n_tok, columns, numbers from row to row of x.
#include <cstdint>

#include "array.h"
#include "cuda/vector.h"
#include "entry.h"

using namespace pyllama::cuda;
using namespace pyllama::cuda::tests;

PYLLAMA_TEST_ENTRY int swiglu_rows(const int32_t* shape, const float* x, float* y) {
  return guarded([&] {
    Stream stream;
    const size_t n_tok = static_cast<size_t>(shape[0]);
    const Array<float> in(stream, x, n_tok * static_cast<size_t>(shape[2]));
    const Memory out(n_tok * static_cast<size_t>(shape[1]) / 2 * sizeof(float), "y");
    swiglu(stream, {in.data(), shape[2], shape[0], shape[1]}, out.as<float>());
    stream.copy_to_host(y, out.data(), out.bytes());
    stream.wait();
  });
}
