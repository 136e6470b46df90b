// pyllama._C.convert: the inner loops of `quantize` on numpy arrays, without the GIL. numpy twins of each are in
// quantize/ and pyllama/common/formats.py; `isa` ("" = the best) is for tests.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "bindings.h"
#include "convert/convert.h"
#include "cpu/cpu.h"
#include "cpu/os.h"
#include "error.h"

namespace py = pybind11;

namespace pyllama {
namespace {

using convert::Kernels;
template <class T>
using Array = py::array_t<T, py::array::c_style>;
template <class T>
using Converted = py::array_t<T, py::array::c_style | py::array::forcecast>;

// Kernels count on IEEE defaults; a library may have set flush-to-zero in this thread.
struct FloatEnvironment {
  unsigned previous = set_float_environment();
  ~FloatEnvironment() { restore_float_environment(previous); }
};

void need(bool ok, const char* what) { check<std::invalid_argument>(ok, what); }

// A view of bytes may begin anywhere; the loops read and write whole numbers.
template <class... Arrays>
void need_aligned(const Arrays&... arrays) {
  need(((arrays.flags() & py::detail::npy_api::NPY_ARRAY_ALIGNED_) && ...), "arrays must be aligned");
}

std::vector<const Kernels*> kernels_here() {
  std::vector<const Kernels*> found{&convert::kernels_baseline};
#if defined(__x86_64__) || defined(_M_X64)
  for (const std::string& isa : cpu_isas()) {
    if (isa == "avx2") found.push_back(&convert::kernels_avx2);
    if (isa == "avx512vnni") found.push_back(&convert::kernels_avx512);
  }
#endif
  return found;
}

// The widest at which the engine's own kernels run, so that PYLLAMA_ISA holds for both.
const Kernels& kernels_for(const std::string& isa) {
  std::string name = isa;
  if (name.empty()) {
    const std::string engine = choose_isa("");
    name = engine == "amx" || engine == "avx512vnni" ? "avx512" : engine.rfind("avx", 0) == 0 ? "avx2" : "baseline";
  }
  std::string known;
  for (const Kernels* kernels : kernels_here()) {
    if (name == kernels->isa) return *kernels;
    known += std::string(" ") + kernels->isa;
  }
  throw std::invalid_argument("isa '" + name + "', expected one of" + known);
}

using Counts = std::optional<Array<float>>;  // [K] by what the squared error of a column counts, or nothing: alike

convert::Matrix matrix_of(const Array<float>& weights, int group, const Counts& counts) {
  need_aligned(weights);
  if (counts) need_aligned(*counts);
  need(weights.ndim() == 2 && weights.size() > 0, "weights must be float32 [N, K]");
  need(group > 0 && group <= convert::kMaxGroup, "group must be 1 to 128");
  need(!counts || (counts->ndim() == 1 && counts->shape(0) == weights.shape(1)), "counts must be float32 [K]");
  return {weights.data(), weights.shape(0), weights.shape(1), group, counts ? counts->data() : nullptr};
}

py::ssize_t groups_of(const convert::Matrix& matrix) { return (matrix.n_columns + matrix.group - 1) / matrix.group; }

py::tuple search_scale(const Array<float>& weights, int group, std::pair<float, float> levels, float bias,
                       const Converted<float>& places, const std::optional<Converted<float>>& level_of_half,
                       const std::optional<Converted<uint8_t>>& code_of_half, const Counts& counts,
                       const std::string& isa) {
  const Kernels& kernels = kernels_for(isa);
  const convert::Matrix matrix = matrix_of(weights, group, counts);
  need(places.ndim() == 1, "places must be [n]");
  need(level_of_half.has_value() == code_of_half.has_value(), "a codebook needs levels and codes");
  convert::ScaleGrid grid{levels.first, levels.second, bias, nullptr, nullptr, places.data(), 0};
  grid.n_places = static_cast<int>(places.size());
  if (level_of_half) {
    need(level_of_half->size() == convert::kHalves && code_of_half->size() == convert::kHalves, "tables must be [512]");
    grid.level_of_half = level_of_half->data();
    grid.code_of_half = code_of_half->data();
  }
  Array<uint8_t> codes({weights.shape(0), weights.shape(1)});
  Array<uint16_t> scales({weights.shape(0), groups_of(matrix)});
  const convert::Packed out{codes.mutable_data(), scales.mutable_data(), nullptr};
  {
    const py::gil_scoped_release release;
    const FloatEnvironment environment;
    kernels.search_scale(matrix, grid, out);
  }
  return py::make_tuple(std::move(codes), std::move(scales));
}

py::tuple search_affine(const Array<float>& weights, int group, const Converted<float>& trials, const Counts& counts,
                        const std::string& isa) {
  const Kernels& kernels = kernels_for(isa);
  const convert::Matrix matrix = matrix_of(weights, group, counts);
  need(trials.ndim() == 2 && trials.shape(1) == 2, "trials must be [n, 2]");
  const convert::AffineGrid grid{trials.data(), static_cast<int>(trials.shape(0))};
  Array<uint8_t> codes({weights.shape(0), weights.shape(1)});
  Array<uint16_t> scales({weights.shape(0), groups_of(matrix)}), offsets({weights.shape(0), groups_of(matrix)});
  const convert::Packed out{codes.mutable_data(), scales.mutable_data(), offsets.mutable_data()};
  {
    const py::gil_scoped_release release;
    const FloatEnvironment environment;
    kernels.search_affine(matrix, grid, out);
  }
  return py::make_tuple(std::move(codes), std::move(scales), std::move(offsets));
}

using Table = std::optional<Converted<float>>;
using Codes = std::optional<Converted<uint8_t>>;

// The levels of a search's grid, without places.
convert::ScaleGrid levels_of(std::pair<float, float> levels, const Table& level_of_half, const Codes& code_of_half) {
  need(level_of_half.has_value() == code_of_half.has_value(), "a codebook needs levels and codes");
  convert::ScaleGrid grid{levels.first, levels.second, 0, nullptr, nullptr, nullptr, 0};
  if (level_of_half) {
    need(level_of_half->size() == convert::kHalves && code_of_half->size() == convert::kHalves, "tables must be [512]");
    grid.level_of_half = level_of_half->data();
    grid.code_of_half = code_of_half->data();
  }
  return grid;
}

bool is_shape(const py::array& array, py::ssize_t rows, py::ssize_t columns) {
  return array.ndim() == 2 && array.shape(0) == rows && array.shape(1) == columns;
}

py::tuple push_group(const Array<float>& block, const Array<float>& scales, const Array<float>& offsets,
                     const Array<float>& factor, std::pair<float, float> levels, const Table& level_of_half,
                     const Codes& code_of_half, const std::string& isa) {
  const Kernels& kernels = kernels_for(isa);
  need_aligned(block, scales, offsets, factor);
  need(block.ndim() == 2 && block.size() > 0 && block.shape(0) <= convert::kMaxGroup, "block must be [1…128, n]");
  const py::ssize_t width = block.shape(0), n = block.shape(1);
  need(scales.ndim() == 2 && scales.shape(0) > 0 && scales.shape(0) < 128, "scales must be [trials, n]");
  need(is_shape(scales, scales.shape(0), n) && is_shape(offsets, scales.shape(0), n), "scales must be [trials, n]");
  need(is_shape(factor, width, width), "factor must be [width, width]");
  const convert::ScaleGrid grid = levels_of(levels, level_of_half, code_of_half);
  Array<float> found({width, n}), errors({width, n});
  Array<int8_t> chosen(std::vector<py::ssize_t>{n});
  const convert::Push push{static_cast<int>(width),
                           n,
                           block.data(),
                           scales.data(),
                           offsets.data(),
                           static_cast<int>(scales.shape(0)),
                           factor.data(),
                           found.mutable_data(),
                           errors.mutable_data(),
                           chosen.mutable_data()};
  {
    const py::gil_scoped_release release;
    const FloatEnvironment environment;
    kernels.push_group(push, grid);
  }
  return py::make_tuple(std::move(found), std::move(errors), std::move(chosen));
}

void move_codes(Array<float> found, Array<float> slope, const Array<float>& scale, const Array<float>& gram,
                std::pair<float, float> levels, const Table& level_of_half, const Codes& code_of_half,
                const std::string& isa) {
  const Kernels& kernels = kernels_for(isa);
  need_aligned(found, slope, scale, gram);
  need(found.ndim() == 2 && found.size() > 0 && found.shape(0) <= convert::kMaxGroup, "levels must be [1…128, n]");
  const py::ssize_t width = found.shape(0), n = found.shape(1);
  need(is_shape(slope, width, n), "slope must be [width, n]");
  need(scale.ndim() == 1 && scale.shape(0) == n, "scale must be [n]");
  need(is_shape(gram, width, width), "gram must be [width, width]");
  const convert::ScaleGrid grid = levels_of(levels, level_of_half, code_of_half);
  const convert::Descent descent{static_cast<int>(width), n, scale.data(), gram.data(), found.mutable_data(),
                                 slope.mutable_data()};
  const py::gil_scoped_release release;
  const FloatEnvironment environment;
  kernels.move_codes(descent, grid);
}

float largest(const Array<float>& values, const std::string& isa) {
  need_aligned(values);
  const Kernels& kernels = kernels_for(isa);
  const float* data = values.data();
  const int64_t n = values.size();
  const py::gil_scoped_release release;
  return kernels.largest(data, n);
}

Array<float> from_f16(const Array<uint16_t>& halves, const std::string& isa) {
  need_aligned(halves);
  const Kernels& kernels = kernels_for(isa);
  Array<float> out(std::vector<py::ssize_t>(halves.shape(), halves.shape() + halves.ndim()));
  const uint16_t* in = halves.data();
  float* data = out.mutable_data();
  const int64_t n = halves.size();
  {
    const py::gil_scoped_release release;
    const FloatEnvironment environment;
    kernels.from_f16(in, data, n);
  }
  return out;
}

// `tiles` [ceil(N/16), lines, 16, 4] is written in place.
void put_codes(const Array<uint8_t>& codes, Array<uint8_t>& tiles, int bits) {
  need(codes.ndim() == 2 && tiles.ndim() == 4 && tiles.shape(2) == 16 && tiles.shape(3) == 4,
       "codes must be [N, K], tiles [tiles, lines, 16, 4]");
  const int64_t n_rows = codes.shape(0), n_columns = codes.shape(1), n_lines = tiles.shape(1);
  need(bits == 4 || bits == 5 || bits == 6 || bits == 8, "bits must be 4, 5, 6 or 8");
  need(tiles.shape(0) == (n_rows + 15) / 16 && n_lines % bits == 0 && n_lines / bits * 32 >= n_columns,
       "tiles do not fit the codes");
  const uint8_t* in = codes.data();
  uint8_t* out = tiles.mutable_data();
  const py::gil_scoped_release release;
  convert::put_codes(in, n_rows, n_columns, bits, n_lines, out);
}

// `tiles` [ceil(N/16), columns, 16] is written in place.
void put_columns(const py::array& values, py::array& tiles) {
  const auto bytes = static_cast<int>(values.itemsize());
  need_aligned(values, tiles);
  need((values.flags() & py::array::c_style) && (tiles.flags() & py::array::c_style), "arrays must be contiguous");
  need(bytes == tiles.itemsize() && (bytes == 1 || bytes == 2 || bytes == 4), "numbers of 1, 2 or 4 bytes");
  need(values.ndim() == 2 && tiles.ndim() == 3 && tiles.shape(2) == 16 && tiles.shape(1) >= values.shape(1) &&
           tiles.shape(0) == (values.shape(0) + 15) / 16,
       "values must be [N, width], tiles [tiles, columns, 16]");
  const int64_t n_rows = values.shape(0), width = values.shape(1), n_columns = tiles.shape(1);
  const void* in = values.data();
  void* out = tiles.mutable_data();
  const py::gil_scoped_release release;
  convert::put_columns(in, n_rows, width, bytes, n_columns, out);
}

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const Kernels* kernels : kernels_here()) names.emplace_back(kernels->isa);
  return names;
}

}  // namespace

void bind_convert(py::module_ m) {
  m.def("isas", &isas, "Instruction sets that these loops can use here.");
  m.def("search_scale", &search_scale, py::arg("weights").noconvert(), py::arg("group"), py::arg("levels"),
        py::arg("bias"), py::arg("places"), py::arg("level_of_half") = py::none(), py::arg("code_of_half") = py::none(),
        py::arg("counts") = py::none(), py::arg("isa") = "",
        "float32 [N, K] -> codes uint8 [N, K] and f16 bits of scales [N, G].");
  m.def("search_affine", &search_affine, py::arg("weights").noconvert(), py::arg("group"), py::arg("trials"),
        py::arg("counts") = py::none(), py::arg("isa") = "",
        "float32 [N, K] -> codes uint8 [N, K], f16 bits of scales and of minimums [N, G].");
  m.def("push_group", &push_group, py::arg("block").noconvert(), py::arg("scales").noconvert(),
        py::arg("offsets").noconvert(), py::arg("factor").noconvert(), py::arg("levels"),
        py::arg("level_of_half") = py::none(), py::arg("code_of_half") = py::none(), py::arg("isa") = "",
        "GPTQ through a group [width, n] under each of some scales [trials, n]: levels and errors [width, n] of the "
        "best, "
        "and which it is [n], -1 for none.");
  m.def("move_codes", &move_codes, py::arg("found").noconvert(), py::arg("slope").noconvert(),
        py::arg("scale").noconvert(), py::arg("gram").noconvert(), py::arg("levels"),
        py::arg("level_of_half") = py::none(), py::arg("code_of_half") = py::none(), py::arg("isa") = "",
        "Coordinate descent through a group's levels [width, n], in place, and so the slope.");
  m.def("largest", &largest, py::arg("values").noconvert(), py::arg("isa") = "",
        "The largest magnitude; infinite if a value is NaN or infinite.");
  m.def("from_f16", &from_f16, py::arg("halves").noconvert(), py::arg("isa") = "",
        "Bits of half-precision numbers -> float32, exactly.");
  m.def("put_codes", &put_codes, py::arg("codes").noconvert(), py::arg("tiles").noconvert(), py::arg("bits"),
        "Codes [N, K] of 4, 5, 6 or 8 bits into tiles [tiles, lines, 16, 4], in place.");
  m.def("put_columns", &put_columns, py::arg("values").noconvert(), py::arg("tiles").noconvert(),
        "Numbers [N, width] of 1, 2 or 4 bytes into tiles [tiles, columns, 16], in place.");
}

}  // namespace pyllama
