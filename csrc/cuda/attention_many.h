// Attention of prompts: many new tokens of a sequence over all the keys before them and among themselves, at the speed
// of the tensor cores; a key is read once for a tile of rows (tokens and query heads that share a key/value head). A
// token's result is the same bits whatever else is in the step and however the prompt was cut: a row goes over the
// pages from the first on, and no other row of its tile changes its numbers. Its bits are not attention_few.h's.
#pragma once

#include "cuda/attention.h"

namespace pyllama {
namespace cuda {

// The arguments are attend()'s; spans of fewer than `least` tokens are left to somebody else. Needs no room.
void attend_many(Stream& stream, const CacheLayout& cache, int layer, const AttendShape& shape,
                 const AttendBuffers& args, int least);

}  // namespace cuda
}  // namespace pyllama
