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
  // The caller's own thread is one of them. Throws std::system_error when the system gives no more.
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls body(task, thread) for tasks 0 … n_tasks-1; returns when all are done. body must not throw. One caller at a
  // time.
  template <class Body>
  void run(int n_tasks, const Body& body) {
    const auto each = [&](int begin, int end, int thread) {
      for (int task = begin; task < end; task++) body(task, thread);
    };
    run_erased(n_tasks, 0, erase(each), &each);
  }

  // The same for items that lie side by side in memory: body(begin, end, thread) for runs of them, long ones first and
  // short ones at the end (guided self-scheduling, Polychronopoulos and Kuck 1987), so that a thread reads far without
  // a jump and all threads still end together. Runs begin at multiples of `grain`.
  template <class Body>
  void run_ranges(int n_items, int grain, const Body& body) {
    run_erased(n_items, grain, erase(body), &body);
  }

  void wake();  // a step begins: workers start to spin
  void rest();  // a step has ended: workers may sleep

 private:
  using Call = void (*)(const void* body, int begin, int end, int thread);
  template <class Body>
  static Call erase(const Body&) {
    return [](const void* b, int begin, int end, int thread) { (*static_cast<const Body*>(b))(begin, end, thread); };
  }
  void run_erased(int n_tasks, int grain, Call call, const void* body);
  void work(int thread);
  void join();  // ends all workers
  void take_tasks(int thread);

  std::vector<std::thread> workers_;
  Call call_ = nullptr;
  const void* body_ = nullptr;
  int n_tasks_ = 0, grain_ = 0;  // grain 0: one by one
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
