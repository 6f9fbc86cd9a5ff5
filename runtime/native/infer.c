/* Shapes of outputs before anything runs, symbolic sizes kept.

The shape function of a kernel computes sizes from sizes. It is called twice, with other numbers in place of the unknown
sizes: an output size that stays is known, one that is the number of an unknown size both times is that size, all others are
unknown. */
#include "plugin.h"

#include <stdio.h>
#include <string.h>

enum { MOST = AG_TENSORS * AG_RANK };

/* The sizes of a node's inputs that are not numbers. */
typedef struct {
  const char *name[MOST]; /* "": nobody gave it a name, and each stands for itself */
  int count;
} Unknown;

static int64_t stand_in(int place, int round) { return round ? 20011 + 3 * place : 10007 + place; }

static int place_of(Unknown *unknown, const char *name) {
  for (int i = 0; *name && i < unknown->count; i++)
    if (!strcmp(unknown->name[i], name)) return i;
  if (unknown->count >= MOST) return -1;
  unknown->name[unknown->count] = name;
  return unknown->count++;
}

/* Writes an input into both frames. Returns 0 where its rank is not known or too large. */
static int describe(const OrtShape *shape, int64_t *frames[2], int64_t input, Unknown *unknown, const char *there) {
  int type;
  size_t rank;
  int64_t sizes[AG_RANK];
  const char *names[AG_RANK];
  OrtStatus *status = GetTensorElementType(api)(shape, &type);
  if (!status && !type) return 0; /* absent */
  if (!status) status = GetDimensionsCount(api)(shape, &rank);
  if (!status && rank > AG_RANK) return 0;
  if (!status) status = GetDimensions(api)(shape, sizes, rank);
  if (!status) status = GetSymbolicDimensions(api)(shape, names, rank);
  if (status) {
    ReleaseStatus(api)(status);
    return 0;
  }
  int places[AG_RANK] = {0};
  for (size_t axis = 0; axis < rank; axis++)
    if (sizes[axis] < 0 && (places[axis] = place_of(unknown, names[axis] ? names[axis] : "")) < 0) return 0;
  for (int round = 0; round < 2; round++) {
    int64_t *tensor = tensor_of(frames[round], input);
    tensor[0] = (int64_t)(intptr_t)there, tensor[1] = type, tensor[2] = (int64_t)rank;
    for (size_t axis = 0; axis < rank; axis++)
      tensor[3 + axis] = sizes[axis] < 0 ? stand_in(places[axis], round) : sizes[axis];
  }
  return 1;
}

static void read_attribute(const OrtShapeInferContext *context, const ag_attribute *attribute, int64_t *word) {
  const OrtOpAttr *found = NULL;
  *word = attribute->fallback;
  OrtStatus *status = ShapeInferContext_GetAttribute(api)(context, attribute->name, &found);
  if (!status && found) {
    size_t used = 0;
    char text[64];
    int64_t integer;
    float number;
    if (attribute->kind == 0 && !(status = ReadOpAttr(api)(found, ORT_ATTRIBUTE_INT, &integer, sizeof integer, &used))) {
      *word = integer;
    } else if (attribute->kind == 1 && !(status = ReadOpAttr(api)(found, ORT_ATTRIBUTE_FLOAT, &number, sizeof number, &used))) {
      double wide = number;
      memcpy(word, &wide, sizeof wide);
    } else if (attribute->kind == 2 && !(status = ReadOpAttr(api)(found, ORT_ATTRIBUTE_STRING, text, sizeof text, &used))) {
      int64_t place = ag_choice(attribute->choices, text, strnlen(text, used < sizeof text ? used : sizeof text));
      if (place >= 0) *word = place;
    }
  }
  if (status) ReleaseStatus(api)(status); /* the node does not have it; a wrong one is refused when the kernel is made */
}

static OrtStatus *set_output(OrtShapeInferContext *context, size_t output, int64_t type, int64_t *frames[2], int64_t tensor,
                             const Unknown *unknown) {
  const int64_t *first = tensor_of(frames[0], tensor), *second = tensor_of(frames[1], tensor);
  static atomic_uint made_up; /* onnxruntime takes a size without a name for the number -1, so each gets a name of its own */
  int64_t sizes[AG_RANK];
  const char *names[AG_RANK];
  char own[AG_RANK][32];
  for (int64_t axis = 0; axis < first[2]; axis++) {
    int64_t size = first[3 + axis];
    int known = size == second[3 + axis];
    sizes[axis] = known ? size : -1, names[axis] = "";
    for (int place = 0; !known && place < unknown->count; place++)
      if (size == stand_in(place, 0) && second[3 + axis] == stand_in(place, 1)) names[axis] = unknown->name[place];
    if (known || *names[axis]) continue;
    snprintf(own[axis], sizeof own[axis], "actgraph_%u", atomic_fetch_add(&made_up, 1));
    names[axis] = own[axis];
  }
  OrtShape *made;
  TRY(CreateShape(api)(&made));
  OrtStatus *status = SetTensorElementType(api)(made, (int)type);
  if (!status) status = SetDimensions(api)(made, sizes, (size_t)first[2]);
  if (!status) status = SetSymbolicDimensions(api)(made, names, (size_t)first[2]);
  if (!status) status = ShapeInferContext_SetOutputTypeShape(api)(context, output, made);
  ReleaseShape(api)(made);
  return status;
}

OrtStatus *ag_infer(const OrtCustomOp *custom, OrtShapeInferContext *context) {
  const Entry *entry = ((const Face *)custom)->entry; /* onnxruntime asks one face about the nodes of all */
  const ag_op *op = &entry->op;
  static const char there;
  int64_t words[2][AG_WORDS] = {{0}}, *frames[2] = {words[0], words[1]};
  Unknown unknown = {.count = 0};
  size_t given;
  TRY(ShapeInferContext_GetInputCount(api)(context, &given));
  for (int64_t i = 0; i < op->inputs && i < (int64_t)given; i++) {
    OrtShape *shape = NULL; /* onnxruntime's own */
    OrtStatus *status = ShapeInferContext_GetInputTypeShape(api)(context, (size_t)i, &shape);
    if (status) {
      ReleaseStatus(api)(status);
      if (!op->optional[i]) return NULL;
    } else if (!describe(shape, frames, i, &unknown, &there) && !op->optional[i]) {
      return NULL; /* nothing is said */
    } else if (i == 0 && tensor_of(frames[0], 0)[2] == 0) {
      return NULL; /* onnxruntime shows a tensor of unknown rank as one without axes */
    }
  }
  for (int64_t i = 0; i < op->attributes; i++) {
    int64_t *word = attributes_of(op, frames[0]) + i;
    read_attribute(context, op->attribute + i, word);
    attributes_of(op, frames[1])[i] = *word;
  }
  int64_t main_type = tensor_of(frames[0], 0)[1];
  for (int round = 0; round < 2; round++) {
    const ag_variant *variant = ag_find(entry, frames[round]);
    if (!variant || variant->shape(frames[round], 0, 1)) return NULL;
  }
  for (int64_t i = 0; i < op->outputs; i++) {
    int64_t type = op->follows ? main_type : op->output_type[i]; /* onnxruntime takes it from elsewhere: see input_kind */
    if (op->result_attribute >= 0) type = op->result_type[attributes_of(op, frames[0])[op->result_attribute]];
    TRY(set_output(context, (size_t)i, type, frames, op->inputs + i, &unknown));
  }
  return NULL;
}
