// LLaMA (arXiv 2302.13971): h = x + Attention(RMSNorm(x)), out = h + SwiGLU(RMSNorm(h)), said once over the verbs of
// backend.h. Around it, what makes a step atomic: pages are taken first, sequences are changed last.
#include "model/forward.h"

#include <algorithm>
#include <set>

#include "error.h"
#include "model/portable_math.h"

namespace pyllama {
namespace {

// A batch as a backend reads it. Owns what Step points to.
struct Plan {
  std::vector<int32_t> tokens;
  std::vector<int32_t> pos;
  std::vector<Span> spans;
  std::vector<int32_t> out_rows;
  std::vector<int> first_out;  // per item: its first row in the logits, if it has any
  std::vector<Draw> draws;     // as out_rows, if the backend is to draw the tokens

  Plan(const std::vector<StepItem>& batch, bool backend_draws);
  Step step() const;
};

// Whether an item needs logits for the row of its token i.
bool needs_logits(const StepItem& item, int i) {
  const bool last = i >= item.n_tok() - 1 - item.n_draft;
  return item.wanted == LogitsWanted::all || (last && (item.sampler || item.wanted == LogitsWanted::last));
}

// Whether a backend can draw the item's tokens: it has the logits, and neither the tokens before nor room for reports.
bool can_be_drawn(const StepItem& item) {
  if (item.wanted != LogitsWanted::none) return false;
  if (!item.sampler) return true;
  const SamplerParams& p = *item.sampler;
  return p.repetition_penalty == 1 && p.presence_penalty == 0 && p.frequency_penalty == 0 && p.logit_bias.empty() &&
         p.logprobs < 0;
}

// `position`: of the token to be drawn.
Draw draw_of(const SamplerParams& p, int position) {
  return {p.temperature, p.top_k, p.top_p, p.min_p, uniform_bits(p.seed, static_cast<uint64_t>(position))};
}

Plan::Plan(const std::vector<StepItem>& batch, bool backend_draws) {
  backend_draws = backend_draws && std::all_of(batch.begin(), batch.end(), can_be_drawn);
  for (const StepItem& item : batch) {
    const int n_past = static_cast<int>(item.sequence->history().size());
    const int first = static_cast<int>(tokens.size());
    spans.push_back({first, item.n_tok(), n_past, item.sequence->pages().data()});
    first_out.push_back(static_cast<int>(out_rows.size()));
    for (int i = 0; i < item.n_tok(); ++i) {
      tokens.push_back(item.tokens[static_cast<size_t>(i)]);
      pos.push_back(n_past + i);
      if (!needs_logits(item, i)) continue;
      out_rows.push_back(first + i);
      if (backend_draws) draws.push_back(draw_of(*item.sampler, n_past + i + 1));
    }
  }
}

Step Plan::step() const {
  Step step;
  step.n_tok = static_cast<int>(tokens.size());
  step.tokens = tokens.data();
  step.pos = pos.data();
  step.n_spans = static_cast<int>(spans.size());
  step.spans = spans.data();
  step.n_out = static_cast<int>(out_rows.size());
  step.out_rows = out_rows.data();
  step.draws = draws.empty() ? nullptr : draws.data();
  return step;
}

// Calls end() whatever happens after begin() was tried.
class BackendStep {
 public:
  BackendStep(PagePool& pool, const Step& step) : pool_(pool) {
    pool_.step_begins();
    try {
      pool_.backend().begin(step);
    } catch (...) {
      finish();
      throw;
    }
  }
  ~BackendStep() { finish(); }
  BackendStep(const BackendStep&) = delete;
  BackendStep& operator=(const BackendStep&) = delete;

 private:
  void finish() {
    pool_.backend().end();
    pool_.step_ended();
  }
  PagePool& pool_;
};

// Sequences that got pages for this step, and lose them again unless the step commits.
class Prepared {
 public:
  explicit Prepared(const std::vector<StepItem>& batch) : batch_(batch) {
    try {
      for (; n_ready_ < batch.size(); ++n_ready_) batch[n_ready_].sequence->prepare(batch[n_ready_].n_tok());
    } catch (...) {
      abandon();
      throw;
    }
  }
  ~Prepared() { abandon(); }
  Prepared(const Prepared&) = delete;
  Prepared& operator=(const Prepared&) = delete;

  // Drafts behind the last token that something was sampled after were wrong: they are forgotten.
  void commit(const std::vector<std::vector<Sampled>>& sampled) noexcept {
    for (size_t i = 0; i < batch_.size(); ++i) {
      const StepItem& item = batch_[i];
      const int n_accepted = item.sampler ? static_cast<int>(sampled[i].size()) - 1 : 0;
      item.sequence->commit(item.tokens.data(), item.n_tok() - item.n_draft + n_accepted);
    }
    n_ready_ = 0;
  }

 private:
  void abandon() {
    for (size_t i = 0; i < n_ready_; ++i) batch_[i].sequence->abandon();
    n_ready_ = 0;
  }
  const std::vector<StepItem>& batch_;
  size_t n_ready_ = 0;
};

void forward(const Model& model, const Plan& plan, const std::function<void()>& poll) {
  Backend& backend = model.backend();
  const Step step = plan.step();
  const BackendStep running(model.pool(), step);
  backend.embed();
  for (int layer = 0; layer < model.config().n_layers; ++layer) {
    poll();
    backend.attention_in(layer);
    backend.attention(layer);
    backend.attention_out(layer);
    backend.mlp_in(layer);
    backend.mlp_out(layer);
  }
  if (step.n_out > 0) backend.head();
}

// Samples after the last token that is no draft, and after each draft for as long as the drafts come true. `logits`:
// [1 + n_draft, vocab_size]. The penalties and the random number see what they would see without drafts, hence the
// tokens are the same for every sampler.
std::vector<Sampled> sample_item(Sampler& sampler, const StepItem& item, const float* logits, int vocab_size) {
  SamplerInput in;
  in.vocab_size = vocab_size;
  in.past = item.sequence->history().data();
  in.n_past = static_cast<int>(item.sequence->history().size());
  in.fed = item.tokens.data();
  in.prompt_len = item.sequence->prompt_len();
  std::vector<Sampled> sampled;
  for (int row = 0; row <= item.n_draft; ++row) {
    in.n_fed = item.n_tok() - item.n_draft + row;
    in.logits = logits + static_cast<size_t>(row) * static_cast<size_t>(vocab_size);
    sampled.push_back(sampler.sample(*item.sampler, in));
    if (row < item.n_draft && item.tokens[static_cast<size_t>(in.n_fed)] != sampled.back().token) break;
  }
  return sampled;
}

// The same of tokens that the backend has drawn. `tokens`: [1 + n_draft].
std::vector<Sampled> take_drawn(const StepItem& item, const int32_t* tokens) {
  std::vector<Sampled> sampled;
  for (int row = 0; row <= item.n_draft; ++row) {
    const int n_fed = item.n_tok() - item.n_draft + row;
    check(tokens[row] >= 0, "logits are not finite at position ",
          static_cast<int>(item.sequence->history().size()) + n_fed - 1, ": the weights hold NaN or overflow");
    sampled.emplace_back();
    sampled.back().token = tokens[row];
    if (row < item.n_draft && item.tokens[static_cast<size_t>(n_fed)] != tokens[row]) break;
  }
  return sampled;
}

std::vector<int> lengths(const std::vector<StepItem>& batch) {
  std::vector<int> n_past;
  for (const StepItem& item : batch) n_past.push_back(item.sequence->n_past());
  return n_past;
}

// Makes the batch that reads what was just sampled; false if that ended one of the texts.
bool feed_back(std::vector<StepItem>& batch, const std::vector<std::vector<Sampled>>& sampled) {
  bool all_go_on = true;
  for (size_t i = 0; i < batch.size(); ++i) {
    const int token = sampled[i].back().token;
    const std::vector<int32_t>& ends = batch[i].sampler->end_ids;
    all_go_on = all_go_on && !std::binary_search(ends.begin(), ends.end(), token);
    batch[i].tokens.assign(1, token);
    batch[i].n_draft = 0;
  }
  return all_go_on;
}

}  // namespace

int StepItem::n_logit_rows() const {
  return wanted == LogitsWanted::all ? n_tok() : wanted == LogitsWanted::last ? 1 : 0;
}

void check_batch(const Model& model, const std::vector<StepItem>& batch) {
  check<std::invalid_argument>(!batch.empty(), "the batch is empty");
  const Config& config = model.config();
  std::set<const Sequence*> seen;
  size_t n_tok = 0;
  for (const StepItem& item : batch) {
    check<std::invalid_argument>(item.sequence->belongs_to(model.pool()), "the sequence belongs to another model");
    check<std::invalid_argument>(seen.insert(item.sequence).second, "the same sequence stands twice in one step");
    check<std::invalid_argument>(!item.tokens.empty(), "a sequence came without tokens, expected at least one");
    for (const int32_t token : item.tokens) {
      check<std::invalid_argument>(token >= 0 && token < config.vocab_size, "token ", token, ", expected 0…",
                                   config.vocab_size - 1);
    }
    check<std::invalid_argument>(item.n_draft >= 0 && item.n_draft < item.n_tok(), "n_draft is ", item.n_draft,
                                 ", expected 0…", item.n_tok() - 1, ", fewer than the item's tokens");
    check<std::invalid_argument>(item.n_draft == 0 || (item.sampler && item.wanted == LogitsWanted::none),
                                 "drafts need a sampler, and logits \"none\"");
    const int n_past = item.sequence->n_past();
    const auto room = static_cast<size_t>(config.max_seq_len - n_past);
    check<ContextError>(item.tokens.size() <= room, n_past, " tokens and ", item.tokens.size(),
                        " more do not fit the context of ", config.max_seq_len);
    n_tok += item.tokens.size();
  }
  const int most = model.backend().max_batch_tok();
  check<std::invalid_argument>(n_tok <= static_cast<size_t>(most), "the step has ", n_tok,
                               " tokens, expected at most max_batch_tok = ", most);
}

std::vector<std::vector<Sampled>> run_step(const Model& model, Sampler& sampler, const std::vector<StepItem>& batch,
                                           const std::function<void()>& poll) {
  check_batch(model, batch);
  Prepared prepared(batch);
  Backend& backend = model.backend();
  const Plan plan(batch, backend.can_draw());
  forward(model, plan, poll);

  std::vector<std::vector<Sampled>> results(batch.size());
  const auto vocab_size = static_cast<size_t>(model.config().vocab_size);
  const int32_t* drawn = plan.draws.empty() ? nullptr : backend.drawn();
  const float* logits = plan.out_rows.empty() || drawn ? nullptr : backend.logits();
  for (size_t i = 0; i < batch.size(); ++i) {
    const StepItem& item = batch[i];
    const auto first = static_cast<size_t>(plan.first_out[i]);
    const auto n_rows = static_cast<size_t>(item.n_logit_rows());
    if (n_rows > 0) std::copy_n(logits + first * vocab_size, n_rows * vocab_size, item.logits_out);
    if (item.sampler && drawn) {
      results[i] = take_drawn(item, drawn + first);
    } else if (item.sampler) {
      const size_t row = n_rows > 0 ? first + n_rows - 1 : first;
      results[i] = sample_item(sampler, item, logits + row * vocab_size, model.config().vocab_size);
    }
  }
  poll();
  prepared.commit(results);
  return results;
}

std::vector<std::vector<Sampled>> run_steps(const Model& model, Sampler& sampler, std::vector<StepItem> batch,
                                            int n_more, const std::function<void()>& poll,
                                            const std::function<bool()>& enough) {
  check<std::invalid_argument>(n_more >= 0, "n_more is ", n_more, ", expected 0 or more");
  for (const StepItem& item : batch) {
    check<std::invalid_argument>(n_more == 0 || (item.sampler && item.wanted == LogitsWanted::none),
                                 "n_more needs a sampler for every item, and logits \"none\"");
  }
  const std::vector<int> n_past = lengths(batch);
  std::vector<std::vector<Sampled>> results = run_step(model, sampler, batch, poll);
  for (; n_more > 0 && feed_back(batch, results) && !enough(); --n_more) {
    std::vector<std::vector<Sampled>> more;
    try {
      for (auto& sampled : results) sampled.reserve(sampled.size() + 1);
      more = run_step(model, sampler, batch, poll);
    } catch (const Interrupted&) {
      for (size_t i = 0; i < batch.size(); ++i) batch[i].sequence->truncate(n_past[i]);
      throw;
    } catch (const std::exception&) {
      break;
    }
    for (size_t i = 0; i < batch.size(); ++i) results[i].push_back(std::move(more[i][0]));
  }
  return results;
}

}  // namespace pyllama
