"""The op ``fake_quant``: a quantizer as an ordinary node, whose attributes are its record."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from actgraph.errors import VerifyError
from actgraph.ops import layout
from actgraph.ops.drawing import draws, extreme, integers, normal, scales, zeros
from actgraph.ops.dtypes import DType
from actgraph.ops.quantizer import SMALLEST_SCALE, code_range
from actgraph.ops.registry import Attribute, Attributes, OpDef, Operand, Sample, Trait, register
from actgraph.ops.scales import (
    FLOAT8,
    TYPES,
    ZERO_POINTS,
    body_clamp,
    body_dequantize,
    body_quantize,
    body_spread,
    body_steps,
    check_scale,
    native,
    torch_spread,
    torch_steps,
)
from actgraph.ops.shapes import TensorType

if TYPE_CHECKING:
    import torch

    from actgraph.ops.body import BodyBuilder, BodyValue


_GRANULARITIES = ("tensor", "axis", "group", "token")

_FAKE_QUANT_DOC = """
Quantize and dequantize in place: ``y = (clamp(round(x / s) + z, qmin, qmax) - z) * s``. The attributes are the record of
the quantizer; a lowering reads them and turns the node into QuantizeLinear/DequantizeLinear or a kernel.

``source = "static"``: ``scale`` (and ``zero_point``) are operands. ``granularity`` says how they lie: ``"tensor"`` one
number, ``"axis"`` [n] along ``axis``, ``"group"`` one per group of ``group_size`` along ``axis`` (shape of ``x`` with
that axis divided, rounded up). ``source = "dynamic"``: there are no operands, the range is taken from ``x`` itself:
``"tensor"`` from all of it, ``"token"`` per token (reduced over ``axis``), ``"axis"`` per index of ``axis``, ``"group"``
per group along ``axis`` (which must divide). Symmetric: ``s = max|x| / qmax``, ``z`` the mid point; otherwise
``s = (hi - lo) / (qmax - qmin)`` with 0 in the range and ``z = clamp(round(qmin - lo / s))``. A scale below the smallest
normal float32 is 1. float8 types are symmetric.

Rounding is half to even; everything is computed in float32 (float64 for float64). Static: infinities saturate, NaN is
unspecified for integer types (QuantizeLinear has no NaN) and stays NaN for float8; the sign of a zero is
free. Dynamic: a range that holds a NaN or an infinity, or that is empty, is unspecified. The gradient is the
straight-through one: 1 inside the code range, 0 outside; for ``s`` it is ``round(x/s) - x/s`` inside and ``qmin - z`` or
``qmax - z`` outside (LSQ). A dynamic scale counts as a constant.

Sources: Jacob et al., 2018; Esser et al., *Learned Step Size Quantization*, 2020 (gradients); ONNX QuantizeLinear.
"""


def _fake_quant_infer(types: Sequence[TensorType | None], attributes: Attributes) -> list[TensorType]:
    x, scale, zero = types
    assert x is not None
    dtype, granularity, axis, group = (attributes[n] for n in ("dtype", "granularity", "axis", "group_size"))
    where = "actgraph.fake_quant"
    if granularity == "group" and int(group) < 1:
        raise VerifyError(f"{where}: granularity group needs group_size >= 1")
    if DType(str(dtype)) in FLOAT8 and not attributes["symmetric"]:
        raise VerifyError(f"{where}: {dtype} has no zero point and must be symmetric")
    if attributes["source"] == "dynamic":
        if scale is not None or zero is not None:
            raise VerifyError(f"{where}: a dynamic quantizer takes no scale and no zero point")
        if granularity == "group" and x.shape is not None:
            size = x.shape[int(axis)]
            if isinstance(size, int) and size % int(group):
                raise VerifyError(f"{where}: groups of {group} do not divide axis {axis} of {x}")
        return [x]
    if scale is None:
        raise VerifyError(f"{where}: a static quantizer needs a scale")
    if granularity == "token":
        raise VerifyError(f"{where}: granularity token is dynamic only")
    for name, parameter in (("scale", scale), ("zero_point", zero)):
        if parameter is not None and granularity == "tensor":
            layout.check_into("fake_quant", name, parameter.shape, (1,))
        elif parameter is not None:
            check_scale("fake_quant", x, parameter, axis, group if granularity == "group" else 0, name)
    return [x]


def _range_axes(granularity: str, axis: int, rank: int) -> list[int]:
    """The axes, counted from the end, over which a dynamic range is taken."""
    everything = list(range(-rank, 0))
    if granularity == "tensor":
        return everything
    if granularity == "token":
        return [axis]
    return [a for a in everything if a != axis]


def _torch_dynamic(
    h: torch.Tensor, dtype: DType, symmetric: bool, axes: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    import torch

    codes = code_range(dtype)
    if not axes:
        low = high = h
    else:
        low, high = h.amin(tuple(axes), keepdim=True), h.amax(tuple(axes), keepdim=True)
    if symmetric or dtype in FLOAT8:
        scale = torch.maximum(low.abs(), high.abs()) / codes.positive
        scale = torch.where(scale < SMALLEST_SCALE, torch.ones_like(scale), scale)
        return scale, torch.full_like(scale, codes.middle) if codes.middle else None
    low, high = low.clamp_max(0), high.clamp_min(0)
    scale = (high - low) / (codes.qmax - codes.qmin)
    scale = torch.where(scale < SMALLEST_SCALE, torch.ones_like(scale), scale)
    return scale, torch.round(codes.qmin - low / scale).clamp(codes.qmin, codes.qmax)


def _fake_quant_with(
    straight_through: bool,
    x: torch.Tensor,
    scale: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    dtype: str,
    granularity: str,
    source: str,
    symmetric: bool,
    axis: int,
    group_size: int,
) -> torch.Tensor:
    kind = DType(dtype)
    axis = layout.from_end(axis, x.dim()) if x.dim() else -1
    h = layout.torch_compute(x)
    grouped = granularity == "group" and source == "dynamic"
    shape = h.shape
    if grouped:
        place = h.dim() + axis
        h = h.reshape((*shape[:place], shape[place] // group_size, group_size, *shape[place + 1 :]))
    if source == "dynamic":
        axes = [axis] if grouped else _range_axes(granularity, axis, h.dim())
        s, z = _torch_dynamic(h.detach(), kind, symmetric, axes)
    else:
        assert scale is not None
        block = group_size if granularity == "group" else 0
        s = torch_spread(scale.to(h.dtype), h, axis, block)
        z = None if zero_point is None else torch_spread(zero_point, h, axis, block).to(h.dtype)
    steps = torch_steps(h, s, z, kind, straight_through)
    y = (steps if z is None else steps - z) * s
    return y.reshape(shape).to(x.dtype)


def _fake_quant(
    x: torch.Tensor,
    scale: torch.Tensor | None = None,
    zero_point: torch.Tensor | None = None,
    *,
    dtype: str = "i8",
    granularity: str = "tensor",
    source: str = "static",
    symmetric: bool = True,
    axis: int = -1,
    group_size: int = 0,
    calibration: str = "",
) -> torch.Tensor:
    return _fake_quant_with(False, x, scale, zero_point, dtype, granularity, source, symmetric, axis, group_size)


def _fake_quant_surrogate(
    x: torch.Tensor,
    scale: torch.Tensor | None = None,
    zero_point: torch.Tensor | None = None,
    *,
    dtype: str = "i8",
    granularity: str = "tensor",
    source: str = "static",
    symmetric: bool = True,
    axis: int = -1,
    group_size: int = 0,
    calibration: str = "",
) -> torch.Tensor:
    return _fake_quant_with(True, x, scale, zero_point, dtype, granularity, source, symmetric, axis, group_size)


def _body_dynamic(
    b: BodyBuilder, h: BodyValue, dtype: DType, symmetric: bool, axes: Sequence[int]
) -> tuple[BodyValue, BodyValue | None]:
    codes = code_range(dtype)
    low = b.reduce("ReduceMin", h, axes) if axes else h
    high = b.reduce("ReduceMax", h, axes) if axes else h
    if symmetric or dtype in FLOAT8:
        scale = b.op("Max", b.op("Abs", low), b.op("Abs", high)) / codes.positive
        scale = b.where(scale < SMALLEST_SCALE, 1.0, scale)
        return scale, b.const(codes.middle, h.dtype) if codes.middle else None
    low, high = b.op("Min", low, 0.0), b.op("Max", high, 0.0)
    scale = (high - low) / (codes.qmax - codes.qmin)
    scale = b.where(scale < SMALLEST_SCALE, 1.0, scale)
    zero = b.op("Round", b.const(codes.qmin, h.dtype) - low / scale)
    return scale, body_clamp(b, zero, codes.qmin, codes.qmax)


def _fake_quant_body(b: BodyBuilder, operands: Sequence[BodyValue | None], attributes: Attributes) -> list[BodyValue]:
    x, scale, zero = operands
    assert x is not None
    dtype, granularity = DType(str(attributes["dtype"])), str(attributes["granularity"])
    group = int(attributes["group_size"])
    axis = layout.body_axis(b, attributes["axis"], x) if x.rank else -1
    h = b.up(x)
    original = h
    if attributes["source"] == "dynamic":
        rank = b.rank_of(x)
        axes = _range_axes(granularity, axis, rank)
        if granularity == "group":
            h, axes = layout.body_groups(b, h, rank + axis, group), [axis]
        s, z = _body_dynamic(b, h, dtype, bool(attributes["symmetric"]), axes)
    else:
        assert scale is not None
        s, z, block = b.cast(scale, h.dtype), zero, group if granularity == "group" else 0
        if h.dtype is DType.F32 and dtype not in FLOAT8 and native(dtype, block, b.opset):
            if granularity == "tensor" and s.rank == 1:
                s, z = b.reshape(s, [], 0), None if z is None else b.reshape(z, [], 0)
            q = body_quantize(b, h, s, z, dtype, axis, block)
            return [b.cast(body_dequantize(b, q, s, z, axis, block), x.dtype)]
        s = body_spread(b, s, x, axis, block)
        z = None if z is None else body_spread(b, b.cast(z, h.dtype), x, axis, block)
    steps = body_steps(b, h, s, z, dtype)
    y = (steps if z is None else steps - z) * s
    if granularity == "group" and attributes["source"] == "dynamic":
        y = b.reshape(y, b.shape(original), b.rank_of(x), allowzero=True)
    return [b.cast(y, x.dtype)]


register(
    OpDef(
        name="fake_quant",
        doc=_FAKE_QUANT_DOC,
        inputs=(
            Operand("x", "the activation or weight"),
            Operand("scale", "static scales, positive", optional=True),
            Operand("zero_point", "static zero points, shaped like scale; absent: 0", dtypes=ZERO_POINTS, optional=True),
        ),
        outputs=("y",),
        infer=_fake_quant_infer,
        reference=_fake_quant,
        body=_fake_quant_body,
        surrogate=_fake_quant_surrogate,
        attributes=(
            Attribute("dtype", "str", "type of the codes", default="i8", choices=TYPES),
            Attribute("granularity", "str", "what shares a scale", default="tensor", choices=_GRANULARITIES),
            Attribute("source", "str", "where scales come from", default="static", choices=("static", "dynamic")),
            Attribute("symmetric", "bool", "whether the range is symmetric (dynamic; a record for static)", default=True),
            Attribute("axis", "int", "the axis of granularity axis, group and token", default=-1),
            Attribute("group_size", "int", "length of a group along axis", default=0),
            Attribute("calibration", "str", "how the scales were found: a record", default="", structural=False),
        ),
        traits=frozenset({Trait.BATCH_COUPLED}),  # a dynamic range may be taken from the whole tensor
        min_opset=13,
        exact="values",
        samples=(
            Sample(((2, 3, 8), (), None), draw=draws(extreme, scales, None)),
            Sample(((2, 3, 8), (1,), (1,)), {"dtype": "u8"}, draw=draws(normal, scales, integers(100, 156, DType.I32))),
            Sample(((2, 3, 8), (8,), (8,)), {"granularity": "axis"}, draw=draws(normal, scales, integers(-9, 9, DType.I32))),
            Sample(((2, 4, 3, 5), (4,), None), {"granularity": "axis", "axis": 1}, draw=draws(normal, scales, None)),
            Sample(
                ((2, 3, 10), (2, 3, 3), None),
                {"granularity": "group", "group_size": 4, "dtype": "i4"},
                draw=draws(normal, scales, None),
            ),
            Sample(((0, 3, 8), (), None), draw=draws(normal, scales, None), note="no tokens"),
            Sample(((2, 3, 8), (), None), {"dtype": "f8e4m3"}, draw=draws(normal, scales, None)),
            Sample(((2, 3, 8), (), None), {"dtype": "f8e5m2"}, draw=draws(normal, scales, None)),
            Sample(((2, 3, 8), None, None), {"source": "dynamic"}),
            Sample(((2, 3, 8), None, None), {"source": "dynamic", "granularity": "token", "dtype": "u8"}),
            Sample(((2, 17, 259), None, None), {"source": "dynamic", "granularity": "token"}, note="large"),
            Sample(((2, 3, 8), None, None), {"source": "dynamic", "granularity": "token", "symmetric": False}),
            Sample(
                ((2, 3, 8), None, None),
                {"source": "dynamic", "granularity": "group", "group_size": 4, "dtype": "u4", "symmetric": False},
            ),
            Sample(((2, 6, 3, 5), None, None), {"source": "dynamic", "granularity": "group", "group_size": 2, "axis": 1}),
            Sample(((3, 5), None, None), {"source": "dynamic", "granularity": "axis", "axis": 0}),
            Sample(
                ((3, 5), None, None),
                {"source": "dynamic", "granularity": "token"},
                draw=draws(zeros, None, None),
                note="all zero",
            ),
            Sample(((0, 5), None, None), {"source": "dynamic", "granularity": "token"}, note="no tokens"),
        ),
    )
)
