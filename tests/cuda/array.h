// Arrays of the tests on the emulated device: made as copies of host memory, and copied back.
#pragma once

#include <cstddef>

#include "cuda/runtime.h"

namespace pyllama::cuda::tests {

template <class T>
struct Array {
  Array(Stream& stream, const T* from, size_t n) : bytes(n * sizeof(T)), memory(bytes ? bytes : 1, "test") {
    if (bytes) stream.copy_to_device(memory.data(), from, bytes);
  }
  // Where `to` is what the array was made of, the stream must have been waited for.
  void back(Stream& stream, T* to) const { stream.copy_to_host(to, memory.data(), bytes); }
  T* data() const { return memory.template as<T>(); }

  size_t bytes;
  Memory memory;
};

}  // namespace pyllama::cuda::tests
