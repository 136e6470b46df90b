// Emulated device memory: host memory, poisoned when allocated, with guard zones around each buffer, and a register of
// what lies where, so that an access or a copy out of bounds is an error that names the buffer.
#pragma once

#include <cstddef>
#include <string>

namespace pyllama::cuda::emulation {

// What the device has, 8 GiB unless a test says otherwise. Asking for more is an error as on a device, whatever the
// host has.
size_t memory_bytes();
void set_memory_bytes(size_t bytes);

void* allocate(size_t bytes, const char* name);
void release(void* data) noexcept;
size_t allocated_bytes();

// Throws unless p is a multiple of `bytes` (an access of 2 to 16) and the bytes lie in one buffer.
void check_device_memory(const void* p, size_t bytes, const char* what);

// The same for a copy or fill of any size and alignment.
void check_device_range(const void* p, size_t bytes, const char* what);

// What the kernel in front has changed, for each host thread. One that starts early may not read it before it waits,
// since on a device it is perhaps not written yet: check_device_memory looks.
void remember_memory();  // before a kernel
void find_changes();     // after it: what is not as it was remembered
void forget_changes();   // nothing is in front any more, or no kernel

// Throws if somebody wrote into a guard zone; `what` is who ran last.
void check_device_guards(const std::string& what);

}  // namespace pyllama::cuda::emulation
