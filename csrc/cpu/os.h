// The operating system, in one file: how many processors we may use, memory for pages, mapped files in huge pages,
// putting a thread to sleep.
#pragma once

#include <cstddef>

namespace pyllama {

int physical_cores_allowed();           // distinct cores in this process's affinity mask, cut to the cgroup's quota
void* alloc_zeroed(size_t size_bytes);  // 64-byte aligned; throws std::bad_alloc
void free_zeroed(void* data, size_t size_bytes);
// Gives back what memory stands behind it, where the system can do that; its content is then zeros or as it was.
void forget_content(void* data, size_t size_bytes);
// Parts of a mapped file that the system caches in small pages, read again so that it caches them in huge ones: only
// blocks of kHugePage bytes that are nearly all in the cache, and none is begun after `seconds`. `mapped`: the first
// size_bytes of the file. Returns how many were brought; 0 where the system or the file system cannot. Takes cachestat
// (Linux 6.5; since 6.14 perhaps only for files that the user owns or may write) and PAGEMAP_SCAN (6.7).
constexpr size_t kHugePage = size_t{2} << 20;
int settle_in_huge_pages(int fd, const void* mapped, size_t size_bytes, double seconds);
bool allow_tiles();                // asks for the tile registers (AMX), which a process does not have unasked
void cpu_relax();                  // a pause inside a spin loop
unsigned set_float_environment();  // round to nearest, subnormals kept; returns what was set before
void restore_float_environment(unsigned previous);

}  // namespace pyllama
