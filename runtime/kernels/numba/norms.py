"""The ops ``rms_norm`` and ``layer_norm`` in float32: a part has some of the tokens.

Sums are of 16 lanes that are added pair by pair: more exact than one running sum, and the same for any number of parts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from actgraph.ops.dtypes import DType
from actgraph.runtime.kernels.numba import simd
from actgraph.runtime.kernels.numba.frame import address, elements, number, rank, rows, set_shape_like, share, size
from actgraph.runtime.kernels.numba.kernel import OpKernels
from actgraph.runtime.kernels.numba.memory import OPTIONS, f32s, sqrt
from actgraph.runtime.kernels.numba.small import small_kernel

_EPS, _OFFSET = 0, 1
_F32, _ONE, _ZERO = np.float32, np.float32(1), np.float32(0)


def _shape(operands: int) -> Any:
    """The shape function of a norm of ``operands`` operands, all but the first one number per channel."""

    @njit(**OPTIONS)
    def shape(frame, part, nparts):
        if rank(frame, 0) < 1:
            return 1
        set_shape_like(frame, operands, 0)
        for tensor in range(1, operands):
            if address(frame, tensor) != 0 and (rank(frame, tensor) != 1 or elements(frame, tensor) != size(frame, 0, -1)):
                return 2
        return 0

    return shape


@njit(**OPTIONS)
def total(x, count):
    """The sum of ``count`` floats."""
    sums, whole = simd.splat_f32(_ZERO), count // 16 * 16
    for i in range(0, whole, 16):
        sums = simd.add(sums, simd.load_f32(x + 4 * i))
    result, tail = simd.sum_f32(sums), f32s(x)
    for i in range(whole, count):
        result += tail[i]
    return result


@njit(**OPTIONS)
def squares(x, count, middle):
    """The sum of ``(x - middle)^2``."""
    sums, whole, off = simd.splat_f32(_ZERO), count // 16 * 16, simd.splat_f32(middle)
    for i in range(0, whole, 16):
        v = simd.sub(simd.load_f32(x + 4 * i), off)
        sums = simd.fma(v, v, sums)
    result, tail = simd.sum_f32(sums), f32s(x)
    for i in range(whole, count):
        result += (tail[i] - middle) * (tail[i] - middle)
    return result


@njit(**OPTIONS)
def rms(frame, part, nparts):
    channels = size(frame, 0, -1)
    start, stop = share(rows(frame, 0), 1, part, nparts)
    eps, offset = _F32(number(frame, 3, _EPS)), _F32(number(frame, 3, _OFFSET))
    weight = address(frame, 1)
    for token in range(start, stop):
        at = address(frame, 0) + 4 * token * channels
        x, y, w = f32s(at), f32s(address(frame, 2) + 4 * token * channels), f32s(weight)
        factor = _ONE / sqrt(squares(at, channels, _ZERO) / _F32(channels) + eps)
        if weight != 0:
            for i in range(channels):
                y[i] = x[i] * factor * (w[i] + offset)
        else:
            for i in range(channels):
                y[i] = x[i] * factor
    return 0


@njit(**OPTIONS)
def layer(frame, part, nparts):
    channels = size(frame, 0, -1)
    start, stop = share(rows(frame, 0), 1, part, nparts)
    eps, weight, bias = _F32(number(frame, 4, _EPS)), address(frame, 1), address(frame, 2)
    for token in range(start, stop):
        at = address(frame, 0) + 4 * token * channels
        x, y = f32s(at), f32s(address(frame, 3) + 4 * token * channels)
        mean = total(at, channels) / _F32(channels)
        factor = _ONE / sqrt(squares(at, channels, mean) / _F32(channels) + eps)
        for i in range(channels):
            y[i] = (x[i] - mean) * factor
        if weight != 0:
            w = f32s(weight)
            for i in range(channels):
                y[i] *= w[i]
        if bias != 0:
            b = f32s(bias)
            for i in range(channels):
                y[i] += b[i]
    return 0


_ERRORS = ("x needs a channel axis", "weight and bias must be one number per channel of x")
RMS_NORM = OpKernels("rms_norm", (), (), _ERRORS, (DType.F32, DType.F32))
RMS_NORM.kernels.append(small_kernel("rms_norm", _shape(2), rms))
LAYER_NORM = OpKernels("layer_norm", (), (), _ERRORS, (DType.F32, DType.F32, DType.F32))
LAYER_NORM.kernels.append(small_kernel("layer_norm", _shape(3), layer))
