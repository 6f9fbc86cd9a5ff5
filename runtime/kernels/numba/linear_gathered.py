"""The op ``linear`` for weights stored by inputs ([K, N], layout "in_out"): see ``gather``.

What a gate drops, and what is 0 without one, is never read. Parts are ranges of the inputs (half of each row for each thread
was measured to be slower by half): each gates, lists and multiplies its own, codes with a step of their own, and the sums are
added in order: results depend on the number of parts by rounding, and on nothing else.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from actgraph.runtime.kernels.numba import gates, gather, simd
from actgraph.runtime.kernels.numba.codes import code, inverse_of, low_byte, step_of
from actgraph.runtime.kernels.numba.frame import address, element_type, elements, integer, number, parts, rows, share
from actgraph.runtime.kernels.numba.gather import FEW, TILE
from actgraph.runtime.kernels.numba.kernel import NumbaKernel, Stage
from actgraph.runtime.kernels.numba.linear import (
    BIAS,
    BLOCK,
    CODES,
    FLOATS,
    KEEP,
    KEPT,
    LINEAR,
    SCALE,
    TENSORS,
    THRESHOLD,
    THRESHOLDS,
    TOKEN,
    WEIGHT,
    ZERO,
    X,
    Y,
    gate,
    gated_at,
    inputs_of,
    is_kept,
    outputs_of,
    padded,
    scale_at,
    shape,
    zero_at,
)
from actgraph.runtime.kernels.numba.memory import OPTIONS, f32s, i8s, i32s, i64s
from actgraph.runtime.kernels.numba.weights import I8, PACKED_I4, U8, code_at, float_at

# --- scratch: as for "out_in" up to the gated x; then for each part its list, then for each token and part its sums ----------
#
# A part lists those of its own range of inputs, for one token after the other; nothing but sums goes from thread to thread.
# A list of up to `room` places: [room places: 8 bytes][room values or, of codes, room / 4 upper and lower quads: 4 bytes]
# [first quad and sum of codes of each group: 16 bytes]. Groups are padded to quads, so that room is at most 4 inputs + 4.


#: How many products of codes surely fit one 32-bit sum.
MOST = 65536


@njit(**OPTIONS)
def group_of(frame):
    """How many inputs have one scale; or, where all have one, how many are summed before the scale is applied."""
    block = integer(frame, TENSORS, BLOCK)
    return block if block > 0 else min(max(inputs_of(frame), 1), MOST)


@njit(**OPTIONS)
def _range(frame, part, nparts):
    """The inputs of a part, whole groups of them."""
    block = integer(frame, TENSORS, BLOCK)
    return share(inputs_of(frame), block if block > 0 else 16, part, nparts)


@njit(**OPTIONS)
def _room(inputs):
    return 4 * inputs + 64


@njit(**OPTIONS)
def _list_bytes(inputs):
    return _room(inputs) * 24


@njit(**OPTIONS)
def _list_at(frame, part):
    """The list of a part, in memory of its own: parts before it have at most as many inputs as begin before its range."""
    start, _ = _range(frame, part, parts(frame))
    return gated_at(frame, rows(frame, 0)) + _list_bytes(start) + part * _list_bytes(0)


@njit(**OPTIONS)
def _sum_bytes(outputs):
    """Of the float sums of all columns."""
    return (outputs + 127) // 128 * 512


@njit(**OPTIONS)
def _tile_bytes(outputs):
    """Of a part: the integer sums of a tile, a cursor, and what zero points add to the columns."""
    return 8 * TILE + 64 + _sum_bytes(outputs)


@njit(**OPTIONS)
def _tile_at(frame, part):
    """The integer sums of a part, and what follows them."""
    lists = _list_bytes(inputs_of(frame)) + parts(frame) * _list_bytes(0)
    return gated_at(frame, rows(frame, 0)) + lists + part * _tile_bytes(outputs_of(frame))


@njit(**OPTIONS)
def _sums_of(frame, token, part):
    """The float sums of a part for a token, [N]."""
    return _tile_at(frame, parts(frame)) + (token * parts(frame) + part) * _sum_bytes(outputs_of(frame))


@njit(**OPTIONS)
def in_out_bytes(tokens, inputs, outputs, nparts):
    """Scratch memory of a linear of these sizes."""
    own = _list_bytes(inputs) + nparts * (_list_bytes(0) + _tile_bytes(outputs))
    return 1024 + own + tokens * (TOKEN + padded(inputs) * 4 + nparts * _sum_bytes(outputs))


@njit(**OPTIONS)
def in_out_scratch(frame, part, nparts):
    return in_out_bytes(rows(frame, 0), inputs_of(frame), outputs_of(frame), parts(frame))


# --- what is kept -------------------------------------------------------------------------------------------------------------


@njit(**OPTIONS)
def choose(frame, part, nparts):
    """Gates that look at all of x; thresholds are for the parts."""
    keep = integer(frame, TENSORS, KEEP)
    if keep == gates.TOP_K or keep == gates.LISTED:
        for token in range(rows(frame, 0)):
            if not gate(frame, token, gated_at(frame, token)):
                return 2
    return 0


@njit(**OPTIONS)
def _gated(frame, token, start, stop):
    """Where the gated x of a token is, of which ``start`` to ``stop`` are ready."""
    x, to, keep = address(frame, X) + 4 * token * inputs_of(frame), gated_at(frame, token), integer(frame, TENSORS, KEEP)
    if keep == gates.NONE:
        return x
    if keep != gates.TOP_K and keep != gates.LISTED:
        thresholds = address(frame, THRESHOLDS)
        many = thresholds != 0 and elements(frame, THRESHOLDS) > 1
        own = thresholds + 4 * start if many else thresholds
        gates.drop_below(
            x + 4 * start, to + 4 * start, stop - start, keep, number(frame, TENSORS, THRESHOLD), own, many
        )  # fmt: skip
    return to


@njit(**OPTIONS)
def _list_values(at, room, h, start, stop):
    """The kept inputs from ``start`` to ``stop`` and their values. Returns how many."""
    h, places, values, count = f32s(h), i64s(at), f32s(at + room * 8), 0
    for i in range(start, stop):
        places[count] = i
        values[count] = h[i]
        count += h[i] != np.float32(0)
    return count


@njit(**OPTIONS)
def _list_quads(at, room, h, start, stop, block, step, line):
    """The rows, of ``line`` bytes, of the kept inputs from ``start`` to ``stop`` in quads, group by group, and their codes.

    Places that are left over in a quad have a row that is there, and codes of 0.
    Behind the lists: for each group its first quad, and the sum of its codes; then how many quads there are.
    """
    h, inverse, count, group = f32s(h), inverse_of(step), 0, 0
    places, highs, lows, starts = i64s(at), i8s(at + room * 8), i8s(at + room * 12), i64s(at + room * 16)
    for begin in range(start, stop, block):
        first, total = count, np.int64(0)
        for i in range(begin, min(begin + block, stop)):
            places[count] = i
            count += h[i] != np.float32(0)
        for j in range(first, count):
            value = code(h[places[j]], inverse)
            rest = low_byte(value)
            total += np.int64(value)
            highs[j] = np.int8((value - rest) >> np.int32(8))
            lows[j] = np.int8(rest)
            places[j] *= line
        starts[2 * group], starts[2 * group + 1] = first // 4, total
        group += 1
        while count & 3 != 0:
            places[count] = places[count - 1]
            highs[count] = lows[count] = np.int8(0)
            count += 1
    starts[2 * group] = count // 4


@njit(**OPTIONS)
def finish(frame, part, nparts):
    """Add what the parts have summed, then bias and mask."""
    outputs, nparts = outputs_of(frame), i64s(frame)[1]
    for token in range(rows(frame, 0)):
        y = f32s(address(frame, Y) + 4 * token * outputs)
        first = f32s(_sums_of(frame, token, 0))
        for n in range(outputs):
            y[n] = first[n]
        for other in range(1, nparts):
            more = f32s(_sums_of(frame, token, other))
            for n in range(outputs):
                y[n] += more[n]
        if address(frame, BIAS) != 0:
            bias = f32s(address(frame, BIAS))
            for n in range(outputs):
                y[n] += bias[n]
        if address(frame, KEPT) != 0:
            for n in range(outputs):
                if not is_kept(frame, token, n):
                    y[n] = np.float32(0)
    return 0


@njit(**OPTIONS)
def _plain(frame, kind, packed, h, start, stop, first, last, y):
    """Add the columns ``first`` to ``last`` of the inputs ``start`` to ``stop``, value by value."""
    outputs, weight, block = outputs_of(frame), address(frame, WEIGHT), group_of(frame)
    h, out, grouped = f32s(h), f32s(y), integer(frame, TENSORS, BLOCK) > 0
    for n in range(first, last):
        total = np.float64(0)
        for k in range(start, stop):
            if h[k] == np.float32(0):
                continue
            index = k // block * outputs + n if grouped else n
            zero = zero_at(frame, index)
            if packed != 0 or kind in (U8, I8):
                value = np.float32(code_at(weight, kind, packed, k * outputs + n) - zero)
            else:
                value = float_at(weight, kind, k * outputs + n) - np.float32(zero)
            total += np.float64(h[k] * value * scale_at(frame, index))
        out[n] += np.float32(total)


@njit(**OPTIONS)
def _clear(y, count):
    for n in range(count):
        f32s(y)[n] = np.float32(0)


def float_main(load: Any, kind: int, width: int) -> Any:
    add = gather.add_floats(load, kind, width)

    @njit(**OPTIONS)
    def main(frame, part, nparts):
        outputs, at = outputs_of(frame), _list_at(frame, part)
        start, stop = _range(frame, part, nparts)
        room, plain = _room(stop - start), integer(frame, TENSORS, BLOCK) != 0 or address(frame, ZERO) != 0
        wide = gather.tile_width((outputs + 15) // 16 * 16, 16)
        for token in range(rows(frame, 0)):
            h, y = _gated(frame, token, start, stop), _sums_of(frame, token, part)
            _clear(y, outputs)
            if plain:
                _plain(frame, kind, 0, h, start, stop, 0, outputs, y)
                continue
            count = _list_values(at, room, h, start, stop)
            for tile in range(0, outputs, wide):
                end = min(tile + wide, outputs)
                add(y, address(frame, WEIGHT), outputs * width, at, at + room * 8, 0, count, tile, end)
            if address(frame, SCALE) != 0:
                for n in range(outputs):
                    f32s(y)[n] *= scale_at(frame, n)
        return 0

    return main


@njit(**OPTIONS)
def _write_offsets(frame, to, index, count, middle, total):
    """What the zero points of ``count`` columns from ``index`` on, less ``middle``, add to sums of codes."""
    out, zero, kind, factor = f32s(to), address(frame, ZERO), element_type(frame, ZERO), np.float32(total)
    for n in range(count):
        out[n] = np.float32(code_at(zero, kind, 0, index + n) - middle) * factor


def code_main(kind: int, packed: int) -> Any:
    flip, halves = (packed == PACKED_I4) if packed else kind == I8, bool(packed)
    flipped, codes_a_byte = (8 if packed else 128) if flip else 0, 2 if packed else 1
    centre = 0 if flip else 8 if packed else 128
    add_few, add_many, take = gather.code_sums(flip, halves)
    chunk = 64 * codes_a_byte

    @njit(**OPTIONS)
    def main(frame, part, nparts):
        outputs, weight, at, block = outputs_of(frame), address(frame, WEIGHT), _list_at(frame, part), group_of(frame)
        whole, line, sums = outputs // chunk * chunk, outputs // codes_a_byte, _tile_at(frame, part)
        cursor = sums + 8 * TILE
        offsets = cursor + 64
        start, stop = _range(frame, part, nparts)
        room, groups, before = _room(stop - start), (stop - start + block - 1) // block, start // block
        grouped = integer(frame, TENSORS, BLOCK) > 0
        wide = max(whole, chunk) if grouped and block <= 4 * FEW else gather.tile_width(whole, chunk)
        scales, single = 0 if elements(frame, SCALE) == 1 else address(frame, SCALE), scale_at(frame, 0)
        starts, highs, lows = i64s(at + room * 16), at + room * 8, at + room * 12
        many_zeros = address(frame, ZERO) != 0 and elements(frame, ZERO) > 1
        middle = centre if many_zeros else zero_at(frame, 0)
        for place in range(min(wide, TILE)):
            i32s(sums)[place] = i32s(sums)[TILE + place] = 0
        for token in range(rows(frame, 0)):
            h, y = _gated(frame, token, start, stop), _sums_of(frame, token, part)
            step = step_of(h + 4 * start, stop - start)
            _clear(y, outputs)
            if step != step or block > MOST:
                _plain(frame, kind, packed, h, start, stop, 0, outputs, y)
                continue
            _list_quads(at, room, h, start, stop, block, step, line)
            final = starts[2 * groups]
            for tile in range(0, whole, wide):
                end = min(tile + wide, whole)
                left, right = tile // codes_a_byte, end // codes_a_byte
                gather.set_cursor(cursor, weight, at, final, left, right)
                for _ in range((gather.LEAD + (right - left) * 4 * gather.TOGETHER) // 256):
                    gather.prefetch_on(cursor)
                later = 8 * outputs if grouped and scales != 0 else 0
                for place in range(tile, end if later > 0 else tile, 16):
                    simd.prefetch_far(scales + 4 * (before * outputs + place))
                    simd.prefetch_far(scales + 4 * ((before + 1) * outputs + place))
                for group in range(groups):
                    first, total, last = starts[2 * group], starts[2 * group + 1], starts[2 * group + 2]
                    if last == first:
                        continue
                    own = tile + (before + group) * outputs if grouped else tile
                    factors, to = scales + 4 * own if scales != 0 else 0, y + 4 * tile
                    zeros, offset = 0, (middle + flipped) * total
                    if many_zeros:
                        zeros = offsets
                        _write_offsets(frame, zeros, own, end - tile, middle, total)
                    if last - first <= FEW:
                        add_few(
                            weight, at, highs, lows, first, last, cursor, left, right, to, step, offset, factors, single,
                            zeros, later,
                        )  # fmt: skip
                    else:
                        add_many(sums, weight, at, highs, lows, first, last, cursor, left, right)
                        take(sums, end - tile, to, step, offset, factors, single, zeros)
            _plain(frame, kind, packed, h, start, stop, whole, outputs, y)  # columns that fill no vector
        return 0

    return main


_SHAPE, _SCRATCH = Stage("linear_shape", shape), Stage("linear_in_out_scratch", in_out_scratch)
for _dtype, _kind, _load, _width in FLOATS:
    LINEAR.kernels.append(
        NumbaKernel(
            types=(_dtype,),
            attributes=("in_out", ""),
            shape=_SHAPE,
            scratch=_SCRATCH,
            stages=(
                Stage("linear_choose", choose),
                Stage(f"linear_in_out_{_dtype}", float_main(_load, _kind, _width), parallel=True),
                Stage("linear_in_out_finish", finish),
            ),
        )
    )
for _dtype, _kind, _packed, _name in CODES:
    LINEAR.kernels.append(
        NumbaKernel(
            types=(_dtype,),
            attributes=("in_out", _name),
            shape=_SHAPE,
            scratch=_SCRATCH,
            stages=(
                Stage("linear_choose", choose),
                Stage(f"linear_in_out_{_name or _dtype}", code_main(_kind, _packed), parallel=True),
                Stage("linear_in_out_finish", finish),
            ),
        )
    )
