"""Ops of quantization: ``fake_quant`` (the record of a quantizer), ``quantize`` and ``dequantize``.

Conventions (rounding, ranges, zero scales) are those of ``actgraph.ops.quantizer``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from actgraph.errors import VerifyError
from actgraph.ops import layout
from actgraph.ops.dtypes import COMPUTE_FLOATS, INTEGERS, DType
from actgraph.ops.quantizer import QUANTIZED, SMALLEST_SCALE, code_range
from actgraph.ops.registry import Attribute, Attributes, OpDef, Operand, Trait, register
from actgraph.ops.shapes import Dim, TensorType

if TYPE_CHECKING:
    import torch

    from actgraph.ops.body import BodyBuilder, BodyValue

_FLOAT8 = (DType.F8E4M3, DType.F8E5M2)
_ZERO_POINTS = frozenset({DType.I32, DType.I16, DType.U16, DType.I8, DType.U8, DType.I4, DType.U4})
_TYPES = tuple(t.value for t in QUANTIZED)


# --- scales against x: shared by the three ops --------------------------------------------------------------------------------


def _check_scale(op: str, x: TensorType, scale: TensorType, axis: int, block: int, name: str = "scale") -> None:
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


def _torch_spread(parameter: torch.Tensor, like: torch.Tensor, axis: int, block: int) -> torch.Tensor:
    """A scale or zero point laid out to broadcast against ``like``."""
    if not block:
        return layout.torch_channels(parameter, axis)
    return parameter.repeat_interleave(block, axis).narrow(axis, 0, like.shape[axis])


def _body_spread(b: BodyBuilder, parameter: BodyValue, like: BodyValue, axis: int, block: int) -> BodyValue:
    """As ``_torch_spread``: each entry of ``axis`` repeated ``block`` times, the surplus cut off."""
    if not block:
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


def _native(dtype: DType, block: int, opset: int) -> bool:
    """Whether QuantizeLinear and DequantizeLinear of ``opset`` know ``dtype`` (and blocks)."""
    needed = 13 if dtype in (DType.I8, DType.U8) else 19 if dtype in _FLOAT8 else 21
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


def _quantize_linear(
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


def _dequantize_linear(
    b: BodyBuilder, q: BodyValue, scale: BodyValue, zero: BodyValue | None, axis: int, block: int
) -> BodyValue:
    scale, zero = _linear_operands(b, scale, zero, q.dtype)
    attributes = {"axis": axis, **({"block_size": block} if block else {})}
    return b.op("DequantizeLinear", q, scale, zero, dtype=scale.dtype, rank=q.rank, attributes=attributes)


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
        from actgraph.ops.shapes import dim_mul

        if q.dtype is not DType.U8:
            raise VerifyError(f"actgraph.dequantize: packed codes are u8, not {q.dtype}")
        shape = (*shape[:-1], dim_mul(shape[-1], 2))
    full = TensorType(q.dtype, shape)
    for name, parameter in (("scale", scale), ("zero_point", zero)):
        if parameter is not None:
            _check_scale("dequantize", full, parameter, attributes["axis"], attributes["block_size"], name)
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
        values = values - _torch_spread(zero_point, q, axis, block_size).to(compute)
    return (values * _torch_spread(scale.to(compute), q, axis, block_size)).to(DType(dtype).torch)


def _dequantize_body(b: BodyBuilder, operands: Sequence[BodyValue | None], attributes: Attributes) -> list[BodyValue]:
    q, scale, zero = operands
    assert q is not None and scale is not None
    if attributes["packed"]:
        q = _unpack(b, q, signed=attributes["packed"] == "i4")
    block = int(attributes["block_size"])
    axis = layout.body_axis(b, attributes["axis"], q) if q.rank else -1
    s = b.up(scale)
    if s.dtype is DType.F32 and q.dtype in QUANTIZED and _native(q.dtype, block, b.opset):
        y = _dequantize_linear(b, q, s, zero, axis, block)
    else:
        y = b.cast(q, s.dtype)
        if zero is not None:
            y = y - b.cast(_body_spread(b, zero, q, axis, block), s.dtype)
        y = y * _body_spread(b, s, q, axis, block)
    return [b.cast(y, DType(str(attributes["dtype"])))]


def _unpack(b: BodyBuilder, q: BodyValue, *, signed: bool) -> BodyValue:
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


register(
    OpDef(
        name="dequantize",
        doc=_DEQUANTIZE_DOC,
        inputs=(
            Operand("q", "the codes", dtypes=frozenset(QUANTIZED) | INTEGERS),
            Operand("scale", "[], [1], [n] along axis, or one per block"),
            Operand("zero_point", "shaped like scale; absent: 0", dtypes=_ZERO_POINTS, optional=True),
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
    )
)


# --- quantize -----------------------------------------------------------------------------------------------------------------

_QUANTIZE_DOC = """
Numbers to codes: ``q = clamp(round(x / scale) + zero_point, qmin, qmax)``, rounding half to even, in float32.

Shapes of ``scale`` and ``zero_point`` as for ``dequantize``. Infinities saturate; NaN gives an unspecified code (engines
differ). float8 types clamp to their largest finite value and have no zero point. 4-bit types exist in ONNX only (torch
has no such tensor).

Source: ONNX QuantizeLinear.
"""


def _quantize_infer(types: Sequence[TensorType | None], attributes: Attributes) -> list[TensorType]:
    x, scale, zero = types
    assert x is not None and scale is not None
    for name, parameter in (("scale", scale), ("zero_point", zero)):
        if parameter is not None:
            _check_scale("quantize", x, parameter, attributes["axis"], attributes["block_size"], name)
    return [TensorType(DType(str(attributes["dtype"])), x.shape)]


def _torch_steps(
    h: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, dtype: DType, straight_through: bool = False
) -> torch.Tensor:
    """``clamp(round(h / scale) + zero)`` as floats; float8 types are rounded by the type itself."""
    import torch

    codes = code_range(dtype)
    steps = h / scale
    rounded = torch.round(steps) if dtype not in _FLOAT8 else steps.clamp(codes.qmin, codes.qmax).to(dtype.torch).to(h.dtype)
    if straight_through:
        rounded = steps + (rounded - steps).detach()
    if zero is not None:
        rounded = rounded + zero
    return rounded.clamp(codes.qmin, codes.qmax)


def _quantize(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None = None,
    *,
    dtype: str = "i8",
    axis: int = 0,
    block_size: int = 0,
) -> torch.Tensor:
    axis = layout.from_end(axis, x.dim()) if x.dim() else -1
    h = layout.torch_compute(x)
    zero = None if zero_point is None else _torch_spread(zero_point, x, axis, block_size).to(h.dtype)
    steps = _torch_steps(h, _torch_spread(scale.to(h.dtype), x, axis, block_size), zero, DType(dtype))
    return steps.to(DType(dtype).torch)


def _body_steps(
    b: BodyBuilder, h: BodyValue, scale: BodyValue, zero: BodyValue | None, dtype: DType
) -> BodyValue:
    codes = code_range(dtype)
    steps = h / scale
    if dtype in _FLOAT8:
        clamped = _clamp(b, steps, codes.qmin, codes.qmax)
        return b.cast(b.cast(clamped, dtype), h.dtype)
    rounded = b.op("Round", steps)
    if zero is not None:
        rounded = rounded + zero
    return _clamp(b, rounded, codes.qmin, codes.qmax)


def _clamp(b: BodyBuilder, x: BodyValue, low: float, high: float) -> BodyValue:
    return b.op("Clip", x, b.const(low, x.dtype), b.const(high, x.dtype), rank=x.rank)


def _quantize_body(b: BodyBuilder, operands: Sequence[BodyValue | None], attributes: Attributes) -> list[BodyValue]:
    x, scale, zero = operands
    assert x is not None and scale is not None
    dtype, block = DType(str(attributes["dtype"])), int(attributes["block_size"])
    axis = layout.body_axis(b, attributes["axis"], x) if x.rank else -1
    h = b.up(x)
    s = b.cast(scale, h.dtype)
    if h.dtype is DType.F32 and dtype not in _FLOAT8 and _native(dtype, block, b.opset):
        return [_quantize_linear(b, h, s, zero, dtype, axis, block)]
    z = None if zero is None else _body_spread(b, b.cast(zero, h.dtype), x, axis, block)
    return [b.cast(_body_steps(b, h, _body_spread(b, s, x, axis, block), z, dtype), dtype)]


register(
    OpDef(
        name="quantize",
        doc=_QUANTIZE_DOC,
        inputs=(
            Operand("x", "the numbers"),
            Operand("scale", "[], [1], [n] along axis, or one per block; positive"),
            Operand("zero_point", "shaped like scale; absent: 0", dtypes=_ZERO_POINTS, optional=True),
        ),
        outputs=("q",),
        infer=_quantize_infer,
        reference=_quantize,
        body=_quantize_body,
        attributes=(
            Attribute("dtype", "str", "type of the codes", default="i8", choices=_TYPES),
            Attribute("axis", "int", "the axis of per-channel or per-block scales", default=0),
            Attribute("block_size", "int", "length of a block along axis; 0: no blocks", default=0),
        ),
        traits=frozenset({Trait.ELEMENTWISE}),
        min_opset=13,
        differentiable=False,
    )
)


# --- fake_quant ---------------------------------------------------------------------------------------------------------------

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
unspecified for integer types (QuantizeLinear has no NaN) and stays NaN for float8. Dynamic: a range that holds a NaN or
an infinity, or that is empty, is unspecified. The gradient is the straight-through one: 1 inside the code range, 0
outside; for ``s`` it is ``round(x/s) - x/s`` inside and ``qmin - z`` or ``qmax - z`` outside (LSQ).

Sources: Jacob et al., 2018; Esser et al., *Learned Step Size Quantization*, 2020 (gradients); ONNX QuantizeLinear.
"""


def _fake_quant_infer(types: Sequence[TensorType | None], attributes: Attributes) -> list[TensorType]:
    x, scale, zero = types
    assert x is not None
    dtype, granularity, axis, group = (attributes[n] for n in ("dtype", "granularity", "axis", "group_size"))
    where = "actgraph.fake_quant"
    if granularity == "group" and int(group) < 1:
        raise VerifyError(f"{where}: granularity group needs group_size >= 1")
    if DType(str(dtype)) in _FLOAT8 and not attributes["symmetric"]:
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
            _check_scale("fake_quant", x, parameter, axis, group if granularity == "group" else 0, name)
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
        low, high = h.amin(axes, keepdim=True), h.amax(axes, keepdim=True)
    if symmetric or dtype in _FLOAT8:
        scale = torch.maximum(low.abs(), high.abs()) / codes.positive
        scale = torch.where(scale < SMALLEST_SCALE, torch.ones_like(scale), scale)
        return scale, torch.full_like(scale, codes.middle) if codes.middle else None
    low, high = low.clamp_max(0), high.clamp_min(0)
    scale = (high - low) / (codes.qmax - codes.qmin)
    scale = torch.where(scale < SMALLEST_SCALE, torch.ones_like(scale), scale)
    return scale, torch.round(codes.qmin - low / scale).clamp(codes.qmin, codes.qmax)


def _fake_quant_with(straight_through: bool, x: torch.Tensor, scale: torch.Tensor | None, zero_point: torch.Tensor | None,
                     dtype: str, granularity: str, source: str, symmetric: bool, axis: int, group_size: int) -> torch.Tensor:  # fmt: skip
    kind = DType(dtype)
    axis = layout.from_end(axis, x.dim()) if x.dim() else -1
    h = layout.torch_compute(x)
    grouped = granularity == "group" and source == "dynamic"
    shape = h.shape
    if grouped:
        place = h.dim() + axis
        h = h.reshape(shape[:place] + (shape[place] // group_size, group_size) + shape[place + 1 :])
    if source == "dynamic":
        axes = [axis] if grouped else _range_axes(granularity, axis, h.dim())
        s, z = _torch_dynamic(h.detach(), kind, symmetric, axes)
    else:
        assert scale is not None
        block = group_size if granularity == "group" else 0
        s = _torch_spread(scale.to(h.dtype), h, axis, block)
        z = None if zero_point is None else _torch_spread(zero_point, h, axis, block).to(h.dtype)
    steps = _torch_steps(h, s, z, kind, straight_through)
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
    if symmetric or dtype in _FLOAT8:
        scale = b.op("Max", b.op("Abs", low), b.op("Abs", high)) / codes.positive
        scale = b.where(scale < SMALLEST_SCALE, 1.0, scale)
        return scale, b.const(codes.middle, h.dtype) if codes.middle else None
    low, high = b.op("Min", low, 0.0), b.op("Max", high, 0.0)
    scale = (high - low) / (codes.qmax - codes.qmin)
    scale = b.where(scale < SMALLEST_SCALE, 1.0, scale)
    zero = b.op("Round", b.const(codes.qmin, h.dtype) - low / scale)
    return scale, _clamp(b, zero, codes.qmin, codes.qmax)


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
            h, axes = _grouped(b, h, rank + axis, group), [axis]
        s, z = _body_dynamic(b, h, dtype, bool(attributes["symmetric"]), axes)
    else:
        assert scale is not None
        s, z, block = b.cast(scale, h.dtype), zero, group if granularity == "group" else 0
        if h.dtype is DType.F32 and dtype not in _FLOAT8 and _native(dtype, block, b.opset):
            if granularity == "tensor" and s.rank == 1:
                s, z = b.reshape(s, [], 0), None if z is None else b.reshape(z, [], 0)
            q = _quantize_linear(b, h, s, z, dtype, axis, block)
            return [b.cast(_dequantize_linear(b, q, s, z, axis, block), x.dtype)]
        s = _body_spread(b, s, x, axis, block)
        z = None if z is None else _body_spread(b, b.cast(z, h.dtype), x, axis, block)
    steps = _body_steps(b, h, s, z, dtype)
    y = (steps if z is None else steps - z) * s
    if granularity == "group" and attributes["source"] == "dynamic":
        y = b.reshape(y, b.shape(original), b.rank_of(x), allowzero=True)
    return [b.cast(y, x.dtype)]


def _grouped(b: BodyBuilder, h: BodyValue, place: int, group: int) -> BodyValue:
    """``h`` with axis ``place`` split into groups of ``group``."""
    shape = b.shape(h)
    sizes = [b.slice(shape, b.ints([0]), b.ints([place]), 0)] if place else []
    sizes += [b.op("Div", b.size(h, place), b.ints([group])), b.ints([group])]
    if place + 1 < b.rank_of(h):
        sizes.append(b.slice(shape, b.ints([place + 1]), b.ints([b.rank_of(h)]), 0))
    return b.reshape(h, b.concat(sizes), b.rank_of(h) + 1, allowzero=True)


register(
    OpDef(
        name="fake_quant",
        doc=_FAKE_QUANT_DOC,
        inputs=(
            Operand("x", "the activation or weight", dtypes=COMPUTE_FLOATS),
            Operand("scale", "static scales, positive", optional=True),
            Operand("zero_point", "static zero points, shaped like scale; absent: 0", dtypes=_ZERO_POINTS, optional=True),
        ),
        outputs=("y",),
        infer=_fake_quant_infer,
        reference=_fake_quant,
        body=_fake_quant_body,
        surrogate=_fake_quant_surrogate,
        attributes=(
            Attribute("dtype", "str", "type of the codes", default="i8", choices=_TYPES),
            Attribute("granularity", "str", "what shares a scale", default="tensor", choices=("tensor", "axis", "group", "token")),
            Attribute("source", "str", "where scales come from", default="static", choices=("static", "dynamic")),
            Attribute("symmetric", "bool", "whether the range is symmetric (dynamic; a record for static)", default=True),
            Attribute("axis", "int", "the axis of granularity axis, group and token", default=-1),
            Attribute("group_size", "int", "length of a group along axis", default=0),
            Attribute("calibration", "str", "how the scales were found, such as 'percentile 99.9': a record", default="", structural=False),
        ),
        traits=frozenset({Trait.PER_TOKEN}),
        min_opset=13,
    )
)
