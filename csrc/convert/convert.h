// Conversion's inner loops: the search for scales, codes into tiles, half precision to floats. numpy is the definition
// (quantize/methods/rtn.py, pyllama/common/formats.py); these give the same bits, on every instruction set.
// A matrix is [n_rows, n_columns] float32; a group is a run of columns of one row that shares a scale, the last one of
// a row may be short. Sums over a group ascend, product and sum rounded one by one. Threads are the caller's affair.
#pragma once

#include <cstdint>

namespace pyllama::convert {

constexpr int kMaxGroup = 128;
constexpr int kHalves = 512;  // multiples of 1/2 from -128, at which a codebook's borders are looked up

struct Matrix {
  const float* weights;  // [n_rows][n_columns], finite
  int64_t n_rows, n_columns;
  int group;                      // of 1 to kMaxGroup
  const float* counts = nullptr;  // [n_columns] by what the squared error of each column counts; null: alike
};

// Levels low…high one apart, or a codebook's; the stored code is level + bias, or the codebook's index.
struct ScaleGrid {
  float low, high, bias;
  const float* level_of_half;   // [kHalves], null without a codebook
  const uint8_t* code_of_half;  // [kHalves]
  const float* places;          // [n_places]: levels at which trials put the largest weight
  int n_places;
};

// Trials of an affine group: it starts at low + first · spread, and a step is second · spread.
struct AffineGrid {
  const float* trials;  // [n_trials][2]
  int n_trials;
};

// f16 bits in scales and offsets.
struct Packed {
  uint8_t* codes;     // [n_rows][n_columns]
  uint16_t* scales;   // [n_rows][n_groups]
  uint16_t* offsets;  // [n_rows][n_groups], of affine grids
};

// A group of some rows, columns by rows, for GPTQ's step through it.
struct Push {
  int width;             // of 1 to kMaxGroup
  int64_t n;             // rows
  const float* block;    // [width][n] what weights should be
  const float* scales;   // [n_trials][n]
  const float* offsets;  // [n_trials][n]
  int n_trials;          // of 1 to 127
  const float* factor;   // [width][width] of the inverse of the gram matrix; its upper triangle is read
  float* levels;         // [width][n]
  float* errors;         // [width][n] over the factor's diagonal
  int8_t* chosen;        // [n] which trial; -1 where none gives a number
};

// The same for coordinate descent.
struct Descent {
  int width;
  int64_t n;
  const float* scale;  // [n]
  const float* gram;   // [width][width] symmetric
  float* levels;       // [width][n] in place
  float* slope;        // [width][n] half the error's fall along each weight, in place
};

struct Kernels {
  const char* isa;
  void (*search_scale)(const Matrix& matrix, const ScaleGrid& grid, const Packed& out);
  void (*search_affine)(const Matrix& matrix, const AffineGrid& grid, const Packed& out);
  float (*largest)(const float* values, int64_t n);  // magnitude; infinite if one is NaN or infinite
  void (*from_f16)(const uint16_t* halves, float* out, int64_t n);
  void (*push_group)(const Push& push, const ScaleGrid& grid);  // `places` is not read
  void (*move_codes)(const Descent& descent, const ScaleGrid& grid);
};

extern const Kernels kernels_baseline;
#if defined(__x86_64__) || defined(_M_X64)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

// codes [n_rows][n_columns] into tiles [ceil(n_rows/16)][n_lines][16][4], `bits` lines being 32 columns (FORMAT.md).
// Padding is written as zeros.
void put_codes(const uint8_t* codes, int64_t n_rows, int64_t n_columns, int bits, int64_t n_lines, uint8_t* tiles);

// values [n_rows][width] of 1, 2 or 4 bytes into tiles [ceil(n_rows/16)][n_columns][16]. Padding is written as zeros.
void put_columns(const void* values, int64_t n_rows, int64_t width, int bytes, int64_t n_columns, void* tiles);

}  // namespace pyllama::convert
