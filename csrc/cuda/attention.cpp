// Chooses the kernels of a step's attention: see attention.h.
#include "cuda/attention.h"

#include "cuda/attention_few.h"

namespace pyllama {
namespace cuda {

AttendRoom attend_room(const CacheLayout& cache, const AttendShape& shape) { return attend_few_room(cache, shape); }

void attend(Stream& stream, const CacheLayout& cache, int layer, const AttendShape& shape, const AttendBuffers& args) {
  attend_few(stream, cache, layer, shape, args);
}

}  // namespace cuda
}  // namespace pyllama
