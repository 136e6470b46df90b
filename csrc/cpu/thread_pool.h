// Threads that share the work of one step. Workers spin between the regions of a step, which come microseconds apart,
// and sleep between steps. Tasks are taken from a counter on demand, so a slow core takes fewer; which thread runs a
// task never changes a result. A region ends when its tasks are done: nobody waits for a worker that never got to
// run because something else held its processor.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace pyllama {

class ThreadPool {
 public:
  explicit ThreadPool(int threads);  // the caller's own thread is one of them
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls body(task, thread) for tasks 0 … n_tasks-1; returns when all are done. body must not throw. One caller at a
  // time.
  template <class Body>
  void run(int n_tasks, const Body& body) {
    run_erased(
        n_tasks, [](const void* b, int task, int thread) { (*static_cast<const Body*>(b))(task, thread); }, &body);
  }

  void wake();  // a step begins: workers start to spin
  void rest();  // a step has ended: workers may sleep

 private:
  using Call = void (*)(const void* body, int task, int thread);
  void run_erased(int n_tasks, Call call, const void* body);
  void work(int thread);
  void take_tasks(int thread);

  std::vector<std::thread> workers_;
  Call call_ = nullptr;
  const void* body_ = nullptr;
  int n_tasks_ = 0;
  // The number of the region, whether it is open, and how many workers are inside: one word, so that entering is one
  // step.
  static constexpr uint64_t kOpen = 1 << 16, kInside = kOpen - 1, kNext = uint64_t{1} << 32;
  alignas(64) std::atomic<uint64_t> region_{0};
  alignas(64) std::atomic<int> next_task_{0};
  alignas(64) std::atomic<bool> awake_{false};
  std::atomic<bool> stop_{false};
  std::mutex mutex_;
  std::condition_variable sleep_;
};

}  // namespace pyllama
