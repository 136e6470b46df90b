// The stages, one function each. Sums are taken in double in a fixed order, comparisons are a strict total order
// (logit, then lower id), exp and log are our own: no result depends on a library or an instruction set. What costs a
// pass over the vocabulary is done at most once, and only a handful of tokens is ever sorted.
#include "model/sampler.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>

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

// Lanes of their own let the compiler use whole registers; a maximum is the same in any order.
float max_of(const float* x, int n) {
  constexpr int kLanes = 16;
  float lanes[kLanes];
  std::fill_n(lanes, kLanes, kBanned);
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) lanes[j] = x[i + j] > lanes[j] ? x[i + j] : lanes[j];
  }
  float best = *std::max_element(lanes, lanes + kLanes);
  for (; i < n; ++i) best = x[i] > best ? x[i] : best;
  return best;
}

int argmax(const float* x, int n) { return static_cast<int>(std::find(x, x + n, max_of(x, n)) - x); }

bool all_finite(const float* x, int n) {
  uint32_t bad = 0;
  for (int i = 0; i < n; ++i) bad |= (float_bits(x[i]) & 0x7f800000u) == 0x7f800000u;
  return bad == 0;
}

// e^((logit - max) / temperature): at most 1, and exactly 1 for the most likely token.
double relative_mass(float logit, float max_logit, double temperature) {
  return portable_exp((static_cast<double>(logit) - max_logit) / temperature);
}

// The k most likely tokens, unordered. Ids ascend, so that of two equal logits the later one never displaces the
// earlier.
void select_top(const float* logits, int n, int k, std::vector<uint64_t>& keys) {
  const size_t wanted = static_cast<size_t>(k);
  const size_t room = 2 * wanted + 256;
  float threshold = kBanned;
  keys.clear();
  const auto shrink = [&] {
    if (keys.size() <= wanted) return;
    std::nth_element(keys.begin(), keys.begin() + (k - 1), keys.end(), std::greater<>());
    keys.resize(wanted);
    threshold = key_logit(keys[wanted - 1]);
  };
  for (int id = 0; id < n; ++id) {
    if (!(logits[id] > threshold)) continue;
    keys.push_back(make_key(logits[id], id));
    if (keys.size() == room) shrink();
  }
  shrink();
}

}  // namespace

void check_sampler(const SamplerParams& p) {
  const auto demand = [](bool ok, const char* name, double value, const char* expected) {
    check<std::invalid_argument>(ok, name, " is ", value, ", expected ", expected);
  };
  demand(std::isfinite(p.temperature) && p.temperature >= 0, "temperature", p.temperature,
         "a finite number, 0 or more");
  demand(p.top_k >= 0, "top_k", p.top_k, "0 (off) or more");
  demand(p.top_p > 0 && p.top_p <= 1, "top_p", p.top_p, "a number above 0, at most 1");
  demand(p.min_p >= 0 && p.min_p <= 1, "min_p", p.min_p, "a number in 0…1");
  demand(std::isfinite(p.repetition_penalty) && p.repetition_penalty > 0, "repetition_penalty", p.repetition_penalty,
         "a finite number above 0");
  demand(std::isfinite(p.presence_penalty), "presence_penalty", p.presence_penalty, "a finite number");
  demand(std::isfinite(p.frequency_penalty), "frequency_penalty", p.frequency_penalty, "a finite number");
  demand(p.logprobs >= -1, "logprobs", p.logprobs, "-1 (off) or more");
  for (const auto& [id, bias] : p.logit_bias) {
    check<std::invalid_argument>(id >= 0 && (std::isfinite(bias) || bias == kBanned), "logit_bias of token ", id,
                                 " is ", bias, ", expected a token id, and a finite number or -inf");
  }
}

Sampled Sampler::sample(const SamplerParams& params, const SamplerInput& in) {
  check(all_finite(in.logits, in.vocab_size), "logits are not finite at position ", in.n_tok() - 1,
        ": the weights hold NaN or overflow");
  Sampled out;
  const float* logits = adjust(params, in);
  if (params.temperature == 0) {
    out.token = argmax(logits, in.vocab_size);
    check<std::invalid_argument>(logits[out.token] != kBanned, "logit_bias bans every token");
  } else {
    out.token = draw(params, logits, in.vocab_size, static_cast<uint64_t>(in.n_tok()));
  }
  if (params.logprobs >= 0) report(in, params.logprobs, out);
  return out;
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
    double x = logit;
    x = x > 0 ? x / params.repetition_penalty : x * params.repetition_penalty;
    if (in_reply > 0) x -= params.presence_penalty + params.frequency_penalty * in_reply;
    logit = static_cast<float>(std::min<double>(x, std::numeric_limits<float>::max()));
  }
}

int Sampler::draw(const SamplerParams& params, const float* logits, int vocab_size, uint64_t position) {
  const float max_logit = max_of(logits, vocab_size);
  check<std::invalid_argument>(max_logit != kBanned, "logit_bias bans every token");
  const double u = uniform(params.seed, position);
  if (params.top_k > 0 && params.top_k < vocab_size) {
    keep_top_k(logits, vocab_size, params.top_k);
    return draw_from_ranked(params, max_logit, u);
  }
  mass_.resize(static_cast<size_t>(vocab_size));
  for (int id = 0; id < vocab_size; ++id) {
    mass_[static_cast<size_t>(id)] = relative_mass(logits[id], max_logit, params.temperature);
  }
  if (params.top_p < 1) {
    const Key floor = nucleus_floor(params, logits, max_logit);
    for (int id = 0; id < vocab_size; ++id) {
      if (make_key(logits[id], id) < floor) mass_[static_cast<size_t>(id)] = 0;
    }
  }
  if (params.min_p > 0) {
    for (double& mass : mass_) mass = mass < params.min_p ? 0.0 : mass;
  }
  return static_cast<int>(draw_index(u));
}

// keys_ = the k most likely tokens, most likely first.
void Sampler::keep_top_k(const float* logits, int vocab_size, int k) {
  select_top(logits, vocab_size, k, keys_);
  std::sort(keys_.begin(), keys_.end(), std::greater<>());
}

// Top-p and min-p over the few tokens that top-k left in keys_, then the draw.
int Sampler::draw_from_ranked(const SamplerParams& params, float max_logit, double u) {
  const auto mass_of = [&](Key key) { return relative_mass(key_logit(key), max_logit, params.temperature); };
  double total = 0;
  for (const Key key : keys_) total += mass_of(key);
  const double enough = params.top_p < 1 ? params.top_p * total : std::numeric_limits<double>::infinity();
  double sum = 0;
  size_t n_kept = 0;
  while (n_kept < keys_.size() && sum < enough) {
    const double mass = mass_of(keys_[n_kept]);
    if (mass < params.min_p) break;
    sum += mass;
    ++n_kept;
  }
  keys_.resize(n_kept);
  std::sort(keys_.begin(), keys_.end(), [](Key a, Key b) { return key_id(a) < key_id(b); });
  mass_.clear();
  for (const Key key : keys_) mass_.push_back(mass_of(key));
  return key_id(keys_[draw_index(u)]);
}

// The least likely token that top-p keeps. The nucleus may be most of the vocabulary, so nothing is sorted but the one
// bucket, of many that split the range of the logits, in which the sum reaches top_p.
Sampler::Key Sampler::nucleus_floor(const SamplerParams& params, const float* logits, float max_logit) {
  constexpr int kBuckets = 1024;
  constexpr double kPerNat = 32;
  const auto bucket_of = [&](size_t id) {
    const double depth = (static_cast<double>(max_logit) - logits[id]) / params.temperature * kPerNat;
    return depth < kBuckets - 1 ? static_cast<int>(depth) : kBuckets - 1;
  };
  double buckets[kBuckets] = {};
  double total = 0;
  for (size_t id = 0; id < mass_.size(); ++id) {
    buckets[bucket_of(id)] += mass_[id];
    total += mass_[id];
  }
  const double enough = params.top_p * total;
  double sum = 0;
  int last = 0;
  while (last < kBuckets && sum + buckets[last] < enough) sum += buckets[last++];

  keys_.clear();
  for (size_t id = 0; id < mass_.size(); ++id) {
    if (bucket_of(id) == last) keys_.push_back(make_key(logits[id], static_cast<int>(id)));
  }
  std::sort(keys_.begin(), keys_.end(), std::greater<>());
  for (const Key key : keys_) {
    sum += mass_[static_cast<size_t>(key_id(key))];
    if (sum >= enough) return key;
  }
  return 0;  // rounding kept the sum below a top_p next to 1: everything stays
}

// The candidate at which the running sum of mass_ passes u times the whole.
size_t Sampler::draw_index(double u) {
  double sum = 0;
  for (double& mass : mass_) mass = sum += mass;
  auto chosen = std::upper_bound(mass_.begin(), mass_.end(), u * sum);
  // u * sum may round up to sum: then the last candidate that has any mass.
  if (chosen == mass_.end()) chosen = std::lower_bound(mass_.begin(), mass_.end(), sum);
  return static_cast<size_t>(chosen - mass_.begin());
}

void Sampler::report(const SamplerInput& in, int n_top, Sampled& out) {
  const double max_logit = max_of(in.logits, in.vocab_size);
  double total = 0;
  for (int id = 0; id < in.vocab_size; ++id) total += portable_exp(in.logits[id] - max_logit);
  const double log_total = portable_log(total);
  const auto logprob = [&](float logit) { return static_cast<float>((logit - max_logit) - log_total); };
  out.logprob = logprob(in.logits[out.token]);
  if (n_top == 0) return;
  keep_top_k(in.logits, in.vocab_size, std::min(n_top, in.vocab_size));
  for (const Key key : keys_) out.top_logprobs.emplace_back(key_id(key), logprob(key_logit(key)));
}

}  // namespace pyllama
