// pyllama._C.ops: single CPU kernels on numpy arrays, for tests and benchmarks. Every function takes `isa` ("" = the
// best).
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>

#include "bindings.h"
#include "cpu/activations.h"
#include "cpu/attention.h"
#include "cpu/cpu.h"
#include "cpu/embedding.h"
#include "cpu/os.h"
#include "error.h"

namespace py = pybind11;

namespace pyllama {

namespace {

using cpu::kernels_for;
using Floats = py::array_t<float, py::array::c_style | py::array::forcecast>;
using Bytes = py::array_t<int8_t, py::array::c_style | py::array::forcecast>;

// Kernels count on IEEE defaults; a library may have set flush-to-zero in this thread.
struct FloatEnvironment {
  unsigned previous = set_float_environment();
  ~FloatEnvironment() { restore_float_environment(previous); }
};

void need(bool ok, const char* what) { check<std::invalid_argument>(ok, what); }

Floats matmul(const PyWeight& pw, const Floats& x, const std::string& isa, int threads) {
  const Weight& w = pw.weight;
  need(x.ndim() == 2 && x.shape(1) == w.K && w.K > 0, "x must be [M, K] with K that of the weight");
  const int M = static_cast<int>(x.shape(0));
  Floats y({static_cast<py::ssize_t>(M), static_cast<py::ssize_t>(w.N)});
  if (M == 0) return y;
  const float* data = x.data();
  const cpu::Product product{&w, y.mutable_data(), w.N, nullptr, false};
  py::gil_scoped_release release;
  FloatEnvironment environment;
  ThreadPool pool(std::max(1, threads));
  cpu::Activations in(w.K, kernels_for(isa), pool);
  cpu::Arena arena;
  in.claim(arena, M);
  arena.allocate();
  in.set(data, w.K, M, w.K, nullptr, 0, &product, 1);
  in.multiply(&product, 1);
  return y;
}

py::tuple quantize_activations(const Floats& x, const std::string& isa) {
  need(x.ndim() == 2 && x.shape(1) > 0, "x must be [M, K]");
  const py::ssize_t M = x.shape(0), K = x.shape(1), Kp = round_up(K, kColumnPad);
  Bytes q({M, Kp});
  Floats scale({M, Kp / 32});
  py::array_t<int32_t> sum({M, Kp / 32});
  FloatEnvironment environment;
  std::vector<cpu::XBlock> blocks(static_cast<size_t>(Kp / 32));
  for (py::ssize_t m = 0; m < M; m++) {
    kernels_for(isa).quantize_row(x.data(m, 0), static_cast<int>(K), blocks.data());
    for (py::ssize_t b = 0; b < Kp / 32; b++) {
      const cpu::XBlock& block = blocks[static_cast<size_t>(b)];
      std::copy_n(block.q, 32, q.mutable_data(m, 32 * b));
      *scale.mutable_data(m, b) = block.scale;
      *sum.mutable_data(m, b) = (cpu::kDotOrigin - block.start[1]) / 128;
    }
  }
  return py::make_tuple(q, scale, sum);
}

Floats rmsnorm(const Floats& x, const Floats& w, float eps, const std::string& isa) {
  need(x.ndim() == 1 && w.ndim() == 1 && x.shape(0) == w.shape(0) && x.shape(0) > 0, "x and w must be [dim]");
  Floats y(x.shape(0));
  FloatEnvironment environment;
  kernels_for(isa).rmsnorm(x.data(), w.data(), static_cast<int>(x.shape(0)), eps, y.mutable_data());
  return y;
}

Floats rope(const Floats& head, const Floats& cos, const Floats& sin, const std::string& isa) {
  need(head.ndim() == 1 && head.shape(0) % 2 == 0, "head must be [head_dim], even");
  need(cos.size() * 2 == head.shape(0) && sin.size() == cos.size(), "cos and sin must be [head_dim/2]");
  Floats y(head.shape(0));
  std::copy_n(head.data(), head.shape(0), y.mutable_data());
  FloatEnvironment environment;
  kernels_for(isa).rope(y.mutable_data(), cos.data(), sin.data(), static_cast<int>(head.shape(0)));
  return y;
}

Floats swiglu(const Floats& gate, const Floats& up, const std::string& isa) {
  need(gate.ndim() == 1 && up.ndim() == 1 && gate.shape(0) == up.shape(0), "gate and up must be [n]");
  Floats h(gate.shape(0));
  FloatEnvironment environment;
  kernels_for(isa).swiglu(gate.data(), up.data(), static_cast<int>(gate.shape(0)), h.mutable_data());
  return h;
}

Floats exp(const Floats& x, const std::string& isa) {
  need(x.ndim() == 1, "x must be [n]");
  Floats y(x.shape(0));
  FloatEnvironment environment;
  kernels_for(isa).exp(x.data(), static_cast<int>(x.shape(0)), y.mutable_data());
  return y;
}

py::tuple largest_logits(const Floats& x, const std::string& isa) {
  need(x.ndim() == 1 && x.size() > 0, "logits must be [n], n > 0");
  const int n = static_cast<int>(x.size());
  Floats maxima(static_cast<py::ssize_t>(vocab_blocks(n)));
  const LargestLogit found = kernels_for(isa).vocab.largest(x.data(), n, maxima.mutable_data());
  return py::make_tuple(found.value, found.finite, maxima);
}

py::tuple weigh(const Floats& x, double scale, double lowest, const std::string& isa) {
  need(x.ndim() == 1 && x.size() > 0, "logits must be [n], n > 0");
  const int n = static_cast<int>(x.size());
  const auto blocks = static_cast<py::ssize_t>(vocab_blocks(n));
  std::vector<float> maxima(vocab_blocks(n));
  py::array_t<uint64_t> weights(blocks * kVocabBlock), sums(blocks);
  std::fill_n(weights.mutable_data(), weights.size(), 0);
  const VocabKernels& kernels = kernels_for(isa).vocab;
  const float max = kernels.largest(x.data(), n, maxima.data()).value;
  kernels.weigh(x.data(), n, maxima.data(), lowest, max, scale, weights.mutable_data(), sums.mutable_data());
  return py::make_tuple(weights, sums);
}

Floats dequantize_row(const PyWeight& pw, int row) {
  need(pw.weight.K > 0 && row >= 0 && row < pw.weight.N, "row out of range, or not a matrix");
  Floats y(pw.weight.K);
  FloatEnvironment environment;
  cpu::dequantize_row(pw.weight, row, y.mutable_data());
  return y;
}

// Causal attention of n_tok queries that stand at positions pos … pos + n_tok - 1 over pos + n_tok keys, each over
// those keys of its window, if that is not 0.
Floats attention(const Floats& q, const Floats& k, const Floats& v, int pos, const std::string& isa, int threads,
                 const std::string& kv_dtype, int window) {
  need(window >= 0, "window must be 0 (none) or more");
  need(q.ndim() == 3 && k.ndim() == 3 && v.ndim() == 3,
       "q [n_tok, n_heads, head_dim], k and v [keys, n_kv_heads, head_dim]");
  Config c;
  c.n_heads = static_cast<int>(q.shape(1));
  c.n_kv_heads = static_cast<int>(k.shape(1));
  c.head_dim = static_cast<int>(q.shape(2));
  c.n_layers = 1;
  c.attention_scale = default_attention_scale(c.head_dim);
  if (window > 0) c.windows = {std::min(window, kAllKeys)};
  const int n_tok = static_cast<int>(q.shape(0)), keys = static_cast<int>(k.shape(0));
  need(k.shape(2) == c.head_dim && v.shape(0) == keys && v.shape(1) == c.n_kv_heads && v.shape(2) == c.head_dim,
       "k and v must agree with q");
  need(c.n_kv_heads > 0 && c.n_heads % c.n_kv_heads == 0, "n_heads must be a multiple of n_kv_heads");
  need(pos >= 0 && n_tok > 0 && keys == pos + n_tok, "there must be pos + n_tok keys");
  Floats o({q.shape(0), q.shape(1), q.shape(2)});
  const float *q_data = q.data(), *k_data = k.data(), *v_data = v.data();
  float* o_data = o.mutable_data();
  py::gil_scoped_release release;
  FloatEnvironment environment;
  const cpu::Kernels& kernels = kernels_for(isa);
  ThreadPool pool(std::max(1, threads));
  cpu::Attention attention(c, cpu::kv_type(kv_dtype), kernels, pool);
  const cpu::PageLayout& layout = attention.layout();
  std::vector<std::vector<uint8_t>> storage(static_cast<size_t>((keys + kPageTok - 1) / kPageTok));
  std::vector<uint8_t*> pages;
  std::vector<int> ids;
  for (auto& page : storage) {
    page.resize(static_cast<size_t>(layout.page_bytes));
    ids.push_back(static_cast<int>(pages.size()));
    pages.push_back(page.data());
  }
  for (int t = 0; t < keys; t++) {
    for (int h = 0; h < c.n_kv_heads; h++) {
      const int64_t at = (static_cast<int64_t>(t) * c.n_kv_heads + h) * c.head_dim;
      uint8_t* block = pages[static_cast<size_t>(t / kPageTok)] + layout.head_offset(0, h);
      kernels.append_kv(k_data + at, v_data + at, layout.head, block, t % kPageTok);
    }
  }
  const Span span{0, n_tok, pos, ids.data()};
  Step step;
  step.n_tok = n_tok;
  step.n_spans = 1;
  step.spans = &span;
  attention.plan(step);
  attention.run(0, pages.data(), {q_data, nullptr, nullptr, nullptr}, o_data, nullptr);
  return o;
}

}  // namespace

void bind_ops(py::module_& module) {
  py::module_ ops = module.def_submodule("ops", "Single CPU kernels, for tests and benchmarks.");
  const auto isa = py::arg("isa") = "";
  ops.def("matmul", &matmul, py::arg("weight"), py::arg("x"), isa, py::arg("threads") = 1,
          "x float32 [M, K] · Wᵀ → float32 [M, N]; activations go to int8 where the weight is quantized.");
  ops.def("quantize_activations", &quantize_activations, py::arg("x"), isa,
          "x float32 [M, K] → (int8 [M, Kp], scale float32 [M, Kp/32], sum int32 [M, Kp/32]).");
  ops.def("rmsnorm", &rmsnorm, py::arg("x"), py::arg("w"), py::arg("eps"), isa, "x, w float32 [dim].");
  ops.def("rope", &rope, py::arg("head"), py::arg("cos"), py::arg("sin"), isa, "head float32 [head_dim].");
  ops.def("swiglu", &swiglu, py::arg("gate"), py::arg("up"), isa, "silu(gate) * up, float32 [n].");
  ops.def("exp", &exp, py::arg("x"), isa, "float32 [n].");
  ops.def("largest_logits", &largest_logits, py::arg("logits"), isa,
          "The largest of float32 [n], whether all are finite, and the largest of each 64.");
  ops.def(
      "weigh", &weigh, py::arg("logits"), py::arg("scale"), py::arg("lowest"), isa,
      "What tokens are drawn by, 2^(44 + (logits - max) * scale), rounded: uint64 [n, made a multiple of 64], and sums "
      "of each 64; 0 where these are all below `lowest`.");
  ops.def("dequantize_row", &dequantize_row, py::arg("weight"), py::arg("row"), "One row as float32 [K].");
  ops.def("attention", &attention, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("pos"), isa,
          py::arg("threads") = 1, py::arg("kv_dtype") = "f16", py::arg("window") = 0,
          "Causal attention; q [n_tok, n_heads, head_dim], k and v [pos + n_tok, n_kv_heads, head_dim].");
}

}  // namespace pyllama
