// Turns a tensor's description and its mapped bytes into a Weight, or says exactly why they do not fit together.
// A file from the internet is hostile until it has passed here: sizes are computed with overflow checks and compared
// exactly, so that kernels may index without looking. Weights' numbers are not scanned (that is quantize's work).
#include "tensor.h"

#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "error.h"

namespace pyllama {
namespace {

// a * b for non-negative numbers; FormatError when it does not fit.
int64_t times(const std::string& name, int64_t a, int64_t b) {
  int64_t product = 0;
  check(!__builtin_mul_overflow(a, b, &product), name, ": the shape describes more bytes than can be addressed");
  return product;
}

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

const FormatInfo& find_format(const WeightSpec& spec) {
  for (const FormatInfo& row : kFormats) {
    if (row.name == spec.format) return row;
  }
  std::string known;
  for (const FormatInfo& row : kFormats) known += (known.empty() ? "" : ", ") + std::string(row.name);
  throw FormatError(message(spec.name, ": format \"", spec.format, "\", expected one of ", known));
}

Number find_number(const WeightSpec& spec, const char* what, const std::string& text, bool u8_allowed) {
  if (text == "f16") return Number::f16;
  if (text == "bf16") return Number::bf16;
  if (text == "u8" && u8_allowed) return Number::u8;
  throw FormatError(
      message(spec.name, ": ", what, " \"", text, "\", expected f16", u8_allowed ? ", bf16 or u8" : " or bf16"));
}

int64_t bytes_of(Number number) { return number == Number::u8 ? 1 : 2; }

void check_shape(const WeightSpec& spec, const FormatInfo& row) {
  check(spec.shape.size() == 1 || spec.shape.size() == 2, spec.name, ": shape ", shape_text(spec.shape),
        ", expected [N, K] or [N]");
  check(spec.shape.size() == 2 || row.format == Format::f32, spec.name, ": a vector in format ", row.name,
        ", expected f32");
  // Room for rounding up to tiles and pads without leaving int.
  constexpr int64_t kMaxSide = std::numeric_limits<int32_t>::max() - 1024;
  for (const int64_t side : spec.shape) {
    check(side > 0 && side <= kMaxSide, spec.name, ": shape ", shape_text(spec.shape), ", expected sides in 1…",
          kMaxSide);
  }
}

void set_group(const WeightSpec& spec, const FormatInfo& row, Weight& w) {
  if (!row.quantized) {
    check(spec.group == 0, spec.name, ": group ", spec.group, ", but ", row.name, " has no groups");
    return;
  }
  check(spec.group == 32 || spec.group == 64 || spec.group == 128, spec.name, ": group ", spec.group,
        ", expected 32, 64 or 128");
  w.group = spec.group;
}

void set_numbers(const WeightSpec& spec, const FormatInfo& row, Weight& w) {
  if (row.quantized) {
    w.scale_type = find_number(spec, "scale", spec.scale, false);
  }
  check(row.has_offset || spec.scale == "f16", spec.name, ": scale \"", spec.scale, "\", but ", row.name,
        " takes only f16");
  if (row.has_offset) {
    w.offset_type = find_number(spec, "offset", spec.offset, true);
  } else {
    check(spec.offset.empty(), spec.name, ": offset \"", spec.offset, "\", but ", row.name, " has no offsets");
  }
}

void set_codebook(const WeightSpec& spec, const FormatInfo& row, Weight& w) {
  if (!row.has_codebook) {
    check(spec.codebook.empty(), spec.name, ": a codebook, but ", row.name, " has none");
    return;
  }
  const size_t n = size_t{1} << row.code_bits;
  check(spec.codebook.size() == n, spec.name, ": codebook of ", spec.codebook.size(), " entries, expected ", n);
  for (size_t i = 0; i < n; ++i) {
    const int entry = spec.codebook[i];
    check(entry >= -127 && entry <= 127, spec.name, ": codebook entry ", entry, ", expected -127…127");
    w.codebook[i] = static_cast<int8_t>(entry);
  }
}

// Hands out the sections of a payload one after the other; nothing is dereferenced before the total is checked.
class Sections {
 public:
  Sections(const std::string& name, const uint8_t* data) : name_(name), data_(data) {}

  const uint8_t* next(int64_t size_bytes) {
    const auto start = static_cast<uintptr_t>(total_);
    check(size_bytes <= std::numeric_limits<int64_t>::max() - total_ - int64_t{kAlign}, name_,
          ": the shape describes more bytes than can be addressed");
    total_ += round_up(size_bytes, kAlign);
    return reinterpret_cast<const uint8_t*>(reinterpret_cast<uintptr_t>(data_) + start);
  }
  int64_t total() const { return total_; }

 private:
  const std::string& name_;
  const uint8_t* data_;
  int64_t total_ = 0;
};

void check_permutation(const std::string& name, const int32_t* order, int K) {
  std::vector<bool> seen(static_cast<size_t>(K), false);
  for (int k = 0; k < K; ++k) {
    const int32_t from = order[k];
    check(from >= 0 && from < K && !seen[static_cast<size_t>(from)], name, ": input_order[", k, "] is ", from,
          ", expected each of 0…", K - 1, " exactly once");
    seen[static_cast<size_t>(from)] = true;
  }
}

}  // namespace

Weight make_weight(const WeightSpec& spec, const uint8_t* data, int64_t size_bytes) {
  const FormatInfo& row = find_format(spec);
  check_shape(spec, row);
  Weight w;
  w.name = spec.name;
  w.format = row.format;
  w.N = static_cast<int>(spec.shape[0]);
  w.K = spec.shape.size() == 2 ? static_cast<int>(spec.shape[1]) : 0;
  set_group(spec, row, w);
  set_numbers(spec, row, w);
  set_codebook(spec, row, w);
  check(!spec.input_order || row.has_offset, spec.name, ": input_order, but only q4a may have one");

  Sections sections(spec.name, data);
  const int64_t rows = round_up(w.N, kTileRows);
  if (w.K == 0) {
    w.codes = sections.next(times(spec.name, w.N, 4));
  } else {
    w.codes = sections.next(times(spec.name, times(spec.name, rows, w.Kp()), row.code_bits) / 8);
  }
  const int64_t scales = times(spec.name, rows, w.groups());
  if (row.quantized) w.scales = sections.next(times(spec.name, scales, bytes_of(w.scale_type)));
  if (row.has_offset) w.offsets = sections.next(times(spec.name, scales, bytes_of(w.offset_type)));
  if (spec.input_order) w.input_order = reinterpret_cast<const int32_t*>(sections.next(int64_t{w.K} * 4));

  check(size_bytes == sections.total(), spec.name, ": ", size_bytes, " bytes, expected ", sections.total(), " for ",
        row.name, " ", shape_text(spec.shape));
  check(reinterpret_cast<uintptr_t>(data) % kAlign == 0, spec.name, ": the data must be aligned to ", kAlign, " bytes");
  w.payload_bytes = size_bytes;
  if (w.input_order != nullptr) check_permutation(spec.name, w.input_order, w.K);
  return w;
}

}  // namespace pyllama
