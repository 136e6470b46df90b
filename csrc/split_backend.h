// One model on two devices: the embedding and the first layers on one backend, the other layers and the head on
// another. For models that do not fit a GPU. Each part is a backend of a smaller model, which keeps keys and values of
// its own layers; a step goes through the one and then through the other, which take turns: while one computes, the
// other has no step. How many layers go where is not decided here, and neither part's device is known.
#pragma once

#include <functional>
#include <memory>

#include "backend.h"

namespace pyllama {

// Makes a backend for a part of a model. Without tok_embeddings (N == 0) it gets its input by load_x, without norm and
// output its result is asked for by store_x. Config and weights live as long as the backend.
using PartFactory = std::function<std::unique_ptr<Backend>(const Config&, const ModelWeights&)>;

// The first `n_front` layers, 1 … n_layers - 1, on the backend of `make_front`.
std::unique_ptr<Backend> make_split_backend(const Config& config, const ModelWeights& weights, int n_front,
                                            const PartFactory& make_front, const PartFactory& make_back);

}  // namespace pyllama
