// Chooses the next token from logits. Stages, in this order: logit bias, penalties, temperature, top-k, top-p, min-p,
// and one uniform draw over the survivors in ascending order of their ids, so that a stage that removes nothing changes
// nothing. The same numbers give the same token on every CPU: weights are integers (vocab.h), random numbers depend on
// a counter, comparisons are a strict total order. Knows no model, no text and no batch, and no instruction set:
// whoever makes a Sampler gives it the kernels.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "vocab.h"

namespace pyllama {

struct SamplerParams {
  double temperature = 1.0;         // 0: the largest logit; the lowest id wins ties
  int top_k = 0;                    // 0: off
  double top_p = 1.0;               // 1: off. The fewest most likely tokens whose probabilities reach it
  double min_p = 0.0;               // 0: off. Relative to the most likely token
  double repetition_penalty = 1.0;  // 1: off. Over prompt and reply (CTRL, arXiv 1909.05858, section 4.1)
  double presence_penalty = 0.0;    // over the reply alone, as are OpenAI's
  double frequency_penalty = 0.0;
  std::vector<std::pair<int32_t, float>> logit_bias;  // ids ascending
  int logprobs = -1;                                  // -1: none; n: of the sampled token and the n most likely ones
  uint64_t seed = 0;
  std::vector<int32_t> end_ids;  // ascending; not the sampler's: after one of these run_steps ends
};

// Throws std::invalid_argument that names the parameter. Ids of the bias are compared with the vocabulary by sample().
void check_sampler(const SamplerParams& params);

// What a token is chosen from.
struct SamplerInput {
  const float* logits = nullptr;  // [vocab_size]
  int vocab_size = 0;
  // All tokens so far, in two parts so that nobody has to join them; ids below vocab_size.
  const int32_t* past = nullptr;  // [n_past]
  int n_past = 0;
  const int32_t* fed = nullptr;  // [n_fed]
  int n_fed = 0;
  int prompt_len = 0;  // the tokens from this place on are the reply

  int n_tok() const { return n_past + n_fed; }
};

struct Sampled {
  int token = -1;
  float logprob = std::numeric_limits<float>::quiet_NaN();  // log-softmax of the logits as they came
  std::vector<std::pair<int32_t, float>> top_logprobs;
};

// Buffers that are reused from token to token.
class Sampler {
 public:
  explicit Sampler(const VocabKernels& kernels) : kernels_(kernels) {}

  // The random number depends on the seed and n_tok, the position that the token will have.
  // Throws FormatError for logits that are not finite, std::invalid_argument for a bias beyond the vocabulary or one
  // that bans every token.
  Sampled sample(const SamplerParams& params, const SamplerInput& in);

 private:
  // A token as one integer: order of its logit above, inverted id below. Larger is more likely; no two are equal.
  using Key = uint64_t;

  // Logits to choose from, the whole vocabulary's or the candidates' that top-k left.
  struct Choice {
    const float* logits;
    int n;
    float max;
  };

  // What a pass at temperature 1 over all logits gave: log-probabilities need no other.
  struct Whole {
    const float* logits = nullptr;
    float max = 0;
    uint64_t total = 0;
  };

  LargestLogit find_largest(const float* logits, int n);
  const float* adjust(const SamplerParams& params, const SamplerInput& in);
  void penalize(const SamplerParams& params, const SamplerInput& in);
  int choose(const SamplerParams& params, const Choice& all, uint64_t position);
  void select_top(const Choice& c, int k);
  uint64_t weigh_kept(const Choice& c, const SamplerParams& params);
  uint64_t weigh(const Choice& c, double temperature, double depth);
  Key nucleus_floor(const Choice& c, double temperature, uint64_t enough);
  void add_by_depth(const Choice& c, float per_logit, uint64_t (&sums)[256]) const;
  void gather(const Choice& c, float per_logit, int step);
  uint64_t keep(const Choice& c, Key floor, uint64_t least);
  int pick(uint64_t target) const;
  void report(const SamplerInput& in, int n_top, Sampled& out);

  const VocabKernels& kernels_;
  std::vector<float> adjusted_;    // [vocab_size] logits after bias and penalties
  std::vector<int32_t> counts_;    // [vocab_size] zero between calls
  std::vector<int32_t> ids_;       // of tokens that are penalized, or of candidates
  std::vector<float> candidates_;  // the logits that top-k left
  std::vector<float> maxima_;      // [block] of the logits that were looked at last
  std::vector<uint64_t> weights_;  // [blocks · kVocabBlock], where a block's sum is not 0
  std::vector<uint64_t> sums_;     // [block]
  std::vector<Key> keys_;
  Whole whole_;  // of the last pass within this call
};

}  // namespace pyllama
