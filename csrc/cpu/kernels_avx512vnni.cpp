// The kernels for AVX-512 with VNNI (Ice Lake, Zen 4 and later).
#include "kernels.h"

#include <cstring>

#include "simd_avx512.h"

#define PYLLAMA_ISA avx512vnni
#include "kernels.inc"
