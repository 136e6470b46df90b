// y = x W^T for 1 to 8 tokens, by tensor cores, with weights in fragment order (fragments.h): the product of decoding.
// A token's numbers are the same bits whatever the other tokens are and however many, and on any number of
// multiprocessors. Not for prompts: eight tokens fill the matrix instruction's free side, and more would read the
// weights again.
#pragma once

#include "cuda/linear.h"

namespace pyllama {
namespace cuda {

constexpr int kFewTokens = kPanelTokens;

// The launch's shape follows `multiprocessors`; the numbers do not.
void linear_few(Stream& stream, const Fragments& w, const Activations& x, int n_tokens, const StoreRows& out,
                int multiprocessors);
void linear_few(Stream& stream, const Fragments& w, const Activations& x, int n_tokens, const StoreSwiglu& out,
                int multiprocessors);

}  // namespace cuda
}  // namespace pyllama
