// What differs from step to step, as kernels read it: tokens, positions, rows of the logits and how to draw from them,
// spans, page addresses. The host writes it into pinned memory, and one copy brings it to fixed places on the device,
// so that a recorded graph finds the next step's where it found the last one's.
#pragma once

#include <cstddef>
#include <cstdint>

#include "backend.h"
#include "cuda/attention.h"
#include "cuda/device_pages.h"
#include "cuda/draw.h"
#include "cuda/runtime.h"

namespace pyllama {
namespace cuda {

class StepInputs {
 public:
  // Room for steps of up to n_tok tokens, and n_pages pages of all spans together. Nothing may be at work that uses
  // what was there before.
  void reserve(int n_tok, int64_t n_pages);
  bool fits(int n_tok, int64_t n_pages) const { return n_tok <= max_tok_ && n_pages <= max_pages_; }

  // Writes a step on the host.
  void set(const Step& step, const DevicePages& pages, int vocab_size);
  // Copies it to the device, with as many of the spans' pages as `n_pages` counts.
  void copy(Stream& stream, int64_t n_pages) const;

  // On the device.
  const int32_t* tokens() const { return at<int32_t>(0); }
  const int32_t* pos() const { return at<int32_t>(pos_); }
  const int32_t* out_rows() const { return at<int32_t>(out_rows_); }
  const DrawRow* draws() const { return at<DrawRow>(draws_); }
  const DeviceSpan* spans() const { return at<DeviceSpan>(spans_); }
  uint8_t* const* own_pages() const { return at<uint8_t*>(own_pages_); }  // [n_tok] that each token is written to
  uint8_t* const* pages() const { return at<uint8_t*>(pages_); }          // of all spans, one after the other

 private:
  template <class T>
  T* at(size_t offset) const {
    return reinterpret_cast<T*>(device_.as<uint8_t>() + offset);
  }
  template <class T>
  T* on_host(size_t offset) const {
    return reinterpret_cast<T*>(host_.as<uint8_t>() + offset);
  }

  int max_tok_ = 0;
  int64_t max_pages_ = 0;
  size_t pos_ = 0, out_rows_ = 0, draws_ = 0, spans_ = 0, own_pages_ = 0, pages_ = 0;  // where they begin
  Memory device_;
  HostMemory host_;
};

// Pages of all spans of a step together.
int64_t pages_of(const Step& step);

}  // namespace cuda
}  // namespace pyllama
