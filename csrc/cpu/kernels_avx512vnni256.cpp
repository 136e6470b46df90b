// The AVX-VNNI kernels in their EVEX encoding: the same source on a machine with AVX-512-VNNI but no AVX-VNNI.
#include "kernels.h"

#include <cstring>

#define PYLLAMA_DPBUSD _mm256_dpbusd_epi32
#include "simd_avx2.h"

#define PYLLAMA_ISA avx512vnni256
#include "kernels.inc"
