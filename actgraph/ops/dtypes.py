"""Element types under one name for torch, numpy and ONNX.

The canonical names are the short ones printed in canonical text: ``f32``, ``bf16``, ``i64``, ``bool`` ...
torch is imported only when a torch type is asked for.
"""

from __future__ import annotations

import enum
import functools
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch


class DType(enum.StrEnum):
    """An element type. ``DType("f32") == "f32"``."""

    F64 = "f64"
    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"
    F8E4M3 = "f8e4m3"
    F8E5M2 = "f8e5m2"
    I64 = "i64"
    I32 = "i32"
    I16 = "i16"
    I8 = "i8"
    U64 = "u64"
    U32 = "u32"
    U16 = "u16"
    U8 = "u8"
    I4 = "i4"
    U4 = "u4"
    BOOL = "bool"
    C64 = "c64"
    C128 = "c128"
    STRING = "string"

    @property
    def is_float(self) -> bool:
        return self in FLOATS

    @property
    def is_integer(self) -> bool:
        return self in INTEGERS

    @property
    def bits(self) -> int:
        """Bits of one element."""
        if self in (DType.BOOL, DType.STRING):
            return 8
        return int("".join(c for c in self.value.split("e")[0] if c.isdigit()))

    @property
    def numpy(self) -> np.dtype[Any]:
        """The numpy dtype (ml_dtypes for bfloat16, float8 and 4-bit integers)."""
        return _numpy_dtypes()[self]

    @property
    def torch(self) -> torch.dtype:
        """The torch dtype. Raises KeyError for types that torch lacks (4-bit, string)."""
        return _torch_dtypes()[self]

    @property
    def onnx(self) -> int:
        """The ``onnx.TensorProto`` number."""
        return _ONNX[self]

    @staticmethod
    def of(kind: Any) -> DType:
        """The DType of a name (``"float32"``, ``"f32"``), numpy dtype, torch dtype, ONNX number or onnx_ir dtype."""
        return _lookup(kind)


FLOATS = frozenset({DType.F64, DType.F32, DType.F16, DType.BF16, DType.F8E4M3, DType.F8E5M2})
INTEGERS = frozenset({DType.I64, DType.I32, DType.I16, DType.I8, DType.U64, DType.U32, DType.U16, DType.U8, DType.I4, DType.U4})
#: The float types that arithmetic ops take.
COMPUTE_FLOATS = frozenset({DType.F64, DType.F32, DType.F16, DType.BF16})

_ONNX = {
    DType.F32: 1, DType.U8: 2, DType.I8: 3, DType.U16: 4, DType.I16: 5, DType.I32: 6, DType.I64: 7, DType.STRING: 8,
    DType.BOOL: 9, DType.F16: 10, DType.F64: 11, DType.U32: 12, DType.U64: 13, DType.C64: 14, DType.C128: 15,
    DType.BF16: 16, DType.F8E4M3: 17, DType.F8E5M2: 19, DType.U4: 21, DType.I4: 22,
}  # fmt: skip
_FROM_ONNX = {number: dtype for dtype, number in _ONNX.items()}
_NAMES = {
    "float64": DType.F64, "double": DType.F64, "float32": DType.F32, "float": DType.F32, "float16": DType.F16,
    "half": DType.F16, "bfloat16": DType.BF16, "float8_e4m3fn": DType.F8E4M3, "float8_e5m2": DType.F8E5M2,
    "int64": DType.I64, "int32": DType.I32, "int16": DType.I16, "int8": DType.I8, "uint64": DType.U64,
    "uint32": DType.U32, "uint16": DType.U16, "uint8": DType.U8, "int4": DType.I4, "uint4": DType.U4,
    "bool": DType.BOOL, "bool_": DType.BOOL, "complex64": DType.C64, "complex128": DType.C128,
}  # fmt: skip


@functools.cache
def _numpy_dtypes() -> dict[DType, np.dtype[Any]]:
    import ml_dtypes

    special = {
        DType.BF16: ml_dtypes.bfloat16, DType.F8E4M3: ml_dtypes.float8_e4m3fn, DType.F8E5M2: ml_dtypes.float8_e5m2,
        DType.I4: ml_dtypes.int4, DType.U4: ml_dtypes.uint4,
    }  # fmt: skip
    table = {dtype: np.dtype(kind) for dtype, kind in special.items()}
    for name, dtype in _NAMES.items():
        if dtype not in table and hasattr(np, name) and name not in ("double", "half", "float"):
            table[dtype] = np.dtype(getattr(np, name))
    table[DType.BOOL] = np.dtype(np.bool_)
    table[DType.STRING] = np.dtype(object)
    return table


@functools.cache
def _torch_dtypes() -> dict[DType, torch.dtype]:
    import torch

    return {dtype: getattr(torch, name) for name, dtype in _NAMES.items() if hasattr(torch, name) and name != "bool_"}


@functools.lru_cache(maxsize=512)
def _lookup(kind: Any) -> DType:
    if isinstance(kind, DType):
        return kind
    if isinstance(kind, (int, enum.IntEnum)) and not isinstance(kind, bool):
        return _FROM_ONNX[int(kind)]
    if isinstance(kind, str):
        return _NAMES[kind] if kind in _NAMES else DType(kind)
    text = str(kind)
    if text.startswith("torch."):
        return _NAMES[text.removeprefix("torch.")]
    return _NAMES[np.dtype(kind).name]
