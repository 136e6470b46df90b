// The buffers of a step on the device, allocated once for the largest step, and those that grow with the context: what
// attention's splits leave for each other.
#pragma once

#include <cstddef>
#include <cstdint>

#include "config.h"
#include "cuda/activations.h"
#include "cuda/attention.h"
#include "cuda/draw.h"
#include "cuda/runtime.h"

namespace pyllama {
namespace cuda {

constexpr int kLogitRows = 64;  // that the head makes at once

// What decides about the buffers' sizes.
struct StepShape {
  const Config* config = nullptr;
  int max_tok = 0;
  bool gate_up = false;  // a layer has gate and up apart
  bool head = false;
};
size_t step_buffers_bytes(const StepShape& shape);

struct StepBuffers {
  StepBuffers() = default;
  explicit StepBuffers(const StepShape& shape);

  float *x = nullptr, *qkv = nullptr, *q = nullptr, *o = nullptr;  // [max_tok][dim | q_dim + 2 kv_dim | q_dim | q_dim]
  float *gate_up = nullptr, *h = nullptr;                          // [max_tok][2 hidden_dim | hidden_dim]
  float *cos = nullptr, *sin = nullptr;                            // [max_tok][head_dim/2]
  float* logits = nullptr;                                         // [kLogitRows, or max_tok if less][vocab_size]
  Activations activations;
  uint8_t* draw_room = nullptr;  // of draw_room_bytes()
  int32_t* drawn = nullptr;      // [max_tok]

 private:
  Memory memory_;
};

// Room for attend()'s partial results and its counters, which are zero between its calls.
class AttentionRoom {
 public:
  bool fits(const AttendRoom& need) const {
    return need.partials_bytes <= partials_.bytes() && need.arrived_bytes <= arrived_.bytes();
  }
  void reserve(Stream& stream, const AttendRoom& need);  // what was there must not be in use
  void set_to_zero(Stream& stream);                      // the counters, after a kernel that failed

  float* partials() const { return partials_.as<float>(); }
  int32_t* arrived() const { return arrived_.as<int32_t>(); }

 private:
  Memory partials_, arrived_;
};

}  // namespace cuda
}  // namespace pyllama
