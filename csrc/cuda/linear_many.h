// y = x W^T for more than 8 tokens, by tensor cores, with weights in fragment order (fragments.h): the product of
// prompts and of large batches. A token's numbers are the same bits whatever the other tokens are, however many, and
// wherever it stands among them; they are not the bits of linear_few.h, which sums in another order.
#pragma once

#include "cuda/linear.h"

namespace pyllama {
namespace cuda {

// For any number of tokens. The launch's shape follows their number and `multiprocessors`; the numbers do not.
void linear_many(Stream& stream, const Fragments& w, const Activations& x, int n_tokens, const StoreRows& out,
                 int multiprocessors);
void linear_many(Stream& stream, const Fragments& w, const Activations& x, int n_tokens, const StoreSwiglu& out,
                 int multiprocessors);

}  // namespace cuda
}  // namespace pyllama
