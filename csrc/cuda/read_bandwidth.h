// How fast a device reads its own memory: the yardstick of everything that reads weights once a token.
#pragma once

#include <cstdint>

namespace pyllama::cuda {

// Reads `bytes` (a multiple of 16, at least 16) of new memory once to warm up and then `repeats` times. Returns the
// seconds of the fastest pass. Throws std::invalid_argument, Error; also when not every word was read once.
double read_bandwidth(int device, int64_t bytes, int repeats);

}  // namespace pyllama::cuda
