// Entry points for tests of weights in fragment order and of products. Weights come as a payload
// in our tiles and a description: see `Described`.
#include <cstring>
#include <vector>

#include "array.h"
#include "cuda/dequant.cuh"
#include "cuda/embedding.h"
#include "cuda/fragments.h"
#include "cuda/linear_few.h"
#include "entry.h"

using namespace pyllama;
using namespace pyllama::cuda;
using namespace pyllama::cuda::tests;

namespace {

constexpr int kDescribed = 42;  // numbers that describe a weight

// Weights on the device, from rows of numbers: format, scale_type, offset_type (as in formats.h), N, K, group, then
// where codes, scales and offsets begin in the payload, whether there is an input_order, and 32 entries of the
// codebook.
struct Described {
  Memory payload;
  std::vector<Weight> weights;
  std::vector<const Weight*> pointers;

  Described(Stream& stream, const int64_t* d, int64_t n, const uint8_t* bytes, int64_t n_bytes)
      : payload(static_cast<size_t>(n_bytes), "payload"), weights(static_cast<size_t>(n)) {
    stream.copy_to_device(payload.data(), bytes, static_cast<size_t>(n_bytes));
    for (Weight& w : weights) {
      w.name = "weight" + std::to_string(pointers.size());
      w.format = static_cast<Format>(d[0]);
      w.scale_type = static_cast<Number>(d[1]);
      w.offset_type = static_cast<Number>(d[2]);
      w.N = static_cast<int>(d[3]);
      w.K = static_cast<int>(d[4]);
      w.group = static_cast<int>(d[5]);
      w.codes = payload.as<uint8_t>() + d[6];
      w.scales = payload.as<uint8_t>() + d[7];
      w.offsets = payload.as<uint8_t>() + d[8];
      if (d[9]) w.input_order = payload.as<int32_t>();  // only looked at for being there
      for (size_t i = 0; i < 32; i++) w.codebook[i] = static_cast<int8_t>(d[10 + i]);
      pointers.push_back(&w);
      d += kDescribed;
    }
  }
};

// Room for the fragments of `from`; upload() makes them.
struct OnDevice {
  const Described& from;
  bool has_map;
  Fragments f;
  FragmentSizes sizes;
  Memory codes, scales, row_scales, row_map;

  OnDevice(Stream& stream, const Described& described, const int32_t* map)
      : from(described),
        has_map(map != nullptr),
        f(fragments_of(from.pointers.data(), static_cast<int>(from.pointers.size()))),
        sizes(fragment_sizes(f)),
        codes(sizes.codes_bytes, "codes"),
        scales(sizes.scales_bytes, "scales"),
        row_scales(sizes.row_scales_bytes, "row scales"),
        row_map(static_cast<size_t>(f.tiles) * 64, "row map") {
    if (map) stream.copy_to_device(row_map.data(), map, row_map.bytes());
    f.codes = codes.as<uint8_t>();
    f.scales = scales.as<uint32_t>();
    f.row_scales = row_scales.as<float>();
  }

  void upload(Stream& stream) const {
    to_fragments(stream, from.pointers.data(), static_cast<int>(from.pointers.size()),
                 has_map ? row_map.as<int32_t>() : nullptr, f);
  }
};

struct WordsOfCodes {
  const uint32_t* in;    // [n][2]: one or two words of codes
  const uint32_t* bias;  // [n][2], q4
  uint32_t* out;         // [n][4]
  uint32_t codebook[4];
  int kind, n;
};

PYLLAMA_KERNEL void dequantize_kernel(const WordsOfCodes args) {
  const int i = static_cast<int>(block_index().x * block_size() + thread_index());
  if (i >= args.n) return;
  uint32_t a[4];
  const uint32_t* in = args.in + 2 * i;
  if (args.kind == static_cast<int>(Codes::q4)) {
    fragment_q4(a, in[0], {as_half2(args.bias[2 * i]), as_half2(args.bias[2 * i + 1])});
  } else if (args.kind == static_cast<int>(Codes::q4nl)) {
    fragment_q4nl(a, in[0], args.codebook);
  } else {
    fragment_q8(a, in[0], in[1]);
  }
  for (int r = 0; r < 4; r++) args.out[4 * i + r] = a[r];
}

}  // namespace

// Codes of each kind to halves, by the helpers of dequant.cuh.
PYLLAMA_TEST_ENTRY int dequantize_words(int64_t kind, int64_t n, const uint32_t* in, const uint32_t* bias,
                                        const uint32_t* codebook, uint32_t* out) {
  return guarded([&] {
    Stream stream;
    const size_t words = static_cast<size_t>(n);
    const Memory from(8 * words, "in"), with(8 * words, "bias"), to(16 * words, "out");
    stream.copy_to_device(from.data(), in, from.bytes());
    stream.copy_to_device(with.data(), bias, with.bytes());
    const WordsOfCodes args{from.as<uint32_t>(),    with.as<uint32_t>(),
                            to.as<uint32_t>(),      {codebook[0], codebook[1], codebook[2], codebook[3]},
                            static_cast<int>(kind), static_cast<int>(n)};
    launch(stream, dequantize_kernel, args, Dim3{static_cast<unsigned>((n + 63) / 64), 1, 1}, 64);
    stream.copy_to_host(out, to.data(), to.bytes());
    stream.wait();
  });
}

// sizes: bytes of codes, scales, row_scales as Python computes them; errors if they are not ours.
PYLLAMA_TEST_ENTRY int make_fragments(const int64_t* described, int64_t n, const uint8_t* payload,
                                      int64_t payload_bytes, const int32_t* row_map, int64_t has_map,
                                      const int64_t* sizes, uint8_t* codes, uint8_t* scales, uint8_t* row_scales) {
  return guarded([&] {
    Stream stream;
    const Described from(stream, described, n, payload, payload_bytes);
    const OnDevice w(stream, from, has_map ? row_map : nullptr);
    w.upload(stream);
    if (sizes[0] != static_cast<int64_t>(w.sizes.codes_bytes) ||
        sizes[1] != static_cast<int64_t>(w.sizes.scales_bytes) ||
        sizes[2] != static_cast<int64_t>(w.sizes.row_scales_bytes)) {
      throw Error(kPyllamaCudaInternal, "the fragments' sizes are not those of the test");
    }
    stream.copy_to_host(codes, w.codes.data(), w.sizes.codes_bytes);
    if (w.sizes.scales_bytes) stream.copy_to_host(scales, w.scales.data(), w.sizes.scales_bytes);
    stream.copy_to_host(row_scales, w.row_scales.data(), w.sizes.row_scales_bytes);
    stream.wait();
  });
}

// x: [n_tok][columns]: rows of a matrix.
PYLLAMA_TEST_ENTRY int embed_tokens(const int64_t* described, const uint8_t* payload, int64_t payload_bytes,
                                    const int32_t* tokens, int64_t n_tok, const int32_t* input_order, int64_t has_order,
                                    float* x) {
  return guarded([&] {
    Stream stream;
    const Described from(stream, described, 1, payload, payload_bytes);
    const OnDevice w(stream, from, nullptr);
    w.upload(stream);
    const size_t rows = static_cast<size_t>(n_tok), columns = static_cast<size_t>(w.f.columns);
    const Array<int32_t> ids(stream, tokens, rows), order(stream, input_order, has_order ? columns : 0);
    const Memory out(4 * rows * columns, "x");
    embed(stream, w.f, ids.data(), static_cast<int>(n_tok), has_order ? order.data() : nullptr, out.as<float>());
    stream.copy_to_host(x, out.data(), out.bytes());
    stream.wait();
  });
}

// y [n_tokens][y_stride], both ways, of x [n_tokens][x_stride]. extras: bit 0: bias, bit 1: y itself is the residual,
// bit 2: input_order, bit 3: SwiGLU into hidden_dim = rows / 2 numbers, bit 4: the weights' upload is the last thing
// before the product, bit 5: straight to linear_few.
PYLLAMA_TEST_ENTRY int multiply(const int64_t* described, int64_t n, const uint8_t* payload, int64_t payload_bytes,
                                const int32_t* row_map, int64_t has_map, const float* x, int64_t n_tokens,
                                int64_t x_stride, const int32_t* input_order, const float* bias, int64_t extras,
                                int64_t multiprocessors, float* y, int64_t y_stride) {
  return guarded([&] {
    Stream stream;
    const Described from(stream, described, n, payload, payload_bytes);
    const OnDevice w(stream, from, has_map ? row_map : nullptr);
    if (!(extras & 16)) w.upload(stream);
    const size_t tokens = static_cast<size_t>(n_tokens);
    const Memory x_in(4 * tokens * static_cast<size_t>(x_stride), "x"),
        y_out(4 * tokens * static_cast<size_t>(y_stride), "y");
    const Memory order(4 * static_cast<size_t>(w.f.columns), "input order"),
        biases(4 * static_cast<size_t>(w.f.rows), "bias");
    stream.copy_to_device(x_in.data(), x, x_in.bytes());
    stream.copy_to_device(y_out.data(), y, y_out.bytes());
    if (extras & 1) stream.copy_to_device(biases.data(), bias, biases.bytes());
    if (extras & 4) stream.copy_to_device(order.data(), input_order, order.bytes());
    const int count = static_cast<int>(n_tokens), processors = static_cast<int>(multiprocessors);
    const ActivationSizes sizes = activation_sizes(w.f.columns, count);
    const Memory values(sizes.values_bytes, "values"), sums(sizes.sums_bytes, "sums"),
        scales(sizes.scales_bytes, "scales");
    const Activations activations{values.as<uint8_t>(), sums.as<uint32_t>(), scales.as<float>()};
    prepare_activations(
        stream, {x_in.as<float>(), x_stride, count, w.f.columns, nullptr, extras & 4 ? order.as<int32_t>() : nullptr},
        activations);
    float* const out = y_out.as<float>();
    const StoreRows rows{out, y_stride, extras & 1 ? biases.as<float>() : nullptr, extras & 2 ? out : nullptr};
    if (extras & 16) w.upload(stream);
    if (extras & 8) {
      linear(stream, w.f, activations, count, StoreSwiglu{out, y_stride, w.f.rows / 2}, processors);
    } else if (extras & 32) {
      linear_few(stream, w.f, activations, count, rows, processors);
    } else {
      linear(stream, w.f, activations, count, rows, processors);
    }
    std::vector<float> result(y_out.bytes() / 4);  // not y: it is still to be copied to the device
    stream.copy_to_host(result.data(), out, y_out.bytes());
    stream.wait();
    memcpy(y, result.data(), y_out.bytes());
  });
}
