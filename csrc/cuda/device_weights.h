// A model's weights on the device, in fragment order, and what they take there. Matrices that multiply the same input
// and are alike lie below each other, for one product: wq wk wv as far as they go together, gate and up. Bytes go from
// the mapped file to a staging buffer on the device and are brought into order there; nothing of a matrix stays twice.
#pragma once

#include <cstddef>
#include <vector>

#include "config.h"
#include "cuda/fragments.h"
#include "cuda/runtime.h"

namespace pyllama {
namespace cuda {

// One or several matrices as one.
struct DeviceMatrix {
  Fragments fragments;
  Memory memory;
  const int32_t* input_order = nullptr;  // [columns], in device memory, or null
  const float* bias = nullptr;           // [rows], in device memory, or null
  int first_row = 0;                     // where its numbers begin in the product's row
};

struct DeviceLayer {
  const float *attn_norm = nullptr, *mlp_norm = nullptr;  // [dim]
  const float *q_norm = nullptr, *k_norm = nullptr;       // [head_dim], or null
  std::vector<DeviceMatrix> qkv;                          // one to three: together the rows of q, k and v
  std::vector<DeviceMatrix> gate_up;  // one, rows of both in turns (StoreSwiglu of linear_few.h), or two
  DeviceMatrix wo, w_down;
};

// Bytes, from shapes alone.
struct WeightSizes {
  size_t embedding = 0, layers = 0, largest_layer = 0, head = 0;
  size_t all = 0;      // a tied matrix counts once
  size_t staging = 0;  // while they are uploaded
};
WeightSizes weight_sizes(const Config& config, const ModelWeights& weights);

// Whether a layer's gate and up are two matrices.
bool gate_up_apart(const LayerWeights& layer);

class DeviceWeights {
 public:
  // Waits until everything is there. Where the weights have no tok_embeddings or no norm, there is no embedding or no
  // head here.
  DeviceWeights(Stream& stream, const Config& config, const ModelWeights& weights);

  bool has_embedding() const { return embedding_.fragments.rows > 0; }
  bool has_head() const { return norm_ != nullptr; }
  const DeviceMatrix& embedding() const { return embedding_; }
  const DeviceMatrix& output() const { return tied_ ? embedding_ : output_; }
  const float* norm() const { return norm_; }
  const DeviceLayer& layer(int i) const { return layers_.at(static_cast<size_t>(i)); }

 private:
  Memory vectors_;  // all norms and biases
  DeviceMatrix embedding_, output_;
  bool tied_ = false;
  const float* norm_ = nullptr;
  std::vector<DeviceLayer> layers_;
};

}  // namespace cuda
}  // namespace pyllama
