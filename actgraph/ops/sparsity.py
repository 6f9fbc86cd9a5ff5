"""Ops of activation sparsity: ``y = where(keep(x), x, 0)`` with the keep rules of the literature."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from actgraph.errors import VerifyError
from actgraph.ops import layout
from actgraph.ops.drawing import draws, grid, integers, normal, positive, special
from actgraph.ops.dtypes import DType
from actgraph.ops.registry import Attribute, Attributes, OpDef, Operand, Sample, Trait, register, single
from actgraph.ops.shapes import TensorType

if TYPE_CHECKING:
    import torch

    from actgraph.ops.body import BodyBuilder, BodyValue


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
    axis = layout.from_end(axis, x.dim()) if x.dim() else -1
    h = layout.torch_compute(x)
    t: torch.Tensor | float = single(threshold)
    if thresholds is not None:
        t = layout.torch_channels(thresholds.detach().to(h.dtype), axis)
    dropped = h.abs() <= t if keep == "abs>" else h < t
    return x.masked_fill(dropped, 0.0)


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


GATE = register(
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
            layout.AXIS,
        ),
        traits=frozenset({Trait.ELEMENTWISE}),
        min_opset=13,
        exact="bits",
        samples=(
            Sample(((2, 3, 8), None), {"threshold": 0.3}),
            Sample(((2, 3, 64), None), {"threshold": 0.25}, draw=draws(grid, None), note="values on the threshold"),
            Sample(
                ((2, 3, 64), None), {"threshold": 0.25, "keep": "x>="}, draw=draws(grid, None), note="values on the threshold"
            ),
            Sample(((0, 8), None), {"threshold": 0.3}, note="no tokens"),
            Sample(((), None), {"threshold": 0.3}, note="a scalar"),
            Sample(((3, 5, 131), (131,)), draw=draws(special, positive), note="NaN and infinity"),
            Sample(((3, 5, 7), ()), {"keep": "x>="}, draw=draws(special, positive)),
            Sample(((2, 4, 3, 5), (4,)), {"axis": 1}, draw=draws(normal, positive), note="NCHW"),
            Sample(((2, 3, 40), None), {"threshold": 0.0}, draw=draws(special, None), note="identity"),
        ),
    )
)


# --- topk_gate --------------------------------------------------------------------------------------------------------------

_TOPK_DOC = """
Keep the ``k`` largest magnitudes along ``axis``, drop the rest: ``y = x`` where the rank of ``|x|`` is at most ``k``, else
+0.0. With ``group_size`` the axis (which it must divide) is cut into groups and each keeps its own ``k``: 2:4 sparsity is
``k = 2, group_size = 4``. Ties go to the lowest index; NaN ranks with infinity. ``k`` of the size or more is the identity.
Kept values pass bit for bit. The gradient is 1 where kept.

Sources: top-k baselines of *TEAL*, 2024; *ELAS*, 2026 (2:4 activations).
"""


def _topk_infer(types: Sequence[TensorType | None], attributes: Attributes) -> list[TensorType]:
    (x,) = types
    assert x is not None
    k, group = attributes["k"], attributes["group_size"]
    if k < 1 or group < 0:
        raise VerifyError(f"actgraph.topk_gate: k = {k} and group_size = {group} must be positive")
    if x.shape is not None:
        size = x.shape[layout.from_end(attributes["axis"], len(x.shape))]
        if group and isinstance(size, int) and size % group:
            raise VerifyError(f"actgraph.topk_gate: groups of {group} do not divide axis {attributes['axis']} of {x}")
    return [x]


def _topk(x: torch.Tensor, *, k: int, group_size: int = 0, axis: int = -1) -> torch.Tensor:
    import torch

    axis = layout.from_end(axis, x.dim())
    h = x.movedim(axis, -1)
    if group_size:
        h = h.reshape((*h.shape[:-1], h.shape[-1] // group_size, group_size))
    size = h.detach().abs()
    size = size.masked_fill(size.isnan(), torch.inf)
    order = torch.sort(size, dim=-1, descending=True, stable=True).indices
    dropped = torch.ones_like(h, dtype=torch.bool).scatter(-1, order.narrow(-1, 0, min(k, h.shape[-1])), False)
    y = h.masked_fill(dropped, 0.0)
    return (y.flatten(-2) if group_size else y).movedim(-1, axis).contiguous()


def _topk_body(b: BodyBuilder, operands: Sequence[BodyValue | None], attributes: Attributes) -> list[BodyValue]:
    (x,) = operands
    assert x is not None
    group, rank = attributes["group_size"], b.rank_of(x)
    place = rank + layout.body_axis(b, attributes["axis"], x)
    h = b.up(x)
    if group:
        h = layout.body_groups(b, h, place, group)
        place += 1
    size = b.where(b.op("IsNaN", h), math.inf, b.op("Abs", h))
    k = b.op("Min", b.size(h, place), b.ints([attributes["k"]]))
    _, kept = b.multi("TopK", size, k, dtypes=[None, DType.I64], ranks=[None, None], attributes={"axis": place})
    none, ones = b.fill(b.shape(h), 0, DType.I32, h.rank), b.fill(b.shape(kept), 1, DType.I32, h.rank)
    dropped = b.op("ScatterElements", none, kept, ones, attributes={"axis": place}).equal(0)
    y = b.where(dropped, 0.0, h)
    if group:
        y = b.reshape(y, b.shape(x), rank, allowzero=True)
    return [b.cast(y, x.dtype)]


TOPK_GATE = register(
    OpDef(
        name="topk_gate",
        doc=_TOPK_DOC,
        inputs=(Operand("x", "the activation"),),
        outputs=("y",),
        infer=_topk_infer,
        reference=_topk,
        body=_topk_body,
        attributes=(
            Attribute("k", "int", "how many values stay, per row or group"),
            Attribute("group_size", "int", "length of a group along axis; 0: the whole axis", default=0),
            layout.AXIS,
        ),
        traits=frozenset({Trait.PER_TOKEN}),
        min_opset=14,
        exact="bits",
        samples=(
            Sample(((2, 3, 8),), {"k": 3}),
            Sample(((2, 3, 40),), {"k": 9}, draw=draws(grid), note="ties"),
            Sample(((2, 3, 40),), {"k": 2, "group_size": 4}, draw=draws(grid), note="2:4 with ties"),
            Sample(((2, 3, 40),), {"k": 5}, draw=draws(special), note="NaN and infinity"),
            Sample(((0, 8),), {"k": 3}, note="no tokens"),
            Sample(((1, 1),), {"k": 3}, note="k beyond the size"),
            Sample(((2, 8, 3, 5),), {"k": 1, "group_size": 2, "axis": 1}, note="NCHW"),
            Sample(((4, 1031),), {"k": 300}, note="large"),
        ),
    )
)


# --- index_gate -------------------------------------------------------------------------------------------------------------

_INDEX_DOC = """
Keep the channels listed in ``indices``, drop the others: ``y[.., j] = x[.., j]`` if ``j`` is listed, else +0.0.

``indices`` is [K] for all tokens, or has leading axes that broadcast to the token axes of ``x`` ([batch, 1, K] for one set
per sequence). A negative index is padding and lists nothing; an index beyond the channels is an error of the engine.
Order and repetition do not matter. Kept values pass bit for bit. The gradient is 1 where kept.

Source: *CoreInfer*, 2024 (core neurons, fixed per sequence).
"""


def _index_infer(types: Sequence[TensorType | None], attributes: Attributes) -> list[TensorType]:
    x, indices = types
    assert x is not None and indices is not None
    if indices.shape is not None:
        if not indices.shape:
            raise VerifyError("actgraph.index_gate: indices must have at least one axis")
        listed = TensorType(indices.dtype, indices.shape[:-1])
        layout.check_tokens("index_gate", "the leading axes of indices", x, listed, attributes["axis"])
    return [x]


def _index(x: torch.Tensor, indices: torch.Tensor, *, axis: int = -1) -> torch.Tensor:
    import torch

    axis = layout.from_end(axis, x.dim())
    channels = x.shape[axis]
    listed = indices.to(torch.int64)
    listed = listed.masked_fill(listed < 0, channels)
    dropped = torch.ones((*indices.shape[:-1], channels + 1), dtype=torch.bool, device=x.device).scatter(-1, listed, False)
    dropped = dropped.narrow(-1, 0, channels)
    if dropped.dim() == 1:
        dropped = layout.torch_channels(dropped, axis)
    elif dropped.dim() >= -axis:
        dropped = dropped.movedim(-1, axis)
    else:
        dropped = dropped.reshape((1,) * (-axis - dropped.dim()) + dropped.shape).movedim(-1, axis)
    return x.masked_fill(dropped, 0.0)


def _index_body(b: BodyBuilder, operands: Sequence[BodyValue | None], attributes: Attributes) -> list[BodyValue]:
    x, indices = operands
    assert x is not None and indices is not None
    axis = layout.body_axis(b, attributes["axis"], x)
    h = b.up(x)
    channels = b.size(x, b.rank_of(x) + axis)
    rank = b.rank_of(indices)
    listed = b.cast(indices, DType.I64)
    listed = b.where(listed < 0, channels, listed)
    leading = b.slice(b.shape(indices), b.ints([0]), b.ints([rank - 1]), 0)
    empty = b.fill(b.concat([leading, channels + b.ints([1])]), 0, DType.I32, rank)
    ones = b.fill(b.shape(indices), 1, DType.I32, rank)
    marked = b.op("ScatterElements", empty, listed, ones, attributes={"axis": rank - 1})
    dropped = b.slice(marked, b.ints([0]), channels, rank - 1).equal(0)
    if rank == 1:
        dropped = layout.body_channels(b, dropped, axis)
    else:
        if rank < -axis:
            dropped, rank = b.unsqueeze(dropped, range(-axis - rank)), -axis
        perm = list(range(rank - 1))
        perm.insert(rank + axis, rank - 1)
        dropped = b.transpose(dropped, perm)
    return [b.cast(b.where(dropped, 0.0, h), x.dtype)]


INDEX_GATE = register(
    OpDef(
        name="index_gate",
        doc=_INDEX_DOC,
        inputs=(
            Operand("x", "the activation"),
            Operand("indices", "channels that stay, [.., K]", dtypes=frozenset({DType.I64, DType.I32})),
        ),
        outputs=("y",),
        infer=_index_infer,
        reference=_index,
        body=_index_body,
        attributes=(layout.AXIS,),
        traits=frozenset({Trait.PER_TOKEN}),
        min_opset=13,
        exact="bits",
        samples=(
            Sample(((2, 3, 8), (3,)), draw=draws(normal, integers(0, 8, DType.I64))),
            Sample(((2, 3, 8), (2, 1, 3)), draw=draws(special, integers(-2, 8, DType.I32)), note="padding, NaN and infinity"),
            Sample(((2, 0, 8), (0,)), draw=draws(normal, integers(0, 8, DType.I64)), note="no tokens, no indices"),
            Sample(((3, 1, 1), (4,)), draw=draws(normal, integers(-1, 1, DType.I64))),
            Sample(((3, 5, 1031), (500,)), draw=draws(normal, integers(0, 1031, DType.I64)), note="large"),
            Sample(((2, 4, 3, 5), (2,)), {"axis": 1}, draw=draws(normal, integers(0, 4, DType.I64)), note="NCHW"),
            Sample(((2, 4, 3, 5), (2, 1, 1, 2)), {"axis": 1}, draw=draws(normal, integers(0, 4, DType.I64))),
            Sample(((2, 4, 3, 5), (5, 2)), {"axis": 1}, draw=draws(normal, integers(0, 4, DType.I64)), note="a set per column"),
        ),
    )
)
