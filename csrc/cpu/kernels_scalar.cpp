// The kernels for a processor about which nothing is known; the twin that all others must equal.
#include "kernels.h"

#include <cstring>

#include "simd_scalar.h"

#define PYLLAMA_ISA scalar
#include "kernels.inc"
