#include "split_backend.h"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "error.h"

namespace pyllama {

namespace {

// The config of the layers [begin, end).
Config with_layers(Config config, int begin, int end) {
  config.n_layers = end - begin;
  if (!config.windows.empty()) {
    config.windows.erase(config.windows.begin() + end, config.windows.end());
    config.windows.erase(config.windows.begin(), config.windows.begin() + begin);
  }
  return config;
}

ModelWeights front_of(const ModelWeights& all, int n_front) {
  ModelWeights part;
  part.tok_embeddings = all.tok_embeddings;
  part.layers.assign(all.layers.begin(), all.layers.begin() + n_front);
  return part;
}

ModelWeights back_of(const ModelWeights& all, int n_front) {
  ModelWeights part;
  part.layers.assign(all.layers.begin() + n_front, all.layers.end());
  part.norm = all.norm;
  part.output = all.output;
  return part;
}

// A backend of some layers, and the running step as it sees it: with page ids of its own.
class Part {
 public:
  Part(Config config, ModelWeights weights, const PartFactory& make)
      : config_(std::move(config)), weights_(std::move(weights)), backend_(make(config_, weights_)) {}
  Part(const Part&) = delete;
  Part& operator=(const Part&) = delete;

  Backend& backend() const { return *backend_; }

  void make_room(int page) {
    if (pages_.size() <= static_cast<size_t>(page)) pages_.resize(static_cast<size_t>(page) + 1);
  }
  void new_page(int page) { pages_[static_cast<size_t>(page)] = backend_->new_page(); }
  void free_page(int page) { backend_->free_page(own(page)); }
  void copy_page(int from, int to) { backend_->copy_page(own(from), own(to)); }

  void set(const Step& step) {
    size_t n_pages = 0;
    for (int i = 0; i < step.n_spans; ++i) n_pages += pages_of(step.spans[i]);
    step_pages_.resize(n_pages);
    spans_.assign(step.spans, step.spans + step.n_spans);
    int* to = step_pages_.data();
    for (Span& span : spans_) {
      const int* from = span.pages;
      span.pages = to;
      to = std::transform(from, from + pages_of(span), to, [this](int page) { return own(page); });
    }
    step_ = step;
    step_.spans = spans_.data();
  }
  void wants_no_logits() { step_.n_out = 0; }
  void begin() { backend_->begin(step_); }

 private:
  static size_t pages_of(const Span& span) {
    return static_cast<size_t>((span.pos + span.n_tok + kPageTok - 1) / kPageTok);
  }
  int own(int page) const { return pages_[static_cast<size_t>(page)]; }

  const Config config_;
  const ModelWeights weights_;
  const std::unique_ptr<Backend> backend_;
  std::vector<int> pages_;  // [page of the whole] its id in this backend
  std::vector<int> step_pages_;
  std::vector<Span> spans_;
  Step step_;
};

class SplitBackend final : public Backend {
 public:
  SplitBackend(const Config& config, const ModelWeights& weights, int n_front, const PartFactory& make_front,
               const PartFactory& make_back)
      : n_front_(n_front),
        dim_(static_cast<size_t>(config.dim)),
        front_(with_layers(config, 0, n_front), front_of(weights, n_front), make_front),
        back_(with_layers(config, n_front, config.n_layers), back_of(weights, n_front), make_back),
        name_(message(front_.backend().name(), " + ", back_.backend().name())) {}

  const char* name() const override { return name_.c_str(); }
  int max_batch_tok() const override {
    return std::min(front_.backend().max_batch_tok(), back_.backend().max_batch_tok());
  }

  // A page is one in each part, as large as both together.
  size_t page_bytes() const override { return front_.backend().page_bytes() + back_.backend().page_bytes(); }

  int new_page() override {
    const int page = free_.empty() ? n_pages_ : free_.back();
    front_.make_room(page);
    back_.make_room(page);
    free_.reserve(static_cast<size_t>(n_pages_) + 1);  // so that free_page cannot throw
    front_.new_page(page);
    try {
      back_.new_page(page);
    } catch (...) {
      front_.free_page(page);
      throw;
    }
    if (free_.empty()) {
      ++n_pages_;
    } else {
      free_.pop_back();
    }
    return page;
  }

  void free_page(int page) override {
    front_.free_page(page);
    back_.free_page(page);
    free_.push_back(page);
  }

  void copy_page(int from, int to) override {
    front_.copy_page(from, to);
    back_.copy_page(from, to);
  }

  void begin(const Step& step) override {
    x_.resize(std::max(x_.size(), static_cast<size_t>(step.n_tok) * dim_));
    front_.set(step);
    front_.wants_no_logits();
    back_.set(step);
    running_ = &front_;
    front_.begin();
  }

  void embed() override { front_.backend().embed(); }
  void attention_in(int layer) override { of(layer).attention_in(local(layer)); }
  void attention(int layer) override { of(layer).attention(local(layer)); }
  void attention_out(int layer) override { of(layer).attention_out(local(layer)); }
  void mlp_in(int layer) override { of(layer).mlp_in(local(layer)); }
  void mlp_out(int layer) override { of(layer).mlp_out(local(layer)); }
  void head() override { back_.backend().head(); }
  const float* logits() override { return back_.backend().logits(); }
  bool can_draw() const override { return back_.backend().can_draw(); }
  const int32_t* drawn() override { return back_.backend().drawn(); }

  void end() override {
    if (running_) running_->backend().end();
    running_ = nullptr;
  }

  StepTimes profile(bool on) override {
    const StepTimes a = front_.backend().profile(on), b = back_.backend().profile(on);
    return {a.products + b.products, a.attention + b.attention, a.head + b.head, a.rest + b.rest};
  }

 private:
  Backend& of(int layer) {
    if (layer < n_front_) return front_.backend();
    if (running_ == &front_) hand_over();
    return back_.backend();
  }
  int local(int layer) const { return layer < n_front_ ? layer : layer - n_front_; }

  // The parts are never in a step at the same time: threads of the one would wait where the other's could work.
  void hand_over() {
    front_.backend().store_x(x_.data());
    end();
    running_ = &back_;
    back_.begin();
    back_.backend().load_x(x_.data());
  }

  const int n_front_;
  const size_t dim_;
  Part front_, back_;
  const std::string name_;
  int n_pages_ = 0;        // ids that were ever given
  std::vector<int> free_;  // those of them that are free
  Part* running_ = nullptr;
  std::vector<float> x_;  // [n_tok][dim] on its way
};

}  // namespace

std::unique_ptr<Backend> make_split_backend(const Config& config, const ModelWeights& weights, int n_front,
                                            const PartFactory& make_front, const PartFactory& make_back) {
  check<std::invalid_argument>(n_front >= 1 && n_front < config.n_layers, n_front, " layers in front, expected 1…",
                               config.n_layers - 1);
  return std::make_unique<SplitBackend>(config, weights, n_front, make_front, make_back);
}

}  // namespace pyllama
