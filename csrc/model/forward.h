// One step: new tokens of any number of sequences go through the model together, and next tokens are sampled where
// asked: one, or one more for every drafted token that turned out to be what would have been sampled. A step is atomic:
// when it throws, no sequence has changed. Steps that need nobody's decision in between can be had in one call.
// Scheduling, drafting, stop conditions and text are not its business.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "model/model.h"
#include "model/sampler.h"

namespace pyllama {

enum class LogitsWanted : uint8_t { none, last, all };

struct StepItem {
  Sequence* sequence = nullptr;
  std::vector<int32_t> tokens;             // at least one that is not a draft, then the drafts
  int n_draft = 0;                         // how many of them are guesses; only with a sampler and without logits
  const SamplerParams* sampler = nullptr;  // null: nothing is sampled
  LogitsWanted wanted = LogitsWanted::none;
  float* logits_out = nullptr;  // [1 or tokens.size(), vocab_size], filled when wanted

  int n_tok() const { return static_cast<int>(tokens.size()); }
  int n_logit_rows() const;
};

// Checks that a batch may run at all; changes nothing. std::invalid_argument for an empty item, a token outside the
// vocabulary, more than max_batch_tok tokens, a sequence of another model or one that stands twice, drafts without a
// sampler; ContextError when a sequence would outgrow max_seq_len.
void check_batch(const Model& model, const std::vector<StepItem>& batch);

// Runs the batch; per item the tokens that were sampled. The first follows the last token that is no draft; each next
// one follows a draft that equals the token sampled before it. So they are the tokens that as many steps of one token
// would have sampled, whatever was drafted, and the sequence then holds exactly what it would hold after those steps.
// `poll` is called between layers and may throw to stop the step. Not for two threads at once on one model. Throws what
// check_batch throws, and FormatError for logits that are not finite.
std::vector<std::vector<Sampled>> run_step(const Model& model, Sampler& sampler, const std::vector<StepItem>& batch,
                                           const std::function<void()>& poll);

// run_step, then up to `n_more` steps that feed every sequence the token just sampled for it: the tokens of as many
// calls of run_step. Every item must have a sampler and want no logits. Ends early after one of an item's `end_ids`,
// when `enough` says so between two steps, and before a further step that fails, which then is the next call's to
// report. Only Interrupted goes through, and then no sequence has changed.
std::vector<std::vector<Sampled>> run_steps(const Model& model, Sampler& sampler, std::vector<StepItem> batch,
                                            int n_more, const std::function<void()>& poll,
                                            const std::function<bool()>& enough);

}  // namespace pyllama
