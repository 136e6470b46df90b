// The table of CPU kernels. Each instruction set compiles csrc/cpu/kernels.inc once over its SIMD vocabulary and
// exports nothing but its table (a weak symbol from an AVX-512 object would be an illegal instruction elsewhere),
// so everything in this header is a plain struct. All kernels give the same bits on every instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "formats.h"
#include "portable_exp2.h"
#include "vocab.h"

namespace pyllama {
namespace cpu {

constexpr int kKeyBlock = 16;      // keys interleaved in a page: one vector lane each
constexpr int kSplitTok = 512;     // keys of one attention split; partial results are combined in ascending order
constexpr int kMaxQueryRows = 96;  // (token, head) rows that share one read of keys and values; even

// 32 columns of one token: x[k] ≈ q[k] * scale. All that a product reads of them lies side by side.
struct XBlock {
  float scale;       // 0, or of at most 22 significant bits, so that 1.5·2^23·scale is exact; NaN poisons the block
  float shift;       // -1.5·2^23·scale
  int32_t start[2];  // kDotOrigin - bias · Σ q, for codes stored with a bias of 8 and of 128
  int8_t q[32];      // in -127…127, zeros behind the last column
};
constexpr int32_t kDotOrigin =
    0x4b400000;  // the bits of 1.5·2^23; kDotOrigin + n are those of 1.5·2^23 + n, |n| < 2^22

// 32 columns of sixteen tokens, as a tile unit takes them.
struct XTile {
  int8_t q[16][32];
  float scale[16], shift[16];  // as in XBlock
};

// 64 columns of up to eight tokens, where a step has no more of them or the last tokens are so few: token m's first 32
// columns begin row m, the others end row 8 + m, and zeros beside them keep their sums apart.
struct XPair {
  int8_t q[16][64];
  float scale[2][8], shift[2][8];
};
static inline bool in_pairs(int tok) { return tok <= 8; }

// Activations of M tokens.
struct QuantX {
  const XBlock* blocks;    // [M][ld]
  int64_t ld;              // at least Kp/32, plus what keeps rows out of each other's sets of the first-level cache
  const float* group_sum;  // [M][groups]: sums of q*scale over the weight's groups; only for formats with an offset
  const XTile* tiles;      // [ceil(M/16)][Kp/32], or XPair [ceil(Kp/64)] from there; at a multiple of 64 bytes, or null
  const float* tile_sum;   // [ceil(M/16)][groups][16]: group_sum for whoever takes tiles, or null
};

// The part of a Weight that kernels read, as plain data.
struct WeightView {
  Format format;
  Number scale_type, offset_type;
  int N, K, Kp;            // Kp: K padded to 32
  int group, groups;       // columns per scale, ceil(K / group)
  const int8_t* codebook;  // [32]
  const uint8_t* codes;
  const uint8_t* scales;
  const uint8_t* offsets;
};

// y[m][n] (+)= Σ_k x[m][k]·W[n][k] for the tiles [tile_begin, tile_end) of W; columns of y beyond N are not written.
struct MatmulArgs {
  WeightView w;
  int M;
  QuantX xq;       // for quantized formats
  const float* x;  // for dense formats: [M][ldx], ldx >= K
  int64_t ldx;
  const float* bias;  // [N] or null: added to the product
  float* y;           // [M][ldy]
  int64_t ldy;
  bool accumulate;  // y += instead of y =
};

enum class KvType : uint8_t { f16, q8 };

// Where a key/value head's 64 tokens of one layer and page lie: keys, then values, byte offsets from the keys.
//   f16  keys [kPageTok/16][head_dim][16] halves; values [kPageTok][wide] halves
//   q8   keys [kPageTok/16][quads][16][4] int8, scales [groups][kPageTok] halves; values [kPageTok/4][wide][4] int8,
//        scales [groups][kPageTok] halves: one scale for 32 dimensions of one token
struct KvLayout {
  KvType type;
  int head_dim;
  int wide;    // head_dim rounded up to 16
  int quads;   // head_dim in fours, rounded up
  int groups;  // head_dim in 32s, rounded up
  int64_t key_scales, values, value_scales;
  int64_t bytes;  // a multiple of 64
};

// Attention of up to kMaxQueryRows rows, which share a key/value head, over the keys [key_begin, key_end). Results are
// not yet divided by the sum; those of several splits are combined in ascending order.
struct AttendArgs {
  int rows;
  const float* q;               // [rows][head_dim], zeros up to an even number of rows
  const int* limit;             // [rows, made even] row r sees keys at positions < limit[r]; ascending
  int window;                   // … and >= limit[r] - window; kAllKeys of config.h: all of them
  int key_begin, key_end;       // absolute; key_begin is a multiple of kPageTok, key_end at most the last limit
  const uint8_t* const* pages;  // by page id
  const int* page_ids;          // [page of the sequence]
  int64_t head_offset;          // of this head within a page
  const uint8_t* next;          // keys that this thread will probably read after these, or null
  KvLayout layout;
  float scale;
  float* max;      // [rows, made even] maximum of the scores
  float* sum;      // [rows, made even] Σ exp(score - max)
  float* out;      // [rows, made even][wide] Σ exp(score - max)·v
  float* scratch;  // attend_scratch() floats
};

// Floats of scratch that attend() needs: a page of keys and values in float32 (or what int8 keys want of the rows'
// queries, and values), and a second split's sums.
static inline size_t attend_scratch(int rows, const KvLayout& l) {
  const size_t page = 64 * (static_cast<size_t>(l.head_dim) + l.wide);
  const size_t queries = static_cast<size_t>(rows) * l.groups * 2 * sizeof(XBlock) / sizeof(float);
  return page + static_cast<size_t>(rows) * l.wide + (l.type == KvType::q8 ? queries : 0);
}

struct Kernels {
  const char* isa;
  int few_tok;      // up to so many tokens matmul() reads the weights as they lie; for more it decodes strips of them
  int strip_tiles;  // tiles in such a strip
  void (*quantize_row)(const float* x, int K, XBlock* blocks);  // one row: x [K] → blocks [Kp/32]
  void (*matmul)(const MatmulArgs& a, int tile_begin, int tile_end);
  // y = x / sqrt(mean(x²) + eps) · w; y may be x
  void (*rmsnorm)(const float* x, const float* w, int dim, float eps, float* y);
  // Rotates pairs (i, i + head_dim/2) of one head in place. cos, sin: [head_dim/2]
  void (*rope)(float* head, const float* cos, const float* sin, int head_dim);
  // h[i] = silu(gate[i]) · up[i]
  void (*swiglu)(const float* gate, const float* up, int n, float* h);
  void (*attend)(const AttendArgs& a);
  // One row's results of n_splits splits, `stride` floats apart, combined in ascending order and divided: out
  // [head_dim].
  void (*combine)(const float* max, const float* sum, const float* outs, int64_t stride, int n_splits, int head_dim,
                  float* out);
  // One token's keys and values of one head into slot 0 … kPageTok - 1 of its block.
  void (*append_kv)(const float* k, const float* v, const KvLayout& layout, uint8_t* block, int slot);
  void (*exp)(const float* x, int n, float* y);
  uint64_t (*read_stream)(const uint8_t* data, size_t size_bytes);
  // Runs `rounds` of independent dot products in registers; returns the operations done, and something to keep in
  // *sink.
  double (*dot_peak)(int rounds, int32_t* sink);
  VocabKernels vocab;
  int tile_tok = 0;                                   // from so many tokens on matmul() wants QuantX::tiles; 0: never
  int tile_offset_tok = 0, most_tile_offset_tok = 0;  // with an offset from so many on, and up to so many
};

// What a tile unit has instead of another instruction set's functions. Few tokens and dense weights it hands on.
struct TileKernels {
  int tile_tok, tile_offset_tok, most_tile_offset_tok, strip_tiles;  // as in Kernels
  void (*matmul)(const MatmulArgs& a, int tile_begin, int tile_end);
  double (*dot_peak)(int rounds, int32_t* sink);
};

}  // namespace cpu
}  // namespace pyllama
