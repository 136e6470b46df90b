// The two floors of this machine, measured: streaming reads and int8 dot products from registers.
#include <algorithm>
#include <chrono>
#include <vector>

#include "cpu.h"
#include "dispatch.h"
#include "os.h"
#include "thread_pool.h"

namespace pyllama {

namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

}  // namespace

double read_bandwidth(int threads, double seconds, const std::vector<Region>& regions) {
  const cpu::Kernels& kernels = cpu::kernels_for("");
  constexpr size_t kChunk = size_t{1} << 20;
  struct Buffer {
    size_t size_bytes;
    uint8_t* data;
    explicit Buffer(size_t n) : size_bytes(n), data(n ? static_cast<uint8_t*>(alloc_zeroed(n)) : nullptr) {}
    ~Buffer() {
      if (data) free_zeroed(data, size_bytes);
    }
  } buffer(regions.empty() ? size_t{1} << 30 : 0);
  ThreadPool pool(std::max(1, threads));
  std::vector<Region> chunks;
  const auto add = [&](const uint8_t* data, size_t n) {
    for (size_t at = 0; at < n; at += kChunk) chunks.push_back({data + at, std::min(kChunk, n - at)});
  };
  add(buffer.data, buffer.size_bytes);
  // Written once, so that every page is memory of its own and not the one shared page of zeros.
  pool.run(static_cast<int>(chunks.size()),
           [&](int task, int) { std::fill_n(buffer.data + task * kChunk, kChunk, uint8_t(task)); });
  for (const Region& region : regions) add(region.data, region.size_bytes);
  double bytes = 0;
  for (const Region& chunk : chunks) bytes += static_cast<double>(chunk.size_bytes);
  std::vector<uint64_t> sums(static_cast<size_t>(pool.threads()) * 8);
  double best = 0;
  const double end = now() + seconds;
  do {
    const double start = now();
    pool.run_ranges(static_cast<int>(chunks.size()), 1, [&](int begin, int end, int thread) {
      for (; begin < end; begin++) {
        const Region& chunk = chunks[static_cast<size_t>(begin)];
        sums[static_cast<size_t>(thread) * 8] += kernels.read_stream(chunk.data, chunk.size_bytes);
      }
    });
    best = std::max(best, bytes / (now() - start) / 1e9);
  } while (now() < end);
  volatile uint64_t keep = sums[0];
  (void)keep;
  return best;
}

double int8_peak(int threads, double seconds, const std::string& isa) {
  const cpu::Kernels& kernels = cpu::kernels_for(isa);
  ThreadPool pool(std::max(1, threads));
  const int n = pool.threads();
  std::vector<double> done(static_cast<size_t>(n) * 8);
  std::vector<int32_t> sink(static_cast<size_t>(n) * 16);
  const int rounds = seconds < 0.01 ? 1000 : 100000;
  double best = 0;
  const double end = now() + seconds;
  do {
    const double start = now();
    pool.run(n * 4, [&](int, int thread) {
      done[static_cast<size_t>(thread) * 8] += kernels.dot_peak(rounds, &sink[static_cast<size_t>(thread) * 16]);
    });
    double total = 0;
    for (double& d : done) total += d, d = 0;
    best = std::max(best, total / (now() - start) / 1e9);
  } while (now() < end);
  return best;
}

}  // namespace pyllama
