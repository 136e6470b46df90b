// See tensor_core.h.
#include "tensor_core.h"

#include <cstring>

#include "numbers.h"
#include "thread.h"

namespace pyllama::cuda::emulation {

namespace {

struct Mma {
  float* c;
  const uint32_t* a;
  const uint32_t* b;
};

float as_half(uint32_t bits) { return half_to_float({static_cast<uint16_t>(bits)}); }
float as_bfloat16(uint32_t bits) { return bfloat16_to_float({static_cast<uint16_t>(bits)}); }

// The tables. g = lane / 4 ("groupID"), t = lane % 4 ("threadID_in_group"), i = register, h = low or high half of it.
//   a: row g + 8 (i odd), column 2t + h + 8 (i >= 2)      b: row 2t + h + 8 i, column g      c: row g + 8 (i >= 2),
//   column 2t + (i odd)
template <float (*kToFloat)(uint32_t)>
void complete_mma(void* const* operands) {
  double a[16][16], b[16][8], c[16][8];
  const auto each_lane = [&](const auto& body) {
    for (unsigned lane = 0; lane < kWarpSize; lane++)
      body(*static_cast<const Mma*>(operands[lane]), lane / 4, lane % 4);
  };
  each_lane([&](const Mma& m, unsigned g, unsigned t) {
    for (unsigned h = 0; h < 2; h++) {
      for (unsigned i = 0; i < 4; i++) a[g + 8 * (i % 2)][2 * t + h + 8 * (i / 2)] = kToFloat(m.a[i] >> (16 * h));
      for (unsigned i = 0; i < 2; i++) b[2 * t + h + 8 * i][g] = kToFloat(m.b[i] >> (16 * h));
    }
    for (unsigned i = 0; i < 4; i++) c[g + 8 * (i / 2)][2 * t + i % 2] = m.c[i];
  });
  for (unsigned row = 0; row < 16; row++) {
    for (unsigned k = 0; k < 16; k++) {
      for (unsigned column = 0; column < 8; column++) c[row][column] += a[row][k] * b[k][column];
    }
  }
  each_lane([&](const Mma& m, unsigned g, unsigned t) {
    for (unsigned i = 0; i < 4; i++) m.c[i] = static_cast<float>(c[g + 8 * (i / 2)][2 * t + i % 2]);
  });
}

struct Load {
  uint32_t* r;
  const void* row;
};

template <unsigned kCount, bool kTransposed>
void complete_load(void* const* operands) {
  const auto element = [&](unsigned matrix, unsigned row, unsigned column) -> uint32_t {
    uint16_t bits;
    const auto* begin = static_cast<const unsigned char*>(static_cast<const Load*>(operands[8 * matrix + row])->row);
    memcpy(&bits, begin + 2 * column, 2);
    return bits;
  };
  for (unsigned lane = 0; lane < kWarpSize; lane++) {
    const unsigned g = lane / 4, k = 2 * (lane % 4);
    uint32_t* r = static_cast<const Load*>(operands[lane])->r;
    for (unsigned i = 0; i < kCount; i++) {
      r[i] =
          kTransposed ? element(i, k, g) | element(i, k + 1, g) << 16 : element(i, g, k) | element(i, g, k + 1) << 16;
    }
  }
}

constexpr Collective kMmaHalf{"mma_m16n8k16", true, complete_mma<as_half>};
constexpr Collective kMmaBfloat16{"mma_m16n8k16_bf16", true, complete_mma<as_bfloat16>};
constexpr Collective kLoads[2][3] = {
    {{"load_matrix_x1", true, complete_load<1, false>},
     {"load_matrix_x2", true, complete_load<2, false>},
     {"load_matrix_x4", true, complete_load<4, false>}},
    {{"load_matrix_x1_trans", true, complete_load<1, true>},
     {"load_matrix_x2_trans", true, complete_load<2, true>},
     {"load_matrix_x4_trans", true, complete_load<4, true>}},
};

}  // namespace

void mma_half(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Mma operands{c, a, b};
  meet(kMmaHalf, &operands);
}

void mma_bfloat16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Mma operands{c, a, b};
  meet(kMmaBfloat16, &operands);
}

void load_matrices(uint32_t* r, const void* row, unsigned count, bool transposed) {
  const Collective& load = kLoads[transposed][count / 2];
  if (this_thread->index % kWarpSize < 8 * count) check_shared(row, 16, load.name);
  Load operands{r, row};
  meet(load, &operands);
}

}  // namespace pyllama::cuda::emulation
