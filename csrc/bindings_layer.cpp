// pyllama._C.convert, the parts of a layer on their own (cpu/layer_parts.h), for the statistics that calibration
// gathers. Checks shapes; numpy arrays go in and come out, without the GIL meanwhile.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "bindings.h"
#include "cpu/cpu.h"
#include "cpu/layer_parts.h"
#include "error.h"

namespace py = pybind11;

namespace pyllama {
namespace {

using Floats = py::array_t<float, py::array::c_style>;

// The weights of one part by their roles: each is there, or may be missing, and has its shape.
class Roles {
 public:
  explicit Roles(const py::dict& weights) : tensors_(read_weights(weights)) {}

  Weight take(const char* role, int N, int K) {
    const auto found = tensors_.find(role);
    check(found != tensors_.end(), role, ": missing");
    const Weight w = found->second;
    check(w.N == N && w.K == K, role, ": shape [", w.N, ", ", w.K, "], expected [", N, ", ", K, "]");
    tensors_.erase(found);
    return w;
  }
  Weight take_if(const char* role, int N) { return tensors_.count(role) ? take(role, N, 0) : Weight{}; }
  void check_empty() const {
    check(tensors_.empty(), tensors_.empty() ? "" : tensors_.begin()->first, ": not of this part of a layer");
  }

 private:
  std::map<std::string, Weight> tensors_;
};

int64_t rows_of(const Floats& x, const char* name, int columns) {
  check<std::invalid_argument>(x.ndim() == 2 && x.shape(1) == columns, name, " must be float32 [n, ", columns, "]");
  return x.shape(0);
}

Floats rows(int64_t n, int columns) { return Floats({static_cast<py::ssize_t>(n), static_cast<py::ssize_t>(columns)}); }

CpuOptions options_of(const std::string& isa, int threads) {
  check<std::invalid_argument>(threads >= 0 && threads <= 1024, "threads is ", threads, ", expected 0…1024");
  CpuOptions options;
  options.isa = isa.c_str();
  options.threads = threads;
  return options;
}

Floats norm(const PyWeight& weight, float eps, const Floats& x, const std::string& isa, int threads) {
  const Weight& w = weight.weight;
  check<std::invalid_argument>(w.K == 0, w.name, " is no vector");
  const int64_t n = rows_of(x, "x", w.N);
  Floats y = rows(n, w.N);
  const float* in = x.data();
  float* out = y.mutable_data();
  const CpuOptions options = options_of(isa, threads);
  const py::gil_scoped_release release;
  cpu::run_norm(w, eps, options, in, n, out);
  return y;
}

Floats attention(const py::dict& config, int layer, const py::dict& weights, const Floats& x,
                 const std::vector<int>& lengths, const std::string& isa, int threads) {
  const Config c = read_config(config);
  check<std::invalid_argument>(layer >= 0 && layer < c.n_layers, "layer ", layer, " of ", c.n_layers);
  Roles roles(weights);
  LayerWeights w;
  w.attn_norm = roles.take("attn_norm", c.dim, 0);
  w.wq = roles.take("wq", c.q_dim(), c.dim);
  w.wk = roles.take("wk", c.kv_dim(), c.dim);
  w.wv = roles.take("wv", c.kv_dim(), c.dim);
  w.bq = roles.take_if("bq", c.q_dim());
  w.bk = roles.take_if("bk", c.kv_dim());
  w.bv = roles.take_if("bv", c.kv_dim());
  w.q_norm = roles.take_if("q_norm", c.head_dim);
  w.k_norm = roles.take_if("k_norm", c.head_dim);
  roles.check_empty();
  const cpu::Texts texts{lengths};
  for (const int length : lengths) {
    check<std::invalid_argument>(length >= 1 && length <= c.max_seq_len, "a text of ", length, " tokens, expected 1…",
                                 c.max_seq_len);
  }
  check<std::invalid_argument>(texts.n_tok() == rows_of(x, "x", c.dim), "texts of ", texts.n_tok(), " tokens, x has ",
                               x.shape(0), " rows");
  Floats o = rows(x.shape(0), c.q_dim());
  const float* in = x.data();
  float* out = o.mutable_data();
  const CpuOptions options = options_of(isa, threads);
  const py::gil_scoped_release release;
  cpu::run_attention(c, layer, w, options, texts, in, out);
  return o;
}

Floats mlp(const py::dict& config, const py::dict& weights, const Floats& x, const std::string& isa, int threads) {
  const Config c = read_config(config);
  Roles roles(weights);
  LayerWeights w;
  w.mlp_norm = roles.take("mlp_norm", c.dim, 0);
  w.w_gate = roles.take("w_gate", c.hidden_dim, c.dim);
  w.w_up = roles.take("w_up", c.hidden_dim, c.dim);
  roles.check_empty();
  const int64_t n = rows_of(x, "x", c.dim);
  Floats h = rows(n, c.hidden_dim);
  const float* in = x.data();
  float* out = h.mutable_data();
  const CpuOptions options = options_of(isa, threads);
  const py::gil_scoped_release release;
  cpu::run_mlp(c, w, options, in, n, out);
  return h;
}

void add_product(const PyWeight& weight, const Floats& x, Floats& y, const std::string& isa, int threads) {
  const Weight& w = weight.weight;
  check<std::invalid_argument>(w.K > 0, w.name, " is no matrix");
  const int64_t n = rows_of(x, "x", w.K);
  check<std::invalid_argument>(rows_of(y, "y", w.N) == n, "x has ", n, " rows, y ", y.shape(0));
  const float* in = x.data();
  float* out = y.mutable_data();
  const CpuOptions options = options_of(isa, threads);
  const py::gil_scoped_release release;
  cpu::add_product(w, options, in, n, out);
}

}  // namespace

void bind_layer(py::module_ m) {
  m.def("norm", &norm, py::arg("weight"), py::arg("eps"), py::arg("x").noconvert(), py::arg("isa") = "",
        py::arg("threads") = 0, "x [n, dim] normed, which is what the products behind a norm read.");
  m.def("attention", &attention, py::arg("config"), py::arg("layer"), py::arg("weights"), py::arg("x").noconvert(),
        py::arg("lengths"), py::arg("isa") = "", py::arg("threads") = 0,
        "x [n, dim], texts of these lengths from position 0 -> [n, q_dim], which is what wo reads.");
  m.def("mlp", &mlp, py::arg("config"), py::arg("weights"), py::arg("x").noconvert(), py::arg("isa") = "",
        py::arg("threads") = 0, "x [n, dim] -> [n, hidden_dim], which is what w_down reads.");
  m.def("add_product", &add_product, py::arg("weight"), py::arg("x").noconvert(), py::arg("y").noconvert(),
        py::arg("isa") = "", py::arg("threads") = 0, "y [n, N] += weight·x [n, K], in place.");
}

}  // namespace pyllama
