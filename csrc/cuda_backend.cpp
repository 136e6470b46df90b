// See cuda_backend.h. Config, weights and steps become the table's records here, and are made out of them again in
// cuda/records.cpp.
#include "cuda_backend.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <string>
#include <vector>

#include "error.h"

namespace pyllama {
namespace {

constexpr int kMostBatchTok = 65535;  // spans of a step, and so its tokens, are a side of a grid

// Memory that ran out in the middle of work, where the scheduler can free some and try again.
struct OutOfDeviceMemory final : std::bad_alloc {
  explicit OutOfDeviceMemory(const std::string& text) : text(text) {}
  const char* what() const noexcept override { return text.c_str(); }
  std::string text;
};

PyllamaCudaWeight record_of(const Weight& w) {
  PyllamaCudaWeight r{};
  r.name = w.name.c_str();
  r.format = static_cast<int32_t>(w.format);
  r.scale_type = static_cast<int32_t>(w.scale_type);
  r.offset_type = static_cast<int32_t>(w.offset_type);
  r.rows = w.N;
  r.columns = w.K;
  r.group = w.group;
  std::copy(w.codebook.begin(), w.codebook.end(), r.codebook);
  r.codes = w.codes;
  r.scales = w.scales;
  r.offsets = w.offsets;
  r.input_order = w.input_order;
  r.payload_bytes = w.payload_bytes;
  return r;
}

PyllamaCudaLayer record_of(const LayerWeights& w) {
  return {record_of(w.attn_norm), record_of(w.wq),     record_of(w.wk),     record_of(w.wv),     record_of(w.bq),
          record_of(w.bk),        record_of(w.bv),     record_of(w.q_norm), record_of(w.k_norm), record_of(w.wo),
          record_of(w.mlp_norm),  record_of(w.w_gate), record_of(w.w_up),   record_of(w.w_down)};
}

// Throws DeviceError for what only the CPU can do.
void check_device_can(const Config& c) {
  const bool slides =
      std::any_of(c.windows.begin(), c.windows.end(), [&](int window) { return window < c.max_seq_len; });
  check<DeviceError>(!slides, "this model has a sliding_window shorter than its context of ", c.max_seq_len,
                     " tokens, which the CUDA kernels do not know; run it on the CPU, or with a shorter n_ctx");
}

// A model's record and what it points to.
struct ModelRecord {
  ModelRecord(const Config& c, const ModelWeights& w, const CudaOptions& options) {
    check_device_can(c);
    for (const LayerWeights& layer : w.layers) layers.push_back(record_of(layer));
    model.dim = c.dim;
    model.hidden_dim = c.hidden_dim;
    model.n_layers = c.n_layers;
    model.n_heads = c.n_heads;
    model.n_kv_heads = c.n_kv_heads;
    model.head_dim = c.head_dim;
    model.vocab_size = c.vocab_size;
    model.max_seq_len = c.max_seq_len;
    model.norm_eps = c.norm_eps;
    model.rope_attention_factor = c.rope_attention_factor;
    model.embedding_scale = c.embedding_scale;
    model.attention_scale = c.attention_scale;
    model.rope_inv_freq = c.rope_inv_freq.data();
    model.tok_embeddings = record_of(w.tok_embeddings);
    model.norm = record_of(w.norm);
    model.output = record_of(w.output);
    model.layers = layers.data();
    model.device = options.device;
    model.max_batch_tok = options.max_batch_tok;
    const std::string kv_dtype = options.kv_dtype;
    check<std::invalid_argument>(kv_dtype == "f16" || kv_dtype == "q8", "kv_dtype is \"", kv_dtype,
                                 "\", expected f16 or q8");
    model.cache_of_bytes = kv_dtype == "q8" ? 1 : 0;
  }
  ModelRecord(const ModelRecord&) = delete;
  ModelRecord& operator=(const ModelRecord&) = delete;

  PyllamaCudaModel model{};
  std::vector<PyllamaCudaLayer> layers;
};

PyllamaCudaSizes sizes_of(const CudaLibrary& library, const PyllamaCudaModel& model) {
  PyllamaCudaSizes sizes{};
  try {
    library.check_result(library.table().sizes(&model, &sizes));
  } catch (const std::invalid_argument& error) {  // a model that no kernel is made for
    throw DeviceError(error.what());
  }
  return sizes;
}

class CudaBackend final : public Backend {
 public:
  CudaBackend(const Config& config, const ModelWeights& weights, const CudaOptions& options)
      : library_(CudaLibrary::open(cuda_library_path())),
        table_(library_.table()),
        max_batch_tok_(options.max_batch_tok) {
    check<DeviceError>(max_batch_tok_ <= kMostBatchTok, "max_batch_tok is ", max_batch_tok_, ", the CUDA kernels take ",
                       kMostBatchTok, " at most");
    const int n_devices = library_.device_count();
    check<DeviceError>(options.device >= 0 && options.device < n_devices, "there is no device ", options.device,
                       ": the driver counts ", n_devices, ", from 0");
    const PyllamaCudaDevice device = library_.device(options.device);
    name_ = library_.build().emulated ? "cuda emulated" : message("cuda sm_", device.major, device.minor);
    const ModelRecord record(config, weights, options);
    page_bytes_ = static_cast<size_t>(sizes_of(library_, record.model).page);
    library_.check_result(table_.open_model(&record.model, &opened_));
  }
  ~CudaBackend() override { table_.close_model(opened_); }

  const char* name() const override { return name_.c_str(); }
  int max_batch_tok() const override { return max_batch_tok_; }

  size_t page_bytes() const override { return page_bytes_; }
  int new_page() override {
    int32_t page = 0;
    check_memory(table_.new_page(opened_, &page));
    return page;
  }
  void free_page(int page) override { table_.free_page(opened_, page); }
  void copy_page(int from, int to) override { library_.check_result(table_.copy_page(opened_, from, to)); }

  void begin(const Step& step) override {
    spans_.clear();
    for (int i = 0; i < step.n_spans; ++i) {
      const Span& span = step.spans[i];
      spans_.push_back({span.first, span.n_tok, span.pos, span.pages});
    }
    draws_.clear();
    for (int i = 0; step.draws && i < step.n_out; ++i) {
      const Draw& draw = step.draws[i];
      draws_.push_back({draw.temperature, draw.top_p, draw.min_p, draw.random, draw.top_k});
    }
    const PyllamaCudaStep record{step.n_tok, step.n_spans,  step.n_out,    step.tokens,
                                 step.pos,   step.out_rows, spans_.data(), step.draws ? draws_.data() : nullptr};
    check_memory(table_.begin(opened_, &record));
  }
  void embed() override { run(kPyllamaCudaEmbed, 0); }
  void attention_in(int layer) override { run(kPyllamaCudaAttentionIn, layer); }
  void attention(int layer) override { run(kPyllamaCudaAttention, layer); }
  void attention_out(int layer) override { run(kPyllamaCudaAttentionOut, layer); }
  void mlp_in(int layer) override { run(kPyllamaCudaMlpIn, layer); }
  void mlp_out(int layer) override { run(kPyllamaCudaMlpOut, layer); }
  void head() override { run(kPyllamaCudaHead, 0); }
  void load_x(const float* x) override { library_.check_result(table_.load_x(opened_, x)); }
  void store_x(float* x) override { library_.check_result(table_.store_x(opened_, x)); }
  const float* logits() override {
    const float* found = nullptr;
    library_.check_result(table_.logits(opened_, &found));
    return found;
  }
  bool can_draw() const override { return true; }
  const int32_t* drawn() override {
    const int32_t* found = nullptr;
    library_.check_result(table_.drawn(opened_, &found));
    return found;
  }
  void end() override { table_.end(opened_); }

  StepTimes profile(bool on) override {
    PyllamaCudaTimes found{};
    library_.check_result(table_.profile(opened_, on ? 1 : 0, &found));
    return {found.products, found.attention, found.head, found.rest};
  }

 private:
  void run(PyllamaCudaVerb verb, int layer) { library_.check_result(table_.run(opened_, verb, layer)); }

  // For what takes memory: std::bad_alloc where there is none left.
  void check_memory(int kind) const {
    if (kind == kPyllamaCudaOutOfMemory) throw OutOfDeviceMemory(message("on the CUDA device: ", table_.last_error()));
    library_.check_result(kind);
  }

  const CudaLibrary& library_;
  const PyllamaCudaTable& table_;
  const int max_batch_tok_;
  std::string name_;
  size_t page_bytes_ = 0;
  PyllamaCudaOpened* opened_ = nullptr;
  std::vector<PyllamaCudaSpan> spans_;  // of the step that runs, as draws_
  std::vector<PyllamaCudaDraw> draws_;
};

}  // namespace

PyllamaCudaSizes cuda_sizes(const Config& config, const ModelWeights& weights, const CudaOptions& options) {
  const ModelRecord record(config, weights, options);
  return sizes_of(CudaLibrary::open(cuda_library_path()), record.model);
}

std::unique_ptr<Backend> make_cuda_backend(const Config& config, const ModelWeights& weights,
                                           const CudaOptions& options) {
  return std::make_unique<CudaBackend>(config, weights, options);
}

}  // namespace pyllama
