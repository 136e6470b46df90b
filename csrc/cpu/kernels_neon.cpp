// The kernels for 64-bit ARM with NEON's dot products (Cortex-A76, Neoverse N1, Apple M1 and later).
#include "kernels.h"

#include <cstring>

#include "simd_neon.h"

#define PYLLAMA_ISA neon
#include "kernels.inc"
