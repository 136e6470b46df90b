// Chooses the kernels of a step's attention: see attention.h.
#include "cuda/attention.h"

#include <algorithm>

#include "cuda/attention_few.h"
#include "cuda/attention_many.h"

namespace pyllama {
namespace cuda {

namespace {

bool has_long_spans(const AttendShape& shape) { return shape.max_span_tok > kFewSpanTok; }
bool has_short_spans(const AttendShape& shape) {
  return !has_long_spans(shape) || (shape.n_spans > 1 && shape.max_few_tok > 0);
}

AttendShape few_of(AttendShape shape) {
  if (has_long_spans(shape)) shape.max_span_tok = std::max(1, std::min(shape.max_few_tok, kFewSpanTok));
  return shape;
}

}  // namespace

AttendRoom attend_room(const CacheLayout& cache, const AttendShape& shape) {
  return attend_few_room(cache, few_of(shape));
}

void attend(Stream& stream, const CacheLayout& cache, int layer, const AttendShape& shape, const AttendBuffers& args) {
  if (has_long_spans(shape)) attend_many(stream, cache, layer, shape, args, kFewSpanTok + 1);
  if (has_short_spans(shape)) attend_few(stream, cache, layer, few_of(shape), args);
}

}  // namespace cuda
}  // namespace pyllama
