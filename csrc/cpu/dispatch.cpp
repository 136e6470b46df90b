// Which instruction sets this build has, which this processor (and its operating system) runs, and the choice between
// them.
#include <cstdlib>
#include <stdexcept>

#include "../error.h"
#include "cpu.h"
#include "dispatch.h"
#include "os.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace pyllama {
namespace cpu {

extern const Kernels kKernels_scalar;
#if defined(__x86_64__)
extern const Kernels kKernels_avx2;
extern const Kernels kKernels_avxvnni;
extern const Kernels kKernels_avx512vnni256;
extern const Kernels kKernels_avx512vnni;
extern const TileKernels kKernels_amx;
#elif defined(__aarch64__)
extern const Kernels kKernels_neon;
#endif

namespace {

struct Features {
  bool avx2 = false, avxvnni = false, avx512vnni = false, amx = false, neon_dot = false;
};

#if defined(__x86_64__)
uint64_t xgetbv0() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

Features detect() {
  Features f;
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return f;
  const bool osxsave = c & (1u << 27), avx = c & (1u << 28), fma = c & (1u << 12), f16c = c & (1u << 29);
  if (!osxsave || !avx) return f;
  const uint64_t saved = xgetbv0();  // which registers the operating system keeps
  const bool ymm = (saved & 0x6) == 0x6, zmm = (saved & 0xe6) == 0xe6;
  if (!ymm || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return f;
  f.avx2 = fma && f16c && (b & (1u << 5));
  const unsigned need_b = (1u << 16) | (1u << 17) | (1u << 30) | (1u << 31);  // AVX512 F, DQ, BW, VL
  f.avx512vnni = f.avx2 && zmm && (b & need_b) == need_b && (c & (1u << 11));
  const bool tiles = (saved & 0x60000) == 0x60000 && (d & (1u << 24)) && (d & (1u << 25));  // AMX-TILE, AMX-INT8
  f.amx = f.avx512vnni && tiles && allow_tiles();
  const unsigned max_subleaf = a;
  if (max_subleaf >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) f.avxvnni = f.avx2 && (a & (1u << 4));
  return f;
}
#elif defined(__aarch64__)
Features detect() {
  Features f;
#if defined(__linux__)
  constexpr unsigned long kDotProducts = 1ul << 20;  // HWCAP_ASIMDDP
  f.neon_dot = getauxval(AT_HWCAP) & kDotProducts;
#elif defined(__APPLE__)
  f.neon_dot = true;  // since the first Mac with such a processor, the M1
#endif
  return f;
}
#else
Features detect() { return {}; }
#endif

#if defined(__x86_64__)
// AVX-512 with products of many tokens on tiles.
const Kernels& amx_kernels() {
  static const Kernels table = [] {
    Kernels k = kKernels_avx512vnni;
    k.isa = "amx";
    k.matmul = kKernels_amx.matmul;
    k.dot_peak = kKernels_amx.dot_peak;
    k.tile_tok = kKernels_amx.tile_tok;
    k.tile_offset_tok = kKernels_amx.tile_offset_tok;
    k.most_tile_offset_tok = kKernels_amx.most_tile_offset_tok;
    k.strip_tiles = kKernels_amx.strip_tiles;
    return k;
  }();
  return table;
}
#endif

struct Row {
  const Kernels* kernels;
  bool runs;
};

// Best first.
const std::vector<Row>& rows() {
  static const std::vector<Row> table = [] {
    const Features f = detect();
    (void)f;
    return std::vector<Row>{
#if defined(__x86_64__)
        {&amx_kernels(), f.amx},        {&kKernels_avx512vnni, f.avx512vnni},
        {&kKernels_avxvnni, f.avxvnni}, {&kKernels_avx512vnni256, f.avx512vnni},
        {&kKernels_avx2, f.avx2},
#elif defined(__aarch64__)
        {&kKernels_neon, f.neon_dot},
#endif
        {&kKernels_scalar, true},
    };
  }();
  return table;
}

}  // namespace

const Kernels& kernels_for(const std::string& isa) {
  const std::string name = choose_isa(isa);
  for (const Row& row : rows()) {
    if (name == row.kernels->isa) return *row.kernels;
  }
  throw std::logic_error("choose_isa returned an unknown name");
}

}  // namespace cpu

std::vector<std::string> cpu_all_isas() {
  std::vector<std::string> names;
  for (const auto& row : cpu::rows()) names.push_back(row.kernels->isa);
  return names;
}

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (const auto& row : cpu::rows()) {
    if (row.runs) names.push_back(row.kernels->isa);
  }
  return names;
}

std::string choose_isa(const std::string& wanted) {
  std::string name = wanted, from = "isa";
  if (name.empty()) {
    const char* env = std::getenv("PYLLAMA_ISA");
    if (env) name = env, from = "PYLLAMA_ISA";
  }
  const auto mine = cpu_isas();
  if (name.empty()) return mine.front();
  std::string list;
  for (const auto& isa : mine) {
    if (isa == name) return name;
    list += (list.empty() ? "" : ", ") + isa;
  }
  bool known = false;
  for (const auto& isa : cpu_all_isas()) known |= isa == name;
  throw std::invalid_argument(from + "='" + name + "': " +
                              (known ? "this processor does not run it" : "no such instruction set in this build") +
                              "; choose one of: " + list);
}

const VocabKernels& cpu_vocab_kernels(const std::string& isa) { return cpu::kernels_for(isa).vocab; }

int default_threads() { return physical_cores_allowed(); }

}  // namespace pyllama
