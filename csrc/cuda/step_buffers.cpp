// See step_buffers.h.
#include "cuda/step_buffers.h"

#include <algorithm>

namespace pyllama {
namespace cuda {

namespace {

constexpr size_t kPlace = 256;

size_t placed(size_t bytes) { return (bytes + kPlace - 1) / kPlace * kPlace; }

// Calls take(pointer, bytes) for each buffer.
template <class Take>
void for_each_buffer(const StepShape& shape, StepBuffers& b, const Take& take) {
  const Config& c = *shape.config;
  const int max_tok = shape.max_tok;
  const size_t tok = static_cast<size_t>(max_tok);
  const auto floats = [&](float** to, size_t n) { take(reinterpret_cast<void**>(to), n * sizeof(float)); };
  const size_t dim = static_cast<size_t>(c.dim), q_dim = static_cast<size_t>(c.q_dim());
  const size_t kv_dim = static_cast<size_t>(c.kv_dim()), hidden_dim = static_cast<size_t>(c.hidden_dim);
  floats(&b.x, tok * dim);
  floats(&b.qkv, tok * (q_dim + 2 * kv_dim));
  floats(&b.q, tok * q_dim);
  floats(&b.o, tok * q_dim);
  if (shape.gate_up) floats(&b.gate_up, tok * 2 * hidden_dim);
  floats(&b.h, tok * hidden_dim);
  floats(&b.cos, tok * static_cast<size_t>(c.head_dim / 2));
  floats(&b.sin, tok * static_cast<size_t>(c.head_dim / 2));
  if (shape.head) {
    floats(&b.logits, static_cast<size_t>(std::min(max_tok, kLogitRows)) * static_cast<size_t>(c.vocab_size));
    take(reinterpret_cast<void**>(&b.draw_room), draw_room_bytes(c.vocab_size));
    take(reinterpret_cast<void**>(&b.drawn), tok * sizeof(int32_t));
  }
  const ActivationSizes sizes = activation_sizes(std::max({c.dim, c.q_dim(), c.hidden_dim}), max_tok);
  take(reinterpret_cast<void**>(&b.activations.values), sizes.values_bytes);
  take(reinterpret_cast<void**>(&b.activations.sums), sizes.sums_bytes);
  take(reinterpret_cast<void**>(&b.activations.scales), sizes.scales_bytes);
}

}  // namespace

size_t step_buffers_bytes(const StepShape& shape) {
  StepBuffers none;
  size_t bytes = 0;
  for_each_buffer(shape, none, [&](void**, size_t n) { bytes += placed(n); });
  return bytes;
}

StepBuffers::StepBuffers(const StepShape& shape) : memory_(step_buffers_bytes(shape), "buffers of a step") {
  uint8_t* next = memory_.as<uint8_t>();
  for_each_buffer(shape, *this, [&](void** to, size_t n) {
    *to = next;
    next += placed(n);
  });
}

void AttentionRoom::reserve(Stream& stream, const AttendRoom& need) {
  stream.make_current();
  const AttendRoom want{std::max(need.partials_bytes, partials_.bytes()),
                        std::max(need.arrived_bytes, arrived_.bytes())};
  partials_ = Memory();
  arrived_ = Memory();
  if (want.partials_bytes) partials_ = Memory(want.partials_bytes, "attention's partial results");
  if (want.arrived_bytes) arrived_ = Memory(want.arrived_bytes, "attention's counters");
  set_to_zero(stream);
}

void AttentionRoom::set_to_zero(Stream& stream) {
  if (arrived_.bytes()) stream.fill(arrived_.data(), 0, arrived_.bytes());
}

}  // namespace cuda
}  // namespace pyllama
