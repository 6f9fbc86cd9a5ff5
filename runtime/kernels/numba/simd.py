"""Vectors of 64 bytes as numba values: what loops over arrays cannot say.

A vector is a value of LLVM, so a kernel that uses them is correct on every processor: where registers are narrower, LLVM
splits it. Two things are for particular processors: ``dpbusd`` is the instruction of AVX512-VNNI where there is one (else it is
written out in multiplications and additions with the same result), and ``prefetch``, a hint, does nothing elsewhere.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.extending import intrinsic, register_model

from actgraph.runtime.kernels.numba.target import target

_I1, _I8, _I16, _I32, _I64, _F32 = ir.IntType(1), ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()


class Vector(types.Type):  # type: ignore[misc]
    """A numba type whose values are LLVM vectors."""

    def __init__(self, name: str, element: Any, count: int) -> None:
        self.element, self.count = element, count
        super().__init__(name=name)

    @property
    def llvm(self) -> Any:
        return ir.VectorType(self.element, self.count)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Vector) -> None:
        super().__init__(manager, kind, kind.llvm)


F32 = Vector("f32x16", _F32, 16)
I32 = Vector("i32x16", _I32, 16)
I16 = Vector("i16x32", _I16, 32)
I8 = Vector("i8x64", _I8, 64)


def _constant(kind: Vector, values: Any) -> Any:
    return ir.Constant(kind.llvm, values)


def _splat(builder: Any, kind: Vector, scalar: Any) -> Any:
    undefined = ir.Constant(kind.llvm, ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(_I32, kind.count), [0] * kind.count))


def _load(builder: Any, address: Any, llvm: Any) -> Any:
    value = builder.load(builder.inttoptr(address, llvm.as_pointer()))
    value.align = 1
    return value


def _loader(kind: Vector) -> Any:
    def load(typing: Any, address: Any) -> Any:
        return kind(types.intp), lambda context, builder, signature, args: _load(builder, args[0], kind.llvm)

    return load


@intrinsic
def load_f32(typing: Any, address: Any) -> Any:
    """16 floats from anywhere in memory."""
    return _loader(F32)(typing, address)


@intrinsic
def load_i32(typing: Any, address: Any) -> Any:
    """16 32-bit integers."""
    return _loader(I32)(typing, address)


@intrinsic
def load_i8(typing: Any, address: Any) -> Any:
    """64 bytes."""
    return _loader(I8)(typing, address)


@intrinsic
def load_bf16(typing: Any, address: Any) -> Any:
    """16 bfloat16, as floats."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        raw = _load(builder, args[0], ir.VectorType(_I16, 16))
        wide = builder.shl(builder.zext(raw, I32.llvm), _constant(I32, [16] * 16))
        return builder.bitcast(wide, F32.llvm)

    return F32(types.intp), generate


@intrinsic
def load_i8_as_f32(typing: Any, address: Any) -> Any:
    """16 signed bytes, as floats."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.sitofp(builder.sext(_load(builder, args[0], ir.VectorType(_I8, 16)), I32.llvm), F32.llvm)

    return F32(types.intp), generate


def _widened(bits: int, exponent: int, *, infinities: bool) -> Any:
    """A loader of 16 floats of ``bits`` bits, ``exponent`` of them for the exponent, by integer arithmetic alone.

    The bits are put where a float32 has its own, and a multiplication puts the exponent right, of subnormal numbers too.
    """
    mantissa, raw = bits - 1 - exponent, ir.VectorType(ir.IntType(bits), 16)
    top = (1 << (bits - 1)) - 1
    endless = ((1 << exponent) - 1) << mantissa  # infinity, where there is one

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def same(value: int) -> Any:
            return _constant(I32, [value] * 16)

        wide = builder.zext(_load(builder, args[0], raw), I32.llvm)
        size = builder.and_(wide, same(top))
        sign = builder.shl(builder.and_(wide, same(1 << (bits - 1))), same(32 - bits))
        scale = 2.0 ** (127 - ((1 << (exponent - 1)) - 1))
        value = builder.fmul(builder.bitcast(builder.shl(size, same(23 - mantissa)), F32.llvm), _constant(F32, [scale] * 16))
        plain = builder.bitcast(value, I32.llvm)
        if infinities:
            special = builder.or_(builder.shl(builder.sub(size, same(endless)), same(23 - mantissa)), same(0x7F800000))
            plain = builder.select(builder.icmp_unsigned(">=", size, same(endless)), special, plain)
        else:
            plain = builder.select(builder.icmp_unsigned("==", size, same(top)), same(0x7FC00000), plain)
        return builder.bitcast(builder.or_(plain, sign), F32.llvm)

    return F32(types.intp), generate


@intrinsic
def load_f16(typing: Any, address: Any) -> Any:
    """16 float16, as floats."""
    return _widened(16, 5, infinities=True)


@intrinsic
def load_f8e4m3(typing: Any, address: Any) -> Any:
    """16 float8 of 4 exponent bits (finite but for NaN), as floats."""
    return _widened(8, 4, infinities=False)


@intrinsic
def load_f8e5m2(typing: Any, address: Any) -> Any:
    """16 float8 of 5 exponent bits, as floats."""
    return _widened(8, 5, infinities=True)


def _storer(kind: Vector) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        stored = builder.store(args[1], builder.inttoptr(args[0], kind.llvm.as_pointer()))
        stored.align = 1
        return context.get_dummy_value()

    return types.void(types.intp, kind), generate


@intrinsic
def store(typing: Any, address: Any, vector: Any) -> Any:
    """A vector to anywhere in memory."""
    return _storer(vector)


@intrinsic
def splat_f32(typing: Any, scalar: Any) -> Any:
    """One float 16 times."""
    return F32(types.float32), lambda context, builder, signature, args: _splat(builder, F32, args[0])


@intrinsic
def splat_i32(typing: Any, scalar: Any) -> Any:
    """One 32-bit integer 16 times."""
    return I32(types.int32), lambda context, builder, signature, args: _splat(builder, I32, args[0])


@intrinsic
def as_bytes(typing: Any, vector: Any) -> Any:
    """The same bits as 64 bytes."""
    return I8(vector), lambda context, builder, signature, args: builder.bitcast(args[0], I8.llvm)


@intrinsic
def add(typing: Any, a: Any, b: Any) -> Any:
    """Element by element."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fadd(*args) if a.element == _F32 else builder.add(*args)

    return a(a, b), generate


@intrinsic
def mul(typing: Any, a: Any, b: Any) -> Any:
    """Element by element."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fmul(*args) if a.element == _F32 else builder.mul(*args)

    return a(a, b), generate


@intrinsic
def fma(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """``a * b + c`` of floats, rounded once where the processor can."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fadd(builder.fmul(args[0], args[1], flags=("contract",)), args[2], flags=("contract",))

    return F32(a, b, c), generate


@intrinsic
def i32_to_f32(typing: Any, vector: Any) -> Any:
    """Integers as floats."""
    return F32(vector), lambda context, builder, signature, args: builder.sitofp(args[0], F32.llvm)


@intrinsic
def flip_sign_bits(typing: Any, vector: Any) -> Any:
    """Every byte xor 128: signed codes q as the unsigned q + 128."""
    return I8(vector), lambda context, builder, signature, args: builder.xor(args[0], _constant(I8, [-128] * 64))


@intrinsic
def low_halves(typing: Any, vector: Any) -> Any:
    """Of every byte the lower 4 bits."""
    return I8(vector), lambda context, builder, signature, args: builder.and_(args[0], _constant(I8, [15] * 64))


@intrinsic
def high_halves(typing: Any, vector: Any) -> Any:
    """Of every byte the upper 4 bits."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        wide = ir.VectorType(_I16, 32)
        shifted = builder.lshr(builder.bitcast(args[0], wide), ir.Constant(wide, [4] * 32))
        return builder.and_(builder.bitcast(shifted, I8.llvm), _constant(I8, [15] * 64))

    return I8(vector), generate


@intrinsic
def flip_half_sign_bits(typing: Any, vector: Any) -> Any:
    """Both halves of every byte xor 8: signed codes q of 4 bits as the unsigned q + 8."""
    return I8(vector), lambda context, builder, signature, args: builder.xor(args[0], _constant(I8, [-120] * 64))


@intrinsic
def shift_left_8(typing: Any, vector: Any) -> Any:
    """32-bit integers times 256."""
    return I32(vector), lambda context, builder, signature, args: builder.shl(args[0], _constant(I32, [8] * 16))


@intrinsic
def dpbusd(typing: Any, sums: Any, unsigned: Any, signed: Any) -> Any:
    """To each of 16 sums the products of its 4 unsigned and 4 signed bytes."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if target().vnni:
            kind = ir.FunctionType(I32.llvm, [I32.llvm, I8.llvm, I8.llvm])
            function = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.vpdpbusd.512")
            return builder.call(function, args)
        total, unsigned, signed = args[0], *(builder.bitcast(arg, I32.llvm) for arg in args[1:])
        for byte in range(4):
            a = builder.and_(builder.lshr(unsigned, _constant(I32, [8 * byte] * 16)), _constant(I32, [255] * 16))
            up = builder.shl(signed, _constant(I32, [24 - 8 * byte] * 16))
            total = builder.add(total, builder.mul(a, builder.ashr(up, _constant(I32, [24] * 16))))
        return total

    return I32(sums, unsigned, signed), generate


def _unpack(width: int, high: bool) -> list[int]:
    """Within each of four lanes of 16 bytes: the elements of ``width`` bytes of one half, of two vectors in turn."""
    order = []
    for lane in range(4):
        start = 16 * lane + (8 if high else 0)
        for place in range(0, 8, width):
            order += [start + place + byte for byte in range(width)] + [64 + start + place + byte for byte in range(width)]
    return order


#: Where the 64 columns of ``interleave`` go: element e of lane l of vector j is column COLUMNS[16 j + 4 l + e].
COLUMNS = [16 * lane + 8 * (j // 2) + 4 * (j % 2) + e for j in range(4) for lane in range(4) for e in range(4)]


@intrinsic
def interleave(typing: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """Four rows of 64 bytes as four vectors of 16 columns of 4 bytes, one of each row; the columns in the order COLUMNS."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def mix(x: Any, y: Any, width: int, high: bool) -> Any:
            return builder.shuffle_vector(x, y, ir.Constant(ir.VectorType(_I32, 64), _unpack(width, high)))

        pairs = [(mix(args[0], args[1], 1, high), mix(args[2], args[3], 1, high)) for high in (False, True)]
        made = [mix(x, y, 2, high) for x, y in pairs for high in (False, True)]
        return context.make_tuple(builder, signature.return_type, made)

    return types.UniTuple(I8, 4)(a, b, c, d), generate


@intrinsic(prefer_literal=True)
def spread_groups(typing: Any, address: Any, groups: Any) -> Any:
    """16 floats of which each of ``groups`` (1, 2 or 4; a constant) consecutive ones in memory fills an equal part."""
    count = groups.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        raw = ir.VectorType(_F32, count)
        value = _load(builder, args[0], raw)
        order = [place * count // 16 for place in range(16)]
        return builder.shuffle_vector(value, ir.Constant(raw, ir.Undefined), ir.Constant(ir.VectorType(_I32, 16), order))

    return F32(types.intp, groups), generate


@intrinsic
def sum_f32(typing: Any, vector: Any) -> Any:
    """The sum of 16 floats, pair by pair."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _tree(builder, args[0], builder.fadd, _F32)

    return types.float32(vector), generate


@intrinsic
def sum_i32(typing: Any, vector: Any) -> Any:
    """The sum of 16 integers, in 64 bits."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _tree(builder, builder.sext(args[0], ir.VectorType(_I64, 16)), builder.add, _I64)

    return types.int64(vector), generate


@intrinsic
def larger(typing: Any, a: Any, b: Any) -> Any:
    """Of each two floats the larger one; b where a is NaN."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.select(builder.fcmp_ordered(">", *args), *args)

    return F32(a, b), generate


@intrinsic
def largest_f32(typing: Any, vector: Any) -> Any:
    """The largest of 16 floats, none of which is NaN."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _tree(builder, args[0], lambda x, y: builder.select(builder.fcmp_ordered(">", x, y), x, y), _F32)

    return types.float32(vector), generate


def _tree(builder: Any, value: Any, combine: Any, element: Any) -> Any:
    count = 16
    while count > 1:
        half = count // 2
        undefined = ir.Constant(ir.VectorType(element, count), ir.Undefined)
        low, high = (
            builder.shuffle_vector(value, undefined, ir.Constant(ir.VectorType(_I32, half), list(range(start, start + half))))
            for start in (0, half)
        )
        value, count = combine(low, high), half
    return builder.extract_element(value, ir.Constant(_I32, 0))


def _prefetch(locality: int) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [_I8.as_pointer(), _I32, _I32, _I32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        hint = [ir.Constant(_I32, value) for value in (0, locality, 1)]
        builder.call(function, [builder.inttoptr(args[0], _I8.as_pointer()), *hint])
        return context.get_dummy_value()

    return types.void(types.intp), generate


@intrinsic
def prefetch(typing: Any, address: Any) -> Any:
    """A hint that the 64 bytes around ``address`` are read soon; any address is allowed."""
    return _prefetch(3)


@intrinsic
def prefetch_far(typing: Any, address: Any) -> Any:
    """As ``prefetch``, into the second-level cache: more of them can be under way at a time."""
    return _prefetch(2)


@intrinsic
def in_order(typing: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """Four vectors of 16 columns in the order COLUMNS, as 64 columns in their own order."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def pick(x: Any, y: Any, order: list[int]) -> Any:
            return builder.shuffle_vector(x, y, ir.Constant(ir.VectorType(_I32, len(order)), order))

        made = []
        for lane in range(4):
            quad = list(range(4 * lane, 4 * lane + 4))
            pairs = [pick(args[i], args[i + 1], [*quad, *(16 + e for e in quad)]) for i in (0, 2)]
            made.append(pick(pairs[0], pairs[1], list(range(16))))
        return context.make_tuple(builder, signature.return_type, made)

    return types.UniTuple(F32, 4)(a, b, c, d), generate


@intrinsic
def zipped(typing: Any, a: Any, b: Any) -> Any:
    """Two vectors' elements in turn, as two vectors."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        made = []
        for start in (0, 8):
            order = [place for i in range(start, start + 8) for place in (i, 16 + i)]
            made.append(builder.shuffle_vector(args[0], args[1], ir.Constant(ir.VectorType(_I32, 16), order)))
        return context.make_tuple(builder, signature.return_type, made)

    return types.UniTuple(F32, 2)(a, b), generate


@intrinsic
def sub(typing: Any, a: Any, b: Any) -> Any:
    """Element by element."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fsub(*args) if a.element == _F32 else builder.sub(*args)

    return a(a, b), generate
