// A thread looks one number up. A row is a few kilobytes out of a matrix in which its 16 neighbours lie with it, so
// each load wants one word of a line that others of the block want too; it happens once a step and is written to be
// plain.
//
// registers: embed_kernel 48
#include "cuda/embedding.h"

#include "cuda/device.h"

namespace pyllama {
namespace cuda {

namespace {

constexpr int kThreads = 256;

struct EmbedArgs {
  Fragments w;
  const int32_t* tokens;
  const int32_t* input_order;
  float* x;
  float scale;
};

// Where a number lies: in a chunk, in fragment `fragment` of `lane`, register `reg`, first or second of two.
struct Place {
  int tile, chunk, lane, fragment, reg, second;
};

PYLLAMA_DEVICE Place place_of(int row, int column) {
  const int r = row % 16, c = column % kChunkColumns, eight = c % 8;
  Place at;
  at.tile = row / 16;
  at.chunk = column / kChunkColumns;
  at.lane = r % 8 * 4 + c % 32 / 8;
  at.fragment = c / 32 * 2 + eight / 4;
  at.reg = eight % 4 / 2 * 2 + r / 8;
  at.second = eight % 2;
  return at;
}

// Word `word` of the lane's, counted through its loads.
PYLLAMA_DEVICE uint32_t code_word(const Fragments& w, const Place& at, int word) {
  const int64_t load = (int64_t{at.tile} * w.chunks + at.chunk) * w.loads + word / 4;
  return reinterpret_cast<const uint32_t*>(w.codes)[(load * 32 + at.lane) * 4 + word % 4];
}

PYLLAMA_DEVICE float half_of(uint32_t word, int second) {
  const half2 both = as_half2(word);
  return to_float(second ? high(both) : low(both));
}

// The code, before its scale and offset.
PYLLAMA_DEVICE float code_of(const Fragments& w, const Place& at) {
  if (w.kind == Codes::q8) {
    const uint32_t word = code_word(w, at, 2 * at.fragment + at.reg / 2);
    const int byte = static_cast<int>(word >> (8 * (at.reg % 2 * 2 + at.second)) & 0xff);
    return static_cast<float>(byte - 128);
  }
  const uint32_t word = code_word(w, at, at.fragment);
  if (w.kind == Codes::q4nl) {
    const int code = static_cast<int>(word >> (4 * (2 * at.reg + at.second)) & 15);
    // An index that is not constant would put the kernel's argument into local memory.
    const uint32_t lower = code < 4 ? w.codebook[0] : w.codebook[1], upper = code < 12 ? w.codebook[2] : w.codebook[3];
    return static_cast<float>(static_cast<int>((code < 8 ? lower : upper) >> (8 * (code % 4)) & 0xff) - 128);
  }
  const int code = static_cast<int>(word >> (4 * (at.reg + 4 * at.second)) & 15);
  return static_cast<float>(w.offset == Offset::none ? code - 8 : code);
}

// A quantized number, in units of its row's scale.
PYLLAMA_DEVICE float quantized_value(const Fragments& w, const Place& at, int row) {
  const bool pairs = w.group == 32;
  const int scale_group = w.group == 128 ? at.chunk / 2 : at.chunk;
  const int g = row % 8, upper = row % 16 / 8, group = pairs ? at.fragment / 2 : 0;
  const uint32_t* const words = w.scales + ((int64_t{at.tile} * w.scale_groups + scale_group) * 8 + g) * w.scale_words;
  const float code = code_of(w, at), scale = half_of(words[group], upper);
  switch (w.offset) {
    case Offset::zero_point: {  // stored as what is added to the code where its lowest bit is worth 1 of 1024, or of 64
      const float zero = -half_of(words[pairs ? 2 + group : 1], upper) - (upper ? 64.0f : 1024.0f);
      return (code - zero) * scale;
    }
    case Offset::minimum:
      return fma(code, scale, pairs ? half_of(words[2 + upper], group) : half_of(words[1], upper));
    default:
      return code * scale;
  }
}

PYLLAMA_DEVICE float weight_at(const Fragments& w, int row, int column) {
  const Place at = place_of(row, column);
  float value;
  if (w.kind == Codes::half) {
    value = half_of(code_word(w, at, 4 * at.fragment + at.reg), at.second);
  } else if (w.kind == Codes::half_pair) {
    value = half_of(code_word(w, at, 8 * at.fragment + at.reg), at.second) +
            half_of(code_word(w, at, 8 * at.fragment + 4 + at.reg), at.second);
  } else {
    value = quantized_value(w, at, row);
  }
  return value * w.row_scales[row];
}

// Grid: tokens, of which there may be more than the 65,535 that y takes; then blocks along a row.
PYLLAMA_KERNEL void embed_kernel(const EmbedArgs args) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int k = static_cast<int>(block_index().y) * kThreads + static_cast<int>(thread_index());
  if (k >= args.w.columns) return;
  const int64_t token = block_index().x;
  const int row = args.tokens[token];
  const int column = args.input_order ? args.input_order[k] : k;
  const bool there = row >= 0 && row < args.w.rows;
  args.x[token * args.w.columns + column] = there ? weight_at(args.w, row, k) * args.scale : as_float(0x7fc00000);
}

}  // namespace

void embed(Stream& stream, const Fragments& w, const int32_t* tokens, int n_tok, const int32_t* input_order, float* x,
           float scale) {
  if (n_tok == 0) return;
  const Dim3 grid{static_cast<unsigned>(n_tok), static_cast<unsigned>((w.columns + kThreads - 1) / kThreads)};
  launch(stream, embed_kernel, {w, tokens, input_order, x, scale}, grid, kThreads, 0, Start::kEarly);
}

}  // namespace cuda
}  // namespace pyllama
