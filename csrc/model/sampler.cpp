// The stages, one function each. A pass over the vocabulary that needs arithmetic is a kernel's; the others skip the
// blocks whose maximum rules them out. Nothing is ever sorted but the few tokens of a top-k: a nucleus, which may be
// most of the vocabulary, ends where a search by digits of the key says.
#include "model/sampler.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <numeric>

#include "error.h"
#include "model/portable_math.h"

namespace pyllama {
namespace {

constexpr float kBanned = -std::numeric_limits<float>::infinity();

uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

uint64_t make_key(float logit, int id) {
  const uint32_t bits = float_bits(logit + 0.0f);  // -0 becomes 0: they are equal
  const uint32_t ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return (uint64_t{ordered} << 32) | ~static_cast<uint32_t>(id);
}

int key_id(uint64_t key) { return static_cast<int>(~static_cast<uint32_t>(key)); }

float key_logit(uint64_t key) {
  const auto ordered = static_cast<uint32_t>(key >> 32);
  const uint32_t bits = ordered & 0x80000000u ? ordered ^ 0x80000000u : ~ordered;
  float logit;
  std::memcpy(&logit, &bits, sizeof logit);
  return logit;
}

// Of temperature and penalties, beyond what anybody means: logits that lie further apart than a float tells have no
// weight beside each other at any temperature, and penalties stay finite in double.
constexpr double kLargestOption = 1e30;

constexpr double kNoWeight = 32;  // e^-32 < 2^-45: a weight that rounds to 0

__extension__ using Wide = unsigned __int128;

// The 53 bits of a number in [0, 1) of a whole, rounded down.
uint64_t share(uint64_t whole, uint64_t bits) { return static_cast<uint64_t>((Wide{whole} * bits) >> 53); }

// The share p < 1 of a whole, rounded up, at least 1; in double, where 0.9 of 3000 equal tokens are 2700 of them.
uint64_t share_up(uint64_t whole, double p) {
  const auto part = static_cast<uint64_t>(std::ceil(static_cast<double>(whole) * p));
  return std::clamp<uint64_t>(part, 1, whole);
}

// p rounded as weights are (vocab.h).
uint64_t weight_of(double p) { return double_bits(p + 0x1.8p8) - double_bits(0x1.8p8); }

// How far a logit lies below the largest, as one of 255 steps; 255 is all that is deeper.
int depth_step(float max, float logit, float per_logit) {
  const float depth = (max - logit) * per_logit;
  return static_cast<int>(depth < 255.0f ? depth : 255.0f);
}

std::pair<uint64_t, uint64_t> range(const std::vector<uint64_t>& keys) {
  uint64_t low = keys[0], high = keys[0];
  for (const uint64_t key : keys) {
    low = key < low ? key : low;
    high = key > high ? key : high;
  }
  return {low, high};
}

}  // namespace

void check_sampler(const SamplerParams& p) {
  const auto demand = [](bool ok, const char* name, double value, const char* expected) {
    check<std::invalid_argument>(ok, name, " is ", value, ", expected ", expected);
  };
  demand(p.temperature >= 0 && p.temperature <= kLargestOption, "temperature", p.temperature, "a number in 0…1e30");
  demand(p.top_k >= 0, "top_k", p.top_k, "0 (off) or more");
  demand(p.top_p > 0 && p.top_p <= 1, "top_p", p.top_p, "a number above 0, at most 1");
  demand(p.min_p >= 0 && p.min_p <= 1, "min_p", p.min_p, "a number in 0…1");
  demand(p.repetition_penalty >= 1 / kLargestOption && p.repetition_penalty <= kLargestOption, "repetition_penalty",
         p.repetition_penalty, "a number in 1e-30…1e30");
  demand(std::abs(p.presence_penalty) <= kLargestOption, "presence_penalty", p.presence_penalty,
         "a number in -1e30…1e30");
  demand(std::abs(p.frequency_penalty) <= kLargestOption, "frequency_penalty", p.frequency_penalty,
         "a number in -1e30…1e30");
  demand(p.logprobs >= -1, "logprobs", p.logprobs, "-1 (off) or more");
  for (const auto& [id, bias] : p.logit_bias) {
    check<std::invalid_argument>(id >= 0 && (std::isfinite(bias) || bias == kBanned), "logit_bias of token ", id,
                                 " is ", bias, ", expected a token id, and a finite number or -inf");
  }
}

Sampled Sampler::sample(const SamplerParams& params, const SamplerInput& in) {
  check(in.vocab_size <= kMaxVocab, "a vocabulary of ", in.vocab_size, " tokens, expected at most ", kMaxVocab);
  whole_ = {};
  const LargestLogit raw = find_largest(in.logits, in.vocab_size);
  check(raw.finite, "logits are not finite at position ", in.n_tok() - 1, ": the weights hold NaN or overflow");
  const float* logits = adjust(params, in);
  const float max = logits == in.logits ? raw.value : find_largest(logits, in.vocab_size).value;
  check<std::invalid_argument>(max != kBanned, "logit_bias bans every token");
  Sampled out;
  out.token = choose(params, {logits, in.vocab_size, max}, static_cast<uint64_t>(in.n_tok()));
  if (params.logprobs >= 0) report(in, params.logprobs, out);
  return out;
}

LargestLogit Sampler::find_largest(const float* logits, int n) {
  maxima_.resize(vocab_blocks(n));
  return kernels_.largest(logits, n, maxima_.data());
}

// Logit bias and penalties, in a copy; the logits themselves when there is nothing to do.
const float* Sampler::adjust(const SamplerParams& params, const SamplerInput& in) {
  const bool penalties =
      params.repetition_penalty != 1 || params.presence_penalty != 0 || params.frequency_penalty != 0;
  if (!penalties && params.logit_bias.empty()) return in.logits;
  adjusted_.assign(in.logits, in.logits + in.vocab_size);
  for (const auto& [id, bias] : params.logit_bias) {
    check<std::invalid_argument>(id < in.vocab_size, "logit_bias names token ", id, ", the vocabulary has ",
                                 in.vocab_size);
    const double sum = static_cast<double>(adjusted_[static_cast<size_t>(id)]) + bias;
    adjusted_[static_cast<size_t>(id)] = static_cast<float>(std::min<double>(sum, std::numeric_limits<float>::max()));
  }
  if (penalties) penalize(params, in);
  return adjusted_.data();
}

void Sampler::penalize(const SamplerParams& params, const SamplerInput& in) {
  // counts_: how often a token stands in the reply, plus one if it stands anywhere.
  counts_.resize(static_cast<size_t>(in.vocab_size), 0);
  ids_.clear();
  const auto take = [&](const int32_t* tokens, int n, int first) {
    for (int i = 0; i < n; ++i) {
      int32_t& count = counts_[static_cast<size_t>(tokens[i])];
      if (count == 0) {
        ids_.push_back(tokens[i]);
        count = 1;
      }
      if (first + i >= in.prompt_len) ++count;
    }
  };
  take(in.past, in.n_past, 0);
  take(in.fed, in.n_fed, in.n_past);
  for (const int32_t id : ids_) {
    float& logit = adjusted_[static_cast<size_t>(id)];
    const int in_reply = counts_[static_cast<size_t>(id)] - 1;
    counts_[static_cast<size_t>(id)] = 0;
    if (logit == kBanned) continue;
    double x = logit;
    x = x > 0 ? x / params.repetition_penalty : x * params.repetition_penalty;
    if (in_reply > 0) x -= params.presence_penalty + params.frequency_penalty * in_reply;
    constexpr double kLargest = std::numeric_limits<float>::max();
    logit = static_cast<float>(std::clamp(x, -kLargest, kLargest));
  }
}

// The most likely token, or one drawn from what the filters keep.
int Sampler::choose(const SamplerParams& params, const Choice& all, uint64_t position) {
  if (params.temperature == 0) {
    const auto block = std::find(maxima_.begin(), maxima_.end(), all.max) - maxima_.begin();
    return static_cast<int>(std::find(all.logits + block * kVocabBlock, all.logits + all.n, all.max) - all.logits);
  }
  const uint64_t random = uniform_bits(params.seed, position);
  if (params.top_k == 0 || params.top_k >= all.n) return pick(share(weigh_kept(all, params), random));
  select_top(all, params.top_k);
  std::sort(keys_.begin(), keys_.end(), [](Key a, Key b) { return key_id(a) < key_id(b); });
  ids_.clear();
  candidates_.clear();
  for (const Key key : keys_) {
    ids_.push_back(key_id(key));
    candidates_.push_back(key_logit(key));
  }
  const Choice few{candidates_.data(), static_cast<int>(candidates_.size()), all.max};
  find_largest(few.logits, few.n);
  return ids_[static_cast<size_t>(pick(share(weigh_kept(few, params), random)))];
}

// keys_ = the k most likely tokens, in no order. Ids ascend, so that of two equal logits the later one never displaces
// the earlier.
void Sampler::select_top(const Choice& c, int k) {
  const size_t wanted = static_cast<size_t>(k);
  const size_t room = 2 * wanted + 256;
  float threshold = kBanned;
  keys_.clear();
  const auto shrink = [&] {
    if (keys_.size() <= wanted) return;
    std::nth_element(keys_.begin(), keys_.begin() + (k - 1), keys_.end(), std::greater<>());
    keys_.resize(wanted);
    threshold = key_logit(keys_[wanted - 1]);
  };
  for (size_t block = 0; block < maxima_.size(); ++block) {
    if (!(maxima_[block] > threshold)) continue;
    const int begin = static_cast<int>(block) * kVocabBlock, end = std::min(begin + kVocabBlock, c.n);
    for (int id = begin; id < end; ++id) {
      if (!(c.logits[id] > threshold)) continue;
      keys_.push_back(make_key(c.logits[id], id));
      if (keys_.size() == room) shrink();
    }
  }
  shrink();
}

// weights_ and sums_ of what top-p and min-p keep; their sum.
uint64_t Sampler::weigh_kept(const Choice& c, const SamplerParams& params) {
  const uint64_t least = weight_of(params.min_p);
  Key floor = make_key(kBanned, c.n);  // below all
  if (params.top_p < 1) {
    floor = nucleus_floor(c, params.temperature, share_up(weigh(c, params.temperature, kNoWeight), params.top_p));
  } else {
    const double depth = least > 0 ? std::min(1e-6 - portable_log(params.min_p), kNoWeight) : kNoWeight;
    const uint64_t total = weigh(c, params.temperature, depth);
    if (least == 0) return total;
  }
  return keep(c, floor, least);
}

// weights_ and sums_ of the blocks that have logits within depth · temperature of the largest; their sum. Needs
// maxima_.
uint64_t Sampler::weigh(const Choice& c, double temperature, double depth) {
  sums_.resize(maxima_.size());
  if (weights_.size() < sums_.size() * kVocabBlock) weights_.resize(sums_.size() * kVocabBlock);
  const double scale = std::min(0x1.71547652b82fep0 / temperature, std::numeric_limits<double>::max());  // log2(e) / T
  kernels_.weigh(c.logits, c.n, maxima_.data(), c.max - depth * temperature, c.max, scale, weights_.data(),
                 sums_.data());
  const uint64_t total = std::accumulate(sums_.begin(), sums_.end(), uint64_t{0});
  if (temperature == 1 && depth == kNoWeight) whole_ = {c.logits, c.max, total};
  return total;
}

// The least likely token that top-p keeps: the last of the fewest most likely ones whose weights reach `enough`.
Sampler::Key Sampler::nucleus_floor(const Choice& c, double temperature, uint64_t enough) {
  // First by how far below the largest logit: one of 255 steps of the nearest nats, or of more if it is not there.
  uint64_t sums[256];
  float per_logit;
  for (double nats = 7;; nats *= 4) {
    per_logit = static_cast<float>(std::min(255 / (nats * temperature), 1e38));
    add_by_depth(c, per_logit, sums);
    if (std::accumulate(sums, sums + 255, uint64_t{0}) >= enough) break;
  }
  int step = 0;
  while (sums[step] < enough) enough -= sums[step++];
  gather(c, per_logit, step);
  // Then by digits of the key. What stood before keys_ is in the nucleus, what stood behind is not.
  for (;;) {
    const auto [low, high] = range(keys_);
    if (low == high) return low;
    int shift = 0;
    while ((high - low) >> shift > 255) ++shift;
    const auto digit_of = [low = low, shift](Key key) { return static_cast<size_t>((key - low) >> shift); };
    std::fill_n(sums, 256, 0);
    for (const Key key : keys_) sums[digit_of(key)] += weights_[static_cast<size_t>(key_id(key))];
    size_t digit = 255;
    while (sums[digit] < enough) enough -= sums[digit--];
    keys_.erase(std::remove_if(keys_.begin(), keys_.end(), [&](Key key) { return digit_of(key) != digit; }),
                keys_.end());
  }
}

// sums[depth_step()] = of the weights there; blocks that are deeper than all steps are passed over.
void Sampler::add_by_depth(const Choice& c, float per_logit, uint64_t (&sums)[256]) const {
  uint64_t odd[256] = {};  // of every other token: neighbours may be of one step, and would wait for each other
  std::fill_n(sums, 256, 0);
  for (size_t block = 0; block < maxima_.size(); ++block) {
    if (sums_[block] == 0 || depth_step(c.max, maxima_[block], per_logit) == 255) continue;
    const size_t begin = block * kVocabBlock, end = std::min(begin + kVocabBlock, static_cast<size_t>(c.n));
    int steps[kVocabBlock];
    for (size_t id = begin; id < end; ++id) steps[id - begin] = depth_step(c.max, c.logits[id], per_logit);
    for (size_t id = begin; id < end; ++id) (id % 2 == 0 ? sums : odd)[steps[id - begin]] += weights_[id];
  }
  for (int i = 0; i < 256; ++i) sums[i] += odd[i];
}

// keys_ = the tokens of this step.
void Sampler::gather(const Choice& c, float per_logit, int step) {
  keys_.clear();
  for (size_t block = 0; block < maxima_.size(); ++block) {
    if (sums_[block] == 0 || depth_step(c.max, maxima_[block], per_logit) > step) continue;
    const int begin = static_cast<int>(block) * kVocabBlock, end = std::min(begin + kVocabBlock, c.n);
    for (int id = begin; id < end; ++id) {
      if (depth_step(c.max, c.logits[id], per_logit) == step) keys_.push_back(make_key(c.logits[id], id));
    }
  }
}

// Takes the weight from tokens below `floor` and from those that have less than `least`; the sum of what remains.
uint64_t Sampler::keep(const Choice& c, Key floor, uint64_t least) {
  const float at_least = key_logit(floor);
  const int last = key_id(floor);  // of those that are equal to it
  uint64_t total = 0;
  for (size_t block = 0; block < maxima_.size(); ++block) {
    uint64_t sum = 0;
    if (sums_[block] > 0 && maxima_[block] >= at_least) {
      const int begin = static_cast<int>(block) * kVocabBlock, end = std::min(begin + kVocabBlock, c.n);
      uint64_t* weights = weights_.data() + begin;
      const float* logits = c.logits + begin;
      for (int i = 0; i < end - begin; ++i) weights[i] = logits[i] >= at_least ? weights[i] : 0;
      for (int i = std::max(last + 1 - begin, 0); i < end - begin; ++i)
        weights[i] = logits[i] > at_least ? weights[i] : 0;
      if (least > 0) {
        for (int i = 0; i < end - begin; ++i) weights[i] = weights[i] >= least ? weights[i] : 0;
      }
      sum = std::accumulate(weights, weights + (end - begin), uint64_t{0});
    }
    sums_[block] = sum;
    total += sum;
  }
  return total;
}

// The token at which the running sum of the weights passes `target`, which is below the whole.
int Sampler::pick(uint64_t target) const {
  size_t block = 0;
  while (target >= sums_[block]) target -= sums_[block++];
  size_t id = block * kVocabBlock;
  while (target >= weights_[id]) target -= weights_[id++];
  return static_cast<int>(id);
}

void Sampler::report(const SamplerInput& in, int n_top, Sampled& out) {
  if (whole_.logits != in.logits) {  // else the token was drawn by the very weights, and maxima_ are theirs
    weigh({in.logits, in.vocab_size, find_largest(in.logits, in.vocab_size).value}, 1.0, kNoWeight);
  }
  const double max = whole_.max, log_total = portable_log(static_cast<double>(whole_.total) / kWeightOne);
  const auto logprob = [&](float logit) { return static_cast<float>((static_cast<double>(logit) - max) - log_total); };
  out.logprob = logprob(in.logits[out.token]);
  if (n_top == 0) return;
  select_top({in.logits, in.vocab_size, whole_.max}, std::min(n_top, in.vocab_size));
  std::sort(keys_.begin(), keys_.end(), std::greater<>());
  for (const Key key : keys_) out.top_logprobs.emplace_back(key_id(key), logprob(key_logit(key)));
}

}  // namespace pyllama
