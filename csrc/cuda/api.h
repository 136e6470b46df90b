// The table of functions between pyllama._C and libpyllama_cuda.so: plain C, so that either side may be built by
// another compiler, and no CUDA header, so that the extension builds where there is none. Both sides include this file.
// Every function returns a PyllamaCudaKind; what went wrong is then in last_error(), per thread. No exception, no exit
// and no output crosses the table. It holds what works and grows at its end; a model cannot be run through it yet.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Counted up when a function or a struct changes its meaning or layout. New functions at the end leave it: they show
// in size_bytes, and a caller asks only for a table that is large enough.
enum { kPyllamaCudaVersion = 1 };

typedef enum PyllamaCudaKind {
  kPyllamaCudaOk = 0,
  kPyllamaCudaNoDriver = 1,
  kPyllamaCudaDriverTooOld = 2,  // for the toolkit that the library was built with
  kPyllamaCudaNoDevice = 3,
  kPyllamaCudaArchitectureNotBuilt = 4,  // a device is there, the library has no code for it
  kPyllamaCudaOutOfMemory = 5,
  kPyllamaCudaBadArgument = 6,
  kPyllamaCudaInternal = 7,
} PyllamaCudaKind;

// How the library was built. Strings live as long as the library.
typedef struct PyllamaCudaBuild {
  int32_t toolkit;            // 13000: 13.0; 0 in the emulation
  int32_t emulated;           // 1: kernels run on the CPU, for tests
  const char* architectures;  // "80+PTX", "75 80 86 89 90+PTX 120", …
} PyllamaCudaBuild;

typedef struct PyllamaCudaDevice {
  char name[256];
  int32_t major, minor;  // compute capability
  int32_t multiprocessors;
  int32_t l2_bytes;
  int32_t shared_bytes;  // the most that one block can have
  int64_t memory_bytes, free_bytes;
} PyllamaCudaDevice;

typedef struct PyllamaCudaTable {
  int32_t version;     // kPyllamaCudaVersion
  int32_t size_bytes;  // sizeof(PyllamaCudaTable) of the library

  const char* (*last_error)(void);  // of this thread's last failure; valid until the thread's next call

  int (*build)(PyllamaCudaBuild* build);
  int (*driver)(int32_t* version);      // 13000: the newest CUDA that the driver runs; NoDriver where there is none
  int (*device_count)(int32_t* count);  // at least 1, else a failure that says why
  int (*device)(int32_t index, PyllamaCudaDevice* device);

  // Streams `bytes` (a multiple of 16) out of the device's memory `repeats` times after a first pass to warm up.
  // seconds: of the fastest pass. Checks that every word was read once; ArchitectureNotBuilt where no kernel can run.
  int (*read_bandwidth)(int32_t index, int64_t bytes, int32_t repeats, double* seconds);
} PyllamaCudaTable;

// The only symbol that the library exports.
#define PYLLAMA_CUDA_SYMBOL "pyllama_cuda_table"
const PyllamaCudaTable* pyllama_cuda_table(void);

#ifdef __cplusplus
}
#endif
