// The Backend verbs on the CPU: each is one or two parallel regions over the kernels of the chosen instruction set.
// Activations are float32 between verbs and int8 per 32 columns inside a product with quantized weights.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "../backend.h"
#include "../error.h"
#include "../portable_trig.h"
#include "activations.h"
#include "attention.h"
#include "cpu.h"
#include "embedding.h"
#include "head.h"
#include "layer_parts.h"
#include "os.h"
#include "pages.h"
#include "scratch.h"
#include "stopwatch.h"
#include "thread_pool.h"

namespace pyllama {
namespace cpu {

namespace {

// Of gate and of up, a thread makes so many values before SwiGLU reads them from its cache, and at least so many tiles.
constexpr int kMlpValues = 1 << 16, kMlpTiles = 2;
// Tokens that the buffers have room for until a step brings more.
constexpr int kFewTok = 16;

class CpuBackend final : public OpenBackend {
 public:
  CpuBackend(const Config& config, const ModelWeights& weights, const CpuOptions& options)
      : c_(config),
        w_(weights),
        kernels_(kernels_for(options.isa)),
        max_batch_tok_(options.max_batch_tok),
        pool_(options.threads > 0 ? options.threads : default_threads()),
        in_(std::max({config.dim, config.q_dim(), config.hidden_dim}), kernels_, pool_),
        parts_(std::max(config.q_dim(), config.hidden_dim), kernels_, pool_),
        attention_(c_, kv_type(options.kv_dtype), kernels_, pool_),
        pages_(static_cast<size_t>(attention_.layout().page_bytes)),
        head_(c_, w_, kernels_, pool_) {}

  const char* name() const override { return kernels_.isa; }
  int max_batch_tok() const override { return max_batch_tok_; }

  size_t page_bytes() const override { return pages_.page_bytes(); }
  int new_page() override { return pages_.take(); }
  void free_page(int page) override { pages_.give_back(page); }
  void copy_page(int from, int to) override { std::memcpy(page(to), page(from), page_bytes()); }

  void begin(const Step& step) override {
    reserve(step.n_tok);
    step_ = &step;
    watch_.begin();
    float_environment_ = set_float_environment();
    pool_.wake();
    const int half = c_.head_dim / 2;
    pool_.run(step.n_tok, [&](int t, int) {
      for (int i = 0; i < half; i++) {
        // The angle is rounded to float first, as the models were trained.
        const float angle = static_cast<float>(step.pos[t]) * c_.rope_inv_freq[static_cast<size_t>(i)];
        double s, c;
        sincos_portable(angle, &s, &c);
        cos_[static_cast<size_t>(t) * half + i] = static_cast<float>(c) * c_.rope_attention_factor;
        sin_[static_cast<size_t>(t) * half + i] = static_cast<float>(s) * c_.rope_attention_factor;
      }
    });
    attention_.plan(step);
  }

  void embed() override {
    pool_.run(step_->n_tok, [&](int t, int) {
      float* x = x_ + static_cast<int64_t>(t) * c_.dim;
      dequantize_row(w_.tok_embeddings, step_->tokens[t], x);
      for (int i = 0; i < c_.dim; i++) x[i] *= c_.embedding_scale;
    });
  }

  void attention_in(int layer) override {
    const LayerWeights& w = w_.layers[static_cast<size_t>(layer)];
    const Product products[] = {
        {&w.wq, q_, c_.q_dim(), vector(w.bq), false},
        {&w.wk, k_, c_.kv_dim(), vector(w.bk), false},
        {&w.wv, v_, c_.kv_dim(), vector(w.bv), false},
    };
    in_.set(x_, c_.dim, step_->n_tok, c_.dim, w.attn_norm.vector(), c_.norm_eps, products, 3);
    multiply(in_, products, 3);
    // Sixteen tokens share the cache lines of a head's keys: one thread writes them.
    if (step_->n_tok >= 2 * kKeyBlock * pool_.threads()) {
      pool_.run((step_->n_tok + kKeyBlock - 1) / kKeyBlock, [&](int task, int) {
        const int begin = task * kKeyBlock;
        append(layer, begin, std::min(step_->n_tok, begin + kKeyBlock), 0, c_.n_kv_heads);
      });
    } else {
      pool_.run_ranges(c_.n_kv_heads, rows_worth_a_task(step_->n_tok * c_.head_dim),
                       [&](int begin, int end, int) { append(layer, 0, step_->n_tok, begin, end); });
    }
  }

  void attention(int layer) override {
    const LayerWeights& w = w_.layers[static_cast<size_t>(layer)];
    if (o_in_parts(w)) parts_.expect(step_->n_tok, c_.q_dim(), w.wo);
    watch_.turn_to(&StepTimes::attention);
    const Queries queries{q_, vector(w.q_norm), cos_, sin_};
    attention_.run(layer, pages_.by_id().data(), queries, o_, o_in_parts(w) ? &parts_ : nullptr);
    watch_.turn_to(&StepTimes::rest);
  }

  void attention_out(int layer) override {
    const LayerWeights& w = w_.layers[static_cast<size_t>(layer)];
    add_to_residual(w.wo, o_, c_.q_dim(), o_in_parts(w));
  }

  void mlp_in(int layer) override {
    const LayerWeights& w = w_.layers[static_cast<size_t>(layer)];
    const Product products[] = {
        {&w.w_gate, gate_, c_.hidden_dim, nullptr, false},
        {&w.w_up, up_, c_.hidden_dim, nullptr, false},
    };
    in_.set(x_, c_.dim, step_->n_tok, c_.dim, w.mlp_norm.vector(), c_.norm_eps, products, 2);
    if (w.w_gate.input_order || w.w_up.input_order) {
      multiply(in_, products, 2);
      pool_.run(step_->n_tok, [&](int t, int) {
        const int64_t at = static_cast<int64_t>(t) * c_.hidden_dim;
        kernels_.swiglu(gate_ + at, up_ + at, c_.hidden_dim, h_ + at);
      });
      return;
    }
    // Both matrices take the same tiles, SwiGLU what they gave while it is in the cache, and the next product's
    // rounding what SwiGLU gave.
    if (h_in_parts(w)) parts_.expect(step_->n_tok, c_.hidden_dim, w.w_down);
    const MatmulArgs gate = in_.arguments(products[0]), up = in_.arguments(products[1]);
    const int tiles = w.w_gate.tiles(), grain = static_cast<int>(round_up(in_.grain(tiles), kMlpTiles));
    const int most = std::max(1, kMlpValues / (kMlpTiles * kTileRows * step_->n_tok)) * kMlpTiles;
    watch_.turn_to(&StepTimes::products);
    pool_.run_ranges(tiles, grain, [&](int begin, int end, int thread) {
      float* values = mlp_ + static_cast<int64_t>(thread) * 2 * mlp_values();
      for (; begin < end; begin += most) {
        const int stop = std::min(end, begin + most);
        multiply_some(gate, w.w_gate, begin, stop, values);
        multiply_some(up, w.w_up, begin, stop, values + mlp_values());
        if (thread == 0) watch_.turn_to(&StepTimes::rest);
        swiglu_some(values, begin, stop, h_in_parts(w));
        if (thread == 0) watch_.turn_to(&StepTimes::products);
      }
    });
    watch_.turn_to(&StepTimes::rest);
  }

  void mlp_out(int layer) override {
    const LayerWeights& w = w_.layers[static_cast<size_t>(layer)];
    add_to_residual(w.w_down, h_, c_.hidden_dim, h_in_parts(w));
  }

  void head() override {
    const int n = step_->n_out;
    if (n == 0) return;
    watch_.turn_to(&StepTimes::head);
    logits_.resize(static_cast<size_t>(n) * c_.vocab_size);
    head_.run(x_, step_->out_rows, n, logits_.data());
  }

  const float* logits() override { return logits_.data(); }

  void load_x(const float* x) override { std::memcpy(x_, x, x_bytes()); }
  void store_x(float* x) override { std::memcpy(x, x_, x_bytes()); }

  void end() override {
    if (!step_) return;
    watch_.turn_to(&StepTimes::rest);
    step_ = nullptr;
    pool_.rest();
    restore_float_environment(float_environment_);
  }

  StepTimes profile(bool on) override { return watch_.restart(on); }

  const float* o() const override { return o_; }
  const float* h() const override { return h_; }

 private:
  uint8_t* page(int id) const { return pages_.by_id()[static_cast<size_t>(id)]; }

  size_t x_bytes() const { return static_cast<size_t>(step_->n_tok) * static_cast<size_t>(c_.dim) * sizeof(float); }

  // Of a vector that a model may lack.
  static const float* vector(const Weight& w) { return w.N ? w.vector() : nullptr; }

  // Whether what wo and w_down are multiplied with is rounded where it is made, in parts, and never a whole row of
  // floats.
  bool o_in_parts(const LayerWeights& w) const { return Activations::takes_parts(w.wo) && c_.head_dim % 32 == 0; }
  static bool h_in_parts(const LayerWeights& w) {
    return Activations::takes_parts(w.w_down) && !w.w_gate.input_order && !w.w_up.input_order;
  }

  // x += w·in, or w times what parts_ took.
  void add_to_residual(const Weight& w, const float* in, int columns, bool in_parts) {
    const Product product{&w, x_, c_.dim, nullptr, true};
    if (in_parts) {
      parts_.complete();
    } else {
      in_.set(in, columns, step_->n_tok, columns, nullptr, 0, &product, 1);
    }
    multiply(in_parts ? parts_ : in_, &product, 1);
  }

  void multiply(Activations& in, const Product* products, int n) {
    watch_.turn_to(&StepTimes::products);
    in.multiply(products, n);
    watch_.turn_to(&StepTimes::rest);
  }

  const Span& span_of(int row) const {
    const Span* span = step_->spans;
    while (row >= span->first + span->n_tok) span++;
    return *span;
  }

  // Keys and values of some heads of the tokens [begin, end) go to the cache, keys normed and rotated.
  void append(int layer, int begin, int end, int head_begin, int head_end) {
    const int half = c_.head_dim / 2;
    const PageLayout& layout = attention_.layout();
    const float* norm = vector(w_.layers[static_cast<size_t>(layer)].k_norm);
    for (int t = begin; t < end; t++) {
      const float* cos = cos_ + static_cast<int64_t>(t) * half;
      const float* sin = sin_ + static_cast<int64_t>(t) * half;
      const int pos = step_->pos[t];
      uint8_t* to = page(span_of(t).pages[pos / kPageTok]);
      for (int h = head_begin; h < head_end; h++) {
        float* k = k_ + static_cast<int64_t>(t) * c_.kv_dim() + h * c_.head_dim;
        const float* v = v_ + static_cast<int64_t>(t) * c_.kv_dim() + h * c_.head_dim;
        if (norm) kernels_.rmsnorm(k, norm, c_.head_dim, c_.norm_eps, k);
        kernels_.rope(k, cos, sin, c_.head_dim);
        kernels_.append_kv(k, v, layout.head, to + layout.head_offset(layer, h), pos % kPageTok);
      }
    }
  }

  // Makes the buffers large enough: for a few tokens, as decoding needs, or for the largest step.
  void reserve(int n_tok) {
    if (n_tok <= reserved_tok_) return;
    const int rows = n_tok <= kFewTok ? std::min(kFewTok, max_batch_tok_) : max_batch_tok_;
    const size_t tok = static_cast<size_t>(rows);
    Arena arena;
    arena.claim(&x_, tok * c_.dim);
    arena.claim(&q_, tok * c_.q_dim());
    arena.claim(&k_, tok * c_.kv_dim());
    arena.claim(&v_, tok * c_.kv_dim());
    arena.claim(&o_, tok * c_.q_dim());
    arena.claim(&gate_, tok * c_.hidden_dim);
    arena.claim(&up_, tok * c_.hidden_dim);
    arena.claim(&h_, tok * c_.hidden_dim);
    arena.claim(&mlp_, static_cast<size_t>(pool_.threads()) * 2 * static_cast<size_t>(mlp_values(rows)));
    arena.claim(&cos_, tok * c_.head_dim / 2);
    arena.claim(&sin_, tok * c_.head_dim / 2);
    in_.claim(arena, rows);
    parts_.claim(arena, rows);
    head_.claim(arena, rows);
    arena.allocate();
    arena_.swap(arena);
    reserved_tok_ = rows;
  }

  // The numbers that a thread keeps of gate, or of up, between their products and SwiGLU.
  static int64_t mlp_values(int n_tok) { return std::max(kMlpValues, kMlpTiles * kTileRows * n_tok); }
  int64_t mlp_values() const { return mlp_values(reserved_tok_); }

  // y [n_tok][(end - begin) * kTileRows] = the tiles [begin, end) of a product.
  void multiply_some(MatmulArgs a, const Weight& w, int begin, int end, float* y) const {
    a.w = slice(w, begin, end);
    a.y = y;
    a.ldy = (end - begin) * kTileRows;
    kernels_.matmul(a, 0, end - begin);
  }

  // h, or what its product takes of it, of the tiles [begin, end) of gate and up.
  void swiglu_some(float* values, int begin, int end, bool in_parts) {
    const int columns = (end - begin) * kTileRows, first = begin * kTileRows;
    const int n = std::min(columns, c_.hidden_dim - first);
    for (int t = 0; t < step_->n_tok; t++) {
      float* gate = values + static_cast<int64_t>(t) * columns;
      float* h = in_parts ? gate : h_ + static_cast<int64_t>(t) * c_.hidden_dim + first;
      kernels_.swiglu(gate, gate + mlp_values(), n, h);
      if (in_parts) parts_.take_part(t, first, h, n);
    }
  }

  const Config& c_;
  const ModelWeights& w_;
  const Kernels& kernels_;
  const int max_batch_tok_;
  ThreadPool pool_;
  Activations in_, parts_;  // parts_: what the output and down products are made of, as it comes in parts
  Attention attention_;
  Pages pages_;
  Head head_;
  const Step* step_ = nullptr;
  unsigned float_environment_ = 0;
  Stopwatch watch_;
  int reserved_tok_ = 0;
  Arena arena_;                                                                     // of all that follow but the logits
  float *x_ = nullptr, *q_ = nullptr, *k_ = nullptr, *v_ = nullptr, *o_ = nullptr;  // [reserved_tok][their width]
  float *gate_ = nullptr, *up_ = nullptr, *h_ = nullptr;                            // [reserved_tok][hidden_dim]
  float* mlp_ = nullptr;                   // per thread: values of gate, values of up
  float *cos_ = nullptr, *sin_ = nullptr;  // [reserved_tok][head_dim/2]
  std::vector<float> logits_;              // [n_out][vocab_size]
};

}  // namespace

std::unique_ptr<OpenBackend> make_open_backend(const Config& config, const ModelWeights& weights,
                                               const CpuOptions& options) {
  return std::make_unique<CpuBackend>(config, weights, options);
}

}  // namespace cpu

std::unique_ptr<Backend> make_cpu_backend(const Config& config, const ModelWeights& weights,
                                          const CpuOptions& options) {
  return std::make_unique<cpu::CpuBackend>(config, weights, options);
}

}  // namespace pyllama
