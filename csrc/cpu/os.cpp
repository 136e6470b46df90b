// Linux calls that the CPU device needs; elsewhere the portable fallbacks at the end of each function.
#include "os.h"

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <new>
#include <set>
#include <string>
#include <thread>

#ifdef __linux__
#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace pyllama {

namespace {

// The cgroup's CPU quota in whole processors, rounded up, or 0 where there is none.
int cgroup_quota() {
  std::ifstream v2("/sys/fs/cgroup/cpu.max");
  std::string quota;
  double period = 0;
  if (v2 >> quota >> period && quota != "max" && period > 0) {
    return static_cast<int>((std::atof(quota.c_str()) + period - 1) / period);
  }
  std::ifstream v1("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"), v1_period("/sys/fs/cgroup/cpu/cpu.cfs_period_us");
  double q = 0;
  if (v1 >> q && v1_period >> period && q > 0 && period > 0) return static_cast<int>((q + period - 1) / period);
  return 0;
}

#if defined(__aarch64__)
void write_fpcr(uint64_t value) { __asm__ volatile("msr fpcr, %0" : : "r"(value) : "memory"); }
#endif

}  // namespace

int physical_cores_allowed() {
  int cores = 0;
#ifdef __linux__
  cpu_set_t mask;
  if (sched_getaffinity(0, sizeof mask, &mask) == 0) {
    std::set<std::string> distinct;  // hyperthreads of one core name the same siblings
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
      if (!CPU_ISSET(cpu, &mask)) continue;
      std::string siblings = "cpu" + std::to_string(cpu);
      std::ifstream file("/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/thread_siblings_list");
      std::string line;
      if (std::getline(file, line) && !line.empty()) siblings = line;
      distinct.insert(siblings);
    }
    cores = static_cast<int>(distinct.size());
  }
#endif
  if (cores < 1) cores = static_cast<int>(std::thread::hardware_concurrency());
  const int quota = cgroup_quota();
  if (quota > 0 && quota < cores) cores = quota;
  return cores < 1 ? 1 : cores;
}

void* alloc_zeroed(size_t size_bytes) {
#ifdef __linux__
  // Fresh mappings are zero and take memory only when touched. Large ones begin where a huge page can.
  constexpr size_t kHuge = size_t{2} << 20;
  const size_t spare = size_bytes >= 2 * kHuge ? kHuge : 0;
  void* mapped = mmap(nullptr, size_bytes + spare, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  if (spare == 0) return mapped;
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  char* begin = static_cast<char*>(mapped);
  char* p = begin + (kHuge - reinterpret_cast<uintptr_t>(begin) % kHuge) % kHuge;
  char* end = p + (size_bytes + page - 1) / page * page;
  if (p > begin) munmap(begin, static_cast<size_t>(p - begin));
  if (end < begin + size_bytes + spare) munmap(end, static_cast<size_t>(begin + size_bytes + spare - end));
#ifdef MADV_HUGEPAGE
  madvise(p, size_bytes, MADV_HUGEPAGE);
#endif
  return p;
#else
  void* p = std::aligned_alloc(64, (size_bytes + 63) / 64 * 64);
  if (!p) throw std::bad_alloc();
  __builtin_memset(p, 0, size_bytes);
  return p;
#endif
}

void free_zeroed(void* data, size_t size_bytes) {
  if (!data) return;
#ifdef __linux__
  munmap(data, size_bytes);
#else
  (void)size_bytes;
  std::free(data);
#endif
}

void forget_content(void* data, size_t size_bytes) {
#ifdef __linux__
  madvise(data, size_bytes, MADV_DONTNEED);
#else
  (void)data;
  (void)size_bytes;
#endif
}

bool allow_tiles() {
#if defined(__linux__) && defined(__x86_64__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

void cpu_relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

unsigned set_float_environment() {
#if defined(__x86_64__)
  const unsigned previous = _mm_getcsr();
  _mm_setcsr(0x1f80);  // all exceptions masked, round to nearest, no flush to zero
  return previous;
#elif defined(__aarch64__)
  uint64_t previous;
  __asm__ volatile("mrs %0, fpcr" : "=r"(previous));
  write_fpcr(0);  // no traps, round to nearest, no flush to zero, IEEE half precision
  return static_cast<unsigned>(previous);
#else
  return 0;
#endif
}

void restore_float_environment(unsigned previous) {
#if defined(__x86_64__)
  _mm_setcsr(previous);
#elif defined(__aarch64__)
  write_fpcr(previous);
#else
  (void)previous;
#endif
}

}  // namespace pyllama
