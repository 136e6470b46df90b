// pyllama._C.Sampler, and what sampling gives back: the records Sample and StepResult. Also the sampler's own
// arithmetic, for tests. What sampling does is csrc/model/sampler.h's.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <initializer_list>
#include <map>
#include <string>
#include <vector>

#include "bindings.h"
#include "cpu/cpu.h"
#include "error.h"
#include "model/portable_math.h"
#include "model/sampler.h"

namespace py = pybind11;

namespace pyllama {
namespace {

uint64_t seed_from(const py::int_& seed) {
  const unsigned long long value = PyLong_AsUnsignedLongLong(seed.ptr());
  if (PyErr_Occurred() != nullptr) {
    PyErr_Clear();
    throw std::invalid_argument(message("seed is ", std::string(py::str(seed)), ", expected 0…2^64 - 1"));
  }
  return value;
}

SamplerParams make_sampler(double temperature, int top_k, double top_p, double min_p, double repetition_penalty,
                           double presence_penalty, double frequency_penalty,
                           const std::map<int32_t, float>& logit_bias, int logprobs, const py::int_& seed,
                           const std::vector<int32_t>& end_ids) {
  SamplerParams params;
  params.temperature = temperature;
  params.top_k = top_k;
  params.top_p = top_p;
  params.min_p = min_p;
  params.repetition_penalty = repetition_penalty;
  params.presence_penalty = presence_penalty;
  params.frequency_penalty = frequency_penalty;
  params.logit_bias.assign(logit_bias.begin(), logit_bias.end());
  params.logprobs = logprobs;
  params.seed = seed_from(seed);
  params.end_ids = end_ids;
  std::sort(params.end_ids.begin(), params.end_ids.end());
  check_sampler(params);
  return params;
}

py::object new_list(size_t size) { return owned(PyList_New(static_cast<Py_ssize_t>(size))); }

void set_item(const py::object& list, size_t i, py::object value) {
  PyList_SET_ITEM(list.ptr(), static_cast<Py_ssize_t>(i), value.release().ptr());
}

// What a step gives back are records of Python's own kind, as os.stat() gives: the scheduler reads one for every token,
// and reading a field of theirs does not go through the bindings.
class RecordType {
 public:
  // `name` and `fields` are string literals: Python keeps the pointers.
  RecordType(const char* name, const char* doc, std::initializer_list<const char*> fields) {
    std::vector<PyStructSequence_Field> rows;
    for (const char* field : fields) rows.push_back({field, nullptr});
    rows.push_back({nullptr, nullptr});
    PyStructSequence_Desc desc{name, doc, rows.data(), static_cast<int>(fields.size())};
    type_ = PyStructSequence_NewType(&desc);
    if (type_ == nullptr) throw py::error_already_set();
  }

  py::object make(std::initializer_list<py::object> values) const {
    py::object record = owned(PyStructSequence_New(type_));
    Py_ssize_t i = 0;
    for (const py::object& value : values) PyStructSequence_SetItem(record.ptr(), i++, value.inc_ref().ptr());
    return record;
  }

  py::handle type() const { return reinterpret_cast<PyObject*>(type_); }

 private:
  PyTypeObject* type_;  // the module's, which is never unloaded
};

const RecordType& sample_type() {
  static const RecordType type("pyllama._C.Sample", "A sampled token.", {"token", "logprob", "top_logprobs"});
  return type;
}

const RecordType& result_type() {
  static const RecordType type("pyllama._C.StepResult", "What a step gave for one item.",
                               {"token", "logprob", "top_logprobs", "samples", "logits"});
  return type;
}

const Sampled kNothingSampled;

py::object make_top(const Sampled& s) {
  py::object top = new_list(s.top_logprobs.size());
  for (size_t i = 0; i < s.top_logprobs.size(); ++i) {
    const auto& [token, logprob] = s.top_logprobs[i];
    set_item(top, i, owned(Py_BuildValue("(if)", token, logprob)));
  }
  return top;
}

py::object make_result(const std::vector<Sampled>& sampled, const py::object& logits) {
  const auto integer = [](int value) { return owned(PyLong_FromLong(value)); };
  const auto number = [](float value) { return owned(PyFloat_FromDouble(value)); };
  py::object samples = new_list(sampled.size());
  for (size_t i = 0; i < sampled.size(); ++i) {
    const Sampled& s = sampled[i];
    set_item(samples, i, sample_type().make({integer(s.token), number(s.logprob), make_top(s)}));
  }
  const Sampled& first = sampled.empty() ? kNothingSampled : sampled[0];
  return result_type().make({integer(first.token), number(first.logprob), make_top(first), samples, logits});
}

py::object sample_once(const SamplerParams& params, const py::array_t<float, py::array::c_style>& logits,
                       const std::vector<int32_t>& tokens, int prompt_len, const std::string& isa) {
  check<std::invalid_argument>(logits.ndim() == 1 && logits.size() > 0, "logits must be float32 [vocab_size]");
  SamplerInput in;
  in.logits = logits.data();
  in.vocab_size = static_cast<int>(logits.size());
  in.past = tokens.data();
  in.n_past = static_cast<int>(tokens.size());
  in.prompt_len = prompt_len;
  for (const int32_t token : tokens) {
    check<std::invalid_argument>(token >= 0 && token < in.vocab_size, "token ", token, ", expected 0…",
                                 in.vocab_size - 1);
  }
  Sampler sampler(cpu_vocab_kernels(isa));
  return make_result({sampler.sample(params, in)}, py::none());
}

}  // namespace

py::object make_results(const std::vector<std::vector<Sampled>>& sampled, const std::vector<py::object>& logits) {
  py::object results = new_list(sampled.size());
  for (size_t i = 0; i < sampled.size(); ++i) set_item(results, i, make_result(sampled[i], logits[i]));
  return results;
}

void bind_sampler(py::module_& m) {
  const SamplerParams defaults;
  py::class_<SamplerParams>(m, "Sampler", "How the next token is chosen; immutable.")
      .def(py::init(&make_sampler), py::kw_only(), py::arg("temperature") = defaults.temperature,
           py::arg("top_k") = defaults.top_k, py::arg("top_p") = defaults.top_p, py::arg("min_p") = defaults.min_p,
           py::arg("repetition_penalty") = defaults.repetition_penalty,
           py::arg("presence_penalty") = defaults.presence_penalty,
           py::arg("frequency_penalty") = defaults.frequency_penalty,
           py::arg("logit_bias") = std::map<int32_t, float>{}, py::arg("logprobs") = defaults.logprobs,
           py::arg("seed") = defaults.seed, py::arg("end_ids") = defaults.end_ids)
      .def("sample", &sample_once, py::arg("logits"), py::arg("tokens"), py::arg("prompt_len") = 0, py::arg("isa") = "",
           "What a step would sample from float32 logits [vocab_size] after these tokens; the seed's position is "
           "len(tokens).");
  m.attr("Sample") = sample_type().type();
  m.attr("StepResult") = result_type().type();
}

// The sampler's own arithmetic, for the tests of its error bounds.
void bind_sampler_math(py::module_ ops) {
  ops.def("portable_log", py::vectorize(&portable_log), py::arg("x"), "ln x of positive normal float64, without libm.");
  ops.def("philox4x32", &philox4x32, py::arg("counter"), py::arg("key"), "Philox4x32-10.");
  ops.def("uniform_bits", &uniform_bits, py::arg("seed"), py::arg("position"), "The sampler's 53 random bits.");
}

}  // namespace pyllama
