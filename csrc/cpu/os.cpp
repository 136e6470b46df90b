// Linux calls that the CPU device needs; elsewhere the portable fallbacks at the end of each function.
#include "os.h"

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <new>
#include <set>
#include <string>
#include <thread>

#ifdef __linux__
#include <fcntl.h>
#include <sched.h>
#include <sys/ioctl.h>
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

#ifdef __linux__
// What older headers lack of linux/mman.h and linux/fs.h: the syscall cachestat, and PAGEMAP_SCAN of
// /proc/self/pagemap.
constexpr long kCacheStat = 451;
constexpr unsigned long kPagemapScan = _IOWR('f', 16, uint64_t[12]);
constexpr uint64_t kPageIsHuge = 1 << 6;
struct FileRange {
  uint64_t offset, size_bytes;
};
struct CacheStat {
  uint64_t cached, dirty, writeback, evicted, recently_evicted;
};
struct PageScan {
  uint64_t size, flags, start, end, walk_end, runs, n_runs, most_pages, inverted, all_of, any_of, wanted;
};
struct PageRun {
  uint64_t begin, end, categories;
};

struct Descriptor {
  const int fd;
  ~Descriptor() {
    if (fd >= 0) close(fd);
  }
};

// Whether so much of a block is in the cache that reading all of it waits for no more than a little of a slow disk.
bool is_cached(int fd, size_t at) {
  FileRange range{at, kHugePage};
  CacheStat stat{};
  const uint64_t page = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  return syscall(kCacheStat, fd, &range, &stat, 0) == 0 && stat.cached * page >= kHugePage / 8 * 7;
}

// Whether a block is mapped by a huge page; -1 where the system does not say.
int is_huge(int pagemap, const char* block) {
  PageRun run{};
  const uint64_t begin = reinterpret_cast<uintptr_t>(block), end = begin + kHugePage;
  PageScan scan{sizeof scan, 0, begin, end, 0, reinterpret_cast<uintptr_t>(&run), 1, 0, 0, kPageIsHuge, 0, kPageIsHuge};
  const int n = ioctl(pagemap, kPagemapScan, &scan);
  return n < 0 ? -1 : n == 1 && run.begin == begin && run.end == end;
}

// A file whose cache is in huge pages maps one as a whole at the first touch. A disk's error while what was dropped is
// read again is a SIGBUS, as wherever a mapped file is read; who cannot have that opens with mmap=False.
void touch(const char* p) { *static_cast<const volatile char*>(p); }
#endif

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
  const size_t spare = size_bytes >= 2 * kHugePage ? kHugePage : 0;
  void* mapped = mmap(nullptr, size_bytes + spare, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  if (spare == 0) return mapped;
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  char* begin = static_cast<char*>(mapped);
  char* p = begin + (kHugePage - reinterpret_cast<uintptr_t>(begin) % kHugePage) % kHugePage;
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

int settle_in_huge_pages(int fd, const void* mapped, size_t size_bytes, double seconds) {
  int done = 0;
#ifdef __linux__
  const auto start = std::chrono::steady_clock::now();
  const auto late = [&] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() > seconds;
  };
  const char* data = static_cast<const char*>(mapped);
  if (reinterpret_cast<uintptr_t>(data) % kHugePage) return 0;
  const Descriptor pagemap{open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC)};
  // Blocks stay small that another process has mapped, and all where the file system knows no others. What was dropped
  // for nothing has to be read from the disk again, so few failures are an answer.
  constexpr int kMostFailed = 3;
  int failed = 0;
  for (size_t at = 0; at + kHugePage <= size_bytes && failed < kMostFailed && !late(); at += kHugePage) {
    if (!is_cached(fd, at)) continue;
    char* block = const_cast<char*>(data + at);
    touch(block);
    const int huge = is_huge(pagemap.fd, block);
    if (huge < 0) break;
    if (huge) continue;
    madvise(block, kHugePage, MADV_DONTNEED);  // no page leaves the cache while it is mapped
    posix_fadvise(fd, static_cast<off_t>(at), kHugePage, POSIX_FADV_DONTNEED);
    touch(block);
    (is_huge(pagemap.fd, block) == 1 ? done : failed)++;
  }
#else
  (void)fd, (void)mapped, (void)size_bytes, (void)seconds;
#endif
  return done;
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
