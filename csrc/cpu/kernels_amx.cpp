// The AVX-512 kernels with AMX for many tokens at once (Sapphire Rapids and later).
#include "kernels.h"

#include <cstring>

#include "simd_avx512.h"

#define PYLLAMA_ISA amx
#define PYLLAMA_AMX 1
#include "kernels.inc"
