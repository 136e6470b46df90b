// Keys, values and attention of csrc/cuda for the tests: arrays of numpy go to the emulated device and come back. Pages
// are one array, [n_pages][page_bytes]; page tables name them by number.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "array.h"
#include "cuda/attention.h"
#include "cuda/cache.h"
#include "entry.h"

using namespace pyllama::cuda;
using namespace pyllama::cuda::tests;

namespace {

CacheLayout layout_of(const int32_t* shape) {
  return cache_layout(shape[0] ? CacheType::q8 : CacheType::f16, shape[1], shape[2], shape[3]);
}

std::vector<uint8_t*> pointers(const Array<uint8_t>& pages, const CacheLayout& l, const int32_t* ids, size_t n) {
  std::vector<uint8_t*> result(n);
  for (size_t i = 0; i < n; i++) result[i] = pages.data() + ids[i] * l.page_bytes;
  return result;
}

}  // namespace

// shape, here and below: q8?, n_layers, n_kv_heads, head_dim.
PYLLAMA_TEST_ENTRY int cache_page_bytes(const int32_t* shape, int64_t* bytes) {
  return guarded([&] { *bytes = layout_of(shape).page_bytes; });
}

// step: layer, n_tok, n_heads, n_pages.
PYLLAMA_TEST_ENTRY int rope_append_step(const int32_t* shape, const int32_t* step, const int32_t* page_ids,
                                        const int32_t* pos, const float* cos, const float* sin, const float* qkv,
                                        uint8_t* pages, float* q) {
  return guarded([&] {
    const CacheLayout l = layout_of(shape);
    const size_t n_tok = static_cast<size_t>(step[1]), half_dim = static_cast<size_t>(l.head_dim) / 2;
    const size_t n_heads = static_cast<size_t>(step[2]),
                 stride = (n_heads + 2 * static_cast<size_t>(l.n_kv_heads)) * 2 * half_dim;
    Stream stream;
    Array<uint8_t> cache(stream, pages, static_cast<size_t>(step[3] * l.page_bytes));
    const std::vector<uint8_t*> page_of = pointers(cache, l, page_ids, n_tok);
    const Array<uint8_t*> places(stream, page_of.data(), n_tok);
    const Array<int32_t> positions(stream, pos, n_tok);
    const Array<float> cosines(stream, cos, n_tok * half_dim), sines(stream, sin, n_tok * half_dim);
    const Array<float> in(stream, qkv, n_tok * stride);
    Array<float> out(stream, q, n_tok * n_heads * 2 * half_dim);
    rope_append(stream, l, step[0], {places.data(), positions.data(), cosines.data(), sines.data()}, step[1],
                {in.data(), static_cast<int64_t>(stride), out.data(), step[2]});
    stream.wait();  // before results take the place of what is copied
    cache.back(stream, pages);
    out.back(stream, q);
    stream.wait();
  });
}

// bytes of attention's room. step: n_tok, n_heads, n_spans, max_span_tok, max_few_tok, max_keys, n_pages.
PYLLAMA_TEST_ENTRY int attention_room(const int32_t* shape, const int32_t* step, int64_t* bytes) {
  return guarded([&] {
    AttendShape s;
    s.n_tok = step[0], s.n_heads = step[1], s.n_spans = step[2], s.max_span_tok = step[3], s.max_few_tok = step[4];
    s.max_keys = step[5], s.n_pages = step[6];
    *bytes = static_cast<int64_t>(attend_room(layout_of(shape), s).partials_bytes);
  });
}

// step: layer, n_tok, n_heads, n_spans, max_span_tok, max_keys, n_pages, entries of the page table, launches,
// multiprocessors, shared_bytes, max_few_tok.
PYLLAMA_TEST_ENTRY int attend_step(const int32_t* shape, const int32_t* step, const DeviceSpan* spans,
                                   const int32_t* page_ids, const uint8_t* pages, const float* q, float* o) {
  return guarded([&] {
    const CacheLayout l = layout_of(shape);
    AttendShape s;
    s.n_spans = step[3], s.max_span_tok = step[4], s.max_keys = step[5], s.n_tok = step[1], s.n_heads = step[2];
    s.multiprocessors = step[9], s.shared_bytes = static_cast<size_t>(step[10]);
    s.max_few_tok = step[11];
    s.n_pages = step[7];
    const size_t numbers = static_cast<size_t>(step[1]) * static_cast<size_t>(step[2] * l.head_dim);
    Stream stream;
    const Array<uint8_t> cache(stream, pages, static_cast<size_t>(step[6] * l.page_bytes));
    const std::vector<uint8_t*> table = pointers(cache, l, page_ids, static_cast<size_t>(step[7]));
    const Array<uint8_t*> page_table(stream, table.data(), table.size());
    const Array<DeviceSpan> device_spans(stream, spans, static_cast<size_t>(step[3]));
    const Array<float> queries(stream, q, numbers);
    const AttendRoom room = attend_room(l, s);
    const size_t least = 16;  // where there is no room at all
    const Memory partials(std::max(room.partials_bytes, least), "partials"),
        arrived(std::max(room.arrived_bytes, least), "arrived");
    stream.fill(arrived.data(), 0, arrived.bytes());
    std::vector<float> first;
    for (int i = 0; i < step[8]; i++) {  // a later launch finds the counters that the one before left
      Array<float> out(stream, o, numbers);
      attend(stream, l, step[0], s,
             {queries.data(), out.data(), device_spans.data(), page_table.data(), partials.as<float>(),
              arrived.as<int32_t>()});
      out.back(stream, o);
      stream.wait();
      if (i == 0) first.assign(o, o + numbers);
      if (memcmp(first.data(), o, numbers * sizeof(float)) != 0) throw std::runtime_error("launches differ");
    }
    std::vector<int32_t> counters(arrived.bytes() / sizeof(int32_t));
    stream.copy_to_host(counters.data(), arrived.data(), counters.size() * sizeof(int32_t));
    stream.wait();
    for (const int32_t counter : counters) {
      if (counter != 0) throw std::runtime_error("a counter is " + std::to_string(counter) + " after the launch");
    }
  });
}
