// Zones before and behind emulated memory that nothing may touch. They hold a NaN in every type, and not what poison
// is. Under AddressSanitizer they are its business: it reports each single read or write, with the line of the kernel.
#pragma once

#include <cstddef>
#include <string>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(begin, bytes) (static_cast<void>(begin), static_cast<void>(bytes))
#define ASAN_UNPOISON_MEMORY_REGION(begin, bytes) (static_cast<void>(begin), static_cast<void>(bytes))
#endif

namespace pyllama::cuda::emulation {

constexpr size_t kGuardBytes = 256;  // also the alignment of emulated memory, as cudaMalloc's
constexpr unsigned char kGuard[2] = {0xc5, 0xff};

// The zones around data[bytes]; the memory is there.
inline void set_guards(unsigned char* data, size_t bytes) {
  ASAN_UNPOISON_MEMORY_REGION(data - kGuardBytes, bytes + 2 * kGuardBytes);
  for (size_t i = 0; i < kGuardBytes; i++) data[i - kGuardBytes] = data[bytes + i] = kGuard[i % 2];
  ASAN_POISON_MEMORY_REGION(data - kGuardBytes, kGuardBytes);
  ASAN_POISON_MEMORY_REGION(data + bytes, kGuardBytes);
}

// Takes them away, before the memory is used for something else. Returns where somebody wrote ("4 bytes before"), or
// "".
inline std::string lift_guards(unsigned char* data, size_t bytes) {
  ASAN_UNPOISON_MEMORY_REGION(data - kGuardBytes, bytes + 2 * kGuardBytes);
  for (size_t i = 0; i < kGuardBytes; i++) {
    if (data[bytes + i] != kGuard[i % 2]) return std::to_string(i) + " bytes behind";
    if (data[i - kGuardBytes] != kGuard[i % 2]) return std::to_string(kGuardBytes - i) + " bytes before";
  }
  return "";
}

}  // namespace pyllama::cuda::emulation
