// The search loops for what every processor of its kind has; the flags stand in CMakeLists.txt.
#define PYLLAMA_CONVERT_BYTES 16
#define PYLLAMA_CONVERT_ISA "baseline"
#define PYLLAMA_CONVERT_TABLE kernels_baseline
#include "convert/rows.inc"
