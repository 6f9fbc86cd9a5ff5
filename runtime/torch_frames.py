"""Frames of recorded steps (see ``torch_recorded``): what they are, and those of what torch computes between kernels.

Values of a recorded step are tensors (and numbers) that stay where they are, or one of the classes here.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from actgraph.errors import InputError
from actgraph.graph.graph import Array
from actgraph.runtime.kernels.numba import activations
from actgraph.runtime.kernels.numba.objects import loaded
from actgraph.runtime.kernels.numba.plain import PLAIN
from actgraph.runtime.native.library import Variant
from actgraph.runtime.state import TOKENS
from actgraph.runtime.torch_lowering import append, front, write, write_front

aten = torch.ops.aten
#: A word that is not taken modulo anything.
ENDLESS = 1 << 62


# --- values -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Count:
    """The number of tokens that are held before the step, and ``more``."""

    more: int = 0

    def now(self, used: int) -> int:
        return used + self.more


@dataclass(frozen=True, eq=False)
class Front:
    """The entries of that many tokens in a slot's buffer."""

    buffer: torch.Tensor
    count: Count

    def now(self, used: int) -> torch.Tensor:
        return front(self.buffer, self.count.now(used))


@dataclass(frozen=True, eq=False)
class Growing:
    """A contiguous tensor with an entry for each token along an axis, the new one too. memory: for as many as there may be."""

    memory: torch.Tensor
    shape: tuple[int, ...]  # in the step that was recorded
    axis: int

    @property
    def each(self) -> int:
        """Elements for each token."""
        return int(np.prod([size for axis, size in enumerate(self.shape) if axis != self.axis]))

    def now(self, used: int) -> torch.Tensor:
        shape = (*self.shape[: self.axis], used + 1, *self.shape[self.axis + 1 :])
        return self.memory[: self.each * (used + 1)].view(shape)

    def viewed(self, shape: Sequence[int]) -> Growing | None:
        """The same elements in another shape of that step; ``None`` where it does not tell which axis grows."""
        axes = [axis for axis, size in enumerate(shape) if size == self.shape[self.axis]]
        return Growing(self.memory, tuple(shape), axes[0]) if len(axes) == 1 else None


@dataclass(eq=False)
class Changing:
    """What Python computes anew in each step. words: where its address stands in the frames.

    sized: all who read it take it in other sizes.
    """

    value: Any
    sized: bool = True
    words: list[int] = field(default_factory=list)
    index: Array | None = None  # the same, as an index

    def now(self, used: int) -> Any:
        return self.value


MOVING = (Count, Front, Growing, Changing)


# --- frames -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moving:
    """A word that is ``step * (tokens held modulo cycle)`` more than in an empty slot."""

    word: int
    step: int
    cycle: int = ENDLESS


@dataclass(frozen=True, eq=False)
class OfSlot:
    """A word that depends on where a slot's buffer is, or (room: how much) on for how many tokens it has room."""

    word: int
    buffer: torch.Tensor
    room: int = 0


@dataclass(eq=False)
class Frame:
    """A frame to be: its variant, its words, and the texts of its errors. kept: memory that it alone refers to."""

    variant: Variant
    words: Array
    failed: Callable[[int], None]
    moving: list[Moving] = field(default_factory=list)
    of_slots: list[OfSlot] = field(default_factory=list)
    changing: list[tuple[int, Changing]] = field(default_factory=list)
    product: Any = None  # of products: equal for those that can be computed together
    prepares: Any = None  # equal for those that prepare x in the same way
    kept: tuple[Any, ...] = ()


Made = tuple[list[Frame], Any]


def _plain(name: str, *words: int, kept: Sequence[Any] = (), moving: Sequence[Moving] = ()) -> Frame:
    """A frame of one of the functions of ``plain``, with its words from 4 on."""
    variant = Variant()
    variant.stages = 1
    variant.stage[0] = loaded(f"plain_{name}", PLAIN[name])
    return Frame(variant, np.array([0, 0, 0, 0, *words], np.int64), _never, list(moving), kept=tuple(kept))


def _never(error: int) -> None:
    if error:
        raise RuntimeError(f"a function without errors gave {error}")


def _no_row(error: int) -> None:
    if error:
        raise InputError("a token or position is looked up that the table does not have")


def frames_of(target: Any, args: Sequence[Any], options: Mapping[str, Any], used: int) -> Made | None:
    """Frames for a call of a torch function, and its result. ``None`` where Python has to compute it.

    used: the tokens that are held before the step.
    """
    make = _FUNCTIONS.get(target)
    return make(args, options, used) if make is not None else None


# --- slots --------------------------------------------------------------------------------------------------------------------


def _write(args: Sequence[Any], options: Mapping[str, Any], used: int, whole: bool = False) -> Made | None:
    """The entry of the new token, behind those that a slot holds (in a ring over the oldest one)."""
    buffer, new = args[0], args[1]
    if not isinstance(buffer, torch.Tensor) or not isinstance(new, torch.Tensor) or not new.is_contiguous():
        return None
    if not buffer.is_contiguous() or new.dtype != buffer.dtype or new.shape[TOKENS] != 1 or not isinstance(args[2], Count):
        return None
    if new.shape[:TOKENS] != buffer.shape[:TOKENS] or new.shape[TOKENS + 1 :] != buffer.shape[TOKENS + 1 :]:
        return None
    entry, room = buffer.stride(TOKENS) * buffer.element_size(), buffer.shape[TOKENS]
    rows = new.numel() * new.element_size() // entry
    cycle = room if whole and args[3] == "ring" else ENDLESS
    frame = _plain(
        "copy_rows", new.data_ptr(), buffer.data_ptr() + used % cycle * entry, rows, entry, entry, entry * room, 1, 0, 0,
        moving=[Moving(5, entry, cycle)],
    )  # fmt: skip
    frame.of_slots += [OfSlot(5, buffer), OfSlot(9, buffer, room=entry)]
    return [frame], buffer if whole else Front(buffer, Count(1))


# --- arithmetic ---------------------------------------------------------------------------------------------------------------


def _levels(shape: Sequence[int], strides: Sequence[Sequence[int]], most: int = 2) -> list[tuple[int, list[int]]] | None:
    """Operands as ``most`` nested loops, of which the last goes from number to number: how often, and the step of each operand.

    ``None`` where that is not enough, or a last step is more than 1.
    """
    axes: list[tuple[int, list[int]]] = []
    for axis, size in enumerate(shape):
        if size == 1:
            continue
        steps = [stride[axis] for stride in strides]
        if axes and all(outer == inner * size for outer, inner in zip(axes[-1][1], steps, strict=True)):
            axes[-1] = (axes[-1][0] * size, steps)
        else:
            axes.append((size, steps))
    if len(axes) > most or 0 in shape:
        return None
    axes = [(1, [0] * len(strides))] * (most - len(axes)) + axes
    if axes[-1][0] == 1:
        axes[-1] = (1, [1] * len(strides))
    return None if any(step > 1 for step in axes[-1][1]) else axes


def _pairs(name: str) -> Callable[..., Made | None]:
    def make(args: Sequence[Any], options: Mapping[str, Any], used: int) -> Made | None:
        if options or len(args) != 2:
            return None
        dtype = next((value.dtype for value in args if isinstance(value, torch.Tensor)), None)
        whole = dtype is torch.int64 and name in ("add", "subtract") and not any(type(value) is float for value in args)
        if dtype is not torch.float32 and not whole:
            return None
        a, b = (torch.tensor(value, dtype=dtype) if isinstance(value, (int, float)) else value for value in args)
        if not all(isinstance(value, torch.Tensor) and value.dtype is dtype for value in (a, b)):
            return None
        shape = np.broadcast_shapes(a.shape, b.shape)
        levels = _levels(shape, [a.expand(shape).stride(), b.expand(shape).stride()])
        if levels is None:
            return None
        (rows, outer), (length, inner) = levels
        result = torch.empty(shape, dtype=dtype)
        function = name if dtype is torch.float32 else f"{name}_i64"
        frame = _plain(
            function,
            a.data_ptr(),
            b.data_ptr(),
            result.data_ptr(),
            rows,
            length,
            outer[0],
            inner[0],
            outer[1],
            inner[1],
            kept=[a, b, result],
        )
        return [frame], result

    return make


def _clamp(args: Sequence[Any], options: Mapping[str, Any], used: int) -> Made | None:
    """Within bounds: numbers, or tensors."""
    x, *given = args
    bounds = {**dict(zip(("min", "max"), given, strict=False)), **options}
    if len(given) + len(options) != len(bounds) or set(bounds) - {"min", "max"}:
        return None
    frames: list[Frame] = []
    for name, function in (("min", "larger"), ("max", "smaller")):
        if bounds.get(name) is not None:
            made = _pairs(function)([x, bounds[name]], {}, used)
            if made is None:
                return None
            frames, x = [*frames, *made[0]], made[1]
    return (frames, x) if frames else None


def _each(name: str) -> Callable[..., Made | None]:
    def make(args: Sequence[Any], options: Mapping[str, Any], used: int) -> Made | None:
        x = args[0]
        if options or len(args) != 1 or not isinstance(x, torch.Tensor) or x.dtype is not torch.float32:
            return None
        levels = _levels(x.shape, [x.stride()])
        if levels is None or levels[-1][1] != [1]:
            return None
        (rows, (step,)), (length, _) = levels
        result = torch.empty(x.shape)
        return [_plain(name, x.data_ptr(), result.data_ptr(), rows, length, step, kept=[x, result])], result

    return make


def _sum(args: Sequence[Any], options: Mapping[str, Any], used: int) -> Made | None:
    """Over the last axis."""
    x, axes = args[0], args[1] if len(args) > 1 else None
    if options or not isinstance(x, torch.Tensor) or x.dtype is not torch.float32 or not x.is_contiguous() or not x.dim():
        return None
    if not isinstance(axes, (list, tuple)) or list(axes) not in ([-1], [x.dim() - 1]):
        return None
    length = x.shape[-1]
    result = torch.empty((*x.shape[:-1], 1) if len(args) > 2 and args[2] else x.shape[:-1])
    return [_plain("sum_rows", x.data_ptr(), result.data_ptr(), result.numel(), length, kept=[x, result])], result


def _power(args: Sequence[Any], options: Mapping[str, Any], used: int) -> Made | None:
    name = {2.0: "square", 3.0: "cube"}.get(float(args[1])) if isinstance(args[1], (int, float)) else None
    return _each(name)(args[:1], options, used) if name is not None else None


def _activation(args: Sequence[Any], options: Mapping[str, Any], used: int, which: int | None = None) -> Made | None:
    x = args[0]
    if which is None:
        which = _GELUS[str(options.get("approximate", "none"))]
    elif any(options.values()):
        return None
    if len(args) != 1 or not isinstance(x, torch.Tensor) or x.dtype is not torch.float32 or not x.is_contiguous():
        return None
    result = torch.empty_like(x)
    return [_plain("activation", x.data_ptr(), result.data_ptr(), x.numel(), which, kept=[x, result])], result


# --- copies -------------------------------------------------------------------------------------------------------------------


def _copy_of(x: torch.Tensor, result: torch.Tensor) -> Frame | None:
    """Copies ``x`` to a contiguous tensor of its shape."""
    loops = _levels(x.shape, [x.stride()], 3)
    if loops is None or loops[-1][1] != [1]:
        return None
    (outer, (far,)), (rows, (near,)), (length, _) = loops
    size = x.element_size()
    row = length * size
    return _plain(
        "copy_rows", x.data_ptr(), result.data_ptr(), rows, row, near * size, row, outer, far * size, rows * row,
        kept=[x, result],
    )  # fmt: skip


def _copy(args: Sequence[Any], options: Mapping[str, Any], used: int) -> Made | None:
    """A contiguous copy."""
    x = args[0]
    if not isinstance(x, torch.Tensor) or set(options) - {"memory_format"}:
        return None
    if options.get("memory_format") not in (None, torch.contiguous_format, torch.preserve_format):
        return None
    result = torch.empty(x.shape, dtype=x.dtype)
    frame = _copy_of(x, result)
    return ([frame], result) if frame is not None else None


def _reshape(args: Sequence[Any], options: Mapping[str, Any], used: int) -> Made | None:
    """What has no view in that shape."""
    x, shape = args[0], [now(size, used) for size in args[1]]
    if (
        not isinstance(x, torch.Tensor)
        or torch.reshape(x, shape).untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    ):
        return None
    made = _copy([x], options, used)
    return (made[0], made[1].view(shape)) if made is not None else None


def _convert(args: Sequence[Any], options: Mapping[str, Any], used: int) -> Made | None:
    x, dtype = args[0], options.get("dtype")
    source = x.memory if isinstance(x, Growing) else x
    if len(args) != 1 or not isinstance(source, torch.Tensor) or not source.is_contiguous():
        return None
    if any(value is not None and name != "dtype" and value != torch.device("cpu") for name, value in options.items()):
        return None
    name = _CONVERSIONS.get((source.dtype, dtype))
    if name is None:
        return None
    result = torch.empty(source.shape, dtype=dtype)
    if isinstance(x, Growing):
        frame = _plain(name, source.data_ptr(), result.data_ptr(), x.each * (used + 1), moving=[Moving(6, x.each)])
        return [frame], Growing(result, x.shape, x.axis)
    return [_plain(name, source.data_ptr(), result.data_ptr(), source.numel(), kept=[source, result])], result


def _cat(args: Sequence[Any], options: Mapping[str, Any], used: int) -> Made | None:
    pieces, axis = args[0], args[1] if len(args) > 1 else options.get("dim", 0)
    if not all(isinstance(piece, torch.Tensor) for piece in pieces):
        return None
    if len({piece.dtype for piece in pieces}) > 1 or len({piece.dim() for piece in pieces}) > 1:
        return None
    axis %= pieces[0].dim()
    shape = (*pieces[0].shape[:axis], sum(piece.shape[axis] for piece in pieces), *pieces[0].shape[axis + 1 :])
    result = torch.empty(shape, dtype=pieces[0].dtype)
    frames, at, size = [], result.data_ptr(), result.element_size()
    rows = int(np.prod(shape[:axis]))
    for piece in pieces:
        # as rows of the result: what has no such view is copied first
        lines = piece.reshape(rows, -1)
        if lines.numel() and lines.data_ptr() != piece.data_ptr():
            made = _copy([piece], {}, used)
            if made is None:
                return None
            frames += made[0]
            lines = made[1].view(rows, -1)
        length = lines.shape[1] * size
        words = (rows, length, lines.stride(0) * size, result.numel() // max(rows, 1) * size, 1, 0, 0)
        if lines.stride(1) != 1 and lines.shape[1] > 1:
            return None
        frames.append(_plain("copy_rows", lines.data_ptr(), at, *words, kept=[lines, result]))
        at += length
    return frames, result


def _look_up(args: Sequence[Any], options: Mapping[str, Any], used: int) -> Made | None:
    table, places = args[0], args[1]
    if not isinstance(table, torch.Tensor) or not isinstance(places, torch.Tensor) or places.dtype is not torch.int64:
        return None
    if options or not table.is_contiguous() or not places.is_contiguous() or table.dim() != 2:
        return None
    result = torch.empty((*places.shape, table.shape[1]), dtype=table.dtype)
    width = table.shape[1] * table.element_size()
    frame = _plain(
        "look_up", table.data_ptr(), places.data_ptr(), result.data_ptr(), places.numel(), width, len(table),
        kept=[table, places, result],
    )  # fmt: skip
    frame.failed = _no_row
    return [frame], result


_GELUS = {"none": activations.GELU, "tanh": activations.GELU_TANH}
_CONVERSIONS: dict[tuple[torch.dtype, Any], str] = {
    (torch.int64, torch.float32): "i64_to_f32", (torch.int64, torch.bool): "i64_to_bool",
    (torch.float32, torch.bool): "f32_to_bool", (torch.bool, torch.float32): "bool_to_f32",
    (torch.float32, torch.float16): "f32_to_f16", (torch.float16, torch.float32): "f16_to_f32",
}  # fmt: skip


def _is(which: int) -> Callable[..., Made | None]:
    return lambda args, options, used: _activation(args, options, used, which)


_FUNCTIONS: dict[Any, Callable[..., Made | None]] = {
    append: _write, write_front: _write, write: lambda args, options, used: _write(args, options, used, whole=True),
    torch.add: _pairs("add"), torch.sub: _pairs("subtract"), torch.mul: _pairs("multiply"), torch.div: _pairs("divide"),
    torch.neg: _each("negate"), torch.cos: _each("cosine"), torch.sin: _each("sine"), torch.tanh: _each("tanh"),
    torch.rsqrt: _each("inverse_root"), aten.exp.default: _each("exp"), aten.sigmoid.default: _each("sigmoid"),
    torch.pow: _power, functional.silu: _is(activations.SILU), aten.relu.default: _is(activations.RELU),
    aten.gelu.default: _activation, aten.clone.default: _copy, torch.reshape: _reshape, aten._to_copy.default: _convert,
    torch.cat: _cat, torch.embedding: _look_up, aten.clamp.default: _clamp, aten.clamp.Tensor: _clamp,
    aten.sum.dim_IntList: _sum,
}  # fmt: skip


#: Functions whose frames take contiguous operands.
CONTIGUOUS = (
    append, write, write_front, functional.silu, aten.relu.default, aten.gelu.default, aten._to_copy.default, torch.embedding,
)  # fmt: skip


# --- what needs no frame ------------------------------------------------------------------------------------------------------

#: What depends on shapes alone.
SIZES = (aten.sym_size.int, aten.sym_numel.default, aten.sym_stride.int)
#: What makes tensors of numbers alone.
MAKERS = (
    aten.arange.default, aten.arange.start, aten.arange.start_step, aten.zeros.default, aten.ones.default, aten.full.default,
    aten.scalar_tensor.default,
)  # fmt: skip
_VIEWS = (torch.reshape, torch.unsqueeze, aten.view.default, aten.squeeze.dim)


def known(target: Any, args: Sequence[Any], used: int) -> Any:
    """What a call gives that only counts tokens, or views what grows with them; ``None`` for others."""
    first = args[0] if args else None
    if target is front and isinstance(first, torch.Tensor) and isinstance(args[1], Count):
        return Front(first, args[1])
    if target is aten.sym_size.int and isinstance(first, (Front, Growing)):
        grows = first.axis if isinstance(first, Growing) else TOKENS
        count = Count(1) if isinstance(first, Growing) else first.count
        shape = first.shape if isinstance(first, Growing) else first.buffer.shape
        return count if args[1] % len(shape) == grows else int(shape[args[1]])
    if target is operator.add and len(args) == 2:
        counts = [value for value in args if isinstance(value, Count)]
        if len(counts) == 1 and all(isinstance(value, (int, Count)) for value in args):
            return Count(counts[0].more + next(value for value in args if not isinstance(value, Count)))
    if target in _VIEWS and isinstance(first, Growing):
        plain = [[now(v, used) for v in value] if isinstance(value, (list, tuple)) else now(value, used) for value in args]
        return first.viewed(target(*plain).shape)
    return None


def now(value: Any, used: int) -> Any:
    """A value in the step before which ``used`` tokens are held."""
    return value.now(used) if isinstance(value, MOVING) else value
