// Views of weights as they lie in the mapped file. Nothing here owns memory; the bindings keep the Python buffers
// alive.
#pragma once

#include <array>
#include <string>
#include <vector>

#include "formats.h"

namespace pyllama {

// A matrix W[N,K] in tiles (docs/FORMAT.md), or a vector f32[N] when K == 0.
struct Weight {
  std::string name;
  Format format = Format::f32;
  Number scale_type = Number::none;
  Number offset_type = Number::none;
  int N = 0;                             // output rows
  int K = 0;                             // input columns; 0 for a vector
  int group = 0;                         // columns per scale; 0 for dense formats
  std::array<int8_t, 32> codebook{};     // 16 of q4nl, 32 of q5nl
  const uint8_t* codes = nullptr;        // [Np/16][Kp/32][code_bits][16][4], or dense [Np/16][Kp][16]
  const uint8_t* scales = nullptr;       // [Np/16][groups][16]
  const uint8_t* offsets = nullptr;      // [Np/16][groups][16], q4a
  const int32_t* input_order = nullptr;  // [K], q4a, optional
  int64_t payload_bytes = 0;

  int tiles() const { return (N + kTileRows - 1) / kTileRows; }
  int Kp() const { return static_cast<int>(round_up(K, kColumnPad)); }
  int groups() const { return group ? (K + group - 1) / group : 0; }
  bool quantized() const { return info(format).quantized; }
  const float* vector() const { return reinterpret_cast<const float*>(codes); }
};

// Builds a Weight over `data`, checking that `size_bytes` is exactly what format and shape demand.
// Throws FormatError naming the tensor. Alignment to 64 bytes is required.
struct WeightSpec {
  std::string name, format, scale = "f16", offset;
  std::vector<int64_t> shape;
  int group = 0;
  std::vector<int> codebook;
  bool input_order = false;
};
Weight make_weight(const WeightSpec& spec, const uint8_t* data, int64_t size_bytes);

}  // namespace pyllama
