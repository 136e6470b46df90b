// The body of products for many tokens. A block makes some tiles of 16 rows for some panels of 8 tokens, a warp 16 or
// 32 of the rows for all the block's tokens. All go through the columns in the same order, chunk by chunk:
//
//   weights      from memory into the registers of the one warp that wants them, a few chunks ahead; no shared memory,
//                since they lie in the order of A fragments. Codes become halves once for all tokens of the block.
//   activations  by asynchronous copies into shared memory, some stages ahead, for all warps. They lie there as they
//                lie in memory: a lane's 16 bytes follow the lane before, so that reading them has no bank conflicts.
//   sums         of a group of integers × activations by tensor cores, from zero; then times the group's scale into the
//                accumulators. What happens to a row and token is the same for every shape of block, so its bits are.
//
// Columns are not split over blocks or warps. docs/GPU.md has the arithmetic of what binds.
#pragma once

#include "cuda/chunk.cuh"
#include "cuda/epilogues.cuh"
#include "cuda/linear_many.h"

namespace pyllama {
namespace cuda {

// sm_75 has shared memory for two blocks only.
#if PYLLAMA_ON_DEVICE && defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool kFewRegisters = true;
#else
constexpr bool kFewRegisters = false;
#endif

// The shape of a block: 16 panels: 128 rows × 128 tokens (f16, whose codes are what most is read of); 8: 128 × 64; 4:
// 64 × 32; 2: 32 × 16. f32 has half the rows of 8.
template <class Weights, int panels>
struct ManyKind : Weights {
  static constexpr int kPanels = panels;
  static constexpr int kWarps = panels == 2 ? 2 : 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kTiles = panels >= 8 && Weights::kCodes != Codes::half_pair ? 2 : 1;  // of a warp
  // Chunks of a stage; as many a warp has on their way in registers. Few tokens take long to read weights for.
  static constexpr int kStep = panels >= 8 ? 1 : panels == 4 ? (Weights::kLoads > 2 ? 1 : 2) : 8 / Weights::kLoads;
  // Blocks that a multiprocessor has registers for, 168 or 255 a thread.
  static constexpr int kBlocks = panels == 2 ? 6 : Weights::kGroup32 || panels == 16 || kFewRegisters ? 2 : 3;
  static constexpr int kStages = kStep > 2 || panels == 16 ? 2 : 3;

  static constexpr int kChunkBytes = kPanelTokens * kChunkColumns * 2;  // of a panel
  static constexpr int kSumsBytes = Weights::kOffset == Offset::minimum ? kPanelTokens * 16 : 0;
  static constexpr int kStageBytes = kPanels * kStep * (kChunkBytes + kSumsBytes);
  static constexpr int kRows = 16 * kTiles;  // of a warp
  static constexpr int kPitch = kRows + 4;   // of a token's results in shared memory: no bank conflicts
  static constexpr int kSharedBytes = kStages * kStageBytes + 16;  // and a codebook
  static_assert(kWarps * kPanelTokens * (panels < 4 ? panels : 4) * kPitch * 4 <= kStages * kStageBytes, "results fit");
};

struct ManyArgs {
  Fragments w;
  Activations x;
  int n_tokens;
  int group_shift;  // of the number of a chunk: that of its scales
  bool swiglu;
  StoreRowsEpilogue rows;
  StoreSwigluEpilogue gated;
};

// Where a lane reads the chunks of a tile: offsets in 16 bytes and in words, which take half the registers of
// addresses.
struct ManyPlace {
  uint32_t codes, scales;
};

// Warps behind the last tile do its work again; nobody stores it.
template <class Kind>
PYLLAMA_DEVICE ManyPlace many_place(const Fragments& w, int tile) {
  const uint32_t there = static_cast<uint32_t>(tile < w.tiles ? tile : w.tiles - 1);
  const uint32_t chunks = static_cast<uint32_t>(w.chunks), groups = static_cast<uint32_t>(w.scale_groups);
  return {there * chunks * (32 * Kind::kLoads) + lane(), (there * groups * 8 + lane() / 4) * Kind::kScaleWords};
}

template <class Kind>
PYLLAMA_DEVICE const uint4* many_codes(const ManyArgs& args, const ManyPlace& at, int chunk) {
  return reinterpret_cast<const uint4*>(args.w.codes) + (at.codes + static_cast<uint32_t>(chunk) * (32 * Kind::kLoads));
}

template <class Kind>
PYLLAMA_DEVICE void fetch_chunk(WeightChunk<Kind> (&to)[Kind::kTiles], const ManyArgs& args,
                                const ManyPlace (&at)[Kind::kTiles], int chunk, bool valid) {
  const uint32_t scales = static_cast<uint32_t>(chunk >> args.group_shift) * (8 * Kind::kScaleWords);
  PYLLAMA_UNROLL
  for (int m = 0; m < Kind::kTiles; m++) {
    load_chunk(to[m], many_codes<Kind>(args, at[m], chunk), args.w.scales + (at[m].scales + scales), valid);
  }
}

// The block's part of the activations, stage by stage, into shared memory as they lie in memory: [panels][kStep
// chunks]. Each panel has threads of its own. A stage's panels behind the last are that one again: their results are
// not stored.
template <class Kind>
class StageCopier {
 public:
  PYLLAMA_DEVICE StageCopier(const Activations& x, int chunks, int n_tokens) : x_(x), left_(chunks) {
    const int wanted = static_cast<int>(block_index().x) * Kind::kPanels + panel();
    const int last = (n_tokens - 1) / kPanelTokens;
    const uint32_t first_chunk = static_cast<uint32_t>(wanted < last ? wanted : last) * static_cast<uint32_t>(chunks);
    values_ = first_chunk * kChunkPieces + static_cast<uint32_t>(piece());
    sums_ = first_chunk * kPanelTokens + static_cast<uint32_t>(piece());
  }

  PYLLAMA_DEVICE void copy_next(unsigned char* stage) {
    const uint4* const values = reinterpret_cast<const uint4*>(x_.values) + values_;
    unsigned char* const to = stage + (panel() * kRun + piece()) * 16;
    PYLLAMA_UNROLL
    for (int i = 0; i < kRun; i += kThreads) {
      copy_async_16(to + i * 16, values + i, Kind::kStep == 1 || i / kChunkPieces < left_);
    }
    values_ += kRun;
    if constexpr (Kind::kSumsBytes > 0) {
      const uint4* const sums = reinterpret_cast<const uint4*>(x_.sums) + sums_;
      unsigned char* const sums_to = stage + (Kind::kPanels * kRun + panel() * kSumsRun + piece()) * 16;
      PYLLAMA_UNROLL
      for (int i = 0; i < kSumsRun; i += kThreads) {
        if (kSumsRun < kThreads && piece() >= kSumsRun) break;
        copy_async_16(sums_to + i * 16, sums + i, Kind::kStep == 1 || (i + piece()) / kPanelTokens < left_);
      }
      sums_ += kSumsRun;
    }
    left_ -= Kind::kStep;
  }

 private:
  static constexpr int kThreads = Kind::kThreads / Kind::kPanels;  // of a panel
  static constexpr int kChunkPieces = Kind::kChunkBytes / 16;
  static constexpr int kRun = Kind::kStep * kChunkPieces, kSumsRun = Kind::kStep * kPanelTokens;  // of a panel, a stage
  static_assert(kChunkPieces % kThreads == 0, "the threads of a panel are in one chunk");

  PYLLAMA_DEVICE int panel() const { return static_cast<int>(thread_index()) / kThreads; }
  PYLLAMA_DEVICE int piece() const { return static_cast<int>(thread_index()) % kThreads; }

  const Activations& x_;
  int left_;                // chunks that are not copied yet: stages of several chunks end behind the last
  uint32_t values_, sums_;  // this thread's next pieces of 16 bytes
};

// acc += a chunk of the warp's weights × the activations at x and their sums (this lane's token and columns, of the
// block's first panel; the others follow at kStep chunks). fetch(): the chunk's registers may be loaded anew.
template <class Kind, class Fetch>
PYLLAMA_DEVICE void multiply_quantized(float (&acc)[Kind::kPanels][Kind::kTiles][4],
                                       const WeightChunk<Kind> (&chunk)[Kind::kTiles], const unsigned char* x,
                                       const unsigned char* sums, const uint32_t (&codebook)[4], const Fetch& fetch) {
  constexpr int kTiles = Kind::kTiles, kGroups = Kind::kGroup32 ? 2 : 1, kFragments = 4 / kGroups;
  constexpr int kPanelBytes = Kind::kStep * Kind::kChunkBytes, kSideBytes = Kind::kChunkBytes / 2;
  // Compilers that see more than two panels at once here have not enough registers for three blocks.
  constexpr bool kTight = Kind::kOffset == Offset::minimum && !Kind::kGroup32;
  uint32_t minimums[kTiles][2];
  if constexpr (Kind::kOffset == Offset::minimum) {
    PYLLAMA_UNROLL
    for (int m = 0; m < kTiles; m++) minimum_fragment<Kind>(minimums[m], chunk[m]);
  }
  PYLLAMA_UNROLL
  for (int group = 0; group < kGroups; group++) {
    uint32_t a[kTiles][kFragments][4];
    float2 scales[kTiles];
    PYLLAMA_UNROLL
    for (int m = 0; m < kTiles; m++) {
      scales[m] = to_float(as_half2(chunk[m].scales[group]));
      const CodeBias bias = bias_of<Kind>(chunk[m].scales[Kind::kScaleWords / 2 + group]);
      PYLLAMA_UNROLL
      for (int f = 0; f < kFragments; f++) {
        make_fragment<Kind>(a[m][f], chunk[m], group * kFragments + f, bias, codebook);
      }
    }
    if (group == kGroups - 1) fetch();
    PYLLAMA_UNROLL
    for (int n = 0; n < Kind::kPanels; n += 2) {  // two panels at a time: four sums that do not wait for each other
      if (kTight && n) warp_barrier();
      uint4 v[2][kFragments / 2];
      float sum[2][kTiles][4] = {};
      PYLLAMA_UNROLL
      for (int p = 0; p < 2; p++) {
        PYLLAMA_UNROLL
        for (int i = 0; i < kFragments / 2; i++) {
          v[p][i] = load_16(x + (n + p) * kPanelBytes + (group * kFragments / 2 + i) * kSideBytes);
        }
        if constexpr (Kind::kOffset == Offset::minimum) {
          if (group > 0) continue;
          const unsigned char* const word = sums + (n + p) * (Kind::kStep * Kind::kSumsBytes);
          PYLLAMA_UNROLL
          for (int m = 0; m < kTiles; m++) {
            mma_m16n8k8(acc[n + p][m], minimums[m], *reinterpret_cast<const uint32_t*>(word));
          }
        }
      }
      PYLLAMA_UNROLL
      for (int f = 0; f < kFragments; f++) {
        PYLLAMA_UNROLL
        for (int p = 0; p < 2; p++) {
          const uint4& from = v[p][f / 2];
          const uint32_t b[2] = {f % 2 ? from.z : from.x, f % 2 ? from.w : from.y};
          PYLLAMA_UNROLL
          for (int m = 0; m < kTiles; m++) mma_m16n8k16(sum[p][m], a[m][f], b);
        }
      }
      PYLLAMA_UNROLL
      for (int p = 0; p < 2; p++) {
        PYLLAMA_UNROLL
        for (int m = 0; m < kTiles; m++) add_scaled(acc[n + p][m], scales[m], sum[p][m]);
      }
    }
  }
}

// The same for halves, which are fragments as they are; registers of a half of the chunk are free behind its last
// panel. fetch(to, m, load): load `load` of tile m.
template <class Kind, class Fetch>
PYLLAMA_DEVICE void multiply_halves(float (&acc)[Kind::kPanels][Kind::kTiles][4],
                                    WeightChunk<Kind> (&chunk)[Kind::kTiles], const unsigned char* x,
                                    const Fetch& fetch) {
  constexpr int kLoads = Kind::kLoads / 2;  // of half a chunk
  PYLLAMA_UNROLL
  for (int side = 0; side < 2; side++) {
    PYLLAMA_UNROLL
    for (int n = 0; n < Kind::kPanels; n++) {
      const uint4 v = load_16(x + n * (Kind::kStep * Kind::kChunkBytes) + side * (Kind::kChunkBytes / 2));
      const uint32_t b[2][2] = {{v.x, v.y}, {v.z, v.w}};
      PYLLAMA_UNROLL
      for (int f = 0; f < kLoads; f++) {
        PYLLAMA_UNROLL
        for (int m = 0; m < Kind::kTiles; m++) {
          const uint4& w = chunk[m].codes[kLoads * side + f];
          mma_m16n8k16(acc[n][m], {w.x, w.y, w.z, w.w}, b[f / Kind::kParts]);
        }
      }
    }
    PYLLAMA_UNROLL
    for (int load = kLoads * side; load < kLoads * (side + 1); load++) {
      PYLLAMA_UNROLL
      for (int m = 0; m < Kind::kTiles; m++) fetch(chunk[m].codes[load], m, load);
    }
  }
}

// A panel's results of a warp, at sums [8 tokens][kPitch], to where they belong. A lane has one row, or one pair of
// rows g and g + 8, of several tokens.
template <class Kind>
PYLLAMA_DEVICE void store_panel(const ManyArgs& args, const float* sums, int first_row, int first_token) {
  const int me = static_cast<int>(lane());
  if (args.swiglu) {
    constexpr int kPairs = Kind::kRows / 2;
    const int row = me % kPairs / 8 * 16 + me % 8;
    if (first_row + row + 8 >= 16 * args.w.tiles) return;
    const float r0 = args.w.row_scales[first_row + row], r8 = args.w.row_scales[first_row + row + 8];
    PYLLAMA_UNROLL
    for (int i = 0; i < kPanelTokens * kPairs / 32; i++) {
      const int in_panel = (i * 32 + me) / kPairs, token = first_token + in_panel;
      if (token >= args.n_tokens) break;
      const float s = args.x.scales[token];
      const float* const its = sums + in_panel * Kind::kPitch + row;
      args.gated(first_row + row, token, its[0] * r0 * s, its[8] * r8 * s);
    }
    return;
  }
  constexpr int kEach = kPanelTokens * Kind::kRows / 32;
  const int row = first_row + me % Kind::kRows;
  if (row >= args.w.rows) return;
  const float r = args.w.row_scales[row];
  float values[kEach];  // all are read before one is written: y may be what is added to it
  PYLLAMA_UNROLL
  for (int i = 0; i < kEach; i++) {
    const int in_panel = (i * 32 + me) / Kind::kRows, token = first_token + in_panel;
    if (token >= args.n_tokens) break;
    values[i] =
        args.rows.value(row, token, sums[in_panel * Kind::kPitch + me % Kind::kRows] * r * args.x.scales[token]);
  }
  PYLLAMA_UNROLL
  for (int i = 0; i < kEach; i++) {
    const int token = first_token + (i * 32 + me) / Kind::kRows;
    if (token >= args.n_tokens) break;
    args.rows.store(row, token, values[i]);
  }
}

// By way of shared memory, each warp in a part of its own, so that a warp's stores are whole lines. All warps must have
// done with the stages.
template <class Kind>
PYLLAMA_DEVICE void store_results(const ManyArgs& args, const float (&acc)[Kind::kPanels][Kind::kTiles][4],
                                  int first_row, int first_token) {
  constexpr int kAtOnce = Kind::kPanels < 4 ? Kind::kPanels : 4, kPanelFloats = kPanelTokens * Kind::kPitch;
  float* const mine = reinterpret_cast<float*>(shared_memory()) + warp() * (kAtOnce * kPanelFloats);
  const int g = static_cast<int>(lane() / 4), t = static_cast<int>(lane() % 4);
  PYLLAMA_UNROLL
  for (int begin = 0; begin < Kind::kPanels; begin += kAtOnce) {
    warp_barrier();
    PYLLAMA_UNROLL
    for (int n = 0; n < kAtOnce; n++) {
      PYLLAMA_UNROLL
      for (int m = 0; m < Kind::kTiles; m++) {
        float* const at = mine + n * kPanelFloats + 2 * t * Kind::kPitch + 16 * m + g;
        const float (&c)[4] = acc[begin + n][m];
        at[0] = c[0], at[Kind::kPitch] = c[1], at[8] = c[2], at[Kind::kPitch + 8] = c[3];
      }
    }
    warp_barrier();
    for (int n = 0; n < kAtOnce; n++) {
      store_panel<Kind>(args, mine + n * kPanelFloats, first_row, first_token + (begin + n) * kPanelTokens);
    }
  }
}

// Grid: blocks of tokens, then of rows; Kind::kThreads threads; Kind::kSharedBytes.
template <class Kind>
PYLLAMA_DEVICE void linear_many_body(const ManyArgs& args) {
  constexpr int kTiles = Kind::kTiles, kStep = Kind::kStep, kStages = Kind::kStages;
  unsigned char* const shared = shared_memory();
  uint32_t codebook[4] = {0, 0, 0, 0};
  if constexpr (Kind::kCodes == Codes::q4nl) copy_codebook(codebook, args.w, shared + kStages * Kind::kStageBytes);

  const int chunks = args.w.chunks;
  const int first_tile = static_cast<int>(block_index().y * Kind::kWarps + warp()) * kTiles;
  ManyPlace at[kTiles];
  PYLLAMA_UNROLL
  for (int m = 0; m < kTiles; m++) at[m] = many_place<Kind>(args.w, first_tile + m);
  WeightChunk<Kind> slots[kStep][kTiles];
  PYLLAMA_UNROLL
  for (int i = 0; i < kStep; i++) fetch_chunk<Kind>(slots[i], args, at, i, i < chunks);
  wait_for_previous_kernel();
  let_next_kernel_start();

  const int first_panel = static_cast<int>(block_index().x) * Kind::kPanels;
  StageCopier<Kind> copier(args.x, chunks, args.n_tokens);
  const int steps = (chunks + kStep - 1) / kStep;
  PYLLAMA_UNROLL
  for (int i = 0; i < kStages - 1; i++) {
    if (i < steps) copier.copy_next(shared + i * Kind::kStageBytes);
    copy_commit();
  }

  float acc[Kind::kPanels][kTiles][4] = {};
  int stage = 0;
  for (int step = 0; step < steps; step++) {
    copy_wait<kStages - 2>();
    barrier();  // this stage is there for all, and all have done with the one before
    if (step + kStages - 1 < steps) {
      copier.copy_next(shared + (stage ? stage - 1 : kStages - 1) * Kind::kStageBytes);
    }
    copy_commit();
    const unsigned char* const x = shared + stage * Kind::kStageBytes + lane() * 16;
    const unsigned char* const sums =
        shared + stage * Kind::kStageBytes + Kind::kPanels * kStep * Kind::kChunkBytes + lane() * 4;
    PYLLAMA_UNROLL
    for (int i = 0; i < kStep; i++) {
      const int chunk = step * kStep + i, next = chunk + kStep;
      if (kStep > 1 && chunk >= chunks) break;
      const unsigned char* const its_x = x + i * Kind::kChunkBytes;
      if constexpr (Kind::kQuantized) {
        multiply_quantized<Kind>(acc, slots[i], its_x, sums + i * Kind::kSumsBytes, codebook,
                                 [&] { fetch_chunk<Kind>(slots[i], args, at, next, next < chunks); });
      } else {
        multiply_halves<Kind>(acc, slots[i], its_x, [&](uint4& to, int m, int load) {
          load_stream_if(to, many_codes<Kind>(args, at[m], next) + load * 32, next < chunks);
        });
      }
    }
    stage = stage + 1 < kStages ? stage + 1 : 0;
  }
  barrier();
  store_results<Kind>(args, acc, 16 * first_tile, first_panel * kPanelTokens);
}

}  // namespace cuda
}  // namespace pyllama
