// The extension module pyllama._C: the only place, with the other bindings_*.cpp, that knows Python. It turns Python
// objects into the structs of csrc/model, keeps every buffer alive that a weight views, releases the GIL while a step
// runs, and turns C++ exceptions into Python's. It decides nothing about models or kernels.
#include "bindings.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <system_error>
#include <vector>

#include "cpu/cpu.h"
#include "cpu/os.h"
#include "cuda_backend.h"
#include "error.h"
#include "model/forward.h"
#include "split_backend.h"

namespace py = pybind11;

namespace pyllama {
namespace {

// A C++ object of type T out of a Python one; TypeError that says what was expected.
template <class T>
T& expect(const py::handle& object, const char* expected) {
  try {
    return object.cast<T&>();
  } catch (const py::cast_error&) {
    throw py::type_error(message("found ", std::string(py::repr(object)), ", expected ", expected));
  }
}

// ---- weights

PyWeight make_py_weight(const std::string& name, const std::string& format, const std::vector<int64_t>& shape,
                        const py::object& data, int group, const std::string& scale, const std::string& offset,
                        const std::vector<int>& codebook, bool input_order) {
  WeightSpec spec;
  spec.name = name;
  spec.format = format;
  spec.shape = shape;
  spec.group = group;
  spec.scale = scale;
  spec.offset = offset;
  spec.codebook = codebook;
  spec.input_order = input_order;

  // The memoryview keeps the buffer exported, so that its owner can neither resize nor unmap it.
  const py::object view = py::reinterpret_steal<py::object>(PyMemoryView_FromObject(data.ptr()));
  if (!view) throw py::error_already_set();
  const Py_buffer* buffer = PyMemoryView_GET_BUFFER(view.ptr());
  check<std::invalid_argument>(buffer->itemsize == 1 && PyBuffer_IsContiguous(buffer, 'C'), name,
                               ": data must be a contiguous buffer of bytes");
  PyWeight made;
  made.weight = make_weight(spec, static_cast<const uint8_t*>(buffer->buf), buffer->len);
  made.spec = std::move(spec);
  made.owner = view;
  return made;
}

void bind_weight(py::module_& m) {
  py::class_<PyWeight>(m, "Weight", "A tensor as it lies in a model folder: no copy, `data` is kept alive.")
      .def(py::init(&make_py_weight), py::arg("name"), py::arg("format"), py::arg("shape"), py::arg("data"),
           py::kw_only(), py::arg("group") = 0, py::arg("scale") = "f16", py::arg("offset") = "",
           py::arg("codebook") = std::vector<int>{}, py::arg("input_order") = false)
      .def_property_readonly("name", [](const PyWeight& w) { return w.weight.name; })
      .def_property_readonly("format", [](const PyWeight& w) { return std::string(info(w.weight.format).name); })
      .def_property_readonly("shape", [](const PyWeight& w) { return py::tuple(py::cast(w.spec.shape)); })
      .def_property_readonly("group", [](const PyWeight& w) { return w.spec.group; })
      .def_property_readonly("scale", [](const PyWeight& w) { return w.spec.scale; })
      .def_property_readonly("offset", [](const PyWeight& w) { return w.spec.offset; })
      .def_property_readonly("codebook", [](const PyWeight& w) { return py::tuple(py::cast(w.spec.codebook)); })
      .def_property_readonly("input_order", [](const PyWeight& w) { return w.spec.input_order; })
      .def_property_readonly("nbytes", [](const PyWeight& w) { return w.weight.payload_bytes; })
      .def("__repr__", [](const PyWeight& w) {
        return message("<Weight ", w.weight.name, " ", info(w.weight.format).name, " ", w.weight.payload_bytes,
                       " bytes>");
      });
}

// ---- sequence

void bind_sequence(py::module_& m) {
  py::class_<Sequence>(m, "Sequence", "Tokens of one text and the pages of its key/value cache.")
      .def_property_readonly("n_past", &Sequence::n_past)
      .def_property_readonly("tokens", &Sequence::tokens)
      .def_property("prompt_len", &Sequence::prompt_len, &Sequence::set_prompt_len)
      .def("truncate", &Sequence::truncate, py::arg("n"))
      .def("fork", &Sequence::fork, py::arg("n"), "A new sequence with the first n tokens, in the same pages.")
      .def("close", &Sequence::close);
}

// ---- model

template <class T>
T config_value(const py::dict& config, const char* key, const char* expected) {
  check(config.contains(key), "config: ", key, " is missing, expected ", expected);
  try {
    return config[key].cast<T>();
  } catch (const py::cast_error&) {
    throw FormatError(message("config: ", key, " is ", std::string(py::repr(config[key])), ", expected ", expected));
  }
}

}  // namespace

namespace {

// Whether a key that may be absent or null says something.
bool config_says(const py::dict& config, const char* key) { return config.contains(key) && !config[key].is_none(); }

// [n_layers] how many keys a token sees, or nothing where all layers see all; n_layers is checked already.
std::vector<int> read_windows(const py::dict& dict, int n_layers) {
  if (!config_says(dict, "sliding_window")) return {};
  const int window = config_value<int>(dict, "sliding_window", "an integer or null");
  check(window >= 1, "config: sliding_window is ", window, ", expected at least 1, or null");
  std::vector<int> windows(static_cast<size_t>(n_layers), std::min(window, kAllKeys));
  if (!config_says(dict, "sliding_layers")) return windows;
  std::fill(windows.begin(), windows.end(), kAllKeys);
  for (const int layer : config_value<std::vector<int>>(dict, "sliding_layers", "a list of layer numbers")) {
    check(layer >= 0 && layer < n_layers, "config: sliding_layers holds ", layer, ", expected 0…", n_layers - 1);
    windows[static_cast<size_t>(layer)] = std::min(window, kAllKeys);
  }
  return windows;
}

}  // namespace

bool config_flag(const py::dict& config, const char* key) {
  const auto value = config_value<py::object>(config, key, "true or false");
  check(py::isinstance<py::bool_>(value), "config: ", key, " is ", std::string(py::repr(value)),
        ", expected true or false");
  return value.cast<bool>();
}

Config read_config(const py::dict& dict) {
  const auto count = [&](const char* key) { return config_value<int>(dict, key, "an integer"); };
  Config c;
  c.dim = count("dim");
  c.hidden_dim = count("hidden_dim");
  c.n_layers = count("n_layers");
  c.n_heads = count("n_heads");
  c.n_kv_heads = count("n_kv_heads");
  c.head_dim = count("head_dim");
  c.vocab_size = count("vocab_size");
  c.max_seq_len = count("max_seq_len");
  c.norm_eps = config_value<float>(dict, "norm_eps", "a number");
  c.rope_inv_freq = config_value<std::vector<float>>(dict, "rope_inv_freq", "numbers [head_dim/2]");
  c.rope_attention_factor = config_value<float>(dict, "rope_attention_factor", "a number");
  const auto scale = [&](const char* key, float otherwise) {
    return config_says(dict, key) ? config_value<float>(dict, key, "a number") : otherwise;
  };
  c.embedding_scale = scale("embedding_scale", 1.0f);
  c.attention_scale = scale("attention_scale", default_attention_scale(c.head_dim));
  check_config(c);
  c.windows = read_windows(dict, c.n_layers);
  return c;
}

std::map<std::string, Weight> read_weights(const py::dict& weights) {
  std::map<std::string, Weight> tensors;
  for (const auto& [name, weight] : weights) tensors[py::str(name)] = expect<PyWeight>(weight, "a Weight").weight;
  return tensors;
}

namespace {

struct PyModel {
  explicit PyModel(const std::string& wanted_isa) : isa(choose_isa(wanted_isa)), sampler(cpu_vocab_kernels(isa)) {}

  std::vector<py::object> weights;  // whose buffers the model views; outlives `model`
  int threads = 0;
  std::string isa;
  std::unique_ptr<Model> model;
  std::timed_mutex mutex;            // held by a running step, always taken without the GIL
  Sampler sampler;                   // guarded by mutex
  std::atomic<bool> hurried{false};  // a call of several steps is to end after the one it is in
};

// A Python integer of any size as one of ours.
int integer_within(const char* name, const py::object& value, int low, int high, const char* expected) {
  const py::object index = owned(PyNumber_Index(value.ptr()));
  int overflow = 0;
  const long long found = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
  check<std::invalid_argument>(overflow == 0 && found >= low && found <= high, name, " is ",
                               std::string(py::str(value)), ", expected ", expected);
  return static_cast<int>(found);
}

// The index in "cuda" or "cuda:1".
int cuda_index(const std::string& device) {
  const std::string rest = device.rfind("cuda:", 0) == 0 ? device.substr(5) : device == "cuda" ? "0" : "";
  const bool number = !rest.empty() && rest.size() < 5 && rest.find_first_not_of("0123456789") == std::string::npos;
  check<std::invalid_argument>(number, "device is \"", device, "\", expected \"\" (the CPU), \"cuda\" or \"cuda:1\"");
  return std::stoi(rest);
}

BackendFactory cpu_factory(const CpuOptions& options) {
  return [options](const Config& c, const ModelWeights& w) { return make_cpu_backend(c, w, options); };
}

// What makes backends on a device by its name. "cpu" stands in for a device in tests of split models.
BackendFactory device_factory(const std::string& device, const CpuOptions& options) {
  if (device == "cpu") return cpu_factory(options);
  const CudaOptions cuda{cuda_index(device), options.max_batch_tok, options.kv_dtype};
  return [cuda](const Config& c, const ModelWeights& w) { return make_cuda_backend(c, w, cuda); };
}

// All layers on the CPU, or the last `gpu_layers` (-1: all) and the head on a device.
BackendFactory choose_factory(const std::string& device, int gpu_layers, int n_layers, const CpuOptions& options) {
  check<std::invalid_argument>(!device.empty() || gpu_layers < 0, "gpu_layers without a device to put them on");
  check<std::invalid_argument>(gpu_layers <= n_layers, "gpu_layers is ", gpu_layers, ", the model has ", n_layers,
                               " layers");
  if (device.empty()) return cpu_factory(options);
  const BackendFactory on_device = device_factory(device, options);
  if (gpu_layers < 0 || gpu_layers == n_layers) return on_device;
  if (gpu_layers == 0) return cpu_factory(options);
  return [=](const Config& c, const ModelWeights& w) {
    return make_split_backend(c, w, n_layers - gpu_layers, cpu_factory(options), on_device);
  };
}

std::unique_ptr<PyModel> make_py_model(const py::dict& config, const py::dict& weights, const py::object& n_threads,
                                       const std::string& isa, const py::object& batch_tok, const std::string& kv_dtype,
                                       const std::string& device, const py::object& n_gpu_layers) {
  const int threads = integer_within("threads", n_threads, 0, 1024, "0 (automatic) to 1024");
  const int max_batch_tok = integer_within("max_batch_tok", batch_tok, 1, 65536, "1…65536");
  const int gpu_layers = integer_within("gpu_layers", n_gpu_layers, -1, 1 << 26, "-1 (all) or a number of layers");
  auto self = std::make_unique<PyModel>(isa);
  self->threads = threads > 0 ? threads : default_threads();

  const std::map<std::string, Weight> tensors = read_weights(weights);
  for (const auto& [name, weight] : weights) self->weights.push_back(py::reinterpret_borrow<py::object>(weight));
  const bool tied = config_flag(config, "tied_embeddings");
  CpuOptions options;
  options.threads = self->threads;
  options.isa = self->isa.c_str();
  options.kv_dtype = kv_dtype.c_str();
  options.max_batch_tok = max_batch_tok;
  Config numbers = read_config(config);
  const BackendFactory make = choose_factory(device, gpu_layers, numbers.n_layers, options);
  const py::gil_scoped_release no_gil;  // bringing weights to a device takes long
  self->model = std::make_unique<Model>(std::move(numbers), tensors, tied, make);
  return self;
}

// Token ids from a list or an integer array, without silent truncation of floats or of large integers.
std::vector<int32_t> read_tokens(const py::handle& tokens) {
  // Decoding: without numpy, which is slow.
  if (PyList_CheckExact(tokens.ptr()) && PyList_GET_SIZE(tokens.ptr()) == 1 &&
      PyLong_CheckExact(PyList_GET_ITEM(tokens.ptr(), 0))) {
    const long id = PyLong_AsLong(PyList_GET_ITEM(tokens.ptr(), 0));
    if (id >= 0 && id <= std::numeric_limits<int32_t>::max()) return {static_cast<int32_t>(id)};
    PyErr_Clear();  // told below
  }
  if (py::isinstance<py::array_t<int32_t, py::array::c_style>>(tokens)) {
    const auto ids = py::reinterpret_borrow<py::array_t<int32_t, py::array::c_style>>(tokens);
    if (ids.ndim() == 1) return {ids.data(), ids.data() + ids.size()};
  }
  const py::array any = py::array::ensure(tokens);
  if (!any) throw py::error_already_set();
  check<std::invalid_argument>(any.ndim() == 1, "token ids must be a list or a one-dimensional array");
  if (any.size() == 0) return {};
  const char kind = any.dtype().kind();
  check<std::invalid_argument>(kind == 'i' || kind == 'u', "token ids must be integers, found ",
                               std::string(py::str(any.dtype())));
  const py::array_t<int64_t, py::array::c_style | py::array::forcecast> wide(any);
  std::vector<int32_t> ids;
  ids.reserve(static_cast<size_t>(wide.size()));
  for (py::ssize_t i = 0; i < wide.size(); ++i) {
    const int64_t id = wide.at(i);
    check<std::invalid_argument>(id >= 0 && id <= std::numeric_limits<int32_t>::max(), "token ", id,
                                 " is no token of the vocabulary");
    ids.push_back(static_cast<int32_t>(id));
  }
  return ids;
}

LogitsWanted read_wanted(const std::string& text) {
  if (text == "none") return LogitsWanted::none;
  if (text == "last") return LogitsWanted::last;
  if (text == "all") return LogitsWanted::all;
  throw std::invalid_argument(message("logits: \"", text, "\", expected none, last or all"));
}

int read_count(const py::handle& count) {
  try {
    return count.cast<int>();
  } catch (const py::cast_error&) {
    throw py::type_error(message("n_draft is ", std::string(py::repr(count)), ", expected a small integer"));
  }
}

// A batch as it came from Python, with references to everything the step uses while the GIL is released.
struct PyBatch {
  std::vector<StepItem> items;
  std::vector<py::object> logits;
  std::vector<py::object> keep;
};

PyBatch read_batch(const py::iterable& batch) {
  PyBatch out;
  for (const py::handle entry : batch) {
    const py::tuple fields = py::reinterpret_borrow<py::object>(entry);
    check<std::invalid_argument>(fields.size() == 4 || fields.size() == 5, "a batch item has ", fields.size(),
                                 " fields, expected (sequence, tokens, sampler or None, logits[, n_draft])");
    StepItem item;
    item.sequence = &expect<Sequence>(fields[0], "a Sequence");
    item.tokens = read_tokens(fields[1]);
    item.sampler = fields[2].is_none() ? nullptr : &expect<SamplerParams>(fields[2], "a Sampler or None");
    item.wanted = read_wanted(py::str(fields[3]));
    if (fields.size() == 5) item.n_draft = read_count(fields[4]);
    out.items.push_back(std::move(item));
    out.keep.push_back(fields);
  }
  return out;
}

void allocate_logits(PyBatch& batch, int vocab_size) {
  for (StepItem& item : batch.items) {
    if (item.wanted == LogitsWanted::none) {
      batch.logits.push_back(py::none());
      continue;
    }
    py::array_t<float> rows({static_cast<py::ssize_t>(item.n_logit_rows()), static_cast<py::ssize_t>(vocab_size)});
    item.logits_out = rows.mutable_data();
    batch.logits.push_back(std::move(rows));
  }
}

// Ctrl-C, looked for at most every 50 ms, so that a decoding step never waits for the GIL.
class InterruptPoll {
 public:
  void operator()() {
    const auto now = std::chrono::steady_clock::now();
    if (now - last_ < kInterval) return;
    last_ = now;
    const py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw Interrupted();  // the Python exception stays pending in this thread
  }
  static constexpr auto kInterval = std::chrono::milliseconds(50);

 private:
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

// run(poll) without the GIL and with the model for itself. Ctrl-C, which poll() looks for, becomes Python's exception;
// it also ends the wait for another thread's step.
template <class Run>
auto alone_without_gil(PyModel& self, const Run& run) {
  try {
    const py::gil_scoped_release no_gil;
    InterruptPoll poll;
    while (!self.mutex.try_lock_for(InterruptPoll::kInterval)) poll();
    const std::lock_guard<std::timed_mutex> lock(self.mutex, std::adopt_lock);
    return run(poll);
  } catch (const Interrupted&) {  // here the GIL is held again
    throw py::error_already_set();
  }
}

// No garbage collection meanwhile: it may call Python, where a Ctrl-C that came during the step would be raised and
// lost, as exceptions in a collector's callbacks and finalizers are.
class CollectLater {
 public:
  CollectLater() : was_enabled_(PyGC_Disable() != 0) {}
  ~CollectLater() {
    if (was_enabled_) PyGC_Enable();
  }
  CollectLater(const CollectLater&) = delete;
  CollectLater& operator=(const CollectLater&) = delete;

 private:
  const bool was_enabled_;
};

py::object step(PyModel& self, const py::iterable& batch, int n_more) {
  PyBatch read = read_batch(batch);
  check_batch(*self.model, read.items);  // before memory for logits is taken
  allocate_logits(read, self.model->config().vocab_size);
  std::vector<std::pair<Sequence*, int>> before;
  for (const StepItem& item : read.items) before.emplace_back(item.sequence, item.sequence->n_past());
  const std::vector<std::vector<Sampled>> sampled = alone_without_gil(self, [&](InterruptPoll& poll) {
    auto found = run_steps(
        *self.model, self.sampler, std::move(read.items), n_more, [&poll] { poll(); },
        [&self] { return self.hurried.load(); });
    self.hurried = false;  // the caller now sees what there was to hurry for
    return found;
  });
  const CollectLater collect_later;
  try {
    return make_results(sampled, read.logits);
  } catch (...) {  // no memory: what nobody will hear of has not happened
    for (const auto& [sequence, n_past] : before) sequence->truncate(n_past);
    throw;
  }
}

std::map<std::string, double> profile(PyModel& self, bool on) {
  const StepTimes found = alone_without_gil(self, [&](InterruptPoll&) { return self.model->backend().profile(on); });
  return {{"products", found.products}, {"attention", found.attention}, {"head", found.head}, {"rest", found.rest}};
}

void bind_model(py::module_& m) {
  py::class_<PyModel> model(m, "Model", "Weights and a backend: immutable, shared by all sequences.");
  model.attr("PAGE_TOK") = kPageTok;
  model
      .def(py::init(&make_py_model), py::arg("config"), py::arg("weights"), py::kw_only(), py::arg("threads") = 0,
           py::arg("isa") = "", py::arg("max_batch_tok") = 512, py::arg("kv_dtype") = "f16", py::arg("device") = "",
           py::arg("gpu_layers") = -1)
      .def_readonly("threads", &PyModel::threads)
      .def_readonly("isa", &PyModel::isa)
      .def_property_readonly("backend", [](const PyModel& self) { return self.model->backend().name(); })
      .def_property_readonly("max_batch_tok", [](const PyModel& self) { return self.model->backend().max_batch_tok(); })
      .def_property_readonly("page_bytes", [](const PyModel& self) { return self.model->backend().page_bytes(); })
      .def_property_readonly("pages_in_use", [](const PyModel& self) { return self.model->pool().pages_in_use(); })
      .def(
          "pages_of",
          [](const PyModel& self, const std::vector<const Sequence*>& sequences) {
            return self.model->pool().pages_of(sequences);
          },
          py::arg("sequences"), "How many pages these hold, each counted once.")
      .def("sequence", [](const PyModel& self) { return self.model->new_sequence(); })
      .def("step", &step, py::arg("batch"), py::arg("n_more") = 0,
           "Runs the tokens of every item through the model in one pass, and then up to n_more sampled ones.")
      .def(
          "hurry", [](PyModel& self) { self.hurried = true; },
          "A call of several steps, running or about to, ends after the step it is in.")
      .def("profile", &profile, py::arg("on"),
           "Times steps from now on, or no more; seconds by kind of work since the last call.");
}

// ---- the rest

py::list format_table() {
  py::list table;
  for (const FormatInfo& row : kFormats) {
    py::dict entry;
    entry["name"] = std::string(row.name);
    entry["code_bits"] = row.code_bits;
    entry["quantized"] = row.quantized;
    entry["has_offset"] = row.has_offset;
    entry["has_codebook"] = row.has_codebook;
    entry["code_bias"] = row.code_bias;
    table.append(entry);
  }
  return table;
}

void bind_machine(py::module_& m) {
  m.def("isas", &cpu_isas, "Instruction sets that this machine runs and this build has, best first.");
  m.def("all_isas", &cpu_all_isas, "Instruction sets that this build has, best first.");
  m.def("format_table", &format_table, "The rows of csrc/formats.h.");
  m.def("default_threads", &default_threads, "Physical cores that affinity and the cgroup's quota allow.");
  m.def(
      "read_bandwidth",
      [](int threads, double seconds, const std::vector<const PyWeight*>& weights) {
        std::vector<Region> regions;
        for (const PyWeight* w : weights) {
          if (!w) throw py::type_error("weights: expected a Weight, found None");
          regions.push_back({w->weight.codes, static_cast<size_t>(w->weight.payload_bytes)});
        }
        py::gil_scoped_release release;
        return read_bandwidth(threads, seconds, regions);
      },
      py::arg("threads"), py::arg("seconds"), py::arg("weights") = std::vector<const PyWeight*>(),
      "Streaming read of these weights where they lie, or of a buffer beyond the caches, GB/s.");
  m.def(
      "settle_in_huge_pages",
      [](int fd, const py::array_t<uint8_t, py::array::c_style>& mapped, double seconds) {
        const void* data = mapped.data();
        const auto size_bytes = static_cast<size_t>(mapped.nbytes());
        py::gil_scoped_release release;
        return settle_in_huge_pages(fd, data, size_bytes, seconds);
      },
      py::arg("fd"), py::arg("mapped").noconvert(), py::arg("seconds"),
      "Has a mapped file, as far as it is cached, cached in huge pages; returns how many blocks were brought.");
  m.def("int8_peak", &int8_peak, py::arg("threads"), py::arg("seconds"), py::arg("isa") = "",
        py::call_guard<py::gil_scoped_release>(), "int8 multiply-accumulates from registers, 1e9 operations/s.");
  m.def("build_info",
        [] { return std::map<std::string, std::string>{{"compiler", __VERSION__}, {"version", PYLLAMA_VERSION}}; });
}

void set_python_error(const char* module, const char* type, const std::exception& error) {
  const py::object exception = py::module_::import(module).attr(type);
  PyErr_SetString(exception.ptr(), error.what());
}

void translate(std::exception_ptr pointer) {
  try {
    if (pointer) std::rethrow_exception(pointer);
  } catch (const FormatError& error) {
    set_python_error("pyllama.common.errors", "ModelFormatError", error);
  } catch (const ContextError& error) {
    set_python_error("pyllama.common.errors", "ContextLengthError", error);
  } catch (const DeviceError& error) {
    set_python_error("pyllama.common.errors", "DeviceError", error);
  } catch (const std::system_error& error) {
    set_python_error("builtins", "OSError", error);
  }
}

}  // namespace
}  // namespace pyllama

PYBIND11_MODULE(_C, m) {
  m.doc() = "The engine of pyllama: weights, models, steps.";
  py::register_local_exception_translator(&pyllama::translate);
  pyllama::bind_weight(m);
  pyllama::bind_sampler(m);
  pyllama::bind_sequence(m);
  pyllama::bind_model(m);
  pyllama::bind_machine(m);
  pyllama::bind_ops(m);
  pyllama::bind_cuda(m.def_submodule("cuda"));
  pyllama::bind_sampler_math(m.def_submodule("ops"));
  pyllama::bind_convert(m.def_submodule("convert"));
  pyllama::bind_layer(m.attr("convert").cast<py::module_>());
}
