"""The ops ``clip`` and ``gate`` in float32.

Where one bound holds for all of x, a part has some of its elements, else some of its tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from actgraph.ops.dtypes import DType
from actgraph.runtime.kernels.numba.frame import address, elements, integer, number, rank, set_shape_like, share, size
from actgraph.runtime.kernels.numba.kernel import OpKernels
from actgraph.runtime.kernels.numba.memory import OPTIONS, f32s
from actgraph.runtime.kernels.numba.operands import (
    channel_start,
    channel_step,
    inner_of,
    place_of,
    token_start,
    tokens_of,
    unfit_channels,
)
from actgraph.runtime.kernels.numba.small import small_kernel

_ZERO = np.float32(0)
X, LO, HI = range(3)
MIN, MAX, POLICY, NAN, CLIP_AXIS = range(5)
THRESHOLD, KEEP, GATE_AXIS = range(3)


def _shape(operands: int, axis_at: int) -> Any:
    @njit(**OPTIONS)
    def shape(frame, part, nparts):
        axis = place_of(frame, X, integer(frame, operands + 1, axis_at))
        for tensor in range(1, operands):
            if address(frame, tensor) != 0 and rank(frame, tensor) > 0:
                if axis < 0:
                    return 1
                if unfit_channels(frame, tensor, X, axis):
                    return 2
        set_shape_like(frame, operands, X)
        return 0

    return shape


@njit(**OPTIONS)
def _one(frame, tensor):
    """Whether an operand is absent or one number."""
    return address(frame, tensor) == 0 or elements(frame, tensor) == 1


@njit(**OPTIONS)
def _number(frame, tensor, otherwise):
    return f32s(address(frame, tensor))[0] if address(frame, tensor) != 0 else np.float32(otherwise)


@njit(**OPTIONS)
def _clipped(v, low, high, saturate, drop_nan):
    y = low if v < low else v
    y = high if y > high else y
    inside = _ZERO if (v < low) or (v > high) else v
    y = y if saturate else inside
    return _ZERO if drop_nan and v != v else y


@njit(**OPTIONS)
def clip(frame, part, nparts):
    x, y = f32s(address(frame, X)), f32s(address(frame, 3))
    saturate, drop_nan = integer(frame, 4, POLICY) == 0, integer(frame, 4, NAN) == 1
    low, high = np.float32(number(frame, 4, MIN)), np.float32(number(frame, 4, MAX))
    if _one(frame, LO) and _one(frame, HI):
        low, high = _number(frame, LO, low), _number(frame, HI, high)
        start, stop = share(elements(frame, X), 16, part, nparts)
        for i in range(start, stop):
            y[i] = _clipped(x[i], low, high, saturate, drop_nan)
        return 0
    axis = place_of(frame, X, integer(frame, 4, CLIP_AXIS))
    channels, inner = size(frame, X, axis), inner_of(frame, X, axis)
    lows, highs = f32s(address(frame, LO)), f32s(address(frame, HI))
    has_low, has_high = address(frame, LO) != 0, address(frame, HI) != 0
    low_step = channel_step(frame, LO, X, axis) if has_low else 0
    high_step = channel_step(frame, HI, X, axis) if has_high else 0
    first, last = share(tokens_of(frame, X, axis), 1, part, nparts)
    for token in range(first, last):
        at = token_start(token, channels, inner)
        low_start = channel_start(frame, LO, X, axis, token) if has_low else 0
        high_start = channel_start(frame, HI, X, axis, token) if has_high else 0
        for i in range(channels):
            below = lows[low_start + i * low_step] if has_low else low
            above = highs[high_start + i * high_step] if has_high else high
            y[at + i * inner] = _clipped(x[at + i * inner], below, above, saturate, drop_nan)
    return 0


@njit(**OPTIONS)
def _kept(v, t, by_size):
    dropped = abs(v) <= t if by_size else v < t
    return _ZERO if dropped else v


@njit(**OPTIONS)
def gate(frame, part, nparts):
    x, y, by_size = f32s(address(frame, X)), f32s(address(frame, 2)), integer(frame, 3, KEEP) == 0
    if _one(frame, 1):
        t = _number(frame, 1, number(frame, 3, THRESHOLD))
        start, stop = share(elements(frame, X), 16, part, nparts)
        for i in range(start, stop):
            y[i] = _kept(x[i], t, by_size)
        return 0
    axis = place_of(frame, X, integer(frame, 3, GATE_AXIS))
    channels, inner = size(frame, X, axis), inner_of(frame, X, axis)
    thresholds, step = f32s(address(frame, 1)), channel_step(frame, 1, X, axis)
    first, last = share(tokens_of(frame, X, axis), 1, part, nparts)
    for token in range(first, last):
        at, start = token_start(token, channels, inner), channel_start(frame, 1, X, axis, token)
        for i in range(channels):
            y[at + i * inner] = _kept(x[at + i * inner], thresholds[start + i * step], by_size)
    return 0


_ERRORS = ("x has no such channel axis", "an operand does not fit the channels of x")
CLIP = OpKernels("clip", (), (), _ERRORS, (DType.F32, DType.F32, DType.F32))
CLIP.kernels.append(small_kernel("clip", _shape(3, CLIP_AXIS), clip))
GATE = OpKernels("gate", (), (), _ERRORS, (DType.F32, DType.F32))
GATE.kernels.append(small_kernel("gate", _shape(2, GATE_AXIS), gate))
