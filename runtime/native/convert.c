/* Element types that no kernel reads as they are stored.

Ops compute float16 and bfloat16 in float32 and round once, and read their other operands in float32 as well, so converting at
the door of a kernel is what the op says. Integers of 16 and 4 bits become int32; codes
of 4 bits are written as bytes, and packed. */
#include "plugin.h"

#include <string.h>

static float widened(uint16_t bits) {
  uint32_t sign = (uint32_t)(bits & 0x8000) << 16, size = bits & 0x7FFF, word;
  float value;
  if (size >= 0x7C00) { /* infinity, NaN */
    word = sign | 0x7F800000 | (size & 0x3FF) << 13;
    memcpy(&value, &word, sizeof value);
    return value;
  }
  word = size << 13; /* the exponent is too small by 112 */
  memcpy(&value, &word, sizeof value);
  value *= 0x1p112f;
  memcpy(&word, &value, sizeof word);
  word |= sign;
  memcpy(&value, &word, sizeof value);
  return value;
}

static uint16_t narrowed(float value) {
  uint32_t word;
  memcpy(&word, &value, sizeof word);
  uint32_t sign = word >> 16 & 0x8000, size = word & 0x7FFFFFFF;
  if (size > 0x7F800000) return (uint16_t)(sign | 0x7E00);
  if (size >= 0x47800000) return (uint16_t)(sign | 0x7C00); /* 65536 and more */
  if (size < 0x38800000) { /* below the smallest normal: adding 0.5 leaves the result in the lowest bits, rounded */
    float magnitude;
    memcpy(&magnitude, &size, sizeof magnitude);
    magnitude += 0.5f;
    memcpy(&size, &magnitude, sizeof size);
    return (uint16_t)(sign | (size - 0x3F000000));
  }
  return (uint16_t)(sign | ((size - 0x38000000 + 0xFFF + (size >> 13 & 1)) >> 13));
}

static uint16_t shortened(float value) {
  uint32_t word;
  memcpy(&word, &value, sizeof word);
  if ((word & 0x7FFFFFFF) > 0x7F800000) return (uint16_t)(word >> 16 | 0x40);
  return (uint16_t)((word + 0x7FFF + (word >> 16 & 1)) >> 16);
}

int64_t ag_read_as(const ag_op *op, int64_t input, int64_t type) {
  int64_t wanted = op->input_type[input];
  if (type == wanted) return type;
  if (wanted == AG_AS_IT_IS) return type == FLOAT64 ? FLOAT32 : type;
  switch (type) {
    case FLOAT16: case BFLOAT16: case FLOAT64: return wanted == 0 || wanted == FLOAT32 ? FLOAT32 : type;
    case INT16: case UINT16: case INT4: case UINT4: return wanted == 0 || wanted == INT32 ? INT32 : type;
    default: return type;
  }
}

#define EACH(source, target, expression)                                       \
  do {                                                                         \
    const source *in = from;                                                   \
    target *out = to;                                                          \
    for (int64_t i = 0; i < count; i++) out[i] = expression;                   \
    return 1;                                                                  \
  } while (0)

int ag_convert(const void *from, int64_t type, void *to, int64_t wanted, int64_t count) {
  if (wanted == FLOAT32) {
    if (type == FLOAT16) EACH(uint16_t, float, widened(in[i]));
    if (type == FLOAT64) EACH(double, float, (float)in[i]);
    if (type == BFLOAT16) EACH(uint16_t, uint32_t, (uint32_t)in[i] << 16);
  }
  if (wanted == INT32) {
    if (type == INT16) EACH(int16_t, int32_t, in[i]);
    if (type == UINT16) EACH(uint16_t, int32_t, in[i]);
    if (type == UINT4) EACH(uint8_t, int32_t, in[i / 2] >> 4 * (i & 1) & 15);
    if (type == INT4) EACH(uint8_t, int32_t, ((in[i / 2] >> 4 * (i & 1) & 15) ^ 8) - 8);
  }
  if (wanted == (type == INT8 ? INT4 : type == UINT8 ? UINT4 : 0)) {
    const uint8_t *in = from;
    uint8_t *out = to;
    for (int64_t i = 0; i < count; i += 2) out[i / 2] = (uint8_t)((in[i] & 15) | (i + 1 < count ? in[i + 1] & 15 : 0) << 4);
    return 1;
  }
  if (type == FLOAT32) {
    if (wanted == FLOAT64) EACH(float, double, in[i]);
    if (wanted == FLOAT16) EACH(float, uint16_t, narrowed(in[i]));
    if (wanted == BFLOAT16) EACH(float, uint16_t, shortened(in[i]));
  }
  return 0;
}
