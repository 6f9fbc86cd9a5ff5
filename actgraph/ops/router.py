"""Ops of routing edits in mixtures of experts: the scores of chosen experts, and their weights changed expert by expert."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from actgraph.errors import VerifyError
from actgraph.ops import layout
from actgraph.ops.drawing import boolean, draws, fraction, integers, nan_vector, normal, offsets, positive, special, zeros
from actgraph.ops.dtypes import COMPUTE_FLOATS, DType
from actgraph.ops.registry import Attributes, OpDef, Operand, Sample, Trait, register
from actgraph.ops.shapes import TensorType

if TYPE_CHECKING:
    import torch

    from actgraph.ops.body import BodyBuilder, BodyValue

_INTEGERS = frozenset({DType.I64, DType.I32})
_FLOATS = (DType.F64, DType.F32, DType.F16, DType.BF16)


# --- take_along ---------------------------------------------------------------------------------------------------------------

_TAKE_DOC = """
Entries of the last axis by index: ``y[..., j] = x[..., index[..., j]]``.

``x`` [..., n]; ``index`` [..., k] of the same leading axes, each in [0, n). With ``x`` the scores of experts and ``index``
those that were chosen, it gives the scores of these. A top-k gives the scores that it chose by; where the choice is edited (an
expert is forced, suppressed or biased) and the weights are not, they are taken from the scores before the edit: where the edit
changes nothing, the numbers are those of the top-k bit for bit.

Source: *Mixture of Tunable Experts*, 2025 (selection is edited, weights come from the unmodified scores).
"""


def _take_infer(types: Sequence[TensorType | None], attributes: Attributes) -> list[TensorType]:
    x, index = types
    assert x is not None and index is not None
    if x.shape is not None and index.shape is not None:
        if len(x.shape) != len(index.shape) or not x.shape:
            raise VerifyError(f"actgraph.take_along: index {index} must have the leading axes of {x}")
        layout.check_into("take_along", "index", index.shape[:-1], x.shape[:-1])
    return [TensorType(x.dtype, index.shape)]


def _take(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.gather(x, -1, index.to(torch.int64))


def _take_body(b: BodyBuilder, operands: Sequence[BodyValue | None], attributes: Attributes) -> list[BodyValue]:
    x, index = operands
    assert x is not None and index is not None
    wide = b.up(x) if x.dtype.is_float else x
    return [b.cast(b.op("GatherElements", wide, index, attributes={"axis": b.rank_of(x) - 1}), x.dtype)]


_INDEX = Operand("index", "the chosen entries, such as experts: [..., k]", dtypes=_INTEGERS)

register(
    OpDef(
        name="take_along",
        doc=_TAKE_DOC,
        inputs=(Operand("x", "what is taken from, [..., n]", dtypes=COMPUTE_FLOATS | _INTEGERS), _INDEX),
        outputs=("y",),
        infer=_take_infer,
        reference=_take,
        body=_take_body,
        traits=frozenset({Trait.PER_TOKEN}),
        min_opset=13,
        exact="bits",
        samples=(
            Sample(((6, 4), (6, 2)), dtypes=_FLOATS, draw=draws(normal, integers(0, 4, DType.I64))),
            Sample(
                ((2, 3, 5), (2, 3, 3)), dtypes=_FLOATS, draw=draws(special, integers(0, 5, DType.I32)), note="NaN and infinity"
            ),
            Sample(((0, 4), (0, 2)), dtypes=_FLOATS, draw=draws(normal, integers(0, 4, DType.I64)), note="no tokens"),
            Sample(((1, 1), (1, 1)), dtypes=_FLOATS, draw=draws(normal, integers(0, 1, DType.I64))),
            Sample(((257, 31), (257, 9)), dtypes=_FLOATS, draw=draws(normal, integers(0, 31, DType.I64)), note="large"),
            Sample(((5,), (3,)), dtypes=(DType.I32,), draw=draws(offsets(40), integers(0, 5, DType.I64)), note="offsets"),
        ),
    )
)


# --- reweight_experts ---------------------------------------------------------------------------------------------------------

_SUPPRESSED = (DType.F32, DType.F16, DType.BF16)  # where all weights are 0 the result jumps, and has no gradient to check
_REWEIGHT_DOC = """
Change the weights of chosen experts and keep each token's total: ``g_j = w_j * scale[e_j] + offset[e_j]``, ``y_j = g_j *
(sum_i w_i / sum_i g_i)``, where ``w`` [..., k] are a token's weights and ``e`` [..., k] its experts.

``scale`` 0 suppresses an expert: no other one is admitted, and the rest share its weight. ``scale`` 0 with an ``offset`` gives
an expert that weight before the total is restored. The total of the token's own weights is restored and not 1: routers that
do not normalise have totals of their own. A mask m makes them ``1 + m (scale - 1)`` and ``m * offset``.

Exactness: a token none of whose experts has a scale other than 1 or an offset other than 0, or whose mask is 0, keeps its
weights bit for bit. Where the new weights sum to 0 (all experts suppressed) nothing is divided, and they stay 0.
Infinite and NaN weights follow IEEE arithmetic. float16 and bfloat16 are computed in float32 and rounded once.

Source: *Mixture of Tunable Experts*, 2025 (suppression after the top-k, stimulation with a fixed weight).
"""


def _reweight_infer(types: Sequence[TensorType | None], attributes: Attributes) -> list[TensorType]:
    gates, index, scale, offset, mask = types
    assert gates is not None and index is not None and scale is not None
    if gates.shape is not None and index.shape is not None:
        if len(gates.shape) != len(index.shape):
            raise VerifyError(f"actgraph.reweight_experts: index {index} must have the shape of the weights {gates}")
        layout.check_into("reweight_experts", "index", index.shape, gates.shape)
    for name, table in (("scale", scale), ("offset", offset)):
        if table is not None and table.shape is not None and len(table.shape) != 1:
            raise VerifyError(f"actgraph.reweight_experts: {name} {table} must be [experts]")
    layout.check_operands("reweight_experts", gates, -1, tokens={"mask": mask})
    return [gates]


def _reweight(
    gates: torch.Tensor,
    index: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    import torch

    w = layout.torch_compute(gates)
    place = index.to(torch.int64)
    zero = torch.zeros((), dtype=w.dtype, device=w.device)
    one = torch.ones((), dtype=w.dtype, device=w.device)
    factor = scale.to(w.dtype)[place]
    added = torch.zeros_like(factor) if offset is None else offset.to(w.dtype)[place]
    if mask is not None:
        m = layout.torch_tokens(mask.to(w.dtype), -1)
        factor = torch.where(m == 0, one, torch.where(m == 1, factor, 1 + m * (factor - 1)))
        added = torch.where(m == 0, zero, m * added)
    g = w * factor - torch.where(added != 0, -added, zero)
    touched = ((factor != 1) | (added != 0)).any(-1, keepdim=True)
    old, new = w.sum(-1, keepdim=True), g.sum(-1, keepdim=True)
    restore = touched & (new != 0)
    ratio = torch.where(restore, old / torch.where(restore, new, one), one)
    return (g * ratio).to(gates.dtype)


def _reweight_body(b: BodyBuilder, operands: Sequence[BodyValue | None], attributes: Attributes) -> list[BodyValue]:
    gates, index, scale, offset, mask = operands
    assert gates is not None and index is not None and scale is not None
    w = b.up(gates)
    factor = b.op("Gather", b.cast(scale, w.dtype), index, rank=w.rank)
    added = b.op("Gather", b.cast(offset, w.dtype), index, rank=w.rank) if offset is not None else None
    if mask is not None:
        m = layout.body_tokens(b, b.cast(mask, w.dtype), -1)
        factor = b.where(m.equal(0), 1.0, b.where(m.equal(1), factor, m * (factor - 1) + 1))
        added = b.where(m.equal(0), 0.0, m * added) if added is not None else None
    g = w * factor
    changed = b.op("Not", factor.equal(1))
    if added is not None:
        on = b.op("Not", added.equal(0))
        g = g - b.where(on, b.op("Neg", added), 0.0)
        changed = b.op("Or", changed, on)
    touched = b.reduce("ReduceMax", b.cast(changed, DType.F32), [-1]) > 0
    old, new = b.reduce("ReduceSum", w, [-1]), b.reduce("ReduceSum", g, [-1])
    restore = b.op("And", touched, b.op("Not", new.equal(0)))
    ratio = b.where(restore, old / b.where(restore, new, 1.0), 1.0)
    return [b.cast(g * ratio, gates.dtype)]


register(
    OpDef(
        name="reweight_experts",
        doc=_REWEIGHT_DOC,
        inputs=(
            Operand("gates", "the weights of the chosen experts, [..., k]"),
            _INDEX,
            Operand("scale", "one factor per expert, [experts]"),
            Operand("offset", "one number per expert that is added, [experts]; none without it", optional=True),
            layout.MASK,
        ),
        outputs=("y",),
        infer=_reweight_infer,
        reference=_reweight,
        body=_reweight_body,
        traits=frozenset({Trait.PER_TOKEN}),
        min_opset=13,
        samples=(
            Sample(((6, 2), (6, 2), (4,), None, None), draw=draws(positive, integers(0, 4, DType.I64), positive, None, None)),
            Sample(
                ((2, 3, 2), (2, 3, 2), (4,), (4,), (2, 3)),
                draw=draws(positive, integers(0, 4, DType.I32), fraction, fraction, boolean),
            ),
            Sample(
                ((7, 3), (7, 3), (5,), None, (7,)),
                draw=draws(special, integers(0, 5, DType.I64), fraction, None, boolean),
                note="NaN and infinity",
            ),
            Sample(
                ((5, 2), (5, 2), (3,), None, (5,)),
                dtypes=_SUPPRESSED,
                draw=draws(positive, integers(0, 3, DType.I64), zeros, None, fraction),
            ),
            Sample(
                ((5, 2), (5, 2), (3,), (3,), (1,)),
                draw=draws(normal, integers(0, 3, DType.I64), nan_vector, nan_vector, integers(0, 1, DType.I64)),
                note="off",
            ),
            Sample(
                ((4, 2), (4, 2), (3,), None, None),
                dtypes=_SUPPRESSED,
                draw=draws(positive, integers(0, 3, DType.I64), zeros, None, None),
                note="all suppressed",
            ),
            Sample(
                ((0, 2), (0, 2), (3,), None, None),
                draw=draws(positive, integers(0, 3, DType.I64), fraction, None, None),
                note="no tokens",
            ),
            Sample(((1, 1), (1, 1), (1,), None, None), draw=draws(positive, integers(0, 1, DType.I64), positive, None, None)),
            Sample(
                ((257, 9), (257, 9), (65,), (65,), None),
                draw=draws(positive, integers(0, 65, DType.I64), fraction, fraction, None),
                note="large",
            ),
        ),
    )
)
