// Config, weights and a device that fit together. A Model is immutable and shared by all its sequences; building one
// checks every shape against the config, so that neither forward.cpp nor a backend has to.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>

#include "backend.h"
#include "model/sequence.h"

namespace pyllama {

// Throws FormatError unless the numbers of a config make a model.
void check_config(const Config& config);

// Sorts named tensors (docs/FORMAT.md, "Tensor names") into place. Throws FormatError for a tensor that is missing, is
// not expected, or has another shape or kind than the config demands.
ModelWeights assemble_weights(const Config& config, const std::map<std::string, Weight>& tensors, bool tied_embeddings);

using BackendFactory = std::function<std::unique_ptr<Backend>(const Config&, const ModelWeights&)>;

class Model {
 public:
  Model(Config config, const std::map<std::string, Weight>& tensors, bool tied_embeddings, const BackendFactory& make);

  const Config& config() const { return parts_->config; }
  Backend& backend() const { return parts_->pool.backend(); }
  PagePool& pool() const { return parts_->pool; }
  std::unique_ptr<Sequence> new_sequence() const;

 private:
  // One allocation with one owner count: a backend may keep references to config and weights, so they live as long as
  // it does, and it lives as long as the last sequence. (The bytes that the weights view only matter while steps run.)
  struct Parts {
    Config config;
    ModelWeights weights;
    PagePool pool;
    Parts(Config c, ModelWeights w, const BackendFactory& make)
        : config(std::move(c)), weights(std::move(w)), pool(make(config, weights)) {}
  };
  std::shared_ptr<Parts> parts_;
};

}  // namespace pyllama
