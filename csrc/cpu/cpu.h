// What the CPU device offers beside the Backend verbs: which instruction sets there are, how many threads to use,
// and probes of the machine's two floors (bytes per second, operations per second).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "vocab.h"

namespace pyllama {

std::vector<std::string> cpu_isas();      // this machine runs them and this build has them, best first
std::vector<std::string> cpu_all_isas();  // this build has them, best first
// Resolves "" (PYLLAMA_ISA, else the best) or a name; throws std::invalid_argument listing what there is.
std::string choose_isa(const std::string& wanted);

const VocabKernels& cpu_vocab_kernels(const std::string& isa);  // as choose_isa() takes it; for a Sampler

int default_threads();  // physical cores that affinity and the cgroup's quota allow, at least 1

struct Region {
  const uint8_t* data;
  size_t size_bytes;
};
// Streaming read of these regions, or of a buffer of its own that is larger than the caches, GB/s (1e9). Takes about
// `seconds`. Memory of one machine can differ: behind a mapped file, in small pages, far from the processor.
double read_bandwidth(int threads, double seconds, const std::vector<Region>& regions = {});
// int8 multiply-accumulates from registers, in 1e9 operations/s (a multiply-add is two).
double int8_peak(int threads, double seconds, const std::string& isa);

}  // namespace pyllama
