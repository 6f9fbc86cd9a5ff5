"""How operands line up with an activation: the channel axis, and the token axes around it.

Ops take ``axis``, the channel axis of ``x`` (-1 for tokens by channels, 1 or -3 for NCHW). Two kinds of side operand:

- *channel operands* (a steering vector, per-channel thresholds): rank 1 means one number per channel, laid along
  ``axis``; rank 0 means one number; any other rank broadcasts against ``x`` as it is.
- *token operands* (a mask, a run-time strength): shaped like ``x`` without its channel axis (or broadcastable to that),
  so a mask is ``[batch, seq]`` for ``x`` of ``[batch, seq, channels]`` and ``[1]`` means "the same for all".

Each helper exists for torch, for ONNX bodies and for symbolic shapes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from actgraph.errors import VerifyError
from actgraph.ops.dtypes import COMPUTE_FLOATS, DType
from actgraph.ops.registry import Attribute, Operand
from actgraph.ops.shapes import Dim, Shape, TensorType

if TYPE_CHECKING:
    import torch

    from actgraph.ops.body import BodyBuilder, BodyValue


AXIS = Attribute("axis", "int", "channel axis of x: -1 for [batch, seq, channels], 1 for NCHW", default=-1)
MASK = Operand(
    "mask",
    "one value per token (shape of x without its channel axis, or broadcastable to it); false or 0 leaves the token "
    "bit for bit as it is",
    dtypes=COMPUTE_FLOATS | {DType.BOOL, DType.I64, DType.I32},
    optional=True,
)


def from_end(axis: int, rank: int) -> int:
    """``axis`` counted from the end (negative). Raises VerifyError when ``x`` has no such axis."""
    result = axis - rank if axis >= 0 else axis
    if not -rank <= result < 0:
        raise VerifyError(f"axis {axis} does not exist in a tensor of rank {rank}")
    return result


# --- torch ----------------------------------------------------------------------------------------------------------------


def torch_compute(x: torch.Tensor) -> torch.Tensor:
    """``x`` in the type that references compute in: float64 stays, all else becomes float32."""
    import torch

    return x if x.dtype == torch.float64 else x.to(torch.float32)


def torch_channels(operand: torch.Tensor, axis: int) -> torch.Tensor:
    """A channel operand, shaped to broadcast against ``x`` whose channel axis is ``axis`` (negative)."""
    return operand.reshape(operand.shape + (1,) * (-axis - 1)) if operand.dim() == 1 else operand


def torch_tokens(operand: torch.Tensor, axis: int) -> torch.Tensor:
    """A token operand, shaped to broadcast against ``x`` whose channel axis is ``axis`` (negative)."""
    return operand.unsqueeze(axis) if operand.dim() >= -axis else operand


def torch_edit(h: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor | float | None) -> torch.Tensor:
    """``h + weight * delta``, and ``h`` bit for bit where the weight is 0 (whatever ``delta`` holds).

    Subtracting +0.0 is the one neutral step of IEEE arithmetic that keeps -0.0 and needs no signed zero to be made.
    """
    import torch

    if weight is None or isinstance(weight, float):
        return h if weight == 0 else h + (delta if weight is None else weight * delta)
    return h - torch.where(weight != 0, -weight * delta, torch.zeros((), dtype=h.dtype, device=h.device))


# --- ONNX bodies ------------------------------------------------------------------------------------------------------------


def body_axis(b: BodyBuilder, axis: int, x: BodyValue) -> int:
    """``axis`` counted from the end; a negative one needs no rank."""
    return axis if axis < 0 and x.rank is None else from_end(axis, b.rank_of(x))


def body_channels(b: BodyBuilder, operand: BodyValue, axis: int) -> BodyValue:
    """As ``torch_channels``."""
    return b.unsqueeze(operand, range(1, -axis)) if b.rank_of(operand) == 1 else operand


def body_tokens(b: BodyBuilder, operand: BodyValue, axis: int) -> BodyValue:
    """As ``torch_tokens``."""
    return b.unsqueeze(operand, [axis]) if b.rank_of(operand) >= -axis else operand


def body_edit(b: BodyBuilder, h: BodyValue, delta: BodyValue, weight: BodyValue | None) -> BodyValue:
    """As ``torch_edit``. Selecting between ``h`` and the edit would not do: see ``BodyBuilder.where``."""
    if weight is None:
        return h + delta
    on = b.op("Not", weight.equal(0))
    return h - b.where(on, b.op("Neg", weight) * delta, 0.0)


def body_to_last(b: BodyBuilder, h: BodyValue, axis: int) -> tuple[BodyValue, list[int]]:
    """``h`` with the channel axis last, and the permutation that undoes it (empty where nothing moved)."""
    if axis == -1:
        return h, []
    rank = b.rank_of(h)
    perm = [i for i in range(rank) if i != rank + axis] + [rank + axis]
    inverse = [perm.index(i) for i in range(rank)]
    return b.transpose(h, perm), inverse


def body_groups(b: BodyBuilder, h: BodyValue, place: int, group: int) -> BodyValue:
    """``h`` with axis ``place`` split into groups of ``group``."""
    shape = b.shape(h)
    sizes = [b.slice(shape, b.ints([0]), b.ints([place]), 0)] if place else []
    sizes += [b.op("Div", b.size(h, place), b.ints([group])), b.ints([group])]
    if place + 1 < b.rank_of(h):
        sizes.append(b.slice(shape, b.ints([place + 1]), b.ints([b.rank_of(h)]), 0))
    return b.reshape(h, b.concat(sizes), b.rank_of(h) + 1, allowzero=True)


# --- symbolic shapes --------------------------------------------------------------------------------------------------------


def check_into(op: str, name: str, shape: Shape | None, target: Shape | None) -> None:
    """Raise VerifyError unless ``shape`` broadcasts to ``target`` without enlarging it (unknown sizes pass)."""
    if shape is None or target is None:
        return
    short = len(shape) <= len(target)
    if not short or any(not _fits(a, b) for a, b in zip(reversed(shape), reversed(target), strict=False)):
        raise VerifyError(f"actgraph.{op}: {name} of shape {_text(shape)} does not broadcast to {_text(target)}")


def check_tokens(op: str, name: str, x: TensorType, operand: TensorType | None, axis: int) -> None:
    """Check a token operand against ``x``. Raises VerifyError."""
    if operand is None or operand.shape is None or x.shape is None:
        return
    place = from_end(axis, len(x.shape)) + len(x.shape)
    check_into(op, f"{name} (one value per token)", operand.shape, x.shape[:place] + x.shape[place + 1 :])


def check_channels(op: str, name: str, x: TensorType, operand: TensorType | None, axis: int) -> None:
    """Check a channel operand against ``x``. Raises VerifyError."""
    if operand is None or operand.shape is None or x.shape is None:
        return
    place = from_end(axis, len(x.shape))
    if len(operand.shape) == 1:
        check_into(op, f"{name} (one value per channel)", operand.shape, (x.shape[place],))
    else:
        check_into(op, name, operand.shape, x.shape)


def check_basis(op: str, x: TensorType, basis: TensorType, axis: int) -> None:
    """Check directions ``[channels, r]`` against ``x``. Raises VerifyError."""
    if basis.shape is None or x.shape is None:
        return
    channels = x.shape[from_end(axis, len(x.shape))]
    if len(basis.shape) != 2 or (isinstance(channels, int) and isinstance(basis.shape[0], int) and channels != basis.shape[0]):
        raise VerifyError(f"actgraph.{op}: basis {basis} must be [channels, r] with the {channels} channels of x")


Operands = Mapping[str, TensorType | None]


def check_operands(
    op: str, x: TensorType, axis: int, *, channels: Operands | None = None, tokens: Operands | None = None
) -> None:
    """Check the channel and the token operands of an op, by name, against ``x``. Raises VerifyError at the first mismatch."""
    for name, operand in (channels or {}).items():
        check_channels(op, name, x, operand, axis)
    for name, operand in (tokens or {}).items():
        check_tokens(op, name, x, operand, axis)


def same_as_x(types: Sequence[TensorType | None]) -> list[TensorType]:
    """The output type of ops that keep the type of their first operand."""
    x = types[0]
    assert x is not None
    return [x]


def _fits(size: Dim, target: Dim) -> bool:
    if size == 1 or size is None or target is None or size == target:
        return True
    return not (isinstance(size, int) and isinstance(target, int))


def _text(shape: Sequence[Any]) -> str:
    return f"[{', '.join('?' if d is None else str(d) for d in shape)}]"
