"""The op ``linear`` for weights stored by inputs ([K, N], layout "in_out"): see ``gather``.

What a gate drops, and what is 0 without one, is never read. Parts are ranges of columns, so that results are the same for any
number of threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from actgraph.runtime.kernels.numba import gather
from actgraph.runtime.kernels.numba.codes import code, inverse_of, low_byte, step_of
from actgraph.runtime.kernels.numba.frame import address, elements, integer, rows, scratch, share
from actgraph.runtime.kernels.numba.gather import TILE
from actgraph.runtime.kernels.numba.kernel import NumbaKernel, Stage
from actgraph.runtime.kernels.numba.linear import (
    BLOCK,
    CODES,
    FLOATS,
    KEPT,
    LINEAR,
    SCALE,
    TENSORS,
    TOKEN,
    WEIGHT,
    Y,
    ZERO,
    gate,
    gated_at,
    inputs_of,
    is_kept,
    outputs_of,
    padded,
    scale_at,
    shape,
    token_at,
    write_output,
    zero_at,
)
from actgraph.runtime.kernels.numba.memory import OPTIONS, f32s, i32s, i64s
from actgraph.runtime.kernels.numba.weights import F32, I8, PACKED_I4, U8, code_at, float_at

# --- scratch: as for "out_in" up to the gated x; then for each token the lists, then for each part its sums -----------------
#
# A list of up to `room` places: [room places: 8 bytes][room values or, of codes, room / 4 upper and lower quads: 4 bytes]
# [first quad of each group: 8 bytes]. Groups are padded to quads, so that room is at most 4 K + 4.


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
def _sums_at(frame, part):
    return _list_at(frame, rows(frame, 0)) + part * 8 * TILE


@njit(**OPTIONS)
def in_out_scratch(frame, part, nparts):
    tokens, inputs = rows(frame, 0), inputs_of(frame)
    return 1024 + tokens * (TOKEN + padded(inputs) * 4 + _list_bytes(inputs)) + i64s(frame)[1] * 8 * TILE


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


def _prepare(codes: bool) -> Any:
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
def _finish(frame, token, start, stop):
    """Bias and mask of the columns of a part."""
    y, base = f32s(address(frame, Y)), token * outputs_of(frame)
    for n in range(start, stop):
        write_output(frame, token, n, y[base + n])
        if address(frame, KEPT) != 0 and not is_kept(frame, token, n):
            y[base + n] = np.float32(0)


@njit(**OPTIONS)
def _plain(frame, kind, packed, token, start, stop):
    """Columns of a token, value by value, without bias; from the list of kept values."""
    inputs, outputs, weight, at = inputs_of(frame), outputs_of(frame), address(frame, WEIGHT), _list_at(frame, token)
    places, values, count = i64s(at), f32s(at + _room(inputs) * 8), i64s(token_at(frame, token))[2]
    y, block = f32s(address(frame, Y)), group_of(frame)
    for n in range(start, stop):
        total = np.float32(0)
        for j in range(count):
            k = places[j]
            index = k // block * outputs + n if integer(frame, TENSORS, BLOCK) > 0 else n
            zero = zero_at(frame, index)
            if packed != 0 or kind == U8 or kind == I8:
                value = np.float32(code_at(weight, kind, packed, k * outputs + n) - zero)
            else:
                value = float_at(weight, kind, k * outputs + n) - np.float32(zero)
            total += values[j] * value * scale_at(frame, index)
        y[token * outputs + n] = total


def _float_main(load: Any, kind: int, width: int) -> Any:
    add = gather.add_floats(load, kind, width)

    @njit(**OPTIONS)
    def main(frame, part, nparts):
        inputs, outputs = inputs_of(frame), outputs_of(frame)
        start, stop = share(outputs, 64, part, nparts)
        plain = integer(frame, TENSORS, BLOCK) != 0 or address(frame, ZERO) != 0
        for token in range(rows(frame, 0)):
            if plain:
                _plain(frame, kind, 0, token, start, stop)
            else:
                at, count = _list_at(frame, token), i64s(token_at(frame, token))[2]
                y = address(frame, Y) + 4 * token * outputs
                for n in range(start, stop):
                    f32s(y)[n] = np.float32(0)
                for tile in range(start, stop, 2 * TILE):
                    end = min(tile + 2 * TILE, stop)
                    add(y, address(frame, WEIGHT), outputs * width, at, at + _room(inputs) * 8, count, tile, end)
                if address(frame, SCALE) != 0:
                    for n in range(start, stop):
                        f32s(y)[n] *= scale_at(frame, n)
            _finish(frame, token, start, stop)
        return 0

    return main


def _code_main(kind: int, packed: int) -> Any:
    flip, halves = (packed == PACKED_I4) if packed else kind == I8, bool(packed)
    offset, codes_a_byte = (8 if packed else 128) if flip else 0, 2 if packed else 1
    add, chunk = gather.add_codes(flip, halves), 64 * codes_a_byte

    @njit(**OPTIONS)
    def flush(frame, sums, y, tile, count, group, grouped, total, step, overwrite):
        high, low, out, base = i32s(sums), i32s(sums + 4 * TILE), f32s(y), group * outputs_of(frame)
        for place in range(count):
            n = tile + gather.column_of(place, halves)
            index = base + n if grouped else n
            exact = 256 * np.int64(high[place]) + low[place] - (zero_at(frame, index) + offset) * total
            value = np.float32(exact) * step * scale_at(frame, index)
            out[n] = value if overwrite else out[n] + value

    @njit(**OPTIONS)
    def main(frame, part, nparts):
        inputs, outputs, weight = inputs_of(frame), outputs_of(frame), address(frame, WEIGHT)
        start, stop = share(outputs, chunk, part, nparts)
        whole = start + (stop - start) // chunk * chunk
        line, block, grouped = outputs // codes_a_byte, group_of(frame), integer(frame, TENSORS, BLOCK) > 0
        groups, room, sums = (inputs + block - 1) // block, _room(inputs), _sums_at(frame, part)
        for token in range(rows(frame, 0)):
            info = token_at(frame, token)
            step, quads, at = f32s(info)[0], i64s(info)[2], _list_at(frame, token)
            y = address(frame, Y) + 4 * token * outputs
            if step != step:
                _plain(frame, kind, packed, token, start, stop)
                _finish(frame, token, start, stop)
                continue
            starts = i64s(at + room * 16)
            for tile in range(start, whole, TILE):
                end = min(tile + TILE, whole)
                for group in range(groups):
                    for place in range(end - tile):
                        i32s(sums)[place] = 0
                        i32s(sums)[TILE + place] = 0
                    first, last = starts[2 * group], starts[2 * group + 2]
                    add(
                        sums, weight, line, at, at + room * 8, at + room * 12, first, last, quads,
                        tile // codes_a_byte, end // codes_a_byte,
                    )  # fmt: skip
                    flush(frame, sums, y, tile, end - tile, group, grouped, starts[2 * group + 1], step, group == 0)
            for n in range(whole, stop):
                f32s(y)[n] = _column(frame, kind, packed, token, n, step)
            _finish(frame, token, start, stop)
        return 0

    return main


@njit(**OPTIONS)
def _column(frame, kind, packed, token, n, step):
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
                Stage("linear_list_values", _prepare(False)),
                Stage(f"linear_in_out_{_dtype}", _float_main(_load, _kind, _width), parallel=True),
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
                Stage("linear_list_quads", _prepare(True)),
                Stage(f"linear_in_out_{_name or _dtype}", _code_main(_kind, _packed), parallel=True),
            ),
        )
    )
