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

#: Columns whose sums are kept at once: 10 KB of float sums, 20 KB of integer ones.
TILE = 2560
#: How far ahead rows are prefetched: what memory delivers while it is waited for, several times over.
AHEAD = 24 << 10
_ZERO = np.float32(0)


@njit(**OPTIONS)
def _quads_ahead(row):
    """How many quads of rows of ``row`` bytes to prefetch ahead."""
    return max(1, AHEAD // (4 * max(row, 64)))


@njit(**OPTIONS)
def tile_width(columns, chunk):
    """The columns of a tile where ``columns``, of whole chunks, are cut into equal ones: short pieces of rows cost most."""
    tiles = max((columns + TILE - 1) // TILE, 1)
    return max((columns // chunk + tiles - 1) // tiles, 1) * chunk


def add_floats(load: Any, kind: int, width: int) -> Any:
    """``y[c] += values[j] * W[places[j], c]`` for ``first <= j < last`` and columns ``start`` to ``stop``.

    Rows are ``line`` bytes long, of floats of the ONNX type ``kind``, of ``width`` bytes.
    """

    @njit(**OPTIONS)
    def add(y, weight, line, places, values, first, last, start, stop):
        where, x, sums, end = i64s(places), f32s(values), f32s(y), last - 1
        whole, ahead = start + (stop - start) // 16 * 16, 4 * _quads_ahead((stop - start) * width)
        for j in range(first, last, 4):
            j1, j2, j3 = min(j + 1, end), min(j + 2, end), min(j + 3, end)
            r0, r1, r2, r3 = where[j] * line, where[j1] * line, where[j2] * line, where[j3] * line
            x0, x1 = x[j], x[j1] if j + 1 <= end else _ZERO
            x2, x3 = x[j2] if j + 2 <= end else _ZERO, x[j3] if j + 3 <= end else _ZERO
            n = j + ahead
            n0, n1, n2, n3 = min(n, end), min(n + 1, end), min(n + 2, end), min(n + 3, end)
            p0, p1, p2, p3 = where[n0] * line, where[n1] * line, where[n2] * line, where[n3] * line
            v0, v1, v2, v3 = simd.splat_f32(x0), simd.splat_f32(x1), simd.splat_f32(x2), simd.splat_f32(x3)
            for c in range(start, whole, 16):
                at = weight + c * width
                simd.prefetch_far(at + p0)
                simd.prefetch_far(at + p1)
                simd.prefetch_far(at + p2)
                simd.prefetch_far(at + p3)
                s = simd.load_f32(y + 4 * c)
                s = simd.fma(load(at + r0), v0, s)
                s = simd.fma(load(at + r1), v1, s)
                s = simd.fma(load(at + r2), v2, s)
                s = simd.fma(load(at + r3), v3, s)
                simd.store(y + 4 * c, s)
            for c in range(whole, stop):
                s = sums[c] + x0 * float_at(weight + r0, kind, c)
                if j + 1 <= end:
                    s += x1 * float_at(weight + r1, kind, c)
                if j + 2 <= end:
                    s += x2 * float_at(weight + r2, kind, c)
                if j + 3 <= end:
                    s += x3 * float_at(weight + r3, kind, c)
                sums[c] = s

    return add


@njit(**OPTIONS)
def _add_columns(sums, columns, high, low):
    """64 sums of each kind, in the order of ``simd.COLUMNS``."""
    for j in range(4):
        simd.store(sums + 64 * j, simd.dpbusd(simd.load_i32(sums + 64 * j), columns[j], high))
        at = sums + 4 * TILE + 64 * j
        simd.store(at, simd.dpbusd(simd.load_i32(at), columns[j], low))


def add_codes(flip: bool, halves: bool) -> Any:
    """Add the quads ``first`` to ``last`` of rows of codes to integer sums, for the bytes ``start`` to ``stop`` of each row.

    places: the rows, four to a quad. highs, lows: the upper and lower bytes of a quad's activations, packed. final: the last
    quad that may be prefetched, and one. sums: [TILE] of the upper and [TILE] of the lower bytes, from byte ``start`` on, in
    the order COLUMNS; for half bytes those of 64 even columns and of the 64 odd ones in turn. ``stop - start`` is a multiple
    of 64.
    """

    @njit(**OPTIONS)
    def codes(address):
        v = simd.load_i8(address)
        if halves:
            return simd.flip_half_sign_bits(v) if flip else v
        return simd.flip_sign_bits(v) if flip else v

    @njit(**OPTIONS)
    def add(sums, weight, line, places, highs, lows, first, last, final, start, stop):
        where, high, low = i64s(places), i32s(highs), i32s(lows)
        ahead = _quads_ahead(stop - start)
        for place in range(4 * first, 4 * min(first + ahead, last)):
            for byte in range(start, stop, 64):
                simd.prefetch_far(weight + where[place] * line + byte)
        for quad in range(first, last):
            q, n = 4 * quad, 4 * min(quad + ahead, final - 1)
            r0, r1, r2, r3 = where[q] * line, where[q + 1] * line, where[q + 2] * line, where[q + 3] * line
            p0, p1, p2, p3 = where[n] * line, where[n + 1] * line, where[n + 2] * line, where[n + 3] * line
            above, below = simd.as_bytes(simd.splat_i32(high[quad])), simd.as_bytes(simd.splat_i32(low[quad]))
            at = sums
            for byte in range(start, stop, 64):
                here = weight + byte
                simd.prefetch_far(here + p0)
                simd.prefetch_far(here + p1)
                simd.prefetch_far(here + p2)
                simd.prefetch_far(here + p3)
                a, b, c, d = codes(here + r0), codes(here + r1), codes(here + r2), codes(here + r3)
                if halves:
                    even = simd.interleave(simd.low_halves(a), simd.low_halves(b), simd.low_halves(c), simd.low_halves(d))
                    _add_columns(at, even, above, below)
                    odd = simd.interleave(simd.high_halves(a), simd.high_halves(b), simd.high_halves(c), simd.high_halves(d))
                    _add_columns(at + 256, odd, above, below)
                    at += 512
                else:
                    _add_columns(at, simd.interleave(a, b, c, d), above, below)
                    at += 256

    return add


@njit(**OPTIONS)
def _values(sums, factor, high, low):
    """64 sums in the order of the columns, as floats: ``factor * (256 * (sum - high) + (sum - low))``; the sums become 0."""
    many, zero = simd.splat_f32(np.float32(256)), simd.splat_i32(np.int32(0))
    a = b = c = d = simd.splat_f32(np.float32(0))
    for j in range(4):
        upper, lower = simd.load_i32(sums + 64 * j), simd.load_i32(sums + 4 * TILE + 64 * j)
        simd.store(sums + 64 * j, zero)
        simd.store(sums + 4 * TILE + 64 * j, zero)
        v = simd.fma(simd.i32_to_f32(simd.sub(upper, high)), many, simd.i32_to_f32(simd.sub(lower, low)))
        v = simd.mul(v, factor)
        if j == 0:
            a = v
        elif j == 1:
            b = v
        elif j == 2:
            c = v
        else:
            d = v
    return simd.in_order(a, b, c, d)


@njit(**OPTIONS)
def _scaled(y, scales, scale, value):
    """16 columns: ``y += value * scale``."""
    factor = simd.load_f32(scales) if scales != 0 else simd.splat_f32(scale)
    simd.store(y, simd.fma(value, factor, simd.load_f32(y)))


def take_sums(halves: bool) -> Any:
    """``y[c] += step * scale[c] * (the integer sum of column c - offset)`` for ``count`` columns, and clear the sums.

    scales: where those of the columns are, 0 for one ``scale`` of all. offset: the same for every column.
    """

    @njit(**OPTIONS)
    def take(sums, y, count, step, offset, scales, scale):
        low = ((offset + 128) & 255) - 128
        above, below = simd.splat_i32(np.int32((offset - low) >> 8)), simd.splat_i32(np.int32(low))
        factor = simd.splat_f32(step)
        if halves:
            for place in range(0, count, 128):
                even = _values(sums + 4 * place, factor, above, below)
                odd = _values(sums + 4 * place + 256, factor, above, below)
                for j in range(4):
                    first, second = simd.zipped(even[j], odd[j])
                    at = 4 * (place + 32 * j)
                    _scaled(y + at, scales + at if scales != 0 else 0, scale, first)
                    _scaled(y + at + 64, scales + at + 64 if scales != 0 else 0, scale, second)
        else:
            for place in range(0, count, 64):
                columns = _values(sums + 4 * place, factor, above, below)
                for j in range(4):
                    at = 4 * (place + 16 * j)
                    _scaled(y + at, scales + at if scales != 0 else 0, scale, columns[j])

    return take
