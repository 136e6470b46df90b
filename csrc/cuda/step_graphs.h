// Recorded steps by their shape. The first step of a shape is launched kernel by kernel, which also loads the kernels,
// the second is recorded, later ones replay; of many shapes the least recently used are forgotten.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <tuple>

#include "cuda/runtime.h"

namespace pyllama {
namespace cuda {

// All that the launches of a step depend on.
struct GraphKey {
  int n_tok = 0, n_spans = 0, max_span_tok = 0, max_keys = 0, n_out = 0;
  bool draws = false;

  bool operator<(const GraphKey& b) const {
    return std::tie(n_tok, n_spans, max_span_tok, max_keys, n_out, draws) <
           std::tie(b.n_tok, b.n_spans, b.max_span_tok, b.max_keys, b.n_out, b.draws);
  }
};

class StepGraphs {
 public:
  // Whether a step of this shape ran before; one that failed half-way has not loaded all kernels, and does not count.
  bool seen(const GraphKey& key);
  void ran(const GraphKey& key);
  void forget(const GraphKey& key) noexcept { entries_.erase(key); }
  const Graph* find(const GraphKey& key) const;  // null until put()
  const Graph& put(const GraphKey& key, Graph graph);
  void clear() { entries_.clear(); }

 private:
  struct Entry {
    std::optional<Graph> graph;
    int64_t last_used = 0;
  };
  std::map<GraphKey, Entry> entries_;
  int64_t uses_ = 0;
};

}  // namespace cuda
}  // namespace pyllama
