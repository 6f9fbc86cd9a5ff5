"""The op ``rotary``: rotary position embedding of queries or keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from actgraph.errors import VerifyError
from actgraph.ops import layout
from actgraph.ops.registry import Attribute, Attributes, OpDef, Operand, Sample, Trait, register
from actgraph.ops.shapes import Dim, TensorType

if TYPE_CHECKING:
    import torch

    from actgraph.ops.body import BodyBuilder, BodyValue

_DOC = """
Rotary position embedding: ``y = x * cos + rotate(x) * sin`` over the first ``rotary_dim`` features of each head.

``x`` [batch, heads, seq, head]; ``cos`` and ``sin`` [batch or 1, seq, rotary_dim], of full width, as transformers makes
them. ``style`` says what ``rotate`` is: "half" gives ``(-x2, x1)`` of the two halves ``(x1, x2)`` (GPT-NeoX, Llama);
"interleaved" gives ``(-x1, x0, -x3, x2, ..)`` of neighbours (GPT-J, Cohere). Features from ``rotary_dim`` on (0: there are
none) pass bit for bit. float16 and bfloat16 are computed in float32 and rounded once; NaN and infinity follow IEEE
arithmetic.

Source: Su et al., *RoFormer*, 2021.
"""


def _infer(types: Sequence[TensorType | None], attributes: Attributes) -> list[TensorType]:
    x, cos, sin = types
    assert x is not None and cos is not None and sin is not None
    width = attributes["rotary_dim"]
    if x.shape is not None and len(x.shape) != 4:
        raise VerifyError(f"actgraph.rotary: x {x} must be [batch, heads, seq, head]")
    head = x.shape[3] if x.shape is not None else None
    if width < 0 or width % 2 or (isinstance(head, int) and (width > head or (not width and head % 2))):
        raise VerifyError(f"actgraph.rotary: rotary_dim {width} is no even part of the head size {head}")
    turned: Dim = width or head
    for name, table in (("cos", cos), ("sin", sin)):
        if table.shape is None:
            continue
        if len(table.shape) != 3:
            raise VerifyError(f"actgraph.rotary: {name} {table} must be [batch or 1, seq, rotary_dim]")
        if x.shape is not None:
            layout.check_into("rotary", name, table.shape, (x.shape[0], x.shape[2], turned))
        if isinstance(table.shape[2], int) and isinstance(turned, int) and table.shape[2] != turned:
            raise VerifyError(f"actgraph.rotary: {name} {table} must have {turned} features")
    return [x]


def _rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, style: str = "half", rotary_dim: int = 0) -> torch.Tensor:
    import torch

    h = layout.torch_compute(x)
    width = rotary_dim or x.shape[-1]
    turned = h.narrow(-1, 0, width)
    if style == "half":
        first, second = turned.chunk(2, -1)
        rotated = torch.cat([-second, first], -1)
    else:
        pairs = turned.reshape((*turned.shape[:-1], width // 2, 2))
        rotated = torch.stack([-pairs[..., 1], pairs[..., 0]], -1).flatten(-2)
    y = (turned * cos.unsqueeze(1).to(h.dtype) + rotated * sin.unsqueeze(1).to(h.dtype)).to(x.dtype)
    return torch.cat([y, x.narrow(-1, width, x.shape[-1] - width)], -1) if rotary_dim else y


def _body(b: BodyBuilder, operands: Sequence[BodyValue | None], attributes: Attributes) -> list[BodyValue]:
    x, cos, sin = operands
    assert x is not None and cos is not None and sin is not None
    width = attributes["rotary_dim"]
    source = b.slice(x, b.ints([0]), b.ints([width]), 3) if width else x
    h = b.up(source)
    if attributes["style"] == "half":
        first, second = _halves(b, h, 3)
        rotated = b.concat([b.op("Neg", second), first], axis=3)
    else:
        pairs = layout.body_groups(b, h, 3, 2)
        first, second = _halves(b, pairs, 4)
        rotated = b.reshape(b.concat([b.op("Neg", second), first], axis=4), b.shape(h), 4, allowzero=True)
    angle_cos, angle_sin = (b.unsqueeze(b.cast(table, h.dtype), [1]) for table in (cos, sin))
    y = b.cast(h * angle_cos + rotated * angle_sin, x.dtype)
    if not width:
        return [y]
    rest = b.slice(x, b.ints([width]), b.size(x, 3), 3)
    return [b.concat([y, rest], axis=3)]


def _halves(b: BodyBuilder, x: BodyValue, axis: int) -> list[BodyValue]:
    attributes = {"axis": axis, **({"num_outputs": 2} if b.opset >= 18 else {})}
    return b.multi("Split", x, dtypes=[None, None], ranks=[None, None], attributes=attributes)


ROTARY = register(
    OpDef(
        name="rotary",
        doc=_DOC,
        inputs=(
            Operand("x", "[batch, heads, seq, head]"),
            Operand("cos", "cosines of the angles, [batch or 1, seq, rotary_dim]"),
            Operand("sin", "sines of the angles, [batch or 1, seq, rotary_dim]"),
        ),
        outputs=("y",),
        infer=_infer,
        reference=_rotary,
        body=_body,
        attributes=(
            Attribute("style", "str", "which features are turned together", default="half", choices=("half", "interleaved")),
            Attribute("rotary_dim", "int", "how many features are turned; 0: all", default=0),
        ),
        traits=frozenset({Trait.PER_TOKEN}),
        min_opset=14,
        samples=(
            Sample(((2, 3, 4, 8), (2, 4, 8), (2, 4, 8))),
            Sample(((2, 3, 4, 8), (1, 4, 8), (1, 4, 8)), {"style": "interleaved"}),
            Sample(((2, 3, 4, 10), (1, 4, 6), (1, 4, 6)), {"rotary_dim": 6}, note="a part of each head"),
            Sample(((1, 2, 3, 10), (1, 3, 4), (1, 3, 4)), {"rotary_dim": 4, "style": "interleaved"}),
            Sample(((2, 3, 0, 8), (1, 0, 8), (1, 0, 8)), note="no tokens"),
            Sample(((2, 3, 0, 8), (1, 0, 8), (1, 0, 8)), {"style": "interleaved"}, note="no tokens"),
            Sample(((1, 1, 1, 2), (1, 1, 2), (1, 1, 2)), note="one pair"),
            Sample(((2, 5, 33, 64), (2, 33, 64), (2, 33, 64)), note="large"),
        ),
    )
)
