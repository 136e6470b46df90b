// A model on the device, behind the table of api.h: the verbs of backend.h as kernels in one stream. Steps of at most
// eight rows are recorded as graphs and replayed; all others are launched kernel by kernel. The last verb of a step
// waits for the device, so that what went wrong there is that verb's exception; end() waits where an exception came
// first. Not for two threads at once. What belongs where is in device_weights.h, device_pages.h, step_*.h.
#pragma once

#include <cstddef>
#include <optional>
#include <vector>

#include "backend.h"
#include "config.h"
#include "cuda/device_pages.h"
#include "cuda/device_weights.h"
#include "cuda/step_buffers.h"
#include "cuda/step_graphs.h"
#include "cuda/step_inputs.h"
#include "cuda/step_times.h"

namespace pyllama {
namespace cuda {

struct ModelOptions {
  int device = 0;
  int max_batch_tok = 512;
  CacheType cache = CacheType::f16;
};

// See PyllamaCudaSizes.
struct ModelSizes {
  WeightSizes weights;
  size_t buffers = 0, page = 0;
};
ModelSizes model_sizes(const Config& config, const ModelWeights& weights, const ModelOptions& options);

class CudaModel {
 public:
  // The weights are read here and not kept. Throws Error: out of memory says what was wanted, what there is, and how
  // many layers would fit.
  CudaModel(const Config& config, const ModelWeights& weights, const ModelOptions& options);

  CudaModel(const CudaModel&) = delete;
  CudaModel& operator=(const CudaModel&) = delete;
  ~CudaModel();

  DevicePages& pages() { return pages_; }

  void begin(const Step& step);
  void embed();
  void attention_in(int layer);
  void attention(int layer);
  void attention_out(int layer);
  void mlp_in(int layer);
  void mlp_out(int layer);
  void head();
  void load_x(const float* x);  // [n_tok, dim] in host memory
  void store_x(float* x);
  const float* logits() const { return logits_; }                // [n_out, vocab_size], unless the step draws
  const int32_t* drawn() const { return drawn_.as<int32_t>(); }  // [n_out], if it does
  void end() noexcept;

  StepTimes profile(bool on) { return timer_.restart(on); }

 private:
  // What a step's verbs do: launch, launch into a recording, or nothing, since a graph does it all.
  enum class Mode { direct, recorded, replayed };
  using Part = StepTimer::Part;

  void choose_shape(const Step& step);
  void start();
  void bring_inputs();
  void finish();
  bool launches() const { return mode_ != Mode::replayed; }
  void turn_to(Part part) { timer_.turn_to(stream_, part); }

  // x, normed, times matrices; each result goes to its place in y's rows.
  void multiply_normed(const std::vector<DeviceMatrix>& matrices, const float* norm, float* y, int64_t stride);
  void draw(int first, int n);
  void add_to_residual(const DeviceMatrix& w, const float* in);
  size_t x_bytes() const { return sizeof(float) * static_cast<size_t>(shape_.n_tok) * static_cast<size_t>(c_.dim); }
  StepInputs& inputs() { return few_ ? few_inputs_ : many_inputs_; }

  struct Current {  // the device, for whatever is made after it
    explicit Current(int device) { use_device(device); }
  };

  const Config c_;
  const Current current_;
  const DeviceProperties properties_;
  const int max_tok_;
  const bool graphs_wanted_;
  const CacheLayout cache_;
  Stream stream_;
  const DeviceWeights w_;
  Memory inv_freq_;
  const StepBuffers buffers_;
  DevicePages pages_;
  StepInputs few_inputs_, many_inputs_;
  AttentionRoom room_;
  HostMemory few_logits_, many_logits_, x_on_host_;  // [8][vocab_size], [many_rows_][vocab_size], [max_tok][dim]
  HostMemory drawn_;                                 // [max_tok]
  size_t many_rows_ = 0;
  StepGraphs graphs_;
  StepTimer timer_;

  // Of the step that runs.
  bool running_ = false, started_ = false, done_ = false, failed_ = false;
  bool few_ = false, draws_ = false;
  int n_out_ = 0;
  Mode mode_ = Mode::direct;
  GraphKey key_;
  AttendShape shape_;
  int64_t n_pages_ = 0;  // that the step's inputs bring
  std::optional<Recording> recording_;
  float* logits_ = nullptr;
};

}  // namespace cuda
}  // namespace pyllama
