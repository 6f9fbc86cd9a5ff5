/* The ops of domain actgraph as custom operators of onnxruntime: RegisterCustomOps, which sessions look up by that name.

Ops and their kernels come from a table: filled through ag_add_op and ag_add_variant (by Python, with functions that numba has
compiled), or compiled in (by `actgraph build-plugin`). Nothing here knows what an op computes. */
#include "plugin.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static struct {
  pthread_mutex_t lock;
  Entry *entries[MAX_OPS];
  int count, in_domain;
  OrtCustomOpDomain *domain;
} table = {.lock = PTHREAD_MUTEX_INITIALIZER};

const OrtApi *ag_api;
static atomic_long runs;        /* kernels run so far, for tests and profiles */
static atomic_long parts_wanted;

/* One node of a session. */
typedef struct {
  Entry *entry;
  _Atomic(const ag_variant *) variant;
  int64_t template[AG_WORDS]; /* attributes, and the inputs that never change */
  char constant[AG_TENSORS];
  void *converted[AG_TENSORS]; /* constants in the element type of the kernel */
  int64_t types[AG_TENSORS];   /* the element types in which the kernel reads its inputs */
} Node;

static OrtStatus *fail(const Entry *entry, const char *text) {
  char message[400];
  snprintf(message, sizeof message, "actgraph: %s: %s", entry->op.name, text);
  return CreateStatus(api)(ORT_INVALID_ARGUMENT, message);
}

static OrtStatus *describe(const Entry *entry, const OrtValue *value, int64_t *tensor) {
  OrtShape *shape;
  void *address;
  int type;
  size_t rank;
  TRY(GetTensorMutableData(api)((OrtValue *)value, &address));
  TRY(GetTensorTypeAndShape(api)(value, &shape));
  OrtStatus *status = GetTensorElementType(api)(shape, &type);
  if (!status) status = GetDimensionsCount(api)(shape, &rank);
  if (!status && rank > AG_RANK) status = fail(entry, "tensors have at most 8 axes");
  if (!status) status = GetDimensions(api)(shape, tensor + 3, rank);
  ReleaseShape(api)(shape);
  if (status) return status;
  static char nothing; /* an empty tensor may have no address, an absent one has none */
  tensor[0] = (int64_t)(intptr_t)(address ? address : &nothing), tensor[1] = type, tensor[2] = (int64_t)rank;
  return NULL;
}

int64_t ag_choice(const char *choices, const char *text, size_t length) {
  for (int64_t place = 0;; place++) {
    size_t size = strcspn(choices, "|");
    if (size == length && !strncmp(text, choices, length)) return place;
    if (!choices[size]) return -1;
    choices += size + 1;
  }
}

/* Whether a node has an attribute, whatever its kind. */
static int present(const OrtKernelInfo *info, const char *attribute) {
  int64_t integer;
  float number;
  size_t size = 0;
  OrtStatus *status[] = {
      KernelInfoGetAttribute_int64(api)(info, attribute, &integer),
      KernelInfoGetAttribute_float(api)(info, attribute, &number),
      KernelInfoGetAttribute_string(api)(info, attribute, NULL, &size),
      KernelInfoGetAttributeArray_int64(api)(info, attribute, NULL, &size),
      KernelInfoGetAttributeArray_float(api)(info, attribute, NULL, &size),
  };
  int found = 0;
  for (size_t i = 0; i < sizeof status / sizeof *status; i++) {
    found |= !status[i];
    if (status[i]) ReleaseStatus(api)(status[i]);
  }
  return found;
}

static OrtStatus *bad_attribute(const Entry *entry, const ag_attribute *attribute, const char *text) {
  char message[160];
  snprintf(message, sizeof message, "attribute %s %s", attribute->name, text);
  return fail(entry, message);
}

/* Of an attribute that cannot be read. */
static OrtStatus *unread(const Entry *entry, const OrtKernelInfo *info, const ag_attribute *attribute) {
  if (present(info, attribute->name)) return bad_attribute(entry, attribute, "is of the wrong kind");
  return attribute->required ? bad_attribute(entry, attribute, "is missing") : NULL;
}

/* Whether an attribute that onnxruntime gives as no integers is something else: it gives any attribute so. */
static int misread(const OrtKernelInfo *info, const char *attribute) {
  int64_t integer;
  float number;
  size_t size = 0, floats = 0;
  OrtStatus *status[] = {
      KernelInfoGetAttribute_int64(api)(info, attribute, &integer),
      KernelInfoGetAttribute_float(api)(info, attribute, &number),
      KernelInfoGetAttribute_string(api)(info, attribute, NULL, &size),
      KernelInfoGetAttributeArray_float(api)(info, attribute, NULL, &floats),
  };
  int found = !status[0] || !status[1] || !status[2] || (!status[3] && floats);
  for (size_t i = 0; i < sizeof status / sizeof *status; i++)
    if (status[i]) ReleaseStatus(api)(status[i]);
  return found;
}

/* Axes as a set; one that no tensor can have is bit 0. */
static OrtStatus *read_axes(const Entry *entry, const OrtKernelInfo *info, const ag_attribute *attribute, int64_t *word) {
  int64_t axes[AG_RANK];
  size_t count = AG_RANK, wanted = 0;
  OrtStatus *absent = KernelInfoGetAttributeArray_int64(api)(info, attribute->name, NULL, &wanted);
  if (absent) {
    ReleaseStatus(api)(absent);
    return unread(entry, info, attribute);
  }
  if (!wanted && misread(info, attribute->name)) return bad_attribute(entry, attribute, "is of the wrong kind");
  if (wanted > AG_RANK) return bad_attribute(entry, attribute, "has more than 8 axes");
  TRY(KernelInfoGetAttributeArray_int64(api)(info, attribute->name, axes, &count));
  for (*word = 0; count; count--) {
    int64_t axis = axes[count - 1];
    *word |= INT64_C(1) << (axis <= -16 || axis >= 16 ? 0 : axis < 0 ? -axis : 16 + axis);
  }
  return NULL;
}

static OrtStatus *read_attribute(const Entry *entry, const OrtKernelInfo *info, const ag_attribute *attribute, int64_t *word) {
  *word = attribute->fallback;
  if (attribute->kind == 4) return NULL;
  if (attribute->kind == 3) return read_axes(entry, info, attribute, word);
  OrtStatus *status;
  if (attribute->kind == 0) {
    int64_t value;
    if (!(status = KernelInfoGetAttribute_int64(api)(info, attribute->name, &value))) *word = value;
  } else if (attribute->kind == 1) {
    float value;
    if (!(status = KernelInfoGetAttribute_float(api)(info, attribute->name, &value))) {
      double wide = value;
      memcpy(word, &wide, sizeof wide);
    }
  } else {
    char text[64];
    size_t size = 0;
    if (!(status = KernelInfoGetAttribute_string(api)(info, attribute->name, NULL, &size))) {
      *word = -1;
      if (size <= sizeof text) {
        TRY(KernelInfoGetAttribute_string(api)(info, attribute->name, text, &size));
        *word = ag_choice(attribute->choices, text, strlen(text));
      }
      if (*word < 0) return bad_attribute(entry, attribute, "has a value that is no choice");
    }
  }
  if (!status) return NULL;
  ReleaseStatus(api)(status);
  return unread(entry, info, attribute);
}

/* The element type of an input of a node, or of an output; 0: absent. */
static int64_t type_of(const OrtKernelInfo *info, int64_t place, int of_output) {
  OrtTypeInfo *about = NULL;
  const OrtShape *tensor = NULL;
  int type = 0;
  OrtStatus *status = of_output ? KernelInfo_GetOutputTypeInfo(api)(info, (size_t)place, &about)
                                : KernelInfo_GetInputTypeInfo(api)(info, (size_t)place, &about);
  if (!status) status = CastTypeInfoToTensorInfo(api)(about, &tensor);
  if (!status && tensor) status = GetTensorElementType(api)(tensor, &type);
  if (status) ReleaseStatus(api)(status);
  if (about) ReleaseTypeInfo(api)(about);
  return type;
}

static int64_t elements_of(const int64_t *tensor) {
  int64_t count = 1;
  for (int64_t axis = 0; axis < tensor[2]; axis++) count *= tensor[3 + axis];
  return count;
}

static void destroy(void *kernel) {
  Node *node = kernel;
  for (int i = 0; i < AG_TENSORS; i++) free(node->converted[i]);
  free(node);
}

/* Keeps a constant, in the element type in which kernels read it. */
static OrtStatus *keep(Node *node, int64_t input, const OrtValue *value, int64_t wanted) {
  int64_t *tensor = tensor_of(node->template, input);
  TRY(describe(node->entry, value, tensor));
  node->constant[input] = 1;
  if (tensor[1] == wanted) return NULL;
  int64_t count = elements_of(tensor);
  void *memory = malloc(4 * (size_t)count + 4);
  if (!memory) return CreateStatus(api)(ORT_FAIL, "actgraph: no memory");
  node->converted[input] = memory;
  if (!ag_convert((const void *)(intptr_t)tensor[0], tensor[1], memory, wanted, count))
    return fail(node->entry, "an input has a type that no kernel takes");
  tensor[0] = (int64_t)(intptr_t)memory, tensor[1] = wanted;
  return NULL;
}

/* Refuses inputs of types that no kernel reads: nothing else looks at those that choose no kernel. */
static OrtStatus *check_types(const Entry *entry, const OrtKernelInfo *info) {
  static const char *const kinds[] = {"no type", "float32", "uint8", "int8", "uint16", "int16", "int32", "int64", "string",
                                      "bool", "float16", "float64", "uint32", "uint64", "complex64", "complex128", "bfloat16",
                                      "float8e4m3fn", "float8e4m3fnuz", "float8e5m2", "float8e5m2fnuz", "uint4", "int4"};
  const char *name = entry->op.input_names;
  for (int64_t i = 0; i < entry->op.inputs; i++) {
    int64_t type = type_of(info, i, 0);
    int length = (int)strcspn(name, "|");
    if (type < 0 || type > 62 || !((entry->op.accepts[i] | 1) >> type & 1)) {
      char message[200];
      const char *kind = type >= 0 && type < (int64_t)(sizeof kinds / sizeof *kinds) ? kinds[type] : "of another type";
      snprintf(message, sizeof message, "input %.*s is %s, which its kernels do not read", length, name, kind);
      return fail(entry, message);
    }
    name += length + (name[length] != 0);
  }
  return NULL;
}

/* An op whose outputs have the type that an attribute names takes that type from the model: see input_kind. */
static OrtStatus *check_result(const Entry *entry, const OrtKernelInfo *info, int64_t *frame) {
  const ag_op *op = &entry->op;
  size_t given;
  if (op->result_attribute < 0) return NULL;
  TRY(KernelInfo_GetInputCount(api)(info, &given));
  if ((int64_t)given > op->inputs) return fail(entry, "has more inputs than the op");
  if (type_of(info, 0, 1) != op->result_type[attributes_of(op, frame)[op->result_attribute]])
    return bad_attribute(entry, op->attribute + op->result_attribute, "names another type than the model gives its output");
  return NULL;
}

static OrtStatus *fill(Node *node, const OrtKernelInfo *info, int64_t *types) {
  Entry *entry = node->entry;
  const ag_op *op = &entry->op;
  int64_t *attributes = attributes_of(op, node->template);
  for (int64_t i = 0; i < op->attributes; i++) TRY(read_attribute(entry, info, op->attribute + i, attributes + i));
  int64_t frame[AG_WORDS] = {0};
  memcpy(attributes_of(op, frame), attributes, sizeof(int64_t) * (size_t)op->attributes);
  for (int64_t i = 0; i < op->inputs; i++) {
    int64_t *tensor = tensor_of(frame, i);
    tensor[0] = tensor[1] = types[i] = type_of(info, i, 0); /* absent where the type is 0 */
  }
  const ag_variant *variant = ag_find(entry, frame);
  if (!variant) return fail(entry, "there is no kernel for these types and attributes");
  TRY(check_types(entry, info));
  TRY(check_result(entry, info, frame));
  atomic_store(&node->variant, variant);
  for (int64_t i = 0; i < op->inputs; i++) {
    int constant = 0;
    const OrtValue *value = NULL;
    OrtStatus *absent = KernelInfoGetConstantInput(api)(info, (size_t)i, &constant, &value);
    if (absent) ReleaseStatus(api)(absent);
    else if (constant && value) TRY(keep(node, i, value, tensor_of(frame, i)[1]));
    types[i] = tensor_of(frame, i)[1];
  }
  return NULL;
}

static OrtStatus *create(const OrtCustomOp *custom, const OrtApi *unused, const OrtKernelInfo *info, void **made) {
  (void)unused;
  const Face *face = (const Face *)custom;
  if (type_of(info, 0, 0) == FLOAT64 && face->entry->op.input_type[0] == FLOAT32)
    return fail(face->entry, "its kernels do not compute in float64; save the file with all ops inlined (--inline all), or "
                             "open it without the plugin");
  Node *node = calloc(1, sizeof *node);
  if (!node) return CreateStatus(api)(ORT_FAIL, "actgraph: no memory");
  node->entry = face->entry;
  OrtStatus *status = fill(node, info, node->types);
  if (status) destroy(node);
  else *made = node;
  return status;
}

/* The kernel for the element types that stand in a frame. */
static const ag_variant *exactly(const Entry *entry, int64_t *frame) {
  const ag_op *op = &entry->op;
  int64_t key[AG_KEY] = {0};
  int64_t used = 0;
  for (int64_t i = 0; i < op->key_inputs; i++) {
    const int64_t *tensor = tensor_of(frame, op->key_input[i]);
    key[used++] = tensor[0] ? tensor[1] : 0;
  }
  for (int64_t i = 0; i < op->key_attributes; i++) key[used++] = attributes_of(op, frame)[op->key_attribute[i]];
  int count = atomic_load(&entry->count);
  for (int i = 0; i < count; i++)
    if (!memcmp(key, entry->variants[i].key, sizeof key)) return entry->variants + i;
  return NULL;
}

const ag_variant *ag_find(const Entry *entry, int64_t *frame) {
  const ag_op *op = &entry->op;
  char chooses[AG_TENSORS] = {0};
  for (int64_t i = 0; i < op->key_inputs; i++) chooses[op->key_input[i]] = 1;
  for (int64_t i = 0; i < op->inputs; i++) {
    int64_t *tensor = tensor_of(frame, i);
    if (!tensor[0] || chooses[i]) continue;
    tensor[1] = ag_read_as(op, i, tensor[1]);
    if (op->input_type[i] > 0 && tensor[1] != op->input_type[i]) return NULL;
  }
  const ag_variant *found = exactly(entry, frame);
  if (found) return found;
  for (int64_t i = 0; i < op->key_inputs; i++) {
    int64_t *tensor = tensor_of(frame, op->key_input[i]);
    if (tensor[0]) tensor[1] = ag_read_as(op, op->key_input[i], tensor[1]);
  }
  return exactly(entry, frame);
}

typedef struct {
  ag_function function;
  int64_t *frame, nparts;
  atomic_long failure;
} Job;

static void run_part(void *user, size_t part) {
  Job *job = user;
  long failed = (long)job->function(job->frame, (int64_t)part, job->nparts), none = 0;
  if (failed) atomic_compare_exchange_strong(&job->failure, &none, failed);
}

static int64_t parts(void) {
  long wanted = atomic_load(&parts_wanted);
  if (wanted > 0) return wanted;
#if defined(_SC_NPROCESSORS_ONLN)
  wanted = sysconf(_SC_NPROCESSORS_ONLN);
#endif
  wanted = wanted < 1 ? 1 : wanted > 64 ? 64 : wanted;
  atomic_store(&parts_wanted, wanted);
  return wanted;
}

static OrtStatus *failed_with(const Entry *entry, int64_t error) {
  return fail(entry, error >= 1 && error <= entry->op.errors ? entry->op.error[error - 1] : "the kernel failed");
}

static int64_t rounded_up(int64_t bytes) { return (bytes + 63) / 64 * 64; }

/* Runs a kernel over a frame whose tensors all have their memory. */
static OrtStatus *run_stages(const Entry *entry, OrtKernelContext *context, const ag_variant *variant, int64_t *frame) {
  int64_t failed = 0;
  for (int64_t i = 0; i < variant->stages && !failed; i++) {
    if (variant->parallel[i] && frame[1] > 1) {
      Job job = {variant->stage[i], frame, frame[1], 0};
      TRY(KernelContext_ParallelFor(api)(context, run_part, (size_t)frame[1], (size_t)frame[1], &job));
      failed = atomic_load(&job.failure);
    } else {
      failed = variant->stage[i](frame, 0, 1);
    }
  }
  return failed ? failed_with(entry, failed) : NULL;
}

static OrtStatus *compute(void *kernel, OrtKernelContext *context) {
  Node *node = kernel;
  const Entry *entry = node->entry;
  const ag_op *op = &entry->op;
  const ag_variant *variant = node->variant;
  int64_t frame[AG_WORDS], stored[AG_TENSORS] = {0}, wanted = 0; /* stored: the type of a tensor that is converted */
  memcpy(frame, node->template, sizeof(int64_t) * (size_t)(AG_HEAD + AG_TENSOR * (op->inputs + op->outputs) + op->attributes));
  size_t given;
  TRY(KernelContext_GetInputCount(api)(context, &given));
  for (int64_t i = 0; i < op->inputs && i < (int64_t)given; i++) {
    if (node->constant[i]) continue;
    const OrtValue *value = NULL;
    int64_t *tensor = tensor_of(frame, i);
    TRY(KernelContext_GetInput(api)(context, (size_t)i, &value));
    if (!value) continue;
    TRY(describe(entry, value, tensor));
    if (tensor[1] == node->types[i]) continue;
    stored[i] = tensor[1], tensor[1] = node->types[i];
    wanted += rounded_up(4 * elements_of(tensor));
  }
  int64_t failed = variant->shape(frame, 0, 1);
  if (failed) return failed_with(entry, failed);
  void *results[AG_TENSORS] = {0};
  for (int64_t i = 0; i < op->outputs; i++) {
    int64_t place = op->inputs + i, *tensor = tensor_of(frame, place);
    OrtValue *value = NULL;
    TRY(KernelContext_GetOutput(api)(context, (size_t)i, tensor + 3, (size_t)tensor[2], &value));
    if (value) TRY(describe(entry, value, tensor));
    int64_t own_type = written(op, frame, i);
    if (!value || tensor[1] == own_type) continue;
    results[i] = (void *)(intptr_t)tensor[0], stored[place] = tensor[1], tensor[1] = own_type;
    wanted += rounded_up(4 * elements_of(tensor));
  }
  frame[1] = parts();
  int64_t own = variant->scratch ? rounded_up(variant->scratch(frame, 0, 1)) : 0;
  if (own + wanted) {
    frame[0] = (int64_t)(intptr_t)ag_scratch((size_t)(own + wanted));
    if (!frame[0]) return fail(entry, "no memory");
  }
  int64_t next = frame[0] + own;
  for (int64_t i = 0; wanted && i < op->inputs + op->outputs; i++) {
    if (!stored[i]) continue;
    int64_t *tensor = tensor_of(frame, i);
    void *memory = (void *)(intptr_t)next;
    if (i < op->inputs && !ag_convert((const void *)(intptr_t)tensor[0], stored[i], memory, tensor[1], elements_of(tensor)))
      return fail(entry, "an input has another type than the model says");
    tensor[0] = next, next += rounded_up(4 * elements_of(tensor));
  }
  TRY(run_stages(entry, context, variant, frame));
  for (int64_t i = 0; wanted && i < op->outputs; i++) {
    const int64_t *tensor = tensor_of(frame, op->inputs + i), wanted_type = stored[op->inputs + i];
    const void *from = (const void *)(intptr_t)tensor[0];
    if (results[i] && !ag_convert(from, tensor[1], results[i], wanted_type, elements_of(tensor)))
      return fail(entry, "an output has a type that no kernel writes");
  }
  atomic_fetch_add_explicit(&runs, 1, memory_order_relaxed);
  return NULL;
}

static const ag_op *op_of(const OrtCustomOp *custom) { return &((const Face *)custom)->entry->op; }
static const char *name(const OrtCustomOp *custom) { return op_of(custom)->name; }
static const char *provider(const OrtCustomOp *custom) { return (void)custom, NULL; }
/* onnxruntime finds the types of outputs from those of inputs, before it asks the op. Where an attribute decides, it must find
nothing, and take what the model says: that is so for a list of inputs of any types. */
static int listed(const OrtCustomOp *custom) { return op_of(custom)->result_attribute >= 0; }
static size_t inputs(const OrtCustomOp *custom) { return listed(custom) ? 1 : (size_t)op_of(custom)->inputs; }
static size_t outputs(const OrtCustomOp *custom) { return (size_t)op_of(custom)->outputs; }
/* 0: required, 1: optional, 2: a list */
static int input_kind(const OrtCustomOp *custom, size_t i) { return listed(custom) ? 2 : op_of(custom)->optional[i] ? 1 : 0; }
static int least(const OrtCustomOp *custom) {
  int count = 0;
  while (count < op_of(custom)->inputs && !op_of(custom)->optional[count]) count++;
  return count;
}
/* All inputs but the first may be of any type: what kernels do not read is converted or refused. */
static int input_type(const OrtCustomOp *custom, size_t i) { return i ? 0 : (int)((const Face *)custom)->type; }
static int output_type(const OrtCustomOp *custom, size_t i) {
  if (listed(custom)) return 0;
  return (int)(op_of(custom)->follows ? ((const Face *)custom)->type : op_of(custom)->output_type[i]);
}
static int required(const OrtCustomOp *custom, size_t i) { return (void)custom, (void)i, 0; }
static int zero(const OrtCustomOp *custom) { return (void)custom, 0; }
static int one(const OrtCustomOp *custom) { return (void)custom, 1; }
static int newest(const OrtCustomOp *custom) { return (void)custom, INT32_MAX; }

static Entry *lookup(const char *wanted) {
  for (int i = 0; i < table.count; i++)
    if (!strcmp(table.entries[i]->op.name, wanted)) return table.entries[i];
  return NULL;
}

static Face face_of(Entry *entry, int64_t type) {
  return (Face){
      .custom = {.version = ORT_API_VERSION, .GetName = name, .GetExecutionProviderType = provider, .GetInputType = input_type,
                 .GetInputTypeCount = inputs, .GetOutputType = output_type, .GetOutputTypeCount = outputs,
                 .KernelDestroy = destroy, .GetInputCharacteristic = input_kind, .GetOutputCharacteristic = required,
                 .GetInputMemoryType = required,
                 .GetVariadicInputMinArity = least, .GetVariadicInputHomogeneity = zero, .GetVariadicOutputMinArity = zero,
                 .GetVariadicOutputHomogeneity = one, .CreateKernelV2 = create, .KernelComputeV2 = compute,
                 .InferOutputShapeFn = ag_infer, .GetStartVersion = one, .GetEndVersion = newest},
      .entry = entry, .type = type};
}

/* Adds an op, whose texts must stay where they are. Returns 0, or 1 when there is no room. */
AG_SHARED int64_t ag_add_op(const ag_op *op) {
  static const int64_t floats[] = {FLOAT32, FLOAT16, BFLOAT16, FLOAT64}; /* a schema of ours hides the body: see create */
  pthread_mutex_lock(&table.lock);
  int64_t full = 0;
  if (!lookup(op->name)) {
    Entry *entry = table.count < MAX_OPS ? calloc(1, sizeof *entry) : NULL;
    if (entry) {
      entry->op = *op;
      int several = op->input_type[0] == FLOAT32 && op->result_attribute < 0;
      entry->faces_count = several ? MAX_FACES : 1;
      for (int i = 0; i < entry->faces_count; i++)
        entry->faces[i] = face_of(entry, several ? floats[i] : op->result_attribute < 0 ? op->input_type[0] : 0);
      table.entries[table.count++] = entry;
    }
    full = !entry;
  }
  pthread_mutex_unlock(&table.lock);
  return full;
}

/* Adds a kernel to an op, unless it has one with the same key. Returns 0, or 1 when there is no such op or no room. */
AG_SHARED int64_t ag_add_variant(const char *op, const ag_variant *variant) {
  pthread_mutex_lock(&table.lock);
  Entry *entry = lookup(op);
  int64_t failed = 1;
  if (entry) {
    int count = atomic_load(&entry->count), place = 0;
    while (place < count && memcmp(entry->variants[place].key, variant->key, sizeof variant->key)) place++;
    if (place < MAX_VARIANTS) {
      failed = 0;
      if (place == count) {
        entry->variants[place] = *variant;
        atomic_store(&entry->count, count + 1);
      }
    }
  }
  pthread_mutex_unlock(&table.lock);
  return failed;
}

/* How many parts the parallel stages have; 0: one for each processor. */
AG_SHARED void ag_set_parts(int64_t wanted) { atomic_store(&parts_wanted, (long)wanted); }
AG_EXPORT int64_t ag_runs(void) { return atomic_load(&runs); }

/* The domain of all ops so far, which no session ever gives back: another one only when there are more ops. */
static OrtStatus *current_domain(void) {
  if (table.domain && table.in_domain == table.count) return NULL;
  OrtCustomOpDomain *made;
  TRY(CreateCustomOpDomain(api)("actgraph", &made));
  for (int i = 0; i < table.count; i++)
    for (int j = 0; j < table.entries[i]->faces_count; j++)
      TRY(CustomOpDomain_Add(api)(made, &table.entries[i]->faces[j].custom));
  table.domain = made, table.in_domain = table.count;
  return NULL;
}

/* Adds the kernels of this library for the processor that it runs on. Returns NULL, or why there are none. */
const char *ag_compiled_in(void) __attribute__((weak));

AG_EXPORT OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base) {
  const OrtApi *found = base->GetApi(ORT_API_VERSION);
  if (!found) {
    const OrtApi *oldest = base->GetApi(1);
    return oldest ? CreateStatus(oldest)(ORT_FAIL, "actgraph: its kernels need onnxruntime 1.17 or newer") : NULL;
  }
  ag_api = found;
  const char *unfit = ag_compiled_in ? ag_compiled_in() : NULL;
  if (unfit) return CreateStatus(api)(ORT_FAIL, unfit);
  pthread_mutex_lock(&table.lock);
  OrtStatus *status = current_domain();
  if (!status) status = AddCustomOpDomain(api)(options, table.domain);
  pthread_mutex_unlock(&table.lock);
  return status;
}
