/* The part of onnxruntime's C API that the plugin uses, by place in its function table.

The table only ever grows, so one binary serves every onnxruntime from 1.17 on, and no header of onnxruntime is needed. */
#ifndef ACTGRAPH_ORT_API_H
#define ACTGRAPH_ORT_API_H
#include <stddef.h>
#include <stdint.h>

enum { ORT_API_VERSION = 17, ORT_FAIL = 1, ORT_INVALID_ARGUMENT = 2 };
enum { ORT_ATTRIBUTE_INT = 1, ORT_ATTRIBUTE_FLOAT = 3, ORT_ATTRIBUTE_STRING = 5 };

typedef struct OrtStatus OrtStatus;
typedef struct OrtValue OrtValue;
typedef struct OrtKernelContext OrtKernelContext;
typedef struct OrtKernelInfo OrtKernelInfo;
typedef struct OrtSessionOptions OrtSessionOptions;
typedef struct OrtCustomOpDomain OrtCustomOpDomain;
typedef struct OrtTensorTypeAndShapeInfo OrtShape;
typedef struct OrtShapeInferContext OrtShapeInferContext;
typedef struct OrtOpAttr OrtOpAttr;
typedef struct OrtTypeInfo OrtTypeInfo;
typedef struct { void *function[400]; } OrtApi;
typedef struct {
  const OrtApi *(*GetApi)(uint32_t version);
  const char *(*GetVersionString)(void);
} OrtApiBase;

typedef struct OrtCustomOp {
  uint32_t version;
  void *(*CreateKernel)(const struct OrtCustomOp *, const OrtApi *, const OrtKernelInfo *);
  const char *(*GetName)(const struct OrtCustomOp *);
  const char *(*GetExecutionProviderType)(const struct OrtCustomOp *);
  int (*GetInputType)(const struct OrtCustomOp *, size_t);
  size_t (*GetInputTypeCount)(const struct OrtCustomOp *);
  int (*GetOutputType)(const struct OrtCustomOp *, size_t);
  size_t (*GetOutputTypeCount)(const struct OrtCustomOp *);
  void (*KernelCompute)(void *, OrtKernelContext *);
  void (*KernelDestroy)(void *);
  int (*GetInputCharacteristic)(const struct OrtCustomOp *, size_t);
  int (*GetOutputCharacteristic)(const struct OrtCustomOp *, size_t);
  int (*GetInputMemoryType)(const struct OrtCustomOp *, size_t);
  int (*GetVariadicInputMinArity)(const struct OrtCustomOp *);
  int (*GetVariadicInputHomogeneity)(const struct OrtCustomOp *);
  int (*GetVariadicOutputMinArity)(const struct OrtCustomOp *);
  int (*GetVariadicOutputHomogeneity)(const struct OrtCustomOp *);
  OrtStatus *(*CreateKernelV2)(const struct OrtCustomOp *, const OrtApi *, const OrtKernelInfo *, void **);
  OrtStatus *(*KernelComputeV2)(void *, OrtKernelContext *);
  OrtStatus *(*InferOutputShapeFn)(const struct OrtCustomOp *, OrtShapeInferContext *);
  int (*GetStartVersion)(const struct OrtCustomOp *);
  int (*GetEndVersion)(const struct OrtCustomOp *);
} OrtCustomOp;

#define ORT(api, place, ...) ((OrtStatus * (*)(__VA_ARGS__)) (api)->function[place])
#define CreateStatus(api) ORT(api, 0, int, const char *)
#define CreateCustomOpDomain(api) ORT(api, 26, const char *, OrtCustomOpDomain **)
#define CustomOpDomain_Add(api) ORT(api, 27, OrtCustomOpDomain *, const OrtCustomOp *)
#define AddCustomOpDomain(api) ORT(api, 28, OrtSessionOptions *, OrtCustomOpDomain *)
#define GetTensorMutableData(api) ORT(api, 51, OrtValue *, void **)
#define CastTypeInfoToTensorInfo(api) ORT(api, 55, const OrtTypeInfo *, const OrtShape **)
#define CreateShape(api) ORT(api, 57, OrtShape **)
#define SetTensorElementType(api) ORT(api, 58, OrtShape *, int)
#define SetDimensions(api) ORT(api, 59, OrtShape *, const int64_t *, size_t)
#define GetTensorElementType(api) ORT(api, 60, const OrtShape *, int *)
#define GetDimensionsCount(api) ORT(api, 61, const OrtShape *, size_t *)
#define GetDimensions(api) ORT(api, 62, const OrtShape *, int64_t *, size_t)
#define GetSymbolicDimensions(api) ORT(api, 63, const OrtShape *, const char **, size_t)
#define GetTensorTypeAndShape(api) ORT(api, 65, const OrtValue *, OrtShape **)
#define KernelInfoGetAttribute_float(api) ORT(api, 85, const OrtKernelInfo *, const char *, float *)
#define KernelInfoGetAttribute_int64(api) ORT(api, 86, const OrtKernelInfo *, const char *, int64_t *)
#define KernelInfoGetAttribute_string(api) ORT(api, 87, const OrtKernelInfo *, const char *, char *, size_t *)
#define KernelInfoGetAttributeArray_float(api) ORT(api, 162, const OrtKernelInfo *, const char *, float *, size_t *)
#define KernelInfoGetAttributeArray_int64(api) ORT(api, 163, const OrtKernelInfo *, const char *, int64_t *, size_t *)
#define KernelContext_GetInputCount(api) ORT(api, 88, const OrtKernelContext *, size_t *)
#define KernelContext_GetInput(api) ORT(api, 90, const OrtKernelContext *, size_t, const OrtValue **)
#define KernelContext_GetOutput(api) ORT(api, 91, OrtKernelContext *, size_t, const int64_t *, size_t, OrtValue **)
#define ReleaseStatus(api) ((void (*)(OrtStatus *))(api)->function[93])
#define ReleaseTypeInfo(api) ((void (*)(OrtTypeInfo *))(api)->function[98])
#define ReleaseShape(api) ((void (*)(OrtShape *))(api)->function[99])
#define KernelInfo_GetInputCount(api) ORT(api, 230, const OrtKernelInfo *, size_t *)
#define KernelInfo_GetInputTypeInfo(api) ORT(api, 234, const OrtKernelInfo *, size_t, OrtTypeInfo **)
#define KernelInfo_GetOutputTypeInfo(api) ORT(api, 235, const OrtKernelInfo *, size_t, OrtTypeInfo **)
#define KernelInfoGetConstantInput(api) ORT(api, 249, const OrtKernelInfo *, size_t, int *, const OrtValue **)
#define ShapeInferContext_GetInputCount(api) ORT(api, 267, const OrtShapeInferContext *, size_t *)
#define ShapeInferContext_GetInputTypeShape(api) ORT(api, 268, const OrtShapeInferContext *, size_t, OrtShape **)
#define ShapeInferContext_GetAttribute(api) ORT(api, 269, const OrtShapeInferContext *, const char *, const OrtOpAttr **)
#define ShapeInferContext_SetOutputTypeShape(api) ORT(api, 270, const OrtShapeInferContext *, size_t, const OrtShape *)
#define SetSymbolicDimensions(api) ORT(api, 271, OrtShape *, const char **, size_t)
#define ReadOpAttr(api) ORT(api, 272, const OrtOpAttr *, int, void *, size_t, size_t *)
#define KernelContext_ParallelFor(api) ORT(api, 274, const OrtKernelContext *, void (*)(void *, size_t), size_t, size_t, void *)
#endif
