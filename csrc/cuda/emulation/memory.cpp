// See memory.h.
#include "memory.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>
#include <new>
#include <vector>

#include "guard.h"
#include "thread.h"

namespace pyllama::cuda::emulation {

namespace {

struct Buffer {
  size_t bytes;
  std::string name;
};

struct Memories {
  std::mutex mutex;
  std::map<uintptr_t, Buffer> buffers;  // by address
  size_t bytes = 0;
  std::string damage;  // found when a buffer was freed, where nothing can be thrown
};

Memories& memories() {
  static auto* all = new Memories;  // outlives whatever frees memory at exit
  return *all;
}

std::string described(const Buffer& buffer) {
  return "\"" + buffer.name + "\" (" + std::to_string(buffer.bytes) + " bytes)";
}

// "" or where a guard zone is not what it was. Repairs it, so that one defect is reported once.
std::string damage_of(uintptr_t address, const Buffer& buffer) {
  auto* data = reinterpret_cast<unsigned char*>(address);
  const std::string place = lift_guards(data, buffer.bytes);
  set_guards(data, buffer.bytes);
  return place.empty() ? "" : "wrote " + place + " " + described(buffer);
}

// What a host thread's kernels change.
constexpr size_t kWord = 4;
struct Changes {
  std::map<uintptr_t, std::vector<unsigned char>> before;  // buffers by address, as they were before the kernel
  std::vector<uintptr_t> words;                            // addresses, ascending, of what the last kernel changed
};
thread_local Changes changes;

bool changed(const void* p, size_t bytes) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(p), first = address / kWord * kWord;
  const auto at = std::lower_bound(changes.words.begin(), changes.words.end(), first);
  return at != changes.words.end() && *at < address + bytes;
}

// "" or why `bytes` from p are not inside a buffer.
std::string outside(const void* p, size_t bytes) {
  Memories& all = memories();
  const auto address = reinterpret_cast<uintptr_t>(p);
  const std::lock_guard<std::mutex> lock(all.mutex);
  auto at = all.buffers.upper_bound(address);
  if (at != all.buffers.begin()) {
    --at;
    const uintptr_t offset = address - at->first;
    if (offset <= at->second.bytes && bytes <= at->second.bytes - offset) return "";
    if (offset < at->second.bytes + kGuardBytes) {
      return "bytes " + std::to_string(offset) + " to " + std::to_string(offset + bytes) + " of " +
             described(at->second);
    }
    ++at;
  }
  if (at != all.buffers.end() && at->first - address <= kGuardBytes) {
    return std::to_string(at->first - address) + " bytes before " + described(at->second);
  }
  return "an address that is not device memory";
}

std::atomic<size_t> device_bytes{size_t{8} << 30};

}  // namespace

size_t memory_bytes() { return device_bytes; }
void set_memory_bytes(size_t bytes) { device_bytes = bytes; }

void* allocate(size_t bytes, const char* name) {
  Memories& all = memories();
  const bool fits = bytes <= memory_bytes() && allocated_bytes() <= memory_bytes() - bytes;
  void* whole = fits ? ::operator new(bytes + 2 * kGuardBytes, std::align_val_t{kGuardBytes}, std::nothrow) : nullptr;
  if (!whole) {
    throw Error(kPyllamaCudaOutOfMemory,
                "out of emulated device memory: " + std::to_string(bytes) + " bytes for " + name);
  }
  auto* data = static_cast<unsigned char*>(whole) + kGuardBytes;
  memset(data, kPoison, bytes);
  set_guards(data, bytes);
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.buffers[reinterpret_cast<uintptr_t>(data)] = {bytes, name};
  all.bytes += bytes;
  return data;
}

void release(void* data) noexcept {
  Memories& all = memories();
  {
    const std::lock_guard<std::mutex> lock(all.mutex);
    const auto at = all.buffers.find(reinterpret_cast<uintptr_t>(data));
    if (all.damage.empty()) all.damage = damage_of(at->first, at->second);
    all.bytes -= at->second.bytes;
    lift_guards(static_cast<unsigned char*>(data), at->second.bytes);
    all.buffers.erase(at);
  }
  ::operator delete(static_cast<unsigned char*>(data) - kGuardBytes, std::align_val_t{kGuardBytes});
}

size_t allocated_bytes() {
  const std::lock_guard<std::mutex> lock(memories().mutex);
  return memories().bytes;
}

void check_device_range(const void* p, size_t bytes, const char* what) {
  const std::string reason = outside(p, bytes);
  if (!reason.empty()) fail(std::string(what) + ": " + reason);
}

void check_device_memory(const void* p, size_t bytes, const char* what) {
  const size_t past = reinterpret_cast<uintptr_t>(p) % bytes;
  if (past)
    fail(std::string(what) + " at an address " + std::to_string(past) + " past a multiple of " + std::to_string(bytes));
  check_device_range(p, bytes, what);
  const bool early = this_thread && this_thread->launch->shape.start == Start::kEarly;
  if (early && !this_thread->waited_for_previous && changed(p, bytes))
    fail(std::string(what) + " of what the kernel in front wrote, before wait_for_previous_kernel()");
}

void forget_changes() {
  changes.before.clear();
  changes.words.clear();
}

void remember_memory() {
  Memories& all = memories();
  const std::lock_guard<std::mutex> lock(all.mutex);
  changes.before.clear();
  for (const auto& [address, buffer] : all.buffers) {
    const auto* data = reinterpret_cast<const unsigned char*>(address);
    changes.before[address].assign(data, data + buffer.bytes);
  }
}

void find_changes() {
  Memories& all = memories();
  const std::lock_guard<std::mutex> lock(all.mutex);
  changes.words.clear();
  for (const auto& [address, bytes] : changes.before) {
    const auto at = all.buffers.find(address);
    if (at == all.buffers.end() || at->second.bytes != bytes.size()) continue;  // another thread has freed it
    const auto* data = reinterpret_cast<const unsigned char*>(address);
    for (size_t i = 0; i < bytes.size(); i += kWord) {
      if (memcmp(data + i, &bytes[i], std::min(kWord, bytes.size() - i)) != 0) changes.words.push_back(address + i);
    }
  }
  changes.before.clear();
}

void check_device_guards(const std::string& what) {
  Memories& all = memories();
  const std::lock_guard<std::mutex> lock(all.mutex);
  std::string found;
  std::swap(found, all.damage);
  for (auto at = all.buffers.begin(); found.empty() && at != all.buffers.end(); ++at)
    found = damage_of(at->first, at->second);
  if (!found.empty()) throw Error(kPyllamaCudaInternal, what + ": " + found);
}

}  // namespace pyllama::cuda::emulation
