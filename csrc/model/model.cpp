// The checks between a model folder and the forward pass. Messages name the tensor, what was found, what was expected.
#include "model/model.h"

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <set>
#include <utility>

#include "error.h"
#include "vocab.h"

namespace pyllama {
namespace {

std::string shape_text(int N, int K) { return K == 0 ? message("[", N, "]") : message("[", N, ", ", K, "]"); }

// Hands tensors out by name, remembers which ones were asked for, and refuses what does not fit.
class Tensors {
 public:
  explicit Tensors(const std::map<std::string, Weight>& tensors) : tensors_(tensors) {}

  Weight matrix(const std::string& name, int N, int K) { return fit(name, N, K); }
  Weight vector(const std::string& name, int N) { return fit(name, N, 0); }
  bool has(const std::string& name) const { return tensors_.count(name) != 0; }
  Weight optional_vector(const std::string& name, int N) { return has(name) ? fit(name, N, 0) : Weight{}; }

  void check_all_used(bool tied_embeddings) const {
    for (const auto& [name, weight] : tensors_) {
      check(used_.count(name) != 0 || name != "output" || !tied_embeddings,
            "output: unexpected tensor, since tied_embeddings is true in config.json");
      check(used_.count(name) != 0, name, ": unexpected tensor of shape ", shape_text(weight.N, weight.K),
            "; it is no part of the architecture in config.json (check n_layers)");
    }
  }

 private:
  const Weight& fit(const std::string& name, int N, int K) {
    const auto found = tensors_.find(name);
    check(found != tensors_.end(), name, ": missing, expected shape ", shape_text(N, K));
    const Weight& w = found->second;
    check(w.N == N && w.K == K, name, ": shape ", shape_text(w.N, w.K), ", expected ", shape_text(N, K));
    used_.insert(name);
    return w;
  }

  const std::map<std::string, Weight>& tensors_;
  std::set<std::string> used_;
};

LayerWeights take_layer(Tensors& tensors, const Config& c, int layer) {
  const std::string prefix = message("layers.", layer, ".");
  LayerWeights w;
  w.attn_norm = tensors.vector(prefix + "attn_norm", c.dim);
  w.wq = tensors.matrix(prefix + "wq", c.q_dim(), c.dim);
  w.wk = tensors.matrix(prefix + "wk", c.kv_dim(), c.dim);
  w.wv = tensors.matrix(prefix + "wv", c.kv_dim(), c.dim);
  w.bq = tensors.optional_vector(prefix + "bq", c.q_dim());
  w.bk = tensors.optional_vector(prefix + "bk", c.kv_dim());
  w.bv = tensors.optional_vector(prefix + "bv", c.kv_dim());
  if (tensors.has("layers.0.q_norm")) w.q_norm = tensors.vector(prefix + "q_norm", c.head_dim);
  if (tensors.has("layers.0.k_norm")) w.k_norm = tensors.vector(prefix + "k_norm", c.head_dim);
  w.wo = tensors.matrix(prefix + "wo", c.dim, c.q_dim());
  w.mlp_norm = tensors.vector(prefix + "mlp_norm", c.dim);
  w.w_gate = tensors.matrix(prefix + "w_gate", c.hidden_dim, c.dim);
  w.w_up = tensors.matrix(prefix + "w_up", c.hidden_dim, c.dim);
  w.w_down = tensors.matrix(prefix + "w_down", c.dim, c.hidden_dim);
  return w;
}

void check_count(const char* name, int value) {
  // 2^26 is far beyond any model; with it, products of two of these numbers fit 64 bits with room.
  check(value >= 1 && value <= (1 << 26), "config: ", name, " is ", value, ", expected 1…", 1 << 26);
}

}  // namespace

void check_config(const Config& c) {
  const std::initializer_list<std::pair<const char*, int>> counts = {{"dim", c.dim},
                                                                     {"hidden_dim", c.hidden_dim},
                                                                     {"n_layers", c.n_layers},
                                                                     {"n_heads", c.n_heads},
                                                                     {"n_kv_heads", c.n_kv_heads},
                                                                     {"head_dim", c.head_dim},
                                                                     {"vocab_size", c.vocab_size},
                                                                     {"max_seq_len", c.max_seq_len}};
  for (const auto& [name, value] : counts) check_count(name, value);
  check(c.n_heads % c.n_kv_heads == 0, "config: n_heads is ", c.n_heads, ", expected a multiple of n_kv_heads, ",
        c.n_kv_heads);
  check(c.vocab_size <= kMaxVocab, "config: vocab_size is ", c.vocab_size, ", expected at most ", kMaxVocab);
  check(c.head_dim % 2 == 0, "config: head_dim is ", c.head_dim, ", expected an even number");
  check(int64_t{c.n_heads} * c.head_dim <= (1 << 26), "config: n_heads * head_dim is ", int64_t{c.n_heads} * c.head_dim,
        ", expected at most ", 1 << 26);
  check(std::isfinite(c.norm_eps) && c.norm_eps >= 0, "config: norm_eps is ", c.norm_eps,
        ", expected a finite number, 0 or more");
  check(c.rope_inv_freq.size() * 2 == static_cast<size_t>(c.head_dim), "config: rope_inv_freq has ",
        c.rope_inv_freq.size(), " entries, expected head_dim / 2 = ", c.head_dim / 2);
  for (const float f : c.rope_inv_freq) {
    check(std::isfinite(f), "config: rope_inv_freq holds ", f, ", expected finite numbers");
  }
  check(std::isfinite(c.rope_attention_factor), "config: rope_attention_factor is ", c.rope_attention_factor,
        ", expected a finite number");
  for (const auto& [name, scale] :
       {std::pair{"embedding_scale", c.embedding_scale}, std::pair{"attention_scale", c.attention_scale}}) {
    check(std::isfinite(scale) && scale > 0, "config: ", name, " is ", scale, ", expected a positive number");
  }
}

ModelWeights assemble_weights(const Config& config, const std::map<std::string, Weight>& tensors,
                              bool tied_embeddings) {
  check_config(config);
  Tensors source(tensors);
  ModelWeights weights;
  weights.tok_embeddings = source.matrix("tok_embeddings", config.vocab_size, config.dim);
  for (int layer = 0; layer < config.n_layers; ++layer) weights.layers.push_back(take_layer(source, config, layer));
  weights.norm = source.vector("norm", config.dim);
  weights.output = tied_embeddings ? weights.tok_embeddings : source.matrix("output", config.vocab_size, config.dim);
  source.check_all_used(tied_embeddings);
  return weights;
}

Model::Model(Config config, const std::map<std::string, Weight>& tensors, bool tied_embeddings,
             const BackendFactory& make) {
  ModelWeights weights = assemble_weights(config, tensors, tied_embeddings);
  parts_ = std::make_shared<Parts>(std::move(config), std::move(weights), make);
}

std::unique_ptr<Sequence> Model::new_sequence() const {
  return std::make_unique<Sequence>(std::shared_ptr<PagePool>(parts_, &parts_->pool));
}

}  // namespace pyllama
