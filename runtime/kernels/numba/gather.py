"""Products with weights stored input by input, [K, N]: rows of the inputs that are kept are added up, the others never read.

Rows come from all over memory, which no hardware prefetcher follows: while four rows are added, later ones are prefetched into
the second-level cache (into the first it is slower: fewer of them can be under way). Sums stay in the first-level cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from actgraph.runtime.kernels.numba import simd
from actgraph.runtime.kernels.numba.memory import OPTIONS, f32s, i32s, i64s
from actgraph.runtime.kernels.numba.weights import float_at

#: Columns whose sums are kept at once: 32 KB of float sums, 64 KB of integer ones.
TILE = 8192
#: How far ahead rows are prefetched: what memory delivers while it is waited for, several times over.
AHEAD = 24 << 10
#: Quads of rows that meet a chunk before its sums leave the registers: all of them where they are few.
FEW, TOGETHER = 8, 4
#: Bytes that are prefetched before the first block and what is used at once with it.
LEAD = 4096


@njit(**OPTIONS)
def _quads_ahead(row):
    """How many quads of rows of ``row`` bytes to prefetch ahead."""
    return max(1, AHEAD // (4 * max(row, 64)))


# What is prefetched next: a cursor over the bytes ``start`` to ``stop`` of rows, four rows at a time and a line of each in turn
# (the order in which memory was measured to deliver rows fastest), whatever the order in which they are used.
# [weight + byte][weight + stop][address of four places][the last such address][weight + start]


@njit(**OPTIONS)
def set_cursor(cursor, weight, places, quads, start, stop):
    words = i64s(cursor)
    words[0], words[1], words[2], words[3], words[4] = (
        weight + start,
        weight + stop,
        places,
        places + 32 * quads,
        weight + start,
    )


@njit(**OPTIONS)
def prefetch_on(cursor):
    """The next line of four rows."""
    words = i64s(cursor)
    place, column = words[2], words[0]
    if place == words[3]:
        return
    where = i64s(place)
    simd.prefetch_far(column + where[0])
    simd.prefetch_far(column + where[1])
    simd.prefetch_far(column + where[2])
    simd.prefetch_far(column + where[3])
    column += 64
    if column >= words[1]:
        words[2] = place + 32
        column = words[4]
    words[0] = column


@njit(**OPTIONS)
def tile_width(columns, chunk):
    """The columns of a tile where ``columns``, of whole chunks, are cut into equal ones: short pieces of rows cost most."""
    tiles = max((columns + TILE - 1) // TILE, 1)
    return max((columns // chunk + tiles - 1) // tiles, 1) * chunk


def add_floats(load: Any, kind: int, width: int) -> Any:
    """``y[c] += values[j] * W[places[j], c]`` for ``first <= j < last`` and columns ``start`` to ``stop``.

    Rows are ``line`` bytes long, of floats of the ONNX type ``kind``, of ``width`` bytes.
    """

    pieces, chunk = 4 // width, 64 // width  # of 16 columns; columns of a line

    @njit(**OPTIONS)
    def four(sums, at, r0, r1, r2, r3, v0, v1, v2, v3):
        s = simd.fma(load(at + r0), v0, simd.load_f32(sums))
        s = simd.fma(load(at + r1), v1, s)
        s = simd.fma(load(at + r2), v2, s)
        simd.store(sums, simd.fma(load(at + r3), v3, s))

    @njit(**OPTIONS)
    def one(y, row, value, start, stop):
        sums, v, whole = f32s(y), simd.splat_f32(value), start + (stop - start) // 16 * 16
        for c in range(start, whole, 16):
            simd.store(y + 4 * c, simd.fma(load(row + c * width), v, simd.load_f32(y + 4 * c)))
        for c in range(whole, stop):
            sums[c] += value * float_at(row, kind, c)

    @njit(**OPTIONS)
    def add(y, weight, line, places, values, first, last, start, stop):
        where, x, sums, end = i64s(places), f32s(values), f32s(y), first + (last - first) // 4 * 4
        lines, whole = start + (stop - start) // chunk * chunk, start + (stop - start) // 16 * 16
        ahead = 4 * _quads_ahead((stop - start) * width)
        for j in range(first, end, 4):
            x0, x1, x2, x3 = x[j], x[j + 1], x[j + 2], x[j + 3]
            r0, r1, r2, r3 = where[j] * line, where[j + 1] * line, where[j + 2] * line, where[j + 3] * line
            n = min(j + ahead, end - 4)
            p0, p1, p2, p3 = where[n] * line, where[n + 1] * line, where[n + 2] * line, where[n + 3] * line
            v0, v1, v2, v3 = simd.splat_f32(x0), simd.splat_f32(x1), simd.splat_f32(x2), simd.splat_f32(x3)
            for c in range(start, lines, chunk):
                at = weight + c * width
                simd.prefetch_far(at + p0)
                simd.prefetch_far(at + p1)
                simd.prefetch_far(at + p2)
                simd.prefetch_far(at + p3)
                for piece in range(pieces):
                    four(y + 4 * c + 64 * piece, at + 16 * width * piece, r0, r1, r2, r3, v0, v1, v2, v3)
            for c in range(lines, whole, 16):
                four(y + 4 * c, weight + c * width, r0, r1, r2, r3, v0, v1, v2, v3)
            for c in range(whole, stop):
                s = sums[c] + x0 * float_at(weight + r0, kind, c)
                s += x1 * float_at(weight + r1, kind, c)
                s += x2 * float_at(weight + r2, kind, c)
                sums[c] = s + x3 * float_at(weight + r3, kind, c)
        for j in range(end, last):
            one(y, weight + where[j] * line, x[j], start, stop)

    return add


@njit(**OPTIONS)
def _nothing():
    zero = simd.splat_i32(np.int32(0))
    return zero, zero, zero, zero


@njit(**OPTIONS)
def _met(sums, columns, activations):
    """64 sums and the products of 4 codes and 4 activations each."""
    return (
        simd.dpbusd(sums[0], columns[0], activations),
        simd.dpbusd(sums[1], columns[1], activations),
        simd.dpbusd(sums[2], columns[2], activations),
        simd.dpbusd(sums[3], columns[3], activations),
    )


@njit(**OPTIONS)
def _load_sums(at):
    return simd.load_i32(at), simd.load_i32(at + 64), simd.load_i32(at + 128), simd.load_i32(at + 192)


@njit(**OPTIONS)
def _store_sums(at, sums):
    simd.store(at, sums[0])
    simd.store(at + 64, sums[1])
    simd.store(at + 128, sums[2])
    simd.store(at + 192, sums[3])


@njit(**OPTIONS)
def _values(upper, lower, offset):
    """``256 * upper + lower - offset`` of 64 sums in the order of ``simd.COLUMNS``, as floats in the order of the columns."""
    least = ((offset + 128) & 255) - 128
    many, above, below = simd.splat_f32(np.float32(256)), np.int32((offset - least) >> 8), np.int32(least)
    a, b = simd.sub(upper[0], simd.splat_i32(above)), simd.sub(lower[0], simd.splat_i32(below))
    c, d = simd.sub(upper[1], simd.splat_i32(above)), simd.sub(lower[1], simd.splat_i32(below))
    e, f = simd.sub(upper[2], simd.splat_i32(above)), simd.sub(lower[2], simd.splat_i32(below))
    g, h = simd.sub(upper[3], simd.splat_i32(above)), simd.sub(lower[3], simd.splat_i32(below))
    return simd.in_order(
        simd.fma(simd.i32_to_f32(a), many, simd.i32_to_f32(b)),
        simd.fma(simd.i32_to_f32(c), many, simd.i32_to_f32(d)),
        simd.fma(simd.i32_to_f32(e), many, simd.i32_to_f32(f)),
        simd.fma(simd.i32_to_f32(g), many, simd.i32_to_f32(h)),
    )


@njit(**OPTIONS)
def _add_scaled(y, value, step, scales, scale, offsets):
    """16 columns: ``y += (value - offset) * step * scale``. Of scales and offsets: where they are; 0: one scale, no offsets."""
    factor = simd.mul(simd.load_f32(scales) if scales != 0 else simd.splat_f32(scale), simd.splat_f32(step))
    if offsets != 0:
        value = simd.sub(value, simd.load_f32(offsets))
    simd.store(y, simd.fma(value, factor, simd.load_f32(y)))


@njit(**OPTIONS)
def _further(address, bytes_):
    """An address further on; 0, for nothing, stays 0."""
    return address + bytes_ if address != 0 else 0


def code_sums(flip: bool, halves: bool) -> Any:
    """Functions ``(add_few, add_many, take)`` that add up rows of codes times activations.

    places: the rows' offsets in bytes, four to a quad; highs, lows: the upper and lower bytes of a quad's activations, packed.
    Quads ``first`` to ``last`` are added, for the bytes ``start`` to ``stop`` of each row, whole chunks of 64, while the rows
    of the cursor are prefetched. A chunk is met by several quads before the next one, so that its sums stay in registers.

    add_few: few quads, into ``y += step * scale * (sum - offset)``, where ``offset`` is one integer, and ``offsets`` has more
    for each column, or is 0. y, scales and offsets begin with the column of byte ``start``; the scales ``later`` bytes behind
    are prefetched.
    add_many: any number of quads, into sums: [TILE] of the upper and [TILE] of the lower bytes, in the order COLUMNS; for half
    bytes those of 64 even columns and of the 64 odd ones in turn.
    take: these sums of ``count`` columns into y as ``add_few`` does; the sums become 0.
    """

    @njit(**OPTIONS)
    def codes(address):
        v = simd.load_i8(address)
        if halves:
            return simd.flip_half_sign_bits(v) if flip else v
        return simd.flip_sign_bits(v) if flip else v

    @njit(**OPTIONS)
    def rows(column, where, quad):
        """64 bytes of the rows of a quad."""
        q = 4 * quad
        return (
            codes(column + where[q]),
            codes(column + where[q + 1]),
            codes(column + where[q + 2]),
            codes(column + where[q + 3]),
        )

    @njit(**OPTIONS)
    def meet(column, places, highs, lows, first, last, cursor, upper, lower):
        where, high, low = i64s(places), i32s(highs), i32s(lows)
        for quad in range(first, last):
            prefetch_on(cursor)
            a, b, c, d = rows(column, where, quad)
            columns = simd.interleave(a, b, c, d)
            upper = _met(upper, columns, simd.as_bytes(simd.splat_i32(high[quad])))
            lower = _met(lower, columns, simd.as_bytes(simd.splat_i32(low[quad])))
        return upper, lower

    @njit(**OPTIONS)
    def meet_halves(column, places, highs, lows, first, last, cursor, upper, lower, odd_upper, odd_lower):
        where, high, low = i64s(places), i32s(highs), i32s(lows)
        for quad in range(first, last):
            prefetch_on(cursor)
            a, b, c, d = rows(column, where, quad)
            above, below = simd.as_bytes(simd.splat_i32(high[quad])), simd.as_bytes(simd.splat_i32(low[quad]))
            even = simd.interleave(simd.low_halves(a), simd.low_halves(b), simd.low_halves(c), simd.low_halves(d))
            upper, lower = _met(upper, even, above), _met(lower, even, below)
            odd = simd.interleave(simd.high_halves(a), simd.high_halves(b), simd.high_halves(c), simd.high_halves(d))
            odd_upper, odd_lower = _met(odd_upper, odd, above), _met(odd_lower, odd, below)
        return upper, lower, odd_upper, odd_lower

    @njit(**OPTIONS)
    def bring(y, upper, lower, step, offset, scales, scale, offsets):
        """64 sums to 64 columns of y."""
        values = _values(upper, lower, offset)
        for j in range(4):
            _add_scaled(y + 64 * j, values[j], step, _further(scales, 64 * j), scale, _further(offsets, 64 * j))

    @njit(**OPTIONS)
    def bring_halves(y, upper, lower, odd_upper, odd_lower, step, offset, scales, scale, offsets):
        """64 sums of even columns and 64 of the odd ones between them to 128 columns of y."""
        even, odd = _values(upper, lower, offset), _values(odd_upper, odd_lower, offset)
        for j in range(4):
            left, right = simd.zipped(even[j], odd[j])
            at = 128 * j
            _add_scaled(y + at, left, step, _further(scales, at), scale, _further(offsets, at))
            _add_scaled(y + at + 64, right, step, _further(scales, at + 64), scale, _further(offsets, at + 64))

    @njit(**OPTIONS)
    def add_few(weight, places, highs, lows, first, last, cursor, start, stop, y, step, offset, scales, scale, offsets, later):
        none = _nothing()
        for byte in range(start, stop, 64):
            at, column = 4 * (byte - start) * (2 if halves else 1), weight + byte
            own, zeros = _further(scales, at), _further(offsets, at)
            for j in range(8 if halves else 4):
                simd.prefetch_far(own + later + 64 * j)
            if halves:
                u, v, odd_u, odd_v = meet_halves(
                    column, places, highs, lows, first, last, cursor, none, none, none, none
                )  # fmt: skip
                bring_halves(y + at, u, v, odd_u, odd_v, step, offset, own, scale, zeros)
            else:
                u, v = meet(column, places, highs, lows, first, last, cursor, none, none)
                bring(y + at, u, v, step, offset, own, scale, zeros)

    @njit(**OPTIONS)
    def add_many(sums, weight, places, highs, lows, first, last, cursor, start, stop):
        for begin in range(first, last, TOGETHER):
            end, at = min(begin + TOGETHER, last), sums
            for byte in range(start, stop, 64):
                beyond = at + 4 * TILE
                if halves:
                    u, v, odd_u, odd_v = meet_halves(
                        weight + byte, places, highs, lows, begin, end, cursor,
                        _load_sums(at), _load_sums(beyond), _load_sums(at + 256), _load_sums(beyond + 256),
                    )  # fmt: skip
                    _store_sums(at + 256, odd_u)
                    _store_sums(beyond + 256, odd_v)
                else:
                    u, v = meet(
                        weight + byte, places, highs, lows, begin, end, cursor, _load_sums(at), _load_sums(beyond)
                    )  # fmt: skip
                _store_sums(at, u)
                _store_sums(beyond, v)
                at += 512 if halves else 256

    @njit(**OPTIONS)
    def take(sums, count, y, step, offset, scales, scale, offsets):
        for column in range(0, count, 128 if halves else 64):
            at = 4 * column
            one, own, zeros = sums + at, _further(scales, at), _further(offsets, at)
            two = one + 4 * TILE
            if halves:
                bring_halves(
                    y + at, _load_sums(one), _load_sums(two), _load_sums(one + 256), _load_sums(two + 256), step, offset, own,
                    scale, zeros,
                )  # fmt: skip
                _store_sums(one + 256, _nothing())
                _store_sums(two + 256, _nothing())
            else:
                bring(y + at, _load_sums(one), _load_sums(two), step, offset, own, scale, zeros)
            _store_sums(one, _nothing())
            _store_sums(two, _nothing())

    return add_few, add_many, take
