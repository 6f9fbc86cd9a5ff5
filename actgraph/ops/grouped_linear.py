"""The grouped linear of mixture-of-experts blocks: every row meets the weight of its own expert."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from actgraph.errors import UnsupportedError, VerifyError
from actgraph.ops import layout
from actgraph.ops.drawing import draws, integers, normal, offsets
from actgraph.ops.dtypes import DType
from actgraph.ops.registry import Attributes, OpDef, Operand, Sample, Trait, register
from actgraph.ops.shapes import TensorType

if TYPE_CHECKING:
    import torch

    from actgraph.ops.body import BodyBuilder, BodyValue

_GROUPED_DOC = """
Rows sorted by expert, each times the weight of its expert: ``y[i] = x[i] weights[e]^T + bias[e]`` for
``offsets[e-1] <= i < offsets[e]``.

``x`` [rows, in]; ``weights`` [experts, out, in] (the layout of ``linear``); ``offsets`` [experts], the row after the last
one of each expert, ascending (a running sum of counts); ``bias`` [experts, out]. An expert may have no rows. Rows past
the last offset give zeros. This is torch's ``grouped_mm(x, weights^T, offs)``, the form in which transformers exports its
experts. float16 and bfloat16 are computed in float32 and rounded once.

The ONNX body splits the rows at the offsets and multiplies each piece by its own weight, so it does the work of the
chosen experts only, for any number of rows; it needs the number of experts to be known. In torch the reference is
data-independent (every expert sees every row and a mask selects), which export and decomposition need; eager execution
cuts the rows instead.
"""


def _grouped_infer(types: Sequence[TensorType | None], attributes: Attributes) -> list[TensorType]:
    x, weights, offsets, bias = types
    assert x is not None and weights is not None and offsets is not None
    for name, operand, rank in (("x", x, 2), ("weights", weights, 3), ("offsets", offsets, 1), ("bias", bias, 2)):
        if operand is not None and operand.shape is not None and len(operand.shape) != rank:
            raise VerifyError(f"actgraph.grouped_linear: {name} {operand} must have rank {rank}")
    if weights.shape is None:
        return [TensorType(x.dtype, None if x.shape is None else (x.shape[0], None))]
    experts, out, inner = weights.shape
    if x.shape is not None:
        layout.check_into("grouped_linear", "the last axis of weights", (inner,), (x.shape[1],))
    layout.check_into("grouped_linear", "offsets (one per expert)", offsets.shape, (experts,))
    if bias is not None:
        layout.check_into("grouped_linear", "bias", bias.shape, (experts, out))
    return [TensorType(x.dtype, (None if x.shape is None else x.shape[0], out))]


def _grouped(x: torch.Tensor, weights: torch.Tensor, offsets: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    import torch

    h, w = layout.torch_compute(x), weights.to(layout.torch_compute(x).dtype)
    rows = torch.arange(x.shape[0], device=x.device)
    y = torch.zeros((x.shape[0], weights.shape[1]), dtype=h.dtype, device=x.device)
    for expert in range(weights.shape[0]):
        mine = rows < offsets[expert]
        if expert:
            mine = mine & (rows >= offsets[expert - 1])
        part = h @ w[expert].transpose(0, 1)
        if bias is not None:
            part = part + bias[expert].to(h.dtype)
        y = torch.where(mine.unsqueeze(1), part, y)
    return y.to(x.dtype)


def _grouped_eager(
    x: torch.Tensor, weights: torch.Tensor, offsets: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    import torch

    compute = layout.torch_compute(x[:0]).dtype
    y = torch.zeros((x.shape[0], weights.shape[1]), dtype=x.dtype, device=x.device)
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        if end > start:
            part = x[start:end].to(compute) @ weights[expert].to(compute).transpose(0, 1)
            y[start:end] = part if bias is None else part + bias[expert].to(compute)
            start = end
    return y


def _grouped_body(b: BodyBuilder, operands: Sequence[BodyValue | None], attributes: Attributes) -> list[BodyValue]:
    x, weights, offsets, bias = operands
    assert x is not None and weights is not None and offsets is not None
    experts = weights.shape[0] if weights.shape is not None else None
    if not isinstance(experts, int):
        raise UnsupportedError(
            "the body of actgraph.grouped_linear needs the number of experts", "give the weights a static first axis"
        )
    b.specialise(f"experts_{experts}")
    h, w = b.up(x), b.up(weights)
    ends = b.cast(offsets, DType.I64)
    bounds = b.concat([b.ints([0]), ends, b.size(x, 0)])
    starts = b.slice(bounds, b.ints([0]), b.ints([experts + 1]), 0)
    counts = b.slice(bounds, b.ints([1]), b.ints([experts + 2]), 0) - starts
    pieces = b.multi("Split", h, counts, dtypes=[h.dtype] * (experts + 1), ranks=[2] * (experts + 1), attributes={"axis": 0})
    parts = []
    for expert in range(experts):
        index = b.const(expert, DType.I64)
        weight = b.op("Gather", w, index, rank=2, attributes={"axis": 0})
        part = b.op("MatMul", pieces[expert], b.transpose(weight, [1, 0]))
        if bias is not None:
            part = part + b.op("Gather", b.up(bias), index, rank=1, attributes={"axis": 0})
        parts.append(part)
    rest = b.concat([b.slice(counts, b.ints([experts]), b.ints([experts + 1]), 0), b.size(w, 1)])
    parts.append(b.fill(rest, 0.0, h.dtype, 2))
    # Split with counts that are computed loses the rank in shape inference; this costs nothing and gives it back
    y = b.reshape(b.concat(parts, axis=0), b.concat([b.size(x, 0), b.size(w, 1)]), 2, allowzero=True)
    return [b.cast(y, x.dtype)]


register(
    OpDef(
        name="grouped_linear",
        doc=_GROUPED_DOC,
        inputs=(
            Operand("x", "[rows, in], sorted by expert"),
            Operand("weights", "[experts, out, in]"),
            Operand("offsets", "[experts], where each expert's rows end", dtypes=frozenset({DType.I32, DType.I64})),
            Operand("bias", "[experts, out]", optional=True),
        ),
        outputs=("y",),
        infer=_grouped_infer,
        reference=_grouped,
        eager=_grouped_eager,
        body=_grouped_body,
        traits=frozenset({Trait.PER_TOKEN}),
        min_opset=13,
        samples=(
            Sample(((10, 8), (4, 6, 8), (4,), None), draw=draws(normal, normal, offsets(10), None)),
            Sample(((10, 8), (4, 6, 8), (4,), (4, 6)), draw=draws(normal, normal, offsets(10, DType.I64), normal)),
            Sample(
                ((10, 8), (3, 5, 8), (3,), None),
                draw=draws(normal, normal, integers(7, 8, DType.I32), None),
                note="rest is zero",
            ),
            Sample(
                ((0, 8), (3, 5, 8), (3,), (3, 5)), draw=draws(normal, normal, integers(0, 1, DType.I32), normal), note="no rows"
            ),
            Sample(((1, 1), (1, 1, 1), (1,), None), draw=draws(normal, normal, offsets(1), None)),
            Sample(((129, 67), (8, 65, 67), (8,), None), draw=draws(normal, normal, offsets(129), None), note="large"),
        ),
    )
)
