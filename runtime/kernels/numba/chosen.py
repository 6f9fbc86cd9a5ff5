"""The ops ``topk_gate`` and ``index_gate`` in float32: a part has some of the tokens."""

from __future__ import annotations

import numpy as np
from numba import njit

from actgraph.ops.dtypes import DType
from actgraph.runtime.kernels.numba.frame import (
    address,
    element_type,
    integer,
    parts,
    rank,
    scratch,
    set_shape_like,
    share,
    size,
)
from actgraph.runtime.kernels.numba.gates import keep_largest
from actgraph.runtime.kernels.numba.kernel import NumbaKernel, OpKernels, Stage
from actgraph.runtime.kernels.numba.memory import OPTIONS, f32s, i32s, i64s
from actgraph.runtime.kernels.numba.operands import inner_of, place_of, token_index, token_start, tokens_of, unfit_tokens
from actgraph.runtime.kernels.numba.small import small_kernel
from actgraph.runtime.kernels.numba.weights import I32

K, GROUP, TOP_AXIS = range(3)
_ZERO, _I64 = np.float32(0), 7


@njit(**OPTIONS)
def top_shape(frame, part, nparts):
    axis, group = place_of(frame, 0, integer(frame, 2, TOP_AXIS)), integer(frame, 2, GROUP)
    if axis < 0:
        return 1
    if integer(frame, 2, K) < 1:
        return 3
    if group < 0 or (group > 0 and size(frame, 0, axis) % group != 0):
        return 2
    set_shape_like(frame, 1, 0)
    return 0


@njit(**OPTIONS)
def _part_bytes(frame):
    """Counters, and two rows of channels."""
    return 1024 + (8 * size(frame, 0, place_of(frame, 0, integer(frame, 2, TOP_AXIS))) + 63) // 64 * 64


@njit(**OPTIONS)
def top_scratch(frame, part, nparts):
    return parts(frame) * _part_bytes(frame)


@njit(**OPTIONS)
def topk(frame, part, nparts):
    axis, k, group = place_of(frame, 0, integer(frame, 2, TOP_AXIS)), integer(frame, 2, K), integer(frame, 2, GROUP)
    channels, inner = size(frame, 0, axis), inner_of(frame, 0, axis)
    group = group if group > 0 else channels
    counters = scratch(frame) + part * _part_bytes(frame)
    x, y = f32s(address(frame, 0)), f32s(address(frame, 1))
    row, kept = f32s(counters + 1024), f32s(counters + 1024 + 4 * channels)
    first, last = share(tokens_of(frame, 0, axis), 1, part, nparts)
    for token in range(first, last):
        at = token_start(token, channels, inner)
        if inner == 1:
            for start in range(at, at + channels, group):
                keep_largest(address(frame, 0) + 4 * start, address(frame, 1) + 4 * start, group, k, counters)
            continue
        for i in range(channels):
            row[i] = x[at + i * inner]
        for start in range(0, channels, group):
            keep_largest(counters + 1024 + 4 * start, counters + 1024 + 4 * (channels + start), group, k, counters)
        for i in range(channels):
            y[at + i * inner] = kept[i]
    return 0


@njit(**OPTIONS)
def index_shape(frame, part, nparts):
    axis = place_of(frame, 0, integer(frame, 3, 0))
    if axis < 0:
        return 1
    if element_type(frame, 1) != I32 and element_type(frame, 1) != _I64:
        return 2
    if rank(frame, 1) < 1 or unfit_tokens(frame, 1, rank(frame, 1) - 1, 1, 0, axis):
        return 2
    set_shape_like(frame, 2, 0)
    return 0


@njit(**OPTIONS)
def index(frame, part, nparts):
    axis, length, at = place_of(frame, 0, integer(frame, 3, 0)), size(frame, 1, -1), address(frame, 1)
    channels, inner, short = size(frame, 0, axis), inner_of(frame, 0, axis), element_type(frame, 1) == I32
    x, y = f32s(address(frame, 0)), f32s(address(frame, 2))
    first, last = share(tokens_of(frame, 0, axis), 1, part, nparts)
    for token in range(first, last):
        base = token_start(token, channels, inner)
        start = token_index(frame, 1, rank(frame, 1) - 1, 1, 0, axis, token) * length
        for i in range(channels):
            y[base + i * inner] = _ZERO
        for j in range(start, start + length):
            channel = np.int64(i32s(at)[j]) if short else i64s(at)[j]
            if channel >= channels:
                return 3
            if channel >= 0:
                y[base + channel * inner] = x[base + channel * inner]
    return 0


TOPK_GATE = OpKernels(
    op="topk_gate",
    key_operands=(),
    key_attributes=(),
    errors=("x has no such channel axis", "group_size does not divide the axis", "k is not positive"),
    operands=(DType.F32,),
    kernels=[
        NumbaKernel(
            (), (), Stage("topk_gate_shape", top_shape), (Stage("topk_gate", topk, parallel=True),),
            Stage("topk_gate_scratch", top_scratch),
        )
    ],
)  # fmt: skip
INDEX_GATE = OpKernels(
    op="index_gate",
    key_operands=(),
    key_attributes=(),
    errors=(
        "x has no such channel axis",
        "indices are no integers that fit the tokens of x",
        "an index is beyond the channels of x",
    ),
    operands=(DType.F32, None),
    kernels=[small_kernel("index_gate", index_shape, index)],
)
