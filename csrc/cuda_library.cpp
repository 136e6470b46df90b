#include "cuda_library.h"

#include <dlfcn.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <system_error>

#include "error.h"

namespace pyllama {
namespace {

constexpr const char* kFileName = "libpyllama_cuda.so";
constexpr const char* kVariable = "PYLLAMA_CUDA_LIBRARY";

std::string wished_path() {
  const char* wish = std::getenv(kVariable);
  return wish ? wish : "";
}

const char* last_dl_error() {
  const char* text = dlerror();
  return text ? text : "no reason given";
}

// The table of a library, checked; nothing of it is called before.
const PyllamaCudaTable& find_table(void* handle, const std::string& path) {
  using Entry = const PyllamaCudaTable* (*)();
  const auto entry = reinterpret_cast<Entry>(dlsym(handle, PYLLAMA_CUDA_SYMBOL));
  check<DeviceError>(entry != nullptr, path, ": has no function ", PYLLAMA_CUDA_SYMBOL,
                     ", so it is no CUDA library of pyllama; unset ", kVariable, " or reinstall pyllama");
  const PyllamaCudaTable* table = entry();
  check<DeviceError>(table != nullptr, path, ": gave no table of functions; reinstall pyllama");
  check<DeviceError>(table->version == kPyllamaCudaVersion, path, ": its table of functions has version ",
                     table->version, ", this pyllama expects ", int{kPyllamaCudaVersion},
                     "; the two come from different builds, reinstall pyllama");
  const int expected_bytes = sizeof(PyllamaCudaTable);
  check<DeviceError>(table->size_bytes >= expected_bytes, path, ": its table of functions has ", table->size_bytes,
                     " bytes, this pyllama expects ", expected_bytes,
                     " or more; the library is older than the extension, reinstall pyllama");
  return *table;
}

// Not to be found is the usual case, so it says what to do; everything else is the system's or the loader's own text.
void* open_file(const std::string& path) {
  const int trouble = access(path.c_str(), R_OK) == 0 ? 0 : errno;
  const bool missing = trouble == ENOENT || trouble == ENOTDIR, wished = path == wished_path();
  check<DeviceError>(!missing, path, ": no such file",
                     wished ? message("; ", kVariable, " names it")
                            : ": this pyllama was built without CUDA. Install it again where nvcc is found, or with "
                              "PYLLAMA_CUDA=ON to be told why that fails");
  check<DeviceError>(trouble == 0, path, ": cannot be read: ", std::generic_category().message(trouble));
  // A name without a slash would be looked for in the system's folders. LOCAL: several copies of CUDA's runtime may
  // live in a process, such as another package's, and must not see each other.
  const std::string name = path.find('/') == std::string::npos ? "./" + path : path;
  void* handle = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
  check<DeviceError>(handle != nullptr, path, ": cannot be loaded: ", last_dl_error());
  return handle;
}

std::string version_text(int version) { return message(version / 1000, ".", version % 1000 / 10); }

}  // namespace

std::string cuda_library_path() {
  const std::string wish = wished_path();
  if (!wish.empty()) return wish;
  Dl_info here{};
  const bool found = dladdr(reinterpret_cast<void*>(&cuda_library_path), &here) != 0 && here.dli_fname != nullptr;
  check<DeviceError>(found, "the folder of pyllama's extension is unknown; set ", kVariable);
  const std::string extension = here.dli_fname;
  const size_t slash = extension.rfind('/');
  return slash == std::string::npos ? kFileName : extension.substr(0, slash + 1) + kFileName;
}

const CudaLibrary& CudaLibrary::open(const std::string& path) {
  static std::mutex mutex;
  static std::map<std::string, std::unique_ptr<CudaLibrary>> opened;
  const std::lock_guard<std::mutex> lock(mutex);
  std::unique_ptr<CudaLibrary>& library = opened[path];
  if (!library) {
    void* handle = open_file(path);
    try {
      library.reset(new CudaLibrary(path, find_table(handle, path)));
    } catch (...) {
      dlclose(handle);
      throw;
    }
  }
  return *library;
}

// What a user can do something about is said here, once for all libraries; the rest is the library's own text.
void CudaLibrary::check_result(int kind) const {
  if (kind == kPyllamaCudaOk) return;
  const char* last = table_.last_error();
  const std::string text = last ? last : "no reason given";
  PyllamaCudaBuild built{0, 0, "?"};
  int32_t runs = 0;
  table_.build(
      &built);  // these two are only words of a message: should they fail as well, the reason stays the first one
  table_.driver(&runs);
  switch (kind) {
    case kPyllamaCudaNoDriver:
      throw DeviceError(message("no NVIDIA driver was found (", text, ")"));
    case kPyllamaCudaDriverTooOld:
      throw DeviceError(message("the NVIDIA driver is too old: it runs CUDA ", version_text(runs),
                                ", pyllama's CUDA library was built with ", version_text(built.toolkit),
                                "; update the driver, or build pyllama with an older toolkit"));
    case kPyllamaCudaNoDevice:
      throw DeviceError(
          message("a driver, but no NVIDIA device was found (", text, "); see nvidia-smi and CUDA_VISIBLE_DEVICES"));
    case kPyllamaCudaArchitectureNotBuilt:
      throw DeviceError(message("pyllama's CUDA library has code for ", built.architectures,
                                ", which this device does not run (", text,
                                "); install pyllama again on this machine, or with PYLLAMA_CUDA_ARCHS=all"));
    case kPyllamaCudaOutOfMemory:
      throw DeviceError(message("out of memory on the device: ", text));
    case kPyllamaCudaBadArgument:
      throw std::invalid_argument(text);
    default:
      throw DeviceError(message("CUDA failed: ", text));
  }
}

PyllamaCudaBuild CudaLibrary::build() const {
  PyllamaCudaBuild build{};
  check_result(table_.build(&build));
  return build;
}

int CudaLibrary::driver() const {
  int32_t version = 0;
  check_result(table_.driver(&version));
  return version;
}

int CudaLibrary::device_count() const {
  int32_t count = 0;
  check_result(table_.device_count(&count));
  return count;
}

PyllamaCudaDevice CudaLibrary::device(int index) const {
  PyllamaCudaDevice device{};
  check_result(table_.device(index, &device));
  return device;
}

double CudaLibrary::read_bandwidth(int index, int64_t bytes, int repeats) const {
  double seconds = 0;
  check_result(table_.read_bandwidth(index, bytes, repeats, &seconds));
  return seconds;
}

}  // namespace pyllama
