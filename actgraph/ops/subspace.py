"""Ops that edit the part of an activation that lies in a small subspace: low-rank maps and rotation to an angle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from actgraph.errors import VerifyError
from actgraph.ops import layout
from actgraph.ops.drawing import boolean, draws, fraction, normal, orthonormal, zeros
from actgraph.ops.dtypes import DType
from actgraph.ops.registry import Attribute, Attributes, OpDef, Operand, Sample, Trait, register, single
from actgraph.ops.shapes import TensorType

if TYPE_CHECKING:
    import torch

    from actgraph.ops.body import BodyBuilder, BodyValue


# --- lowrank_map ------------------------------------------------------------------------------------------------------------

_LOWRANK_DOC = """
Edit the part of ``x`` that lies in a small subspace: ``y = x + ((x basis) matrix) basis^T``, per token.

With an orthonormal ``basis`` [channels, r]: ``matrix = -I`` projects the directions out (ablation), ``s * I`` scales
their part by 1 + s, ``-2 I`` reflects, and ``(R - I)^T`` with a 2 x 2 rotation ``R`` turns the plane (row vectors). Costs
2 r multiplications per channel; never build the channels x channels matrix. A ``matrix`` with axes before its own two holds
one for each token: ``[batch, 1, r, r]`` one for each row of ``x`` [batch, seq, channels].

A mask scales the change: false or 0 gives ``x`` bit for bit, true or 1 the edit. NaN and infinity spread over the
channels of their token. float16 and bfloat16 are computed in float32 and rounded once.

Sources: Arditi et al., *Refusal in Language Models Is Mediated by a Single Direction*, 2024 (ablation); *Selective
Steering*, 2026 (rotation).
"""


def _lowrank_infer(types: Sequence[TensorType | None], attributes: Attributes) -> list[TensorType]:
    x, basis, matrix, mask = types
    assert x is not None and basis is not None and matrix is not None
    layout.check_basis("lowrank_map", x, basis, attributes["axis"])
    if matrix.shape is not None and basis.shape is not None:
        rank, own = basis.shape[1], matrix.shape[-2:]
        if len(own) != 2 or any(isinstance(d, int) and isinstance(rank, int) and d != rank for d in own):
            raise VerifyError(f"actgraph.lowrank_map: matrix {matrix} does not fit basis {basis}")
        tokens = {"matrix": TensorType(matrix.dtype, matrix.shape[:-2])}
        layout.check_operands("lowrank_map", x, attributes["axis"], tokens=tokens)
    layout.check_operands("lowrank_map", x, attributes["axis"], tokens={"mask": mask})
    return [x]


def _lowrank(
    x: torch.Tensor, basis: torch.Tensor, matrix: torch.Tensor, mask: torch.Tensor | None = None, *, axis: int = -1
) -> torch.Tensor:
    axis = layout.from_end(axis, x.dim())
    h = layout.torch_compute(x)
    base = basis.to(h.dtype)
    part, inner = h.movedim(axis, -1) @ base, matrix.to(h.dtype)
    part = part @ inner if inner.dim() == 2 else (part.unsqueeze(-2) @ inner).squeeze(-2)
    delta = (part @ base.transpose(0, 1)).movedim(-1, axis)
    weight = None if mask is None else layout.torch_tokens(mask.to(h.dtype), axis)
    return layout.torch_edit(h, delta, weight).to(x.dtype)


def _lowrank_body(b: BodyBuilder, operands: Sequence[BodyValue | None], attributes: Attributes) -> list[BodyValue]:
    x, basis, matrix, mask = operands
    assert x is not None and basis is not None and matrix is not None
    axis = layout.body_axis(b, attributes["axis"], x)
    h = b.up(x)
    base = b.cast(basis, h.dtype)
    rows, back = layout.body_to_last(b, h, axis)
    part, inner = b.op("MatMul", rows, base), b.cast(matrix, h.dtype)
    if b.rank_of(matrix) == 2:
        part = b.op("MatMul", part, inner)
    else:
        one = b.op("MatMul", b.unsqueeze(part, [-2]), inner)
        part = b.op("Squeeze", one, b.ints([-2]), rank=b.rank_of(one) - 1)
    delta = b.op("MatMul", part, b.transpose(base, [1, 0]))
    delta = b.transpose(delta, back) if back else delta
    weight = None if mask is None else layout.body_tokens(b, b.cast(mask, h.dtype), axis)
    return [b.cast(layout.body_edit(b, h, delta, weight), x.dtype)]


register(
    OpDef(
        name="lowrank_map",
        doc=_LOWRANK_DOC,
        inputs=(
            Operand("x", "the activation"),
            Operand("basis", "[channels, r], orthonormal columns for the readings above"),
            Operand("matrix", "[r, r], what is done inside the subspace, or [..., r, r], one per token"),
            layout.MASK,
        ),
        outputs=("y",),
        infer=_lowrank_infer,
        reference=_lowrank,
        body=_lowrank_body,
        attributes=(layout.AXIS,),
        traits=frozenset({Trait.PER_TOKEN, Trait.FOLDS_AS_LINEAR_MAP}),
        min_opset=13,
        samples=(
            Sample(((4, 3, 8), (8, 2), (2, 2), None), draw=draws(normal, orthonormal, normal, None)),
            Sample(((0, 3, 8), (8, 1), (1, 1), None), draw=draws(normal, orthonormal, normal, None), note="no tokens"),
            Sample(((1, 1), (1, 1), (1, 1), None)),
            Sample(((2, 17, 259), (259, 3), (3, 3), (2, 17)), draw=draws(normal, orthonormal, normal, boolean), note="large"),
            Sample(((3, 5, 7), (7, 2), (2, 2), (1,)), draw=draws(normal, orthonormal, normal, fraction)),
            Sample(((3, 5, 7), (7, 2), (3, 1, 2, 2), (5,)), draw=draws(normal, orthonormal, normal, boolean), note="by row"),
            Sample(((2, 4, 3, 5), (4, 2), (3, 1, 2, 2), None), {"axis": 1}, draw=draws(normal, orthonormal, normal, None)),
            Sample(((2, 4, 3, 5), (4, 2), (2, 2), (2, 3, 5)), {"axis": 1}, draw=draws(normal, orthonormal, normal, boolean)),
        ),
    )
)


# --- target_angle -----------------------------------------------------------------------------------------------------------

_ANGLE_DOC = """
Turn the part of ``x`` that lies in a plane to an absolute angle, keeping its length:
``y = x + (|c| (cos a, sin a) - c) basis^T`` with ``c = x basis``, per token.

``basis`` [channels, 2] has orthonormal columns; ``angle`` is in radians, one number ([] or [1]) or one per token. Every
token ends at the same angle in the plane, so no angle is the identity (for a relative rotation, which is linear, use
``lowrank_map``). ``when = "above"`` edits only tokens whose first coordinate ``c[0]`` exceeds ``threshold``; the others,
and those outside the mask, stay bit for bit.

NaN and infinity spread over the channels of their token (a NaN coordinate is not above any threshold). float16 and
bfloat16 are computed in float32 and rounded once.

Source: *Angular Steering*, 2025 (``"above"`` with threshold 0 is its adaptive form); *Selective Steering*, 2026.
"""


def _angle_infer(types: Sequence[TensorType | None], attributes: Attributes) -> list[TensorType]:
    x, basis, angle, mask = types
    assert x is not None and basis is not None
    layout.check_basis("target_angle", x, basis, attributes["axis"])
    if basis.shape is not None and basis.shape[1] not in (2, None) and isinstance(basis.shape[1], int):
        raise VerifyError(f"actgraph.target_angle: basis {basis} must have 2 columns")
    layout.check_operands("target_angle", x, attributes["axis"], tokens={"angle": angle, "mask": mask})
    return [x]


def _angle(
    x: torch.Tensor,
    basis: torch.Tensor,
    angle: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    when: str = "always",
    threshold: float = 0.0,
    axis: int = -1,
) -> torch.Tensor:
    import torch

    axis = layout.from_end(axis, x.dim())
    h = layout.torch_compute(x)
    base = basis.to(h.dtype)
    c = h.movedim(axis, -1) @ base
    a = angle.to(h.dtype).unsqueeze(-1)
    length = torch.linalg.vector_norm(c, dim=-1, keepdim=True)
    target = length * torch.cat([torch.cos(a), torch.sin(a)], -1)
    delta = ((target - c) @ base.transpose(0, 1)).movedim(-1, axis)
    weight = None if mask is None else layout.torch_tokens(mask.to(h.dtype), axis)
    if when == "above":
        above = (c.select(-1, 0) > single(threshold)).unsqueeze(axis).to(h.dtype)
        weight = above if weight is None else above * weight
    return layout.torch_edit(h, delta, weight).to(x.dtype)


def _angle_body(b: BodyBuilder, operands: Sequence[BodyValue | None], attributes: Attributes) -> list[BodyValue]:
    x, basis, angle, mask = operands
    assert x is not None and basis is not None and angle is not None
    axis = layout.body_axis(b, attributes["axis"], x)
    h = b.up(x)
    base = b.cast(basis, h.dtype)
    rows, back = layout.body_to_last(b, h, axis)
    c = b.op("MatMul", rows, base)
    a = b.unsqueeze(b.cast(angle, h.dtype), [-1])
    length = b.op("Sqrt", b.reduce("ReduceSum", c * c, [-1]))
    target = length * b.concat([b.op("Cos", a), b.op("Sin", a)], axis=-1)
    delta = b.op("MatMul", target - c, b.transpose(base, [1, 0]))
    delta = b.transpose(delta, back) if back else delta
    weight = None if mask is None else layout.body_tokens(b, b.cast(mask, h.dtype), axis)
    if attributes["when"] == "above":
        first = b.op("Gather", c, b.const(0, DType.I64), rank=b.rank_of(c) - 1, attributes={"axis": -1})
        above = b.cast(b.unsqueeze(first > b.attribute("threshold", h.dtype), [axis]), h.dtype)
        weight = above if weight is None else above * weight
    return [b.cast(layout.body_edit(b, h, delta, weight), x.dtype)]


register(
    OpDef(
        name="target_angle",
        doc=_ANGLE_DOC,
        inputs=(
            Operand("x", "the activation"),
            Operand("basis", "[channels, 2], orthonormal columns spanning the plane"),
            Operand("angle", "radians: [], [1], or one per token"),
            layout.MASK,
        ),
        outputs=("y",),
        infer=_angle_infer,
        reference=_angle,
        body=_angle_body,
        attributes=(
            Attribute("when", "str", "which tokens are turned", default="always", choices=("always", "above")),
            Attribute("threshold", "float", "what the first coordinate must exceed", default=0.0, structural=False),
            layout.AXIS,
        ),
        traits=frozenset({Trait.PER_TOKEN}),
        min_opset=13,
        samples=(
            Sample(((2, 3, 8), (8, 2), (), None), draw=draws(normal, orthonormal, normal, None)),
            Sample(((2, 0, 8), (8, 2), (1,), None), draw=draws(normal, orthonormal, normal, None), note="no tokens"),
            Sample(((2, 17, 259), (259, 2), (2, 17), (2, 17)), draw=draws(normal, orthonormal, normal, boolean), note="large"),
            Sample(
                ((3, 5, 7), (7, 2), (1,), None),
                {"when": "above", "threshold": 0.25},
                draw=draws(normal, orthonormal, normal, None),
            ),
            Sample(((3, 5, 7), (7, 2), (1,), (5,)), draw=draws(zeros, orthonormal, normal, fraction), note="nothing to turn"),
            Sample(
                ((2, 4, 3, 5), (4, 2), (2, 3, 5), (5,)),
                {"axis": 1, "when": "above"},
                draw=draws(normal, orthonormal, normal, boolean),
            ),
        ),
    )
)
