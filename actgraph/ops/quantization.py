"""Ops of storage in low precision: ``quantize`` and ``dequantize``. The quantizer of a graph is ``fake_quant``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from actgraph.errors import UnsupportedError, VerifyError
from actgraph.ops import layout
from actgraph.ops.drawing import draws, extreme, integers, normal, scales
from actgraph.ops.dtypes import INTEGERS, DType
from actgraph.ops.quantizer import QUANTIZED
from actgraph.ops.registry import Attribute, Attributes, OpDef, Operand, Sample, Trait, register
from actgraph.ops.scales import (
    FLOAT8,
    TYPES,
    ZERO_POINTS,
    body_dequantize,
    body_quantize,
    body_spread,
    body_steps,
    check_scale,
    native,
    torch_spread,
    torch_steps,
)
from actgraph.ops.shapes import TensorType, dim_mul

if TYPE_CHECKING:
    import torch

    from actgraph.ops.body import BodyBuilder, BodyValue


_I8 = (DType.I8,)


def _codes(rng: Any, shape: tuple[int, ...], dtype: DType) -> Any:
    """Codes over the whole range of ``dtype``."""
    low, high = (0, 256) if dtype is DType.U8 else (-128, 128)
    return rng.integers(low, high, shape).astype(dtype.numpy)


# --- dequantize ---------------------------------------------------------------------------------------------------------------

_DEQUANTIZE_DOC = """
Codes back to numbers: ``y = (q - zero_point) * scale``, computed in float32 and rounded once to ``dtype``.

``scale`` (and ``zero_point``, int32 or the type of ``q``) is one number ([] or [1]), one per index of ``axis`` ([n]), or,
with ``block_size``, one per block along ``axis`` (shape of ``q`` with that axis divided, rounded up). ``packed`` says that
``q`` is uint8 holding two 4-bit codes a byte along its last axis, the first in the low half; ``y`` is then twice as long.
The gradient flows to ``scale``.

Source: ONNX DequantizeLinear.
"""


def _dequantize_infer(types: Sequence[TensorType | None], attributes: Attributes) -> list[TensorType]:
    q, scale, zero = types
    assert q is not None and scale is not None
    shape = q.shape
    if attributes["packed"] and shape is not None:
        if q.dtype is not DType.U8:
            raise VerifyError(f"actgraph.dequantize: packed codes are u8, not {q.dtype}")
        shape = (*shape[:-1], dim_mul(shape[-1], 2))
    full = TensorType(q.dtype, shape)
    for name, parameter in (("scale", scale), ("zero_point", zero)):
        if parameter is not None:
            check_scale("dequantize", full, parameter, attributes["axis"], attributes["block_size"], name)
    return [TensorType(DType(str(attributes["dtype"])), shape)]


def _dequantize(
    q: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None = None,
    *,
    dtype: str = "f32",
    axis: int = 0,
    block_size: int = 0,
    packed: str = "",
) -> torch.Tensor:
    import torch

    if packed:
        halves = torch.stack([q & 15, q >> 4], -1).flatten(-2)
        q = halves if packed == "u4" else (halves.to(torch.int8) ^ 8) - 8
    axis = layout.from_end(axis, q.dim()) if q.dim() else -1
    compute = torch.float64 if scale.dtype == torch.float64 else torch.float32
    values = q.to(compute)
    if zero_point is not None:
        values = values - torch_spread(zero_point, q, axis, block_size).to(compute)
    return (values * torch_spread(scale.to(compute), q, axis, block_size)).to(DType(dtype).torch)


def _dequantize_body(b: BodyBuilder, operands: Sequence[BodyValue | None], attributes: Attributes) -> list[BodyValue]:
    q, scale, zero = operands
    assert q is not None and scale is not None
    if attributes["packed"]:
        q = body_unpack(b, q, signed=attributes["packed"] == "i4")
    block = int(attributes["block_size"])
    axis = layout.body_axis(b, attributes["axis"], q) if q.rank else -1
    s = b.up(scale)
    if s.dtype is DType.F32 and q.dtype in QUANTIZED and native(q.dtype, block, b.opset):
        y = body_dequantize(b, q, s, zero, axis, block)
    else:
        y = b.cast(q, s.dtype)
        if zero is not None:
            y = y - b.cast(body_spread(b, zero, q, axis, block), s.dtype)
        y = y * body_spread(b, s, q, axis, block)
    return [b.cast(y, DType(str(attributes["dtype"])))]


def body_unpack(b: BodyBuilder, q: BodyValue, *, signed: bool) -> BodyValue:
    """uint8 pairs to int8 or uint8 codes, by arithmetic that every opset has."""
    rank = b.rank_of(q)
    wide = b.cast(q, DType.I32)
    high = b.op("Div", wide, 16)  # integer division: codes are not negative
    low = wide - high * 16
    pairs = b.concat([b.unsqueeze(low, [rank]), b.unsqueeze(high, [rank])], axis=rank)
    codes = b.reshape(pairs, b.op("Mul", b.shape(q), b.ints([1] * (rank - 1) + [2])), rank)
    if signed:
        codes = b.where(codes >= 8, codes - 16, codes)
    return b.cast(codes, DType.I8 if signed else DType.U8)


DEQUANTIZE = register(
    OpDef(
        name="dequantize",
        doc=_DEQUANTIZE_DOC,
        inputs=(
            Operand("q", "the codes", dtypes=frozenset(QUANTIZED) | INTEGERS),
            Operand("scale", "[], [1], [n] along axis, or one per block"),
            Operand("zero_point", "shaped like scale; absent: 0", dtypes=ZERO_POINTS, optional=True),
        ),
        outputs=("y",),
        infer=_dequantize_infer,
        reference=_dequantize,
        body=_dequantize_body,
        attributes=(
            Attribute("dtype", "str", "type of the result", default="f32", choices=("f32", "f16", "bf16", "f64")),
            Attribute("axis", "int", "the axis of per-channel or per-block scales", default=0),
            Attribute("block_size", "int", "length of a block along axis; 0: no blocks", default=0),
            Attribute("packed", "str", "4-bit type of codes packed in pairs into u8", default="", choices=("", "i4", "u4")),
        ),
        traits=frozenset({Trait.ELEMENTWISE}),
        min_opset=13,
        exact="values",
        samples=(
            Sample(((6, 8), (6,), None), dtypes=_I8, draw=draws(_codes, scales, None)),
            Sample(((6, 8), (), ()), {"dtype": "f16"}, dtypes=_I8, draw=draws(_codes, scales, integers(0, 9, DType.I32))),
            Sample(((6, 8), (1,), (1,)), {"dtype": "bf16"}, dtypes=_I8, draw=draws(_codes, scales, integers(0, 9, DType.I32))),
            Sample(
                ((5, 7), (7,), (7,)), {"axis": 1}, dtypes=(DType.U8,), draw=draws(_codes, scales, integers(0, 256, DType.U8))
            ),
            Sample(((0, 7), (7,), None), {"axis": -1}, dtypes=_I8, draw=draws(_codes, scales, None), note="empty"),
            Sample(
                ((4, 10), (4, 3), (4, 3)),
                {"axis": 1, "block_size": 4},
                dtypes=(*_I8, DType.U8),
                draw=draws(_codes, scales, integers(0, 9, DType.I32)),
                note="the last block is short",
            ),
            Sample(((6, 5), (2, 5), None), {"axis": 0, "block_size": 3}, dtypes=_I8, draw=draws(_codes, scales, None)),
            Sample(((3, 6), (3,), None), {"packed": "i4"}, dtypes=(DType.U8,), draw=draws(_codes, scales, None)),
            Sample(
                ((2, 3, 4), (2, 3, 2), (2, 3, 2)),
                {"packed": "u4", "axis": 2, "block_size": 4},
                dtypes=(DType.U8,),
                draw=draws(_codes, scales, integers(0, 16, DType.I32)),
            ),
            Sample(((3, 4, 5, 5), (3,), None), dtypes=_I8, draw=draws(_codes, scales, None), note="a convolution"),
            Sample(((3, 5), (3,), None), dtypes=(DType.I16, DType.I32), draw=draws(_codes, scales, None)),
            Sample(((300, 257), (300,), None), dtypes=_I8, draw=draws(_codes, scales, None), note="large"),
        ),
    )
)


# --- quantize -----------------------------------------------------------------------------------------------------------------

_QUANTIZE_DOC = """
Numbers to codes: ``q = clamp(round(x / scale) + zero_point, qmin, qmax)``, rounding half to even, in float32.

Shapes of ``scale`` and ``zero_point`` as for ``dequantize``. Infinities saturate (but not in ONNX's reference
evaluator); NaN gives an unspecified code (engines differ). float8 types clamp to their largest finite value and have no
zero point. 4-bit types exist in ONNX only (torch has no such tensor).

Source: ONNX QuantizeLinear.
"""


def _quantize_infer(types: Sequence[TensorType | None], attributes: Attributes) -> list[TensorType]:
    x, scale, zero = types
    assert x is not None and scale is not None
    for name, parameter in (("scale", scale), ("zero_point", zero)):
        if parameter is not None:
            check_scale("quantize", x, parameter, attributes["axis"], attributes["block_size"], name)
    return [TensorType(DType(str(attributes["dtype"])), x.shape)]


def _quantize(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None = None,
    *,
    dtype: str = "i8",
    axis: int = 0,
    block_size: int = 0,
) -> torch.Tensor:
    if dtype in (DType.I4, DType.U4):
        raise UnsupportedError(f"torch has no {dtype} tensors", "use fake_quant, or u8 codes packed in pairs")
    axis = layout.from_end(axis, x.dim()) if x.dim() else -1
    h = layout.torch_compute(x)
    zero = None if zero_point is None else torch_spread(zero_point, x, axis, block_size).to(h.dtype)
    steps = torch_steps(h, torch_spread(scale.to(h.dtype), x, axis, block_size), zero, DType(dtype))
    return steps.to(DType(dtype).torch)


def _quantize_body(b: BodyBuilder, operands: Sequence[BodyValue | None], attributes: Attributes) -> list[BodyValue]:
    x, scale, zero = operands
    assert x is not None and scale is not None
    dtype, block = DType(str(attributes["dtype"])), int(attributes["block_size"])
    axis = layout.body_axis(b, attributes["axis"], x) if x.rank else -1
    h = b.up(x)
    s = b.cast(scale, h.dtype)
    if h.dtype is DType.F32 and dtype not in FLOAT8 and native(dtype, block, b.opset):
        return [body_quantize(b, h, s, zero, dtype, axis, block)]
    z = None if zero is None else body_spread(b, b.cast(zero, h.dtype), x, axis, block)
    return [b.cast(body_steps(b, h, body_spread(b, s, x, axis, block), z, dtype), dtype)]


register(
    OpDef(
        name="quantize",
        doc=_QUANTIZE_DOC,
        inputs=(
            Operand("x", "the numbers"),
            Operand("scale", "[], [1], [n] along axis, or one per block; positive"),
            Operand("zero_point", "shaped like scale; absent: 0", dtypes=ZERO_POINTS, optional=True),
        ),
        outputs=("q",),
        infer=_quantize_infer,
        reference=_quantize,
        body=_quantize_body,
        attributes=(
            Attribute("dtype", "str", "type of the codes", default="i8", choices=TYPES),
            Attribute("axis", "int", "the axis of per-channel or per-block scales", default=0),
            Attribute("block_size", "int", "length of a block along axis; 0: no blocks", default=0),
        ),
        traits=frozenset({Trait.ELEMENTWISE}),
        min_opset=13,
        exact="values",
        samples=(
            Sample(((6, 8), (6,), None), draw=draws(normal, scales, None)),
            Sample(((6, 8), (), ()), {"dtype": "u8"}, draw=draws(extreme, scales, integers(100, 156, DType.I32))),
            Sample(((5, 7), (7,), (7,)), {"axis": 1}, draw=draws(normal, scales, integers(-9, 9, DType.I8))),
            Sample(((0, 7), (1,), None), draw=draws(normal, scales, None), note="empty"),
            Sample(
                ((4, 10), (4, 3), (4, 3)), {"axis": 1, "block_size": 4}, draw=draws(normal, scales, integers(-9, 9, DType.I32))
            ),
            Sample(((5, 7), (5,), None), {"dtype": "i16"}, draw=draws(normal, scales, None)),
            Sample(((5, 7), (5,), None), {"dtype": "f8e4m3"}, draw=draws(normal, scales, None)),
            Sample(((300, 257), (300,), None), draw=draws(normal, scales, None), note="large"),
        ),
        differentiable=False,
    )
)
