// See linear.h.
#include "cuda/linear.h"

#include <algorithm>

#include "cuda/linear_few.h"

namespace pyllama {
namespace cuda {

namespace {

// The same for tokens from the nth on.
StoreRows from_token(StoreRows out, int n) {
  out.y += n * out.stride;
  if (out.residual) out.residual += n * out.stride;
  return out;
}

StoreSwiglu from_token(StoreSwiglu out, int n) {
  out.y += n * out.stride;
  return out;
}

template <class Store>
void panel_by_panel(Stream& stream, const Fragments& w, const Activations& x, int n_tokens, const Store& out,
                    int multiprocessors) {
  for (int first = 0; first < n_tokens; first += kPanelTokens) {
    linear_few(stream, w, panels_from(x, first / kPanelTokens, w.columns), std::min(kPanelTokens, n_tokens - first),
               from_token(out, first), multiprocessors);
  }
}

}  // namespace

void linear(Stream& stream, const Fragments& w, const Activations& x, int n_tokens, const StoreRows& out,
            int multiprocessors) {
  panel_by_panel(stream, w, x, n_tokens, out, multiprocessors);
}

void linear(Stream& stream, const Fragments& w, const Activations& x, int n_tokens, const StoreSwiglu& out,
            int multiprocessors) {
  panel_by_panel(stream, w, x, n_tokens, out, multiprocessors);
}

}  // namespace cuda
}  // namespace pyllama
