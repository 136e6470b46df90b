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

  PYLLAMA_DEVICE float value(int row, int token, float product) const {
    if (out.bias) product += out.bias[row];
    return out.residual ? product + out.residual[token * out.stride + row] : product;
  }
  PYLLAMA_DEVICE void store(int row, int token, float value) const { out.y[token * out.stride + row] = value; }
  PYLLAMA_DEVICE void operator()(int row, int token, float product, float product8) const {
    if (row < rows) store(row, token, value(row, token, product));
    if (row + 8 < rows) store(row + 8, token, value(row + 8, token, product8));
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
