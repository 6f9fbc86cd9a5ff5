"""The ops ``lowrank_map`` and ``target_angle`` in float32: a part has some of the tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from actgraph.ops.dtypes import DType
from actgraph.runtime.kernels.numba.frame import (
    address,
    elements,
    integer,
    number,
    parts,
    rank,
    scratch,
    set_shape_like,
    share,
    size,
)
from actgraph.runtime.kernels.numba.functions import sine_cosine
from actgraph.runtime.kernels.numba.kernel import NumbaKernel, OpKernels, Stage
from actgraph.runtime.kernels.numba.memory import OPTIONS, f32s, sqrt
from actgraph.runtime.kernels.numba.operands import (
    MASKS,
    inner_of,
    place_of,
    token_index,
    token_number,
    token_start,
    tokens_of,
    unfit_tokens,
)
from actgraph.runtime.kernels.numba.steering import ERRORS

X, BASIS, OTHER, MASK, Y = range(5)  # OTHER: the matrix, or the angle
TENSORS = 5
_ZERO = np.float32(0)


def _shape(axis_at: int, angle: bool) -> Any:
    @njit(**OPTIONS)
    def shape(frame, part, nparts):
        axis = place_of(frame, X, integer(frame, TENSORS, axis_at))
        if axis < 0:
            return 1
        if rank(frame, BASIS) != 2 or size(frame, BASIS, 0) != size(frame, X, axis):
            return 2
        if angle:
            if size(frame, BASIS, 1) != 2:
                return 2
            if unfit_tokens(frame, OTHER, rank(frame, OTHER), 0, X, axis) and elements(frame, OTHER) != 1:
                return 3
        elif (
            rank(frame, OTHER) < 2
            or size(frame, OTHER, -2) != size(frame, BASIS, 1)
            or size(frame, OTHER, -1) != size(frame, BASIS, 1)
        ):
            return 2
        elif unfit_tokens(frame, OTHER, rank(frame, OTHER) - 2, 2, X, axis):
            return 3
        if unfit_tokens(frame, MASK, rank(frame, MASK), 0, X, axis):
            return 3
        set_shape_like(frame, Y, X)
        return 0

    return shape


@njit(**OPTIONS)
def _coordinates(frame, at, inner, channels, columns, to):
    """The coordinates of a token in the basis, to [columns]."""
    x, basis, c = f32s(address(frame, X)), f32s(address(frame, BASIS)), f32s(to)
    for j in range(columns):
        c[j] = _ZERO
    for i in range(channels):
        v = x[at + i * inner]
        for j in range(columns):
            c[j] += v * basis[i * columns + j]


@njit(**OPTIONS)
def _edit(frame, at, inner, channels, columns, change, weight):
    """``y = x + weight * basis change`` for a token, and x bit for bit where the weight is 0."""
    x, y, basis, d = f32s(address(frame, X)), f32s(address(frame, Y)), f32s(address(frame, BASIS)), f32s(change)
    if weight == _ZERO:
        for i in range(channels):
            y[at + i * inner] = x[at + i * inner]
        return
    for i in range(channels):
        delta = _ZERO
        for j in range(columns):
            delta += d[j] * basis[i * columns + j]
        y[at + i * inner] = x[at + i * inner] + weight * delta


@njit(**OPTIONS)
def _part_bytes(frame):
    return (2 * size(frame, BASIS, 1) * 4 + 127) // 64 * 64


@njit(**OPTIONS)
def scratch_bytes(frame, part, nparts):
    return parts(frame) * _part_bytes(frame)


@njit(**OPTIONS)
def lowrank(frame, part, nparts):
    axis = place_of(frame, X, integer(frame, TENSORS, 0))
    channels, inner, columns = size(frame, X, axis), inner_of(frame, X, axis), size(frame, BASIS, 1)
    before = scratch(frame) + part * _part_bytes(frame)
    change, matrix = before + 4 * columns, f32s(address(frame, OTHER))
    first, last = share(tokens_of(frame, X, axis), 1, part, nparts)
    for token in range(first, last):
        at, weight = token_start(token, channels, inner), token_number(frame, MASK, X, axis, token)
        _coordinates(frame, at, inner, channels, columns, before)
        c, d = f32s(before), f32s(change)
        own = token_index(frame, OTHER, rank(frame, OTHER) - 2, 2, X, axis, token) * columns * columns
        for j in range(columns):
            d[j] = _ZERO
            for i in range(columns):
                d[j] += c[i] * matrix[own + i * columns + j]
        _edit(frame, at, inner, channels, columns, change, weight)
    return 0


@njit(**OPTIONS)
def angle(frame, part, nparts):
    axis = place_of(frame, X, integer(frame, TENSORS, 2))
    channels, inner = size(frame, X, axis), inner_of(frame, X, axis)
    above, threshold = integer(frame, TENSORS, 0) == 1, np.float32(number(frame, TENSORS, 1))
    before = scratch(frame) + part * _part_bytes(frame)
    first, last = share(tokens_of(frame, X, axis), 1, part, nparts)
    for token in range(first, last):
        at, weight = token_start(token, channels, inner), token_number(frame, MASK, X, axis, token)
        _coordinates(frame, at, inner, channels, 2, before)
        c, d = f32s(before), f32s(before + 8)
        if above and not c[0] > threshold:
            weight = _ZERO
        sine, cosine = sine_cosine(token_number(frame, OTHER, X, axis, token))
        length = sqrt(c[0] * c[0] + c[1] * c[1])
        d[0], d[1] = length * cosine - c[0], length * sine - c[1]
        _edit(frame, at, inner, channels, 2, before + 8, weight)
    return 0


def _claims(types: Any, attributes: dict[str, Any]) -> bool:
    return types[MASK] is None or types[MASK].dtype in MASKS


_SCRATCH = Stage("subspace_scratch", scratch_bytes)
LOWRANK_MAP = OpKernels("lowrank_map", (), (), ERRORS, (DType.F32, DType.F32, DType.F32, None), claims=_claims)
LOWRANK_MAP.kernels.append(
    NumbaKernel((), (), Stage("lowrank_map_shape", _shape(0, False)), (Stage("lowrank_map", lowrank, parallel=True),), _SCRATCH)
)
TARGET_ANGLE = OpKernels("target_angle", (), (), ERRORS, (DType.F32, DType.F32, DType.F32, None), claims=_claims)
TARGET_ANGLE.kernels.append(
    NumbaKernel((), (), Stage("target_angle_shape", _shape(2, True)), (Stage("target_angle", angle, parallel=True),), _SCRATCH)
)
