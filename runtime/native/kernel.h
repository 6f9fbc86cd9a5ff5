/* How kernels are called. See runtime/kernels/numba/frame.py for the same in Python.

A kernel is a few functions over a frame, an array of 64-bit words that holds everything about one call:
    0  address of scratch memory
    1  how many parts the parallel stages have
    2  spare
    3  spare
    4 + 12 i       tensor i (inputs, then outputs): address (0: absent), ONNX element type, rank, 8 sizes, room (0, or
                   how many rows of the last axis lie between neighbours on the third axis from the end)
    4 + 12 T + j   attribute j: an integer, the bits of a double, the index of a string among its choices, or axes
                   as a set: bit k for axis -k, bit 16 + k for axis k, bit 0 for one that no tensor has
Every function is called as f(frame, part, nparts) and returns 0, or the number of an error text of its op. `shape` looks at
types, ranks, sizes, attributes and at which inputs are present, never at what is in a tensor. */
#ifndef ACTGRAPH_KERNEL_H
#define ACTGRAPH_KERNEL_H
#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define AG_EXPORT __declspec(dllexport)
#else
#define AG_EXPORT __attribute__((visibility("default")))
#endif
#if defined(AG_ALONE) /* a library of its own shows engines what they look up, and nothing else */
#define AG_SHARED
#else
#define AG_SHARED AG_EXPORT
#endif

enum { AG_HEAD = 4, AG_TENSOR = 12, AG_RANK = 8, AG_TENSORS = 24, AG_ATTRIBUTES = 24, AG_STAGES = 6, AG_KEY = 8, AG_CHOICES = 8 };
enum { AG_WORDS = AG_HEAD + AG_TENSOR * AG_TENSORS + AG_ATTRIBUTES };

enum { AG_AS_IT_IS = -1 }; /* an input of several types, which kernels tell apart: only float64 is converted */

typedef int64_t (*ag_function)(int64_t *frame, int64_t part, int64_t nparts);

typedef struct {
  int64_t key[AG_KEY];          /* element types of the key inputs, then values of the key attributes */
  ag_function shape;            /* fills in the ranks and sizes of the outputs, and checks the inputs */
  ag_function scratch;          /* returns the bytes of scratch memory that it wants; NULL: none */
  int64_t stages;
  ag_function stage[AG_STAGES];
  int64_t parallel[AG_STAGES];  /* 1: called for parts 0..nparts-1 by several threads, 0: once */
} ag_variant;

/* One call among several that are known beforehand. group: neighbours of the same one need nothing of each other, and have one
   parallel stage each; 0: alone. shares: what stages before that have left in scratch memory is that of the step before. */
typedef struct {
  const ag_variant *variant;
  int64_t *frame, group, shares;
} ag_step;

typedef struct {
  const char *name;
  int64_t kind;                 /* 0: integer, 1: float, 2: string, 3: axes, 4: in no frame */
  int64_t fallback;             /* its value where the node has none, as in the frame */
  const char *choices;          /* of a string, separated by | */
  int64_t required;             /* 1: a node must have it */
} ag_attribute;

typedef struct {
  const char *name;
  int64_t inputs, outputs, attributes;
  int64_t input_type[AG_TENSORS];     /* ONNX element type that kernels read; 0: several; AG_AS_IT_IS */
  int64_t accepts[AG_TENSORS];        /* what a node may give: bit t for ONNX element type t */
  const char *input_names;            /* separated by | */
  int64_t optional[AG_TENSORS];
  int64_t output_type[AG_TENSORS];    /* ONNX element type that kernels write */
  int64_t follows;                    /* 1: outputs are rounded to the type of input 0 */
  int64_t result_attribute;           /* an attribute that names the type of the outputs; -1: none */
  int64_t result_type[AG_CHOICES];    /* by its choice: the ONNX element type of the outputs, and the one that kernels write */
  int64_t written_type[AG_CHOICES];
  int64_t key_input[AG_KEY], key_inputs;
  int64_t key_attribute[AG_KEY], key_attributes;
  const ag_attribute *attribute;
  const char *const *error;           /* error[n - 1] is the text of error n */
  int64_t errors;
} ag_op;

/* Runs f for every part, on as many threads; returns 0, or the error of one of the parts that failed. */
int64_t ag_parallel(ag_function f, int64_t *frame, int64_t nparts);
/* Scratch memory of this thread, aligned to 64 bytes, at least `bytes` large; NULL when there is none. */
void *ag_scratch(size_t bytes);
#endif
