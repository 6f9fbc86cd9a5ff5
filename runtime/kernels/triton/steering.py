"""The steering ops, ``clip`` and ``gate`` on CUDA: from operands to kernel launches.

The kernels take channels on the last axis and channel operands of one number or one per channel; other calls are left to the
reference (see the ``claims_*`` functions).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from actgraph.ops.dtypes import DType
from actgraph.ops.registry import Attributes
from actgraph.ops.shapes import TensorType
from actgraph.runtime.kernels.triton import plan
from actgraph.runtime.kernels.triton import steering_kernels as kernels

Tensor = torch.Tensor
Types = Sequence[TensorType | None]

_BLOCK = 1024
#: Directions of a subspace that one program holds beside a block of channels.
MAX_RANK = 64


def _last_axis(types: Types, attributes: Attributes) -> bool:
    """No float64, at least one axis, and the channels on the last one."""
    x = types[0]
    if any(t is not None and t.dtype is DType.F64 for t in types) or x is None or not x.shape:
        return False
    return attributes["axis"] in (-1, len(x.shape) - 1)


def _channel_operand(kind: TensorType | None) -> bool:
    return kind is None or (kind.shape is not None and len(kind.shape) <= 1)


def claims_shift(types: Types, attributes: Attributes) -> bool:
    """Vectors of rank 0 or 1; norms over the channels, of a vector that has them all."""
    x, vector = types[0], types[1]
    if not _last_axis(types, attributes) or not _channel_operand(vector):
        return False
    if attributes["norm"] == "none":
        return True
    assert x is not None and x.shape is not None and vector is not None
    axes = tuple(attributes["norm_axes"])
    return axes in ((), (-1,), (len(x.shape) - 1,)) and vector.shape == x.shape[-1:]


def claims_channel_scale(types: Types, attributes: Attributes) -> bool:
    return _last_axis(types, attributes) and _channel_operand(types[1])


def claims_lowrank_map(types: Types, attributes: Attributes) -> bool:
    """Subspaces of up to ``MAX_RANK`` directions."""
    basis = types[1]
    small = basis is not None and basis.shape is not None and isinstance(basis.shape[1], int) and basis.shape[1] <= MAX_RANK
    return _last_axis(types, attributes) and small


def claims_latent_edit(types: Types, attributes: Attributes) -> bool:
    """Up to ``MAX_RANK`` latents."""
    decoder = types[1]
    small = (
        decoder is not None and decoder.shape is not None and isinstance(decoder.shape[0], int) and decoder.shape[0] <= MAX_RANK
    )
    return _last_axis(types, attributes) and small


def claims_clip(types: Types, attributes: Attributes) -> bool:
    return _last_axis(types, attributes) and _channel_operand(types[1]) and _channel_operand(types[2])


def claims_gate(types: Types, attributes: Attributes) -> bool:
    return _last_axis(types, attributes) and _channel_operand(types[1])


def shift(
    x: Tensor,
    vector: Tensor,
    strength: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    scale: float = 1.0,
    norm: str = "none",
    norm_axes: Sequence[int] = (),
    axis: int = -1,
) -> Tensor:
    x, y = _plain(x), torch.empty_like(x, memory_format=torch.contiguous_format)
    if y.numel():
        channels = x.shape[-1]
        tokens = x.numel() // channels
        span = _BLOCK if norm == "none" else channels
        (s, s_step), (m, m_step) = _tokens(strength, x), _tokens(mask, x)
        kernels.shift[(tokens, plan.ceil_div(channels, span))](
            x, _plain(vector), s, m, y, scale, channels, span, s_step, m_step,
            _mode(vector), norm, min(_BLOCK, plan.power_of_two(channels)),
        )  # fmt: skip
    return y


def channel_scale(x: Tensor, gamma: Tensor, mask: Tensor | None = None, *, axis: int = -1) -> Tensor:
    x, y = _plain(x), torch.empty_like(x, memory_format=torch.contiguous_format)
    if y.numel():
        m, step = _tokens(mask, x)
        kernels.channel_scale[_flat(y)](
            x, _plain(gamma), m, y, y.numel(), x.shape[-1], step, _mode(gamma), _BLOCK
        )  # fmt: skip
    return y


def lowrank_map(x: Tensor, basis: Tensor, matrix: Tensor, mask: Tensor | None = None, *, axis: int = -1) -> Tensor:
    x, y = _plain(x), torch.empty_like(x, memory_format=torch.contiguous_format)
    if y.numel():
        channels, rank = basis.shape
        m, step = _tokens(mask, x)
        if matrix.dim() > 2:
            matrix = matrix.expand(*x.shape[:-1], rank, rank)
        width = plan.power_of_two(rank)
        block = min(max(4096 // width, 16), plan.power_of_two(channels))
        kernels.lowrank_map[(x.numel() // channels,)](
            x, _plain(basis), _plain(matrix), m, y, channels, rank, step, rank * rank if matrix.dim() > 2 else 0, width, block
        )  # fmt: skip
    return y


def latent_edit(
    x: Tensor,
    decoder: Tensor,
    encoder: Tensor | None = None,
    bias: Tensor | None = None,
    thresholds: Tensor | None = None,
    values: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    mode: str = "add",
    value: float = 0.0,
    normalize: str = "none",
    axis: int = -1,
) -> Tensor:
    x, y = _plain(x), torch.empty_like(x, memory_format=torch.contiguous_format)
    if y.numel():
        latents, channels = decoder.shape
        m, step = _tokens(mask, x)
        width = plan.power_of_two(latents)
        block = min(max(4096 // width, 16), plan.power_of_two(channels))
        shared = values is None or values.dim() <= 1
        if values is not None:
            values = values.expand(latents) if shared else values.expand(*x.shape[:-1], latents)
        rows = [None if t is None else _plain(t) for t in (encoder, bias, thresholds, values)]
        kernels.latent_edit[(x.numel() // channels,)](
            x, _plain(decoder), *rows, m, y, value, channels, latents, 0 if shared else latents, step,
            mode, normalize, width, block,
        )  # fmt: skip
    return y


def clip(
    x: Tensor,
    lo: Tensor | None = None,
    hi: Tensor | None = None,
    *,
    min: float = -math.inf,
    max: float = math.inf,
    policy: str = "saturate",
    nan: str = "pass",
    axis: int = -1,
) -> Tensor:
    x, y = _plain(x), torch.empty_like(x, memory_format=torch.contiguous_format)
    if y.numel():
        kernels.clip[_flat(y)](
            x, None if lo is None else _plain(lo), None if hi is None else _plain(hi), y, min, max,
            y.numel(), x.shape[-1], _mode(lo), _mode(hi), policy, nan, _BLOCK,
        )  # fmt: skip
    return y


def gate(x: Tensor, thresholds: Tensor | None = None, *, threshold: float = 0.0, keep: str = "abs>", axis: int = -1) -> Tensor:
    x, y = _plain(x), torch.empty_like(x, memory_format=torch.contiguous_format)
    if y.numel():
        mode = "attribute" if thresholds is None else _mode(thresholds)
        kernels.gate[_flat(y)](
            x, None if thresholds is None else _plain(thresholds), y, threshold, y.numel(), x.shape[-1], keep, mode, _BLOCK
        )  # fmt: skip
    return y


def _flat(y: Tensor) -> tuple[int]:
    return (plan.ceil_div(y.numel(), _BLOCK),)


def _mode(operand: Tensor | None) -> str:
    return "none" if operand is None else "one" if operand.numel() == 1 else "channel"


def _plain(tensor: Tensor) -> Tensor:
    """Contiguous; booleans as bytes."""
    tensor = tensor.contiguous()
    return tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor


def _tokens(operand: Tensor | None, x: Tensor) -> tuple[Tensor | None, int]:
    """A token operand and its step: 0 for one number, 1 for one per token."""
    if operand is None:
        return None, 0
    if operand.numel() == 1:
        return _plain(operand), 0
    return _plain(operand.expand(x.shape[:-1])), 1
