"""Weights of fused linears as they are stored: element type, layout, scales. Shared by ``linear`` and ``feed_forward``.

``layout`` "out_in" is [N, K] (a row per output channel, as torch), "in_out" is [K, N] (a row per input channel, as the
operand of ONNX MatMul). Codes (i8, u8, float8, or 4 bits packed in pairs along the last axis of the stored weight) are
``(q - zero_point) * scale``, with one scale for all, one per output channel, or one per group of ``block_size`` along K.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from actgraph.errors import VerifyError
from actgraph.ops.dtypes import COMPUTE_FLOATS, DType
from actgraph.ops.quantization import DEQUANTIZE, body_unpack
from actgraph.ops.registry import Attribute
from actgraph.ops.scales import FLOAT8, check_scale
from actgraph.ops.shapes import Dim, TensorType, dim_mul

if TYPE_CHECKING:
    import torch

    from actgraph.ops.body import BodyBuilder, BodyValue

#: Element types of stored weights.
WEIGHTS = COMPUTE_FLOATS | frozenset(FLOAT8) | {DType.I8, DType.U8}
LAYOUTS = ("out_in", "in_out")
BLOCK_SIZE = Attribute("block_size", "int", "length of a group of scales along K; 0: no groups", default=0)
PACKED = Attribute("packed", "str", "4-bit type of codes packed in pairs into u8", default="", choices=("", "i4", "u4"))


def scale_axis(layout: str, block: int) -> int:
    """The axis of the stored weight along which scales lie: K with groups, else the output channels."""
    return int((layout == "out_in") == bool(block))


def check_weight(
    op: str,
    name: str,
    weight: TensorType,
    scale: TensorType | None,
    zero: TensorType | None,
    *,
    layout: str,
    block: int,
    packed: str,
) -> tuple[Dim, Dim]:
    """``(N, K)`` of a stored weight whose scales fit. Raises VerifyError."""
    if block < 0:
        raise VerifyError(f"actgraph.{op}: block_size {block} is negative")
    if weight.shape is not None and len(weight.shape) != 2:
        raise VerifyError(f"actgraph.{op}: {name} {weight} must have rank 2")
    if packed and weight.dtype is not DType.U8:
        raise VerifyError(f"actgraph.{op}: packed codes of {name} are u8, not {weight.dtype}")
    if scale is None:
        if weight.dtype is not None and not weight.dtype.is_float:
            raise VerifyError(f"actgraph.{op}: {name} {weight} holds codes and has no scale")
        if zero is not None or block:
            raise VerifyError(f"actgraph.{op}: {name} has no scale, so it has no zero point and no groups either")
    elif weight.dtype in COMPUTE_FLOATS:
        raise VerifyError(f"actgraph.{op}: {name} {weight} is no code and takes no scale", "fold the scale into the weight")
    elif zero is not None and weight.dtype in FLOAT8:
        raise VerifyError(f"actgraph.{op}: {weight.dtype} codes have no zero point")
    if weight.shape is None:
        return None, None
    shape = (weight.shape[0], dim_mul(weight.shape[1], 2)) if packed else weight.shape
    for label, parameter in (("scale", scale), ("zero_point", zero)):
        if parameter is not None:
            axis = scale_axis(layout, block)
            check_scale(op, TensorType(weight.dtype, shape), parameter, axis, block, f"the {label} of {name}")
    return (shape[0], shape[1]) if layout == "out_in" else (shape[1], shape[0])


def torch_weight(
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    zero: torch.Tensor | None,
    compute: torch.dtype,
    *,
    layout: str,
    block: int,
    packed: str,
) -> torch.Tensor:
    """The numbers of a stored weight in the type ``compute``, as [K, N]."""
    if scale is None:
        values = weight.to(compute)
    else:
        kind, axis = DType.of(compute).value, scale_axis(layout, block)
        codes = DEQUANTIZE.reference(weight, scale, zero, dtype=kind, axis=axis, block_size=block, packed=packed)
        assert not isinstance(codes, tuple)
        values = codes
    return values.transpose(0, 1) if layout == "out_in" else values


def body_weight(
    b: BodyBuilder,
    weight: BodyValue,
    scale: BodyValue | None,
    zero: BodyValue | None,
    compute: DType,
    *,
    layout: str,
    block: int,
    packed: str,
) -> BodyValue:
    """As ``torch_weight``.

    Codes are transposed before they are dequantized: onnxruntime then folds the transposition of a constant and fuses the
    dequantization with the product, and does not move the transposition over it (which its optimizer gets wrong for int8).
    """
    turned = layout == "out_in"
    if scale is None:
        values = b.cast(weight, compute)
        return b.transpose(values, [1, 0]) if turned else values
    if weight.dtype in FLOAT8:
        weight = b.cast(weight, DType.F32)  # float8 is neither transposed nor dequantized at every opset that casts it
    if packed:
        weight = body_unpack(b, weight, signed=packed == "i4")
    if turned:
        weight, scale = b.transpose(weight, [1, 0]), _turn(b, scale)
        zero = None if zero is None else _turn(b, zero)
    attributes = {"dtype": compute.value, "axis": scale_axis("in_out", block), "block_size": block, "packed": ""}
    (values,) = DEQUANTIZE.body(b, [weight, scale, zero], attributes)
    return values


def _turn(b: BodyBuilder, parameter: BodyValue) -> BodyValue:
    """Scales of groups lie as the weight does."""
    return b.transpose(parameter, [1, 0]) if parameter.rank == 2 else parameter
