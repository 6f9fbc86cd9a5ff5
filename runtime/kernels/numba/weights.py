"""How the weight of a linear is stored: one value at a time, for whatever has no faster way."""

from __future__ import annotations

import numpy as np
from numba import njit

from actgraph.runtime.kernels.numba.memory import OPTIONS, bits_as_f32, f32_as_bits, f32s, i8s, i16s, i32s, u8s

#: ONNX element types.
F32, U8, I8, I32, F16, BF16, F8E4M3, F8E5M2 = 1, 2, 3, 6, 10, 16, 17, 19
#: The places of ``packed`` among its choices.
PLAIN, PACKED_I4, PACKED_U4 = range(3)


@njit(**OPTIONS)
def _small_float(bits, width, exponent, infinities):
    """A float of ``width`` bits as float32."""
    mantissa = width - 1 - exponent
    top = (1 << (width - 1)) - 1
    size, sign = bits & top, np.float32(-1) if bits >> (width - 1) else np.float32(1)
    e, m = size >> mantissa, size & ((1 << mantissa) - 1)
    bias, last = (1 << (exponent - 1)) - 1, (1 << exponent) - 1
    if infinities and e == last:
        return sign * np.float32(np.inf) if m == 0 else np.float32(np.nan)
    if not infinities and size == top:
        return np.float32(np.nan)
    value = np.float32(m if e == 0 else m + (1 << mantissa))
    shift = (1 if e == 0 else e) - bias - mantissa
    for _ in range(abs(shift)):
        value *= np.float32(2) if shift > 0 else np.float32(0.5)
    return sign * value


@njit(**OPTIONS)
def float_at(address, kind, index):
    """The float at ``index`` of a tensor of an ONNX float type."""
    if kind == F32:
        return f32s(address)[index]
    if kind == BF16:
        return bits_as_f32(np.int32(i16s(address)[index]) << np.int32(16))
    if kind == F16:
        return _small_float(np.int64(i16s(address)[index]) & 0xFFFF, 16, 5, True)
    if kind == F8E4M3:
        return _small_float(np.int64(u8s(address)[index]), 8, 4, False)
    return _small_float(np.int64(u8s(address)[index]), 8, 5, True)


@njit(**OPTIONS)
def f16_bits(value):
    """The float16 nearest to a float32, half to even, as bits: infinity from 65520 on; NaN stays NaN."""
    bits = f32_as_bits(value)
    sign, size = (bits >> np.int32(16)) & np.int32(0x8000), bits & np.int32(0x7FFFFFFF)
    normal = (size - np.int32(0x38000000) + np.int32(0xFFF) + ((size >> np.int32(13)) & np.int32(1))) >> np.int32(13)
    small = f32_as_bits(bits_as_f32(size) + np.float32(0.5)) - np.int32(0x3F000000)  # the sum rounds to what is left of it
    found = small if size < np.int32(0x38800000) else normal
    beyond = np.int32(0x7E00) if size > np.int32(0x7F800000) else np.int32(0x7C00)
    return np.int16(sign | (beyond if size >= np.int32(0x47800000) else found))


@njit(**OPTIONS)
def code_at(address, kind, packed, index):
    """The code at ``index`` (counted in codes) of a tensor of int8, uint8 or int32, or of two 4-bit codes a byte."""
    if packed != PLAIN:
        half = (np.int64(u8s(address)[index >> 1]) >> (4 * (index & 1))) & 15
        return half if packed == PACKED_U4 else (half ^ 8) - 8
    if kind == U8:
        return np.int64(u8s(address)[index])
    if kind == I8:
        return np.int64(i8s(address)[index])
    return np.int64(i32s(address)[index])
