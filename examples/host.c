/* A host without Python: runs a language model with onnxruntime and the kernels of a plugin.

    actgraph run stories260k -p 'sparsify{method=teal threshold=0.05}, quantize{weights=int8}, fuse' -o model.onnx
    actgraph build-plugin -o libactgraph.so
    cc -O2 host.c -o host /path/to/libonnxruntime.so -ldl -lm
    ./host model.onnx ./libactgraph.so inputs

`inputs` is a folder with NAME.bin for each input (64-bit integers, one row of tokens) and logits.bin (floats), to compare with.
"-" in place of the plugin runs the same file without kernels. Needs no header: onnxruntime's functions are used by their place in
its table, which only ever grows. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct { void *function[400]; } Api;
typedef struct { const Api *(*get)(uint32_t version); const char *(*version)(void); } ApiBase;
const ApiBase *OrtGetApiBase(void);

static const Api *api;
#define CALL(place, ...) ((void *(*)(__VA_ARGS__))api->function[place])

static void check(void *status) {
  if (!status) return;
  fprintf(stderr, "error: %s\n", ((const char *(*)(void *))api->function[2])(status));
  exit(1);
}

static void *read_file(const char *folder, const char *name, size_t *bytes) {
  char path[4096];
  snprintf(path, sizeof path, "%s/%s.bin", folder, name);
  FILE *file = fopen(path, "rb");
  if (!file) {
    fprintf(stderr, "error: cannot read %s\n", path);
    exit(1);
  }
  fseek(file, 0, SEEK_END);
  *bytes = (size_t)ftell(file);
  rewind(file);
  void *memory = malloc(*bytes + 1);
  if (fread(memory, 1, *bytes, file) != *bytes) exit(1);
  fclose(file);
  return memory;
}

int main(int count, char **words) {
  static const char *const names[] = {"input_ids", "attention_mask", "position_ids"}, *const results[] = {"logits"};
  if (count != 4 && count != 5) {
    fprintf(stderr, "usage: %s MODEL PLUGIN INPUTS [TIMES]\n", words[0]);
    return 2;
  }
  const char *plugin = strcmp(words[2], "-") ? words[2] : NULL;
  int times = count > 4 ? atoi(words[4]) : 1;
  api = OrtGetApiBase()->get(17);
  void *environment, *options, *session, *memory, *inputs[3], *data[3], *output = NULL;
  check(CALL(3, int, const char *, void **)(3, "host", &environment));
  check(CALL(10, void **)(&options));
  if (plugin) check(CALL(228, void *, const char *)(options, plugin)); /* RegisterCustomOpsLibrary_V2 */
  check(CALL(7, void *, const char *, void *, void **)(environment, words[1], options, &session));
  check(CALL(69, int, int, void **)(1, 0, &memory));
  for (int i = 0; i < 3; i++) {
    size_t bytes;
    data[i] = read_file(words[3], names[i], &bytes);
    int64_t shape[2] = {1, (int64_t)(bytes / 8)};
    check(CALL(49, void *, void *, size_t, const int64_t *, size_t, int, void **)(memory, data[i], bytes, shape, 2, 7, &inputs[i]));
  }
  size_t bytes;
  float *expected = read_file(words[3], "logits", &bytes), *got = NULL;
  double difference = 0, largest = 0;
  for (int i = 0; i < times; i++) {
    check(CALL(9, void *, void *, const char *const *, void *const *, size_t, const char *const *, size_t, void **)(
        session, NULL, names, inputs, 3, results, 1, &output));
    check(CALL(51, void *, void **)(output, (void **)&got));
    for (size_t j = 0; j < bytes / 4; j++) {
      difference = fmax(difference, isnan(got[j]) ? INFINITY : fabs((double)got[j] - expected[j]));
      largest = fmax(largest, fabs(expected[j]));
    }
    ((void (*)(void *))api->function[96])(output);
    output = NULL;
  }
  int64_t runs = 0;
  void *handle = plugin ? dlopen(plugin, RTLD_NOW | RTLD_NOLOAD) : NULL;
  if (handle) {
    runs = ((int64_t (*)(void))dlsym(handle, "ag_runs"))();
    dlclose(handle);
  }
  printf("{\"onnxruntime\": \"%s\", \"kernels run\": %lld, \"difference\": %.9g, \"largest\": %.9g}\n", OrtGetApiBase()->version(),
         (long long)runs, difference, largest);
  for (int i = 0; i < 3; i++) {
    ((void (*)(void *))api->function[96])(inputs[i]);
    free(data[i]);
  }
  free(expected);
  ((void (*)(void *))api->function[94])(memory);
  ((void (*)(void *))api->function[95])(session);
  ((void (*)(void *))api->function[100])(options);
  ((void (*)(void *))api->function[92])(environment);
  return 0;
}
