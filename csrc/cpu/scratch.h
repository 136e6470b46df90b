// The buffers of a step in one piece of memory, so that they lie in huge pages: a product writes one strip of every
// token's row, and with small pages each of those writes would miss the address cache.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "os.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(at, size)
#define ASAN_UNPOISON_MEMORY_REGION(at, size)
#endif

namespace pyllama {
namespace cpu {

// Buffers are claimed one by one and exist from allocate() on; nothing moves before it has succeeded.
class Arena {
 public:
  Arena() = default;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena() {
    if (!data_) return;
    ASAN_UNPOISON_MEMORY_REGION(data_, size_);
    free_zeroed(data_, size_);
  }

  // *at will point to n values of T, zeros at first, on a cache line of their own.
  template <class T>
  void claim(T** at, size_t n) {
    claims_.push_back({[](void* slot, uint8_t* data) { *static_cast<T**>(slot) = reinterpret_cast<T*>(data); }, at,
                       size_, n * sizeof(T)});
    size_ += (n * sizeof(T) + 63) / 64 * 64 + kGap;
  }

  void allocate() {  // throws std::bad_alloc
    data_ = static_cast<uint8_t*>(alloc_zeroed(size_));
    ASAN_POISON_MEMORY_REGION(data_, size_);
    for (const Claim& c : claims_) {
      ASAN_UNPOISON_MEMORY_REGION(data_ + c.offset, c.size);
      c.set(c.slot, data_ + c.offset);
    }
  }

  void swap(Arena& other) {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    claims_.swap(other.claims_);
  }

 private:
  // Between buffers, so that rows of 2^n numbers do not begin at the same place of a cache's sets; poisoned for the
  // address sanitizer.
  static constexpr size_t kGap = 5 * 64;
  struct Claim {
    void (*set)(void* slot, uint8_t* data);
    void* slot;
    size_t offset, size;
  };
  std::vector<Claim> claims_;
  size_t size_ = 0;
  uint8_t* data_ = nullptr;
};

}  // namespace cpu
}  // namespace pyllama
