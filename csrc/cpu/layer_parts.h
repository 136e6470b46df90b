// A layer in parts, each on its own, for calibration: from what one product reads to what the next one reads. The parts
// are the verbs' own work, so their numbers have the bits of a model that runs; nothing stays from call to call. A
// layer's road is attention(x) → o, x += wo·o, mlp(x) → h, x += w_down·h. Knows neither models nor statistics.
#pragma once

#include <memory>
#include <vector>

#include "../backend.h"

namespace pyllama {
namespace cpu {

// The CPU's backend with a view of what lies between its verbs, in a step.
class OpenBackend : public Backend {
 public:
  virtual const float* o() const = 0;  // [n_tok][q_dim] after attention()
  virtual const float* h() const = 0;  // [n_tok][hidden_dim] after mlp_in() of a layer without w_down
};
std::unique_ptr<OpenBackend> make_open_backend(const Config&, const ModelWeights&,
                                               const CpuOptions&);  // cpu_backend.cpp

// Rows of several texts, one behind the other, each from position 0.
struct Texts {
  std::vector<int> lengths;
  int64_t n_tok() const;
};

// y = norm(x), both [n][norm.N].
void run_norm(const Weight& norm, float eps, const CpuOptions&, const float* x, int64_t n, float* y);
// o [n_tok][q_dim] of x [n_tok][dim]; `weights` needs attn_norm, wq, wk, wv and what goes with them.
void run_attention(const Config&, int layer, const LayerWeights& weights, const CpuOptions&, const Texts&,
                   const float* x, float* o);
// h [n][hidden_dim] of x [n][dim]; `weights` needs mlp_norm, w_gate, w_up and must be without w_down.
void run_mlp(const Config&, const LayerWeights& weights, const CpuOptions&, const float* x, int64_t n, float* h);
// y [n][w.N] += w·x [n][w.K].
void add_product(const Weight& w, const CpuOptions&, const float* x, int64_t n, float* y);

}  // namespace cpu
}  // namespace pyllama
