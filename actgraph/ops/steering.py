"""Ops of activation steering: shift along a vector, low-rank maps, rotation to an angle, channel scaling.

The set that the steering literature reduces to. Everything in it has an exact neutral setting, so that a steered model
with the strength at 0, or a token outside the mask, is the unsteered one bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from actgraph.errors import VerifyError
from actgraph.ops import layout
from actgraph.ops.dtypes import COMPUTE_FLOATS, DType
from actgraph.ops.registry import Attribute, Attributes, OpDef, Operand, Sample, Trait, register, single
from actgraph.ops.shapes import TensorType

if TYPE_CHECKING:
    import torch

    from actgraph.ops.body import BodyBuilder, BodyValue

_AXIS = Attribute("axis", "int", "channel axis of x: -1 for [batch, seq, channels], 1 for NCHW", default=-1)
_MASK = Operand(
    "mask",
    "one value per token (shape of x without its channel axis, or broadcastable to it); false or 0 leaves the token "
    "bit for bit as it is",
    dtypes=COMPUTE_FLOATS | {DType.BOOL},
    optional=True,
)
_TINY = 1e-8  # below this a norm counts as zero


# --- shift ------------------------------------------------------------------------------------------------------------------

_SHIFT_DOC = """
Add a vector: ``y = x + c * vector`` with ``c = scale * strength * mask`` per token.

``norm = "none"``: as above. ``"restore"``: ``y`` is then rescaled, per token, to the L2 norm of ``x``.
``"relative"``: ``y = x + c * (|x| / |vector|) * vector``, so that the shift is a fraction of the norm of ``x``. Norms are
taken over ``norm_axes`` (default: the channel axis); a norm below 1e-8 counts as 1e-8.

Exactness: where ``c`` is 0 the result is ``x`` bit for bit (also for -0.0, infinities and vectors with NaN): the addend
becomes -0.0, the neutral element of IEEE addition. NaN and infinity in ``x`` otherwise follow IEEE addition.
float16 and bfloat16 are computed in float32 and rounded once.

Sources: Turner et al., *Activation Addition*, 2023; Rimsky et al., *Contrastive Activation Addition*, 2023; norm
preserving: *Do LLMs Know What Is Private Internally?*, 2026; relative norm: *Physics Steering*, 2025.
"""


def _shift_infer(types: Sequence[TensorType | None], attributes: Attributes) -> list[TensorType]:
    x, vector, strength, mask = types
    assert x is not None
    axis = attributes["axis"]
    assert isinstance(axis, int)
    layout.check_channels("shift", "vector", x, vector, axis)
    layout.check_tokens("shift", "strength", x, strength, axis)
    layout.check_tokens("shift", "mask", x, mask, axis)
    return [x]


def _shift(
    x: torch.Tensor,
    vector: torch.Tensor,
    strength: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    *,
    scale: float = 1.0,
    norm: str = "none",
    norm_axes: Sequence[int] = (),
    axis: int = -1,
) -> torch.Tensor:
    import torch

    axis = layout.from_end(axis, x.dim())
    axes = tuple(norm_axes) or (axis,)
    h = layout.torch_compute(x)
    v = layout.torch_channels(vector.to(h.dtype), axis)
    c = torch.full((), single(scale), dtype=h.dtype, device=x.device)
    for factor in (strength, mask):
        if factor is not None:
            c = c * layout.torch_tokens(factor.to(h.dtype), axis)
    neutral = torch.full((), -0.0, dtype=h.dtype, device=x.device)
    if norm == "relative":
        size = torch.sqrt(torch.sum(v * v, axes, keepdim=True)).clamp_min(_TINY)
        delta = c * (torch.sqrt(torch.sum(h * h, axes, keepdim=True)) / size) * v
    else:
        delta = c * v
    y = h + torch.where(c != 0, delta, neutral)
    if norm == "restore":
        before = torch.sqrt(torch.sum(h * h, axes, keepdim=True))
        after = torch.sqrt(torch.sum(y * y, axes, keepdim=True)).clamp_min(_TINY)
        y = torch.where(c != 0, y * (before / after), h)
    return y.to(x.dtype)


def _norm(b: BodyBuilder, h: BodyValue, axes: Sequence[int]) -> BodyValue:
    return b.op("Sqrt", b.reduce("ReduceSum", h * h, axes))


def _shift_body(b: BodyBuilder, operands: Sequence[BodyValue | None], attributes: Attributes) -> list[BodyValue]:
    x, vector, strength, mask = operands
    assert x is not None and vector is not None
    axis = layout.body_axis(b, attributes["axis"], x)
    axes = tuple(attributes["norm_axes"]) or (axis,)
    h = b.up(x)
    v = layout.body_channels(b, b.cast(vector, h.dtype), axis)
    c = b.attribute("scale", h.dtype)
    for factor in (strength, mask):
        if factor is not None:
            c = c * layout.body_tokens(b, b.cast(factor, h.dtype), axis)
    off = c.equal(0)
    if attributes["norm"] == "relative":
        size = _at_least(b, _norm(b, v, axes), _TINY)
        delta = c * (_norm(b, h, axes) / size) * v
    else:
        delta = c * v
    y = h + b.where(off, -0.0, delta)
    if attributes["norm"] == "restore":
        after = _at_least(b, _norm(b, y, axes), _TINY)
        y = b.where(off, h, y * (_norm(b, h, axes) / after))
    return [b.cast(y, x.dtype)]


def _at_least(b: BodyBuilder, x: BodyValue, low: float) -> BodyValue:
    return b.where(x < low, low, x)


register(
    OpDef(
        name="shift",
        doc=_SHIFT_DOC,
        inputs=(
            Operand("x", "the activation"),
            Operand("vector", "what is added: [channels], or any shape that broadcasts to x"),
            Operand("strength", "a run-time factor per token or of shape [1]", optional=True),
            _MASK,
        ),
        outputs=("y",),
        infer=_shift_infer,
        reference=_shift,
        body=_shift_body,
        attributes=(
            Attribute("scale", "float", "factor of the vector", default=1.0, structural=False),
            Attribute("norm", "str", "what happens to the norm of x", default="none", choices=("none", "restore", "relative")),
            Attribute("norm_axes", "ints", "axes of the norms, counted from the end; empty: the channel axis", default=()),
            _AXIS,
        ),
        traits=frozenset({Trait.PER_TOKEN, Trait.FOLDS_AS_BIAS}),
        min_opset=13,
    )
)


# --- lowrank_map ------------------------------------------------------------------------------------------------------------

_LOWRANK_DOC = """
Edit the part of ``x`` that lies in a small subspace: ``y = x + ((x basis) matrix) basis^T``, per token.

With an orthonormal ``basis`` [channels, r]: ``matrix = -I`` projects the directions out (ablation), ``s * I`` scales
their part by 1 + s, ``-2 I`` reflects, and ``(R - I)^T`` with a 2 x 2 rotation ``R`` turns the plane (row vectors). Costs
2 r multiplications per channel; never build the channels x channels matrix.

A mask blends: 0 or false gives ``x`` bit for bit, 1 or true the edit, a fraction interpolates. NaN and infinity spread
over the channels of their token. float16 and bfloat16 are computed in float32 and rounded once.

Sources: Arditi et al., *Refusal in Language Models Is Mediated by a Single Direction*, 2024 (ablation); *Selective
Steering*, 2026 (rotation).
"""


def _lowrank_infer(types: Sequence[TensorType | None], attributes: Attributes) -> list[TensorType]:
    x, basis, matrix, mask = types
    assert x is not None and basis is not None and matrix is not None
    _check_basis("lowrank_map", x, basis, attributes["axis"])
    if matrix.shape is not None and basis.shape is not None:
        rank = basis.shape[1]
        if len(matrix.shape) != 2 or any(isinstance(d, int) and isinstance(rank, int) and d != rank for d in matrix.shape):
            raise VerifyError(f"actgraph.lowrank_map: matrix {matrix} does not fit basis {basis}")
    layout.check_tokens("lowrank_map", "mask", x, mask, attributes["axis"])
    return [x]


def _check_basis(op: str, x: TensorType, basis: TensorType, axis: int) -> None:
    if basis.shape is None or x.shape is None:
        return
    channels = x.shape[layout.from_end(axis, len(x.shape))]
    if len(basis.shape) != 2 or (isinstance(channels, int) and isinstance(basis.shape[0], int) and channels != basis.shape[0]):
        raise VerifyError(f"actgraph.{op}: basis {basis} must be [channels, r] with the {channels} channels of x")


def _lowrank(
    x: torch.Tensor, basis: torch.Tensor, matrix: torch.Tensor, mask: torch.Tensor | None = None, *, axis: int = -1
) -> torch.Tensor:
    axis = layout.from_end(axis, x.dim())
    h = layout.torch_compute(x)
    base = basis.to(h.dtype)
    part = (h.movedim(axis, -1) @ base) @ matrix.to(h.dtype)
    edited = h + (part @ base.transpose(0, 1)).movedim(-1, axis)
    return layout.torch_blend(h, edited, mask, axis).to(x.dtype)


def _to_last(b: BodyBuilder, h: BodyValue, axis: int) -> tuple[BodyValue, list[int]]:
    """``h`` with the channel axis last, and the permutation that undoes it."""
    if axis == -1:
        return h, []
    rank = b.rank_of(h)
    perm = [i for i in range(rank) if i != rank + axis] + [rank + axis]
    inverse = [perm.index(i) for i in range(rank)]
    return b.transpose(h, perm), inverse


def _lowrank_body(b: BodyBuilder, operands: Sequence[BodyValue | None], attributes: Attributes) -> list[BodyValue]:
    x, basis, matrix, mask = operands
    assert x is not None and basis is not None and matrix is not None
    axis = layout.body_axis(b, attributes["axis"], x)
    h = b.up(x)
    base = b.cast(basis, h.dtype)
    rows, back = _to_last(b, h, axis)
    part = b.op("MatMul", b.op("MatMul", rows, base), b.cast(matrix, h.dtype))
    delta = b.op("MatMul", part, b.transpose(base, [1, 0]))
    edited = h + (b.transpose(delta, back) if back else delta)
    return [b.cast(layout.body_blend(b, h, edited, mask, axis), x.dtype)]


register(
    OpDef(
        name="lowrank_map",
        doc=_LOWRANK_DOC,
        inputs=(
            Operand("x", "the activation"),
            Operand("basis", "[channels, r], orthonormal columns for the readings above"),
            Operand("matrix", "[r, r], what is done inside the subspace"),
            _MASK,
        ),
        outputs=("y",),
        infer=_lowrank_infer,
        reference=_lowrank,
        body=_lowrank_body,
        attributes=(_AXIS,),
        traits=frozenset({Trait.PER_TOKEN, Trait.FOLDS_AS_LINEAR_MAP}),
        min_opset=13,
    )
)
