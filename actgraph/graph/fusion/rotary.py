"""Rotary embeddings that are written out, ``x cos + rotate(x) sin``, as ``actgraph.rotary``."""

from __future__ import annotations

from dataclasses import dataclass

from actgraph.graph.fusion.rewriter import Rewriter, private
from actgraph.graph.graph import Node, Use, Value
from actgraph.ops.dtypes import COMPUTE_FLOATS
from actgraph.ops.registry import DOMAIN


@dataclass(frozen=True)
class Rotary:
    """``source`` [batch, heads, seq, head] is turned by ``cos`` and ``sin`` [batch or 1, seq, width].

    width: how many features are turned, 0 for all. nodes: what computes ``output``, the angles excepted. unsqueezed: ``cos``
    and ``sin`` with an axis for heads.
    """

    source: Value
    cos: Value
    sin: Value
    width: int
    nodes: tuple[Node, ...]
    output: Value
    unsqueezed: tuple[Value, Value]


def fuse_rotary(rewriter: Rewriter) -> None:
    """Fuse every chosen rotary embedding of the form of GPT-NeoX and Llama (halves), whole heads or a part of each."""
    tables: dict[Use, list[Use]] = {}  # where the angles were given their axis for heads -> where they are read now
    for node in rewriter.graph.nodes():
        found = rotary_of(node.output) if node.outputs else None
        if found is None:
            continue
        found = _partial(found) or found
        edges = [use for use in found.source.uses if use.node in found.nodes]
        if not rewriter.chosen([found.output], edges):
            continue
        reason = _refusal(found)
        if reason:
            rewriter.decline(found.output, reason)
            continue
        made = rewriter.editor.insert(
            f"{DOMAIN}.rotary", [found.source, found.cos, found.sin], {"rotary_dim": found.width}, like=found.output.producer
        )
        for edge in edges:
            rewriter.editor.move_edges(edge, Use(made, 0))
        for index, unsqueezed in enumerate(found.unsqueezed, 1):
            if unsqueezed.producer is not None:
                tables.setdefault(Use(unsqueezed.producer, 0), []).append(Use(made, index))
        rewriter.editor.redirect(found.output, made.output)
        rewriter.done("rotary")
    for old, new in tables.items():
        rewriter.editor.move_edges(old, *new)


def rotary_of(value: Value) -> Rotary | None:
    """How ``value`` was turned; ``None`` where it was not, or in another form."""
    for plain, turned in _pairs(_operands(value, "add")):
        for x, cos in _pairs(_operands(plain, "mul")):
            for rotated, sin in _pairs(_operands(turned, "mul")):
                parts = _rotation(rotated, x)
                below = _below_heads(cos), _below_heads(sin)
                if parts is not None and below[0] is not None and below[1] is not None:
                    makers = [value, plain, turned, rotated, *parts]
                    nodes = tuple(maker.producer for maker in makers if maker.producer is not None)
                    return Rotary(x, below[0], below[1], 0, nodes, value, (cos, sin))
    return None


def _partial(whole: Rotary) -> Rotary | None:
    """The rotary of a part of each head: ``concat(turned x[.., :width], x[.., width:])``."""
    cut = whole.source.producer.prim if whole.source.producer is not None else None
    reader = {use.node for use in whole.output.uses}
    joined = next(iter(reader)) if len(reader) == 1 else None
    prim = joined.prim if joined is not None else None
    if cut is None or cut.op not in ("slice", "split") or prim is None or prim.op != "concat" or len(prim.operands) != 2:
        return None
    x, rest = cut.operands[0], prim.operands[1]
    if not isinstance(x, Value) or not isinstance(rest, Value) or prim.operands[0] != whole.output or x.shape is None:
        return None
    shape = whole.source.shape
    width, size = (shape[-1] if shape is not None else None), x.shape[-1]
    if not isinstance(width, int) or not isinstance(size, int) or len(x.shape) != 4 or prim.attributes["axis"] not in (-1, 3):
        return None
    if not _is_part(whole.source, x, 0, width) or not _is_part(rest, x, width, size):
        return None
    makers = [whole.source.producer, rest.producer, joined]
    nodes = tuple(dict.fromkeys([*whole.nodes, *(node for node in makers if node is not None)]))
    return Rotary(x, whole.cos, whole.sin, width, nodes, prim.output, whole.unsqueezed)


def _refusal(rotary: Rotary) -> str:
    x, tables = rotary.source, (rotary.cos, rotary.sin)
    if x.dtype not in COMPUTE_FLOATS or rotary.output.type != x.type or x.shape is None or len(x.shape) != 4:
        return f"it takes {x.type} and gives {rotary.output.type}"
    width = rotary.width or x.shape[-1]
    for table in tables:
        shape = table.shape
        if shape is None or shape[2] != width or shape[1] != x.shape[2] or shape[0] not in (1, x.shape[0]):
            return f"its angles are {table.type}, its heads {x.type}"
        if table.dtype not in COMPUTE_FLOATS:
            return f"its angles are {table.dtype}"
    return "" if private(rotary.nodes, rotary.output) else "a value inside it is read by others"


def _operands(value: Value, op: str) -> tuple[Value, ...]:
    prim = value.producer.prim if value.producer is not None else None
    if prim is None or prim.op != op:
        return ()
    found = tuple(operand for operand in prim.operands if isinstance(operand, Value))
    return found if len(found) == len(prim.operands) else ()


def _pairs(operands: tuple[Value, ...]) -> list[tuple[Value, Value]]:
    return [(operands[0], operands[1]), (operands[1], operands[0])] if len(operands) == 2 else []


def _rotation(value: Value, x: Value) -> tuple[Value, ...] | None:
    """The parts of ``concat(-x[half:], x[:half])``; ``None`` where ``value`` is something else."""
    parts = _operands(value, "concat")
    width = x.shape[-1] if x.shape is not None else None
    if len(parts) != 2 or not isinstance(width, int) or value.shape != x.shape:
        return None
    negated = _operands(parts[0], "neg")
    if not negated or not _is_part(negated[0], x, width // 2, width) or not _is_part(parts[1], x, 0, width // 2):
        return None
    return (*parts, negated[0])


def _is_part(value: Value, x: Value, start: int, end: int) -> bool:
    """Whether ``value`` is the features ``start`` to ``end`` of ``x``."""
    prim = value.producer.prim if value.producer is not None else None
    if prim is None or prim.op not in ("slice", "split") or prim.operands[0] != x or x.shape is None:
        return False
    size, attributes = x.shape[-1], prim.attributes
    if not isinstance(size, int) or attributes["axis"] not in (-1, len(x.shape) - 1):
        return False
    if prim.op == "slice":
        first, last = attributes["start"], attributes["end"]
        if not isinstance(first, int) or not (last is None or isinstance(last, int)):
            return False
        first, last = slice(first, last).indices(size)[:2]
        return (first, last) == (start, end) and attributes["step"] in (1, None)
    place = 0
    for output in prim.outputs:
        width = output.shape[-1] if output.shape is not None else None
        if not isinstance(width, int):
            return False
        if output == value:
            return (place, place + width) == (start, end)
        place += width
    return False


def _below_heads(value: Value) -> Value | None:
    """The table [batch, seq, width] below its axis for heads."""
    prim = value.producer.prim if value.producer is not None else None
    source = prim.operands[0] if prim is not None and prim.op == "reshape" else None
    if not isinstance(source, Value) or source.shape is None or len(source.shape) != 3 or value.shape is None:
        return None
    return source if value.shape == (source.shape[0], 1, *source.shape[1:]) else None
