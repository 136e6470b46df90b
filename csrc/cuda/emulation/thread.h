// What an emulated CUDA thread can do: know where it is, wait for its block, meet the lanes of its warp, copy
// asynchronously, and report a defect. device.h builds its host branches of this; block.cpp implements it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "../runtime.h"
#include "fiber.h"

namespace pyllama::cuda::emulation {

constexpr unsigned kWarpSize = 32;

// The most that a block can have: the least of what sm_80 and later offer (sm_75: 64 KiB).
constexpr size_t kSharedBytes = 99 << 10;

// Memory nobody has written holds these bytes: a NaN as float, half and bfloat16, and -1 as an integer.
constexpr unsigned char kPoison = 0xff;

// A kernel launch with its arguments captured.
struct Launch {
  std::string name;
  LaunchShape shape;
  void (*call)(const void* kernel, const void* args);
  const void* kernel;
  std::vector<unsigned char> args;
};

// An operation that all lanes of a warp reach together. `complete` runs once, when every lane has arrived, and writes
// each lane's result into that lane's operands; operands[lane] is null for lanes that the block has not got.
struct Collective {
  const char* name;
  bool needs_full_warp;
  void (*complete)(void* const* operands);
};

struct AsyncCopy {
  void* to;
  const void* from;  // null: 16 zeros
};

struct Thread {
  explicit Thread(unsigned number) : fiber(number), index(number) {}

  Fiber fiber;
  unsigned index;
  Dim3 block_index;
  const Launch* launch = nullptr;
  unsigned char* shared = nullptr;

  // Where it waits; neither: it can run, or has finished.
  bool at_barrier = false;
  const Collective* in_collective = nullptr;
  void* operands = nullptr;

  std::vector<AsyncCopy> copies;      // not landed yet, oldest first
  std::vector<size_t> copies_groups;  // how many of them each committed group holds, oldest first
  bool waited_for_previous = false;
  std::string defect;  // why it stopped, if it did
};

// The thread whose code is running on this thread of the operating system; null outside kernels.
extern __thread Thread* this_thread;

// Ends the launch with an Error that names kernel, block and thread.
[[noreturn]] void fail(const std::string& what);

void wait_at_barrier();
void meet(const Collective& collective, void* operands);

void start_copy(void* shared, const void* global, bool valid);
void commit_copies();
void wait_for_copies(size_t newest_groups_left);

// Throws unless `bytes` from `p` lie in the block's shared memory (or, for the second, there or in one piece of device
// memory) and p is a multiple of `bytes`. `what` names the operation.
void check_shared(const void* p, size_t bytes, const char* what);
void check_access(const void* p, size_t bytes, const char* what);

// Runs all blocks of a launch; throws Error for every defect found in it.
void run(const Launch& launch);

// For tests: of the launches from here on, one fails after so many good ones.
void fail_after(int launches);

}  // namespace pyllama::cuda::emulation
