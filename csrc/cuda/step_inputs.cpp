// See step_inputs.h.
#include "cuda/step_inputs.h"

#include <algorithm>

namespace pyllama {
namespace cuda {

namespace {

int pages_of(const Span& span) { return (span.pos + span.n_tok + kPageTok - 1) / kPageTok; }

}  // namespace

int64_t pages_of(const Step& step) {
  int64_t n = 0;
  for (int i = 0; i < step.n_spans; i++) n += pages_of(step.spans[i]);
  return n;
}

void StepInputs::reserve(int n_tok, int64_t n_pages) {
  max_tok_ = 0;  // should memory be short
  size_t bytes = 0;
  const auto place = [&](size_t n, size_t size_of_one) {
    const size_t begin = bytes;
    bytes += (n * size_of_one + 15) / 16 * 16;
    return begin;
  };
  const size_t tok = static_cast<size_t>(n_tok);
  place(tok, sizeof(int32_t));  // tokens
  pos_ = place(tok, sizeof(int32_t));
  out_rows_ = place(tok, sizeof(int32_t));
  draws_ = place(tok, sizeof(DrawRow));
  spans_ = place(tok, sizeof(DeviceSpan));
  own_pages_ = place(tok, sizeof(uint8_t*));
  pages_ = place(static_cast<size_t>(n_pages), sizeof(uint8_t*));
  device_ = Memory();
  device_ = Memory(bytes, "inputs of a step");
  host_ = HostMemory(bytes);
  max_tok_ = n_tok;
  max_pages_ = n_pages;
}

void StepInputs::set(const Step& step, const DevicePages& pages, int vocab_size) {
  std::copy_n(step.tokens, step.n_tok, on_host<int32_t>(0));
  std::copy_n(step.pos, step.n_tok, on_host<int32_t>(pos_));
  std::copy_n(step.out_rows, step.n_out, on_host<int32_t>(out_rows_));
  for (int i = 0; step.draws && i < step.n_out; i++) on_host<DrawRow>(draws_)[i] = draw_row(step.draws[i], vocab_size);
  auto* const spans = on_host<DeviceSpan>(spans_);
  auto* const own = on_host<uint8_t*>(own_pages_);
  auto* const all = on_host<uint8_t*>(pages_);
  int first_page = 0;
  for (int i = 0; i < step.n_spans; i++) {
    const Span& span = step.spans[i];
    spans[i] = {span.first, span.n_tok, span.pos, first_page};
    for (int t = 0; t < span.n_tok; t++) {
      own[span.first + t] = pages.address(span.pages[(span.pos + t) / kPageTok]);
    }
    const int n = pages_of(span);
    for (int p = 0; p < n; p++) all[first_page + p] = pages.address(span.pages[p]);
    first_page += n;
  }
}

void StepInputs::copy(Stream& stream, int64_t n_pages) const {
  const size_t bytes = pages_ + static_cast<size_t>(n_pages) * sizeof(uint8_t*);
  stream.copy_to_device(device_.data(), host_.as<void>(), bytes);
}

}  // namespace cuda
}  // namespace pyllama
