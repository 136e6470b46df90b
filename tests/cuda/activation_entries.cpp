// Activations of csrc/cuda/activations.h for the tests.
#include <cstdint>

#include "array.h"
#include "cuda/activations.h"
#include "entry.h"

using namespace pyllama::cuda;
using namespace pyllama::cuda::tests;

// shape: tokens, columns, rows of x, numbers from row to row of x; then whether there are `rows`, an input_order, and a
// weight to norm with. Results as they lie in memory, of `panels` panels.
PYLLAMA_TEST_ENTRY int make_activations(const int32_t* shape, const float* x, const int32_t* rows,
                                        const int32_t* input_order, const float* weight, double eps, int64_t panels,
                                        uint16_t* values, uint16_t* sums, float* scales) {
  return guarded([&] {
    Stream stream;
    const size_t tokens = static_cast<size_t>(shape[0]), columns = static_cast<size_t>(shape[1]);
    const Array<float> in(stream, x, static_cast<size_t>(shape[2]) * static_cast<size_t>(shape[3]));
    const Array<int32_t> its_rows(stream, rows, shape[4] ? tokens : 0),
        order(stream, input_order, shape[5] ? columns : 0);
    const Array<float> weights(stream, weight, shape[6] ? columns : 0);
    const ActivationSizes sizes = activation_sizes(shape[1], shape[0]);
    if (sizes.scales_bytes != static_cast<size_t>(panels) * 32) {
      throw Error(kPyllamaCudaInternal, "the number of panels is not that of the test");
    }
    const Memory v(sizes.values_bytes, "values"), s(sizes.sums_bytes, "sums"), powers(sizes.scales_bytes, "scales");
    const Activations out{v.as<uint8_t>(), s.as<uint32_t>(), powers.as<float>()};
    const TokenRows from{in.data(),
                         shape[3],
                         shape[0],
                         shape[1],
                         shape[4] ? its_rows.data() : nullptr,
                         shape[5] ? order.data() : nullptr};
    if (shape[6]) {
      norm_activations(stream, from, weights.data(), static_cast<float>(eps), out);
    } else {
      prepare_activations(stream, from, out);
    }
    stream.copy_to_host(values, v.data(), v.bytes());
    stream.copy_to_host(sums, s.data(), s.bytes());
    stream.copy_to_host(scales, powers.data(), powers.bytes());
    stream.wait();
  });
}
