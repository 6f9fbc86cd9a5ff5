"""The op ``linear`` for weights stored by inputs ([K, N], layout "in_out"): see ``gather``.

What a gate drops, and what is 0 without one, is never read. Parts are ranges of the list of what is kept (half of each row for
each thread was measured to be slower by half), and their sums are added in order: results depend on the number of parts by
rounding, and on nothing else.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from actgraph.runtime.kernels.numba import gather
from actgraph.runtime.kernels.numba.codes import code, inverse_of, low_byte, step_of
from actgraph.runtime.kernels.numba.frame import address, elements, integer, parts, rows, share
from actgraph.runtime.kernels.numba.gather import TILE
from actgraph.runtime.kernels.numba.kernel import NumbaKernel, Stage
from actgraph.runtime.kernels.numba.linear import (
    BIAS,
    BLOCK,
    CODES,
    FLOATS,
    KEPT,
    LINEAR,
    SCALE,
    TENSORS,
    TOKEN,
    WEIGHT,
    ZERO,
    Y,
    gate,
    gated_at,
    inputs_of,
    is_kept,
    outputs_of,
    padded,
    scale_at,
    shape,
    token_at,
    zero_at,
)
from actgraph.runtime.kernels.numba.memory import OPTIONS, f32s, i8s, i32s, i64s
from actgraph.runtime.kernels.numba.weights import I8, PACKED_I4, U8, code_at, float_at

# --- scratch: as for "out_in" up to the gated x; then for each token the lists, then for each part its sums -----------------
#
# A list of up to `room` places: [room places: 8 bytes][room values or, of codes, room / 4 upper and lower quads: 4 bytes]
# [first quad and sum of codes of each group: 16 bytes]. Groups are padded to quads, so that room is at most 4 K + 4.


@njit(**OPTIONS)
def _room(inputs):
    return 4 * inputs + 64


@njit(**OPTIONS)
def _list_bytes(inputs):
    return _room(inputs) * 24


@njit(**OPTIONS)
def _list_at(frame, token):
    return gated_at(frame, rows(frame, 0)) + token * _list_bytes(inputs_of(frame))


@njit(**OPTIONS)
def _sum_bytes(outputs):
    """Of a part: integer sums of a tile, and float sums of all columns."""
    return 8 * TILE + (outputs + 127) // 128 * 512


@njit(**OPTIONS)
def _sums_at(frame, part):
    return _list_at(frame, rows(frame, 0)) + part * _sum_bytes(outputs_of(frame))


@njit(**OPTIONS)
def _part_at(frame, part):
    """The float sums of a part."""
    return _sums_at(frame, part) + 8 * TILE


@njit(**OPTIONS)
def in_out_bytes(tokens, inputs, outputs, nparts):
    """Scratch memory of a linear of these sizes."""
    return 1024 + tokens * (TOKEN + padded(inputs) * 4 + _list_bytes(inputs) + nparts * _sum_bytes(outputs))


@njit(**OPTIONS)
def in_out_scratch(frame, part, nparts):
    return in_out_bytes(rows(frame, 0), inputs_of(frame), outputs_of(frame), parts(frame))


@njit(**OPTIONS)
def group_of(frame):
    """How many inputs have one scale."""
    block = integer(frame, TENSORS, BLOCK)
    return block if block > 0 else max(inputs_of(frame), 1)


@njit(**OPTIONS)
def _list_values(frame, token):
    """The kept inputs of a token and their values. Returns how many."""
    inputs, at = inputs_of(frame), _list_at(frame, token)
    h, places, values, count = f32s(gated_at(frame, token)), i64s(at), f32s(at + _room(inputs) * 8), 0
    for i in range(inputs):
        places[count] = i
        values[count] = h[i]
        count += h[i] != np.float32(0)
    return count


@njit(**OPTIONS)
def _list_quads(frame, token, step):
    """The kept inputs of a token in quads, group by group: 0 in the places that are left over. Returns how many quads.

    Behind the lists: for each group its first quad, and the sum of its codes.
    """
    inputs, at, block = inputs_of(frame), _list_at(frame, token), group_of(frame)
    room, h, inverse = _room(inputs), f32s(gated_at(frame, token)), inverse_of(step)
    places, highs, lows, starts = i64s(at), i32s(at + room * 8), i32s(at + room * 12), i64s(at + room * 16)
    count, groups = 0, (inputs + block - 1) // block
    for group in range(groups):
        starts[2 * group] = count // 4
        total, high, low = np.int64(0), np.int32(0), np.int32(0)
        stop = min(group * block + block, inputs)
        for i in range(group * block, stop):
            if h[i] == np.float32(0):
                continue
            value = code(h[i], inverse)
            rest = low_byte(value)
            total += np.int64(value)
            shift = np.int32(8 * (count & 3))
            high |= (((value - rest) >> np.int32(8)) & np.int32(255)) << shift
            low |= (rest & np.int32(255)) << shift
            places[count] = i
            count += 1
            if count & 3 == 0:
                highs[count // 4 - 1], lows[count // 4 - 1] = high, low
                high, low = np.int32(0), np.int32(0)
        if count & 3 != 0:
            while count & 3 != 0:
                places[count] = places[count - 1]
                count += 1
            highs[count // 4 - 1], lows[count // 4 - 1] = high, low
        starts[2 * group + 1] = total
    starts[2 * groups] = count // 4
    return count // 4


def listing(codes: bool) -> Any:
    @njit(**OPTIONS)
    def prepare(frame, part, nparts):
        inputs = inputs_of(frame)
        for token in range(rows(frame, 0)):
            h, info = gated_at(frame, token), token_at(frame, token)
            if not gate(frame, token, h):
                return 2
            step = step_of(h, inputs) if codes else np.float32(0)
            f32s(info)[0] = step
            if codes and step == step:
                i64s(info)[2] = _list_quads(frame, token, step)
            else:
                i64s(info)[2] = _list_values(frame, token)
        return 0

    return prepare


@njit(**OPTIONS)
def _sums_of(frame, token, part):
    """The float sums of a part for a token, [N]."""
    return _part_at(frame, token * i64s(frame)[1] + part)


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
def _plain(frame, kind, packed, token, part, nparts, y, listed):
    """Columns of a part, value by value, to ``y``: of the list of kept values, or of all inputs where they are not listed."""
    inputs, outputs, weight, at = inputs_of(frame), outputs_of(frame), address(frame, WEIGHT), _list_at(frame, token)
    h, places, values = f32s(gated_at(frame, token)), i64s(at), f32s(at + _room(inputs) * 8)
    count, block, out = i64s(token_at(frame, token))[2] if listed else inputs, group_of(frame), f32s(y)
    start, stop = share(outputs, 1, part, nparts)
    for n in range(start, stop):
        total = np.float32(0)
        for j in range(count):
            k, x = (places[j], values[j]) if listed else (j, h[j])
            if x == np.float32(0):
                continue
            index = k // block * outputs + n if integer(frame, TENSORS, BLOCK) > 0 else n
            zero = zero_at(frame, index)
            if packed != 0 or kind in (U8, I8):
                value = np.float32(code_at(weight, kind, packed, k * outputs + n) - zero)
            else:
                value = float_at(weight, kind, k * outputs + n) - np.float32(zero)
            total += x * value * scale_at(frame, index)
        out[n] = total


def float_main(load: Any, kind: int, width: int) -> Any:
    add = gather.add_floats(load, kind, width)

    @njit(**OPTIONS)
    def main(frame, part, nparts):
        inputs, outputs = inputs_of(frame), outputs_of(frame)
        plain = integer(frame, TENSORS, BLOCK) != 0 or address(frame, ZERO) != 0
        for token in range(rows(frame, 0)):
            y = _sums_of(frame, token, part)
            for n in range(outputs):
                f32s(y)[n] = np.float32(0)
            if plain:
                _plain(frame, kind, 0, token, part, nparts, y, True)
                continue
            at, count = _list_at(frame, token), i64s(token_at(frame, token))[2]
            first, last = share(count, 4, part, nparts)
            for tile in range(0, outputs, TILE):
                end = min(tile + TILE, outputs)
                add(y, address(frame, WEIGHT), outputs * width, at, at + _room(inputs) * 8, first, last, tile, end)
            if address(frame, SCALE) != 0:
                for n in range(outputs):
                    f32s(y)[n] *= scale_at(frame, n)
        return 0

    return main


def code_main(kind: int, packed: int) -> Any:
    flip, halves = (packed == PACKED_I4) if packed else kind == I8, bool(packed)
    offset, codes_a_byte = (8 if packed else 128) if flip else 0, 2 if packed else 1
    add, take, chunk = gather.add_codes(flip, halves), gather.take_sums(halves), 64 * codes_a_byte

    @njit(**OPTIONS)
    def main(frame, part, nparts):
        inputs, outputs, weight = inputs_of(frame), outputs_of(frame), address(frame, WEIGHT)
        whole, line, block = outputs // chunk * chunk, outputs // codes_a_byte, group_of(frame)
        grouped = integer(frame, TENSORS, BLOCK) > 0
        groups, room, sums = (inputs + block - 1) // block, _room(inputs), _sums_at(frame, part)
        one_zero = address(frame, ZERO) == 0 or elements(frame, ZERO) == 1
        for token in range(rows(frame, 0)):
            info, y = token_at(frame, token), _sums_of(frame, token, part)
            step, quads, at = f32s(info)[0], i64s(info)[2], _list_at(frame, token)
            for n in range(outputs):
                f32s(y)[n] = np.float32(0)
            if step != step or not one_zero:
                _plain(frame, kind, packed, token, part, nparts, y, step != step)
                continue
            starts, highs, lows = i64s(at + room * 16), at + room * 8, at + room * 12
            if grouped:
                first_group, last_group = share(groups, 1, part, nparts)
                final = starts[2 * last_group]
            else:
                first_group, last_group = 0, 1
                first, final = share(quads, 1, part, nparts)
            single = elements(frame, SCALE) == 1
            scales, zero = 0 if single else address(frame, SCALE), zero_at(frame, 0) + offset
            for tile in range(0, whole, TILE):
                end = min(tile + TILE, whole)
                for place in range(2 * TILE):
                    i32s(sums)[place] = 0
                for group in range(first_group, last_group):
                    if grouped:
                        first, last, total = starts[2 * group], starts[2 * group + 2], starts[2 * group + 1]
                    else:
                        last, total = final, _sum_of_codes(highs, lows, first, final)
                    if last > first:
                        add(
                            sums, weight, line, at, highs, lows, first, last, final, tile // codes_a_byte,
                            end // codes_a_byte,
                        )  # fmt: skip
                        here = scales + 4 * (tile + (group * outputs if grouped else 0)) if scales != 0 else 0
                        take(sums, y + 4 * tile, end - tile, step, zero * total, here, scale_at(frame, 0))
            if part == 0:
                for n in range(whole, outputs):
                    f32s(y)[n] = _column(frame, kind, packed, token, n)
        return 0

    return main


@njit(**OPTIONS)
def _sum_of_codes(highs, lows, first, last):
    """The sum of the codes in a range of quads."""
    high, low, total = i8s(highs), i8s(lows), np.int64(0)
    for place in range(4 * first, 4 * last):
        total += 256 * np.int64(high[place]) + low[place]
    return total


@njit(**OPTIONS)
def _column(frame, kind, packed, token, n):
    """One column of codes that fills no vector."""
    inputs, outputs, weight, block = inputs_of(frame), outputs_of(frame), address(frame, WEIGHT), group_of(frame)
    h, total = f32s(gated_at(frame, token)), np.float32(0)
    for k in range(inputs):
        if h[k] != np.float32(0):
            index = k // block * outputs + n if integer(frame, TENSORS, BLOCK) > 0 else n
            q = code_at(weight, kind, packed, k * outputs + n) - zero_at(frame, index)
            total += h[k] * np.float32(q) * scale_at(frame, index)
    return total


_SHAPE, _SCRATCH = Stage("linear_shape", shape), Stage("linear_in_out_scratch", in_out_scratch)
for _dtype, _kind, _load, _width in FLOATS:
    LINEAR.kernels.append(
        NumbaKernel(
            types=(_dtype,),
            attributes=("in_out", ""),
            shape=_SHAPE,
            scratch=_SCRATCH,
            stages=(
                Stage("linear_list_values", listing(False)),
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
                Stage("linear_list_quads", listing(True)),
                Stage(f"linear_in_out_{_name or _dtype}", code_main(_kind, _packed), parallel=True),
                Stage("linear_in_out_finish", finish),
            ),
        )
    )
