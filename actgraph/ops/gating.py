"""Ops that decide where an edit acts: how far activations point along directions, and switches on such scores.

Their results are masks and strengths of the edits in ``steering`` and ``subspace``: 0 leaves a token bit for bit as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from actgraph.errors import VerifyError
from actgraph.ops import layout
from actgraph.ops.drawing import draws, grid, normal, special, zeros
from actgraph.ops.dtypes import DType
from actgraph.ops.registry import Attribute, Attributes, OpDef, Operand, Sample, Trait, register, single
from actgraph.ops.shapes import TensorType

if TYPE_CHECKING:
    import torch

    from actgraph.ops.body import BodyBuilder, BodyValue

_TINY = 1e-8  # below this a norm counts as zero


# --- direction_scores -------------------------------------------------------------------------------------------------------

_SCORES_DOC = """
How far each token points along directions: ``scores = x directions``, one column for each direction.

``measure = "projection"``: as above. ``"size"``: the absolute value. ``"cosine"``: divided by the norms of the token and of the
direction (a norm below 1e-8 counts as 1e-8, so a token of zeros has 0). ``"euclidean"``: minus the distance between the token
and the direction's end. The last axis of ``x`` holds the channels. NaN and infinity in a token reach its scores only. float16
and bfloat16 are computed in float32, which scores stay in.

Sources: *Inference-Time Machine Unlearning via Gated Activation Redirection* (GUARD-IT), 2026 (cosines with and distances
from centroids); *KIF*, 2026 (projections).
"""


def _scores_infer(types: Sequence[TensorType | None], attributes: Attributes) -> list[TensorType]:
    x, directions = types
    assert x is not None and directions is not None
    layout.check_basis("direction_scores", x, directions, -1)
    if x.shape is None or directions.shape is None:
        return [TensorType(_computed(x), None)]
    return [TensorType(_computed(x), (*x.shape[:-1], directions.shape[1]))]


def _computed(x: TensorType) -> DType | None:
    return x.dtype if x.dtype in (None, DType.F64) else DType.F32


def _scores(x: torch.Tensor, directions: torch.Tensor, *, measure: str = "projection") -> torch.Tensor:
    import torch

    h = layout.torch_compute(x)
    d = directions.to(h.dtype)
    if measure == "euclidean":  # of differences: squares of norms and products would cancel where both are close
        distances: torch.Tensor = torch.linalg.vector_norm(h.unsqueeze(-1) - d, dim=-2)
        return -distances
    scores: torch.Tensor = h @ d
    if measure == "size":
        return scores.abs()
    if measure == "cosine":
        tokens = torch.linalg.vector_norm(h, dim=-1, keepdim=True).clamp_min(_TINY)
        scores = scores / tokens / torch.linalg.vector_norm(d, dim=0).clamp_min(_TINY)
    return scores


def _scores_body(b: BodyBuilder, operands: Sequence[BodyValue | None], attributes: Attributes) -> list[BodyValue]:
    x, directions = operands
    assert x is not None and directions is not None
    h = b.up(x)
    d = b.cast(directions, h.dtype)
    if attributes["measure"] == "euclidean":
        apart = b.unsqueeze(h, [-1]) - d
        return [b.op("Neg", b.op("Sqrt", b.reduce("ReduceSum", apart * apart, [-2], keepdims=False)))]
    scores = b.op("MatMul", h, d)
    if attributes["measure"] == "size":
        return [b.op("Abs", scores)]
    if attributes["measure"] == "cosine":
        return [scores / _norm(b, h, -1) / _norm(b, d, 0)]
    return [scores]


def _norm(b: BodyBuilder, x: BodyValue, axis: int) -> BodyValue:
    size = b.op("Sqrt", b.reduce("ReduceSum", x * x, [axis]))
    return b.where(size < _TINY, _TINY, size)


register(
    OpDef(
        name="direction_scores",
        doc=_SCORES_DOC,
        inputs=(Operand("x", "the activation, channels last"), Operand("directions", "[channels, k]")),
        outputs=("scores",),
        infer=_scores_infer,
        reference=_scores,
        body=_scores_body,
        attributes=(
            Attribute(
                "measure",
                "str",
                "what is measured",
                default="projection",
                choices=("projection", "size", "cosine", "euclidean"),
            ),
        ),
        traits=frozenset({Trait.PER_TOKEN}),
        min_opset=13,
        samples=(
            Sample(((2, 3, 8), (8, 2))),
            Sample(((4, 8), (8, 1)), {"measure": "size"}),
            Sample(((2, 5, 8), (8, 3)), {"measure": "cosine"}),
            Sample(((2, 8), (8, 3)), {"measure": "cosine"}, draw=draws(zeros, normal), note="tokens of zeros"),
            Sample(((2, 5, 8), (8, 3)), {"measure": "euclidean"}),
            Sample(((0, 3, 8), (8, 2)), note="no tokens"),
        ),
    )
)


# --- switch -----------------------------------------------------------------------------------------------------------------

_SWITCH_DOC = """
A switch on a score: ``z = (x - mean) / deviation - threshold``, and ``y = 1`` where ``z > 0``, else 0.

``mode = "soft"``: ``y = sigmoid(steepness * z)``. A NaN is off. float16 and bfloat16 are computed in float32, which ``y`` stays
in.

Sources: *Inference-Time Machine Unlearning via Gated Activation Redirection* (GUARD-IT), 2026 (hard); *KIF*, 2026 (soft, with
mean and deviation of control prompts).
"""


def _switch_infer(types: Sequence[TensorType | None], attributes: Attributes) -> list[TensorType]:
    (x,) = types
    assert x is not None
    if attributes["deviation"] <= 0:
        raise VerifyError("actgraph.switch: deviation must be positive")
    return [TensorType(_computed(x), x.shape)]


def _switch(
    x: torch.Tensor,
    *,
    threshold: float,
    mean: float = 0.0,
    deviation: float = 1.0,
    mode: str = "hard",
    steepness: float = 1.0,
) -> torch.Tensor:
    import torch

    z = (layout.torch_compute(x) - single(mean)) / single(deviation) - single(threshold)
    on = torch.sigmoid(single(steepness) * z) if mode == "soft" else (z > 0).to(z.dtype)
    return torch.where(torch.isnan(z), torch.zeros((), dtype=z.dtype, device=z.device), on)


def _switch_body(b: BodyBuilder, operands: Sequence[BodyValue | None], attributes: Attributes) -> list[BodyValue]:
    (x,) = operands
    assert x is not None
    h = b.up(x)
    z = (h - b.attribute("mean", h.dtype)) / b.attribute("deviation", h.dtype) - b.attribute("threshold", h.dtype)
    if attributes["mode"] == "soft":
        on = b.op("Sigmoid", b.attribute("steepness", h.dtype) * z)
        return [b.where(b.op("IsNaN", z, dtype=DType.BOOL), 0.0, on)]
    return [b.cast(z > 0.0, h.dtype)]


register(
    OpDef(
        name="switch",
        doc=_SWITCH_DOC,
        inputs=(Operand("x", "the score"),),
        outputs=("y",),
        infer=_switch_infer,
        reference=_switch,
        body=_switch_body,
        attributes=(
            Attribute("threshold", "float", "what a score must exceed, in deviations", structural=False),
            Attribute("mean", "float", "the mean of scores where it is to be off", default=0.0, structural=False),
            Attribute("deviation", "float", "their standard deviation", default=1.0, structural=False),
            Attribute("mode", "str", "hard or soft", default="hard", choices=("hard", "soft")),
            Attribute("steepness", "float", "of the soft switch", default=1.0, structural=False),
        ),
        traits=frozenset({Trait.ELEMENTWISE}),
        min_opset=13,
        samples=(
            Sample(((2, 3, 4),), {"threshold": 0.25}),
            Sample(((0, 3),), {"threshold": 0.25}, note="no tokens"),
            Sample(((2, 3, 4),), {"threshold": 1.0}, dtypes=(DType.F32, DType.F16), draw=draws(grid), note="on the edge"),
            Sample(((2, 9),), {"threshold": 0.5}, draw=draws(special), note="NaN and infinity"),
            Sample(((2, 9),), {"threshold": 3.0, "mean": 0.5, "deviation": 0.2, "mode": "soft", "steepness": 1.6}),
            Sample(
                ((2, 9),),
                {"threshold": 0.0, "mode": "soft", "steepness": 4.0},
                draw=draws(special),
                note="soft, NaN and infinity",
            ),
            Sample(((),), {"threshold": 0.0}, note="one number"),
        ),
    )
)
