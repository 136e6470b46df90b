// The search loops for AVX-512 F, BW, DQ and VL; the flags stand in CMakeLists.txt.
#define PYLLAMA_CONVERT_BYTES 64
#define PYLLAMA_CONVERT_ISA "avx512"
#define PYLLAMA_CONVERT_TABLE kernels_avx512
#include "convert/rows.inc"
