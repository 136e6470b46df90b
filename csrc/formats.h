// The weight formats: one table row each. docs/FORMAT.md defines the bytes, pyllama/common/formats.py is the Python
// twin, and a test compares the two tables. To add a format: a row here, a row there, one dequantise helper per
// backend.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace pyllama {

constexpr int kTileRows = 16;   // output rows interleaved in a tile
constexpr int kColumnPad = 32;  // columns are padded to this; also the group of one activation scale
constexpr size_t kAlign = 64;   // sections and payloads start at multiples of this

enum class Format : uint8_t { f32, f16, bf16, q8, q4, q4a, q4nl, q5nl, q6 };
enum class Number : uint8_t { none, f16, bf16, u8 };  // how scales and offsets are stored

struct FormatInfo {
  Format format;
  std::string_view name;
  int code_bits;      // bits of one stored weight
  bool quantized;     // has groups with scales; multiplies int8 activations
  bool has_offset;    // a minimum or a zero point per group
  bool has_codebook;  // the code is an index into 2^code_bits int8 entries of the tensor's metadata
  int code_bias;      // value = scale * (code - code_bias), where there is no codebook
};

constexpr FormatInfo kFormats[] = {
    {Format::f32, "f32", 32, false, false, false, 0},   {Format::f16, "f16", 16, false, false, false, 0},
    {Format::bf16, "bf16", 16, false, false, false, 0}, {Format::q8, "q8", 8, true, false, false, 0},
    {Format::q4, "q4", 4, true, false, false, 8},       {Format::q4a, "q4a", 4, true, true, false, 0},
    {Format::q4nl, "q4nl", 4, true, false, true, 0},    {Format::q5nl, "q5nl", 5, true, false, true, 0},
    {Format::q6, "q6", 6, true, false, false, 32},
};

constexpr const FormatInfo& info(Format f) { return kFormats[static_cast<int>(f)]; }

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

}  // namespace pyllama
