// The kernels for AVX2 with FMA and F16C (Haswell, Zen and later).
#include "kernels.h"

#include <cstring>

#include "simd_avx2.h"

#define PYLLAMA_ISA avx2
#include "kernels.inc"
