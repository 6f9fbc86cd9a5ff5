/* The ops of domain actgraph as custom operators of onnxruntime: RegisterCustomOps, which sessions look up by that name.

Ops and their kernels come from a table: filled through ag_add_op and ag_add_variant (by Python, with functions that numba has
compiled), or compiled in (by `actgraph build-plugin`). Nothing here knows what an op computes. */
#include "kernel.h"
#include "ort_api.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { MAX_OPS = 128, MAX_VARIANTS = 128 };

typedef struct {
  OrtCustomOp face; /* first: onnxruntime hands it back */
  ag_op op;
  ag_variant variants[MAX_VARIANTS];
  atomic_int count;
} Entry;

static struct {
  pthread_mutex_t lock;
  Entry *entries[MAX_OPS];
  int count;
} table = {.lock = PTHREAD_MUTEX_INITIALIZER};

static const OrtApi *api;
static atomic_long runs;        /* kernels run so far, for tests and profiles */
static atomic_long parts_wanted;

#define TRY(call)                    \
  do {                               \
    OrtStatus *failed_ = (call);     \
    if (failed_) return failed_;     \
  } while (0)

/* One node of a session. */
typedef struct {
  Entry *entry;
  _Atomic(const ag_variant *) variant;
  int64_t template[AG_WORDS]; /* attributes, and the inputs that never change */
  char constant[AG_TENSORS];
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

static OrtStatus *read_attribute(const OrtKernelInfo *info, const ag_attribute *attribute, int64_t *word) {
  *word = attribute->fallback;
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
    size_t size = sizeof text;
    if (!(status = KernelInfoGetAttribute_string(api)(info, attribute->name, text, &size))) {
      int64_t index = 0;
      for (const char *choice = attribute->choices;; index++) {
        size_t length = strcspn(choice, "|");
        if (strlen(text) == length && !strncmp(text, choice, length)) {
          *word = index;
          return NULL;
        }
        if (!choice[length]) return CreateStatus(api)(ORT_INVALID_ARGUMENT, "actgraph: an attribute has a value that is no choice");
        choice += length + 1;
      }
    }
  }
  if (status) ReleaseStatus(api)(status); /* the node does not have it */
  return NULL;
}

static OrtStatus *create(const OrtCustomOp *face, const OrtApi *unused, const OrtKernelInfo *info, void **made) {
  (void)unused;
  Entry *entry = (Entry *)face;
  Node *node = calloc(1, sizeof *node);
  if (!node) return CreateStatus(api)(ORT_FAIL, "actgraph: no memory");
  node->entry = entry;
  const ag_op *op = &entry->op;
  OrtStatus *status = NULL;
  int64_t *attributes = node->template + AG_HEAD + AG_TENSOR * (op->inputs + op->outputs);
  for (int64_t i = 0; i < op->attributes && !status; i++) status = read_attribute(info, op->attribute + i, attributes + i);
  for (int64_t i = 0; i < op->inputs && !status; i++) {
    int constant = 0;
    const OrtValue *value = NULL;
    OrtStatus *absent = KernelInfoGetConstantInput(api)(info, (size_t)i, &constant, &value);
    if (absent) {
      ReleaseStatus(api)(absent);
    } else if (constant && value) {
      node->constant[i] = 1;
      status = describe(entry, value, node->template + AG_HEAD + AG_TENSOR * i);
    }
  }
  if (status) free(node);
  else *made = node;
  return status;
}

static const ag_variant *find(const Entry *entry, const int64_t *frame) {
  const ag_op *op = &entry->op;
  int64_t key[AG_KEY] = {0};
  int64_t used = 0;
  const int64_t *attributes = frame + AG_HEAD + AG_TENSOR * (op->inputs + op->outputs);
  for (int64_t i = 0; i < op->key_inputs; i++) {
    const int64_t *tensor = frame + AG_HEAD + AG_TENSOR * op->key_input[i];
    key[used++] = tensor[0] ? tensor[1] : 0;
  }
  for (int64_t i = 0; i < op->key_attributes; i++) key[used++] = attributes[op->key_attribute[i]];
  int count = atomic_load(&entry->count);
  for (int i = 0; i < count; i++)
    if (!memcmp(key, entry->variants[i].key, sizeof key)) return entry->variants + i;
  return NULL;
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

static OrtStatus *compute(void *kernel, OrtKernelContext *context) {
  Node *node = kernel;
  Entry *entry = node->entry;
  const ag_op *op = &entry->op;
  int64_t frame[AG_WORDS];
  memcpy(frame, node->template, sizeof(int64_t) * (size_t)(AG_HEAD + AG_TENSOR * (op->inputs + op->outputs) + op->attributes));
  size_t given;
  TRY(KernelContext_GetInputCount(api)(context, &given));
  for (int64_t i = 0; i < op->inputs && i < (int64_t)given; i++) {
    if (node->constant[i]) continue;
    const OrtValue *value = NULL;
    TRY(KernelContext_GetInput(api)(context, (size_t)i, &value));
    if (value) TRY(describe(entry, value, frame + AG_HEAD + AG_TENSOR * i));
  }
  const ag_variant *variant = atomic_load(&node->variant);
  if (!variant) {
    if (!(variant = find(entry, frame))) return fail(entry, "there is no kernel for these types and attributes");
    atomic_store(&node->variant, variant);
  }
  int64_t failed = variant->shape(frame, 0, 1);
  if (failed) return failed_with(entry, failed);
  for (int64_t i = 0; i < op->outputs; i++) {
    int64_t *tensor = frame + AG_HEAD + AG_TENSOR * (op->inputs + i);
    OrtValue *value = NULL;
    TRY(KernelContext_GetOutput(api)(context, (size_t)i, tensor + 3, (size_t)tensor[2], &value));
    if (value) TRY(describe(entry, value, tensor));
  }
  frame[1] = parts();
  if (variant->scratch) {
    frame[0] = (int64_t)(intptr_t)ag_scratch((size_t)variant->scratch(frame, 0, 1));
    if (!frame[0]) return fail(entry, "no memory");
  }
  for (int64_t i = 0; i < variant->stages; i++) {
    if (variant->parallel[i] && frame[1] > 1) {
      Job job = {variant->stage[i], frame, frame[1], 0};
      TRY(KernelContext_ParallelFor(api)(context, run_part, (size_t)frame[1], (size_t)frame[1], &job));
      failed = atomic_load(&job.failure);
    } else {
      failed = variant->stage[i](frame, 0, 1);
    }
    if (failed) return failed_with(entry, failed);
  }
  atomic_fetch_add_explicit(&runs, 1, memory_order_relaxed);
  return NULL;
}

static void destroy(void *kernel) { free(kernel); }
static const char *name(const OrtCustomOp *face) { return ((const Entry *)face)->op.name; }
static const char *provider(const OrtCustomOp *face) { return (void)face, NULL; }
static size_t inputs(const OrtCustomOp *face) { return (size_t)((const Entry *)face)->op.inputs; }
static size_t outputs(const OrtCustomOp *face) { return (size_t)((const Entry *)face)->op.outputs; }
static int input_type(const OrtCustomOp *face, size_t i) { return (int)((const Entry *)face)->op.input_type[i]; }
static int output_type(const OrtCustomOp *face, size_t i) { return (int)((const Entry *)face)->op.output_type[i]; }
static int input_optional(const OrtCustomOp *face, size_t i) { return ((const Entry *)face)->op.optional[i] ? 1 : 0; }
static int required(const OrtCustomOp *face, size_t i) { return (void)face, (void)i, 0; }
static int zero(const OrtCustomOp *face) { return (void)face, 0; }
static int one(const OrtCustomOp *face) { return (void)face, 1; }
static int newest(const OrtCustomOp *face) { return (void)face, INT32_MAX; }

static Entry *lookup(const char *wanted) {
  for (int i = 0; i < table.count; i++)
    if (!strcmp(table.entries[i]->op.name, wanted)) return table.entries[i];
  return NULL;
}

/* Adds an op, whose texts must stay where they are. Returns 0, or 1 when there is no room. */
AG_EXPORT int64_t ag_add_op(const ag_op *op) {
  pthread_mutex_lock(&table.lock);
  int64_t full = 0;
  if (!lookup(op->name)) {
    Entry *entry = table.count < MAX_OPS ? calloc(1, sizeof *entry) : NULL;
    if (entry) {
      entry->op = *op;
      entry->face = (OrtCustomOp){
          .version = ORT_API_VERSION, .GetName = name, .GetExecutionProviderType = provider, .GetInputType = input_type,
          .GetInputTypeCount = inputs, .GetOutputType = output_type, .GetOutputTypeCount = outputs, .KernelDestroy = destroy,
          .GetInputCharacteristic = input_optional, .GetOutputCharacteristic = required, .GetInputMemoryType = required,
          .GetVariadicInputMinArity = zero, .GetVariadicInputHomogeneity = one, .GetVariadicOutputMinArity = zero,
          .GetVariadicOutputHomogeneity = one, .CreateKernelV2 = create, .KernelComputeV2 = compute, .GetStartVersion = one,
          .GetEndVersion = newest};
      table.entries[table.count++] = entry;
    }
    full = !entry;
  }
  pthread_mutex_unlock(&table.lock);
  return full;
}

/* Adds a kernel to an op, in place of one with the same key. Returns 0, or 1 when there is no such op or no room. */
AG_EXPORT int64_t ag_add_variant(const char *op, const ag_variant *variant) {
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
AG_EXPORT void ag_set_parts(int64_t wanted) { atomic_store(&parts_wanted, (long)wanted); }
AG_EXPORT int64_t ag_runs(void) { return atomic_load(&runs); }

void ag_compiled_in(void) __attribute__((weak));

AG_EXPORT OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base) {
  const OrtApi *found = base->GetApi(ORT_API_VERSION);
  if (!found) {
    const OrtApi *oldest = base->GetApi(1);
    return oldest ? CreateStatus(oldest)(ORT_FAIL, "actgraph: its kernels need onnxruntime 1.17 or newer") : NULL;
  }
  api = found;
  if (ag_compiled_in) ag_compiled_in();
  OrtCustomOpDomain *domain;
  TRY(CreateCustomOpDomain(api)("actgraph", &domain));
  pthread_mutex_lock(&table.lock);
  OrtStatus *status = NULL;
  for (int i = 0; i < table.count && !status; i++) status = CustomOpDomain_Add(api)(domain, &table.entries[i]->face);
  pthread_mutex_unlock(&table.lock);
  return status ? status : AddCustomOpDomain(api)(options, domain);
}
