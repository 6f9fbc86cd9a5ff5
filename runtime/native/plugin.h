/* What the files of the plugin share. */
#ifndef ACTGRAPH_PLUGIN_H
#define ACTGRAPH_PLUGIN_H
#include "kernel.h"
#include "ort_api.h"

#include <stdatomic.h>

enum { MAX_OPS = 128, MAX_VARIANTS = 128, MAX_FACES = 4 };
enum { FLOAT32 = 1, UINT8 = 2, INT8 = 3, UINT16 = 4, INT16 = 5, INT32 = 6, FLOAT16 = 10, FLOAT64 = 11, BFLOAT16 = 16, UINT4 = 21, INT4 = 22 };

struct Entry;

/* An op as onnxruntime sees it: one for each element type that input 0 may have. */
typedef struct {
  OrtCustomOp custom; /* first: onnxruntime hands it back */
  struct Entry *entry;
  int64_t type; /* of input 0; 0: any, told apart when a kernel is made */
} Face;

typedef struct Entry {
  ag_op op;
  ag_variant variants[MAX_VARIANTS];
  atomic_int count;
  Face faces[MAX_FACES];
  int faces_count;
} Entry;

extern const OrtApi *ag_api;
#define api ag_api

#define TRY(call)                    \
  do {                               \
    OrtStatus *failed_ = (call);     \
    if (failed_) return failed_;     \
  } while (0)

static inline int64_t *tensor_of(int64_t *frame, int64_t tensor) { return frame + AG_HEAD + AG_TENSOR * tensor; }
static inline int64_t *attributes_of(const ag_op *op, int64_t *frame) { return tensor_of(frame, op->inputs + op->outputs); }

/* The element type that kernels write to an output. */
static inline int64_t written(const ag_op *op, int64_t *frame, int64_t output) {
  if (op->result_attribute < 0) return op->output_type[output];
  return op->written_type[attributes_of(op, frame)[op->result_attribute]];
}

/* The kernel for the element types and attributes in a frame; NULL: none. Types in the frame become those of the kernel. */
const ag_variant *ag_find(const Entry *entry, int64_t *frame);
/* The place of a text among choices separated by |; -1: none of them. */
int64_t ag_choice(const char *choices, const char *text, size_t length);

/* The element type as which kernels of an op read values of `type` at input `input`: another one where they are converted. */
int64_t ag_read_as(const ag_op *op, int64_t input, int64_t type);
/* Converts `count` values between element types; false where there is no such conversion. */
int ag_convert(const void *from, int64_t type, void *to, int64_t wanted, int64_t count);

/* InferOutputShapeFn */
OrtStatus *ag_infer(const OrtCustomOp *custom, OrtShapeInferContext *context);
#endif
