"""Positions of tokens when a call sees only some of them: counting on from a start, in a ring, and who may see whom."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from actgraph.errors import VerifyError
from actgraph.ops.drawing import boolean, draws, integers, normal
from actgraph.ops.dtypes import COMPUTE_FLOATS, DType
from actgraph.ops.registry import Attribute, Attributes, OpDef, Operand, Sample, Trait, register
from actgraph.ops.shapes import Dim, TensorType, dim_add

if TYPE_CHECKING:
    import torch

    from actgraph.ops.body import BodyBuilder, BodyValue

_INTEGERS = frozenset({DType.I64, DType.I32})
_ANY = COMPUTE_FLOATS | {DType.I64, DType.I32, DType.I8, DType.U8, DType.BOOL}
_ints = functools.partial(integers, kind=DType.I64)
_AXIS = Attribute("axis", "int", "the axis that is counted")


def check_axis(op: str, x: TensorType, axis: int) -> None:
    """Raise VerifyError for an axis that ``x`` does not have."""
    if x.shape is not None and not -len(x.shape) <= axis < len(x.shape):
        raise VerifyError(f"actgraph.{op}: {x} has no axis {axis}")


# --- length -----------------------------------------------------------------------------------------------------------------

_LENGTH_DOC = """
The size of ``x`` along ``axis``, as a tensor [1] of int64: how many tokens a cache holds, for ops that count on from there.

Source: standard practice (incremental decoding).
"""


def _length_infer(types: Sequence[TensorType | None], attributes: Attributes) -> list[TensorType]:
    x = types[0]
    assert x is not None
    check_axis("length", x, attributes["axis"])
    return [TensorType(DType.I64, (1,))]


def _length(x: torch.Tensor, *, axis: int) -> torch.Tensor:
    import torch

    return torch.full((1,), x.shape[axis], dtype=torch.int64, device=x.device)


def _length_body(b: BodyBuilder, operands: Sequence[BodyValue | None], attributes: Attributes) -> list[BodyValue]:
    x = operands[0]
    assert x is not None
    return [b.size(x, attributes["axis"])]


register(
    OpDef(
        name="length",
        doc=_LENGTH_DOC,
        inputs=(Operand("x", "any tensor", dtypes=_ANY),),
        outputs=("n",),
        infer=_length_infer,
        reference=_length,
        body=_length_body,
        attributes=(_AXIS,),
        traits=frozenset({Trait.POSITION_AWARE}),
        min_opset=13,
        exact="bits",
        differentiable=False,
        samples=(
            Sample(((2, 3, 5),), {"axis": 1}, dtypes=(DType.F32, DType.F16), draw=draws(normal)),
            Sample(((2, 0),), {"axis": 1}, dtypes=(DType.F32,), draw=draws(normal), note="empty"),
            Sample(((4, 1, 2),), {"axis": -1}, dtypes=(DType.BOOL,), draw=draws(boolean)),
            Sample(((7,),), {"axis": 0}, dtypes=(DType.F32,), draw=draws(normal)),
        ),
    )
)

# --- positions --------------------------------------------------------------------------------------------------------------

_POSITIONS_DOC = """
``start, start + 1, start + 2 ...``: as many as ``x`` is long along ``axis``, [length] of int64. Without ``start`` it is 0.

``x`` gives only its size. With ``start`` the number of tokens before, these are the positions of a call's own tokens.

Source: standard practice (incremental decoding).
"""


def _positions_infer(types: Sequence[TensorType | None], attributes: Attributes) -> list[TensorType]:
    x, start = types
    assert x is not None
    check_axis("positions", x, attributes["axis"])
    if start is not None and start.shape not in (None, (), (1,)):
        raise VerifyError(f"actgraph.positions: start {start} must have one element")
    size: Dim = x.shape[attributes["axis"]] if x.shape is not None else None
    return [TensorType(DType.I64, (size,))]


def _positions(x: torch.Tensor, start: torch.Tensor | None = None, *, axis: int) -> torch.Tensor:
    import torch

    counted = torch.arange(x.shape[axis], dtype=torch.int64, device=x.device)
    return counted if start is None else counted + start.to(torch.int64).reshape(())


def _positions_body(b: BodyBuilder, operands: Sequence[BodyValue | None], attributes: Attributes) -> list[BodyValue]:
    x, start = operands
    assert x is not None
    size = b.reshape(b.size(x, attributes["axis"]), [], 0)
    counted = b.op("Range", b.const(0, DType.I64), size, b.const(1, DType.I64), rank=1)
    return [counted if start is None else counted + b.reshape(b.cast(start, DType.I64), [1], 1)]


register(
    OpDef(
        name="positions",
        doc=_POSITIONS_DOC,
        inputs=(
            Operand("x", "any tensor: its size is used", dtypes=_ANY),
            Operand("start", "the first position, [] or [1]", dtypes=_INTEGERS, optional=True),
        ),
        outputs=("positions",),
        infer=_positions_infer,
        reference=_positions,
        body=_positions_body,
        attributes=(_AXIS,),
        traits=frozenset({Trait.POSITION_AWARE}),
        min_opset=13,
        exact="bits",
        differentiable=False,
        samples=(
            Sample(((2, 3, 5), None), {"axis": 1}, dtypes=(DType.F32,), draw=draws(normal, None)),
            Sample(((2, 3, 5), (1,)), {"axis": -1}, dtypes=(DType.F16,), draw=draws(normal, _ints(0, 100))),
            Sample(
                ((2, 0), ()), {"axis": 1}, dtypes=(DType.F32,), draw=draws(normal, integers(0, 9, DType.I32)), note="no tokens"
            ),
            Sample(((1, 1), (1,)), {"axis": 0}, dtypes=(DType.F32,), draw=draws(normal, _ints(7, 8))),
        ),
    )
)

# --- ring_positions ---------------------------------------------------------------------------------------------------------

_RING_DOC = """
Which positions the places of a ring of ``size`` hold when ``start`` tokens were written before, and behind them the positions
``start, start + 1 ...`` of the new tokens: [size + tokens] of int64, the keys of a call that reads the ring and then writes.

Place j holds the last position before ``start`` that is j modulo ``size``: ``p = last - (last - j) mod size`` with
``last = start - 1``; below 0 it holds nothing, which ``position_mask`` hides. With ``written`` it is the ring once the new
tokens are in it (``last = start + tokens - 1``), and nothing behind it: [size]. ``x`` gives only the number of new tokens.

Source: *Mistral 7B*, 2023 (rolling buffer cache).
"""


def _ring_infer(types: Sequence[TensorType | None], attributes: Attributes) -> list[TensorType]:
    x, start = types
    assert x is not None and start is not None
    check_axis("ring_positions", x, attributes["axis"])
    if attributes["size"] < 1:
        raise VerifyError(f"actgraph.ring_positions: size is {attributes['size']}", "a ring has at least one place")
    if start.shape not in (None, (), (1,)):
        raise VerifyError(f"actgraph.ring_positions: start {start} must have one element")
    tokens: Dim = x.shape[attributes["axis"]] if x.shape is not None else None
    return [TensorType(DType.I64, (attributes["size"] if attributes["written"] else dim_add(attributes["size"], tokens),))]


def _ring(x: torch.Tensor, start: torch.Tensor, *, axis: int, size: int, written: bool = False) -> torch.Tensor:
    import torch

    first, count = start.to(torch.int64).reshape(()), x.shape[axis]
    last = (first + count if written else first) - 1
    held = last - torch.remainder(last - torch.arange(size, dtype=torch.int64, device=x.device), size)
    return held if written else torch.cat([held, first + torch.arange(count, dtype=torch.int64, device=x.device)])


def _ring_body(b: BodyBuilder, operands: Sequence[BodyValue | None], attributes: Attributes) -> list[BodyValue]:
    x, start = operands
    assert x is not None and start is not None
    size, written = attributes["size"], attributes["written"]
    first, count = b.reshape(b.cast(start, DType.I64), [1], 1), b.size(x, attributes["axis"])
    last = (first + count if written else first) - 1
    held = last - b.op("Mod", last - b.ints(list(range(size))), size)
    if written:
        return [held]
    stop = b.reshape(count, [], 0)
    counted = b.op("Range", b.const(0, DType.I64), stop, b.const(1, DType.I64), rank=1)
    return [b.concat([held, first + counted], axis=0)]


register(
    OpDef(
        name="ring_positions",
        doc=_RING_DOC,
        inputs=(
            Operand("x", "any tensor: its size is the number of new tokens", dtypes=_ANY),
            Operand("start", "the number of tokens before, [] or [1]", dtypes=_INTEGERS),
        ),
        outputs=("positions",),
        infer=_ring_infer,
        reference=_ring,
        body=_ring_body,
        attributes=(
            _AXIS,
            Attribute("size", "int", "places of the ring"),
            Attribute("written", "bool", "after the new tokens were written", default=False),
        ),
        traits=frozenset({Trait.POSITION_AWARE}),
        min_opset=13,
        exact="bits",
        differentiable=False,
        samples=(
            Sample(((2, 3), (1,)), {"axis": 1, "size": 4}, dtypes=(DType.I64,), draw=draws(_ints(0, 9), _ints(0, 1)),
                   note="empty"),
            Sample(((2, 3), (1,)), {"axis": 1, "size": 4}, dtypes=(DType.I64,), draw=draws(_ints(0, 9), _ints(2, 3)),
                   note="partly filled"),
            Sample(((2, 1, 5), ()), {"axis": 1, "size": 3}, dtypes=(DType.F32,),
                   draw=draws(normal, integers(7, 30, DType.I32))),
            Sample(((2, 1), (1,)), {"axis": -1, "size": 5, "written": True}, dtypes=(DType.I64,),
                   draw=draws(_ints(0, 9), _ints(0, 40))),
            Sample(((2, 7), (1,)), {"axis": 1, "size": 4, "written": True}, dtypes=(DType.I64,),
                   draw=draws(_ints(0, 9), _ints(0, 3)), note="more tokens than places"),
            Sample(((2, 0), (1,)), {"axis": 1, "size": 1}, dtypes=(DType.F16,), draw=draws(normal, _ints(3, 9)),
                   note="no tokens"),
        ),
    )
)  # fmt: skip

# --- position_mask ----------------------------------------------------------------------------------------------------------

_MASK_DOC = """
Which keys a query may see, by position: [batch, 1, queries, keys], true where ``0 <= key <= query`` and, if given,
``query - key < window``, ``query // chunk == key // chunk``, and ``valid[batch, key]`` is not zero.

``queries`` and ``keys`` are positions, [length] for all rows or [batch, length] (batch is 1 where nothing has one). A key
position below 0 is a place that holds no token. ``valid`` [batch, n] is about positions 0 .. n - 1 (an attention mask);
positions behind it are not seen. A ``window`` or ``chunk`` of 0 sets no bound. Positions count places in the sequence,
padding included: with padding on the left, row by row, they are not the position ids that a model embeds.

Source: causal masks: *Attention Is All You Need*, 2017; windows: *Longformer*, 2020; chunks: *Llama 4*, 2025 (release).
"""


def _batch(types: Sequence[TensorType | None]) -> Dim:
    for kind in types:
        if kind is not None and kind.shape is not None and len(kind.shape) == 2 and kind.shape[0] != 1:
            return kind.shape[0]
        if kind is not None and kind.shape is None:
            return None
    return 1


def _mask_infer(types: Sequence[TensorType | None], attributes: Attributes) -> list[TensorType]:
    queries, keys, valid = types
    assert queries is not None and keys is not None
    for name, kind, ranks in (("queries", queries, (1, 2)), ("keys", keys, (1, 2)), ("valid", valid, (2,))):
        if kind is not None and kind.shape is not None and len(kind.shape) not in ranks:
            raise VerifyError(f"actgraph.position_mask: {name} {kind} must have rank {' or '.join(map(str, ranks))}")
    for name in ("window", "chunk"):
        if attributes[name] < 0:
            raise VerifyError(f"actgraph.position_mask: {name} is {attributes[name]}", "0 sets no bound")
    rows = {k.shape[0] for k in types if k is not None and k.shape is not None and len(k.shape) == 2} - {1}
    if len({row for row in rows if isinstance(row, int)}) > 1:
        raise VerifyError(f"actgraph.position_mask: operands have {' and '.join(map(str, sorted(rows, key=str)))} rows")
    last = [kind.shape[-1] if kind.shape is not None else None for kind in (queries, keys)]
    return [TensorType(DType.BOOL, (_batch(types), 1, *last))]


def _mask(
    queries: torch.Tensor, keys: torch.Tensor, valid: torch.Tensor | None = None, *, window: int = 0, chunk: int = 0
) -> torch.Tensor:
    import torch

    rows = keys.to(torch.int64)[None] if keys.dim() == 1 else keys.to(torch.int64)
    q = (queries[None] if queries.dim() == 1 else queries).to(torch.int64)[:, None, :, None]
    k = rows[:, None, None, :]
    seen = (k <= q) & (k >= 0)
    if window:
        seen = seen & (q - k < window)
    if chunk:
        seen = seen & (q.div(chunk, rounding_mode="floor") == k.div(chunk, rounding_mode="floor"))
    if valid is not None:
        known = torch.cat(
            [valid != 0, valid.new_zeros((valid.shape[0], 1), dtype=torch.bool)], dim=1
        )  # the last: any other position
        n = valid.shape[1]
        place = torch.where((rows >= 0) & (rows < n), rows, torch.full((), n, dtype=torch.int64, device=rows.device))
        looked_up = known[:, place[0]] if keys.dim() == 1 else known.expand(place.shape[0], -1).gather(1, place)
        seen = seen & looked_up[:, None, None, :]
    return seen


def _mask_body(b: BodyBuilder, operands: Sequence[BodyValue | None], attributes: Attributes) -> list[BodyValue]:
    queries, keys, valid = operands
    assert queries is not None and keys is not None
    k1, q1 = b.cast(keys, DType.I64), b.cast(queries, DType.I64)
    q = b.unsqueeze(q1, [0, 1, 3] if b.rank_of(queries) == 1 else [1, 3])
    k = b.unsqueeze(k1, [0, 1, 2] if b.rank_of(keys) == 1 else [1, 2])

    def both(left: BodyValue, right: BodyValue) -> BodyValue:
        return b.op("And", left, right, dtype=DType.BOOL)

    seen = both(k <= q, k >= 0)
    if attributes["window"]:
        seen = both(seen, (q - k) < attributes["window"])
    if attributes["chunk"]:
        # Div of int64 truncates, which differs from the floor for negative positions: those are not seen anyway.
        seen = both(seen, (q / attributes["chunk"]).equal(k / attributes["chunk"]))
    if valid is not None:
        n = b.size(valid, 1)
        none = b.fill(b.concat([b.size(valid, 0), b.ints([1])]), 0, DType.F32, 2)
        known = b.concat([b.cast(b.cast(valid, DType.BOOL), DType.F32), none], axis=1)
        place = b.where(both(k1 >= 0, k1 < n), k1, n)
        if b.rank_of(keys) == 1:
            looked_up = b.op("Gather", known, place, rank=2, attributes={"axis": 1})
        else:
            rows = b.op("Expand", known, b.concat([b.size(keys, 0), b.ints([1])]), rank=2)
            looked_up = b.op("GatherElements", rows, place, rank=2, attributes={"axis": 1})
        seen = both(seen, b.unsqueeze(b.cast(looked_up, DType.BOOL), [1, 2]))
    return [seen]


register(
    OpDef(
        name="position_mask",
        doc=_MASK_DOC,
        inputs=(
            Operand("queries", "positions of the queries, [queries] or [batch, queries]", dtypes=_INTEGERS),
            Operand("keys", "positions of the keys, [keys] or [batch, keys]", dtypes=_INTEGERS),
            Operand("valid", "which positions hold a token, [batch, n]", dtypes=_ANY, optional=True),
        ),
        outputs=("mask",),
        infer=_mask_infer,
        reference=_mask,
        body=_mask_body,
        attributes=(
            Attribute("window", "int", "how many keys back a query sees, itself among them; 0: all", default=0),
            Attribute("chunk", "int", "keys are seen within the same chunk of so many positions only; 0: all", default=0),
        ),
        traits=frozenset({Trait.POSITION_AWARE}),
        min_opset=14,
        exact="bits",
        differentiable=False,
        samples=(
            Sample(((4,), (7,), None), dtypes=(DType.I64,), draw=draws(_ints(0, 9), _ints(-2, 9), None)),
            Sample(((5,), (5,), None), {"window": 3}, dtypes=(DType.I64,), draw=draws(_ints(0, 9), _ints(0, 9), None)),
            Sample(((5,), (9,), (2, 6)), {"chunk": 4},
                   dtypes=(DType.I64,), draw=draws(_ints(0, 12), _ints(-1, 12), boolean), note="padding"),
            Sample(((2, 3), (6,), (2, 6)), dtypes=(DType.I64,), draw=draws(integers(0, 9, DType.I32), integers(0, 9, DType.I32),
                                                      _ints(0, 2))),
            Sample(((1, 3), (2, 6), (1, 6)), {"window": 2},
                   dtypes=(DType.I64,), draw=draws(_ints(0, 9), _ints(-3, 9), _ints(0, 2))),
            Sample(((1,), (1,), (1, 0)), dtypes=(DType.I64,), draw=draws(_ints(0, 1), _ints(0, 1), normal),
                   note="nothing is valid"),
            Sample(((0,), (3,), None), dtypes=(DType.I64,), draw=draws(_ints(0, 1), _ints(0, 3), None), note="no queries"),
        ),
    )
)  # fmt: skip
