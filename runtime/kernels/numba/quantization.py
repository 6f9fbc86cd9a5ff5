"""The ops ``quantize``, ``dequantize`` and ``token_scale``: how caches of 8 bits are written and read.

A part has some of the tokens: indices over all axes but the one of the scales. Codes of 4 bits are written as bytes, other
floats than float32 as float32: the library stores them as they are wanted. Sessions call the kernels for int8 and float32, by
which caches go; the others are there because plugins must take every call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import njit

from actgraph.ops.dtypes import DType
from actgraph.ops.shapes import TensorType
from actgraph.runtime.kernels.numba.frame import (
    address,
    element_type,
    elements,
    integer,
    rank,
    rows,
    set_shape_like,
    set_size,
    share,
    size,
)
from actgraph.runtime.kernels.numba.functions import rint
from actgraph.runtime.kernels.numba.kernel import OpKernels
from actgraph.runtime.kernels.numba.memory import OPTIONS, f32s, i8s, i16s, i32s, i64s, u8s
from actgraph.runtime.kernels.numba.operands import inner_of, place_of, token_start, tokens_of
from actgraph.runtime.kernels.numba.small import small_kernel
from actgraph.runtime.kernels.numba.weights import F8E4M3, F8E5M2, I8, I32, U8, code_at, float_at

X, SCALE, ZERO, Y = range(4)
TENSORS = 4
DTYPE, AXIS, BLOCK, PACKED = range(4)
_F = np.float32
_ONE, _HIGH = _F(1), _F(127)
_I64, _U32, _U64 = 7, 12, 13


@njit(**OPTIONS)
def _wrong(frame, tensor, axis, block):
    """Whether scales (zero points) are not one number, one per index of the axis of y, or one per block."""
    if address(frame, tensor) == 0 or (rank(frame, tensor) == 0 and block >= 0):
        return False
    if block == 0:
        if axis < 0 or rank(frame, tensor) != 1:
            return True
        return size(frame, tensor, 0) != 1 and size(frame, tensor, 0) != size(frame, Y, axis)
    if axis < 0 or block < 0 or rank(frame, tensor) != rank(frame, Y):
        return True
    for place in range(rank(frame, Y)):
        wanted = size(frame, Y, place)
        if size(frame, tensor, place) != ((wanted + block - 1) // block if place == axis else wanted):
            return True
    return False


@njit(**OPTIONS)
def shape(frame, part, nparts):
    set_shape_like(frame, Y, X)
    axis, block = place_of(frame, X, integer(frame, TENSORS, AXIS)), integer(frame, TENSORS, BLOCK)
    if _wrong(frame, SCALE, axis, block) or _wrong(frame, ZERO, axis, block):
        return 1
    return 0


@njit(**OPTIONS)
def unpacked_shape(frame, part, nparts):
    set_shape_like(frame, Y, X)
    if integer(frame, TENSORS, PACKED) != 0:
        if rank(frame, X) < 1:
            return 2
        if element_type(frame, X) != U8:
            return 3
        set_size(frame, Y, -1, 2 * size(frame, X, -1))
    axis, block = place_of(frame, X, integer(frame, TENSORS, AXIS)), integer(frame, TENSORS, BLOCK)
    if _wrong(frame, SCALE, axis, block) or _wrong(frame, ZERO, axis, block):
        return 1
    return 0


@njit(**OPTIONS)
def _zero(frame, index):
    """The zero point at ``index``, of one number that one; 0 where there is none."""
    if address(frame, ZERO) == 0:
        return np.int64(0)
    return code_at(address(frame, ZERO), element_type(frame, ZERO), 0, index if elements(frame, ZERO) > 1 else 0)


def _coding(low: int, high: int, view: Any, kind: Any) -> Any:
    """A function that writes ``count`` codes between ``low`` and ``high``, ``step`` elements apart. NaN becomes 0."""
    least, most, none = _F(low), _F(high), np.int32(0)

    @njit(**OPTIONS)
    def code(v, scale, zero):
        steps = rint(v / scale) + zero
        steps = least if steps < least else steps
        steps = most if steps > most else steps
        return kind(np.int32(steps) if steps == steps else none)

    @njit(**OPTIONS)
    def quantize(frame, start, count, step, scale, zero):
        x, q, middle = f32s(address(frame, X)), view(address(frame, Y)), _F(zero)
        if step == 1:
            for i in range(start, start + count):
                q[i] = code(x[i], scale, middle)
        else:
            for i in range(count):
                q[start + i * step] = code(x[start + i * step], scale, middle)

    return quantize


def _float8(mantissa: int, lowest: int, most: float) -> Any:
    """The same for float8: ``mantissa`` bits behind the point, 2^``lowest`` the smallest normal number. NaN stays NaN."""
    smallest, largest, infinite = _F(2.0**lowest), _F(most), np.int64(0x7F)

    @njit(**OPTIONS)
    def bits(v):
        size = min(abs(v), largest)
        step, base = smallest / _F(1 << mantissa), np.int64(0)
        while size >= _F(2 << mantissa) * step:
            step += step
            base += 1 << mantissa
        return (base + np.int64(rint(size / step))) | (0x80 if v < _F(0) else 0)

    @njit(**OPTIONS)
    def quantize(frame, start, count, step, scale, zero):
        x, q, kind = f32s(address(frame, X)), u8s(address(frame, Y)), F8E4M3 if mantissa == 3 else F8E5M2
        for i in range(count):
            v = x[start + i * step] / scale
            if v != v:
                q[start + i * step] = infinite
                continue
            q[start + i * step] = bits(v)
            if zero != 0:
                q[start + i * step] = bits(float_at(address(frame, Y), kind, start + i * step) + _F(zero))

    return quantize


@njit(**OPTIONS)
def _start(token, start, length, block, inner):
    """The scale of the block that begins at channel ``start`` of a token, and how far apart the scales of blocks are."""
    blocks = (length + block - 1) // block
    return (token // inner * blocks + start // block) * inner + token % inner


def _through(run: Any) -> Any:
    """A stage that calls ``run(frame, start, stop, step, scale, zero)`` for runs of elements that have one scale."""

    @njit(**OPTIONS)
    def stage(frame, part, nparts):
        axis, block, scales = (
            place_of(frame, Y, integer(frame, TENSORS, AXIS)),
            integer(frame, TENSORS, BLOCK),
            elements(frame, SCALE),
        )
        scale = f32s(address(frame, SCALE))
        if elements(frame, Y) == 0:
            return 0
        if scales == 1 and (address(frame, ZERO) == 0 or elements(frame, ZERO) == 1):
            first, last = share(elements(frame, Y), 16, part, nparts)
            run(frame, first, last - first, 1, scale[0], _zero(frame, 0))
            return 0
        length, inner = size(frame, Y, axis), inner_of(frame, Y, axis)
        tokens = tokens_of(frame, Y, axis)
        if block > 0:
            first, last = share(tokens, 1, part, nparts)
            for token in range(first, last):
                for start in range(0, length, block):
                    index = _start(token, start, length, block, inner)
                    at = token_start(token, length, inner) + start * inner
                    run(frame, at, min(block, length - start), inner, scale[index if scales > 1 else 0], _zero(frame, index))
            return 0
        if inner == 1:
            first, last = share(tokens, 1, part, nparts)
            for token in range(first, last):
                for i in range(length):
                    run(frame, token * length + i, 1, 1, scale[i if scales > 1 else 0], _zero(frame, i))
            return 0
        first, last = share(tokens // inner * length, 1, part, nparts)
        for row in range(first, last):
            i = row % length
            run(frame, row * inner, inner, 1, scale[i if scales > 1 else 0], _zero(frame, i))
        return 0

    return stage


@njit(**OPTIONS)
def _value(at, kind, packed, index):
    """The code at ``index`` as a float: of integers of up to 64 bits, of float8, of two 4-bit codes a byte."""
    if packed != 0 or kind in (I8, U8, I32):
        return _F(code_at(at, kind, packed, index))
    if kind == _I64:
        return _F(i64s(at)[index])
    if kind == _U64:
        return _F(np.uint64(i64s(at)[index]))
    if kind == _U32:
        return _F(np.int64(i32s(at)[index]) & 0xFFFFFFFF)
    return float_at(at, kind, index)


@njit(**OPTIONS)
def _dequantize(frame, start, count, step, scale, zero):
    q, y, kind, packed = address(frame, X), f32s(address(frame, Y)), element_type(frame, X), integer(frame, TENSORS, PACKED)
    if step == 1 and packed == 0 and kind == I8:
        codes, middle = i8s(q), _F(zero)
        for i in range(start, start + count):
            y[i] = (_F(codes[i]) - middle) * scale
    else:
        for i in range(count):
            at = start + i * step
            y[at] = (_value(q, kind, packed, at) - _F(zero)) * scale


@njit(**OPTIONS)
def scale_shape(frame, part, nparts):
    if rank(frame, 0) < 1:
        return 1
    set_shape_like(frame, 1, 0)
    set_size(frame, 1, -1, 1)
    return 0


@njit(**OPTIONS)
def token_scale(frame, part, nparts):
    channels = size(frame, 0, -1)
    first, last = share(rows(frame, 0), 1, part, nparts)
    scale = f32s(address(frame, 1))
    for token in range(first, last):
        x, largest = f32s(address(frame, 0) + 4 * token * channels), _F(0)
        for i in range(channels):
            largest = max(largest, abs(x[i]))
        found = largest / _HIGH
        scale[token] = found if found > _F(0) else _ONE
    return 0


_ZEROS = (None, DType.I8, DType.U8, DType.I32)
_ERRORS = ("scale or zero_point does not fit", "packed codes need an axis", "packed codes are bytes")
_CODES: tuple[tuple[DType, DType, Any], ...] = (
    (DType.I8, DType.I8, _coding(-128, 127, i8s, np.int8)),
    (DType.U8, DType.U8, _coding(0, 255, u8s, np.uint8)),
    (DType.I4, DType.I8, _coding(-8, 7, i8s, np.int8)),
    (DType.U4, DType.U8, _coding(0, 15, u8s, np.uint8)),
    (DType.I16, DType.I16, _coding(-32768, 32767, i16s, np.int16)),
    (DType.U16, DType.U16, _coding(0, 65535, i16s, np.int16)),
    (DType.F8E4M3, DType.F8E4M3, _float8(3, -6, 448.0)),
    (DType.F8E5M2, DType.F8E5M2, _float8(2, -14, 57344.0)),
)


def _type_of(types: Sequence[TensorType | None], operand: int) -> DType | None:
    kind = types[operand]
    return None if kind is None else kind.dtype


QUANTIZE = OpKernels(
    op="quantize",
    key_operands=(),
    key_attributes=("dtype",),
    errors=_ERRORS,
    operands=(DType.F32, DType.F32, None),
    result=DType.I8,
    result_attribute="dtype",
    written={str(dtype): kept for dtype, kept, _ in _CODES},
    claims=lambda types, attributes: attributes["dtype"] == "i8" and _type_of(types, ZERO) in _ZEROS,
    kernels=[
        small_kernel("quantize" if dtype is DType.I8 else f"quantize_{dtype}", shape, _through(run), (str(dtype),))
        for dtype, _, run in _CODES
    ],
)
DEQUANTIZE = OpKernels(
    op="dequantize",
    key_operands=(),
    key_attributes=(),
    errors=_ERRORS,
    operands=(None, DType.F32, None),
    result_attribute="dtype",
    written=dict.fromkeys(("f32", "f16", "bf16", "f64"), DType.F32),
    refused={SCALE: frozenset({DType.F64})},  # the op computes in float64 there
    claims=lambda types, attributes: (
        attributes["dtype"] == "f32" and _type_of(types, X) in (DType.I8, DType.U8) and _type_of(types, ZERO) in _ZEROS
    ),
    kernels=[small_kernel("dequantize", unpacked_shape, _through(_dequantize))],
)
TOKEN_SCALE = OpKernels(
    op="token_scale",
    key_operands=(),
    key_attributes=(),
    errors=("x needs a last axis",),
    operands=(DType.F32,),
    kernels=[small_kernel("token_scale", scale_shape, token_scale)],
)
