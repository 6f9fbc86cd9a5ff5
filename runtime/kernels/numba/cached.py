"""Keys and values as caches store them: float32, float16, bfloat16, or int8 codes (whose scales are not applied here).

They are widened in registers: what is read from memory is what is stored, and sums are float32. Measured on one thread of an
AVX-512 machine, heads of 64: from the cache a key and its value take 8 to 9 nanoseconds in 16 and 8 bits and 10 in float32,
most of it for sums and exponentials, so that products of integers would save little; from memory, 1000 keys of 12 heads,
float16 and bfloat16 are 1.7 to 1.8 times as fast as float32 and int8 is 2.2 times.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit
from numba.extending import intrinsic

from actgraph.runtime.kernels.numba import simd
from actgraph.runtime.kernels.numba.memory import OPTIONS, f32s, i8s
from actgraph.runtime.kernels.numba.target import target
from actgraph.runtime.kernels.numba.weights import BF16, F16, F32, I8, float_at


@intrinsic
def load_f16(typing: Any, address: Any) -> Any:
    """16 float16, as floats: by the processor's own conversion, where it has one."""
    signature, written_out = simd._widened(16, 5, infinities=True)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if "f16c" not in target().features:
            return written_out(context, builder, signature, args)
        kind = ir.VectorType(ir.HalfType(), 16)
        raw = builder.load(builder.inttoptr(args[0], kind.as_pointer()))
        raw.align = 1
        return builder.fpext(raw, simd.F32.llvm)

    return signature, generate


@njit(**OPTIONS)
def _number_at(address, kind, index):
    if kind == I8:
        return np.float32(i8s(address)[index])
    return float_at(address, kind, index)


def _scoring(load: Any, kind: int, bytes_each: int) -> Any:
    @njit(**OPTIONS)
    def score(query, key, scores, count, width, ahead, step):
        line, s, whole = bytes_each * width, f32s(scores), width // 16 * 16
        for t in range(0, count, 4):
            t1, t2, t3 = min(t + 1, count - 1), min(t + 2, count - 1), min(t + 3, count - 1)
            r0, r1, r2, r3 = key + t * line, key + t1 * line, key + t2 * line, key + t3 * line
            for place in range(t * step, (t + 4) * step, 64):
                simd.prefetch_far(ahead + place)
            a = b = c = d = simd.splat_f32(np.float32(0))
            for k in range(0, whole, 16):
                v, at = simd.load_f32(query + 4 * k), bytes_each * k
                a, b = simd.fma(load(r0 + at), v, a), simd.fma(load(r1 + at), v, b)
                c, d = simd.fma(load(r2 + at), v, c), simd.fma(load(r3 + at), v, d)
            s0, s1, s2, s3 = simd.sum_f32(a), simd.sum_f32(b), simd.sum_f32(c), simd.sum_f32(d)
            for k in range(whole, width):
                v = f32s(query)[k]
                s0 += v * _number_at(r0, kind, k)
                s1 += v * _number_at(r1, kind, k)
                s2 += v * _number_at(r2, kind, k)
                s3 += v * _number_at(r3, kind, k)
            s[t], s[t1], s[t2], s[t3] = s0, s1, s2, s3

    return score


def _mixing(load: Any, kind: int, bytes_each: int) -> Any:
    @njit(**OPTIONS)
    def mix(value, width, scores, count, to, factor, ahead, step):
        p, line, c = f32s(scores), bytes_each * width, 0
        kept = simd.splat_f32(factor)
        while c + 64 <= width:
            at = to + 4 * c
            a, b = simd.mul(simd.load_f32(at), kept), simd.mul(simd.load_f32(at + 64), kept)
            d, e = simd.mul(simd.load_f32(at + 128), kept), simd.mul(simd.load_f32(at + 192), kept)
            row, once = value + bytes_each * c, step if c == 0 else 0
            for t in range(count):
                w = simd.splat_f32(p[t])
                for place in range(t * once, (t + 1) * once, 64):
                    simd.prefetch_far(ahead + place)
                a, b = simd.fma(load(row), w, a), simd.fma(load(row + 16 * bytes_each), w, b)
                d, e = simd.fma(load(row + 32 * bytes_each), w, d), simd.fma(load(row + 48 * bytes_each), w, e)
                row += line
            simd.store(at, a)
            simd.store(at + 64, b)
            simd.store(at + 128, d)
            simd.store(at + 192, e)
            c += 64
        while c + 16 <= width:
            a, row = simd.mul(simd.load_f32(to + 4 * c), kept), value + bytes_each * c
            for t in range(count):
                a = simd.fma(load(row + t * line), simd.splat_f32(p[t]), a)
            simd.store(to + 4 * c, a)
            c += 16
        sums = f32s(to)
        for i in range(c, width):
            one = sums[i] * factor
            for t in range(count):
                one += p[t] * _number_at(value + t * line, kind, i)
            sums[i] = one

    return mix


_score_f32, _mix_f32 = _scoring(simd.load_f32, F32, 4), _mixing(simd.load_f32, F32, 4)
_score_f16, _mix_f16 = _scoring(load_f16, F16, 2), _mixing(load_f16, F16, 2)
_score_bf16, _mix_bf16 = _scoring(simd.load_bf16, BF16, 2), _mixing(simd.load_bf16, BF16, 2)
_score_i8, _mix_i8 = _scoring(simd.load_i8_as_f32, I8, 1), _mixing(simd.load_i8_as_f32, I8, 1)


@njit(**OPTIONS)
def bytes_of(kind):
    """Of one stored number; 0 for a type that is not read here."""
    return 4 if kind == F32 else 2 if kind in (F16, BF16) else 1 if kind == I8 else 0


@njit(**OPTIONS)
def score(kind, query, key, scores, count, width, ahead, step):
    """The products of a query with ``count`` keys of ``width`` numbers.

    With each key the ``step`` bytes that belong to it are prefetched from ``ahead`` on.
    """
    if kind == F32:
        _score_f32(query, key, scores, count, width, ahead, step)
    elif kind == I8:
        _score_i8(query, key, scores, count, width, ahead, step)
    elif kind == F16:
        _score_f16(query, key, scores, count, width, ahead, step)
    else:
        _score_bf16(query, key, scores, count, width, ahead, step)


@njit(**OPTIONS)
def mix(kind, value, width, scores, count, to, factor, ahead, step):
    """``to = factor * to + scores @ value`` for ``count`` rows of values of ``width`` numbers; prefetches as ``score`` does."""
    if kind == F32:
        _mix_f32(value, width, scores, count, to, factor, ahead, step)
    elif kind == I8:
        _mix_i8(value, width, scores, count, to, factor, ahead, step)
    elif kind == F16:
        _mix_f16(value, width, scores, count, to, factor, ahead, step)
    else:
        _mix_bf16(value, width, scores, count, to, factor, ahead, step)


@njit(**OPTIONS)
def times(numbers, factors, count):
    """``count`` floats times as many others, in place."""
    a, b = f32s(numbers), f32s(factors)
    for i in range(count):
        a[i] *= b[i]
