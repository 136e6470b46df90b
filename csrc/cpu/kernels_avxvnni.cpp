// The kernels for AVX-VNNI (Alder Lake, Zen 5 and later).
#include "kernels.h"

#include <cstring>

#define PYLLAMA_DPBUSD _mm256_dpbusd_avx_epi32
#include "simd_avx2.h"

#define PYLLAMA_ISA avxvnni
#include "kernels.inc"
