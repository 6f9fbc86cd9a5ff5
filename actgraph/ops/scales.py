"""Scales and zero points against the tensor that they quantize: shared by the quantization ops.

The arithmetic for numpy arrays, and the conventions, are in ``actgraph.ops.quantizer``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from actgraph.errors import VerifyError
from actgraph.ops import layout
from actgraph.ops.dtypes import DType
from actgraph.ops.quantizer import QUANTIZED, code_range
from actgraph.ops.shapes import Dim, TensorType

if TYPE_CHECKING:
    import torch

    from actgraph.ops.body import BodyBuilder, BodyValue

FLOAT8 = (DType.F8E4M3, DType.F8E5M2)
ZERO_POINTS = frozenset({DType.I32, DType.I16, DType.U16, DType.I8, DType.U8, DType.I4, DType.U4})
TYPES = tuple(t.value for t in QUANTIZED)


def check_scale(op: str, x: TensorType, scale: TensorType, axis: int, block: int, name: str = "scale") -> None:
    if x.shape is None or scale.shape is None or len(scale.shape) == 0:
        return
    place = layout.from_end(axis, len(x.shape)) + len(x.shape)
    if not block:
        if len(scale.shape) != 1:
            raise VerifyError(f"actgraph.{op}: {name} {scale} must have rank 0 or 1 without a block size")
        layout.check_into(op, name, scale.shape, (x.shape[place],))
        return
    blocks: Dim = x.shape[place]
    blocks = -(-blocks // block) if isinstance(blocks, int) else None
    expected = (*x.shape[:place], blocks, *x.shape[place + 1 :])
    known = len(expected) == len(scale.shape) and all(
        a == b or not (isinstance(a, int) and isinstance(b, int)) for a, b in zip(scale.shape, expected, strict=True)
    )
    if not known:
        raise VerifyError(f"actgraph.{op}: {name} {scale} does not give one value per block of {block} on axis {axis} of {x}")


def torch_spread(parameter: torch.Tensor, like: torch.Tensor, axis: int, block: int) -> torch.Tensor:
    """A scale or zero point laid out to broadcast against ``like``. One without axes is that of every block."""
    if not block or parameter.dim() == 0:
        return layout.torch_channels(parameter, axis)
    return parameter.repeat_interleave(block, axis).narrow(axis, 0, like.shape[axis])


def body_spread(b: BodyBuilder, parameter: BodyValue, like: BodyValue, axis: int, block: int) -> BodyValue:
    """As ``torch_spread``: each entry of ``axis`` repeated ``block`` times, the surplus cut off; one number stays one."""
    if not block or parameter.rank == 0:
        return layout.body_channels(b, parameter, axis)
    rank = b.rank_of(parameter)
    tile = [1] * (rank + 1)
    tile[axis] = block  # the new axis sits right after the blocked one
    grown = b.op("Tile", b.unsqueeze(parameter, [axis] if axis == -1 else [rank + 1 + axis]), b.ints(tile))
    factor = [1] * rank
    factor[axis] = block
    target = b.op("Mul", b.shape(parameter), b.ints(factor))
    repeated = b.reshape(grown, target, rank)
    return b.slice(repeated, b.ints([0]), b.size(like, rank + axis), rank + axis)


def native(dtype: DType, block: int, opset: int) -> bool:
    """Whether QuantizeLinear and DequantizeLinear of ``opset`` know ``dtype`` (and blocks)."""
    needed = 13 if dtype in (DType.I8, DType.U8) else 19 if dtype in FLOAT8 else 21
    return opset >= max(needed, 21 if block else 13)


def _linear_operands(
    b: BodyBuilder, scale: BodyValue, zero: BodyValue | None, dtype: DType
) -> tuple[BodyValue, BodyValue | None]:
    """``scale`` and ``zero`` as QuantizeLinear takes them: one number is a scalar, the zero point has the code type."""
    if scale.rank == 1 and scale.shape is not None and scale.shape[0] == 1:
        b.specialise("one_scale")
        scale = b.reshape(scale, [], 0)
        zero = None if zero is None else b.reshape(zero, [], 0)
    return scale, None if zero is None else b.cast(zero, dtype)


def body_quantize(
    b: BodyBuilder, h: BodyValue, scale: BodyValue, zero: BodyValue | None, dtype: DType, axis: int, block: int
) -> BodyValue:
    scale, zero = _linear_operands(b, scale, zero, dtype)
    if zero is None:
        zero = _zeros_like(b, scale, dtype)
    attributes = {"axis": axis, **({"block_size": block} if block else {})}
    return b.op("QuantizeLinear", h, scale, zero, dtype=dtype, rank=h.rank, attributes=attributes)


def _zeros_like(b: BodyBuilder, scale: BodyValue, dtype: DType) -> BodyValue:
    """A zero point for ``scale``: QuantizeLinear learns its output type from it."""
    if scale.rank == 0:
        return b.const(0, dtype)
    return b.op("Cast", b.op("Mul", scale, 0.0), dtype=dtype, attributes={"to": dtype.onnx})


def body_dequantize(b: BodyBuilder, q: BodyValue, scale: BodyValue, zero: BodyValue | None, axis: int, block: int) -> BodyValue:
    scale, zero = _linear_operands(b, scale, zero, q.dtype)
    # counted from the front: onnxruntime fuses a dequantization with the product that it feeds only then
    place = axis + b.rank_of(q) if q.rank else axis
    attributes = {"axis": place, **({"block_size": block} if block else {})}
    return b.op("DequantizeLinear", q, scale, zero, dtype=scale.dtype, rank=q.rank, attributes=attributes)


def torch_steps(
    h: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, dtype: DType, straight_through: bool = False
) -> torch.Tensor:
    """``clamp(round(h / scale) + zero)`` as floats; float8 types are rounded by the type itself."""
    import torch

    codes = code_range(dtype)
    steps = h / scale
    rounded = torch.round(steps) if dtype not in FLOAT8 else steps.clamp(codes.qmin, codes.qmax).to(dtype.torch).to(h.dtype)
    if straight_through:
        rounded = steps + (rounded - steps).detach()
    if zero is not None:
        rounded = rounded + zero
    return rounded.clamp(codes.qmin, codes.qmax)


def body_steps(b: BodyBuilder, h: BodyValue, scale: BodyValue, zero: BodyValue | None, dtype: DType) -> BodyValue:
    codes = code_range(dtype)
    steps = h / scale
    if dtype in FLOAT8:
        clamped = body_clamp(b, steps, codes.qmin, codes.qmax)
        return b.cast(b.cast(clamped, dtype), h.dtype)
    rounded = b.op("Round", steps)
    if zero is not None:
        rounded = rounded + zero
    return body_clamp(b, rounded, codes.qmin, codes.qmax)


def body_clamp(b: BodyBuilder, x: BodyValue, low: float, high: float) -> BodyValue:
    return b.op("Clip", x, b.const(low, x.dtype), b.const(high, x.dtype), rank=x.rank)
