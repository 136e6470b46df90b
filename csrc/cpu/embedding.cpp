#include "embedding.h"

#include "half.h"

namespace pyllama {
namespace cpu {

namespace {

float number_at(const uint8_t* p, int64_t index, Number type) {
  uint16_t h;
  if (type == Number::u8) return p[index];
  memcpy(&h, p + 2 * index, 2);
  return type == Number::bf16 ? bf16_to_float(h) : f16_to_float(h);
}

// The stored code of column k: int8 for q8, else 0…2^code_bits − 1: a nibble, and what is above it in a plane.
int code_at(const Weight& w, int64_t tile, int lane, int k) {
  const int bits = info(w.format).code_bits;
  const uint8_t* block = w.codes + (tile * (w.Kp() / 32) + k / 32) * bits * 64 + lane * 4 + k % 4;
  const int quad = k % 32 / 4;
  if (bits == 8) return static_cast<int8_t>(block[quad * 64]);
  const int low = block[quad / 2 * 64] >> (quad % 2 * 4) & 15;
  if (bits == 4) return low;
  const int above = bits - 4, per_byte = 8 / above;  // bits in the plane, quads that share a byte of it
  return low | (block[(4 + quad / per_byte) * 64] >> (quad % per_byte * above) & ((1 << above) - 1)) << 4;
}

}  // namespace

void dequantize_row(const Weight& w, int row, float* out) {
  const int64_t tile = row / kTileRows;
  const int lane = row % kTileRows;
  if (!w.quantized()) {
    for (int k = 0; k < w.K; k++) {
      const int64_t index = (tile * w.Kp() + k) * 16 + lane;
      if (w.format == Format::f32) {
        memcpy(out + k, w.codes + 4 * index, 4);
      } else {
        out[k] = number_at(w.codes, index, w.format == Format::f16 ? Number::f16 : Number::bf16);
      }
    }
    return;
  }
  const FormatInfo& f = info(w.format);
  for (int g = 0; g < w.groups(); g++) {
    const int64_t index = (tile * w.groups() + g) * 16 + lane;
    const float scale = number_at(w.scales, index, w.scale_type);
    const float offset = f.has_offset ? number_at(w.offsets, index, w.offset_type) : 0.0f;
    const int end = w.K < (g + 1) * w.group ? w.K : (g + 1) * w.group;
    for (int k = g * w.group; k < end; k++) {
      const int code = code_at(w, tile, lane, k);
      float value;
      if (f.has_codebook) {
        value = scale * static_cast<float>(w.codebook[static_cast<size_t>(code)]);
      } else if (f.has_offset && w.offset_type == Number::u8) {
        value = scale * (static_cast<float>(code) - offset);
      } else {
        value = scale * static_cast<float>(code - f.code_bias);
        if (f.has_offset) value = value + offset;
      }
      out[w.input_order ? w.input_order[k] : k] = value;
    }
  }
}

}  // namespace cpu
}  // namespace pyllama
