// The next tokens, drawn from logits on the device: those that csrc/model/sampler.h would draw from the same logits, to
// the last one, for its weights are integers (vocab.h), whose sums know no order. So a step brings a few token ids to
// the host and not its logits. Temperature, top-k, top-p and min-p; penalties, biases and log-probabilities are left to
// the host.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/runtime.h"

namespace pyllama {

struct Draw;  // backend.h

namespace cuda {

constexpr int kDrawRows = 8;  // that are drawn at once

// A row's filters as the kernels want them.
struct DrawRow {
  double scale;    // log2(e) / temperature
  double top_p;    // 1: off
  uint64_t least;  // the weight that min-p asks for; 0: off
  uint64_t random;
  float per_logit;  // steps of the search, for a logit
  int32_t top_k;    // 0: off
  int32_t greedy;   // the largest logit, the lowest id of equal ones; all else is left aside
  int32_t reserved;
};
DrawRow draw_row(const Draw& draw, int vocab_size);

// What is kept of up to kDrawRows rows between the kernels.
size_t draw_room_bytes(int vocab_size);

// All pointers are to device memory.
struct DrawTokens {
  const float* logits = nullptr;  // [n_rows][vocab_size]
  int vocab_size = 0;             // at most kMaxVocab of vocab.h
  int n_rows = 0;                 // at most kDrawRows
  const DrawRow* rows = nullptr;  // [n_rows]
  uint8_t* room = nullptr;        // of draw_room_bytes(vocab_size)
  int32_t* tokens = nullptr;      // [n_rows]; -1 where a logit is not finite
};
void draw_tokens(Stream& stream, const DrawTokens& args);

}  // namespace cuda
}  // namespace pyllama
