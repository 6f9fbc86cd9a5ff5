"""The op ``latent_edit`` in float32: a part has some of the tokens.

Latents that do not change cost nothing after they are encoded: their rows of the decoder are not read.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from actgraph.ops.dtypes import DType
from actgraph.ops.latent import STD_EPS
from actgraph.runtime.kernels.numba import simd
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
from actgraph.runtime.kernels.numba.kernel import NumbaKernel, OpKernels, Stage
from actgraph.runtime.kernels.numba.memory import OPTIONS, f32s, i64s, sqrt
from actgraph.runtime.kernels.numba.norms import squares, total
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

ERRORS = (
    "x has no such channel axis",
    "decoder and encoder must be [r, channels]",
    "bias, thresholds or values do not fit the latents",
    "values or mask do not fit the tokens of x",
    "this mode needs the encoder",
)
X, DECODER, ENCODER, BIAS, THRESHOLDS, VALUES, MASK, Y = range(8)
TENSORS = 8
MODE, VALUE, NORMALIZE, AXIS = range(4)
ADD, SET, SCALE = range(3)
NONE, RESCALE, LAYER_NORM = range(3)
_ZERO, _ONE, _EPS = np.float32(0), np.float32(1), np.float32(STD_EPS)
#: Multiplications that are worth another thread.
_WORTH = 32768


@njit(**OPTIONS)
def _unfit_rows(frame, tensor, axis):
    return rank(frame, tensor) != 2 or size(frame, tensor, 1) != size(frame, X, axis)


@njit(**OPTIONS)
def _unfit_latents(frame, tensor):
    return address(frame, tensor) != 0 and (rank(frame, tensor) != 1 or size(frame, tensor, 0) != size(frame, DECODER, 0))


@njit(**OPTIONS)
def latent_shape(frame, part, nparts):
    axis = place_of(frame, X, integer(frame, TENSORS, AXIS))
    if axis < 0:
        return 1
    if _unfit_rows(frame, DECODER, axis):
        return 2
    if address(frame, ENCODER) != 0:
        if _unfit_rows(frame, ENCODER, axis) or size(frame, ENCODER, 0) != size(frame, DECODER, 0):
            return 2
    elif integer(frame, TENSORS, MODE) != ADD and elements(frame, X) > 0:
        return 5
    if _unfit_latents(frame, BIAS) or _unfit_latents(frame, THRESHOLDS):
        return 3
    if address(frame, VALUES) != 0 and rank(frame, VALUES) > 0:
        if size(frame, VALUES, -1) != 1 and size(frame, VALUES, -1) != size(frame, DECODER, 0):
            return 3
        if unfit_tokens(frame, VALUES, rank(frame, VALUES) - 1, 1, X, axis):
            return 4
    if unfit_tokens(frame, MASK, rank(frame, MASK), 0, X, axis):
        return 4
    set_shape_like(frame, Y, X)
    return 0


@njit(**OPTIONS)
def _part_bytes(frame):
    """A token's normalised channels, and the changes of its latents."""
    channels = size(frame, X, place_of(frame, X, integer(frame, TENSORS, AXIS)))
    return ((channels + 15) // 16 * 16 + size(frame, DECODER, 0)) * 4 // 64 * 64 + 64


@njit(**OPTIONS)
def scratch_bytes(frame, part, nparts):
    words = i64s(frame)
    words[1] = max(1, min(words[1], elements(frame, X) * size(frame, DECODER, 0) // _WORTH))
    return parts(frame) * _part_bytes(frame)


@njit(**OPTIONS)
def _dot(a, b, count):
    """The product of two rows of floats: 16 sums, added pair by pair."""
    sums, whole = simd.splat_f32(_ZERO), count // 16 * 16
    for i in range(0, whole, 16):
        sums = simd.fma(simd.load_f32(a + 4 * i), simd.load_f32(b + 4 * i), sums)
    result, x, y = simd.sum_f32(sums), f32s(a), f32s(b)
    for i in range(whole, count):
        result += x[i] * y[i]
    return result


@njit(**OPTIONS)
def _normalized(frame, at, inner, channels, to):
    """Where a token's input of the encoder is (its own memory, or ``to``), and the factor of what is decoded."""
    source, kind = address(frame, X) + 4 * at, integer(frame, TENSORS, NORMALIZE)
    if inner == 1 and kind == NONE:
        return source, _ONE
    x, n = f32s(source), f32s(to)
    for i in range(channels):
        n[i] = x[i * inner]
    if kind == RESCALE:
        length = sqrt(squares(to, channels, _ZERO)) / sqrt(np.float32(channels))
        for i in range(channels):
            n[i] /= length
        return to, length
    if kind == LAYER_NORM:
        mean = total(to, channels) / np.float32(channels)
        std = sqrt(squares(to, channels, mean)) / sqrt(np.float32(channels - 1))
        for i in range(channels):
            n[i] = (n[i] - mean) / (std + _EPS)
        return to, std
    return to, _ONE


@njit(**OPTIONS)
def _changes(frame, token, axis, source, channels, latents, to):
    """What each latent changes by, to [latents]; whether any does."""
    mode, change, bias, thresholds = integer(frame, TENSORS, MODE), f32s(to), address(frame, BIAS), address(frame, THRESHOLDS)
    given, start, step, any_changes = address(frame, VALUES), 0, 0, False
    if given != 0 and rank(frame, VALUES) > 0:
        width = size(frame, VALUES, -1)
        step = 1 if width > 1 else 0
        start = token_index(frame, VALUES, rank(frame, VALUES) - 1, 1, X, axis, token) * width
    for j in range(latents):
        v = f32s(given)[start + j * step] if given != 0 else np.float32(number(frame, TENSORS, VALUE))
        if mode != ADD:
            f = _dot(source, address(frame, ENCODER) + 4 * j * channels, channels)
            if bias != 0:
                f += f32s(bias)[j]
            low = f32s(thresholds)[j] if thresholds != 0 else _ZERO
            low = _ZERO if low < _ZERO else low
            f = _ZERO if f <= low else f
            v = v - f if mode == SET else (v - _ONE) * f
        change[j] = v
        any_changes = any_changes or v != _ZERO
    return any_changes


@njit(**OPTIONS)
def latent_edit(frame, part, nparts):
    axis = place_of(frame, X, integer(frame, TENSORS, AXIS))
    channels, inner, latents = size(frame, X, axis), inner_of(frame, X, axis), size(frame, DECODER, 0)
    room = scratch(frame) + part * _part_bytes(frame)
    changes = room + (channels + 15) // 16 * 64
    x, y, d = f32s(address(frame, X)), f32s(address(frame, Y)), f32s(changes)
    first, last = share(tokens_of(frame, X, axis), 1, part, nparts)
    for token in range(first, last):
        at, weight = token_start(token, channels, inner), token_number(frame, MASK, X, axis, token)
        for i in range(channels):
            y[at + i * inner] = x[at + i * inner]
        if weight == _ZERO:
            continue
        source, out = _normalized(frame, at, inner, channels, room)
        if not _changes(frame, token, axis, source, channels, latents, changes):
            continue
        for j in range(latents):
            if d[j] == _ZERO:
                continue
            row, c = f32s(address(frame, DECODER) + 4 * j * channels), weight * (out * d[j])
            if inner == 1:
                for i in range(channels):
                    y[at + i] += c * row[i]
            else:
                for i in range(channels):
                    y[at + i * inner] += c * row[i]
    return 0


def _claims(types: Any, attributes: dict[str, Any]) -> bool:
    return types[MASK] is None or types[MASK].dtype in MASKS


LATENT_EDIT = OpKernels("latent_edit", (), (), ERRORS, (*[DType.F32] * 6, None), claims=_claims)
LATENT_EDIT.kernels.append(
    NumbaKernel(
        (),
        (),
        Stage("latent_edit_shape", latent_shape),
        (Stage("latent_edit", latent_edit, parallel=True),),
        Stage("latent_edit_scratch", scratch_bytes),
    )
)
