// One row of a weight matrix as floats, for the token embedding. Plain code: it runs once per token.
#pragma once

#include "../tensor.h"

namespace pyllama {
namespace cpu {

void dequantize_row(const Weight& w, int row, float* out);  // out: [K]

}  // namespace cpu
}  // namespace pyllama
