"""The op ``attention`` in float32, for few queries over many keys: keys and values are read once for all queries of their head.

They may be stored as float32, float16, bfloat16, or int8 with a scale for each row (see ``cached``).
A unit of work is a key head of a batch entry and a range of its keys (one of ``splits`` ranges, so that few heads still occupy
all threads). It goes through blocks of keys with a running maximum and sum for each query; a last stage joins the ranges.
Blocks that a boolean mask hides from a query are not read for it. A query that sees no key gives zeros; NaN among its scores
gives NaN.

Measured on one thread of an AVX-512 machine, 12 heads of 64: 12 microseconds over 100 keys; 105 over 1000 (58 GB/s of keys and
values), 90 where 4 key heads are shared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import njit

from actgraph.ops.dtypes import DType
from actgraph.ops.shapes import TensorType
from actgraph.runtime.kernels.numba import simd
from actgraph.runtime.kernels.numba.cached import bytes_of, mix, score, times
from actgraph.runtime.kernels.numba.frame import (
    address,
    element_type,
    number,
    parts,
    rank,
    room,
    scratch,
    set_shape_like,
    set_size,
    share,
    size,
)
from actgraph.runtime.kernels.numba.functions import exp, tanh
from actgraph.runtime.kernels.numba.kernel import NumbaKernel, OpKernels, Stage
from actgraph.runtime.kernels.numba.memory import OPTIONS, f32s, u8s
from actgraph.runtime.kernels.numba.norms import total
from actgraph.runtime.kernels.numba.weights import F32, I8

QUERY, KEY, VALUE, MASK, KEY_SCALE, VALUE_SCALE, Y = range(7)
SCALE, SOFTCAP = range(2)
TENSORS = 7
#: Keys that are scored at once: their keys and values stay in the first-level cache while queries meet them.
KEYS = 64
_ZERO, _LOWEST = np.float32(0), np.float32(-np.inf)


@njit(**OPTIONS)
def _wrong_scales(frame, tensor, scales):
    """Whether codes have no scale for each row, or numbers have scales; types that are read nowhere count as numbers."""
    if element_type(frame, tensor) != I8:
        return address(frame, scales) != 0
    if address(frame, scales) == 0 or rank(frame, scales) != 4:
        return True
    wrong = size(frame, scales, 3) != 1
    for axis in range(3):
        wrong |= size(frame, scales, axis) != size(frame, tensor, axis)
    return wrong


@njit(**OPTIONS)
def shape(frame, part, nparts):
    for tensor in (QUERY, KEY, VALUE):
        if rank(frame, tensor) != 4:
            return 1
    heads, groups = size(frame, QUERY, 1), size(frame, KEY, 1)
    if groups < 1 or heads % groups != 0 or size(frame, VALUE, 1) != groups:
        return 2
    if size(frame, KEY, 3) != size(frame, QUERY, 3) or size(frame, VALUE, 2) != size(frame, KEY, 2):
        return 2
    if size(frame, KEY, 0) != size(frame, QUERY, 0) or size(frame, VALUE, 0) != size(frame, QUERY, 0):
        return 2
    if _wrong_scales(frame, KEY, KEY_SCALE) or _wrong_scales(frame, VALUE, VALUE_SCALE):
        return 4
    if address(frame, MASK) != 0:
        if rank(frame, MASK) > 4:
            return 3
        for back in range(1, rank(frame, MASK) + 1):
            wanted = size(frame, KEY, 2) if back == 1 else size(frame, QUERY, 4 - back)
            if size(frame, MASK, -back) != 1 and size(frame, MASK, -back) != wanted:
                return 3
    set_shape_like(frame, Y, QUERY)
    set_size(frame, Y, 3, size(frame, VALUE, 3))
    return 0


# --- scratch: [scores of each part][scaled queries][for each split and query: maximum, sum, 62 spare; its mixed values] -----


@njit(**OPTIONS)
def _splits(frame):
    """Into how many ranges the keys of a head are cut."""
    units, nparts = size(frame, QUERY, 0) * size(frame, KEY, 1), parts(frame)
    if nparts <= 1 or (units >= nparts and units % nparts == 0):
        return 1
    return max(1, min(nparts, size(frame, KEY, 2) // KEYS))


@njit(**OPTIONS)
def _queries(frame):
    return size(frame, QUERY, 0) * size(frame, QUERY, 1) * size(frame, QUERY, 2)


@njit(**OPTIONS)
def _row_bytes(frame):
    return 64 + (size(frame, VALUE, 3) + 15) // 16 * 64


@njit(**OPTIONS)
def _scores_at(frame, part):
    return scratch(frame) + part * KEYS * 4


@njit(**OPTIONS)
def _query_at(frame, row):
    return scratch(frame) + parts(frame) * KEYS * 4 + row * size(frame, QUERY, 3) * 4


@njit(**OPTIONS)
def _state_at(frame, split, row):
    start = scratch(frame) + (parts(frame) * KEYS * 4 + _queries(frame) * size(frame, QUERY, 3) * 4 + 63) // 64 * 64
    return start + (split * _queries(frame) + row) * _row_bytes(frame)


@njit(**OPTIONS)
def scratch_bytes(frame, part, nparts):
    own = parts(frame) * KEYS * 4 + _queries(frame) * size(frame, QUERY, 3) * 4 + 64
    return own + _splits(frame) * _queries(frame) * _row_bytes(frame)


@njit(**OPTIONS)
def _mask_row(frame, batch, head, query):
    """Where the mask of a query begins, in elements, and the step from key to key (0 or 1)."""
    place, stride, axes = 0, 1, rank(frame, MASK)
    for back in range(1, axes + 1):
        index = 0 if back == 1 else query if back == 2 else head if back == 3 else batch
        length = size(frame, MASK, -back)
        if length > 1:
            place += index * stride
        stride *= length
    return place, (1 if axes > 0 and size(frame, MASK, -1) > 1 else 0)


@njit(**OPTIONS)
def _any_seen(mask, place, step, start, stop):
    if step == 0:
        return u8s(mask)[place] != 0
    seen = 0
    for t in range(start, stop):
        seen += u8s(mask)[place + t] != 0
    return seen > 0


@njit(**OPTIONS)
def _rows(frame, tensor, pair, start, each):
    """Where the rows of a key head begin, from token ``start`` on; ``each``: bytes of a number."""
    return address(frame, tensor) + each * (pair * room(frame, tensor) + start) * size(frame, tensor, 3)


@njit(**OPTIONS)
def _score(frame, query, pair, start, scores, count, cap, ahead, step):
    """The capped products of a query with ``count`` keys; prefetches as ``score`` does."""
    kind, width, s = element_type(frame, KEY), size(frame, QUERY, 3), f32s(scores)
    score(kind, query, _rows(frame, KEY, pair, start, bytes_of(kind)), scores, count, width, ahead, step)
    if kind == I8:
        times(scores, _rows(frame, KEY_SCALE, pair, start, 4), count)
    if cap != _ZERO:
        for t in range(count):
            s[t] = tanh(s[t] / cap) * cap


@njit(**OPTIONS)
def _hide(frame, scores, place, step, start, count):
    """Apply the mask to scores of the keys from ``start`` on."""
    mask, s = address(frame, MASK), f32s(scores)
    if element_type(frame, MASK) == F32:
        added = f32s(mask)
        for t in range(count):
            s[t] += added[place + (start + t) * step]
    else:
        seen = u8s(mask)
        for t in range(count):
            s[t] = s[t] if seen[place + (start + t) * step] != 0 else _LOWEST


@njit(**OPTIONS)
def _block(frame, state, pair, start, scores, count, ahead, step):
    """Scores of ``count`` keys into the state of a query; prefetches as ``score`` does."""
    s, known = f32s(scores), f32s(state)
    old = known[0]
    best, whole = simd.splat_f32(old), count // 16 * 16
    for t in range(0, whole, 16):
        best = simd.larger(simd.load_f32(scores + 4 * t), best)
    largest = simd.largest_f32(best)
    for t in range(whole, count):
        largest = s[t] if s[t] > largest else largest
    level = largest if largest > _LOWEST else _ZERO  # nothing seen yet: hidden scores become 0, NaN stays
    for t in range(count):
        s[t] = exp(s[t] - level)
    added = total(scores, count)
    factor = exp(old - level)
    known[0], known[1] = largest, known[1] * factor + added
    kind, width = element_type(frame, VALUE), size(frame, VALUE, 3)
    if kind == I8:
        times(scores, _rows(frame, VALUE_SCALE, pair, start, 4), count)
    mix(kind, _rows(frame, VALUE, pair, start, bytes_of(kind)), width, scores, count, state + 64, factor, ahead, step)


@njit(**OPTIONS)
def prepare(frame, part, nparts):
    """Queries times the scale."""
    scale, count = np.float32(number(frame, TENSORS, SCALE)), _queries(frame) * size(frame, QUERY, 3)
    q, scaled = f32s(address(frame, QUERY)), f32s(_query_at(frame, 0))
    for i in range(count):
        scaled[i] = q[i] * scale
    return 0


@njit(**OPTIONS)
def _line(frame, tensor):
    """Bytes of a row of keys or values."""
    return size(frame, tensor, 3) * bytes_of(element_type(frame, tensor))


@njit(**OPTIONS)
def _fetch(first, stop):
    """Prefetch what lies from one address to another."""
    for address_ in range(first, stop, 64):
        simd.prefetch_far(address_)


@njit(**OPTIONS)
def _keys_behind(frame, unit, last, start, end, splits):
    """Where the block of keys that a part reads after that of ``start`` begins, and how many there are."""
    pair, begin, keys = unit // splits, start + KEYS, size(frame, KEY, 2)
    if begin >= end:
        if unit + 1 >= last:
            return 0, 0
        pair, (begin, end) = (unit + 1) // splits, share(keys, KEYS, (unit + 1) % splits, splits)
    return _rows(frame, KEY, pair, begin, bytes_of(element_type(frame, KEY))), max(min(KEYS, end - begin), 0)


@njit(**OPTIONS)
def attend(frame, part, nparts):
    batches, heads, queries = size(frame, QUERY, 0), size(frame, QUERY, 1), size(frame, QUERY, 2)
    groups, keys, values, splits = size(frame, KEY, 1), size(frame, KEY, 2), size(frame, VALUE, 3), _splits(frame)
    key_line, value_line = _line(frame, KEY), _line(frame, VALUE)
    each, scores, cap = heads // groups, _scores_at(frame, part), np.float32(number(frame, TENSORS, SOFTCAP))
    masked, truth = address(frame, MASK) != 0, False
    if masked:
        truth = element_type(frame, MASK) != F32
    first, last = share(batches * groups * splits, 1, part, nparts)
    for unit in range(first, last):
        split, pair = unit % splits, unit // splits
        batch, group = pair // groups, pair % groups
        begin, end = share(keys, KEYS, split, splits)
        for head in range(group * each, group * each + each):
            for query in range(queries):
                state = f32s(_state_at(frame, split, (batch * heads + head) * queries + query))
                state[0], state[1] = _LOWEST, _ZERO
                for i in range(16, 16 + (values + 15) // 16 * 16):
                    state[i] = _ZERO
        for start in range(begin, end, KEYS):
            count = min(KEYS, end - start)
            # heads lie far apart, and no hardware looks from one to the next: values are prefetched as keys are scored, and the
            # keys behind them as values are mixed
            value_ahead = _rows(frame, VALUE, pair, start, bytes_of(element_type(frame, VALUE)))
            ahead, more = _keys_behind(frame, unit, last, start, end, splits)
            if unit == first and start == begin:
                row = _rows(frame, KEY, pair, start, bytes_of(element_type(frame, KEY)))
                _fetch(row, row + count * key_line)
            for head in range(group * each, group * each + each):
                for query in range(queries):
                    row = (batch * heads + head) * queries + query
                    place, step = 0, 0
                    if masked:
                        place, step = _mask_row(frame, batch, head, query)
                        if truth and not _any_seen(address(frame, MASK), place, step, start, start + count):
                            continue
                    lead = head == group * each and query == 0
                    _score(
                        frame, _query_at(frame, row), pair, start, scores, count, cap, value_ahead, value_line if lead else 0
                    )  # fmt: skip
                    if masked:
                        _hide(frame, scores, place, step, start, count)
                    behind = key_line if lead and more > 0 else 0
                    _block(frame, _state_at(frame, split, row), pair, start, scores, count, ahead, behind)
                    if behind > 0 and more > count:
                        _fetch(ahead + count * key_line, ahead + more * key_line)
    return 0


@njit(**OPTIONS)
def finish(frame, part, nparts):
    """Put the ranges of keys together."""
    splits, values = _splits(frame), size(frame, VALUE, 3)
    for row in range(_queries(frame)):
        largest = _LOWEST
        for split in range(splits):
            here = f32s(_state_at(frame, split, row))[0]
            largest = here if here > largest else largest
        level, total, y = largest if largest > _LOWEST else _ZERO, _ZERO, f32s(address(frame, Y) + 4 * row * values)
        for i in range(values):
            y[i] = _ZERO
        for split in range(splits):
            state = f32s(_state_at(frame, split, row))
            if state[1] == _ZERO:
                continue  # it has seen nothing
            factor = exp(state[0] - level) if state[0] > _LOWEST else np.float32(1)
            total += state[1] * factor
            for i in range(values):
                y[i] += state[16 + i] * factor
        if total != _ZERO:
            for i in range(values):
                y[i] /= total
    return 0


def _claims(types: Sequence[TensorType | None], attributes: dict[str, Any]) -> bool:
    """Masks of the types that are read here."""
    mask = types[MASK]
    return mask is None or mask.dtype in (DType.F32, DType.BOOL)


_SHAPE, _SCRATCH = Stage("attention_shape", shape), Stage("attention_scratch", scratch_bytes)
_STAGES = (
    Stage("attention_prepare", prepare),
    Stage("attention", attend, parallel=True),
    Stage("attention_finish", finish),
)
_STORED = (DType.F32, DType.F16, DType.BF16, DType.I8)

ATTENTION = OpKernels(
    op="attention",
    key_operands=(KEY, VALUE),
    key_attributes=(),
    errors=(
        "query, key and value must have rank 4",
        "query, key and value do not fit each other",
        "the mask does not fit",
        "int8 keys and values need a scale for each row, and others take none",
    ),
    operands=(DType.F32, None, None, None, DType.F32, DType.F32),
    claims=_claims,
    kernels=[
        NumbaKernel(types=(key, value), attributes=(), shape=_SHAPE, scratch=_SCRATCH, stages=_STAGES)
        for key in _STORED
        for value in _STORED
    ],
)
