// The search loops for AVX2 and F16C; the flags stand in CMakeLists.txt.
#define PYLLAMA_CONVERT_BYTES 32
#define PYLLAMA_CONVERT_ISA "avx2"
#define PYLLAMA_CONVERT_TABLE kernels_avx2
#include "convert/rows.inc"
