"""Keys and values of earlier tokens: caches that grow, caches of a fixed size that are written in place, 8-bit storage."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from actgraph.errors import VerifyError
from actgraph.ops.drawing import draws, integers, normal
from actgraph.ops.dtypes import COMPUTE_FLOATS, DType
from actgraph.ops.positions import check_axis
from actgraph.ops.registry import Attribute, Attributes, OpDef, Operand, Sample, Trait, register
from actgraph.ops.shapes import Shape, TensorType, dim_add

if TYPE_CHECKING:
    import torch

    from actgraph.ops.body import BodyBuilder, BodyValue

_STORED = COMPUTE_FLOATS | {DType.I8, DType.U8}
_ints = functools.partial(integers, kind=DType.I64)
_AXIS = Attribute("axis", "int", "the axis of the tokens", default=2)


def _check_like(op: str, cache: TensorType, new: TensorType, axis: int) -> None:
    check_axis(op, cache, axis)
    if cache.shape is None or new.shape is None:
        return
    if len(cache.shape) != len(new.shape):
        raise VerifyError(f"actgraph.{op}: {new} does not fit a cache {cache}")
    place = axis % len(cache.shape)
    for index, (old, size) in enumerate(zip(cache.shape, new.shape, strict=True)):
        if index != place and isinstance(old, int) and isinstance(size, int) and old != size:
            raise VerifyError(f"actgraph.{op}: {new} does not fit a cache {cache}: they differ in axis {index}")


# --- cache_append -----------------------------------------------------------------------------------------------------------

_APPEND_DOC = """
A cache that grows: ``cache`` and behind it, along ``axis``, the entries of the ``new`` tokens. The result has all of them.

Source: standard practice (incremental decoding); inserting it into a graph that has none: SparseML's key-value injection.
"""


def _append_infer(types: Sequence[TensorType | None], attributes: Attributes) -> list[TensorType]:
    cache, new = types
    assert cache is not None and new is not None
    axis = attributes["axis"]
    _check_like("cache_append", cache, new, axis)
    if cache.shape is None or new.shape is None:
        return [TensorType(cache.dtype, None)]
    place = axis % len(cache.shape)
    sizes = [b if a is None else a for a, b in zip(cache.shape, new.shape, strict=True)]
    sizes[place] = dim_add(cache.shape[place], new.shape[place])
    return [TensorType(cache.dtype, tuple(sizes))]


def _append(cache: torch.Tensor, new: torch.Tensor, *, axis: int = 2) -> torch.Tensor:
    import torch

    return torch.cat([cache, new], dim=axis)


def _append_body(b: BodyBuilder, operands: Sequence[BodyValue | None], attributes: Attributes) -> list[BodyValue]:
    cache, new = operands
    assert cache is not None and new is not None
    return [b.op("Concat", cache, new, attributes={"axis": attributes["axis"]})]


register(
    OpDef(
        name="cache_append",
        doc=_APPEND_DOC,
        inputs=(
            Operand("cache", "entries of earlier tokens, such as [batch, heads, past, head]", dtypes=_STORED),
            Operand("new", "entries of this call's tokens, [batch, heads, tokens, head]", dtypes=_STORED, same_as="cache"),
        ),
        outputs=("present",),
        infer=_append_infer,
        reference=_append,
        body=_append_body,
        attributes=(_AXIS,),
        traits=frozenset({Trait.STATEFUL, Trait.PER_SAMPLE}),
        min_opset=13,
        exact="bits",
        samples=(
            Sample(((2, 3, 5, 4), (2, 3, 1, 4)), dtypes=tuple(sorted(COMPUTE_FLOATS)), draw=draws(normal, normal)),
            Sample(((2, 3, 0, 4), (2, 3, 2, 4)), dtypes=(DType.F32,), draw=draws(normal, normal), note="nothing before"),
            Sample(((2, 3, 2, 4), (2, 3, 0, 4)), dtypes=(DType.F16,), draw=draws(normal, normal), note="nothing new"),
            Sample(((2, 3, 4), (2, 1, 4)), {"axis": 1}, dtypes=(DType.I8,),
                   draw=draws(integers(-9, 9, DType.I8), integers(-9, 9, DType.I8))),
        ),
    )
)  # fmt: skip

# --- cache_write ------------------------------------------------------------------------------------------------------------

_WRITE_DOC = """
A cache of fixed size with the entries of the ``new`` tokens written at ``start``, ``start + 1`` ... along ``axis``.

mode ``linear``: places are positions; writing behind the end is an error of the engine. ``ring``: place ``p mod size`` holds
position p, so that the last ``size`` tokens are kept; of more new tokens than that, the last ones. The rest of the cache
passes bit for bit, whatever it holds, so that an engine may write in place when nothing else reads ``cache``.

Source: preallocated caches: standard practice; rings: *Mistral 7B*, 2023 (rolling buffer cache).
"""


def _write_infer(types: Sequence[TensorType | None], attributes: Attributes) -> list[TensorType]:
    cache, new, start = types
    assert cache is not None and new is not None and start is not None
    _check_like("cache_write", cache, new, attributes["axis"])
    if start.shape not in (None, (), (1,)):
        raise VerifyError(f"actgraph.cache_write: start {start} must have one element")
    if attributes["mode"] == "linear" and cache.shape is not None and new.shape is not None:
        size, count = (shape[attributes["axis"]] for shape in (cache.shape, new.shape))
        if isinstance(size, int) and isinstance(count, int) and count > size:
            raise VerifyError(f"actgraph.cache_write: {count} tokens do not fit into a cache of {size}")
    sizes: Shape | None = cache.shape
    return [TensorType(cache.dtype, sizes)]


def _write(cache: torch.Tensor, new: torch.Tensor, start: torch.Tensor, *, axis: int = 2, mode: str = "linear") -> torch.Tensor:
    import torch

    size, count = cache.shape[axis], new.shape[axis]
    first = start.to(torch.int64).reshape(())
    place = first + torch.arange(count, dtype=torch.int64, device=cache.device)
    if mode == "ring":
        # Of several tokens for one place the last counts: an earlier one is aimed at the last one's source instead.
        source = torch.arange(count, dtype=torch.int64, device=cache.device)
        source = source + (count - 1 - source).div(size, rounding_mode="floor") * size
        new, place = new.index_select(axis, source), place % size
    return cache.index_copy(axis, place, new)


def _write_body(b: BodyBuilder, operands: Sequence[BodyValue | None], attributes: Attributes) -> list[BodyValue]:
    cache, new, start = operands
    assert cache is not None and new is not None and start is not None
    rank = b.rank_of(cache)
    axis = attributes["axis"] % rank
    size = b.size(cache, axis)
    first = b.reshape(b.cast(start, DType.I64), [1], 1)
    if attributes["mode"] == "ring":
        count = b.size(new, axis)
        kept = b.op("Min", count, size)
        new, first = b.slice(new, count - kept, count, axis), first + (count - kept)
    count = b.reshape(b.size(new, axis), [], 0)
    place = b.op("Range", b.const(0, DType.I64), count, b.const(1, DType.I64), rank=1) + first
    if attributes["mode"] == "ring":
        place = b.op("Mod", place, size)
    spread = b.unsqueeze(place, [a for a in range(rank) if a != axis])
    indices = b.op("Expand", spread, b.shape(new), rank=rank)
    return [b.op("ScatterElements", cache, indices, new, attributes={"axis": axis})]


_START = Operand("start", "the position of the first new token, [] or [1]", dtypes=frozenset({DType.I64, DType.I32}))

register(
    OpDef(
        name="cache_write",
        doc=_WRITE_DOC,
        inputs=(
            Operand("cache", "the entries so far, such as [batch, heads, size, head]", dtypes=_STORED),
            Operand("new", "entries of this call's tokens, [batch, heads, tokens, head]", dtypes=_STORED, same_as="cache"),
            _START,
        ),
        outputs=("present",),
        infer=_write_infer,
        reference=_write,
        body=_write_body,
        attributes=(
            _AXIS,
            Attribute("mode", "str", "what happens at the end of the cache", default="linear", choices=("linear", "ring")),
        ),
        traits=frozenset({Trait.STATEFUL, Trait.PER_SAMPLE, Trait.POSITION_AWARE}),
        min_opset=13,
        exact="bits",
        samples=(
            Sample(((2, 3, 8, 4), (2, 3, 1, 4), (1,)), dtypes=tuple(sorted(COMPUTE_FLOATS)),
                   draw=draws(normal, normal, _ints(0, 8))),
            Sample(((2, 3, 8, 4), (2, 3, 5, 4), ()), dtypes=(DType.F32,),
                   draw=draws(normal, normal, integers(0, 4, DType.I32))),
            Sample(((2, 3, 4, 4), (2, 3, 3, 4), (1,)), {"mode": "ring"}, dtypes=(DType.F32,),
                   draw=draws(normal, normal, _ints(6, 8)), note="around the end"),
            Sample(((1, 2, 4, 2), (1, 2, 11, 2), (1,)), {"mode": "ring"}, dtypes=(DType.F32,),
                   draw=draws(normal, normal, _ints(0, 9)), note="more tokens than places"),
            Sample(((2, 6, 4), (2, 2, 4), (1,)), {"axis": 1}, dtypes=(DType.I8,),
                   draw=draws(integers(-9, 9, DType.I8), integers(-9, 9, DType.I8), _ints(0, 4))),
            Sample(((1, 1, 1, 1), (1, 1, 1, 1), (1,)), dtypes=(DType.F32,), draw=draws(normal, normal, _ints(0, 1))),
            Sample(((1, 2, 4, 2), (1, 2, 0, 2), (1,)), dtypes=(DType.F32,), draw=draws(normal, normal, _ints(0, 4)),
                   note="nothing new"),
            Sample(((1, 2, 4, 2), (1, 2, 0, 2), (1,)), {"mode": "ring"}, dtypes=(DType.F32,),
                   draw=draws(normal, normal, _ints(0, 9)), note="nothing new in a ring"),
        ),
    )
)  # fmt: skip

# --- token_scale ------------------------------------------------------------------------------------------------------------

_SCALE_DOC = """
The scale of each token and head for storage in int8: ``max|x| / 127`` over the last axis, [..., 1] of float32, and 1 where
that is zero. ``x`` is finite. With it ``quantize`` and ``dequantize`` (whose block is the whole last axis) move no number by
more than half a scale.

Source: symmetric absmax per token: *ZeroQuant*, 2022.
"""


def _scale_infer(types: Sequence[TensorType | None], attributes: Attributes) -> list[TensorType]:
    x = types[0]
    assert x is not None
    check_axis("token_scale", x, -1)
    return [TensorType(DType.F32, None if x.shape is None else (*x.shape[:-1], 1))]


def _scale(x: torch.Tensor) -> torch.Tensor:
    import torch

    scale = x.to(torch.float32).abs().amax(-1, keepdim=True) / 127
    return torch.where(scale > 0, scale, torch.ones((), dtype=torch.float32, device=x.device))


def _scale_body(b: BodyBuilder, operands: Sequence[BodyValue | None], attributes: Attributes) -> list[BodyValue]:
    x = operands[0]
    assert x is not None
    largest = b.reduce("ReduceMax", b.op("Abs", b.cast(x, DType.F32)), [-1])
    scale = b.slice(largest, b.ints([0]), b.ints([1]), -1) / 127  # onnxruntime reduces nothing where there are no tokens
    return [b.where(scale > 0, scale, 1.0)]


register(
    OpDef(
        name="token_scale",
        doc=_SCALE_DOC,
        inputs=(Operand("x", "keys or values, such as [batch, heads, tokens, head]"),),
        outputs=("scale",),
        infer=_scale_infer,
        reference=_scale,
        body=_scale_body,
        traits=frozenset({Trait.PER_TOKEN}),
        min_opset=13,
        exact="values",
        differentiable=False,
        samples=(
            Sample(((2, 3, 5, 4),)),
            Sample(((2, 3, 0, 4),), note="no tokens"),
            Sample(((1, 2, 2, 3),), draw=draws(lambda rng, shape, dtype: normal(rng, shape, dtype) * 0), note="rows of zeros"),
            Sample(((4, 1),)),
        ),
    )
)
