// Tokens drawn on the device, for the tests.
#include <cstdint>

#include "array.h"
#include "backend.h"
#include "cuda/draw.h"
#include "entry.h"

using namespace pyllama::cuda;
using namespace pyllama::cuda::tests;

// filters: temperature, top_p, min_p and top_k of each row; random: its 53 bits.
PYLLAMA_TEST_ENTRY int draw_rows(const float* logits, int64_t vocab_size, int64_t n_rows, const double* filters,
                                 const uint64_t* random, int32_t* tokens) {
  return guarded([&] {
    const int n = static_cast<int>(n_rows), vocab = static_cast<int>(vocab_size);
    DrawRow rows[kDrawRows];
    for (int i = 0; i < n && i < kDrawRows; i++) {
      const double* f = filters + 4 * i;
      rows[i] = draw_row({f[0], static_cast<int>(f[3]), f[1], f[2], random[i]}, vocab);
    }
    Stream stream;
    const Array<float> from(stream, logits, static_cast<size_t>(n_rows * vocab_size));
    const Array<DrawRow> how(stream, rows, static_cast<size_t>(n));
    const Memory room(draw_room_bytes(vocab), "room to draw");
    Array<int32_t> to(stream, tokens, static_cast<size_t>(n));
    draw_tokens(stream, {from.data(), vocab, n, how.data(), room.as<uint8_t>(), to.data()});
    stream.wait();
    to.back(stream, tokens);
    stream.wait();
  });
}
