"""Sums over the tokens so far: what a gate needs that judges a request by all it has read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from actgraph.errors import VerifyError
from actgraph.ops import layout
from actgraph.ops.drawing import boolean, draws, normal, special
from actgraph.ops.dtypes import COMPUTE_FLOATS, DType
from actgraph.ops.registry import Attributes, OpDef, Operand, Sample, Trait, register
from actgraph.ops.shapes import TensorType

if TYPE_CHECKING:
    import torch

    from actgraph.ops.body import BodyBuilder, BodyValue

_DOC = """
Sums of each channel over the tokens of a row up to and with each one: ``y[b, t] = start[b] + sum of mask[b, u] * x[b, u] over
u <= t``.

A token whose mask is 0 is left out, whatever it holds. ``start`` is the sum of earlier calls (nothing: zeros), so that with a
cache ``y[:, -1]`` is the next call's ``start``. float16 and bfloat16 are added in float32, which sums stay in.

Source: *Inference-Time Machine Unlearning via Gated Activation Redirection* (GUARD-IT), 2026 (gates on activations pooled over
the prompt).
"""


def _infer(types: Sequence[TensorType | None], attributes: Attributes) -> list[TensorType]:
    x, mask, start = types
    assert x is not None
    if x.shape is not None and len(x.shape) != 3:
        raise VerifyError(f"actgraph.running_sum: x {x} must be [batch, tokens, channels]")
    layout.check_operands("running_sum", x, -1, tokens={"mask": mask})
    if start is not None and start.shape is not None and x.shape is not None:
        layout.check_into("running_sum", "start", start.shape, (x.shape[0], x.shape[2]))
    kind = x.dtype if x.dtype in (None, DType.F64) else DType.F32
    return [TensorType(kind, x.shape)]


def _reference(x: torch.Tensor, mask: torch.Tensor | None = None, start: torch.Tensor | None = None) -> torch.Tensor:
    import torch

    h = layout.torch_compute(x)
    if mask is not None:
        m = layout.torch_tokens(mask.to(h.dtype), -1)
        h = torch.where(m != 0, m * h, torch.zeros((), dtype=h.dtype, device=h.device))
    sums = h.cumsum(1)
    return sums if start is None else sums + start.to(h.dtype).unsqueeze(1)


def _body(b: BodyBuilder, operands: Sequence[BodyValue | None], attributes: Attributes) -> list[BodyValue]:
    x, mask, start = operands
    assert x is not None
    h = b.up(x)
    if mask is not None:
        m = layout.body_tokens(b, b.cast(mask, h.dtype), -1)
        h = b.where(b.op("Not", m.equal(0)), m * h, 0.0)
    sums = b.op("CumSum", h, b.const(1, DType.I64))
    return [sums if start is None else sums + b.unsqueeze(b.cast(start, h.dtype), [1])]


register(
    OpDef(
        name="running_sum",
        doc=_DOC,
        inputs=(
            Operand("x", "the activation, [batch, tokens, channels]"),
            Operand(
                "mask",
                "what each token counts, [batch, tokens] or broadcastable to it",
                dtypes=COMPUTE_FLOATS | {DType.BOOL, DType.I64, DType.I32},
                optional=True,
            ),
            Operand("start", "sums of earlier tokens, [batch, channels]", optional=True),
        ),
        outputs=("y",),
        infer=_infer,
        reference=_reference,
        body=_body,
        traits=frozenset({Trait.PER_SAMPLE}),
        min_opset=13,
        samples=(
            Sample(((2, 5, 8), None, None)),
            Sample(((2, 5, 8), (2, 5), (2, 8)), draw=draws(normal, boolean, normal)),
            Sample(((3, 1, 8), (3, 1), (3, 8)), draw=draws(normal, boolean, normal), note="one token"),
            Sample(((2, 4, 6), (1, 1), None), draw=draws(special, boolean, None), note="NaN and infinity"),
            Sample(((2, 0, 6), None, (2, 6)), note="no tokens"),
        ),
    )
)
