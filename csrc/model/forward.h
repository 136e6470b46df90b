// One step: new tokens of any number of sequences go through the model together, and a next token is sampled where
// asked. A step is atomic: when it throws, no sequence has changed. Scheduling, stop conditions and text are not its
// business.
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
  std::vector<int32_t> tokens;             // at least one
  const SamplerParams* sampler = nullptr;  // null: nothing is sampled
  LogitsWanted wanted = LogitsWanted::none;
  float* logits_out = nullptr;  // [1 or tokens.size(), vocab_size], filled when wanted

  int n_tok() const { return static_cast<int>(tokens.size()); }
  int n_logit_rows() const;
};

// Checks that a batch may run at all; changes nothing. std::invalid_argument for an empty item, a token outside the
// vocabulary, more than max_batch_tok tokens, a sequence of another model or one that stands twice;
// ContextError when a sequence would outgrow max_seq_len.
void check_batch(const Model& model, const std::vector<StepItem>& batch);

// Runs the batch; one result per item. `poll` is called between layers and may throw to stop the step. Not for two
// threads at once on one model. Throws what check_batch throws, and FormatError for logits that are not finite.
std::vector<Sampled> run_step(const Model& model, Sampler& sampler, const std::vector<StepItem>& batch,
                              const std::function<void()>& poll);

}  // namespace pyllama
