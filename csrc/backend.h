// What a device must do for the forward pass: eleven coarse verbs for a step, four for pages, two by which one device
// hands a step over to another; it may tell where the time goes. model/ calls them in order and knows no device; cpu/
// and cuda/ implement them and know no model loop. A backend owns its activations and its key/value pages.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>

#include "config.h"

namespace pyllama {

// Tokens of the key/value cache are kept in pages of this many; also the block of keys of one online-softmax update.
constexpr int kPageTok = 64;

// A run of consecutive tokens of one sequence inside a step.
struct Span {
  int first = 0;  // row of its first token in the step
  int n_tok = 0;
  int pos = 0;                 // absolute position of its first token
  const int* pages = nullptr;  // page ids that cover positions 0 … pos + n_tok - 1
};

// How the token after a row of logits is drawn (model/sampler.h): temperature 0 takes the largest logit.
struct Draw {
  double temperature = 1.0;
  int top_k = 0;
  double top_p = 1.0;
  double min_p = 0.0;
  uint64_t random = 0;  // 53 bits
};

// One step: n_tok rows, cut into spans; logits are wanted for n_out of the rows.
struct Step {
  int n_tok = 0;
  const int32_t* tokens = nullptr;  // [n_tok]
  const int32_t* pos = nullptr;     // [n_tok] absolute positions
  int n_spans = 0;
  const Span* spans = nullptr;  // [n_spans], rows ascending, disjoint, covering all rows
  int n_out = 0;
  const int32_t* out_rows = nullptr;  // [n_out] ascending
  const Draw* draws = nullptr;        // [n_out], for a backend that can_draw(): wanted are tokens, and no logits
};

// Seconds of steps by what they were spent on.
struct StepTimes {
  double products = 0;   // the layers' matrices, waiting for the last thread included
  double attention = 0;  // scores, softmax and weighted values, and rounding them where wo takes int8
  double head = 0;       // norm and output matrix
  double rest = 0;       // embedding, norms, rounding before products, RoPE, the cache, SwiGLU
};

class Backend {
 public:
  virtual ~Backend() = default;

  virtual const char* name() const = 0;
  virtual int max_batch_tok() const = 0;  // the largest n_tok of a step

  // Pages of the key/value cache; never called while a step runs.
  virtual size_t page_bytes() const = 0;
  virtual int new_page() = 0;  // an id, counted up from 0; the page's content is unspecified but finite
  virtual void free_page(int page) = 0;
  virtual void copy_page(int from, int to) = 0;  // all layers

  // A step, in this order. x is the residual stream [n_tok, dim], held by the backend.
  virtual void begin(const Step& step) = 0;   // the step must outlive end()
  virtual void embed() = 0;                   // x = tok_embeddings[tokens] · embedding_scale
  virtual void attention_in(int layer) = 0;   // q,k,v = W·norm(x) + b; q,k = rope(norm(q,k)); append k,v to the pages
  virtual void attention(int layer) = 0;      // o = softmax(q·kᵀ · attention_scale)·v, causal, in the window, per head
  virtual void attention_out(int layer) = 0;  // x += wo·o
  virtual void mlp_in(int layer) = 0;         // h = silu(w_gate·norm(x)) ⊙ (w_up·norm(x))
  virtual void mlp_out(int layer) = 0;        // x += w_down·h
  virtual void head() = 0;                    // logits = output·norm(x[out_rows])
  virtual const float* logits() = 0;          // host memory [n_out, vocab_size], valid until the next begin()
  virtual bool can_draw() const { return false; }
  virtual const int32_t* drawn() { return nullptr; }  // [n_out] as logits(); -1 where logits are not finite
  virtual void end() = 0;                             // also called after an exception; workers may sleep again

  // For backends of some of a model's layers (split_backend.h): x [n_tok, dim] in host memory, given in embed()'s place
  // to one that has no embeddings, taken in head()'s place from one that has no norm and output.
  virtual void load_x(const float* /*x*/) { throw std::logic_error("this backend cannot take a step over"); }
  virtual void store_x(float* /*x*/) { throw std::logic_error("this backend cannot hand a step over"); }

  // Times steps from now on, or no more; gives what was found since the last call. Never called while a step runs.
  virtual StepTimes profile(bool /*on*/) { return {}; }
};

struct CpuOptions {
  int threads = 0;       // 0: one per physical core that affinity and cgroup allow
  const char* isa = "";  // "": the best one; else a name from cpu_all_isas()
  int max_batch_tok = 512;
  const char* kv_dtype = "f16";  // of the key/value cache: "f16" or "q8"
};
std::unique_ptr<Backend> make_cpu_backend(const Config&, const ModelWeights&, const CpuOptions&);

}  // namespace pyllama
