// The kernel adds up all words, so that no load can be left out, and four loads of 16 bytes are under way in each
// thread: with 2,048 threads on a multiprocessor 128 KB, several times what hides the memory's latency. It writes one
// word a thread.
#include "read_bandwidth.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "device.h"
#include "runtime.h"

namespace pyllama::cuda {
namespace {

constexpr unsigned kThreads = 256;
constexpr unsigned kBlocksOfMultiprocessor = 8;
constexpr unsigned char kFill = 1;
constexpr uint32_t kWord = 0x01010101;

struct ReadArgs {
  const uint4* data;  // [n]
  uint64_t n;
  uint32_t* sums;  // [grid · kThreads]
};

PYLLAMA_DEVICE uint32_t sum_of(const uint4& v) { return v.x + v.y + v.z + v.w; }

// registers: read_kernel 40
PYLLAMA_KERNEL void read_kernel(const ReadArgs args) {
  const uint64_t stride = uint64_t{grid_size().x} * kThreads;
  const uint64_t first = uint64_t{block_index().x} * kThreads + thread_index();
  uint32_t sum = 0;
  uint64_t i = first;
  for (; i + 3 * stride < args.n; i += 4 * stride) {
    const uint4 a = load_stream(args.data + i);
    const uint4 b = load_stream(args.data + i + stride);
    const uint4 c = load_stream(args.data + i + 2 * stride);
    const uint4 d = load_stream(args.data + i + 3 * stride);
    sum += sum_of(a) + sum_of(b) + sum_of(c) + sum_of(d);
  }
  for (; i < args.n; i += stride) sum += sum_of(load_stream(args.data + i));
  args.sums[first] = sum;
}

}  // namespace

double read_bandwidth(int device, int64_t bytes, int repeats) {
  if (bytes < 16 || bytes % 16 != 0 || repeats < 1)
    throw std::invalid_argument("read_bandwidth: " + std::to_string(bytes) + " bytes, " + std::to_string(repeats) +
                                " repeats; expected a multiple of 16 and at least one repeat");
  use_device(device);
  const unsigned grid = kBlocksOfMultiprocessor * static_cast<unsigned>(properties(device).multiprocessors);
  const Memory data(static_cast<size_t>(bytes), "read_bandwidth: what is read");
  const Memory sums(sizeof(uint32_t) * grid * kThreads, "read_bandwidth: sums");
  Stream stream;
  stream.fill(data.data(), kFill, data.bytes());
  double best = std::numeric_limits<double>::infinity();
  for (int pass = 0; pass <= repeats; ++pass) {
    Event begin(Event::kTimed), end(Event::kTimed);
    stream.record(begin);
    launch(stream, read_kernel, {data.as<uint4>(), static_cast<uint64_t>(bytes) / 16, sums.as<uint32_t>()},
           {grid, 1, 1}, kThreads);
    stream.record(end);
    stream.wait();
    if (pass > 0) best = std::min(best, seconds_between(begin, end));
  }
  std::vector<uint32_t> host(size_t{grid} * kThreads);
  stream.copy_to_host(host.data(), sums.data(), sums.bytes());
  stream.wait();
  const uint32_t found = std::accumulate(host.begin(), host.end(), uint32_t{0});
  const auto expected = static_cast<uint32_t>(static_cast<uint64_t>(bytes) / 4 * kWord);
  if (found != expected)
    throw Error(kPyllamaCudaInternal, "read_bandwidth: the words read add up to " + std::to_string(found) +
                                          ", expected " + std::to_string(expected));
  return best;
}

}  // namespace pyllama::cuda
