"""Ops of activation steering: shift along a vector, scale channels. Edits inside a subspace are in ``subspace``.

The set that the steering literature reduces to. Each op has an exact neutral setting, so that a model with the strength
at 0, or a token outside the mask, is the unsteered one bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from actgraph.ops import layout
from actgraph.ops.drawing import boolean, draws, fraction, integers, nan_vector, normal, special, zeros
from actgraph.ops.dtypes import DType
from actgraph.ops.registry import Attribute, Attributes, OpDef, Operand, Sample, Trait, register, single
from actgraph.ops.shapes import TensorType

if TYPE_CHECKING:
    import torch

    from actgraph.ops.body import BodyBuilder, BodyValue

_TINY = 1e-8  # below this a norm counts as zero


# --- shift ------------------------------------------------------------------------------------------------------------------

_SHIFT_DOC = """
Add a vector: ``y = x + c * vector`` with ``c = scale * strength * mask`` per token.

``norm = "none"``: as above. ``"restore"``: ``y`` is then rescaled, per token, to the L2 norm of ``x``.
``"relative"``: ``y = x + c * (|x| / |vector|) * vector``, so that the shift is a fraction of the norm of ``x``. Norms are
taken over ``norm_axes`` (default: the channel axis); a norm below 1e-8 counts as 1e-8.

Exactness: where ``c`` is 0 the result is ``x`` bit for bit (also for -0.0, infinities and vectors with NaN). NaN and
infinity in ``x`` otherwise follow IEEE addition.
float16 and bfloat16 are computed in float32 and rounded once.

Sources: Turner et al., *Activation Addition*, 2023; Rimsky et al., *Contrastive Activation Addition*, 2023; norm
preserving: *Do LLMs Know What Is Private Internally?*, 2026; relative norm: *Physics Steering*, 2025.
"""


def _shift_infer(types: Sequence[TensorType | None], attributes: Attributes) -> list[TensorType]:
    x, vector, strength, mask = types
    assert x is not None
    tokens = {"strength": strength, "mask": mask}
    layout.check_operands("shift", x, attributes["axis"], channels={"vector": vector}, tokens=tokens)
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
    c: torch.Tensor | float = single(scale)
    for factor in (strength, mask):
        if factor is not None:
            c = layout.torch_tokens(factor.to(h.dtype), axis) * c
    if norm == "relative":
        v = _torch_norm(h, axes) / _torch_norm(v, axes).clamp_min(_TINY) * v
    y = layout.torch_edit(h, v, c)
    if norm == "restore" and not (isinstance(c, float) and c == 0):
        ratio = _torch_norm(h, axes) / _torch_norm(y, axes).clamp_min(_TINY)
        y = y * (ratio if isinstance(c, float) else torch.where(c != 0, ratio, torch.ones_like(c)))
    return y.to(x.dtype)


def _torch_norm(h: torch.Tensor, axes: tuple[int, ...]) -> torch.Tensor:
    import torch

    result: torch.Tensor = torch.linalg.vector_norm(h, dim=axes, keepdim=True)  # its gradient at zero is zero, not NaN
    return result


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
    if attributes["norm"] == "relative":
        size = _at_least(b, _norm(b, v, axes), _TINY)
        v = (_norm(b, h, axes) / size) * v
    y = layout.body_edit(b, h, v, c)
    if attributes["norm"] == "restore":
        after = _at_least(b, _norm(b, y, axes), _TINY)
        y = y * b.where(c.equal(0), 1.0, _norm(b, h, axes) / after)
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
            layout.MASK,
        ),
        outputs=("y",),
        infer=_shift_infer,
        reference=_shift,
        body=_shift_body,
        attributes=(
            Attribute("scale", "float", "factor of the vector", default=1.0, structural=False),
            Attribute("norm", "str", "what happens to the norm of x", default="none", choices=("none", "restore", "relative")),
            Attribute("norm_axes", "ints", "axes of the norms, counted from the end; empty: the channel axis", default=()),
            layout.AXIS,
        ),
        traits=frozenset({Trait.PER_TOKEN, Trait.FOLDS_AS_BIAS}),
        min_opset=13,
        samples=(
            Sample(((2, 3, 8), (8,), None, None), {"scale": 0.5}),
            Sample(((0, 3, 8), (8,), None, (0, 3)), draw=draws(normal, normal, None, boolean), note="no tokens"),
            Sample(((1, 1, 1), (1,), None, None), {"scale": -2.0}),
            Sample(((2, 17, 259), (259,), (1,), None), {"norm": "relative", "scale": 0.1}, note="large"),
            Sample(((2, 3, 8), (8,), (2, 3), (2, 3)), draw=draws(special, normal, fraction, boolean), note="NaN and infinity"),
            Sample(((2, 3, 8), (8,), (2, 1), (3,)), draw=draws(normal, normal, normal, fraction)),
            Sample(((2, 3, 8), (8,), None, (2, 3)), {"norm": "restore"}, draw=draws(normal, normal, None, boolean)),
            Sample(((2, 3, 8), (8,), None, None), {"norm": "restore", "scale": 3.0}, draw=draws(zeros, normal, None, None)),
            Sample(((2, 4, 3, 5), (4,), None, (2, 3, 5)), {"axis": 1}, draw=draws(normal, normal, None, boolean), note="NCHW"),
            Sample(
                ((2, 4, 3, 5), (1, 4, 3, 5), None, (2, 1, 5)),
                {"axis": -3, "norm": "relative", "norm_axes": (-3, -2, -1)},
                draw=draws(normal, normal, None, fraction),
            ),
            Sample(((2, 3, 8), (), None, None), {"scale": 0.5}, note="one number for all channels"),
            Sample(
                ((2, 3, 8), (8,), None, (2, 3)), draw=draws(normal, normal, None, integers(0, 2, DType.I64)), note="i64 mask"
            ),
            Sample(((2, 3, 8), (8,), None, None), {"scale": 0.0}, draw=draws(special, nan_vector, None, None), note="off"),
        ),
    )
)


# --- channel_scale ----------------------------------------------------------------------------------------------------------

_SCALE_DOC = """
Scale channels: ``y = x * gamma``, ``gamma`` being one number per channel, one number, or anything that broadcasts to ``x``.

A mask scales the factor: false or 0 gives ``x`` bit for bit, true or 1 ``x * gamma``, a fraction m ``x * (1 + m (gamma -
1))``. ``gamma = 1`` is the
identity bit for bit; infinity times 0 is NaN, as in IEEE arithmetic. float16 and bfloat16 are computed in float32 and
rounded once.

Sources: *AUSteer*, 2026 (``gamma = 1 + alpha * beta``); *TauGate*, 2026 (gains); Liu et al., *IA3*, 2022.
"""


def _scale_infer(types: Sequence[TensorType | None], attributes: Attributes) -> list[TensorType]:
    x, gamma, mask = types
    assert x is not None
    layout.check_operands("channel_scale", x, attributes["axis"], channels={"gamma": gamma}, tokens={"mask": mask})
    return [x]


def _scale(x: torch.Tensor, gamma: torch.Tensor, mask: torch.Tensor | None = None, *, axis: int = -1) -> torch.Tensor:
    import torch

    axis = layout.from_end(axis, x.dim())
    h = layout.torch_compute(x)
    factor = layout.torch_channels(gamma.to(h.dtype), axis)
    if mask is not None:
        m = layout.torch_tokens(mask.to(h.dtype), axis)
        mixed = torch.where(m == 0, torch.ones((), dtype=h.dtype, device=x.device), 1 + m * (factor - 1))
        factor = torch.where(m == 1, factor, mixed)
    return (h * factor).to(x.dtype)


def _scale_body(b: BodyBuilder, operands: Sequence[BodyValue | None], attributes: Attributes) -> list[BodyValue]:
    x, gamma, mask = operands
    assert x is not None and gamma is not None
    axis = layout.body_axis(b, attributes["axis"], x)
    h = b.up(x)
    factor = layout.body_channels(b, b.cast(gamma, h.dtype), axis)
    if mask is not None:
        m = layout.body_tokens(b, b.cast(mask, h.dtype), axis)
        mixed = b.where(m.equal(0), 1.0, m * (factor - 1) + 1)
        factor = b.where(m.equal(1), factor, mixed)
    return [b.cast(h * factor, x.dtype)]


register(
    OpDef(
        name="channel_scale",
        doc=_SCALE_DOC,
        inputs=(
            Operand("x", "the activation"),
            Operand("gamma", "factors: [channels], [], or any shape that broadcasts to x"),
            layout.MASK,
        ),
        outputs=("y",),
        infer=_scale_infer,
        reference=_scale,
        body=_scale_body,
        attributes=(layout.AXIS,),
        traits=frozenset({Trait.ELEMENTWISE, Trait.FOLDS_AS_LINEAR_MAP}),
        min_opset=13,
        samples=(
            Sample(((2, 3, 8), (8,), None)),
            Sample(((2, 0, 8), (8,), None), note="no tokens"),
            Sample(((1, 1), (1,), None)),
            Sample(((3, 5, 129), (129,), (3, 5)), draw=draws(special, normal, boolean), note="NaN and infinity"),
            Sample(((3, 5, 7), (), (5,)), draw=draws(normal, normal, fraction)),
            Sample(((2, 4, 3, 5), (4,), (2, 3, 5)), {"axis": 1}, draw=draws(normal, normal, boolean), note="NCHW"),
        ),
    )
)
