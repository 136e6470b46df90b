// Runs a kernel launch: blocks one after another, each block's threads as fibers. Time is cut into rounds. In a round
// of a warp each lane that can run does so until it waits or returns; then the lanes must all wait in the same
// collective (which completes, and the next round begins), or at the block's barrier, or all have returned. A warp runs
// round after round until it waits for the others; when every warp does, the barrier opens. Whatever else remains is a
// defect of the kernel.
#include <cxxabi.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "guard.h"
#include "memory.h"
#include "order.h"
#include "thread.h"

namespace pyllama::cuda::emulation {

__thread Thread* this_thread = nullptr;

namespace {

// Thrown through the kernel's frames, to end a fiber whose thread has noted a defect.
struct Stop {};

std::string coordinates(const Dim3& d) {
  return "(" + std::to_string(d.x) + "," + std::to_string(d.y) + "," + std::to_string(d.z) + ")";
}

std::string demangled(const std::string& name) {
  int status = 0;
  char* plain = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status);
  const std::string result = status == 0 ? plain : name;
  std::free(plain);
  return result;
}

// Fibers and shared memory for one block at a time; kept from launch to launch by each thread that launches.
class Block {
 public:
  void run(const Launch& launch, const Dim3& index, const Order& order, uint64_t number);

 private:
  enum class Warp { kGoesOn, kWaits, kDone };

  void prepare(const Launch& launch, const Dim3& index);
  void run_until_all_wait(Turns& warps, Turns& lanes);
  Warp run_round(unsigned warp, Turns& lanes);
  void complete(unsigned warp, const Collective& collective);
  void open_barrier();
  void check_guards() const;
  std::string states(unsigned first, unsigned last) const;
  [[noreturn]] void stop(const std::string& what) const;
  [[noreturn]] void stop(const Thread& thread, const std::string& what) const;
  unsigned end_of(unsigned warp) const { return std::min((warp + 1) * kWarpSize, size_); }

  std::vector<std::unique_ptr<Thread>> threads_;  // the first size_ of them are this block's
  std::vector<unsigned char> shared_ = std::vector<unsigned char>(kSharedBytes + 3 * kGuardBytes);
  unsigned char* const shared_begin_ = reinterpret_cast<unsigned char*>(
      (reinterpret_cast<uintptr_t>(shared_.data()) + 2 * kGuardBytes - 1) / kGuardBytes * kGuardBytes);
  const Launch* launch_ = nullptr;
  Dim3 index_;
  unsigned size_ = 0;
};

void thread_body(void* argument) {
  Thread& self = *static_cast<Thread*>(argument);
  try {
    self.launch->call(self.launch->kernel, self.launch->args.data());
  } catch (const Stop&) {
  } catch (const std::exception& e) {
    self.defect = e.what();
  }
}

void Block::run(const Launch& launch, const Dim3& index, const Order& order, uint64_t number) {
  prepare(launch, index);
  Turns warps(order, number * 2), lanes(order, number * 2 + 1);
  const auto finished = [](const std::unique_ptr<Thread>& t) { return t->fiber.finished(); };
  for (;;) {
    run_until_all_wait(warps, lanes);
    if (std::all_of(threads_.begin(), threads_.begin() + size_, finished)) break;
    open_barrier();
  }
  check_guards();
}

void Block::prepare(const Launch& launch, const Dim3& index) {
  launch_ = &launch;
  index_ = index;
  size_ = launch.shape.block;
  set_guards(shared_begin_, launch.shape.shared_bytes);
  memset(shared_begin_, kPoison, launch.shape.shared_bytes);
  for (unsigned i = 0; i < size_; i++) {
    if (i == threads_.size()) threads_.push_back(std::make_unique<Thread>(i));
    Thread& t = *threads_[i];
    t.block_index = index;
    t.launch = &launch;
    t.shared = shared_begin_;
    t.at_barrier = t.waited_for_previous = false;
    t.in_collective = nullptr;
    t.copies.clear();
    t.copies_groups.clear();
    t.defect.clear();
    t.fiber.start(thread_body, &t);
  }
}

// Ascending and descending: each warp as far as it comes before the next one starts. Random: a round here, a round
// there.
void Block::run_until_all_wait(Turns& warps, Turns& lanes) {
  const unsigned n = (size_ + kWarpSize - 1) / kWarpSize;
  if (!warps.random()) {
    warps.each(n, [&](unsigned warp) {
      while (run_round(warp, lanes) == Warp::kGoesOn) {
      }
    });
    return;
  }
  std::vector<unsigned> going(n);
  for (unsigned i = 0; i < n; i++) going[i] = i;
  while (!going.empty()) {
    const unsigned i = warps.draw(static_cast<unsigned>(going.size()));
    if (run_round(going[i], lanes) == Warp::kGoesOn) continue;
    going[i] = going.back();
    going.pop_back();
  }
}

Block::Warp Block::run_round(unsigned warp, Turns& lanes) {
  const unsigned first = warp * kWarpSize, n = end_of(warp) - first;
  lanes.each(n, [&](unsigned lane) {
    Thread& t = *threads_[first + lane];
    if (t.fiber.finished() || t.at_barrier) return;
    this_thread = &t;
    t.fiber.resume();
    this_thread = nullptr;
    if (!t.defect.empty()) stop(t, t.defect);
    if (!t.fiber.finished()) return;
    if (t.fiber.overflowed()) stop(t, "used more than " + std::to_string(Fiber::kStackBytes) + " bytes of stack");
    if (launch_->shape.start == Start::kEarly && !t.waited_for_previous) {
      stop(t, "left a kernel launched with Start::kEarly without wait_for_previous_kernel()");
    }
  });
  const Thread& one = *threads_[first];
  for (unsigned i = first + 1; i < first + n; i++) {
    const Thread& t = *threads_[i];
    if (t.in_collective == one.in_collective && t.at_barrier == one.at_barrier &&
        t.fiber.finished() == one.fiber.finished()) {
      continue;
    }
    stop("the lanes of warp " + std::to_string(warp) + " part: " + states(first, first + n));
  }
  if (!one.in_collective) return one.at_barrier ? Warp::kWaits : Warp::kDone;
  complete(warp, *one.in_collective);
  return Warp::kGoesOn;
}

void Block::complete(unsigned warp, const Collective& collective) {
  const unsigned first = warp * kWarpSize, n = end_of(warp) - first;
  if (collective.needs_full_warp && n < kWarpSize) {
    stop(std::string(collective.name) + " needs 32 lanes, warp " + std::to_string(warp) + " has " + std::to_string(n));
  }
  void* operands[kWarpSize] = {};
  for (unsigned lane = 0; lane < n; lane++) {
    operands[lane] = threads_[first + lane]->operands;
    threads_[first + lane]->in_collective = nullptr;
  }
  collective.complete(operands);
}

void Block::open_barrier() {
  for (unsigned i = 0; i < size_; i++) {
    if (!threads_[i]->at_barrier) stop("barrier() is not reached by all threads: " + states(0, size_));
  }
  for (unsigned i = 0; i < size_; i++) threads_[i]->at_barrier = false;
}

void Block::check_guards() const {
  const std::string place = lift_guards(shared_begin_, launch_->shape.shared_bytes);
  if (place.empty()) return;
  stop("wrote " + place + " its " + std::to_string(launch_->shape.shared_bytes) + " bytes of shared memory");
}

// "threads 0-30 wait in shuffle, thread 31 has returned"
std::string Block::states(unsigned first, unsigned last) const {
  const auto state = [&](unsigned i) -> std::string {
    const Thread& t = *threads_[i];
    if (t.in_collective) return std::string("in ") + t.in_collective->name;
    return t.at_barrier ? "at barrier()" : "returned";
  };
  std::string text;
  for (unsigned i = first; i < last;) {
    unsigned j = i + 1;
    while (j < last && state(j) == state(i)) j++;
    text += (text.empty() ? "thread" : ", thread") + std::string(j - i > 1 ? "s " : " ") + std::to_string(i);
    text += (j - i > 1 ? "-" + std::to_string(j - 1) : "") + ": " + state(i);
    i = j;
  }
  return text;
}

void Block::stop(const std::string& what) const {
  throw Error(kPyllamaCudaInternal,
              "kernel of " + demangled(launch_->name) + ", block " + coordinates(index_) + ": " + what);
}

void Block::stop(const Thread& thread, const std::string& what) const {
  stop("thread " + std::to_string(thread.index) + ": " + what);
}

void check_launch(const Launch& launch) {
  const LaunchShape& s = launch.shape;
  const bool fits = s.grid.x && s.grid.x <= 0x7fffffff && s.grid.y && s.grid.y <= 65535 && s.grid.z &&
                    s.grid.z <= 65535 && s.block && s.block <= 1024 && s.shared_bytes <= kSharedBytes;
  if (fits) return;
  throw Error(kPyllamaCudaBadArgument,
              "kernel of " + demangled(launch.name) + ": grid " + coordinates(s.grid) + ", " + std::to_string(s.block) +
                  " threads, " + std::to_string(s.shared_bytes) +
                  " bytes of shared memory; expected 1 to 2147483647 by 65535 by 65535 blocks of" +
                  " 1 to 1024 threads and at most " + std::to_string(kSharedBytes) + " bytes");
}

std::atomic<int> launches_to_failure{-1};

}  // namespace

void fail_after(int launches) { launches_to_failure = launches; }

void run(const Launch& launch) {
  static thread_local Block block;
  check_launch(launch);
  if (launches_to_failure >= 0 && launches_to_failure-- == 0) {
    throw Error(kPyllamaCudaInternal, "kernel of " + demangled(launch.name) + ": fails, as a test wants");
  }
  const Order order = current_order();
  const Dim3& grid = launch.shape.grid;
  remember_memory();
  Turns blocks(order, 0);
  blocks.each(grid.x * grid.y * grid.z, [&](unsigned i) {
    block.run(launch, {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y}, order, i + 1);
  });
  find_changes();
  check_device_guards("kernel of " + demangled(launch.name));
}

void fail(const std::string& what) {
  if (!this_thread) throw Error(kPyllamaCudaInternal, what);
  this_thread->defect = what;
  throw Stop{};
}

void wait_at_barrier() {
  this_thread->at_barrier = true;
  this_thread->fiber.suspend();
}

void meet(const Collective& collective, void* operands) {
  this_thread->in_collective = &collective;
  this_thread->operands = operands;
  this_thread->fiber.suspend();
}

void start_copy(void* shared, const void* global, bool valid) {
  check_shared(shared, 16, "copy_async_16");
  if (valid) check_device_memory(global, 16, "copy_async_16");
  memset(shared, kPoison, 16);
  this_thread->copies.push_back({shared, valid ? global : nullptr});
}

void commit_copies() {
  Thread& t = *this_thread;
  size_t committed = 0;
  for (size_t n : t.copies_groups) committed += n;
  t.copies_groups.push_back(t.copies.size() - committed);
}

void wait_for_copies(size_t newest_groups_left) {
  Thread& t = *this_thread;
  size_t n = 0;
  while (t.copies_groups.size() > newest_groups_left) {
    n += t.copies_groups.front();
    t.copies_groups.erase(t.copies_groups.begin());
  }
  for (size_t i = 0; i < n; i++) {
    if (t.copies[i].from) {
      memcpy(t.copies[i].to, t.copies[i].from, 16);
    } else {
      memset(t.copies[i].to, 0, 16);
    }
  }
  t.copies.erase(t.copies.begin(), t.copies.begin() + static_cast<std::ptrdiff_t>(n));
}

namespace {

void check_aligned(const void* p, size_t bytes, const char* what) {
  const size_t past = reinterpret_cast<uintptr_t>(p) % bytes;
  if (past == 0) return;
  fail(std::string(what) + " at an address " + std::to_string(past) + " past a multiple of " + std::to_string(bytes));
}

std::ptrdiff_t shared_offset(const void* p) { return static_cast<const unsigned char*>(p) - this_thread->shared; }

bool in_shared(const void* p, size_t bytes) {
  const std::ptrdiff_t offset = shared_offset(p),
                       end = static_cast<std::ptrdiff_t>(this_thread->launch->shape.shared_bytes);
  return offset >= 0 && offset + static_cast<std::ptrdiff_t>(bytes) <= end;
}

}  // namespace

void check_shared(const void* p, size_t bytes, const char* what) {
  check_aligned(p, bytes, what);
  if (in_shared(p, bytes)) return;
  fail(std::string(what) + " at byte " + std::to_string(shared_offset(p)) + " of " +
       std::to_string(this_thread->launch->shape.shared_bytes) + " bytes of shared memory");
}

void check_access(const void* p, size_t bytes, const char* what) {
  if (in_shared(p, bytes)) return check_aligned(p, bytes, what);
  check_device_memory(p, bytes, what);
}

}  // namespace pyllama::cuda::emulation
