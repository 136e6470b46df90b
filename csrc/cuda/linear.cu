// See linear.h.
#include "cuda/linear.h"

#include "cuda/linear_few.h"
#include "cuda/linear_many.h"

namespace pyllama {
namespace cuda {

namespace {

template <class Store>
void choose(Stream& stream, const Fragments& w, const Activations& x, int n_tokens, const Store& out,
            int multiprocessors) {
  if (n_tokens <= kFewTokens) return linear_few(stream, w, x, n_tokens, out, multiprocessors);
  linear_many(stream, w, x, n_tokens, out, multiprocessors);
}

}  // namespace

void linear(Stream& stream, const Fragments& w, const Activations& x, int n_tokens, const StoreRows& out,
            int multiprocessors) {
  choose(stream, w, x, n_tokens, out, multiprocessors);
}

void linear(Stream& stream, const Fragments& w, const Activations& x, int n_tokens, const StoreSwiglu& out,
            int multiprocessors) {
  choose(stream, w, x, n_tokens, out, multiprocessors);
}

}  // namespace cuda
}  // namespace pyllama
