// What the files bindings*.cpp share: the Python-owned weight. Only they include pybind11.
#pragma once

#include <pybind11/pybind11.h>

#include "tensor.h"

namespace pyllama {

// A Weight over a Python buffer, which it keeps alive. Exposed as pyllama._C.Weight.
struct PyWeight {
  Weight weight;
  std::vector<int64_t> shape;
  pybind11::object owner;  // whatever exported the buffer
};

void bind_ops(pybind11::module_& module);  // bindings_ops.cpp: the submodule `ops`
void bind_cuda(pybind11::module_ module);  // bindings_cuda.cpp: the submodule `cuda`

}  // namespace pyllama
