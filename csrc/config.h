// The model's architecture and its weights, as plain structs. Filled by the bindings from config.json and the tensors.
#pragma once

#include <vector>

#include "tensor.h"

namespace pyllama {

struct Config {
  int dim = 0;         // width of the residual stream
  int hidden_dim = 0;  // width of the MLP
  int n_layers = 0;
  int n_heads = 0;
  int n_kv_heads = 0;  // divides n_heads
  int head_dim = 0;    // even; n_heads * head_dim need not equal dim
  int vocab_size = 0;
  int max_seq_len = 0;
  float norm_eps = 1e-5f;
  std::vector<float> rope_inv_freq;    // [head_dim/2], scaling already applied (pyllama/rope.py)
  float rope_attention_factor = 1.0f;  // multiplies cos and sin (YaRN)

  int q_dim() const { return n_heads * head_dim; }
  int kv_dim() const { return n_kv_heads * head_dim; }
};

struct LayerWeights {
  Weight attn_norm;     // f32 [dim]
  Weight wq, wk, wv;    // [q_dim|kv_dim, dim]
  Weight bq, bk, bv;    // f32 [q_dim|kv_dim]; N == 0 when absent
  Weight wo;            // [dim, q_dim]
  Weight mlp_norm;      // f32 [dim]
  Weight w_gate, w_up;  // [hidden_dim, dim]
  Weight w_down;        // [dim, hidden_dim]
};

struct ModelWeights {
  Weight tok_embeddings;  // [vocab_size, dim]
  std::vector<LayerWeights> layers;
  Weight norm;    // f32 [dim]
  Weight output;  // [vocab_size, dim]; equal to tok_embeddings when tied
};

}  // namespace pyllama
