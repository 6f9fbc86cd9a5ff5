"""``actgraph.feed_forward`` on CUDA: from the operands of the op to kernel launches."""

from __future__ import annotations

import torch

from actgraph.runtime.kernels.triton import feed_forward_kernels as kernels
from actgraph.runtime.kernels.triton import plan
from actgraph.runtime.kernels.triton.linear import Gate, Stored, aligned, claims, product, stored

__all__ = ["claims", "feed_forward"]

Tensor = torch.Tensor
_BLOCK = 1024


def feed_forward(
    x: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    gate_weight: Tensor | None = None,
    up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
    gate_scale: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    gate_bias: Tensor | None = None,
    thresholds: Tensor | None = None,
    *,
    activation: str = "silu",
    block_size: int = 0,
    packed: str = "",
    sparse: str = "none",
    keep: str = "abs>",
    threshold: float = 0.0,
) -> Tensor:
    """The op, by kernels: neurons first (float32), then down, of which only the rows of neurons that stay are read."""

    def held(weight: Tensor, scale: Tensor | None, layout: str) -> Stored:
        block, middle = (0, False) if scale is None else (block_size, packed == "u4")
        return stored(weight, scale, None, layout=layout, block=block, packed=packed, middle=middle)

    up, down = held(up_weight, up_scale, "out_in"), held(down_weight, down_scale, "in_out")
    gate = None if gate_weight is None else held(gate_weight, gate_scale, "out_in")
    rule = Gate(keep, threshold, None if thresholds is None else thresholds.contiguous())
    flat = x.reshape(x.shape[:-1].numel(), x.shape[-1]).contiguous()
    hidden = x.new_empty((flat.shape[0], up.outputs), dtype=torch.float32)
    if hidden.numel():
        make = _few if plan.few(flat.shape[0]) else _many
        make(flat, up, gate, up_bias, gate_bias, rule, activation, sparse, hidden)
    y = product(hidden, down, down_bias, Gate(sparse=sparse != "none"), None, x.dtype)
    return y.reshape(*x.shape[:-1], down.outputs)


def _few(
    x: Tensor, up: Stored, gate: Stored | None, up_bias: Tensor | None, gate_bias: Tensor | None,
    rule: Gate, activation: str, sparse: str, hidden: Tensor,
) -> None:  # fmt: skip
    p = plan.stream(x.shape[0], up.outputs, up.inputs, out_in=True, device=x.device, split=False)
    other = up if gate is None else gate
    kernels.neurons[(plan.ceil_div(up.outputs, p.outputs),)](
        x, up.weight, up.scale, _plain(up_bias), None if gate is None else gate.weight, other.scale, _plain(gate_bias),
        rule.thresholds, hidden, rule.threshold,
        x.shape[0], up.inputs, up.outputs, up.weight.stride(0), other.weight.stride(0), up.groups, other.groups,
        up.form, up.packed, up.scale_mode, up.zero_mode, up.group, aligned(up.group),
        other.form, other.packed, other.scale_mode, other.zero_mode, other.group, aligned(other.group),
        activation, sparse, rule.keep, rule.mode,
        p.tokens, p.outputs, p.inputs, num_warps=p.warps,
    )  # fmt: skip


def _many(
    x: Tensor, up: Stored, gate: Stored | None, up_bias: Tensor | None, gate_bias: Tensor | None,
    rule: Gate, activation: str, sparse: str, hidden: Tensor,
) -> None:  # fmt: skip
    up_sums = product(x, up, up_bias, Gate(), None, torch.float32)
    gate_sums = None if gate is None else product(x, gate, gate_bias, Gate(), None, torch.float32)
    kernels.combine_flat[(plan.ceil_div(hidden.numel(), _BLOCK),)](
        gate_sums, up_sums, rule.thresholds, hidden, rule.threshold, hidden.numel(), up.outputs,
        activation, sparse, rule.keep, rule.mode, _BLOCK,
    )  # fmt: skip


def _plain(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.contiguous()
