// The table of functions between pyllama._C and libpyllama_cuda.so: plain C, so that either side may be built by
// another compiler, and no CUDA header, so that the extension builds where there is none. Both sides include this file.
// Every function returns a PyllamaCudaKind; what went wrong is then in last_error(), per thread. No exception, no exit
// and no output crosses the table. It grows at its end.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Counted up when a function or a struct changes its meaning or layout. New functions at the end leave it: they show
// in size_bytes, and a caller asks only for a table that is large enough.
enum { kPyllamaCudaVersion = 3 };

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

// A tensor as csrc/tensor.h describes it: its bytes in host memory, in one piece that begins with the codes.
typedef struct PyllamaCudaWeight {
  const char* name;
  int32_t format, scale_type, offset_type;  // Format and Number of csrc/formats.h
  int32_t rows, columns;                    // rows 0: there is no such tensor; columns 0: a vector of floats
  int32_t group;
  int8_t codebook[32];
  const uint8_t *codes, *scales, *offsets;
  const int32_t* input_order;  // [columns] or null
  int64_t payload_bytes;
} PyllamaCudaWeight;

typedef struct PyllamaCudaLayer {
  PyllamaCudaWeight attn_norm, wq, wk, wv, bq, bk, bv, q_norm, k_norm, wo, mlp_norm, w_gate, w_up, w_down;
} PyllamaCudaLayer;

// A model, or the part of one that runs on the device: its layers are counted from 0; without tok_embeddings the
// residual stream comes by load_x, without norm and output it goes by store_x. What pointers lead to is read during the
// call only.
typedef struct PyllamaCudaModel {
  int32_t dim, hidden_dim, n_layers, n_heads, n_kv_heads, head_dim, vocab_size, max_seq_len;
  float norm_eps, rope_attention_factor, embedding_scale, attention_scale;
  const float* rope_inv_freq;                      // [head_dim/2]
  PyllamaCudaWeight tok_embeddings, norm, output;  // output: equal to tok_embeddings when tied
  const PyllamaCudaLayer* layers;                  // [n_layers]
  int32_t device;
  int32_t max_batch_tok;
  int32_t cache_of_bytes;  // 1: keys and values as q8, 0: as f16
} PyllamaCudaModel;

// What a model takes of the device's memory, in bytes.
typedef struct PyllamaCudaSizes {
  int64_t embedding, layers, largest_layer, head;  // head: norm and output matrix, also where that is the embedding's
  int64_t weights;                                 // of all: a matrix that is embedding and output counts once
  int64_t buffers;                                 // of steps; attention over long contexts may ask for more later
  int64_t staging;                                 // while the model is opened, beside the weights
  int64_t page;                                    // of the key/value cache, for each 64 tokens of a text
} PyllamaCudaSizes;

typedef struct PyllamaCudaOpened PyllamaCudaOpened;

// Span and Step of csrc/backend.h.
typedef struct PyllamaCudaSpan {
  int32_t first, n_tok, pos;
  const int32_t* pages;
} PyllamaCudaSpan;

// Draw of csrc/backend.h.
typedef struct PyllamaCudaDraw {
  double temperature, top_p, min_p;
  uint64_t random;
  int32_t top_k;
} PyllamaCudaDraw;

typedef struct PyllamaCudaStep {
  int32_t n_tok, n_spans, n_out;
  const int32_t *tokens, *pos, *out_rows;
  const PyllamaCudaSpan* spans;
  const PyllamaCudaDraw* draws;  // [n_out]: head draws tokens and leaves no logits; or null
} PyllamaCudaStep;

typedef enum PyllamaCudaVerb {
  kPyllamaCudaEmbed = 0,
  kPyllamaCudaAttentionIn = 1,
  kPyllamaCudaAttention = 2,
  kPyllamaCudaAttentionOut = 3,
  kPyllamaCudaMlpIn = 4,
  kPyllamaCudaMlpOut = 5,
  kPyllamaCudaHead = 6,
} PyllamaCudaVerb;

// StepTimes of csrc/backend.h, seconds.
typedef struct PyllamaCudaTimes {
  double products, attention, head, rest;
} PyllamaCudaTimes;

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

  // From the model's shapes alone: `codes` may be null. Needs no driver.
  int (*sizes)(const PyllamaCudaModel* model, PyllamaCudaSizes* sizes);

  // The verbs of csrc/backend.h, for one thread at a time. A step is begin; embed, or load_x; the layers' five, layer
  // by layer, all of them; head if logits are wanted; end. The last verb before end waits for the device, so what went
  // wrong in a step is told by one of its verbs, and after end nothing is at work. end without begin does nothing.
  int (*open_model)(const PyllamaCudaModel* model, PyllamaCudaOpened** opened);
  int (*close_model)(PyllamaCudaOpened* opened);
  int (*new_page)(PyllamaCudaOpened* opened, int32_t* page);
  int (*free_page)(PyllamaCudaOpened* opened, int32_t page);
  int (*copy_page)(PyllamaCudaOpened* opened, int32_t from, int32_t to);
  int (*begin)(PyllamaCudaOpened* opened, const PyllamaCudaStep* step);  // what step leads to may go after the call
  int (*run)(PyllamaCudaOpened* opened, int32_t verb, int32_t layer);    // a PyllamaCudaVerb
  int (*load_x)(PyllamaCudaOpened* opened, const float* x);              // [n_tok, dim], host memory, as store_x
  int (*store_x)(PyllamaCudaOpened* opened, float* x);
  int (*logits)(PyllamaCudaOpened* opened, const float** logits);   // host memory, valid until the next begin
  int (*drawn)(PyllamaCudaOpened* opened, const int32_t** tokens);  // [n_out] likewise; -1: logits are not finite
  int (*end)(PyllamaCudaOpened* opened);
  int (*profile)(PyllamaCudaOpened* opened, int32_t on, PyllamaCudaTimes* since_last_call);
} PyllamaCudaTable;

// The only symbol that the library exports.
#define PYLLAMA_CUDA_SYMBOL "pyllama_cuda_table"
const PyllamaCudaTable* pyllama_cuda_table(void);

#ifdef __cplusplus
}
#endif
