// From tiles to fragment order, on the device: each thread gathers one 32-bit word of codes or scales. It runs once for
// each matrix, so it is written to be plain, not fast. Kernels here check nothing; `fragments_of` has.
//
// registers: row_scales_kernel 40
// registers: codes_kernel 40
// registers: scales_kernel 40
#include "cuda/fragments.h"

#include <string>

#include "cuda/device.h"
#include "error.h"

namespace pyllama {
namespace cuda {

namespace {

constexpr unsigned kThreads = 256;
constexpr int kLargest = 14;  // a row's numbers are brought to 2^14 … 2^15

struct Source {
  const uint8_t* codes;
  const uint8_t* scales;
  const uint8_t* offsets;
  int first_row, rows;  // counted through all the sources
  int padded_columns;   // Kp of the tiles
  int groups;
  Number scale_type, offset_type;
};

struct ToFragmentsArgs {
  Source sources[kMaxSources];
  const int32_t* row_map;
  Format format;
  uint32_t codebook[8];  // q5nl: 32 bytes, each an entry + 128
  Fragments to;
  uint32_t* codes;
  uint32_t* scales;
  float* row_scales;
};

// A row of the result: its source and row there.
struct RowOf {
  bool there;  // not padding
  Source source;
  int row;
};

PYLLAMA_DEVICE RowOf row_of(const ToFragmentsArgs& args, int row) {
  const int from = args.row_map ? args.row_map[row] : row;
  RowOf result{};
  PYLLAMA_UNROLL
  for (int i = 0; i < kMaxSources; i++) {  // no index known at run time: arguments would be copied to local memory
    const Source& s = args.sources[i];
    if (from >= s.first_row && from < s.first_row + s.rows) result = {true, s, from - s.first_row};
  }
  return result;
}

PYLLAMA_DEVICE uint32_t bits_at(const uint8_t* p, int64_t index) { return reinterpret_cast<const uint16_t*>(p)[index]; }

// The stored code of so many bits; 0 in the padding.
PYLLAMA_DEVICE uint32_t code_at(const RowOf& from, int column, int code_bits) {
  if (!from.there || column >= from.source.padded_columns) return 0;
  const int64_t block = static_cast<int64_t>(from.row / 16) * (from.source.padded_columns / 32) + column / 32;
  const uint8_t* const bytes = from.source.codes + block * code_bits * 64 + from.row % 16 * 4 + column % 4;
  const int quad = column % 32 / 4;
  if (code_bits == 8) return bytes[quad * 64];
  const uint32_t low = static_cast<uint32_t>(bytes[quad / 2 * 64]) >> (quad % 2 * 4) & 15;
  if (code_bits == 4) return low;
  const int above = code_bits - 4, per_byte = 8 / above;  // bits in the plane, quads that share a byte of it
  const uint32_t plane = static_cast<uint32_t>(bytes[(4 + quad / per_byte) * 64]) >> (quad % per_byte * above);
  return low | (plane & ((1u << above) - 1)) << 4;
}

// The weight + 128, of formats that are bytes here; 128 in the padding.
PYLLAMA_DEVICE uint32_t byte_at(const ToFragmentsArgs& args, const RowOf& from, int column) {
  if (!from.there || column >= args.to.columns) return 128;
  if (args.format == Format::q8) return code_at(from, column, 8) ^ 0x80;
  if (args.format == Format::q6) return code_at(from, column, 6) + 96;
  const uint32_t code = code_at(from, column, 5);
  uint32_t four = 0;
  PYLLAMA_UNROLL
  for (uint32_t i = 0; i < 8; i++) four = code / 4 == i ? args.codebook[i] : four;  // no index, as in row_of
  return four >> (8 * (code % 4)) & 0xff;
}

PYLLAMA_DEVICE float value_at(const RowOf& from, int column, Format format) {
  if (!from.there || column >= from.source.padded_columns) return 0;
  const int64_t index =
      (static_cast<int64_t>(from.row / 16) * from.source.padded_columns + column) * 16 + from.row % 16;
  if (format == Format::f32) return reinterpret_cast<const float*>(from.source.codes)[index];
  const uint32_t bits = bits_at(from.source.codes, index);
  return format == Format::f16 ? to_float(low(as_half2(bits))) : as_float(bits << 16);
}

PYLLAMA_DEVICE float number_at(const uint8_t* p, int64_t index, Number type) {
  const uint32_t bits = bits_at(p, index);
  return type == Number::f16 ? to_float(low(as_half2(bits))) : as_float(bits << 16);
}

// value * 2^exponent; in two steps, since 2^140 is no float.
PYLLAMA_DEVICE float scaled(float value, int exponent) {
  const int first = exponent / 2;
  return value * power_of_two(first) * power_of_two(exponent - first);
}

PYLLAMA_DEVICE uint32_t halves(float low, float high) { return as_bits(to_half2(low, high)); }

// floor(log2 |value|) of normal numbers, -126 of smaller ones; -127 of zero, infinity and NaN, which no scale changes.
PYLLAMA_DEVICE int exponent_of(float value) {
  const uint32_t bits = as_bits(value) & 0x7fffffff;
  if (bits == 0 || bits >= 0x7f800000) return -127;
  return bits < 0x00800000 ? -126 : static_cast<int>(bits >> 23) - 127;
}

PYLLAMA_DEVICE bool needs_row_scale(const ToFragmentsArgs& args, const RowOf& from) {
  if (!from.there) return false;
  return args.format == Format::bf16 || args.format == Format::f32 || from.source.scale_type == Number::bf16 ||
         from.source.offset_type == Number::bf16;
}

// The power of two that a row's numbers are divided by; 0 where they are halves as they are. A warp's lanes share the
// work.
PYLLAMA_DEVICE int row_exponent(const ToFragmentsArgs& args, const RowOf& from) {
  if (!needs_row_scale(args, from)) return 0;
  int largest = -127;
  if (args.to.group == 0) {
    for (int k = static_cast<int>(lane()); k < args.to.columns; k += 32) {
      const int e = exponent_of(value_at(from, k, args.format));
      largest = e > largest ? e : largest;
    }
  } else {
    const Source& s = from.source;
    for (int i = static_cast<int>(lane()); i < s.groups; i += 32) {
      const int64_t index = (static_cast<int64_t>(from.row / 16) * s.groups + i) * 16 + from.row % 16;
      int e = exponent_of(number_at(s.scales, index, s.scale_type));
      largest = e > largest ? e : largest;
      if (args.to.offset != Offset::minimum) continue;
      e = exponent_of(number_at(s.offsets, index, s.offset_type));
      largest = e > largest ? e : largest;
    }
  }
  for (unsigned mask = 16; mask > 0; mask /= 2) {
    const int other = shuffle_xor(largest, mask);
    largest = other > largest ? other : largest;
  }
  return largest == -127 ? 0 : largest - kLargest;
}

// 2^exponent, exactly, also where it is subnormal.
PYLLAMA_DEVICE float row_scale_of(int exponent) { return scaled(1.0f, exponent); }

// -exponent of `row_scale_of`'s result.
PYLLAMA_DEVICE int row_shift(float row_scale) {
  const uint32_t bits = as_bits(row_scale);
  if (bits >> 23) return 127 - static_cast<int>(bits >> 23);
  int shift = 149;
  for (uint32_t rest = bits; rest > 1; rest >>= 1) shift--;
  return shift;
}

// Columns of register r of fragment f of a lane: this one and the next.
PYLLAMA_DEVICE int column_of(int chunk, int fragment, int lane, int r) {
  return chunk * kChunkColumns + 32 * (fragment / 2) + 8 * (lane % 4) + 4 * (fragment % 2) + 2 * (r / 2);
}
PYLLAMA_DEVICE int row_in_tile(int lane, int r) { return lane / 4 + 8 * (r % 2); }

struct WordPlace {
  int tile, chunk, load, lane, word;
};

PYLLAMA_DEVICE uint32_t word_of_nibbles(const ToFragmentsArgs& args, const WordPlace& at) {
  uint32_t word = 0;
  for (int n = 0; n < 8; n++) {
    const int r = args.to.kind == Codes::q4nl ? n / 2 : n % 4;
    const int second = args.to.kind == Codes::q4nl ? n % 2 : n / 4;
    const RowOf from = row_of(args, 16 * at.tile + row_in_tile(at.lane, r));
    word |= code_at(from, column_of(at.chunk, at.word, at.lane, r) + second, 4) << (4 * n);
  }
  return word;
}

PYLLAMA_DEVICE uint32_t word_of_bytes(const ToFragmentsArgs& args, const WordPlace& at) {
  uint32_t word = 0;
  for (int b = 0; b < 4; b++) {
    const int r = 2 * (at.word % 2) + b / 2;
    const RowOf from = row_of(args, 16 * at.tile + row_in_tile(at.lane, r));
    const int fragment = 2 * at.load + at.word / 2;
    word |= byte_at(args, from, column_of(at.chunk, fragment, at.lane, r) + b % 2) << (8 * b);
  }
  return word;
}

PYLLAMA_DEVICE uint32_t word_of_halves(const ToFragmentsArgs& args, const WordPlace& at) {
  const bool pair = args.to.kind == Codes::half_pair;
  const int row = 16 * at.tile + row_in_tile(at.lane, at.word);
  const RowOf from = row_of(args, row);
  const int column = column_of(at.chunk, pair ? at.load / 2 : at.load, at.lane, at.word);
  const int shift = row_shift(args.row_scales[row]);
  const float v0 = scaled(value_at(from, column, args.format), shift);
  const float v1 = scaled(value_at(from, column + 1, args.format), shift);
  const uint32_t high = halves(v0, v1);
  if (!pair || at.load % 2 == 0) return high;
  const float2 taken = to_float(as_half2(high));
  // Infinity less infinity would be NaN.
  return halves(v0 == taken.x ? 0.0f : v0 - taken.x, v1 == taken.y ? 0.0f : v1 - taken.y);
}

// One half of a scale word.
PYLLAMA_DEVICE float scale_half(const ToFragmentsArgs& args, ScaleWord kind, int row, int group) {
  const RowOf from = row_of(args, row);
  const bool there = from.there && group < from.source.groups;
  int64_t index = 0;
  if (there) index = (static_cast<int64_t>(from.row / 16) * from.source.groups + group) * 16 + from.row % 16;
  if (kind == ScaleWord::zero_point) {
    const int z = there ? from.source.offsets[index] : 0;
    return static_cast<float>(-(row % 16 < 8 ? 1024 : 64) - z);
  }
  if (!there) return 0;
  const Source& s = from.source;
  const float number =
      kind == ScaleWord::scale ? number_at(s.scales, index, s.scale_type) : number_at(s.offsets, index, s.offset_type);
  return scaled(number, row_shift(args.row_scales[row]));
}

PYLLAMA_DEVICE ScaleWord scale_word_kind(const Fragments& f, int word) {
  const int scales = f.group == 32 ? 2 : 1;
  if (word < scales) return ScaleWord::scale;
  if (f.offset == Offset::zero_point) return ScaleWord::zero_point;
  return scales == 2 ? ScaleWord::two_minimums : ScaleWord::minimum;
}

}  // namespace

// Grid: a warp for each row.
PYLLAMA_KERNEL void row_scales_kernel(const ToFragmentsArgs args) {
  const int row = static_cast<int>(block_index().x * (kThreads / 32) + warp());
  if (row >= 16 * args.to.tiles) return;
  const float scale = row_scale_of(row_exponent(args, row_of(args, row)));
  if (lane() == 0) args.row_scales[row] = scale;
}

// Grid: a thread for each word of codes. After row_scales_kernel.
PYLLAMA_KERNEL void codes_kernel(const ToFragmentsArgs args) {
  int64_t index = static_cast<int64_t>(block_index().x) * kThreads + thread_index();
  const int loads = args.to.loads;
  if (index >= static_cast<int64_t>(args.to.tiles) * args.to.chunks * loads * 128) return;
  const int64_t word_index = index;
  WordPlace at;
  at.word = static_cast<int>(index % 4);
  at.lane = static_cast<int>(index / 4 % 32);
  index /= 128;
  at.load = static_cast<int>(index % loads);
  index /= loads;
  at.chunk = static_cast<int>(index % args.to.chunks);
  at.tile = static_cast<int>(index / args.to.chunks);
  uint32_t word;
  switch (args.to.kind) {
    case Codes::q4:
    case Codes::q4nl:
      word = word_of_nibbles(args, at);
      break;
    case Codes::q8:
      word = word_of_bytes(args, at);
      break;
    default:
      word = word_of_halves(args, at);
  }
  args.codes[word_index] = word;
}

// Grid: a thread for each word of scales. After row_scales_kernel.
PYLLAMA_KERNEL void scales_kernel(const ToFragmentsArgs args) {
  int64_t index = static_cast<int64_t>(block_index().x) * kThreads + thread_index();
  const int words = args.to.scale_words;
  if (index >= static_cast<int64_t>(args.to.tiles) * args.to.scale_groups * 8 * words) return;
  const int64_t word_index = index;
  const int word = static_cast<int>(index % words);
  const int g = static_cast<int>(index / words % 8);
  index /= 8 * words;
  const int scale_group = static_cast<int>(index % args.to.scale_groups);
  const int tile = static_cast<int>(index / args.to.scale_groups);
  const int row = 16 * tile + g;
  const ScaleWord kind = scale_word_kind(args.to, word);
  if (kind == ScaleWord::two_minimums) {
    const int its_row = row + 8 * (word - 2);
    args.scales[word_index] =
        halves(scale_half(args, kind, its_row, 2 * scale_group), scale_half(args, kind, its_row, 2 * scale_group + 1));
  } else {
    const int group = args.to.group == 32 ? 2 * scale_group + word % 2 : scale_group;
    args.scales[word_index] = halves(scale_half(args, kind, row, group), scale_half(args, kind, row + 8, group));
  }
}

// Empty: what it is for is that it has no early start. Products read their weights before they wait for the kernel in
// front of them (linear_few.cuh), and the end of a kernel that tells nobody is no promise that what it wrote is seen.
// This one begins when all of that is, and is in front instead.
PYLLAMA_KERNEL void end_of_upload_kernel(const ToFragmentsArgs) {}

namespace {

Codes kind_of(Format format) {
  switch (format) {
    case Format::q4:
    case Format::q4a:
      return Codes::q4;
    case Format::q4nl:
      return Codes::q4nl;
    case Format::q8:
    case Format::q5nl:
    case Format::q6:
      return Codes::q8;
    case Format::f32:
      return Codes::half_pair;
    default:
      return Codes::half;
  }
}

Offset offset_of(const Weight& w) {
  if (!info(w.format).has_offset) return Offset::none;
  return w.offset_type == Number::u8 ? Offset::zero_point : Offset::minimum;
}

bool alike(const Weight& a, const Weight& b) {
  return a.K == b.K && a.format == b.format && a.group == b.group && offset_of(a) == offset_of(b) &&
         a.codebook == b.codebook;
}

void check_alike(const Weight& a, const Weight& b) {
  check(alike(a, b), a.name, " and ", b.name,
        " cannot be one product: they differ in columns, format, group, kind of offset or codebook");
  check(!a.input_order && !b.input_order, a.name, " and ", b.name, " cannot be one product: one has an input_order");
}

// n threads in blocks of kThreads.
Dim3 grid_of(size_t n) { return {static_cast<unsigned>((n + kThreads - 1) / kThreads), 1, 1}; }

}  // namespace

bool one_product(const Weight& a, const Weight& b) { return alike(a, b) && !a.input_order && !b.input_order; }

Fragments fragments_of(const Weight* const* weights, int n) {
  check<std::invalid_argument>(n >= 1 && n <= kMaxSources, n, " matrices for one product; expected 1 to ", kMaxSources);
  const Weight& first = *weights[0];
  Fragments f;
  for (int i = 0; i < n; i++) {
    const Weight& w = *weights[i];
    check<std::invalid_argument>(w.K > 0, w.name, " is a vector; expected a matrix");
    if (i > 0) check_alike(first, w);
    check(w.N <= INT32_MAX - 15 - f.rows, w.name, ": too many rows for one product");
    f.rows += w.N;
  }
  f.columns = first.K;
  f.tiles = (f.rows + 15) / 16;
  f.chunks = (f.columns + kChunkColumns - 1) / kChunkColumns;
  f.group = first.group;
  f.kind = kind_of(first.format);
  f.loads = code_loads(f.kind);
  f.offset = offset_of(first);
  if (f.group) {
    f.scale_groups = f.group == 128 ? (f.chunks + 1) / 2 : f.chunks;
    f.scale_words = (f.group == 32 ? 2 : 1) * (f.offset == Offset::none ? 1 : 2);
  }
  for (int i = 0; i < 16 && f.kind == Codes::q4nl; i++) {
    f.codebook[i / 4] |= static_cast<uint32_t>(first.codebook[static_cast<size_t>(i)] + 128) << (8 * (i % 4));
  }
  return f;
}

FragmentSizes fragment_sizes(const Fragments& f) {
  const size_t tiles = static_cast<size_t>(f.tiles);
  return {tiles * static_cast<size_t>(f.chunks * f.loads) * 512,
          tiles * static_cast<size_t>(f.scale_groups * f.scale_words) * 32, tiles * 64};
}

void to_fragments(Stream& stream, const Weight* const* weights, int n, const int32_t* row_map, const Fragments& shape) {
  ToFragmentsArgs args{};
  for (int i = 0, row = 0; i < n; i++) {
    const Weight& w = *weights[i];
    args.sources[i] = {w.codes, w.scales, w.offsets, row, w.N, w.Kp(), w.groups(), w.scale_type, w.offset_type};
    row += w.N;
  }
  args.row_map = row_map;
  args.format = weights[0]->format;
  for (size_t i = 0; i < 32; i++) {
    args.codebook[i / 4] |= static_cast<uint32_t>(weights[0]->codebook[i] + 128) << (8 * (i % 4));
  }
  args.to = shape;
  args.codes = reinterpret_cast<uint32_t*>(const_cast<uint8_t*>(shape.codes));
  args.scales = const_cast<uint32_t*>(shape.scales);
  args.row_scales = const_cast<float*>(shape.row_scales);
  const FragmentSizes sizes = fragment_sizes(shape);
  launch(stream, row_scales_kernel, args, grid_of(sizes.row_scales_bytes / 4 * 32), kThreads);
  launch(stream, codes_kernel, args, grid_of(sizes.codes_bytes / 4), kThreads);
  if (sizes.scales_bytes) launch(stream, scales_kernel, args, grid_of(sizes.scales_bytes / 4), kThreads);
  launch(stream, end_of_upload_kernel, args, {}, 32);
}

}  // namespace cuda
}  // namespace pyllama
