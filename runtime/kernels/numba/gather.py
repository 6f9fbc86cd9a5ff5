"""Products with weights stored input by input, [K, N]: rows of the inputs that are kept are added up, the others never read.

Rows come from all over memory, which no hardware prefetcher follows: every row is prefetched while those before it are added.
Four rows are added at once to save traffic with the sums, which stay in the first-level cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from actgraph.runtime.kernels.numba import simd
from actgraph.runtime.kernels.numba.memory import OPTIONS, f32s, i32s, i64s
from actgraph.runtime.kernels.numba.weights import float_at

#: Columns whose sums are kept at once: 8 KB of sums.
TILE = 1024


def add_floats(load: Any, kind: int, width: int) -> Any:
    """``y[c] += sum of values[j] * W[places[j], c]`` for columns ``start`` to ``stop``; rows are ``line`` bytes long."""

    @njit(**OPTIONS)
    def add(y, weight, line, places, values, count, start, stop):
        where, x, sums = i64s(places), f32s(values), f32s(y)
        whole = start + (stop - start) // 16 * 16
        for first in range(0, count, 4):
            r0, r1 = weight + where[first] * line, weight + where[min(first + 1, count - 1)] * line
            r2, r3 = weight + where[min(first + 2, count - 1)] * line, weight + where[min(first + 3, count - 1)] * line
            x0 = x[first]
            x1 = x[first + 1] if first + 1 < count else np.float32(0)
            x2 = x[first + 2] if first + 2 < count else np.float32(0)
            x3 = x[first + 3] if first + 3 < count else np.float32(0)
            n = min(first + 4, count - 1)
            p0, p1 = weight + where[n] * line, weight + where[min(n + 1, count - 1)] * line
            p2, p3 = weight + where[min(n + 2, count - 1)] * line, weight + where[min(n + 3, count - 1)] * line
            v0, v1, v2, v3 = simd.splat_f32(x0), simd.splat_f32(x1), simd.splat_f32(x2), simd.splat_f32(x3)
            for c in range(start, whole, 16):
                at = c * width
                simd.prefetch(p0 + at)
                simd.prefetch(p1 + at)
                simd.prefetch(p2 + at)
                simd.prefetch(p3 + at)
                s = simd.load_f32(y + 4 * c)
                s = simd.fma(load(r0 + at), v0, s)
                s = simd.fma(load(r1 + at), v1, s)
                s = simd.fma(load(r2 + at), v2, s)
                s = simd.fma(load(r3 + at), v3, s)
                simd.store(y + 4 * c, s)
            for c in range(whole, stop):
                s = sums[c] + x0 * float_at(r0, kind, c)
                if first + 1 < count:
                    s += x1 * float_at(r1, kind, c)
                if first + 2 < count:
                    s += x2 * float_at(r2, kind, c)
                if first + 3 < count:
                    s += x3 * float_at(r3, kind, c)
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
    """Add quads of rows of codes to integer sums, for the bytes ``start`` to ``stop`` (multiples of 64) of each row.

    places: the rows, four to a quad. highs, lows: the upper and lower bytes of a quad's activations, packed. Sums: [TILE] of
    the upper and [TILE] of the lower bytes, from byte ``start`` on, permuted; for half bytes those of 64 even columns and of
    the 64 odd ones in turn.
    """
    step = 128 if halves else 64

    @njit(**OPTIONS)
    def codes(address):
        v = simd.load_i8(address)
        if halves:
            return simd.flip_half_sign_bits(v) if flip else v
        return simd.flip_sign_bits(v) if flip else v

    @njit(**OPTIONS)
    def add(sums, weight, line, places, highs, lows, first, last, final, start, stop):
        where, high, low = i64s(places), i32s(highs), i32s(lows)
        for quad in range(first, last):
            q = 4 * quad
            n = 4 * min(quad + 1, final - 1)
            r0, r1, r2, r3 = where[q] * line, where[q + 1] * line, where[q + 2] * line, where[q + 3] * line
            p0, p1, p2, p3 = where[n] * line, where[n + 1] * line, where[n + 2] * line, where[n + 3] * line
            h, l = simd.as_bytes(simd.splat_i32(high[quad])), simd.as_bytes(simd.splat_i32(low[quad]))
            at = sums
            for byte in range(start, stop, 64):
                here = weight + byte
                simd.prefetch(here + p0)
                simd.prefetch(here + p1)
                simd.prefetch(here + p2)
                simd.prefetch(here + p3)
                a, b, c, d = codes(here + r0), codes(here + r1), codes(here + r2), codes(here + r3)
                if halves:
                    even = simd.interleave(simd.low_halves(a), simd.low_halves(b), simd.low_halves(c), simd.low_halves(d))
                    _add_columns(at, even, h, l)
                    odd = simd.interleave(simd.high_halves(a), simd.high_halves(b), simd.high_halves(c), simd.high_halves(d))
                    _add_columns(at + 256, odd, h, l)
                else:
                    _add_columns(at, simd.interleave(a, b, c, d), h, l)
                at += 4 * step

    return add


@njit(**OPTIONS)
def column_of(place, halves):
    """The column (relative to the first of its tile) of the sum at ``place``: see ``simd.COLUMNS``."""
    block, inside = place // 64, place % 64
    j, lane, e = inside // 16, (inside % 16) // 4, inside % 4
    column = 16 * lane + 8 * (j // 2) + 4 * (j % 2) + e
    if halves:
        return 128 * (block // 2) + 2 * column + block % 2
    return 64 * block + column
