// The switch between stacks, in assembly for x86-64 and 64-bit ARM (System V and AAPCS64 calling conventions).
#include "fiber.h"

#include <cstdint>
#include <cstring>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

// void pyllama_switch_stack(void** save, void* load): pushes the registers that a callee keeps, stores the stack
// pointer in *save, and continues where the stack `load` was left. On x86-64 by a jump: processors predict that a `ret`
// goes back to its call, and here it never does (300 barriers of 256 threads: 2.7 ms with it, 1.9 without).
#if defined(__x86_64__)
asm(R"(
.text
.globl pyllama_switch_stack
.hidden pyllama_switch_stack
.type pyllama_switch_stack, @function
pyllama_switch_stack:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  pop %rcx
  jmp *%rcx
.size pyllama_switch_stack, .-pyllama_switch_stack
)");
// Six registers and the address to return to; a function starts with its stack pointer 8 past a multiple of 16.
constexpr size_t kFrameWords = 8, kReturnWord = 6;
#elif defined(__aarch64__)
asm(R"(
.text
.globl pyllama_switch_stack
.hidden pyllama_switch_stack
.type pyllama_switch_stack, %function
pyllama_switch_stack:
  sub sp, sp, #160
  stp x19, x20, [sp]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size pyllama_switch_stack, .-pyllama_switch_stack
)");
constexpr size_t kFrameWords = 20, kReturnWord = 11;
#else
#error "the emulation's switch between stacks is written for x86-64 and 64-bit ARM; add this processor's to fiber.cpp"
#endif

extern "C" void pyllama_switch_stack(void** save, void* load);

namespace pyllama::cuda::emulation {

namespace {

thread_local Fiber* running = nullptr;

// Below the stack; its upper end is never written by a body that stays on its stack.
constexpr size_t kSpareBytes = Fiber::kStackBytes;
constexpr unsigned char kCanary = 0xa5;
constexpr size_t kCanaryBytes = 1024;

}  // namespace

Fiber::Fiber(unsigned color) : stack_(new unsigned char[kSpareBytes + kStackBytes]) {
  const uintptr_t end = reinterpret_cast<uintptr_t>(stack_.get()) + kSpareBytes + kStackBytes;
  top_ = reinterpret_cast<unsigned char*>((end & ~uintptr_t{63}) - color % 32 * 192);
  memset(stack_.get() + kSpareBytes - kCanaryBytes, kCanary, kCanaryBytes);
}

void Fiber::start(Body body, void* argument) {
#ifdef __SANITIZE_ADDRESS__
  // What it has noted about frames that were left without returning.
  __asan_unpoison_memory_region(stack_.get(), kSpareBytes + kStackBytes);
#endif
  body_ = body;
  argument_ = argument;
  finished_ = false;
  void** frame = reinterpret_cast<void**>(top_) - kFrameWords;
  memset(frame, 0, kFrameWords * sizeof(void*));
  frame[kReturnWord] = reinterpret_cast<void*>(&Fiber::enter);
  inside_ = frame;
}

void Fiber::resume() {
  running = this;
  pyllama_switch_stack(&outside_, inside_);
}

void Fiber::suspend() { pyllama_switch_stack(&inside_, outside_); }

void Fiber::enter() {
  Fiber* self = running;
  self->body_(self->argument_);
  self->finished_ = true;
  self->suspend();  // for good
}

bool Fiber::overflowed() {
  unsigned char* canary = stack_.get() + kSpareBytes - kCanaryBytes;
  if (*canary == kCanary && memcmp(canary, canary + 1, kCanaryBytes - 1) == 0) return false;
  memset(canary, kCanary, kCanaryBytes);
  return true;
}

}  // namespace pyllama::cuda::emulation
