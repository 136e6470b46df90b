// See step_graphs.h.
#include "cuda/step_graphs.h"

#include <algorithm>
#include <utility>

namespace pyllama {
namespace cuda {

namespace {

constexpr size_t kMostGraphs = 32;

}  // namespace

bool StepGraphs::seen(const GraphKey& key) {
  const auto found = entries_.find(key);
  if (found == entries_.end()) return false;
  found->second.last_used = ++uses_;
  return true;
}

void StepGraphs::ran(const GraphKey& key) {
  if (entries_.size() == kMostGraphs && entries_.count(key) == 0) {
    entries_.erase(std::min_element(entries_.begin(), entries_.end(), [](const auto& a, const auto& b) {
      return a.second.last_used < b.second.last_used;
    }));
  }
  entries_[key].last_used = ++uses_;
}

const Graph* StepGraphs::find(const GraphKey& key) const {
  const auto found = entries_.find(key);
  return found != entries_.end() && found->second.graph ? &*found->second.graph : nullptr;
}

const Graph& StepGraphs::put(const GraphKey& key, Graph graph) { return entries_[key].graph.emplace(std::move(graph)); }

}  // namespace cuda
}  // namespace pyllama
