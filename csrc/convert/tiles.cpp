// Plain numbers into tiles of 16 rows (docs/FORMAT.md): moves bytes, so one version serves all instruction sets.
#include <algorithm>
#include <cstring>

#include "convert/convert.h"

namespace pyllama::convert {
namespace {

constexpr int kRows = 16;

// Eight codes of a row -> four bytes: the low nibbles are columns 0…3, the high ones 4…7.
inline uint32_t join(const uint8_t* codes) {
  uint32_t low, high;
  memcpy(&low, codes, 4);
  memcpy(&high, codes + 4, 4);
  return low | high << 4;
}

template <int kBits>
void put_row(const uint8_t* codes, int64_t n_columns, int64_t n_blocks, uint8_t* out) {
  constexpr int kColumns = 32 / kBits;
  for (int64_t block = 0; block < n_blocks; ++block) {
    const int64_t first = block * kColumns;
    uint8_t padded[8] = {};
    const uint8_t* here = codes + first;
    if (first + kColumns > n_columns) {
      if (first < n_columns) memcpy(padded, here, n_columns - first);
      here = padded;
    }
    uint32_t word;
    if (kBits == 4)
      word = join(here);
    else
      memcpy(&word, here, 4);
    memcpy(out + block * kRows * 4, &word, 4);
  }
}

// Codes of 5 or 6 bits: nibbles of 32 columns, then planes of the bits above them.
template <int kBits>
void put_row_with_planes(const uint8_t* codes, int64_t n_columns, int64_t n_lines, uint8_t* out) {
  constexpr int kAbove = kBits - 4, kPerByte = 8 / kAbove;
  constexpr uint32_t kMask = 0x01010101u * ((1u << kAbove) - 1);
  for (int64_t first = 0; first < n_lines / kBits * 32; first += 32) {
    uint8_t padded[32] = {};
    const uint8_t* here = codes + first;
    if (first + 32 > n_columns) {
      if (first < n_columns) memcpy(padded, here, n_columns - first);
      here = padded;
    }
    uint32_t lines[kBits] = {};
    for (int quad = 0; quad < 8; ++quad) {
      uint32_t four;
      memcpy(&four, here + quad * 4, 4);
      lines[quad / 2] |= (four & 0x0f0f0f0fu) << quad % 2 * 4;
      lines[4 + quad / kPerByte] |= (four >> 4 & kMask) << quad % kPerByte * kAbove;
    }
    for (const uint32_t line : lines) {
      memcpy(out, &line, 4);
      out += kRows * 4;
    }
  }
}

template <class T>
void put_columns_of(const T* values, int64_t n_rows, int64_t width, int64_t n_columns, T* tiles) {
  constexpr int64_t kStep = 16;  // columns at a time: their lines stay in the first-level cache
  for (int64_t tile = 0; tile * kRows < n_rows; ++tile) {
    const int64_t rows = std::min<int64_t>(kRows, n_rows - tile * kRows);
    const T* in = values + tile * kRows * width;
    T* out = tiles + tile * n_columns * kRows;
    if (rows < kRows || width < n_columns) memset(out, 0, n_columns * kRows * sizeof(T));
    for (int64_t first = 0; first < width; first += kStep) {
      const int64_t last = std::min(first + kStep, width);
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t k = first; k < last; ++k) out[k * kRows + row] = in[row * width + k];
    }
  }
}

}  // namespace

void put_codes(const uint8_t* codes, int64_t n_rows, int64_t n_columns, int bits, int64_t n_lines, uint8_t* tiles) {
  for (int64_t tile = 0; tile * kRows < n_rows; ++tile) {
    uint8_t* out = tiles + tile * n_lines * kRows * 4;
    const int64_t rows = std::min<int64_t>(kRows, n_rows - tile * kRows);
    if (rows < kRows) memset(out, 0, n_lines * kRows * 4);
    for (int64_t row = 0; row < rows; ++row) {
      const uint8_t* in = codes + (tile * kRows + row) * n_columns;
      if (bits == 4)
        put_row<4>(in, n_columns, n_lines, out + row * 4);
      else if (bits == 5)
        put_row_with_planes<5>(in, n_columns, n_lines, out + row * 4);
      else if (bits == 6)
        put_row_with_planes<6>(in, n_columns, n_lines, out + row * 4);
      else
        put_row<8>(in, n_columns, n_lines, out + row * 4);
    }
  }
}

void put_columns(const void* values, int64_t n_rows, int64_t width, int bytes, int64_t n_columns, void* tiles) {
  switch (bytes) {
    case 1:
      return put_columns_of(static_cast<const uint8_t*>(values), n_rows, width, n_columns,
                            static_cast<uint8_t*>(tiles));
    case 2:
      return put_columns_of(static_cast<const uint16_t*>(values), n_rows, width, n_columns,
                            static_cast<uint16_t*>(tiles));
    default:
      return put_columns_of(static_cast<const uint32_t*>(values), n_rows, width, n_columns,
                            static_cast<uint32_t*>(tiles));
  }
}

}  // namespace pyllama::convert
