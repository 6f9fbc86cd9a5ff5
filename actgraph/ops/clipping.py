"""Ops of range restriction: clipping activations to bounds, for resilience and for outliers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from actgraph.ops import layout
from actgraph.ops.drawing import draws, grid, normal, positive, special
from actgraph.ops.registry import Attribute, Attributes, OpDef, Operand, Sample, Trait, register, single
from actgraph.ops.shapes import TensorType

if TYPE_CHECKING:
    import torch

    from actgraph.ops.body import BodyBuilder, BodyValue

_CLIP_DOC = """
Restrict ``x`` to ``[lo, hi]``.

``policy = "saturate"``: ``y = min(max(x, lo), hi)``. ``policy = "zero"``: values outside become +0.0 (a large wrong value
is better dropped than kept large). Each bound is its operand where given (one number, one per channel, or any shape that
broadcasts to ``x``), else its attribute (``min`` and ``max``, infinite by default: no bound).

``nan = "pass"`` leaves NaN as it is; ``nan = "zero"`` turns it into +0.0, which fault tolerance wants. A NaN bound
restricts nothing. Values inside pass bit for bit; infinities are ordinary values outside. The gradient is 1 inside and 0
outside (bounds get theirs where the value saturates). float16 and bfloat16 are compared in float32; a saturated value is
the bound rounded to the type of ``x``.

Sources: *FT-ClipAct*, 2019 (``min = 0``, ``policy = "zero"``, ``nan = "zero"``); *Ranger*, 2020 (saturating).
"""


def _clip_infer(types: Sequence[TensorType | None], attributes: Attributes) -> list[TensorType]:
    x, lo, hi = types
    assert x is not None
    layout.check_channels("clip", "lo", x, lo, attributes["axis"])
    layout.check_channels("clip", "hi", x, hi, attributes["axis"])
    return [x]


def _clip(
    x: torch.Tensor,
    lo: torch.Tensor | None = None,
    hi: torch.Tensor | None = None,
    *,
    min: float = -math.inf,
    max: float = math.inf,
    policy: str = "saturate",
    nan: str = "pass",
    axis: int = -1,
) -> torch.Tensor:
    import torch

    axis = layout.from_end(axis, x.dim()) if x.dim() else -1
    h = layout.torch_compute(x)

    def bound(operand: torch.Tensor | None, attribute: float) -> torch.Tensor | float:
        return single(attribute) if operand is None else layout.torch_channels(operand.to(h.dtype), axis)

    low, high = bound(lo, min), bound(hi, max)
    if policy == "saturate":
        y = torch.where(h < low, low, h)
        y = torch.where(y > high, high, y)
    else:
        y = h.masked_fill((h < low) | (h > high), 0.0)
    if nan == "zero":
        y = y.masked_fill(h.isnan(), 0.0)
    return y.to(x.dtype)


def _clip_body(b: BodyBuilder, operands: Sequence[BodyValue | None], attributes: Attributes) -> list[BodyValue]:
    x, lo, hi = operands
    assert x is not None
    h = b.up(x)

    def bound(operand: BodyValue | None, attribute: str) -> BodyValue:
        if operand is None:
            return b.attribute(attribute, h.dtype)
        axis = layout.body_axis(b, attributes["axis"], x)
        return layout.body_channels(b, b.cast(operand, h.dtype), axis)

    low, high = bound(lo, "min"), bound(hi, "max")
    saturate = attributes["policy"] == "saturate"
    y = b.where(h < low, low if saturate else 0.0, h)
    y = b.where((y if saturate else h) > high, high if saturate else 0.0, y)
    if attributes["nan"] == "zero":
        y = b.where(b.op("IsNaN", h), 0.0, y)
    return [b.cast(y, x.dtype)]


register(
    OpDef(
        name="clip",
        doc=_CLIP_DOC,
        inputs=(
            Operand("x", "the activation"),
            Operand("lo", "lower bounds in place of `min`: [], [channels] or broadcastable to x", optional=True),
            Operand("hi", "upper bounds in place of `max`: [], [channels] or broadcastable to x", optional=True),
        ),
        outputs=("y",),
        infer=_clip_infer,
        reference=_clip,
        body=_clip_body,
        attributes=(
            Attribute("min", "float", "lower bound", default=-math.inf, structural=False),
            Attribute("max", "float", "upper bound", default=math.inf, structural=False),
            Attribute("policy", "str", "what becomes of values outside", default="saturate", choices=("saturate", "zero")),
            Attribute("nan", "str", "what becomes of NaN", default="pass", choices=("pass", "zero")),
            layout.AXIS,
        ),
        traits=frozenset({Trait.ELEMENTWISE}),
        min_opset=13,
        exact="bits",
        samples=(
            Sample(((2, 3, 8), None, None), {"min": -0.5, "max": 1.0}),
            Sample(
                ((2, 3, 40), None, None),
                {"min": 0.0, "max": 1.0, "policy": "zero", "nan": "zero"},
                draw=draws(special, None, None),
            ),
            Sample(((2, 3, 40), None, None), {"max": 1.0}, draw=draws(special, None, None), note="NaN and infinity"),
            Sample(((2, 3, 40), None, None), {"min": -1.0, "max": 0.5, "policy": "zero"}, draw=draws(grid, None, None)),
            Sample(((0, 8), None, None), {"max": 1.0}, note="no tokens"),
            Sample(((), None, None), {"max": 0.1}, note="a scalar"),
            Sample(
                ((3, 5, 131), None, (131,)),
                {"min": -0.1, "nan": "zero"},
                draw=draws(special, None, positive),
                note="per channel",
            ),
            Sample(((2, 4, 3, 5), (4,), ()), {"axis": 1}, draw=draws(normal, normal, positive), note="NCHW"),
            Sample(((3, 5, 7), (), ()), draw=draws(special, positive, normal), note="bounds may cross"),
            Sample(((2, 3, 8), None, None), draw=draws(special, None, None), note="identity"),
        ),
    )
)
