"""Products with weights stored row by row, [N, K]: each output is a dot product with one contiguous row.

Four rows are read at once, far apart (each thread reads four streams: adjacent short rows confuse hardware prefetchers, which
was measured as half the rate), and each is prefetched into the second-level cache: code of a byte a weight is too long for the
processor to look ahead far enough by itself (0.5 to 0.8 of the rate without). All tokens meet a row while it is in the cache.

Each function takes four rows, and four places to prefetch while it reads them: AHEAD on, or the rows that come later where only
some are read.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from actgraph.runtime.kernels.numba import simd
from actgraph.runtime.kernels.numba.codes import BYTE_CHUNK, HALF_CHUNK
from actgraph.runtime.kernels.numba.memory import OPTIONS, f32s, i8s, u8s
from actgraph.runtime.kernels.numba.weights import float_at

#: How far ahead each stream is prefetched, in bytes.
AHEAD = 8192


@njit(**OPTIONS)
def _ahead(p0, p1, p2, p3):
    simd.prefetch_far(p0)
    simd.prefetch_far(p1)
    simd.prefetch_far(p2)
    simd.prefetch_far(p3)


def dot_floats(load: Any, kind: int, width: int) -> Any:
    """``(rows, later, x, count) -> 4 sums`` for rows of floats of type ``kind``, of ``width`` bytes, that ``load`` reads."""

    @njit(**OPTIONS)
    def dot(r0, r1, r2, r3, p0, p1, p2, p3, x, count):
        a = b = c = d = simd.splat_f32(np.float32(0))
        whole = count // 16 * 16
        for k in range(0, whole, 16):
            v, at = simd.load_f32(x + 4 * k), k * width
            if at % 64 == 0:
                _ahead(p0 + at, p1 + at, p2 + at, p3 + at)
            a = simd.fma(load(r0 + at), v, a)
            b = simd.fma(load(r1 + at), v, b)
            c = simd.fma(load(r2 + at), v, c)
            d = simd.fma(load(r3 + at), v, d)
        y0, y1, y2, y3 = simd.sum_f32(a), simd.sum_f32(b), simd.sum_f32(c), simd.sum_f32(d)
        for k in range(whole, count):
            v = f32s(x)[k]
            y0 += v * float_at(r0, kind, k)
            y1 += v * float_at(r1, kind, k)
            y2 += v * float_at(r2, kind, k)
            y3 += v * float_at(r3, kind, k)
        return y0, y1, y2, y3

    return dot


def dot_bytes(flip: bool) -> Any:
    """``(rows, later, high, low, count) -> 4 integer sums`` over codes of a byte; ``flip``: signed ones, taken as q + 128."""

    @njit(**OPTIONS)
    def codes(address):
        return simd.flip_sign_bits(simd.load_i8(address)) if flip else simd.load_i8(address)

    @njit(**OPTIONS)
    def one(row, k):
        return np.int64(i8s(row)[k]) + 128 if flip else np.int64(u8s(row)[k])

    @njit(**OPTIONS)
    def dot(r0, r1, r2, r3, p0, p1, p2, p3, high, low, count):
        zero = simd.splat_i32(np.int32(0))
        h0, h1, h2, h3, l0, l1, l2, l3 = zero, zero, zero, zero, zero, zero, zero, zero
        whole = count // 64 * 64
        for k in range(0, whole, 64):
            above, below = simd.load_i8(high + k), simd.load_i8(low + k)
            _ahead(p0 + k, p1 + k, p2 + k, p3 + k)
            w = codes(r0 + k)
            h0, l0 = simd.dpbusd(h0, w, above), simd.dpbusd(l0, w, below)
            w = codes(r1 + k)
            h1, l1 = simd.dpbusd(h1, w, above), simd.dpbusd(l1, w, below)
            w = codes(r2 + k)
            h2, l2 = simd.dpbusd(h2, w, above), simd.dpbusd(l2, w, below)
            w = codes(r3 + k)
            h3, l3 = simd.dpbusd(h3, w, above), simd.dpbusd(l3, w, below)
        y0 = 256 * simd.sum_i32(h0) + simd.sum_i32(l0)
        y1 = 256 * simd.sum_i32(h1) + simd.sum_i32(l1)
        y2 = 256 * simd.sum_i32(h2) + simd.sum_i32(l2)
        y3 = 256 * simd.sum_i32(h3) + simd.sum_i32(l3)
        for k in range(whole, count):
            v = 256 * np.int64(i8s(high)[k]) + i8s(low)[k]
            y0 += v * one(r0, k)
            y1 += v * one(r1, k)
            y2 += v * one(r2, k)
            y3 += v * one(r3, k)
        return y0, y1, y2, y3

    return dot


def dot_byte_groups(flip: bool, groups: int) -> Any:
    """``(rows, later, scales, per group, chunks, count) -> 4 sums`` over codes of a byte whose scales change along the row.

    groups: how many groups a chunk of 64 codes has. ``count`` is a multiple of 64; a group of several chunks has ``per``.
    """

    @njit(**OPTIONS)
    def term(total, row, high, low, sums, scales):
        w = simd.load_i8(row)
        if flip:
            w = simd.flip_sign_bits(w)
        zero = simd.splat_i32(np.int32(0))
        t = simd.add(simd.shift_left_8(simd.dpbusd(zero, w, high)), simd.dpbusd(sums, w, low))
        return simd.fma(simd.i32_to_f32(t), simd.spread_groups(scales, groups), total)

    @njit(**OPTIONS)
    def dot(r0, r1, r2, r3, p0, p1, p2, p3, s0, s1, s2, s3, per, chunks, count):
        a = b = c = d = simd.splat_f32(np.float32(0))
        for chunk in range(count // 64):
            at, k = chunks + chunk * BYTE_CHUNK, 64 * chunk
            g = 4 * (chunk * groups if groups > 1 else chunk // per)
            high, low, sums = simd.load_i8(at), simd.load_i8(at + 64), simd.load_i32(at + 128)
            _ahead(p0 + k, p1 + k, p2 + k, p3 + k)
            a = term(a, r0 + k, high, low, sums, s0 + g)
            b = term(b, r1 + k, high, low, sums, s1 + g)
            c = term(c, r2 + k, high, low, sums, s2 + g)
            d = term(d, r3 + k, high, low, sums, s3 + g)
        return simd.sum_f32(a), simd.sum_f32(b), simd.sum_f32(c), simd.sum_f32(d)

    return dot


def dot_half_groups(flip: bool, groups: int) -> Any:
    """As ``dot_byte_groups`` for two codes a byte: a chunk is 64 bytes, 128 codes. ``flip``: signed codes, taken as q + 8."""

    @njit(**OPTIONS)
    def term(total, row, eh, oh, el, ol, sums, scales):
        w = simd.load_i8(row)
        if flip:
            w = simd.flip_half_sign_bits(w)
        even, odd = simd.low_halves(w), simd.high_halves(w)
        zero = simd.splat_i32(np.int32(0))
        high = simd.dpbusd(simd.dpbusd(zero, even, eh), odd, oh)
        t = simd.add(simd.shift_left_8(high), simd.dpbusd(simd.dpbusd(sums, even, el), odd, ol))
        return simd.fma(simd.i32_to_f32(t), simd.spread_groups(scales, groups), total)

    @njit(**OPTIONS)
    def dot(r0, r1, r2, r3, p0, p1, p2, p3, s0, s1, s2, s3, per, chunks, count):
        a = b = c = d = simd.splat_f32(np.float32(0))
        for chunk in range(count // 128):
            at, k = chunks + chunk * HALF_CHUNK, 64 * chunk
            g = 4 * (chunk * groups if groups > 1 else chunk // per)
            _ahead(p0 + k, p1 + k, p2 + k, p3 + k)
            eh, oh = simd.load_i8(at), simd.load_i8(at + 64)
            el, ol, sums = simd.load_i8(at + 128), simd.load_i8(at + 192), simd.load_i32(at + 256)
            a = term(a, r0 + k, eh, oh, el, ol, sums, s0 + g)
            b = term(b, r1 + k, eh, oh, el, ol, sums, s1 + g)
            c = term(c, r2 + k, eh, oh, el, ol, sums, s2 + g)
            d = term(d, r3 + k, eh, oh, el, ol, sums, s3 + g)
        return simd.sum_f32(a), simd.sum_f32(b), simd.sum_f32(c), simd.sum_f32(d)

    return dot
