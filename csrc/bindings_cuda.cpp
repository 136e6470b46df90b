// pyllama._C.cuda: what the CUDA library says about itself and the machine. Each call names the library's path, so that
// nothing is opened before somebody asks, and opens it if need be.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "bindings.h"
#include "cuda_backend.h"
#include "cuda_library.h"
#include "model/model.h"

namespace py = pybind11;

namespace pyllama {
namespace {

// Opening may start the driver, which takes long: other threads go on meanwhile.
template <class F>
auto with_library(const std::string& path, const F& ask) {
  const py::gil_scoped_release release;
  return ask(CudaLibrary::open(path));
}

py::dict build(const std::string& path) {
  const PyllamaCudaBuild found = with_library(path, [](const CudaLibrary& library) { return library.build(); });
  py::dict record;
  record["toolkit"] = found.toolkit;
  record["emulated"] = found.emulated != 0;
  record["architectures"] = found.architectures;
  return record;
}

int driver(const std::string& path) {
  return with_library(path, [](const CudaLibrary& library) { return library.driver(); });
}

py::list devices(const std::string& path) {
  const std::vector<PyllamaCudaDevice> found = with_library(path, [](const CudaLibrary& library) {
    std::vector<PyllamaCudaDevice> all;
    const int count = library.device_count();
    for (int i = 0; i < count; ++i) all.push_back(library.device(i));
    return all;
  });
  py::list list;
  for (const PyllamaCudaDevice& device : found) {
    py::dict record;
    record["name"] = std::string(device.name);
    record["compute_capability"] = py::make_tuple(device.major, device.minor);
    record["multiprocessors"] = device.multiprocessors;
    record["l2_bytes"] = device.l2_bytes;
    record["shared_bytes"] = device.shared_bytes;
    record["memory_bytes"] = device.memory_bytes;
    record["free_bytes"] = device.free_bytes;
    list.append(record);
  }
  return list;
}

double read_bandwidth(const std::string& path, int device, int64_t n_bytes, int repeats) {
  const double seconds =
      with_library(path, [&](const CudaLibrary& library) { return library.read_bandwidth(device, n_bytes, repeats); });
  return static_cast<double>(n_bytes) / seconds / 1e9;
}

py::dict model_sizes(const py::dict& config, const py::dict& weights, int max_batch_tok, const std::string& kv_dtype) {
  const Config numbers = read_config(config);
  const ModelWeights model = assemble_weights(numbers, read_weights(weights), config_flag(config, "tied_embeddings"));
  const PyllamaCudaSizes found = cuda_sizes(numbers, model, {0, max_batch_tok, kv_dtype.c_str()});
  py::dict record;
  record["embedding"] = found.embedding;
  record["layers"] = found.layers;
  record["largest_layer"] = found.largest_layer;
  record["head"] = found.head;
  record["weights"] = found.weights;
  record["buffers"] = found.buffers;
  record["staging"] = found.staging;
  record["page"] = found.page;
  return record;
}

}  // namespace

void bind_cuda(py::module_ m) {
  m.doc() = "The CUDA library of this pyllama; every call may raise pyllama.DeviceError.";
  m.def("library_path", &cuda_library_path, "PYLLAMA_CUDA_LIBRARY, else the file beside this extension.");
  m.def("build", &build, py::arg("path"), "How the library was built: toolkit (13000: 13.0), emulated, architectures.");
  m.def("driver", &driver, py::arg("path"), "The newest CUDA that the driver runs, 13000: 13.0.");
  m.def("devices", &devices, py::arg("path"), "Every device: a dict each, sizes in bytes.");
  m.def("read_bandwidth", &read_bandwidth, py::arg("path"), py::arg("device"), py::arg("n_bytes"),
        py::arg("repeats") = 5,
        "Streaming read of n_bytes of a device's memory, GB/s of the fastest of `repeats` passes.");
  m.def("model_sizes", &model_sizes, py::arg("config"), py::arg("weights"), py::kw_only(),
        py::arg("max_batch_tok") = 512, py::arg("kv_dtype") = "f16",
        "What a model takes of a device's memory, in bytes by what for, by the library that would run it.");
}

}  // namespace pyllama
