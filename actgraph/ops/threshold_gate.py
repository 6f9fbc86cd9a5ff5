"""Per-neuron gates by a trained threshold, with gains: smooth for training, a compare at inference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from actgraph.errors import VerifyError
from actgraph.ops import layout
from actgraph.ops.drawing import Array, boolean, draws, fraction, grid, normal, special
from actgraph.ops.dtypes import DType
from actgraph.ops.registry import Attribute, Attributes, OpDef, Operand, Sample, Trait, register, single
from actgraph.ops.shapes import TensorType

if TYPE_CHECKING:
    import torch

    from actgraph.ops.body import BodyBuilder, BodyValue


_DOC = """
Gate each neuron by where its pre-activation ``z`` stands to a threshold: ``y = gamma * g * x``.

``mode = "hard"``: ``g = 0 where z <= tau, else 1`` (so ``g`` is 1 for ``z > tau`` and for NaN). ``mode = "soft"``:
``g = sigmoid(sharpness * (z - tau))``, which has gradients for ``tau``; it becomes the hard gate as ``sharpness`` grows. A
threshold of minus infinity is open for every ``z``, exactly. ``z`` is ``x`` where it is not given; ``gamma`` is 1.
With ``result = "gate"`` the result is ``gamma * g`` itself, in the element type of ``x``.

A closed hard gate gives +0.0 whatever ``x`` is; an open one without ``gamma`` gives ``x`` bit for bit. A mask mixes the factor
``gamma * g`` with 1: false or 0 gives ``x`` bit for bit, true or 1 the gate, a fraction m the factor ``1 + m (gamma g - 1)``.
float16 and bfloat16 are computed in float32 and rounded once. The hard gate has no gradient for ``tau`` and ``z``.

For a ReLU, ``x = max(z, 0)``, the hard gate is JumpReLU with the threshold ``max(tau, 0)``.

Sources: *Dopamine: Brain Modes, Not Brains*, 2026 (TauGate); Rajamanoharan et al., *JumpReLU*, 2024.
"""


def _infer(types: Sequence[TensorType | None], attributes: Attributes) -> list[TensorType]:
    x, tau, z, gamma, mask = types
    assert x is not None
    channels = {"tau": tau, "gamma": gamma}
    layout.check_operands("threshold_gate", x, attributes["axis"], channels=channels, tokens={"mask": mask})
    if z is not None and z.shape is not None and x.shape is not None and z.shape != x.shape:
        raise VerifyError(f"actgraph.threshold_gate: z {z} has another shape than x {x}")
    return [x]


def _gate(
    x: torch.Tensor,
    tau: torch.Tensor,
    z: torch.Tensor | None = None,
    gamma: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    *,
    mode: str = "hard",
    sharpness: float = 1.0,
    result: str = "gated",
    axis: int = -1,
) -> torch.Tensor:
    import torch

    axis = layout.from_end(axis, x.dim())
    h = layout.torch_compute(x)
    at = h if z is None else layout.torch_compute(z).to(h.dtype)
    t = layout.torch_channels(tau.to(h.dtype), axis)
    one = torch.ones((), dtype=h.dtype, device=x.device)
    if mode == "soft":
        ever = t == -math.inf  # sigmoid(-inf + inf) would be NaN
        gate = torch.where(ever, one, torch.sigmoid(single(sharpness) * (at - torch.where(ever, 0 * one, t))))
        closed = torch.zeros((), dtype=torch.bool, device=x.device)
    else:
        closed = (at <= t) & (t != -math.inf)
        gate = torch.where(closed, 0 * one, one)
    factor = gate if gamma is None else gate * layout.torch_channels(gamma.to(h.dtype), axis)
    factor = torch.where(closed, 0 * one, factor)  # also where a gain is infinite
    if mask is not None:
        m = layout.torch_tokens(mask.to(h.dtype), axis)
        factor = torch.where(m == 0, one, torch.where(m == 1, factor, 1 + m * (factor - 1)))
        closed = closed & (m == 1)
    if result == "gate":
        return factor.broadcast_to(h.shape).to(x.dtype)
    return torch.where(closed, 0 * one, h * factor).to(x.dtype)


def _body(b: BodyBuilder, operands: Sequence[BodyValue | None], attributes: Attributes) -> list[BodyValue]:
    x, tau, z, gamma, mask = operands
    assert x is not None and tau is not None
    axis = layout.body_axis(b, attributes["axis"], x)
    h = b.up(x)
    at = h if z is None else b.cast(z, h.dtype)
    t = layout.body_channels(b, b.cast(tau, h.dtype), axis)
    ever = t.equal(-math.inf)
    closed: BodyValue | None = None
    if attributes["mode"] == "soft":
        slope = b.attribute("sharpness", h.dtype)
        factor = b.where(ever, 1.0, b.op("Sigmoid", (at - b.where(ever, 0.0, t)) * slope))
    else:
        closed = b.op("And", at <= t, b.op("Not", ever))
        factor = b.where(closed, 0.0, b.cast(b.op("Not", closed), h.dtype))
    if gamma is not None:
        factor = factor * layout.body_channels(b, b.cast(gamma, h.dtype), axis)
        factor = factor if closed is None else b.where(closed, 0.0, factor)
    if mask is not None:
        m = layout.body_tokens(b, b.cast(mask, h.dtype), axis)
        factor = b.where(m.equal(0), 1.0, b.where(m.equal(1), factor, m * (factor - 1) + 1))
        closed = None if closed is None else b.op("And", closed, m.equal(1))
    if attributes["result"] == "gate":
        return [b.cast(b.op("Expand", factor, b.shape(h)), x.dtype)]
    y = h * factor
    return [b.cast(y if closed is None else b.where(closed, 0.0, y), x.dtype)]


def _thresholds(rng: np.random.Generator, shape: tuple[int, ...], dtype: DType) -> Array:
    """Thresholds among which minus and plus infinity are strewn: gates that never close, and that never open."""
    values = rng.standard_normal(shape).reshape(-1)
    values[0::5], values[3::7] = -math.inf, math.inf
    return values.reshape(shape).astype(dtype.numpy)


THRESHOLD_GATE = register(
    OpDef(
        name="threshold_gate",
        doc=_DOC,
        inputs=(
            Operand("x", "the activation that passes or not"),
            Operand("tau", "thresholds: [channels], [] or any shape that broadcasts to x; minus infinity is always open"),
            Operand("z", "what is compared, shaped like x: the pre-activation; x itself where absent", optional=True),
            Operand("gamma", "gains: [channels], [] or any shape that broadcasts to x", optional=True),
            layout.MASK,
        ),
        outputs=("y",),
        infer=_infer,
        reference=_gate,
        body=_body,
        attributes=(
            Attribute("mode", "str", "a compare, or a sigmoid to train with", default="hard", choices=("hard", "soft")),
            Attribute("sharpness", "float", "slope of the soft gate, per unit of z", default=1.0, structural=False),
            Attribute("result", "str", "x gated, or the gate itself", default="gated", choices=("gated", "gate")),
            layout.AXIS,
        ),
        traits=frozenset({Trait.ELEMENTWISE}),
        min_opset=13,
        samples=(
            Sample(((2, 3, 8), (8,), (2, 3, 8), (8,), None)),
            Sample(((2, 3, 8), (8,), (2, 3, 8), (8,), None), {"mode": "soft", "sharpness": 10.0}),
            Sample(((2, 3, 64), (64,), None, None, None), draw=draws(grid, grid, None, None, None), note="on the thresholds"),
            Sample(
                ((2, 3, 64), (64,), (2, 3, 64), (64,), None),
                draw=draws(special, _thresholds, special, special, None), note="NaN and infinity",
            ),
            Sample(
                ((2, 3, 64), (64,), (2, 3, 64), None, None), {"mode": "soft"},
                draw=draws(special, _thresholds, normal, None, None), note="gates that never close or open",
            ),
            Sample(((2, 0, 8), (8,), None, (8,), None), note="no tokens"),
            Sample(((1, 1), (), None, (), None), {"mode": "soft"}, note="one number for all channels"),
            Sample(((2, 3, 8), (8,), (2, 3, 8), (8,), (2, 3)), draw=draws(special, normal, normal, normal, boolean)),
            Sample(((2, 3, 8), (8,), (2, 3, 8), (8,), (3,)), draw=draws(normal, normal, normal, normal, fraction)),
            Sample(
                ((2, 3, 8), (8,), None, None, (2, 1)), {"mode": "soft", "result": "gate"},
                draw=draws(normal, normal, None, None, fraction),
            ),
            Sample(((2, 3, 8), (8,), None, None, None), {"result": "gate"}),
            Sample(((2, 4, 3, 5), (4,), (2, 4, 3, 5), (4,), None), {"axis": 1}, note="NCHW"),
            Sample(((3, 5, 1031), (1031,), (3, 5, 1031), (1031,), None), note="large"),
        ),
    )
)  # fmt: skip
