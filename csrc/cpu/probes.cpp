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

double read_bandwidth(int threads, double seconds) {
  const cpu::Kernels& kernels = cpu::kernels_for("");
  constexpr size_t kBytes = size_t{1} << 30, kChunk = size_t{1} << 20;
  struct Buffer {
    uint8_t* data = static_cast<uint8_t*>(alloc_zeroed(kBytes));
    ~Buffer() { free_zeroed(data, kBytes); }
  } buffer;
  ThreadPool pool(std::max(1, threads));
  constexpr int kTasks = static_cast<int>(kBytes / kChunk);
  // Written once, so that every page is memory of its own and not the one shared page of zeros.
  pool.run(kTasks, [&](int task, int) { std::fill_n(buffer.data + task * kChunk, kChunk, uint8_t(task)); });
  std::vector<uint64_t> sums(static_cast<size_t>(pool.threads()) * 8);
  double best = 0;
  const double end = now() + seconds;
  do {
    const double start = now();
    pool.run(kTasks, [&](int task, int thread) {
      sums[static_cast<size_t>(thread) * 8] += kernels.read_stream(buffer.data + task * kChunk, kChunk);
    });
    best = std::max(best, kBytes / (now() - start) / 1e9);
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
  double best = 0;
  const double end = now() + seconds;
  do {
    const double start = now();
    pool.run(n * 4, [&](int, int thread) {
      done[static_cast<size_t>(thread) * 8] += kernels.dot_peak(100000, &sink[static_cast<size_t>(thread) * 16]);
    });
    double total = 0;
    for (double& d : done) total += d, d = 0;
    best = std::max(best, total / (now() - start) / 1e9);
  } while (now() < end);
  return best;
}

}  // namespace pyllama
