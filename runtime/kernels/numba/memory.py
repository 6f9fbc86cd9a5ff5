"""Memory at an address, as arrays: how kernels read and write what the frame points to."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

#: Options of every function of a kernel: no checks, no exceptions.
OPTIONS: dict[str, Any] = {"error_model": "numpy", "boundscheck": False}
_ANY = 1 << 60


@intrinsic
def pointer(typing: Any, address: Any) -> Any:
    """An address as a pointer."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.intp), generate


@intrinsic
def bits_as_f32(typing: Any, bits: Any) -> Any:
    """The float32 with the bits of a 32-bit integer."""
    return types.float32(types.int32), lambda context, builder, signature, args: builder.bitcast(args[0], ir.FloatType())


@intrinsic
def f32_as_bits(typing: Any, value: Any) -> Any:
    """The bits of a float32 as a 32-bit integer."""
    return types.int32(types.float32), lambda context, builder, signature, args: builder.bitcast(args[0], ir.IntType(32))


@intrinsic
def sqrt(typing: Any, value: Any) -> Any:
    """The square root of a float32, rounded once; NaN below 0."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.FloatType(), [ir.FloatType()])
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.sqrt.f32"), args)

    return types.float32(types.float32), generate


@njit(**OPTIONS)
def f32s(address):
    """float32 from ``address`` on."""
    return carray(pointer(address), (_ANY,), np.float32)


@njit(**OPTIONS)
def f64s(address):
    return carray(pointer(address), (_ANY,), np.float64)


@njit(**OPTIONS)
def i64s(address):
    return carray(pointer(address), (_ANY,), np.int64)


@njit(**OPTIONS)
def i32s(address):
    return carray(pointer(address), (_ANY,), np.int32)


@njit(**OPTIONS)
def i16s(address):
    return carray(pointer(address), (_ANY,), np.int16)


@njit(**OPTIONS)
def i8s(address):
    return carray(pointer(address), (_ANY,), np.int8)


@njit(**OPTIONS)
def u8s(address):
    return carray(pointer(address), (_ANY,), np.uint8)
