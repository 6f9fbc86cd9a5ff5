"""Products with rows of codes in groups that ``dot`` has no form for: rows that fill no chunk, and zero points for each group.

Chunks are those of ``dot``, and the last one of a row is read beyond the row: there activations are 0, and scales count as 0.
Rows at whose end that would leave the weight (the last few) are the caller's. A lane of 4 bytes lies in one group, so that with
the lane's sum of activations a zero point is one multiplication.

Measured on one thread of an AVX-512 machine, 4-bit codes in groups of 32, beside the plain loop: 64 x 172 in 3.0 microseconds
(21), 172 x 64 in 2.3 (21), 768 x 768 with zero points in 24 (1220).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from actgraph.runtime.kernels.numba import simd
from actgraph.runtime.kernels.numba.codes import BYTE_CHUNK, HALF_CHUNK
from actgraph.runtime.kernels.numba.memory import OPTIONS
from actgraph.runtime.kernels.numba.weights import I8, U8

_LANES = ir.VectorType(ir.IntType(32), 16)


@intrinsic
def _first_lanes(typing: Any, vector: Any, count: Any) -> Any:
    """The first ``count`` of 16 floats, 0 behind them."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        undefined, same = ir.Constant(_LANES, ir.Undefined), ir.Constant(_LANES, [0] * 16)
        count = builder.trunc(args[1], ir.IntType(32))
        counts = builder.shuffle_vector(
            builder.insert_element(undefined, count, ir.Constant(ir.IntType(32), 0)), undefined, same
        )
        inside = builder.icmp_signed("<", ir.Constant(_LANES, list(range(16))), counts)
        return builder.select(inside, args[0], ir.Constant(simd.F32.llvm, [0.0] * 16))

    return simd.F32(vector, types.int64), generate


def _spread_codes(bits: int, signed: bool) -> Any:
    """A loader of 16 integers of which each of ``groups`` (a constant) consecutive ones in memory fills an equal part."""

    def spread(typing: Any, address: Any, groups: Any) -> Any:
        count = groups.literal_value

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            raw, wide = ir.VectorType(ir.IntType(bits), count), ir.VectorType(ir.IntType(32), count)
            value = builder.load(builder.inttoptr(args[0], raw.as_pointer()))
            value.align = 1
            if bits < 32:
                value = builder.sext(value, wide) if signed else builder.zext(value, wide)
            order = ir.Constant(_LANES, [place * count // 16 for place in range(16)])
            return builder.shuffle_vector(value, ir.Constant(wide, ir.Undefined), order)

        return simd.I32(types.intp, groups), generate

    return intrinsic(prefer_literal=True)(spread)


_spread_u8, _spread_i8, _spread_i32 = _spread_codes(8, False), _spread_codes(8, True), _spread_codes(32, True)


def dot_loose(flip: bool, packed: bool, groups: int) -> Any:
    """``(row, later, scales, zeros, type of zeros, per group, one zero, chunks, count) -> sum`` of a row.

    groups: of a chunk (1, 2 or 4); a group of several chunks has ``per``. zeros: where the zero points of the row are, 0 where
    ``one`` is that of all. ``flip``: signed codes, taken as q + 8 (q + 128), which ``one`` or ``offset`` then holds.
    """
    codes_a_byte, offset = (2, 8 if flip else 0) if packed else (1, 128 if flip else 0)
    chunk_bytes = HALF_CHUNK if packed else BYTE_CHUNK

    @njit(**OPTIONS)
    def products(row, at):
        w, zero = simd.load_i8(row), simd.splat_i32(np.int32(0))
        if packed:
            if flip:
                w = simd.flip_half_sign_bits(w)
            even, odd = simd.low_halves(w), simd.high_halves(w)
            high = simd.dpbusd(simd.dpbusd(zero, even, simd.load_i8(at)), odd, simd.load_i8(at + 64))
            low = simd.dpbusd(simd.dpbusd(zero, even, simd.load_i8(at + 128)), odd, simd.load_i8(at + 192))
            return simd.add(simd.shift_left_8(high), low)
        if flip:
            w = simd.flip_sign_bits(w)
        high, low = simd.dpbusd(zero, w, simd.load_i8(at)), simd.dpbusd(zero, w, simd.load_i8(at + 64))
        return simd.add(simd.shift_left_8(high), low)

    @njit(**OPTIONS)
    def zeros_at(zeros, kind, index):
        if kind == U8:
            return _spread_u8(zeros + index, groups)
        if kind == I8:
            return _spread_i8(zeros + index, groups)
        return _spread_i32(zeros + 4 * index, groups)

    @njit(**OPTIONS)
    def dot(row, later, scales, zeros, kind, per, one, chunks, count):
        total, every = simd.splat_f32(np.float32(0)), simd.splat_i32(np.int32(one + offset))
        more = simd.splat_i32(np.int32(offset))
        lane = 4 * codes_a_byte
        for chunk in range((count + 16 * lane - 1) // (16 * lane)):
            at, left = chunks + chunk * chunk_bytes, count - chunk * 16 * lane
            g = chunk * groups if groups > 1 else chunk // per
            simd.prefetch_far(later + 64 * chunk)
            zero = every if zeros == 0 else simd.add(zeros_at(zeros, kind, g), more)
            t = simd.sub(products(row + 64 * chunk, at), simd.mul(zero, simd.load_i32(at + chunk_bytes - 64)))
            scale = _first_lanes(simd.spread_groups(scales + 4 * g, groups), np.int64((left + lane - 1) // lane))
            total = simd.fma(simd.i32_to_f32(t), scale, total)
        return simd.sum_f32(total)

    return dot
