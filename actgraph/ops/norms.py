"""Norms over the last axis: ``rms_norm`` and ``layer_norm``, computed in float32 and rounded once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from actgraph.errors import VerifyError
from actgraph.ops import layout
from actgraph.ops.drawing import draws, normal, special
from actgraph.ops.dtypes import DType
from actgraph.ops.registry import Attribute, Attributes, OpDef, Operand, Sample, Trait, register, single
from actgraph.ops.shapes import TensorType

if TYPE_CHECKING:
    import torch

    from actgraph.ops.body import BodyBuilder, BodyValue

_EPS = Attribute("eps", "float", "added to the mean square (variance)", default=1e-6, structural=False)
_WEIGHT = Operand("weight", "[channels] of factors; absent: none", optional=True)


def _check(op: str, types: Sequence[TensorType | None]) -> list[TensorType]:
    x = types[0]
    assert x is not None
    if x.shape is not None and not x.shape:
        raise VerifyError(f"actgraph.{op}: x needs a channel axis")
    for name, operand in zip(("weight", "bias"), types[1:], strict=False):
        if operand is None or operand.shape is None or x.shape is None:
            continue
        channels, given = x.shape[-1], operand.shape
        if len(given) != 1 or (isinstance(channels, int) and isinstance(given[0], int) and channels != given[0]):
            raise VerifyError(f"actgraph.{op}: {name} {operand} must be one number per channel of {x}")
    return [x]


def _strewn(rng: Any, shape: tuple[int, ...], dtype: DType) -> Any:
    """Special values in every other token: a NaN reaches every channel of its token."""
    values = normal(rng, shape, dtype)
    values[::2] = special(rng, values[::2].shape, dtype)
    return values


# --- rms_norm ---------------------------------------------------------------------------------------------------------------

_RMS_DOC = """
Root mean square norm over the last axis: ``y = x / sqrt(mean(x^2) + eps) * (weight + offset)``.

``weight`` [channels]; absent, there is no factor (and ``offset`` means nothing). ``offset`` is 1 in Gemma, which stores
``weight - 1``. Everything is computed in float32 (float64 for float64) and rounded once. NaN in a token makes the token
NaN; an infinity makes its own channel NaN and the others 0.

Source: Zhang and Sennrich, *Root Mean Square Layer Normalization*, 2019.
"""


def _rms_infer(types: Sequence[TensorType | None], attributes: Attributes) -> list[TensorType]:
    return _check("rms_norm", types)


def _rms(x: torch.Tensor, weight: torch.Tensor | None = None, *, eps: float = 1e-6, offset: float = 0.0) -> torch.Tensor:
    h = layout.torch_compute(x)
    y = h / ((h * h).mean(-1, keepdim=True) + single(eps)).sqrt()
    if weight is not None:
        y = y * (weight.to(h.dtype) + single(offset))
    return y.to(x.dtype)


def _rms_body(b: BodyBuilder, operands: Sequence[BodyValue | None], attributes: Attributes) -> list[BodyValue]:
    x, weight = operands
    assert x is not None
    h = b.up(x)
    y = h / _root(b, h, operands)
    if weight is not None:
        y = y * (b.cast(weight, h.dtype) + b.attribute("offset", h.dtype))
    return [b.cast(y, x.dtype)]


def _root(b: BodyBuilder, h: BodyValue, operands: Sequence[BodyValue | None]) -> BodyValue:
    """``sqrt(mean(h^2) + eps)``. Where all is float32, in the spelling that onnxruntime fuses into a norm of its own; its
    fusion is wrong with other types (it mixes them, and takes an epsilon that is cast for 1e-5)."""
    plain = all(operand is None or operand.dtype is DType.F32 for operand in operands)
    square = b.op("Pow", h, b.const(2.0, h.dtype), rank=h.rank) if plain else h * h
    return b.op("Sqrt", b.reduce("ReduceMean", square, [-1]) + b.attribute("eps", h.dtype))


RMS_NORM = register(
    OpDef(
        name="rms_norm",
        doc=_RMS_DOC,
        inputs=(Operand("x", "[.., channels]"), _WEIGHT),
        outputs=("y",),
        infer=_rms_infer,
        reference=_rms,
        body=_rms_body,
        attributes=(
            _EPS,
            Attribute("offset", "float", "added to the weight: 1 in Gemma", default=0.0, structural=False),
        ),
        traits=frozenset({Trait.PER_TOKEN}),
        min_opset=13,
        samples=(
            Sample(((2, 3, 8), (8,))),
            Sample(((2, 3, 8), (8,)), {"eps": 1e-5, "offset": 1.0}),
            Sample(((2, 3, 8), None), {"eps": 0.5}, note="no weight"),
            Sample(((4, 8), (8,)), draw=draws(_strewn, normal), note="NaN and infinity"),
            Sample(((0, 3, 8), (8,)), note="no tokens"),
            Sample(((8,), (8,)), note="one token without axes"),
            Sample(((3, 1031), (1031,)), {"eps": 1e-5}, note="large"),
        ),
    )
)


# --- layer_norm -------------------------------------------------------------------------------------------------------------

_LAYER_DOC = """
Layer norm over the last axis: ``y = (x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps) * weight + bias``.

``weight`` and ``bias`` are [channels], each may be absent. Everything is computed in float32 (float64 for float64) and
rounded once. NaN or an infinity in a token makes the token NaN.

Source: Ba, Kiros and Hinton, *Layer Normalization*, 2016.
"""


def _layer_infer(types: Sequence[TensorType | None], attributes: Attributes) -> list[TensorType]:
    return _check("layer_norm", types)


def _layer(
    x: torch.Tensor, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None, *, eps: float = 1e-6
) -> torch.Tensor:
    h = layout.torch_compute(x)
    h = h - h.mean(-1, keepdim=True)
    y = h / ((h * h).mean(-1, keepdim=True) + single(eps)).sqrt()
    if weight is not None:
        y = y * weight.to(h.dtype)
    if bias is not None:
        y = y + bias.to(h.dtype)
    return y.to(x.dtype)


def _layer_body(b: BodyBuilder, operands: Sequence[BodyValue | None], attributes: Attributes) -> list[BodyValue]:
    x, weight, bias = operands
    assert x is not None
    h = b.up(x)
    h = h - b.reduce("ReduceMean", h, [-1])
    y = h / _root(b, h, operands)
    if weight is not None:
        y = y * b.cast(weight, h.dtype)
    if bias is not None:
        y = y + b.cast(bias, h.dtype)
    return [b.cast(y, x.dtype)]


LAYER_NORM = register(
    OpDef(
        name="layer_norm",
        doc=_LAYER_DOC,
        inputs=(Operand("x", "[.., channels]"), _WEIGHT, Operand("bias", "[channels]; absent: none", optional=True)),
        outputs=("y",),
        infer=_layer_infer,
        reference=_layer,
        body=_layer_body,
        attributes=(_EPS,),
        traits=frozenset({Trait.PER_TOKEN}),
        min_opset=13,
        samples=(
            Sample(((2, 3, 8), (8,), (8,))),
            Sample(((2, 3, 8), (8,), None), {"eps": 1e-5}),
            Sample(((2, 3, 8), None, None), {"eps": 0.5}, note="no weight"),
            Sample(((4, 8), (8,), (8,)), draw=draws(_strewn, normal, normal), note="NaN and infinity"),
            Sample(((0, 3, 8), (8,), (8,)), note="no tokens"),
            Sample(((8,), (8,), None), note="one token without axes"),
            Sample(((3, 1031), (1031,), (1031,)), {"eps": 1e-5}, note="large"),
        ),
    )
)
