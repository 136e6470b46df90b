// Attention of a step over the paged cache, whatever its spans are: what the kernels take, and the function that
// chooses among them. Spans of at most kFewSpanTok tokens (decoding, guesses to be verified) go to attention_few.h,
// where keys are split over blocks; longer ones, prompts, to attention_many.h, where a key is read once for many rows.
// A span's own length decides, so that what a token gets does not depend on the rest of the step.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/cache.h"

namespace pyllama {
namespace cuda {

constexpr int kFewSpanTok = 8;

// A run of consecutive tokens of one sequence inside a step, as Span of backend.h.
struct DeviceSpan {
  int32_t first;  // row of its first token in the step
  int32_t n_tok;
  int32_t pos;    // absolute position of its first token
  int32_t pages;  // index in AttendBuffers::pages of its first page; spans' pages follow each other as spans do
};

// All pointers are to device memory.
struct AttendBuffers {
  const float* q = nullptr;  // [n_tok][n_heads·head_dim], rotated
  float* o = nullptr;        // [n_tok][n_heads·head_dim]
  const DeviceSpan* spans = nullptr;
  uint8_t* const* pages = nullptr;  // of all spans: those that cover positions 0 … pos + n_tok - 1
  // Room for what the splits give, of attend_room(), and counters that are zero before and after.
  float* partials = nullptr;
  int32_t* arrived = nullptr;
};

// The step's shape as far as a recorded graph must know it; the spans themselves are read on the device and may be
// smaller.
struct AttendShape {
  int n_spans = 0;
  int max_span_tok = 0;           // tokens of a span, at most
  int max_few_tok = kFewSpanTok;  // the same of spans of up to kFewSpanTok tokens; 0: there are none
  int max_keys = 0;               // pos + n_tok, at most; spans that need more splits than this give NaN
  int n_pages = 0;                // of all spans together, at most; the same beyond it
  int n_tok = 0;                  // rows of q and o
  int n_heads = 0;                // a multiple of the cache's n_kv_heads
  float scale = 0;                // of scores; 0: 1/√head_dim
  // Of the device (DeviceProperties). They decide how prompts are cut into blocks, and no result.
  int multiprocessors = 1;
  size_t shared_bytes = 0;
};
// By the pages of all spans together: one long text costs what it needs itself. A prompt needs none; it asks for what
// its text's decoding will.
struct AttendRoom {
  size_t partials_bytes, arrived_bytes;
};
AttendRoom attend_room(const CacheLayout& cache, const AttendShape& shape);

// o = softmax(q·kᵀ · scale)·v, causal. Weights and values are products of halves summed in float; queries are brought
// to halves by a power of two for each row.
void attend(Stream& stream, const CacheLayout& cache, int layer, const AttendShape& shape, const AttendBuffers& args);

}  // namespace cuda
}  // namespace pyllama
