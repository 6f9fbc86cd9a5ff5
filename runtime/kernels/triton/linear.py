"""``actgraph.linear`` on CUDA: from the operands of the op to kernel launches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from actgraph.ops.dtypes import DType
from actgraph.ops.linear import torch_gate
from actgraph.ops.registry import Attributes
from actgraph.ops.shapes import TensorType
from actgraph.runtime.kernels.triton import linear_kernels as kernels
from actgraph.runtime.kernels.triton import plan

Tensor = torch.Tensor

#: What a block of the compaction kernel covers.
_COMPACT = 1024
_SUM_BLOCK = 256
_FORMS = {torch.float8_e4m3fn: "f8e4m3", torch.float8_e5m2: "f8e5m2"}
_DOTS = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def claims(types: Sequence[TensorType | None], attributes: Attributes) -> bool:
    """Everything but float64, which the kernels do not compute in."""
    return all(t is None or t.dtype is not DType.F64 for t in types)


@dataclass(frozen=True)
class Stored:
    """A stored weight with its scales, as the kernels take it; see ``kernels.triton.common`` for the modes."""

    weight: Tensor  # contiguous; float8 as its bits
    scale: Tensor | None
    zero: Tensor | None
    form: str
    packed: str
    scale_mode: str
    zero_mode: str
    group: int
    out_in: bool
    outputs: int
    inputs: int
    codes: bool  # float8, or integers less their zero point that are at most 256: exact in bfloat16 and float16

    @property
    def groups(self) -> int:
        return plan.ceil_div(self.inputs, self.group) if self.group else 1


def stored(
    weight: Tensor, scale: Tensor | None, zero: Tensor | None, *, layout: str, block: int, packed: str, middle: bool = False
) -> Stored:
    """``middle``: the zero point is 8 (codes of "u4" without ``zero``)."""
    rows, columns = weight.shape
    columns *= 2 if packed else 1
    outputs, inputs = (rows, columns) if layout == "out_in" else (columns, rows)

    def mode(parameter: Tensor | None) -> str:
        if parameter is None:
            return "none"
        if parameter.dim() == 2:
            return "group"
        return "one" if parameter.numel() == 1 else "output"

    form = _FORMS.get(weight.dtype, "number")
    # i8 codes less a u8 zero point reach -383, which bfloat16 rounds
    small = zero is None or (zero.element_size() == 1 and (bool(packed) or zero.dtype == weight.dtype))
    return Stored(
        weight=(weight if form == "number" else weight.view(torch.uint8)).contiguous(),
        scale=None if scale is None else scale.contiguous(),
        zero=None if zero is None else zero.contiguous(),
        form=form,
        packed=packed,
        scale_mode=mode(scale),
        zero_mode="eight" if middle else mode(zero),
        group=block if 2 in (0 if p is None else p.dim() for p in (scale, zero)) else 0,
        out_in=layout == "out_in",
        outputs=outputs,
        inputs=inputs,
        codes=scale is not None and small,
    )


@dataclass(frozen=True)
class Gate:
    """How the kernels gate their input: a rule of ``gate``, or "none". ``sparse``: many inputs are 0, by the rule or before."""

    keep: str = "none"
    threshold: float = 0.0
    thresholds: Tensor | None = None
    sparse: bool = False

    @property
    def mode(self) -> str:
        if self.thresholds is None:
            return "attribute"
        return "one" if self.thresholds.numel() == 1 else "channel"


def linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    thresholds: Tensor | None = None,
    indices: Tensor | None = None,
    kept: Tensor | None = None,
    *,
    layout: str = "out_in",
    block_size: int = 0,
    packed: str = "",
    keep: str = "none",
    threshold: float = 0.0,
    k: int = 0,
) -> Tensor:
    """The op, by kernels. Sets of channels (top_k, listed) are chosen by torch, thresholds are applied by the kernels.

    Scales of outputs multiply the sums, those of groups the weights: a sum of inputs times codes beyond float32 overflows.
    """
    if keep in ("top_k", "listed"):
        x = torch_gate(x, thresholds, indices, keep=keep, threshold=threshold, k=k)
        gate = Gate(sparse=True)
    else:
        gate = Gate(keep, threshold, None if thresholds is None else thresholds.contiguous(), keep != "none")
    held = stored(weight, scale, zero_point, layout=layout, block=block_size, packed=packed)
    y = product(
        x.reshape(x.shape[:-1].numel(), x.shape[-1]).contiguous(), held, bias, gate,
        None if kept is None else kept.reshape(x.shape[:-1].numel(), held.outputs), x.dtype,
    )  # fmt: skip
    return y.reshape(*x.shape[:-1], held.outputs)


def product(x: Tensor, held: Stored, bias: Tensor | None, gate: Gate, kept: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``where(kept != 0, gate(x) W + bias, 0)`` for ``x`` [tokens, inputs], in ``dtype``; the same bits in every run."""
    tokens = x.shape[0]
    y = x.new_empty((tokens, held.outputs), dtype=dtype)
    if not y.numel():
        return y
    bias = None if bias is None else bias.contiguous()
    if kept is not None:
        kept = kept.contiguous()
        kept = kept.view(torch.uint8) if kept.dtype == torch.bool else kept
    if not plan.few(tokens):
        _tiles(x, held, bias, gate, kept, y)
    elif held.out_in:
        _stream_out_in(x, held, bias, gate, kept, y)
    else:
        _stream_in_out(x, held, bias, gate, kept, y)
    return y


def _stream_out_in(x: Tensor, held: Stored, bias: Tensor | None, gate: Gate, kept: Tensor | None, y: Tensor) -> None:
    tokens = x.shape[0]
    p = plan.stream(tokens, held.outputs, held.inputs, out_in=True, device=x.device)
    target, length = _target(p, y, held.inputs)
    kernels.stream_out_in[(plan.ceil_div(held.outputs, p.outputs), p.parts)](
        x, held.weight, held.scale, held.zero, bias, kept, gate.thresholds, target, gate.threshold,
        tokens, held.inputs, held.outputs, held.weight.stride(0), held.groups, length,
        gate.sparse, gate.keep, gate.mode, held.form, held.packed,
        held.scale_mode, held.zero_mode, held.group, aligned(held.group), p.parts > 1,
        p.tokens, p.outputs, p.inputs, num_warps=p.warps,
    )  # fmt: skip
    _sum(p, target, held, bias, kept, y)


def _stream_in_out(x: Tensor, held: Stored, bias: Tensor | None, gate: Gate, kept: Tensor | None, y: Tensor) -> None:
    tokens = x.shape[0]
    indices = count = None
    if gate.sparse:
        x, indices, count = _compact(x, gate)
    p = plan.stream(tokens, held.outputs, held.inputs, out_in=False, device=x.device)
    target, length = _target(p, y, held.inputs)
    kernels.stream_in_out[(plan.ceil_div(held.outputs, p.outputs), p.parts)](
        x, held.weight, held.scale, held.zero, bias, kept, indices, count, target,
        tokens, held.inputs, held.outputs, held.weight.stride(0), held.groups, length,
        held.form, held.packed, held.scale_mode, held.zero_mode, held.group,
        aligned(held.group) and indices is None, p.parts > 1,
        p.tokens, p.outputs, p.inputs, num_warps=p.warps,
    )  # fmt: skip
    _sum(p, target, held, bias, kept, y)


def _compact(x: Tensor, gate: Gate) -> tuple[Tensor, Tensor, Tensor]:
    tokens, inputs = x.shape
    values = x.new_empty((tokens, inputs), dtype=torch.float32)
    indices = x.new_empty(inputs, dtype=torch.int32)
    count = x.new_empty(1, dtype=torch.int32)
    kernels.compact[(1,)](
        x, gate.thresholds, indices, values, count, gate.threshold, tokens, inputs,
        gate.keep, gate.mode, plan.power_of_two(tokens), _COMPACT, num_warps=8,
    )  # fmt: skip
    return values, indices, count


def _target(p: plan.Stream, y: Tensor, inputs: int) -> tuple[Tensor, int]:
    """Where a streamed product writes, and the inputs of a part (a multiple of the block)."""
    if p.parts == 1:
        return y, inputs
    length = plan.ceil_div(plan.ceil_div(inputs, p.parts), p.inputs) * p.inputs
    return y.new_empty((p.parts, *y.shape), dtype=torch.float32), length


def _sum(p: plan.Stream, parts: Tensor, held: Stored, bias: Tensor | None, kept: Tensor | None, y: Tensor) -> None:
    if p.parts > 1:
        kernels.sum_parts[(plan.ceil_div(held.outputs, _SUM_BLOCK),)](
            parts, y, held.scale, bias, kept, p.parts, y.shape[0], held.outputs, held.scale_mode, p.tokens, _SUM_BLOCK
        )  # fmt: skip


def _tiles(x: Tensor, held: Stored, bias: Tensor | None, gate: Gate, kept: Tensor | None, y: Tensor) -> None:
    tokens = x.shape[0]
    narrow = _narrow(x, held)
    after = held.scale_mode == "group" and narrow is not None and held.group >= 16 and aligned(held.group)
    if held.scale_mode == "group" and not after:
        narrow = None
    p = plan.tiles(tokens, narrow=narrow is not None)
    block = min(p.inputs, held.group) if after else p.inputs
    dot = tl.float32 if narrow is None else _DOTS[narrow]
    kernels.tiles[(plan.ceil_div(held.outputs, p.outputs), plan.ceil_div(tokens, p.tokens))](
        x, held.weight, held.scale, held.zero, bias, kept, gate.thresholds, y, gate.threshold,
        tokens, held.inputs, held.outputs, held.weight.stride(0), held.groups,
        gate.keep, gate.mode, held.form, held.packed,
        held.scale_mode, held.zero_mode, held.group, aligned(held.group), after,
        held.out_in, dot,
        p.tokens, p.outputs, block, num_warps=p.warps,
    )  # fmt: skip


def _narrow(x: Tensor, held: Stored) -> torch.dtype | None:
    """A half type that holds inputs and weights exactly, for the tensor cores; ``None``: float32."""
    if x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and not isinstance(kernels.tiles, triton.JITFunction)):
        return None  # Triton's interpreter multiplies the bits of bfloat16 as integers
    return x.dtype if held.codes or held.weight.dtype == x.dtype else None


def aligned(group: int) -> bool:
    """Whether tiles and groups divide one another (both are then powers of two)."""
    return group > 0 and group & (group - 1) == 0
