// Products of many tokens on a tile unit (AMX, Sapphire Rapids and later). A tile instruction multiplies sixteen tokens
// by sixteen rows over 32 columns; the vector unit scales what it gave, sum by sum as everywhere (docs/KERNELS.md), so
// the bits are those of every other instruction set. Here are products of many tokens; those of few, which wait for
// weights, are in kernels_amx_few.inc. The fewest, dense weights, many tokens of a format with an offset, where a third
// fma leaves little to gain, and all that is not a product are the kernels of AVX-512.
#include "kernels.h"

#include <cstring>

#include "simd_avx512.h"

namespace {
using namespace pyllama::cpu;
using pyllama::Format;
using pyllama::Number;
#define PYLLAMA_INLINE inline __attribute__((always_inline))
#define PYLLAMA_NOINLINE __attribute__((noinline))
}  // namespace

#include "kernels_weights.inc"

#include "kernels_amx_weights.inc"

namespace pyllama {
namespace cpu {
extern const Kernels kKernels_avx512vnni;
extern const TileKernels kKernels_amx;
}  // namespace cpu
}  // namespace pyllama

namespace {

constexpr int kFewTok = 7;                          // tokens from which on tiles are worth it, also of a remainder
constexpr int kOffsetTok = 9, kMostOffsetTok = 31;  // for a format with an offset, and up to how many they are
// Tokens from which on a panel of them is: later where there is nothing to decode.
int many_tok(Format format) { return format == Format::q8 ? 48 : 32; }

// Tiles 0-3: dot products; 4, 5: tokens × columns; 6, 7: columns × 16 rows.
void configure_tiles(int x_rows, int x_bytes, int w_rows) {
  struct {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t column_bytes[16] = {};
    uint8_t rows[16] = {};
  } c;
  for (int i = 0; i < 8; i++) {
    c.column_bytes[i] = static_cast<uint16_t>(i == 4 || i == 5 ? x_bytes : 64);
    c.rows[i] = static_cast<uint8_t>(i < 6 ? x_rows : w_rows);
  }
  asm volatile("ldtilecfg %0" : : "m"(c));  // the intrinsic of gcc 12 says that it reads eight bytes
}

// gcc's intrinsics for tiles are macros that want the digit itself. AT: bytes from the pointer, part of the
// instruction, which is short of registers for addresses.
template <int T>
PYLLAMA_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(T));
}
template <int T, int AT, int ROW_BYTES>
PYLLAMA_INLINE void tile_load(const void* rows) {
  asm volatile("tileloadd %c3(%0,%1,1), %%tmm%c2" : : "r"(rows), "r"(int64_t{ROW_BYTES}), "i"(T), "i"(AT) : "memory");
}
template <int T, int AT>
PYLLAMA_INLINE void tile_store(void* rows) {
  asm volatile("tilestored %%tmm%c2, %c3(%0,%1,1)" : : "r"(rows), "r"(int64_t{64}), "i"(T), "i"(AT) : "memory");
}
template <int SUM, int X, int W>
PYLLAMA_INLINE void tile_dot() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUM), "i"(X), "i"(W));
}

// acc = fma(dot · xscale, wscale, acc). The unit for tiles takes one of the two that multiply, convert and add floats,
// so the sums become floats by an integer addition: of the bits of 1.5·2^23, which leave again as shift.
PYLLAMA_INLINE VF add_dots(const int32_t (&dots)[16], VF xscale, VF xshift, VF wscale, VF acc) {
  const VI bits = vi_add(vi_set1(kDotOrigin), _mm512_load_si512(dots));
  return vf_fma(vf_fma(vf_bits(bits), xscale, xshift), wscale, acc);
}

}  // namespace

#include "kernels_amx_few.inc"

namespace {

// n blocks of 32 columns, 16 tokens × 16 rows.
struct Factors {
  const XTile* x;
  const WeightTile* w;  // kStripTiles apart
  int n;
};

// In step K of a round a block of the next round goes into the tile unit, and, when a block was scaled meanwhile, one
// that went in two steps ago comes out: the unit's products and stores overlap only where they are not of one tile.
template <int K>
PYLLAMA_INLINE void tile_in(const Factors& next) {
  if (K >= next.n) return;
  tile_zero<K>();
  tile_load<6 + K % 2, K * kStripTiles* static_cast<int>(sizeof(WeightTile)), 64>(next.w);
  tile_load<4 + K % 2, K* static_cast<int>(sizeof(XTile)), 32>(next.x);
  tile_dot<K, 4 + K % 2, 6 + K % 2>();
}
template <int K>
PYLLAMA_INLINE void tile_out(Dots* dots, int now, const Factors& next) {
  constexpr int kOut = (K + 2) % kRound;
  if (kOut < (K < 2 ? now : next.n)) tile_store<kOut, kOut* static_cast<int>(sizeof(Dots))>(dots);
}

// While the tiles of a strip pass by sixteen tokens, each block brings its share of the next tokens' columns.
constexpr int kAheadBytes = sizeof(XTile) / kStripTiles;
PYLLAMA_INLINE void fetch(const char* ahead) {
#pragma GCC unroll 8
  for (int i = 0; i < kAheadBytes; i += 64) __builtin_prefetch(ahead + i);
}

PYLLAMA_INLINE void scale_block(const Dots& dots, const XTile& x, const float (&scale)[16], VF (&acc)[16]) {
  const VF by_row = vf_load(scale);
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) {
    acc[i] = add_dots(dots[i], vf_set1(x.scale[i]), vf_set1(x.shift[i]), by_row, acc[i]);
  }
}

template <int K>
PYLLAMA_INLINE void step(Dots* dots, const Factors& now, const Factors& next, const float (*scale)[16],
                         const char* ahead, VF (&acc)[16]) {
  tile_in<K>(next);
  if (K < now.n) {
    fetch(ahead + K * kAheadBytes);
    scale_block(dots[K], now.x[K], scale[K], acc);
  }
  tile_out<K>(dots, now.n, next);
}

// Adds the blocks `now`, whose first round is in the tile unit already, to the sums of 16 tokens × 16 rows, and puts
// the first round of `next` in.
PYLLAMA_INLINE void multiply(Dots* dots, Factors now, const Factors& next, const float (*scale)[16], const char* ahead,
                             VF (&acc)[16]) {
  for (; now.n > 0; scale += kRound, ahead += kRound * kAheadBytes) {
    const Factors rest{now.x + kRound, now.w + kRound * kStripTiles, now.n - kRound};
    const Factors coming = rest.n > 0 ? rest : next;
    step<0>(dots, now, coming, scale, ahead, acc);
    step<1>(dots, now, coming, scale, ahead, acc);
    step<2>(dots, now, coming, scale, ahead, acc);
    step<3>(dots, now, coming, scale, ahead, acc);
    now = rest;
  }
}

// One tile of rows for sixteen tokens from m on, of which `count` exist.
PYLLAMA_NOINLINE void multiply_tokens(const MatmulArgs& a, const Pass& pass, Strip& s, int m, int count, int r,
                                      float (&sums)[16][16], const Factors& now, const Factors& next) {
  const int row = (pass.tile + r) * 16;
  if (pass.last) {
#pragma GCC unroll 1
    for (int i = 0; i < count; i++) __builtin_prefetch(a.y + (m + i) * a.ldy + row, 1);
  }
  VF acc[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) acc[i] = pass.first ? vf_set1(0.0f) : vf_load(sums[i]);
  const char* ahead = reinterpret_cast<const char*>(now.x + a.w.Kp / 32) + r * pass.blocks * kAheadBytes;
  multiply(s.dots, now, next, s.scale[r], ahead, acc);
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) vf_store(sums[i], acc[i]);
  if (!pass.last) return;
#pragma GCC unroll 1
  for (int i = 0; i < count; i++) store_rows(a, row, m + i, vf_load(sums[i]));
}

// The decoded columns of a strip, for tokens [m0, m0 + count).
void multiply_pass(const MatmulArgs& a, const Pass& pass, Strip& s, int m0, int count) {
  const int all_blocks = a.w.Kp / 32, first_n = pass.blocks < kRound ? pass.blocks : kRound;
  const XTile* x = a.xq.tiles + static_cast<int64_t>(m0 / 16) * all_blocks + pass.block0;
  const Factors first{x, s.w[0], first_n};
  tile_in<0>(first);
  tile_in<1>(first);
  tile_in<2>(first);
  tile_out<2>(s.dots, 0, first);
  tile_in<3>(first);
  tile_out<3>(s.dots, 0, first);
  StripAhead ahead(a.w, pass, (count + 15) / 16);
  for (int m = 0; m < count; m += 16, x += all_blocks) {
    ahead.fetch();
    for (int r = 0; r < pass.tiles; r++) {
      const bool same = r + 1 < pass.tiles, end = !same && m + 16 >= count;
      const Factors next{same ? x : x + all_blocks, s.w[0] + (same ? r + 1 : 0), end ? 0 : first_n};
      multiply_tokens(a, pass, s, m0 + m, count - m < 16 ? count - m : 16, r, s.acc[m / 16][r],
                      Factors{x, s.w[0] + r, pass.blocks}, next);
    }
  }
}

void multiply_panel(const MatmulArgs& a, const CodeTable& table, int tile, int tiles, int m0, int count, Strip& s) {
  const int all_blocks = a.w.Kp / 32;
  for (int block0 = 0, blocks; block0 < all_blocks; block0 += blocks) {
    blocks = all_blocks - block0 <= kMostBlocks ? all_blocks - block0 : kChunkBlocks;
    const Pass pass{tile, tiles, block0, blocks, block0 == 0, block0 + blocks == all_blocks};
    decode(a.w, pass, table, s);
    multiply_pass(a, pass, s, m0, count);
  }
}

void many_tokens(const MatmulArgs& a, int tile_begin, int tile_end, int done) {
  Strip strip;
  const CodeTable table = code_table(a.w);
  configure_tiles(16, 32, 8);
  for (int m = 0; m < done; m += kPanelTok) {
    const int count = done - m < kPanelTok ? done - m : kPanelTok;
    for (int tile = tile_begin; tile < tile_end; tile += kStripTiles) {
      multiply_panel(a, table, tile, tile_end - tile < kStripTiles ? tile_end - tile : kStripTiles, m, count, strip);
    }
  }
  _tile_release();
}

void matmul(const MatmulArgs& a, int tile_begin, int tile_end) {
  int done = 0;
  if (a.xq.tiles) {
    if (a.M >= many_tok(a.w.format)) {
      done = in_pairs(a.M % 16) ? a.M / 16 * 16 : a.M;
      many_tokens(a, tile_begin, tile_end, done);
    }
    while (a.M - done >= kFewTok) {
      const int count = a.M - done < 16 ? a.M - done : 16;
      few_tokens(a, tile_begin, tile_end, done, count);
      done += count;
    }
  }
  if (done == a.M) return;
  MatmulArgs rest = a;
  rest.M -= done;
  rest.xq.blocks += done * a.xq.ld;
  rest.xq.group_sum += static_cast<int64_t>(done) * a.w.groups;
  rest.x += done * a.ldx;
  rest.y += done * a.ldy;
  kKernels_avx512vnni.matmul(rest, tile_begin, tile_end);
}

// Products of 32 columns, though a tile holds 64: after 32 a sum has to leave the unit.
double dot_peak(int rounds, int32_t* sink) {
  alignas(64) Dots dots;
  configure_tiles(16, 32, 8);
  tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>(), tile_zero<4>(), tile_zero<6>();
  for (int r = 0; r < rounds; r++) {
    tile_dot<0, 4, 6>(), tile_dot<1, 4, 6>(), tile_dot<2, 4, 6>(), tile_dot<3, 4, 6>();
  }
  tile_store<0, 0>(dots);
  _tile_release();
  *sink = dots[0][0];
  return static_cast<double>(rounds) * 4 * 16 * 16 * 32 * 2;
}

}  // namespace

namespace pyllama {
namespace cpu {
const TileKernels kKernels_amx = {kFewTok, kOffsetTok, kMostOffsetTok, kStripTiles, matmul, dot_peak};
}  // namespace cpu
}  // namespace pyllama
