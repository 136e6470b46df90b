// Errors of the C++ side. Everything throws; nothing aborts. The bindings turn FormatError into
// pyllama.ModelFormatError, ContextError into pyllama.ContextLengthError, DeviceError into pyllama.DeviceError,
// Interrupted into whatever Python exception is pending, std::invalid_argument into ValueError, std::system_error into
// OSError.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace pyllama {

// A model that does not hold together: wrong shape, missing tensor, impossible number.
struct FormatError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// More tokens than the model's context holds.
struct ContextError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A device that was asked for and cannot be had.
struct DeviceError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The caller asked a running step to stop (Ctrl-C).
struct Interrupted : std::runtime_error {
  Interrupted() : std::runtime_error("interrupted") {}
};

template <class... Args>
std::string message(const Args&... args) {
  std::ostringstream out;
  (out << ... << args);
  return out.str();
}

// Throws E (default FormatError) with the streamed message when `ok` is false.
template <class E = FormatError, class... Args>
inline void check(bool ok, const Args&... args) {
  if (!ok) throw E(message(args...));
}

}  // namespace pyllama
