"""The op that edits latents of a sparse autoencoder (SAE) and writes the change back into the activation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from actgraph.errors import VerifyError
from actgraph.ops import layout
from actgraph.ops.drawing import Array, boolean, draws, fraction, integers, normal, positive, special, zeros
from actgraph.ops.dtypes import DType
from actgraph.ops.registry import Attribute, Attributes, OpDef, Operand, Sample, Trait, register, single
from actgraph.ops.shapes import Dim, TensorType

if TYPE_CHECKING:
    import torch

    from actgraph.ops.body import BodyBuilder, BodyValue

#: What SAELens adds to the standard deviation when it normalises the input of an SAE by ``layer_norm``.
STD_EPS = 1e-5

_DOC = """
Edit latents of a sparse autoencoder, per token: ``y = x + out * ((g - f) decoder)``, where ``f`` are the latents to edit and
``g`` what they become. This is encoding with the whole autoencoder, editing, decoding and adding back what it does not explain:
its biases and the latents that nobody edits cancel, so the rows of the r edited latents are all it takes (2 r multiplications
per channel instead of 2 d_sae).

``f = relu(n encoder^T + bias)``; with ``thresholds`` (JumpReLU) it is 0 where that sum is at most ``max(threshold, 0)``. A
gated autoencoder is a JumpReLU one (see ``actgraph.formats.saelens``); a top-k one is neither, because which latents fire
depends on all of them: only ``add`` can be written this way.

``mode``: ``add`` (``g = f + v``, nothing is encoded), ``set`` (``g = v``: clamping, and zero-ablation with ``v = 0``),
``scale`` (``g = v f``). ``v`` is ``values`` ([], [1], one per latent [r], or per token and latent [..., r] with the channel
axis of x taken out), or the attribute ``value`` where that is absent. The nonlinearity is not applied to ``g``.

``normalize`` is what the autoencoder does to its input: ``n = x, out = 1`` (``none``); ``n = x sqrt(d) / |x|`` and
``out = |x| / sqrt(d)`` (``rescale``); ``n = (x - mean) / (std + 1e-5)`` and ``out = std``, with d - 1 in the variance
(``layer_norm``).

Exactness: a token of which no latent changes stays bit for bit; so does one whose mask is false or 0 (a fraction scales the
change). NaN and infinity in an encoded token spread over its channels. float16 and bfloat16 are computed in float32 and rounded
once.

Sources: *Endogenous Resistance to Activation Steering in Language Models*, 2026; Templeton et al., *Scaling Monosemanticity*,
2024 (clamping with the error term); Rajamanoharan et al., *Jumping Ahead*, 2024 (JumpReLU).
"""


def _infer(types: Sequence[TensorType | None], attributes: Attributes) -> list[TensorType]:
    x, decoder, encoder, bias, thresholds, values, mask = types
    assert x is not None and decoder is not None
    if encoder is None and attributes["mode"] != "add":
        raise VerifyError(f"actgraph.latent_edit: mode {attributes['mode']} needs the encoder", "only add works without")
    axis = attributes["axis"]
    channels = None if x.shape is None else x.shape[layout.from_end(axis, len(x.shape))]
    latents: Dim = None
    for name, operand in (("decoder", decoder), ("encoder", encoder)):
        if operand is None or operand.shape is None:
            continue
        if len(operand.shape) != 2 or not _equal(operand.shape[1], channels) or not _equal(operand.shape[0], latents):
            raise VerifyError(f"actgraph.latent_edit: {name} {operand} must be [r, channels] with the {channels} channels of x")
        latents = operand.shape[0]
    for name, operand in (("bias", bias), ("thresholds", thresholds)):
        if operand is not None and operand.shape is not None and not (
            len(operand.shape) == 1 and _equal(operand.shape[0], latents)
        ):  # fmt: skip
            raise VerifyError(f"actgraph.latent_edit: {name} {operand} must be one number for each of the {latents} latents")
    if values is not None and values.shape is not None and x.shape is not None:
        place = layout.from_end(axis, len(x.shape)) + len(x.shape)
        target = (*x.shape[:place], *x.shape[place + 1 :], latents)
        layout.check_into("latent_edit", "values (one per latent, or per token and latent)", values.shape, target)
    layout.check_operands("latent_edit", x, axis, tokens={"mask": mask})
    return [x]


def _equal(size: Dim, other: Dim) -> bool:
    return not (isinstance(size, int) and isinstance(other, int)) or size == other


def _latent_edit(
    x: torch.Tensor,
    decoder: torch.Tensor,
    encoder: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    thresholds: torch.Tensor | None = None,
    values: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    *,
    mode: str = "add",
    value: float = 0.0,
    normalize: str = "none",
    axis: int = -1,
) -> torch.Tensor:
    import torch

    axis = layout.from_end(axis, x.dim())
    h = layout.torch_compute(x)
    rows = h.movedim(axis, -1)
    n, out = _torch_normalized(rows, normalize)
    v = torch.full((), single(value), dtype=h.dtype, device=x.device) if values is None else values.to(h.dtype)
    if mode == "add":
        change = v.expand(*rows.shape[:-1], decoder.shape[0])
    else:
        assert encoder is not None
        f = n @ encoder.to(h.dtype).transpose(0, 1)
        f = f if bias is None else f + bias.to(h.dtype)
        low = torch.zeros((), dtype=h.dtype, device=x.device)
        f = torch.where(f <= (low if thresholds is None else thresholds.to(h.dtype).clamp_min(0)), low, f)
        change = v - f if mode == "set" else (v - 1) * f
    delta = change @ decoder.to(h.dtype)
    delta = delta if out is None else out * delta
    weight = (change != 0).any(-1, keepdim=True).movedim(-1, axis).to(h.dtype)
    if mask is not None:
        weight = weight * layout.torch_tokens(mask.to(h.dtype), axis)
    return layout.torch_edit(h, delta.movedim(-1, axis), weight).to(x.dtype)


def _torch_normalized(rows: torch.Tensor, normalize: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What the encoder reads, and the factor of what is decoded."""
    import torch

    channels = rows.shape[-1]
    if normalize == "rescale":
        size = torch.linalg.vector_norm(rows, dim=-1, keepdim=True) / channels**0.5
        return rows / size, size
    if normalize == "layer_norm":
        centred = rows - rows.mean(-1, keepdim=True)
        # the mean is over the d channels and the variance over d - 1, as SAELens has it
        std = torch.linalg.vector_norm(centred, dim=-1, keepdim=True) / max(channels - 1, 0) ** 0.5
        return centred / (std + STD_EPS), std
    return rows, None


def _body(b: BodyBuilder, operands: Sequence[BodyValue | None], attributes: Attributes) -> list[BodyValue]:
    x, decoder, encoder, bias, thresholds, values, mask = operands
    assert x is not None and decoder is not None
    axis = layout.body_axis(b, attributes["axis"], x)
    h = b.up(x)
    rows, back = layout.body_to_last(b, h, axis)
    n, out = _body_normalized(b, rows, attributes["normalize"])
    v = b.attribute("value", h.dtype) if values is None else b.cast(values, h.dtype)
    if attributes["mode"] == "add":
        change = v + (_zeros(b, rows) + b.transpose(_zeros(b, b.cast(decoder, h.dtype)), [1, 0]))
    else:
        assert encoder is not None
        f = b.op("MatMul", n, b.transpose(b.cast(encoder, h.dtype), [1, 0]))
        f = f if bias is None else f + b.cast(bias, h.dtype)
        low = b.const(0.0, h.dtype)
        if thresholds is not None:
            low = b.op("Max", b.cast(thresholds, h.dtype), low)
        f = b.where(f <= low, 0.0, f)
        change = v - f if attributes["mode"] == "set" else (v - 1) * f
    delta = b.op("MatMul", change, b.cast(decoder, h.dtype))
    delta = delta if out is None else out * delta
    # a product counts what a reduction would, which onnxruntime gives another shape where there are no tokens
    counting = _zeros(b, b.cast(decoder, h.dtype)) + 1
    changed = b.op("MatMul", b.cast(b.op("Not", change.equal(0)), h.dtype), counting)
    weight = b.cast(changed > 0, h.dtype)
    if back:
        delta, weight = b.transpose(delta, back), b.transpose(weight, back)
    if mask is not None:
        weight = weight * layout.body_tokens(b, b.cast(mask, h.dtype), axis)
    return [b.cast(layout.body_edit(b, h, delta, weight), x.dtype)]


def _zeros(b: BodyBuilder, x: BodyValue) -> BodyValue:
    """Zeros shaped as ``x`` with one channel, whatever ``x`` holds: by them a number becomes one for each token and latent."""
    first = b.slice(x, b.ints([0]), b.ints([1]), -1)
    return b.where(first.equal(0), 0.0, b.const(0.0, x.dtype))


def _body_normalized(b: BodyBuilder, rows: BodyValue, normalize: str) -> tuple[BodyValue, BodyValue | None]:
    """As ``_torch_normalized``."""
    if normalize == "none":
        return rows, None
    channels = b.op(
        "Squeeze", b.cast(b.size(rows, -1 if rows.rank is None else rows.rank - 1), rows.dtype), b.ints([0]), rank=0
    )
    if normalize == "rescale":
        size = b.op("Sqrt", b.reduce("ReduceSum", rows * rows, [-1])) / b.op("Sqrt", channels)
        return rows / size, size
    centred = rows - b.reduce("ReduceMean", rows, [-1])
    std = b.op("Sqrt", b.reduce("ReduceSum", centred * centred, [-1])) / b.op("Sqrt", channels - 1)
    return centred / (std + STD_EPS), std


def _unit_rows(rng: np.random.Generator, shape: tuple[int, ...], dtype: DType) -> Array:
    """Directions of length about 1, so that latents have the size of the activation's channels."""
    return np.asarray(rng.standard_normal(shape) / max(shape[-1], 1) ** 0.5, dtype.numpy)


_SET = draws(normal, _unit_rows, _unit_rows, normal, None, None, None)
_JUMP = draws(normal, _unit_rows, _unit_rows, normal, positive, normal, None)
register(
    OpDef(
        name="latent_edit",
        doc=_DOC,
        inputs=(
            Operand("x", "the activation"),
            Operand("decoder", "[r, channels], the decoder's row of each edited latent"),
            Operand("encoder", "[r, channels], what each edited latent reads; only `add` works without", optional=True),
            Operand("bias", "[r], added before the nonlinearity", optional=True),
            Operand("thresholds", "[r], of JumpReLU; absent: ReLU", optional=True),
            Operand("values", "what `mode` does it with: [], [1], [r], or [..., r] for tokens by latents", optional=True),
            layout.MASK,
        ),
        outputs=("y",),
        infer=_infer,
        reference=_latent_edit,
        body=_body,
        attributes=(
            Attribute("mode", "str", "what the latents become", default="add", choices=("add", "set", "scale")),
            Attribute("value", "float", "the number where `values` is absent", default=0.0, structural=False),
            Attribute(
                "normalize", "str", "what the autoencoder does to its input", default="none",
                choices=("none", "rescale", "layer_norm"),
            ),
            layout.AXIS,
        ),
        traits=frozenset({Trait.PER_TOKEN}),
        min_opset=13,
        samples=(
            Sample(((2, 3, 8), (3, 8), (3, 8), (3,), None, None, None), {"mode": "set"}, draw=_SET),
            Sample(((0, 3, 8), (2, 8), (2, 8), (2,), None, None, None), {"mode": "set"}, draw=_SET, note="no tokens"),
            Sample(((1, 1), (1, 1), (1, 1), None, None, None, None), {"mode": "set", "value": 2.0}),
            Sample(((2, 17, 259), (5, 259), (5, 259), (5,), (5,), (5,), None), {"mode": "set"}, draw=_JUMP, note="large"),
            Sample(
                ((2, 3, 8), (2, 8), (2, 8), (2,), (2,), (2, 1, 2), (2, 3)), {"mode": "scale"},
                draw=draws(normal, _unit_rows, _unit_rows, normal, normal, normal, boolean),
            ),
            Sample(
                ((3, 5, 7), (4, 7), (4, 7), None, None, (), (5,)), {"mode": "scale", "value": 9.0},
                draw=draws(normal, _unit_rows, _unit_rows, None, None, normal, fraction),
            ),
            Sample(((2, 3, 8), (2, 8), None, None, None, (2,), None), {"mode": "add"}),
            Sample(
                ((2, 3, 8), (2, 8), None, None, None, None, (2, 3)), {"mode": "add", "value": 0.5},
                draw=draws(special, normal, None, None, None, None, boolean), note="NaN and infinity",
            ),
            Sample(
                ((2, 3, 8), (2, 8), (2, 8), (2,), None, None, (2, 3)), {"mode": "set"},
                draw=draws(special, _unit_rows, _unit_rows, normal, None, None, boolean), note="encoded NaN and infinity",
            ),
            Sample(
                ((2, 3, 8), (2, 8), (2, 8), None, (2,), None, None), {"mode": "set"},
                draw=draws(zeros, normal, normal, None, positive, None, None), note="no latent fires",
            ),
            Sample(((4, 3, 16), (3, 16), (3, 16), (3,), None, None, None), {"mode": "set", "normalize": "rescale"}, draw=_SET),
            Sample(
                ((2, 3, 16), (3, 16), (3, 16), (3,), (3,), (1,), None), {"normalize": "layer_norm", "mode": "scale"}, draw=_JUMP
            ),
            Sample(((2, 3, 8), (2, 8), None, None, None, (3, 2), None), {"normalize": "layer_norm", "mode": "add"}),
            Sample(
                ((2, 4, 3, 5), (2, 4), (2, 4), (2,), None, (2,), (2, 3, 5)), {"axis": 1, "mode": "set"},
                draw=draws(normal, _unit_rows, _unit_rows, normal, None, normal, boolean), note="NCHW",
            ),
            Sample(
                ((2, 4, 3, 5), (2, 4), (2, 4), (2,), None, (2, 1, 5, 2), (2, 3, 5)),
                {"axis": -3, "mode": "set", "normalize": "layer_norm"},
                draw=draws(normal, _unit_rows, _unit_rows, normal, None, normal, integers(0, 2, DType.I64)),
            ),
            Sample(((2, 4, 3, 5), (2, 4), None, None, None, (2,), None), {"axis": 1, "mode": "add"}),
        ),
    )
)  # fmt: skip
