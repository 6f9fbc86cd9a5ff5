"""Quantizer arithmetic on numpy arrays: ranges to scales, arrays to codes and back.

The conventions that have to be settled once are settled here, and everything else (ops, passes, lowering) uses them:

- ``q = clamp(round(x / s) + z, qmin, qmax)`` with rounding half to even and an integer ``z`` added *after* rounding;
  ``xhat = (q - z) * s``. This is what ONNX QuantizeLinear computes.
- a range always includes 0, so that ``z`` lies in the code range and zero is exact;
- symmetric scales are ``absmax / qmax`` (``/ 127`` for int8; the code -128 is left unused by the data the scale came
  from), with ``z`` = 0 for signed and the mid point for unsigned types;
- a scale that would be 0 or subnormal (an all-zero channel) is 1;
- statistics that are not finite are an error, never a silent scale.

Blocks (``block_size`` along an axis) follow ONNX: the scale has the shape of ``x`` with that axis divided by the block
size, rounded up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from actgraph.errors import InputError
from actgraph.ops.dtypes import DType

Array = np.ndarray[Any, Any]

#: Types that a quantizer may produce.
QUANTIZED = (DType.I8, DType.U8, DType.I4, DType.U4, DType.I16, DType.U16, DType.F8E4M3, DType.F8E5M2)
#: The smallest scale that is used as it is (the smallest normal float32).
SMALLEST_SCALE = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class CodeRange:
    """The codes of a quantized type. ``middle`` is the zero point of a symmetric quantizer."""

    qmin: float
    qmax: float
    middle: int

    @property
    def positive(self) -> float:
        """Steps from the middle to the largest code: what absmax is divided by."""
        return self.qmax - self.middle


def code_range(dtype: DType) -> CodeRange:
    """The code range of ``dtype``. Raises InputError for a type that quantizers do not produce."""
    if dtype is DType.F8E4M3:
        return CodeRange(-448.0, 448.0, 0)
    if dtype is DType.F8E5M2:
        return CodeRange(-57344.0, 57344.0, 0)
    if dtype not in QUANTIZED:
        raise InputError(f"{dtype} is not a quantized type", f"choose one of {', '.join(QUANTIZED)}")
    bits = dtype.bits
    if dtype.value.startswith("u"):
        return CodeRange(0, 2**bits - 1, 2 ** (bits - 1))
    return CodeRange(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1, 0)


def _finite(*arrays: Array) -> None:
    if not all(np.isfinite(a).all() for a in arrays):
        raise InputError("the range to quantize is not finite", "look for NaN or infinity in weights and calibration data")


def _usable(scale: Array) -> Array:
    return np.where(scale < SMALLEST_SCALE, np.float32(1), scale).astype(np.float32)


def symmetric_parameters(absmax: Any, dtype: DType = DType.I8) -> tuple[Array, Array]:
    """``(scale, zero_point)`` (float32, int32) of a symmetric quantizer for values up to ``absmax`` in magnitude."""
    absmax = np.asarray(absmax, np.float64)
    _finite(absmax)
    codes = code_range(dtype)
    scale = _usable((np.abs(absmax) / codes.positive).astype(np.float32))
    return scale, np.full(scale.shape, codes.middle, np.int32)


def affine_parameters(lo: Any, hi: Any, dtype: DType = DType.U8) -> tuple[Array, Array]:
    """``(scale, zero_point)`` (float32, int32) of an asymmetric quantizer for values in ``[lo, hi]`` and 0."""
    if dtype.is_float:
        raise InputError(f"{dtype} has no zero point", "use a symmetric quantizer")
    low = np.minimum(np.asarray(lo, np.float32), np.float32(0))
    high = np.maximum(np.asarray(hi, np.float32), np.float32(0))
    codes = code_range(dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        scale = (high - low) / np.float32(codes.qmax - codes.qmin)
    _finite(low, high, scale)
    scale = _usable(scale)
    zero = np.clip(np.rint(np.float32(codes.qmin) - low / scale), codes.qmin, codes.qmax)
    return scale, np.asarray(zero, np.int32)


def weight_parameters(
    weight: Array, dtype: DType = DType.I8, *, axis: int | None = 0, block_size: int = 0, symmetric: bool = True
) -> tuple[Array, Array]:
    """``(scale, zero_point)`` of a weight from its own values.

    axis: ``None`` for one pair; else one pair per index of ``axis`` (output channels); with ``block_size``, one pair per
    block of that many along ``axis`` (scales shaped like the weight, that axis divided).
    """
    if weight.size == 0:
        raise InputError("an empty weight cannot be quantized")
    values = weight.astype(np.float32, copy=False)
    if block_size:
        if axis is None:
            raise InputError("a blocked quantizer needs an axis")
        lo, hi = (_blocked(values, axis, block_size, reducer) for reducer in (np.minimum, np.maximum))
    else:
        axes = None if axis is None else tuple(i for i in range(values.ndim) if i != axis % values.ndim)
        lo, hi = values.min(axes), values.max(axes)
    if symmetric or dtype.is_float:
        return symmetric_parameters(np.maximum(-lo, hi), dtype)
    return affine_parameters(lo, hi, dtype)


def _blocked(values: Array, axis: int, size: int, reducer: np.ufunc) -> Array:
    starts = np.arange(0, values.shape[axis], size)
    result: Array = reducer.reduceat(values, starts, axis=axis)
    return result


def spread(parameter: Array, shape: tuple[int, ...], axis: int, block_size: int = 0) -> Array:
    """A scale or zero point laid out to broadcast against an array of ``shape``."""
    if parameter.ndim <= 1 and parameter.size == 1:
        return parameter.reshape(())
    if parameter.ndim == 1 and not block_size:
        return parameter.reshape([-1 if i == axis % len(shape) else 1 for i in range(len(shape))])
    expanded = np.repeat(parameter, block_size, axis)
    return np.take(expanded, np.arange(shape[axis]), axis)


def quantize_array(
    x: Array, scale: Array, zero_point: Array | None = None, dtype: DType = DType.I8, *, axis: int = 0, block_size: int = 0
) -> Array:
    """The codes of ``x``, as an array of ``dtype`` (4-bit types through ml_dtypes, one element each)."""
    codes = code_range(dtype)
    steps = np.asarray(x.astype(np.float32, copy=False) / spread(scale, x.shape, axis, block_size))
    if not dtype.is_float:
        np.rint(steps, out=steps)
        if zero_point is not None:
            steps += spread(zero_point, x.shape, axis, block_size).astype(np.float32)
    np.clip(steps, codes.qmin, codes.qmax, out=steps)
    whole = steps if dtype.is_float or dtype.bits > 4 else steps.astype(np.int8)
    return whole.astype(dtype.numpy)


def dequantize_array(q: Array, scale: Array, zero_point: Array | None = None, *, axis: int = 0, block_size: int = 0) -> Array:
    """``(q - zero_point) * scale`` in float32."""
    values = q.astype(np.float32)
    if zero_point is not None:
        values = values - spread(zero_point, q.shape, axis, block_size).astype(np.float32)
    result: Array = values * spread(scale, q.shape, axis, block_size).astype(np.float32)
    return result


def pack_nibbles(q: Array) -> Array:
    """4-bit codes to uint8, two per byte along the last axis, the first in the low half (as ONNX stores them).

    Raises InputError for an odd last axis.
    """
    if q.shape[-1] % 2:
        raise InputError(f"{q.shape[-1]} codes do not fill bytes of two", "pad the last axis to an even size")
    codes = q.astype(np.int8).astype(np.uint8) & 0xF
    packed: Array = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return packed


def unpack_nibbles(packed: Array, dtype: DType) -> Array:
    """The inverse of ``pack_nibbles``: codes as int8 (``i4``) or uint8 (``u4``)."""
    codes = np.stack([packed & 0xF, packed >> 4], -1).reshape(*packed.shape[:-1], -1)
    if dtype is DType.U4:
        return codes
    signed: Array = ((codes.astype(np.int8) ^ 8) - 8).astype(np.int8)
    return signed
