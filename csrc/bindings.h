// What the files bindings*.cpp share: the Python-owned weight, and how results become Python's. Only they include
// pybind11.
#pragma once

#include <pybind11/pybind11.h>

#include <map>
#include <string>
#include <vector>

#include "config.h"
#include "model/sampler.h"
#include "tensor.h"

namespace pyllama {

// A Weight over a Python buffer, which it keeps alive. Exposed as pyllama._C.Weight.
struct PyWeight {
  Weight weight;
  WeightSpec spec;
  pybind11::object owner;  // whatever exported the buffer
};

// An object that Python has just made, or the error that kept it from it. The library's own types and casts are not
// meant for want of memory: they may leave a null reference, or end the process.
inline pybind11::object owned(PyObject* made) {
  if (made == nullptr) throw pybind11::error_already_set();
  return pybind11::reinterpret_steal<pybind11::object>(made);
}

// What _C.Model takes (bindings.cpp): FormatError for a value that is missing or no number, TypeError for what is no
// Weight. The weights' buffers are kept alive by their objects.
Config read_config(const pybind11::dict& config);
bool config_flag(const pybind11::dict& config, const char* key);
std::map<std::string, Weight> read_weights(const pybind11::dict& weights);

// The StepResults of a call: what was sampled for each item, and its logits or None.
pybind11::object make_results(const std::vector<std::vector<Sampled>>& sampled,
                              const std::vector<pybind11::object>& logits);

void bind_sampler(pybind11::module_& module);   // bindings_sampler.cpp
void bind_sampler_math(pybind11::module_ ops);  // bindings_sampler.cpp: the sampler's arithmetic
void bind_ops(pybind11::module_& module);       // bindings_ops.cpp: the submodule `ops`
void bind_cuda(pybind11::module_ module);       // bindings_cuda.cpp: the submodule `cuda`
void bind_convert(pybind11::module_ module);    // bindings_convert.cpp: the submodule `convert`
void bind_layer(pybind11::module_ convert);     // bindings_layer.cpp: a layer's parts, in the submodule `convert`

}  // namespace pyllama
