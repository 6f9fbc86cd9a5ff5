"""The op ``rotary`` in float32: a part has some of the rows (batch, head, token)."""

from __future__ import annotations

from numba import njit

from actgraph.ops.dtypes import DType
from actgraph.runtime.kernels.numba.frame import address, integer, rank, rows, set_shape_like, share, size
from actgraph.runtime.kernels.numba.kernel import OpKernels
from actgraph.runtime.kernels.numba.memory import OPTIONS, f32s
from actgraph.runtime.kernels.numba.small import small_kernel

X, COS, SIN, Y = range(4)
STYLE, WIDTH = range(2)
HALF, INTERLEAVED = range(2)
TENSORS = 4


@njit(**OPTIONS)
def shape(frame, part, nparts):
    if rank(frame, X) != 4 or rank(frame, COS) != 3 or rank(frame, SIN) != 3:
        return 1
    head, width = size(frame, X, 3), integer(frame, TENSORS, WIDTH)
    if width < 0 or width > head or width % 2 != 0 or (width == 0 and head % 2 != 0):
        return 2
    for table in (COS, SIN):
        if size(frame, table, 0) != 1 and size(frame, table, 0) != size(frame, X, 0):
            return 3
        if size(frame, table, 1) != 1 and size(frame, table, 1) != size(frame, X, 2):
            return 3
        if size(frame, table, 2) != (width if width > 0 else head):
            return 3
    set_shape_like(frame, Y, X)
    return 0


@njit(**OPTIONS)
def _angles(frame, table, batch, token):
    """The row of a table for a token: batches and tokens may share one."""
    tokens = size(frame, table, 1)
    row = (batch if size(frame, table, 0) > 1 else 0) * tokens + (token if tokens > 1 else 0)
    return address(frame, table) + 4 * row * size(frame, table, 2)


@njit(**OPTIONS)
def rotate(frame, part, nparts):
    heads, tokens, head, width = size(frame, X, 1), size(frame, X, 2), size(frame, X, 3), integer(frame, TENSORS, WIDTH)
    width = width if width > 0 else head
    half, style = width // 2, integer(frame, TENSORS, STYLE)
    start, stop = share(rows(frame, X), 1, part, nparts)
    for row in range(start, stop):
        batch, token = row // (heads * tokens), row % tokens
        x, y = f32s(address(frame, X) + 4 * row * head), f32s(address(frame, Y) + 4 * row * head)
        c, s = f32s(_angles(frame, COS, batch, token)), f32s(_angles(frame, SIN, batch, token))
        if style == HALF:
            for i in range(half):
                first, second = x[i], x[half + i]
                y[i] = first * c[i] - second * s[i]
                y[half + i] = second * c[half + i] + first * s[half + i]
        else:
            for i in range(0, width, 2):
                first, second = x[i], x[i + 1]
                y[i] = first * c[i] - second * s[i]
                y[i + 1] = second * c[i + 1] + first * s[i + 1]
        for i in range(width, head):
            y[i] = x[i]
    return 0


ROTARY = OpKernels(
    op="rotary",
    key_operands=(),
    key_attributes=(),
    errors=(
        "x is [batch, heads, seq, head], cos and sin are [batch or 1, seq, rotary_dim]",
        "rotary_dim is no even part of the head",
        "cos and sin do not fit x",
    ),
    operands=(DType.F32, DType.F32, DType.F32),
    kernels=[small_kernel("rotary", shape, rotate)],
)
