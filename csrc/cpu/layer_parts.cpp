#include "layer_parts.h"

#include <algorithm>
#include <numeric>

#include "activations.h"
#include "cpu.h"
#include "os.h"
#include "scratch.h"
#include "thread_pool.h"

namespace pyllama {
namespace cpu {

namespace {

// What a part that needs no step works with.
class Workers {
 public:
  explicit Workers(const CpuOptions& options)
      : kernels(kernels_for(options.isa)),
        pool(options.threads > 0 ? options.threads : default_threads()),
        float_environment_(set_float_environment()) {
    pool.wake();
  }
  ~Workers() {
    pool.rest();
    restore_float_environment(float_environment_);
  }
  Workers(const Workers&) = delete;
  Workers& operator=(const Workers&) = delete;

  const Kernels& kernels;
  ThreadPool pool;

 private:
  const unsigned float_environment_;
};

// A model of one layer.
struct OneLayer {
  OneLayer(const Config& of, int layer, const LayerWeights& layer_weights) : config(of) {
    config.n_layers = 1;
    if (!config.windows.empty()) config.windows = {of.window(layer)};
    weights.layers = {layer_weights};
  }
  Config config;
  ModelWeights weights;
};

// The rows of a step: pieces of texts, as many as it takes.
struct Piece {
  int text, begin, n_tok;
};
using Pieces = std::vector<Piece>;

std::vector<Pieces> cut_into_steps(const Texts& texts, int most) {
  std::vector<Pieces> steps(1);
  int room = most;
  for (int t = 0; t < static_cast<int>(texts.lengths.size()); t++) {
    const int length = texts.lengths[static_cast<size_t>(t)];
    for (int begin = 0; begin < length;) {
      if (room == 0) {
        steps.emplace_back();
        room = most;
      }
      const int n = std::min(room, length - begin);
      steps.back().push_back({t, begin, n});
      begin += n;
      room -= n;
    }
  }
  return steps;
}

// The pages of the texts that are in work.
class TextPages {
 public:
  TextPages(Backend& backend, const Texts& texts) : backend_(backend), texts_(texts), pages_(texts.lengths.size()) {}

  const int* of(const Piece& piece) {
    std::vector<int>& pages = pages_[static_cast<size_t>(piece.text)];
    while (static_cast<int>(pages.size()) * kPageTok < piece.begin + piece.n_tok) pages.push_back(backend_.new_page());
    return pages.data();
  }
  void done(const Piece& piece) {
    std::vector<int>& pages = pages_[static_cast<size_t>(piece.text)];
    if (piece.begin + piece.n_tok < texts_.lengths[static_cast<size_t>(piece.text)]) return;
    for (const int page : pages) backend_.free_page(page);
    pages.clear();
  }

 private:
  Backend& backend_;
  const Texts& texts_;
  std::vector<std::vector<int>> pages_;
};

// Ends a step whatever happens after begin() was tried.
struct EndOfStep {
  Backend& backend;
  ~EndOfStep() { backend.end(); }
};

}  // namespace

int64_t Texts::n_tok() const { return std::accumulate(lengths.begin(), lengths.end(), int64_t{0}); }

void run_norm(const Weight& norm, float eps, const CpuOptions& options, const float* x, int64_t n, float* y) {
  Workers workers(options);
  const int dim = norm.N;
  constexpr int kRows = 64;
  workers.pool.run(static_cast<int>((n + kRows - 1) / kRows), [&](int task, int) {
    for (int64_t t = int64_t{task} * kRows; t < std::min(n, (int64_t{task} + 1) * kRows); t++) {
      workers.kernels.rmsnorm(x + t * dim, norm.vector(), dim, eps, y + t * dim);
    }
  });
}

void run_attention(const Config& config, int layer, const LayerWeights& weights, const CpuOptions& options,
                   const Texts& texts, const float* x, float* o) {
  const OneLayer model(config, layer, weights);
  const std::unique_ptr<OpenBackend> backend = make_open_backend(model.config, model.weights, options);
  TextPages pages(*backend, texts);
  std::vector<int32_t> positions;
  std::vector<Span> spans;
  for (const Pieces& pieces : cut_into_steps(texts, backend->max_batch_tok())) {
    positions.clear();
    spans.clear();
    for (const Piece& piece : pieces) {
      spans.push_back({static_cast<int>(positions.size()), piece.n_tok, piece.begin, pages.of(piece)});
      for (int i = 0; i < piece.n_tok; i++) positions.push_back(piece.begin + i);
    }
    Step step;
    step.n_tok = static_cast<int>(positions.size());
    step.pos = positions.data();
    step.n_spans = static_cast<int>(spans.size());
    step.spans = spans.data();
    if (step.n_tok == 0) continue;
    const EndOfStep end{*backend};
    backend->begin(step);
    backend->load_x(x);
    backend->attention_in(0);
    backend->attention(0);
    o = std::copy_n(backend->o(), int64_t{step.n_tok} * config.q_dim(), o);
    x += int64_t{step.n_tok} * config.dim;
    for (const Piece& piece : pieces) pages.done(piece);
  }
}

void run_mlp(const Config& config, const LayerWeights& weights, const CpuOptions& options, const float* x, int64_t n,
             float* h) {
  const OneLayer model(config, 0, weights);
  const std::unique_ptr<OpenBackend> backend = make_open_backend(model.config, model.weights, options);
  const std::vector<int32_t> positions(static_cast<size_t>(backend->max_batch_tok()), 0);  // of no consequence here
  for (int64_t begin = 0; begin < n; begin += backend->max_batch_tok()) {
    Step step;
    step.n_tok = static_cast<int>(std::min<int64_t>(n - begin, backend->max_batch_tok()));
    step.pos = positions.data();
    const EndOfStep end{*backend};
    backend->begin(step);
    backend->load_x(x + begin * config.dim);
    backend->mlp_in(0);
    std::copy_n(backend->h(), int64_t{step.n_tok} * config.hidden_dim, h + begin * config.hidden_dim);
  }
}

void add_product(const Weight& w, const CpuOptions& options, const float* x, int64_t n, float* y) {
  Workers workers(options);
  Activations in(w.K, workers.kernels, workers.pool);
  Arena arena;
  in.claim(arena, options.max_batch_tok);
  arena.allocate();
  for (int64_t begin = 0; begin < n; begin += options.max_batch_tok) {
    const int rows = static_cast<int>(std::min<int64_t>(n - begin, options.max_batch_tok));
    const Product product{&w, y + begin * w.N, w.N, nullptr, true};
    in.set(x + begin * w.K, w.K, rows, w.K, nullptr, 0, &product, 1);
    in.multiply(&product, 1);
  }
}

}  // namespace cpu
}  // namespace pyllama
