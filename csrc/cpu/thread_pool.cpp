#include "thread_pool.h"

#include <algorithm>
#include <system_error>

#include "../error.h"
#include "os.h"

namespace pyllama {

namespace {
// In pauses of 40 to 140 cycles: how long to spin before giving the processor to others, and before going to sleep.
constexpr int kPatience = 2000, kLinger = 4000;
}  // namespace

ThreadPool::ThreadPool(int threads) {
  try {
    for (int t = 1; t < threads; t++) workers_.emplace_back([this, t] { work(t); });
  } catch (const std::system_error& error) {
    join();
    throw std::system_error(error.code(),
                            message("threads is ", threads, ", only ", workers_.size() + 1, " could start"));
  } catch (...) {
    join();
    throw;
  }
}

ThreadPool::~ThreadPool() { join(); }

void ThreadPool::join() {
  stop_ = true;
  wake();
  for (auto& w : workers_) w.join();
}

void ThreadPool::wake() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    awake_ = true;
  }
  sleep_.notify_all();
}

void ThreadPool::rest() { awake_ = false; }

void ThreadPool::take_tasks(int thread) {
  for (int begin = next_task_.load(std::memory_order_relaxed);;) {
    const int left = n_tasks_ - begin;
    if (left <= 0) return;
    int size = 1;
    if (grain_) size = std::min(left, std::max(1, left / (2 * threads() * grain_)) * grain_);
    if (!next_task_.compare_exchange_weak(begin, begin + size, std::memory_order_relaxed)) continue;
    call_(body_, begin, begin + size, thread);
    begin = next_task_.load(std::memory_order_relaxed);
  }
}

void ThreadPool::run_erased(int n_tasks, int grain, Call call, const void* body) {
  if (n_tasks <= 0) return;
  if (workers_.empty() || n_tasks <= std::max(1, grain)) return call(body, 0, n_tasks, 0);
  if (!awake_.load(std::memory_order_relaxed)) wake();
  call_ = call;
  body_ = body;
  n_tasks_ = n_tasks;
  grain_ = grain;
  next_task_.store(0, std::memory_order_relaxed);
  const uint64_t number = (region_.load(std::memory_order_relaxed) / kNext + 1) * kNext;
  region_.store(number | kOpen, std::memory_order_release);
  take_tasks(0);
  region_.fetch_and(~kOpen, std::memory_order_acq_rel);
  for (int spins = 0; region_.load(std::memory_order_acquire) & kInside; spins++) {
    cpu_relax();
    if (spins > kPatience) std::this_thread::yield();  // more threads than processors: let the others run
  }
}

void ThreadPool::work(int thread) {
  set_float_environment();
  uint64_t done = 0;  // the last region that this worker was in
  int spins = 0;
  for (;;) {
    uint64_t now = region_.load(std::memory_order_acquire);
    if (now / kNext != done && (now & kOpen)) {
      if (!region_.compare_exchange_weak(now, now + 1, std::memory_order_acquire)) continue;
      done = now / kNext;
      take_tasks(thread);
      region_.fetch_sub(1, std::memory_order_release);
      spins = 0;
      continue;
    }
    if (stop_.load(std::memory_order_relaxed)) return;
    if (!awake_.load(std::memory_order_relaxed) && spins > kLinger) {
      std::unique_lock<std::mutex> lock(mutex_);
      sleep_.wait(lock, [&] { return awake_ || stop_; });
      spins = 0;
    }
    cpu_relax();
    if (++spins > kPatience) std::this_thread::yield();
  }
}

}  // namespace pyllama
