// See device_weights.h. `Stack` and `stacks_of` say which matrices go together; counting and uploading both follow
// them.
#include "cuda/device_weights.h"

#include <algorithm>
#include <utility>

namespace pyllama {
namespace cuda {

namespace {

constexpr size_t kPlace = 256;  // what lies in one piece of memory begins at multiples of this

size_t placed(size_t bytes) { return (bytes + kPlace - 1) / kPlace * kPlace; }
size_t vector_bytes(int n) { return placed(static_cast<size_t>(n) * sizeof(float)); }

using Stack = std::vector<const Weight*>;

// Neighbours that one product can take go together.
std::vector<Stack> stacks_of(std::initializer_list<const Weight*> weights) {
  std::vector<Stack> stacks;
  for (const Weight* w : weights) {
    if (stacks.empty() || !one_product(*stacks.back().front(), *w)) stacks.emplace_back();
    stacks.back().push_back(w);
  }
  return stacks;
}
std::vector<Stack> qkv_stacks(const LayerWeights& l) { return stacks_of({&l.wq, &l.wk, &l.wv}); }
std::vector<Stack> gate_up_stacks(const LayerWeights& l) { return stacks_of({&l.w_gate, &l.w_up}); }

// Where a stack's parts lie in its memory.
struct MatrixPlaces {
  size_t scales, row_scales, input_order, bytes;
};
MatrixPlaces places_of(const Fragments& f, const Weight& first) {
  const FragmentSizes sizes = fragment_sizes(f);
  MatrixPlaces p;
  p.scales = placed(sizes.codes_bytes);
  p.row_scales = p.scales + placed(sizes.scales_bytes);
  p.input_order = p.row_scales + placed(sizes.row_scales_bytes);
  p.bytes = p.input_order + (first.input_order ? placed(static_cast<size_t>(first.K) * sizeof(int32_t)) : 0);
  return p;
}

// What a stack takes while it is there and while it is uploaded.
struct StackSizes {
  size_t bytes, staging;
};
StackSizes sizes_of(const Stack& stack) {
  const Fragments f = fragments_of(stack.data(), static_cast<int>(stack.size()));
  StackSizes sizes{places_of(f, *stack.front()).bytes, 0};
  for (const Weight* w : stack) sizes.staging += placed(static_cast<size_t>(w->payload_bytes));
  return sizes;
}

struct Total {
  size_t bytes = 0, staging = 0;

  void add(const Stack& stack) {
    const StackSizes s = sizes_of(stack);
    bytes += s.bytes;
    staging = std::max(staging, s.staging);
  }
};

// A layer's norms and biases.
size_t layer_vectors(const Config& c, const LayerWeights& l) {
  return 2 * vector_bytes(c.dim) + vector_bytes(c.q_dim()) + 2 * vector_bytes(c.kv_dim()) + vector_bytes(l.q_norm.N) +
         vector_bytes(l.k_norm.N);
}

Total layer_total(const Config& c, const LayerWeights& l) {
  Total total;
  for (const Stack& stack : qkv_stacks(l)) total.add(stack);
  for (const Stack& stack : gate_up_stacks(l)) total.add(stack);
  total.add({&l.wo});
  total.add({&l.w_down});
  total.bytes += layer_vectors(c, l);
  return total;
}

bool tied(const ModelWeights& w) { return w.tok_embeddings.N > 0 && w.output.name == w.tok_embeddings.name; }

// Brings matrices and vectors to the device, one after the other through one staging buffer.
class Upload {
 public:
  Upload(Stream& stream, size_t staging_bytes, const Memory& vectors)
      : stream_(stream), staging_(staging_bytes, "weights on their way"), next_vector_(vectors.as<uint8_t>()) {
    stream_.fill(vectors.data(), 0, vectors.bytes());
  }

  // row_map: as to_fragments takes it, in device memory, or null.
  DeviceMatrix matrix(const Stack& stack, const int32_t* row_map = nullptr) {
    const int n = static_cast<int>(stack.size());
    const Weight& first = *stack.front();
    DeviceMatrix m;
    m.fragments = fragments_of(stack.data(), n);
    const MatrixPlaces at = places_of(m.fragments, first);
    m.memory = Memory(at.bytes, first.name.c_str());
    uint8_t* const data = m.memory.as<uint8_t>();
    m.fragments.codes = data;
    m.fragments.scales = reinterpret_cast<const uint32_t*>(data + at.scales);
    m.fragments.row_scales = reinterpret_cast<const float*>(data + at.row_scales);
    std::vector<Weight> staged;
    size_t offset = 0;
    for (const Weight* w : stack) {
      staged.push_back(stage(*w, offset));
      offset += placed(static_cast<size_t>(w->payload_bytes));
    }
    Stack pointers;
    for (const Weight& w : staged) pointers.push_back(&w);
    if (first.input_order) {
      auto* order = reinterpret_cast<int32_t*>(data + at.input_order);
      stream_.copy_on_device(order, staged.front().input_order, static_cast<size_t>(first.K) * sizeof(int32_t));
      m.input_order = order;
    }
    to_fragments(stream_, pointers.data(), n, row_map, m.fragments);
    return m;
  }

  std::vector<DeviceMatrix> qkv(const LayerWeights& l) {
    const std::pair<const Weight*, const Weight*> all[] = {{&l.wq, &l.bq}, {&l.wk, &l.bk}, {&l.wv, &l.bv}};
    std::vector<DeviceMatrix> made;
    size_t part = 0;
    int row = 0;
    for (const Stack& stack : qkv_stacks(l)) {
      made.push_back(matrix(stack));
      made.back().first_row = row;
      row += made.back().fragments.rows;
      Stack biases;
      for (size_t i = 0; i < stack.size(); i++) biases.push_back(all[part++].second);
      made.back().bias = bias(stack, biases);
    }
    return made;
  }

  std::vector<DeviceMatrix> gate_up(const LayerWeights& l) {
    std::vector<DeviceMatrix> made;
    const std::vector<Stack> stacks = gate_up_stacks(l);
    for (const Stack& stack : stacks) {
      made.push_back(matrix(stack, stacks.size() == 1 ? turns_of(l.w_gate.N) : nullptr));
      made.back().first_row = made.size() > 1 ? l.w_gate.N : 0;
    }
    return made;
  }

  const float* vector(const Weight& w) {
    auto* const to = reinterpret_cast<float*>(next_vector_);
    copy_vector(to, w);
    next_vector_ += vector_bytes(w.N);
    return to;
  }

 private:
  // The weight with pointers to its copy on the device.
  Weight stage(const Weight& w, size_t offset) {
    uint8_t* const to = staging_.as<uint8_t>() + offset;
    stream_.copy_to_device(to, w.codes, static_cast<size_t>(w.payload_bytes));
    Weight copy = w;
    copy.codes = to;
    if (w.scales) copy.scales = to + (w.scales - w.codes);
    if (w.offsets) copy.offsets = to + (w.offsets - w.codes);
    if (w.input_order) {
      copy.input_order =
          reinterpret_cast<const int32_t*>(to + (reinterpret_cast<const uint8_t*>(w.input_order) - w.codes));
    }
    return copy;
  }

  // The biases of a stack, zeros where one of them is not there; null where none is.
  const float* bias(const Stack& stack, const Stack& biases) {
    if (std::all_of(biases.begin(), biases.end(), [](const Weight* b) { return b->N == 0; })) return nullptr;
    auto* const to = reinterpret_cast<float*>(next_vector_);
    int row = 0;
    for (size_t i = 0; i < stack.size(); i++) {
      if (biases[i]->N > 0) copy_vector(to + row, *biases[i]);
      row += stack[i]->N;
    }
    next_vector_ += vector_bytes(row);
    return to;
  }

  void copy_vector(float* to, const Weight& w) {
    stream_.copy_to_device(to, w.vector(), static_cast<size_t>(w.N) * sizeof(float));
  }

  // Eight rows of gate, eight of up, in turns.
  const int32_t* turns_of(int hidden_dim) {
    if (!turns_.empty()) return turns_on_device_.as<int32_t>();
    for (int first = 0; first < hidden_dim; first += 8) {
      for (int r = 0; r < 16; r++) {
        const int row = first + r % 8;
        turns_.push_back(row >= hidden_dim ? -1 : r < 8 ? row : hidden_dim + row);
      }
    }
    turns_on_device_ = Memory(turns_.size() * sizeof(int32_t), "rows of gate and up");
    stream_.copy_to_device(turns_on_device_.data(), turns_.data(), turns_on_device_.bytes());
    return turns_on_device_.as<int32_t>();
  }

  Stream& stream_;
  Memory staging_;
  uint8_t* next_vector_;
  std::vector<int32_t> turns_;
  Memory turns_on_device_;
};

}  // namespace

WeightSizes weight_sizes(const Config& config, const ModelWeights& weights) {
  WeightSizes sizes;
  const auto count = [&](const Total& total) {
    sizes.staging = std::max(sizes.staging, total.staging);
    return total.bytes;
  };
  for (const LayerWeights& l : weights.layers) {
    const size_t bytes = count(layer_total(config, l));
    sizes.layers += bytes;
    sizes.largest_layer = std::max(sizes.largest_layer, bytes);
  }
  if (weights.tok_embeddings.N > 0) {
    Total total;
    total.add({&weights.tok_embeddings});
    sizes.embedding = count(total);
  }
  size_t shared = 0;
  if (weights.norm.N > 0) {
    Total total;
    total.add({&weights.output});
    sizes.head = count(total) + vector_bytes(config.dim);
    if (tied(weights)) shared = total.bytes;
  }
  sizes.all = sizes.embedding + sizes.layers + sizes.head - shared;
  return sizes;
}

bool gate_up_apart(const LayerWeights& layer) { return gate_up_stacks(layer).size() > 1; }

DeviceWeights::DeviceWeights(Stream& stream, const Config& c, const ModelWeights& weights) {
  size_t vectors = vector_bytes(c.dim);
  for (const LayerWeights& l : weights.layers) vectors += layer_vectors(c, l);
  vectors_ = Memory(vectors, "norms and biases");
  Upload upload(stream, weight_sizes(c, weights).staging, vectors_);
  tied_ = tied(weights);
  if (weights.tok_embeddings.N > 0) embedding_ = upload.matrix({&weights.tok_embeddings});
  if (weights.norm.N > 0) {
    norm_ = upload.vector(weights.norm);
    if (!tied_) output_ = upload.matrix({&weights.output});
  }
  for (const LayerWeights& l : weights.layers) {
    DeviceLayer made;
    made.attn_norm = upload.vector(l.attn_norm);
    made.mlp_norm = upload.vector(l.mlp_norm);
    if (l.q_norm.N) made.q_norm = upload.vector(l.q_norm);
    if (l.k_norm.N) made.k_norm = upload.vector(l.k_norm);
    made.qkv = upload.qkv(l);
    made.wo = upload.matrix({&l.wo});
    made.gate_up = upload.gate_up(l);
    made.w_down = upload.matrix({&l.w_down});
    layers_.push_back(std::move(made));
  }
  stream.wait();
}

}  // namespace cuda
}  // namespace pyllama
