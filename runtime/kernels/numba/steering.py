"""The ops ``shift`` and ``channel_scale`` in float32: a part has some of the tokens."""

from __future__ import annotations

import numpy as np
from numba import njit

from actgraph.ops.dtypes import DType
from actgraph.runtime.kernels.numba.frame import address, integer, number, rank, set_shape_like, share, size
from actgraph.runtime.kernels.numba.kernel import OpKernels
from actgraph.runtime.kernels.numba.memory import OPTIONS, f32s, sqrt
from actgraph.runtime.kernels.numba.norms import squares
from actgraph.runtime.kernels.numba.operands import (
    MASKS,
    channel_start,
    channel_step,
    inner_of,
    place_of,
    token_number,
    token_start,
    tokens_of,
    unfit_channels,
    unfit_tokens,
)
from actgraph.runtime.kernels.numba.shift_groups import norm_places, shift_groups
from actgraph.runtime.kernels.numba.small import small_kernel

ERRORS = (
    "x has no such channel axis",
    "an operand does not fit the channels of x",
    "an operand does not fit the tokens of x",
    "x has not all axes of the norms",
)
PLAIN, RESTORE, RELATIVE = range(3)
_ONE, _ZERO, _TINY = np.float32(1), np.float32(0), np.float32(1e-8)


@njit(**OPTIONS)
def norm_of(address_, start, step, count):
    """The L2 norm of ``count`` floats ``step`` apart."""
    if step == 1:
        return sqrt(squares(address_ + 4 * start, count, _ZERO))
    h, total = f32s(address_), _ZERO
    for i in range(count):
        v = h[start + i * step]
        total += v * v
    return sqrt(total)


@njit(**OPTIONS)
def shift_shape(frame, part, nparts):
    axis = place_of(frame, 0, integer(frame, 5, 3))
    if axis < 0:
        return 1
    if unfit_channels(frame, 1, 0, axis):
        return 2
    if unfit_tokens(frame, 2, rank(frame, 2), 0, 0, axis) or unfit_tokens(frame, 3, rank(frame, 3), 0, 0, axis):
        return 3
    if norm_places(frame) < 0:
        return 4
    set_shape_like(frame, 4, 0)
    return 0


@njit(**OPTIONS)
def shift(frame, part, nparts):
    axis, norm = place_of(frame, 0, integer(frame, 5, 3)), integer(frame, 5, 1)
    if norm != PLAIN and norm_places(frame) != 0:
        return shift_groups(frame, norm_places(frame), part, nparts)
    scale, channels, inner = np.float32(number(frame, 5, 0)), size(frame, 0, axis), inner_of(frame, 0, axis)
    step, source, target, added = channel_step(frame, 1, 0, axis), address(frame, 0), address(frame, 4), address(frame, 1)
    x, y, v = f32s(source), f32s(target), f32s(added)
    first, last = share(tokens_of(frame, 0, axis), 1, part, nparts)
    length, shared = _ZERO, rank(frame, 1) <= 1
    numbers = channels if step != 0 else 1  # the norm of the vector is that of what is there
    if norm == RELATIVE and shared:
        length = norm_of(added, 0, step, numbers)
    for token in range(first, last):
        at = token_start(token, channels, inner)
        c = token_number(frame, 2, 0, axis, token) * scale
        c = token_number(frame, 3, 0, axis, token) * c
        if c == _ZERO:
            for i in range(channels):
                y[at + i * inner] = x[at + i * inner]
            continue
        start, ratio, size_ = channel_start(frame, 1, 0, axis, token), _ONE, _ZERO
        if norm != PLAIN:
            size_ = norm_of(source, at, inner, channels)
        if norm == RELATIVE:
            if not shared:
                length = norm_of(added, start, step, numbers)
            ratio = size_ / (_TINY if length < _TINY else length)
        if inner == 1 and step == 1:
            for i in range(channels):
                y[at + i] = x[at + i] + c * (ratio * v[start + i])
        else:
            for i in range(channels):
                y[at + i * inner] = x[at + i * inner] + c * (ratio * v[start + i * step])
        if norm == RESTORE:
            after = norm_of(target, at, inner, channels)
            ratio = size_ / (_TINY if after < _TINY else after)
            for i in range(channels):
                y[at + i * inner] *= ratio
    return 0


@njit(**OPTIONS)
def scale_shape(frame, part, nparts):
    axis = place_of(frame, 0, integer(frame, 4, 0))
    if axis < 0:
        return 1
    if unfit_channels(frame, 1, 0, axis):
        return 2
    if unfit_tokens(frame, 2, rank(frame, 2), 0, 0, axis):
        return 3
    set_shape_like(frame, 3, 0)
    return 0


@njit(**OPTIONS)
def scale(frame, part, nparts):
    axis = place_of(frame, 0, integer(frame, 4, 0))
    channels, inner, step = size(frame, 0, axis), inner_of(frame, 0, axis), channel_step(frame, 1, 0, axis)
    x, y, gamma = f32s(address(frame, 0)), f32s(address(frame, 3)), f32s(address(frame, 1))
    first, last = share(tokens_of(frame, 0, axis), 1, part, nparts)
    for token in range(first, last):
        at, start = token_start(token, channels, inner), channel_start(frame, 1, 0, axis, token)
        m = token_number(frame, 2, 0, axis, token)
        if m == _ZERO:
            for i in range(channels):
                y[at + i * inner] = x[at + i * inner]
        elif m == _ONE and inner == 1 and step == 1:
            for i in range(channels):
                y[at + i] = x[at + i] * gamma[start + i]
        elif m == _ONE:
            for i in range(channels):
                y[at + i * inner] = x[at + i * inner] * gamma[start + i * step]
        else:
            for i in range(channels):
                y[at + i * inner] = x[at + i * inner] * (_ONE + m * (gamma[start + i * step] - _ONE))
    return 0


SHIFT = OpKernels(
    "shift", (), (), ERRORS, (DType.F32, DType.F32, DType.F32, None),
    claims=lambda types, attributes: types[3] is None or types[3].dtype in MASKS,
)  # fmt: skip
SHIFT.kernels.append(small_kernel("shift", shift_shape, shift))
CHANNEL_SCALE = OpKernels(
    "channel_scale", (), (), ERRORS, (DType.F32, DType.F32, None),
    claims=lambda types, attributes: types[2] is None or types[2].dtype in MASKS,
)  # fmt: skip
CHANNEL_SCALE.kernels.append(small_kernel("channel_scale", scale_shape, scale))
