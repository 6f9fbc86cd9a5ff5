"""How operands line up with an activation, as ``actgraph.ops.layout`` has it: the channel axis, and tokens, all other axes.

A token is an index over all axes of x but the channel axis; its channels lie ``inner`` elements apart, which is 1 where the
channel axis is the last one: loops over such channels become vector code.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from actgraph.ops.dtypes import DType
from actgraph.runtime.kernels.numba.frame import address, element_type, elements, rank, size
from actgraph.runtime.kernels.numba.memory import OPTIONS, i32s, i64s, u8s
from actgraph.runtime.kernels.numba.weights import float_at

_BOOL, _I64, _I32 = 9, 7, 6
#: Element types of masks that are read.
MASKS = (None, DType.F32, DType.F16, DType.BF16, DType.BOOL, DType.I64, DType.I32)


@njit(**OPTIONS)
def place_of(frame, x, axis):
    """The channel axis counted from the front; -1 where x has no such axis."""
    axes = rank(frame, x)
    place = axis + axes if axis < 0 else axis
    return place if 0 <= place < axes else -1


@njit(**OPTIONS)
def inner_of(frame, x, axis):
    """How far apart the channels of a token are."""
    count = 1
    for place in range(axis + 1, rank(frame, x)):
        count *= size(frame, x, place)
    return count


@njit(**OPTIONS)
def tokens_of(frame, x, axis):
    count = 1
    for place in range(rank(frame, x)):
        if place != axis:
            count *= size(frame, x, place)
    return count


@njit(**OPTIONS)
def token_start(token, channels, inner):
    """Where a token begins, in elements."""
    return token // inner * channels * inner + token % inner


@njit(**OPTIONS)
def channel_start(frame, tensor, x, axis, token):
    """Where a channel operand begins for a token, in elements."""
    axes = rank(frame, tensor)
    if axes <= 1:
        return 0
    left, start, stride = token, 0, 1
    for back in range(1, rank(frame, x) + 1):
        place = rank(frame, x) - back
        index = 0
        if place != axis:
            index = left % size(frame, x, place)
            left //= size(frame, x, place)
        if back <= axes:
            length = size(frame, tensor, -back)
            if length > 1:
                start += index * stride
            stride *= length
    return start


@njit(**OPTIONS)
def channel_step(frame, tensor, x, axis):
    """How far apart the numbers of a channel operand are; 0: all channels have one."""
    axes, back = rank(frame, tensor), rank(frame, x) - axis
    if axes == 1:
        return 1 if size(frame, tensor, 0) > 1 else 0
    if axes < back or size(frame, tensor, -back) == 1:
        return 0
    stride = 1
    for other in range(1, back):
        stride *= size(frame, tensor, -other)
    return stride


@njit(**OPTIONS)
def token_index(frame, tensor, axes, behind, x, axis, token):
    """The index, over its first ``axes`` axes, of what a token operand has for a token. behind: axes that follow them."""
    left, index, stride, back = token, 0, 1, 0
    for other in range(rank(frame, x)):
        place = rank(frame, x) - 1 - other
        if place == axis:
            continue
        here = left % size(frame, x, place)
        left //= size(frame, x, place)
        back += 1
        if back <= axes:
            length = size(frame, tensor, -back - behind)
            if length > 1:
                index += here * stride
            stride *= length
    return index


@njit(**OPTIONS)
def token_number(frame, tensor, x, axis, token):
    """What a token operand (a mask, a strength, an angle) has for a token, as a float; 1 where it is absent."""
    at = address(frame, tensor)
    if at == 0:
        return np.float32(1)
    index = 0
    if elements(frame, tensor) > 1:
        index = token_index(frame, tensor, rank(frame, tensor), 0, x, axis, token)
    kind = element_type(frame, tensor)
    if kind == _BOOL:
        return np.float32(1) if u8s(at)[index] != 0 else np.float32(0)
    if kind == _I64:
        return np.float32(i64s(at)[index])
    if kind == _I32:
        return np.float32(i32s(at)[index])
    return float_at(at, kind, index)


@njit(**OPTIONS)
def unfit_channels(frame, tensor, x, axis):
    """Whether a channel operand does not broadcast to x."""
    axes = rank(frame, tensor)
    if address(frame, tensor) == 0 or axes == 0:
        return False
    if axes == 1:
        return size(frame, tensor, 0) != 1 and size(frame, tensor, 0) != size(frame, x, axis)
    if axes > rank(frame, x):
        return True
    for back in range(1, axes + 1):
        if size(frame, tensor, -back) != 1 and size(frame, tensor, -back) != size(frame, x, -back):
            return True
    return False


@njit(**OPTIONS)
def unfit_tokens(frame, tensor, axes, behind, x, axis):
    """Whether the first ``axes`` axes of a token operand do not broadcast to the tokens of x."""
    if address(frame, tensor) == 0:
        return False
    if axes > rank(frame, x) - 1:
        return True
    back = 0
    for other in range(rank(frame, x)):
        place = rank(frame, x) - 1 - other
        if place != axis:
            back += 1
            if back <= axes:
                length = size(frame, tensor, -back - behind)
                if length != 1 and length != size(frame, x, place):
                    return True
    return False
