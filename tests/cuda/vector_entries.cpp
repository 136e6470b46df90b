// Norm and SwiGLU of csrc/cuda/vector.h for the tests. shape: n_tok, columns, numbers from row to row of x.
#include <cstdint>

#include "array.h"
#include "cuda/vector.h"
#include "entry.h"

using namespace pyllama::cuda;
using namespace pyllama::cuda::tests;

namespace {

template <class F>
int over_rows(const int32_t* shape, const float* x, float* y, size_t results, const F& run) {
  return guarded([&] {
    Stream stream;
    const size_t n_tok = static_cast<size_t>(shape[0]);
    const Array<float> in(stream, x, n_tok * static_cast<size_t>(shape[2]));
    const Memory out(n_tok * results * sizeof(float), "y");
    run(stream, Rows{in.data(), shape[2], shape[0], shape[1]}, out.as<float>());
    stream.copy_to_host(y, out.data(), out.bytes());
    stream.wait();
  });
}

}  // namespace

PYLLAMA_TEST_ENTRY int rms_norm_rows(const int32_t* shape, const float* x, const float* weight, double eps, float* y) {
  const size_t columns = static_cast<size_t>(shape[1]);
  return over_rows(shape, x, y, columns, [&](Stream& stream, const Rows& rows, float* out) {
    const Array<float> weights(stream, weight, columns);
    rms_norm(stream, rows, weights.data(), static_cast<float>(eps), out);
    stream.wait();
  });
}

PYLLAMA_TEST_ENTRY int swiglu_rows(const int32_t* shape, const float* x, float* y) {
  return over_rows(shape, x, y, static_cast<size_t>(shape[1]) / 2,
                   [&](Stream& stream, const Rows& rows, float* out) { swiglu(stream, rows, out); });
}
