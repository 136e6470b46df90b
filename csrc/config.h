// The model's architecture and its weights, as plain structs. Filled by the bindings from config.json and the tensors.
#pragma once

#include <cmath>
#include <cstddef>
#include <vector>

#include "tensor.h"

namespace pyllama {

// A window that no context fills: a token sees all before it.
constexpr int kAllKeys = 1 << 30;

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
  std::vector<float> rope_inv_freq;    // [head_dim/2], scaling already applied (pyllama/common/rope.py)
  float rope_attention_factor = 1.0f;  // multiplies cos and sin (YaRN)
  float embedding_scale = 1.0f;        // multiplies the embedding
  float attention_scale = 0.0f;        // multiplies q·k; above 0, 1/√head_dim where config.json says nothing
  std::vector<int> windows;            // [n_layers] keys that a token sees, its own the last; empty: kAllKeys of each

  int q_dim() const { return n_heads * head_dim; }
  int kv_dim() const { return n_kv_heads * head_dim; }
  int window(int layer) const { return windows.empty() ? kAllKeys : windows[static_cast<size_t>(layer)]; }
};

inline float default_attention_scale(int head_dim) { return 1.0f / std::sqrt(static_cast<float>(head_dim)); }

struct LayerWeights {
  Weight attn_norm;       // f32 [dim]
  Weight wq, wk, wv;      // [q_dim|kv_dim, dim]
  Weight bq, bk, bv;      // f32 [q_dim|kv_dim]; N == 0 when absent
  Weight q_norm, k_norm;  // f32 [head_dim]: norms of each head before RoPE; N == 0 when absent
  Weight wo;              // [dim, q_dim]
  Weight mlp_norm;        // f32 [dim]
  Weight w_gate, w_up;    // [hidden_dim, dim]
  Weight w_down;          // [dim, hidden_dim]
};

struct ModelWeights {
  Weight tok_embeddings;  // [vocab_size, dim]
  std::vector<LayerWeights> layers;
  Weight norm;    // f32 [dim]
  Weight output;  // [vocab_size, dim]; equal to tok_embeddings when tied
};

}  // namespace pyllama
