// Attention of decoding: a few new tokens of each sequence over all the keys before them, at the speed of reading the
// cache. A query's result is the same bits whatever else is in the step, however it was cut into steps, and in whatever
// order blocks run: keys are cut at absolute positions, into pages and splits of kSplitPages pages, and what the parts
// give is added up in ascending order. Not for prompts: a tile of 16 rows reads all of its keys for itself.
#pragma once

#include "cuda/attention.h"

namespace pyllama {
namespace cuda {

constexpr int kSplitPages = 4;  // of 64 keys: one for each warp of a block
constexpr int kTileRows = 16;   // a row: one token, one query head

// The arguments are attend()'s. Spans of more than shape.max_span_tok tokens are left to somebody else.
AttendRoom attend_few_room(const CacheLayout& cache, const AttendShape& shape);
void attend_few(Stream& stream, const CacheLayout& cache, int layer, const AttendShape& shape,
                const AttendBuffers& args);

}  // namespace cuda
}  // namespace pyllama
