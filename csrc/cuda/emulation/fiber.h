// Fibers: functions with stacks of their own that take turns on one thread of the operating system. A switch saves the
// registers that a function call keeps and swaps the stack pointer; it makes no system call (swapcontext makes two, for
// the signal mask, which would be most of an emulated barrier). Knows nothing about CUDA; has no scheduler.
#pragma once

#include <cstddef>
#include <memory>

namespace pyllama::cuda::emulation {

class Fiber {
 public:
  using Body = void (*)(void* argument);

  static constexpr size_t kStackBytes = 64 * 1024;

  // `color` spreads the stacks' tops over cache sets, which would otherwise all be the same.
  explicit Fiber(unsigned color);

  // Makes the next resume() call body(argument) from its beginning. What an earlier body left on the stack is dropped
  // without destructors: emulated kernels own nothing. `body` must not let an exception out.
  void start(Body body, void* argument);

  // Runs the fiber until it calls suspend() or its body returns. Called from outside any fiber.
  void resume();

  // Called by the body: returns to resume(), and comes back at the next resume().
  void suspend();

  bool finished() const { return finished_; }

  // The body used more than kStackBytes. As much again lies below, so that most overflows are seen before they do harm.
  // Says so once.
  bool overflowed();

 private:
  static void enter();

  std::unique_ptr<unsigned char[]> stack_;
  unsigned char* top_;
  void* inside_ = nullptr;   // stack pointer of the suspended body
  void* outside_ = nullptr;  // stack pointer of who resumed it
  Body body_ = nullptr;
  void* argument_ = nullptr;
  bool finished_ = true;
};

}  // namespace pyllama::cuda::emulation
