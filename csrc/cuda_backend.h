// The CUDA device as a Backend: forwards each verb to the CUDA library through its table (cuda_library.h, cuda/api.h).
// Knows no CUDA and computes nothing.
#pragma once

#include <memory>

#include "backend.h"
#include "cuda_library.h"

namespace pyllama {

struct CudaOptions {
  int device = 0;
  int max_batch_tok = 512;
  const char* kv_dtype = "f16";  // of the key/value cache: "f16" or "q8"
};

// What a model takes of a device's memory, from its shapes alone; needs the library and no device. Throws as
// make_cuda_backend.
PyllamaCudaSizes cuda_sizes(const Config& config, const ModelWeights& weights, const CudaOptions& options);

// A whole model, or a part: `config.n_layers` are those of `weights`; without tok_embeddings (N == 0) x comes by
// load_x, without norm it leaves by store_x. The weights are read during the call only. Throws DeviceError: there is no
// such device, it cannot run this model, or its memory is too small.
std::unique_ptr<Backend> make_cuda_backend(const Config& config, const ModelWeights& weights,
                                           const CudaOptions& options);

}  // namespace pyllama
