// See model.h. The verbs are here, and when a step is launched, recorded or replayed.
#include "cuda/model.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>

#include "cuda/embedding.h"
#include "cuda/linear.h"
#include "cuda/rope_angles.h"
#include "cuda/vector.h"
#include "error.h"

namespace pyllama {
namespace cuda {

namespace {

constexpr int kFewTok = 8;  // of a step that is replayed
// Contexts are counted in powers of two from here on, so that a graph serves while a text grows.
constexpr int kLeastKeys = 256;
// Left free on the device when a model is opened: pages of the first texts, what CUDA takes for itself.
constexpr size_t kSpareBytes = size_t{128} << 20;

int keys_bucket(int keys) {
  int bucket = kLeastKeys;
  while (bucket < keys) bucket *= 2;
  return bucket;
}

int pages_bucket(int pages) {
  int bucket = 1;
  while (bucket < pages) bucket *= 2;
  return bucket;
}

int64_t pages_for(int keys) { return (keys + kPageTok - 1) / kPageTok; }

CacheLayout layout_of(const Config& c, const ModelOptions& options) {
  return cache_layout(options.cache, c.n_layers, c.n_kv_heads, c.head_dim);
}

StepShape buffers_of(const Config& c, const ModelWeights& weights, const ModelOptions& options) {
  StepShape shape{&c, options.max_batch_tok, false, weights.norm.N > 0};
  for (const LayerWeights& layer : weights.layers) shape.gate_up = shape.gate_up || gate_up_apart(layer);
  return shape;
}

std::string megabytes(size_t bytes) { return message((bytes + (1 << 20) - 1) >> 20, " MiB"); }

// Before anything is allocated, so that nobody waits for an upload that cannot end well.
const Config& check_memory(const Config& c, const ModelWeights& weights, const ModelOptions& options) {
  const ModelSizes sizes = model_sizes(c, weights, options);
  const size_t others = sizes.buffers + sizes.weights.staging + sizes.page + (emulated() ? 0 : kSpareBytes);
  const size_t wanted = sizes.weights.all + others, free = free_bytes(options.device);
  if (wanted <= free) return c;
  const size_t fixed = others + sizes.weights.head;
  const size_t fit = fixed < free ? (free - fixed) / std::max<size_t>(1, sizes.weights.largest_layer) : 0;
  const int n_layers = static_cast<int>(std::min<size_t>(fit, static_cast<size_t>(c.n_layers)));
  throw Error(kPyllamaCudaOutOfMemory,
              message(megabytes(wanted), " are wanted on device ", options.device, " (weights ",
                      megabytes(sizes.weights.all), "), ", megabytes(free), " are free; ",
                      n_layers > 0 ? message(n_layers, " of ", c.n_layers, " layers would fit: gpu_layers=", n_layers)
                                   : "not even one layer would fit: use device=\"cpu\""));
}

// PYLLAMA_CUDA_GRAPHS=0: every step is launched kernel by kernel, to find out whether graphs are to blame.
bool graphs_wanted() {
  const char* text = std::getenv("PYLLAMA_CUDA_GRAPHS");
  const std::string wish = text ? text : "";
  check<std::invalid_argument>(wish.empty() || wish == "0" || wish == "1", "PYLLAMA_CUDA_GRAPHS=", wish,
                               ": expected 0 or 1");
  return wish != "0";
}

}  // namespace

ModelSizes model_sizes(const Config& c, const ModelWeights& weights, const ModelOptions& options) {
  ModelSizes sizes;
  sizes.weights = weight_sizes(c, weights);
  sizes.buffers = step_buffers_bytes(buffers_of(c, weights, options));
  sizes.page = static_cast<size_t>(layout_of(c, options).page_bytes);
  return sizes;
}

CudaModel::CudaModel(const Config& config, const ModelWeights& weights, const ModelOptions& options)
    : c_(check_memory(config, weights, options)),
      current_(options.device),
      properties_(properties(options.device)),
      max_tok_(options.max_batch_tok),
      graphs_wanted_(graphs_wanted()),
      cache_(layout_of(c_, options)),
      w_(stream_, c_, weights),
      inv_freq_(c_.rope_inv_freq.size() * sizeof(float), "frequencies of RoPE"),
      buffers_(buffers_of(c_, weights, options)),
      pages_(stream_, static_cast<size_t>(cache_.page_bytes)) {
  stream_.copy_to_device(inv_freq_.data(), c_.rope_inv_freq.data(), inv_freq_.bytes());
  few_inputs_.reserve(kFewTok, kFewTok * pages_for(keys_bucket(c_.max_seq_len)));
  if (w_.has_head()) {
    few_logits_ = HostMemory(kFewTok * static_cast<size_t>(c_.vocab_size) * sizeof(float));
    drawn_ = HostMemory(static_cast<size_t>(max_tok_) * sizeof(int32_t));
  }
  if (!w_.has_embedding()) {
    x_on_host_ = HostMemory(static_cast<size_t>(max_tok_) * static_cast<size_t>(c_.dim) * sizeof(float));
  }
  stream_.wait();
}

// Another thread may close the model, whose current device is another one.
CudaModel::~CudaModel() {
  try {
    stream_.make_current();
  } catch (...) {  // a device that is lost frees nothing anyway
  }
}

// ---- a step

// Everything that takes memory happens here, since a recording may not.
void CudaModel::begin(const Step& step) {
  stream_.make_current();
  check<std::invalid_argument>(step.n_tok >= 1 && step.n_tok <= max_tok_, "a step of ", step.n_tok,
                               " tokens; expected 1 to ", max_tok_);
  started_ = done_ = false;
  failed_ = true;  // until the last verb has waited
  running_ = true;
  choose_shape(step);
  AttendShape largest = shape_;  // so that the room seldom grows, which frees memory and loses the graphs
  const auto longest = static_cast<int>(pages_for(keys_bucket(shape_.max_keys)));
  largest.n_pages = pages_bucket(std::max(shape_.n_pages, longest));
  const AttendRoom need = attend_room(cache_, largest);
  if (!room_.fits(need)) {
    graphs_.clear();  // they know the old room
    room_.reserve(stream_, need);
  }
  if (!few_ && !many_inputs_.fits(step.n_tok, n_pages_)) many_inputs_.reserve(max_tok_, 2 * n_pages_);
  const auto n_out = static_cast<size_t>(step.n_out);
  if (!few_ && !draws_ && n_out > many_rows_) {
    many_logits_ = HostMemory();
    many_rows_ = 0;
    many_logits_ = HostMemory(n_out * static_cast<size_t>(c_.vocab_size) * sizeof(float));
    many_rows_ = n_out;
  }
  logits_ = few_ ? few_logits_.as<float>() : many_logits_.as<float>();
  inputs().set(step, pages_, c_.vocab_size);
}

void CudaModel::choose_shape(const Step& step) {
  few_ = step.n_tok <= kFewTok;
  shape_ = {};
  shape_.n_spans = step.n_spans;
  shape_.max_few_tok = 0;
  shape_.n_tok = step.n_tok;
  shape_.n_heads = c_.n_heads;
  shape_.scale = c_.attention_scale;
  shape_.multiprocessors = properties_.multiprocessors;
  shape_.shared_bytes = properties_.shared_bytes;
  n_out_ = step.n_out;
  draws_ = step.draws != nullptr;
  for (int i = 0; i < step.n_spans; i++) {
    const Span& span = step.spans[i];
    shape_.max_span_tok = std::max(shape_.max_span_tok, span.n_tok);
    if (span.n_tok <= kFewSpanTok) shape_.max_few_tok = std::max(shape_.max_few_tok, span.n_tok);
    shape_.max_keys = std::max(shape_.max_keys, span.pos + span.n_tok);
  }
  if (few_) shape_.max_keys = keys_bucket(shape_.max_keys);
  n_pages_ = few_ ? step.n_spans * pages_for(shape_.max_keys) : pages_of(step);
  shape_.n_pages = static_cast<int>(n_pages_);
}

// The first verb.
void CudaModel::start() {
  check<std::logic_error>(running_ && !started_, "a step begins with begin(), then embed() or load_x()");
  started_ = true;
  mode_ = Mode::direct;
  timer_.begin();
  key_ = {shape_.n_tok, shape_.n_spans, shape_.max_span_tok, shape_.max_keys, n_out_, draws_};
  if (few_ && graphs_wanted_ && !timer_.on() && graphs_.seen(key_)) {
    mode_ = graphs_.find(key_) ? Mode::replayed : Mode::recorded;
  }
  if (mode_ == Mode::replayed) return stream_.run(*graphs_.find(key_));
  if (mode_ == Mode::recorded) recording_.emplace(stream_);
  turn_to(&StepTimes::rest);
}

// What all layers read beside x. Begins with a copy and ends with a kernel, so that what comes next may start early.
void CudaModel::bring_inputs() {
  inputs().copy(stream_, n_pages_);
  const RopeAngles angles{inputs().pos(), inv_freq_.as<float>(), c_.rope_attention_factor,
                          shape_.n_tok,   c_.head_dim / 2,       buffers_.cos,
                          buffers_.sin};
  rope_angles(stream_, angles);
}

// The last verb sees to it that all is done, and well.
void CudaModel::finish() {
  timer_.end(stream_);
  if (mode_ == Mode::recorded) {
    Graph graph = recording_->finish();
    recording_.reset();
    stream_.run(graphs_.put(key_, std::move(graph)));
  }
  stream_.wait();
  if (few_ && mode_ == Mode::direct) graphs_.ran(key_);
  timer_.collect();
  done_ = true;
  failed_ = false;
}

void CudaModel::end() noexcept {
  if (!running_) return;
  running_ = false;
  recording_.reset();  // an exception came in between: what was recorded is not to be done
  if (!failed_) return;
  if (started_) graphs_.forget(key_);
  try {
    stream_.wait();  // nobody may get a page that a kernel still writes to
    room_.set_to_zero(stream_);
  } catch (...) {  // who waits next is told as well
  }
}

// ---- verbs

void CudaModel::embed() {
  check<std::logic_error>(w_.has_embedding(), "this part of a model has no embedding");
  start();
  if (!launches()) return;
  bring_inputs();
  const DeviceMatrix& w = w_.embedding();
  pyllama::cuda::embed(stream_, w.fragments, inputs().tokens(), shape_.n_tok, w.input_order, buffers_.x,
                       c_.embedding_scale);
}

void CudaModel::load_x(const float* x) {
  check<std::logic_error>(!w_.has_embedding(), "this model has an embedding, and takes no other input");
  const size_t bytes = x_bytes();
  std::memcpy(x_on_host_.as<void>(), x, bytes);
  start();
  if (!launches()) return;
  stream_.copy_to_device(buffers_.x, x_on_host_.as<void>(), bytes);
  bring_inputs();
}

void CudaModel::store_x(float* x) {
  check<std::logic_error>(done_, "x is read after the last verb of a step");
  stream_.copy_to_host(x, buffers_.x, x_bytes());
  stream_.wait();
}

void CudaModel::attention_in(int layer) {
  if (!launches()) return;
  const DeviceLayer& w = w_.layer(layer);
  const int64_t stride = c_.q_dim() + 2 * c_.kv_dim();
  multiply_normed(w.qkv, w.attn_norm, buffers_.qkv, stride);
  const Places places{inputs().own_pages(), inputs().pos(), buffers_.cos, buffers_.sin};
  rope_append(stream_, cache_, layer, places, shape_.n_tok,
              {buffers_.qkv, stride, buffers_.q, c_.n_heads, w.q_norm, w.k_norm, c_.norm_eps});
}

void CudaModel::attention(int layer) {
  if (!launches()) return;
  turn_to(&StepTimes::attention);
  AttendBuffers args;
  args.q = buffers_.q;
  args.o = buffers_.o;
  args.spans = inputs().spans();
  args.pages = inputs().pages();
  args.partials = room_.partials();
  args.arrived = room_.arrived();
  attend(stream_, cache_, layer, shape_, args);
  turn_to(&StepTimes::rest);
}

void CudaModel::attention_out(int layer) {
  if (launches()) add_to_residual(w_.layer(layer).wo, buffers_.o);
}

void CudaModel::mlp_in(int layer) {
  if (!launches()) return;
  const DeviceLayer& w = w_.layer(layer);
  if (w.gate_up.size() > 1) {
    multiply_normed(w.gate_up, w.mlp_norm, buffers_.gate_up, 2 * c_.hidden_dim);
    swiglu(stream_, {buffers_.gate_up, 2 * c_.hidden_dim, shape_.n_tok, 2 * c_.hidden_dim}, buffers_.h);
    return;
  }
  norm_activations(stream_, {buffers_.x, c_.dim, shape_.n_tok, c_.dim}, w.mlp_norm, c_.norm_eps, buffers_.activations);
  turn_to(&StepTimes::products);
  linear(stream_, w.gate_up.front().fragments, buffers_.activations, shape_.n_tok,
         StoreSwiglu{buffers_.h, c_.hidden_dim, c_.hidden_dim}, properties_.multiprocessors);
  turn_to(&StepTimes::rest);
}

void CudaModel::mlp_out(int layer) {
  if (launches()) add_to_residual(w_.layer(layer).w_down, buffers_.h);
  if (layer == c_.n_layers - 1 && (n_out_ == 0 || !w_.has_head())) finish();
}

void CudaModel::head() {
  check<std::logic_error>(w_.has_head() && n_out_ > 0, "this step, or this part of a model, has no head");
  turn_to(&StepTimes::head);
  const DeviceMatrix& w = w_.output();
  const auto vocab_size = static_cast<size_t>(c_.vocab_size);
  for (int first = 0; launches() && first < n_out_; first += kLogitRows) {
    const int n = std::min(n_out_ - first, kLogitRows);
    const TokenRows rows{buffers_.x, c_.dim, n, c_.dim, inputs().out_rows() + first, w.input_order};
    norm_activations(stream_, rows, w_.norm(), c_.norm_eps, buffers_.activations);
    linear(stream_, w.fragments, buffers_.activations, n, StoreRows{buffers_.logits, c_.vocab_size, nullptr, nullptr},
           properties_.multiprocessors);
    if (draws_) {
      draw(first, n);
    } else {
      stream_.copy_to_host(logits_ + static_cast<size_t>(first) * vocab_size, buffers_.logits,
                           static_cast<size_t>(n) * vocab_size * sizeof(float));
    }
  }
  if (launches() && draws_) {
    stream_.copy_to_host(drawn_.as<void>(), buffers_.drawn, static_cast<size_t>(n_out_) * sizeof(int32_t));
  }
  finish();
}

// ---- their parts

// The tokens after `n` rows of logits, of which the step's `first` is the first.
void CudaModel::draw(int first, int n) {
  const auto vocab_size = static_cast<size_t>(c_.vocab_size);
  for (int row = 0; row < n; row += kDrawRows) {
    draw_tokens(stream_,
                {buffers_.logits + static_cast<size_t>(row) * vocab_size, c_.vocab_size, std::min(n - row, kDrawRows),
                 inputs().draws() + first + row, buffers_.draw_room, buffers_.drawn + first + row});
  }
}

// Matrices with an input_order want activations of their own.
void CudaModel::multiply_normed(const std::vector<DeviceMatrix>& matrices, const float* norm, float* y,
                                int64_t stride) {
  const DeviceMatrix* before = nullptr;
  for (const DeviceMatrix& w : matrices) {
    if (!before || before->input_order != w.input_order) {
      turn_to(&StepTimes::rest);
      const TokenRows rows{buffers_.x, c_.dim, shape_.n_tok, c_.dim, nullptr, w.input_order};
      norm_activations(stream_, rows, norm, c_.norm_eps, buffers_.activations);
      turn_to(&StepTimes::products);
    }
    before = &w;
    linear(stream_, w.fragments, buffers_.activations, shape_.n_tok,
           StoreRows{y + w.first_row, stride, w.bias, nullptr}, properties_.multiprocessors);
  }
  turn_to(&StepTimes::rest);
}

// x += w · in
void CudaModel::add_to_residual(const DeviceMatrix& w, const float* in) {
  const int columns = w.fragments.columns;
  prepare_activations(stream_, {in, columns, shape_.n_tok, columns, nullptr, w.input_order}, buffers_.activations);
  turn_to(&StepTimes::products);
  linear(stream_, w.fragments, buffers_.activations, shape_.n_tok, StoreRows{buffers_.x, c_.dim, nullptr, buffers_.x},
         properties_.multiprocessors);
  turn_to(&StepTimes::rest);
}

}  // namespace cuda
}  // namespace pyllama
