// See records.h. Shapes were checked by whoever made the records (model/model.h), with the same formats table.
#include "cuda/records.h"

#include <algorithm>

namespace pyllama {
namespace cuda {

namespace {

Weight weight_of(const PyllamaCudaWeight& record) {
  Weight w;
  w.name = record.name ? record.name : "";
  w.format = static_cast<Format>(record.format);
  w.scale_type = static_cast<Number>(record.scale_type);
  w.offset_type = static_cast<Number>(record.offset_type);
  w.N = record.rows;
  w.K = record.columns;
  w.group = record.group;
  std::copy(std::begin(record.codebook), std::end(record.codebook), w.codebook.begin());
  w.codes = record.codes;
  w.scales = record.scales;
  w.offsets = record.offsets;
  w.input_order = record.input_order;
  w.payload_bytes = record.payload_bytes;
  return w;
}

LayerWeights layer_of(const PyllamaCudaLayer& record) {
  LayerWeights l;
  l.attn_norm = weight_of(record.attn_norm);
  l.wq = weight_of(record.wq);
  l.wk = weight_of(record.wk);
  l.wv = weight_of(record.wv);
  l.bq = weight_of(record.bq);
  l.bk = weight_of(record.bk);
  l.bv = weight_of(record.bv);
  l.q_norm = weight_of(record.q_norm);
  l.k_norm = weight_of(record.k_norm);
  l.wo = weight_of(record.wo);
  l.mlp_norm = weight_of(record.mlp_norm);
  l.w_gate = weight_of(record.w_gate);
  l.w_up = weight_of(record.w_up);
  l.w_down = weight_of(record.w_down);
  return l;
}

}  // namespace

Config config_of(const PyllamaCudaModel& record) {
  Config c;
  c.dim = record.dim;
  c.hidden_dim = record.hidden_dim;
  c.n_layers = record.n_layers;
  c.n_heads = record.n_heads;
  c.n_kv_heads = record.n_kv_heads;
  c.head_dim = record.head_dim;
  c.vocab_size = record.vocab_size;
  c.max_seq_len = record.max_seq_len;
  c.norm_eps = record.norm_eps;
  c.rope_attention_factor = record.rope_attention_factor;
  c.embedding_scale = record.embedding_scale;
  c.attention_scale = record.attention_scale;
  c.rope_inv_freq.assign(record.rope_inv_freq, record.rope_inv_freq + record.head_dim / 2);
  return c;
}

ModelWeights weights_of(const PyllamaCudaModel& record) {
  ModelWeights w;
  w.tok_embeddings = weight_of(record.tok_embeddings);
  for (int i = 0; i < record.n_layers; i++) w.layers.push_back(layer_of(record.layers[i]));
  w.norm = weight_of(record.norm);
  w.output = weight_of(record.output);
  return w;
}

Step step_of(const PyllamaCudaStep& record, StepLists& lists) {
  lists.spans.clear();
  for (int i = 0; i < record.n_spans; i++) {
    const PyllamaCudaSpan& span = record.spans[i];
    lists.spans.push_back({span.first, span.n_tok, span.pos, span.pages});
  }
  lists.draws.clear();
  for (int i = 0; record.draws && i < record.n_out; i++) {
    const PyllamaCudaDraw& draw = record.draws[i];
    lists.draws.push_back({draw.temperature, draw.top_k, draw.top_p, draw.min_p, draw.random});
  }
  Step step;
  step.n_tok = record.n_tok;
  step.tokens = record.tokens;
  step.pos = record.pos;
  step.n_spans = record.n_spans;
  step.spans = lists.spans.data();
  step.n_out = record.n_out;
  step.out_rows = record.out_rows;
  step.draws = record.draws ? lists.draws.data() : nullptr;
  return step;
}

}  // namespace cuda
}  // namespace pyllama
