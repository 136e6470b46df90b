// What kernels of products do with a result: linear.h's stores on the device. A lane hands over a token's numbers of
// rows `row` and `row` + 8 of a tile, as tensor cores leave them.
#pragma once

#include <cmath>

#include "cuda/device.h"
#include "cuda/linear.h"

namespace pyllama {
namespace cuda {

struct StoreRowsEpilogue {
  StoreRows out;
  int rows;

  PYLLAMA_DEVICE void store(int row, int token, float value) const {
    if (row >= rows) return;
    const int64_t index = token * out.stride + row;
    if (out.bias) value += out.bias[row];
    if (out.residual) value += out.residual[index];
    out.y[index] = value;
  }
  PYLLAMA_DEVICE void operator()(int row, int token, float value, float value8) const {
    store(row, token, value);
    store(row + 8, token, value8);
  }
};

struct StoreSwigluEpilogue {
  StoreSwiglu out;

  PYLLAMA_DEVICE void operator()(int row, int token, float gate, float up) const {
    const int i = row / 16 * 8 + row % 16;
    if (i < out.hidden_dim) out.y[token * out.stride + i] = gate / (1.0f + expf(-gate)) * up;
  }
};

}  // namespace cuda
}  // namespace pyllama
