"""Rows of one expert among the rows of all experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from actgraph.errors import VerifyError
from actgraph.ops import layout
from actgraph.ops.drawing import draws, integers, normal, special
from actgraph.ops.dtypes import DType
from actgraph.ops.registry import Attribute, Attributes, OpDef, Operand, Sample, Trait, register
from actgraph.ops.shapes import TensorType

if TYPE_CHECKING:
    import torch

    from actgraph.ops.body import BodyBuilder, BodyValue

_DOC = """
The rows of ``x`` whose index is ``expert``, and the rows of ``other`` (zeros without it) elsewhere:
``y[i] = x[i] if index[i] == expert else other[i]``.

``x`` and ``other`` [rows, features]; ``index`` [rows], such as the expert that a mixture-of-experts block sends each row to.
Without ``other`` it cuts one expert's activations out of those of all experts; with it, it puts edited ones back. Selected
rows pass with their values (the sign of a zero is free). The gradient flows to the operand that was selected.

Source: experts of a sparsely gated mixture, *Outrageously Large Neural Networks*, 2017.
"""


def _infer(types: Sequence[TensorType | None], attributes: Attributes) -> list[TensorType]:
    x, index, other = types
    assert x is not None and index is not None
    if x.shape is not None and len(x.shape) != 2:
        raise VerifyError(f"actgraph.select_rows: x {x} must have rank 2")
    if x.shape is not None and index.shape is not None:
        layout.check_into("select_rows", "index (one per row)", index.shape, x.shape[:1])
    if other is not None:
        layout.check_into("select_rows", "other", other.shape, x.shape)
    return [x]


def _reference(x: torch.Tensor, index: torch.Tensor, other: torch.Tensor | None = None, *, expert: int) -> torch.Tensor:
    import torch

    mine = (index == expert).unsqueeze(-1)
    return torch.where(mine, x, torch.zeros((), dtype=x.dtype, device=x.device) if other is None else other)


def _body(b: BodyBuilder, operands: Sequence[BodyValue | None], attributes: Attributes) -> list[BodyValue]:
    x, index, other = operands
    assert x is not None and index is not None
    mine = b.unsqueeze(index.equal(b.attribute("expert", index.dtype)), [1])
    h = b.up(x)
    return [b.cast(b.where(mine, h, 0.0 if other is None else b.up(other)), x.dtype)]


register(
    OpDef(
        name="select_rows",
        doc=_DOC,
        inputs=(
            Operand("x", "rows that are taken"),
            Operand("index", "one integer per row", dtypes=frozenset({DType.I64, DType.I32})),
            Operand("other", "rows that stand elsewhere; zeros without it", same_as="x", optional=True),
        ),
        outputs=("y",),
        infer=_infer,
        reference=_reference,
        body=_body,
        attributes=(Attribute("expert", "int", "the index whose rows are taken", structural=False),),
        traits=frozenset({Trait.PER_TOKEN}),
        min_opset=13,
        exact="values",
        samples=(
            Sample(((6, 4), (6,), None), {"expert": 1}, draw=draws(normal, integers(0, 3, DType.I64), None)),
            Sample(((7, 5), (7,), (7, 5)), {"expert": 2}, draw=draws(special, integers(0, 3, DType.I32), special), note="NaN"),
            Sample(((3, 4), (3,), None), {"expert": 9}, draw=draws(normal, integers(0, 3, DType.I64), None), note="no row"),
            Sample(((0, 4), (0,), (0, 4)), {"expert": 0}, draw=draws(normal, integers(0, 3, DType.I64), normal)),
            Sample(((1, 1), (1,), None), {"expert": 0}, draw=draws(normal, integers(0, 1, DType.I64), None)),
            Sample(((257, 65), (257,), (257, 65)), {"expert": 3}, draw=draws(normal, integers(0, 8, DType.I64), normal)),
        ),
    )
)  # fmt: skip
