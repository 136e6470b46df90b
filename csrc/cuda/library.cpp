// The table of api.h, filled: every function of the library is called through here. Exceptions stop here and become a
// kind and a text for this thread. Computes nothing itself: models are model.h's.
#include <algorithm>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "api.h"
#include "model.h"
#include "read_bandwidth.h"
#include "records.h"
#include "runtime.h"

// What the table hands out for a model.
struct PyllamaCudaOpened {
  pyllama::cuda::CudaModel model;
  pyllama::cuda::StepLists lists;  // of the step that runs
};

namespace {

using namespace pyllama;
using namespace pyllama::cuda;

#ifdef PYLLAMA_CUDA_EMULATION
constexpr const char* kArchitectures = "the CPU";
#else
constexpr const char* kArchitectures = PYLLAMA_CUDA_ARCHITECTURES;  // CMakeLists.txt, as given to nvcc
#endif

thread_local std::string last_error;

int fail(int kind, const char* text) noexcept {
  try {
    last_error = text;
  } catch (...) {
    last_error.clear();  // no memory for the words; the kind still tells
  }
  return kind;
}

template <class F>
int guarded(const F& work) noexcept {
  try {
    work();
    return kPyllamaCudaOk;
  } catch (const Error& error) {
    return fail(error.kind, error.what());
  } catch (const std::invalid_argument& error) {
    return fail(kPyllamaCudaBadArgument, error.what());
  } catch (const std::bad_alloc&) {
    return fail(kPyllamaCudaInternal, "out of memory on the host");
  } catch (const std::exception& error) {
    return fail(kPyllamaCudaInternal, error.what());
  } catch (...) {
    return fail(kPyllamaCudaInternal, "an exception that is none of the library's");
  }
}

int build(PyllamaCudaBuild* out) {
  return guarded([&] { *out = {runtime_version(), emulated() ? 1 : 0, kArchitectures}; });
}

int driver(int32_t* version) {
  return guarded([&] { *version = driver_version(); });
}

int count_devices(int32_t* count) {
  return guarded([&] { *count = device_count(); });
}

int describe(int32_t index, PyllamaCudaDevice* out) {
  return guarded([&] {
    const DeviceProperties found = properties(index);
    *out = {};
    memcpy(out->name, found.name.data(), std::min(found.name.size(), sizeof(out->name) - 1));
    out->major = found.major;
    out->minor = found.minor;
    out->multiprocessors = found.multiprocessors;
    out->l2_bytes = static_cast<int32_t>(found.l2_bytes);
    out->shared_bytes = static_cast<int32_t>(found.shared_bytes);
    out->memory_bytes = static_cast<int64_t>(found.memory_bytes);
    out->free_bytes = static_cast<int64_t>(free_bytes(index));
  });
}

int measure_reading(int32_t index, int64_t bytes, int32_t repeats, double* seconds) {
  return guarded([&] { *seconds = read_bandwidth(index, bytes, repeats); });
}

// ---- models

ModelOptions options_of(const PyllamaCudaModel& record) {
  return {record.device, record.max_batch_tok, record.cache_of_bytes ? CacheType::q8 : CacheType::f16};
}

int count_bytes(const PyllamaCudaModel* record, PyllamaCudaSizes* out) {
  return guarded([&] {
    const ModelSizes sizes = model_sizes(config_of(*record), weights_of(*record), options_of(*record));
    const auto number = [](size_t n) { return static_cast<int64_t>(n); };
    const WeightSizes& w = sizes.weights;
    *out = {number(w.embedding), number(w.layers),      number(w.largest_layer), number(w.head),
            number(w.all),       number(sizes.buffers), number(w.staging),       number(sizes.page)};
  });
}

int open_model(const PyllamaCudaModel* record, PyllamaCudaOpened** opened) {
  return guarded([&] {
    *opened = nullptr;
    *opened = new PyllamaCudaOpened{{config_of(*record), weights_of(*record), options_of(*record)}, {}};
  });
}

int close_model(PyllamaCudaOpened* opened) {
  return guarded([&] { delete opened; });
}

int new_page(PyllamaCudaOpened* opened, int32_t* page) {
  return guarded([&] { *page = opened->model.pages().take(); });
}

int free_page(PyllamaCudaOpened* opened, int32_t page) {
  return guarded([&] { opened->model.pages().give_back(page); });
}

int copy_page(PyllamaCudaOpened* opened, int32_t from, int32_t to) {
  return guarded([&] { opened->model.pages().copy(from, to); });
}

int begin(PyllamaCudaOpened* opened, const PyllamaCudaStep* step) {
  return guarded([&] { opened->model.begin(step_of(*step, opened->lists)); });
}

int run(PyllamaCudaOpened* opened, int32_t verb, int32_t layer) {
  return guarded([&] {
    CudaModel& model = opened->model;
    switch (verb) {
      case kPyllamaCudaEmbed:
        return model.embed();
      case kPyllamaCudaAttentionIn:
        return model.attention_in(layer);
      case kPyllamaCudaAttention:
        return model.attention(layer);
      case kPyllamaCudaAttentionOut:
        return model.attention_out(layer);
      case kPyllamaCudaMlpIn:
        return model.mlp_in(layer);
      case kPyllamaCudaMlpOut:
        return model.mlp_out(layer);
      case kPyllamaCudaHead:
        return model.head();
      default:
        throw std::invalid_argument("verb " + std::to_string(verb) + ": expected 0 to 6");
    }
  });
}

int load_x(PyllamaCudaOpened* opened, const float* x) {
  return guarded([&] { opened->model.load_x(x); });
}

int store_x(PyllamaCudaOpened* opened, float* x) {
  return guarded([&] { opened->model.store_x(x); });
}

int logits(PyllamaCudaOpened* opened, const float** out) {
  return guarded([&] { *out = opened->model.logits(); });
}

int drawn(PyllamaCudaOpened* opened, const int32_t** out) {
  return guarded([&] { *out = opened->model.drawn(); });
}

int end(PyllamaCudaOpened* opened) {
  return guarded([&] { opened->model.end(); });
}

int profile(PyllamaCudaOpened* opened, int32_t on, PyllamaCudaTimes* out) {
  return guarded([&] {
    const StepTimes found = opened->model.profile(on != 0);
    *out = {found.products, found.attention, found.head, found.rest};
  });
}

const char* last_text() { return last_error.c_str(); }

const PyllamaCudaTable table = {
    kPyllamaCudaVersion,
    sizeof(PyllamaCudaTable),
    last_text,
    build,
    driver,
    count_devices,
    describe,
    measure_reading,
    count_bytes,
    open_model,
    close_model,
    new_page,
    free_page,
    copy_page,
    begin,
    run,
    load_x,
    store_x,
    logits,
    drawn,
    end,
    profile,
};

}  // namespace

extern "C" __attribute__((visibility("default"))) const PyllamaCudaTable* pyllama_cuda_table(void) { return &table; }
