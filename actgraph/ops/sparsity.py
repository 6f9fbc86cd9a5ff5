"""Ops of activation sparsity: ``y = where(keep(x), x, 0)`` with the keep rules of the literature."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from actgraph.ops import layout
from actgraph.ops.registry import Attribute, Attributes, OpDef, Operand, Trait, register, single
from actgraph.ops.shapes import TensorType

if TYPE_CHECKING:
    import torch

    from actgraph.ops.body import BodyBuilder, BodyValue

_AXIS = Attribute("axis", "int", "channel axis of x: -1 for [batch, seq, channels], 1 for NCHW", default=-1)


# --- gate -------------------------------------------------------------------------------------------------------------------

_GATE_DOC = """
Drop small activations: ``y = 0 where dropped, else x``.

``keep = "abs>"`` drops ``|x| <= t`` (so ``t = 0`` is the identity but for the sign of zero, and NaN, which compares
false, passes). ``keep = "x>="`` drops ``x < t`` (one-sided; NaN passes). ``t`` is the operand ``thresholds`` where given
(one number, one per channel, or any shape that broadcasts to ``x``), else the attribute ``threshold``. The dropped value
is +0.0; -0.0 under ``t = 0`` becomes +0.0, every other value passes bit for bit. A negative or NaN threshold of
``"abs>"`` drops nothing. float16 and bfloat16 are compared in float32. The gradient is 1 where kept and 0 elsewhere;
thresholds have none.

Sources: *CATS*, 2024; *TEAL*, 2024 (``|x| > t`` keeps); *CHESS*, 2024 (per channel); *ProSparse*, 2024 (FATReLU keeps
``x >= t``).
"""


def _gate_infer(types: Sequence[TensorType | None], attributes: Attributes) -> list[TensorType]:
    x, thresholds = types
    assert x is not None
    layout.check_channels("gate", "thresholds", x, thresholds, attributes["axis"])
    return [x]


def _gate(
    x: torch.Tensor, thresholds: torch.Tensor | None = None, *, threshold: float = 0.0, keep: str = "abs>", axis: int = -1
) -> torch.Tensor:
    import torch

    axis = layout.from_end(axis, x.dim()) if x.dim() else -1
    h = layout.torch_compute(x)
    if thresholds is None:
        t = torch.full((), single(threshold), dtype=h.dtype, device=x.device)
    else:
        t = layout.torch_channels(thresholds.detach().to(h.dtype), axis)
    dropped = h.abs() <= t if keep == "abs>" else h < t
    return torch.where(dropped, torch.zeros((), dtype=x.dtype, device=x.device), x)


def _gate_body(b: BodyBuilder, operands: Sequence[BodyValue | None], attributes: Attributes) -> list[BodyValue]:
    x, thresholds = operands
    assert x is not None
    h = b.up(x)
    if thresholds is None:
        t = b.attribute("threshold", h.dtype)
    else:
        t = layout.body_channels(b, b.cast(thresholds, h.dtype), layout.body_axis(b, attributes["axis"], x))
    dropped = b.op("Abs", h) <= t if attributes["keep"] == "abs>" else h < t
    return [b.cast(b.where(dropped, 0.0, h), x.dtype)]


register(
    OpDef(
        name="gate",
        doc=_GATE_DOC,
        inputs=(
            Operand("x", "the activation"),
            Operand("thresholds", "thresholds in place of the attribute: [], [channels] or broadcastable to x", optional=True),
        ),
        outputs=("y",),
        infer=_gate_infer,
        reference=_gate,
        body=_gate_body,
        attributes=(
            Attribute("threshold", "float", "t, for the whole tensor", default=0.0, structural=False),
            Attribute("keep", "str", "which values stay", default="abs>", choices=("abs>", "x>=")),
            _AXIS,
        ),
        traits=frozenset({Trait.ELEMENTWISE}),
        min_opset=13,
    )
)
