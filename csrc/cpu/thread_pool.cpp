#include "thread_pool.h"

#include "os.h"

namespace pyllama {

ThreadPool::ThreadPool(int threads) {
  try {
    for (int t = 1; t < threads; t++) workers_.emplace_back([this, t] { work(t); });
  } catch (...) {  // no more threads to be had: those that exist must not outlive us
    stop_ = true;
    wake();
    for (auto& w : workers_) w.join();
    throw;
  }
}

ThreadPool::~ThreadPool() {
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
  for (;;) {
    const int task = next_task_.fetch_add(1, std::memory_order_relaxed);
    if (task >= n_tasks_) return;
    call_(body_, task, thread);
  }
}

void ThreadPool::run_erased(int n_tasks, Call call, const void* body) {
  if (workers_.empty() || n_tasks <= 1) {
    for (int task = 0; task < n_tasks; task++) call(body, task, 0);
    return;
  }
  if (!awake_.load(std::memory_order_relaxed)) wake();
  call_ = call;
  body_ = body;
  n_tasks_ = n_tasks;
  next_task_.store(0, std::memory_order_relaxed);
  busy_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
  region_.fetch_add(1, std::memory_order_release);
  take_tasks(0);
  for (int spins = 0; busy_.load(std::memory_order_acquire) != 0; spins++) {
    cpu_relax();
    if (spins > 20000) std::this_thread::yield();  // more threads than processors: let the others run
  }
}

void ThreadPool::work(int thread) {
  set_float_environment();
  uint64_t seen = 0;
  for (;;) {
    int spins = 0;
    while (region_.load(std::memory_order_acquire) == seen) {
      if (stop_.load(std::memory_order_relaxed)) return;
      if (!awake_.load(std::memory_order_relaxed) && spins > 2000) {
        std::unique_lock<std::mutex> lock(mutex_);
        sleep_.wait(lock, [&] { return awake_ || stop_; });
        spins = 0;
      }
      cpu_relax();
      if (++spins > 20000) std::this_thread::yield();
    }
    seen++;
    take_tasks(thread);
    busy_.fetch_sub(1, std::memory_order_release);
  }
}

}  // namespace pyllama
