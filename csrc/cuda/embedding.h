// Rows of a matrix in fragment order as floats: the embeddings of a step's tokens. One copy of a tied matrix on the
// device serves as embedding and as output. See fragments.h for the order.
#pragma once

#include <cstdint>

#include "cuda/fragments.h"

namespace pyllama {
namespace cuda {

// x[t] = row tokens[t] of w, times scale; tokens int32 [n_tok], x f32 [n_tok][w.columns], in device memory. w: made
// without a row_map. input_order: null, or the matrix's (docs/FORMAT.md), int32 [w.columns]. A token that is no row of
// w gives NaN.
void embed(Stream& stream, const Fragments& w, const int32_t* tokens, int n_tok, const int32_t* input_order, float* x,
           float scale = 1.0f);

}  // namespace cuda
}  // namespace pyllama
