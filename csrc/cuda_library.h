// The extension's side of libpyllama_cuda.so: opens it when somebody asks for CUDA, never at import, checks that both
// speak the same table (cuda/api.h), and turns its error codes into DeviceError. Knows no CUDA header and links nothing
// of CUDA. A library that was opened stays open: its runtime cannot be unloaded safely.
#pragma once

#include <cstdint>
#include <string>

#include "cuda/api.h"

namespace pyllama {

// PYLLAMA_CUDA_LIBRARY if it is set, else libpyllama_cuda.so in the folder of the extension itself.
std::string cuda_library_path();

class CudaLibrary {
 public:
  // Throws DeviceError: the library was not built, cannot be loaded, or has another table. One object per path and
  // process.
  static const CudaLibrary& open(const std::string& path);

  // Each throws DeviceError with the library's own reason, std::invalid_argument for an impossible argument.
  PyllamaCudaBuild build() const;
  int driver() const;        // 13000: the newest CUDA that the driver runs
  int device_count() const;  // at least 1
  PyllamaCudaDevice device(int index) const;
  double read_bandwidth(int index, int64_t bytes, int repeats) const;  // seconds of the fastest pass

  // For models (cuda_backend.h): a function's result is to go through check_result, which throws as those above do.
  const PyllamaCudaTable& table() const { return table_; }
  void check_result(int kind) const;

 private:
  CudaLibrary(const std::string& path, const PyllamaCudaTable& table) : path_(path), table_(table) {}

  std::string path_;
  const PyllamaCudaTable& table_;
};

}  // namespace pyllama
