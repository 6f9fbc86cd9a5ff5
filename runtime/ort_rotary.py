"""Rotary embeddings that are written out: what is turned, and by which angles.

Source: *RoFormer*, 2021. The form is that of GPT-NeoX and Llama: ``x cos + rotate(x) sin``, where ``rotate`` swaps the halves
of the features and negates the first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from actgraph.errors import ActgraphError, UnsupportedError
from actgraph.graph.graph import Array, Value
from actgraph.graph.onnx import OnnxGraph
from actgraph.graph.slots import slots_of
from actgraph.runtime.ort_engine import OrtExecutor
from actgraph.runtime.tokens import FILLED, Tokens

#: Tables are no longer than this many tokens.
_LONGEST = 1 << 17


@dataclass(frozen=True)
class Rotary:
    """``source`` [batch, heads, seq, head] is turned by the angles whose cosines and sines are ``cos`` and ``sin``."""

    source: Value
    cos: Value
    sin: Value


@dataclass(frozen=True)
class Table:
    """Cosines and sines of the angles at each position, [positions, head / 2] each."""

    name: str
    cos: Array
    sin: Array


def rotary_of(value: Value) -> Rotary | None:
    """How ``value`` was turned; ``None`` where it was not, or in another form."""
    for plain, turned in _pairs(_operands(value, "add")):
        for x, cos in _pairs(_operands(plain, "mul")):
            for rotated, sin in _pairs(_operands(turned, "mul")):
                if x.shape is not None and _is_rotation(rotated, x) and cos.shape is not None and sin.shape == cos.shape:
                    return Rotary(x, _unsqueezed(cos), _unsqueezed(sin))
    return None


def _operands(value: Value | None, op: str) -> tuple[Value, ...]:
    prim = value.producer.prim if value is not None and value.producer is not None else None
    if prim is None or prim.op != op:
        return ()
    found = tuple(operand for operand in prim.operands if isinstance(operand, Value))
    return found if len(found) == len(prim.operands) else ()


def _pairs(operands: tuple[Value, ...]) -> list[tuple[Value, Value]]:
    return [(operands[0], operands[1]), (operands[1], operands[0])] if len(operands) == 2 else []


def _is_rotation(value: Value, x: Value) -> bool:
    """Whether ``value`` is ``concat(-x[half:], x[:half])``."""
    parts = _operands(value, "concat")
    width = x.shape[-1] if x.shape is not None else None
    if len(parts) != 2 or not isinstance(width, int) or value.shape != x.shape:
        return False
    negated = _operands(parts[0], "neg")
    return bool(negated) and _slice(negated[0], x, width // 2, width) and _slice(parts[1], x, 0, width // 2)


def _slice(value: Value, x: Value, start: int, end: int) -> bool:
    prim = value.producer.prim if value.producer is not None else None
    if prim is None or prim.op != "slice" or prim.operands[0] != x or x.shape is None:
        return False
    a = prim.attributes
    rank = len(x.shape)
    stop = min(a["end"], x.shape[-1]) if isinstance(a["end"], int) and isinstance(x.shape[-1], int) else None
    return bool(a["axis"] in (-1, rank - 1) and a["start"] == start and stop == end and a["step"] in (1, None))


def _unsqueezed(value: Value) -> Value:
    """The table [batch, seq, head] below its axis for heads."""
    prim = value.producer.prim if value.producer is not None else None
    source = prim.operands[0] if prim is not None and prim.op == "reshape" else None
    return source if isinstance(source, Value) and source.shape is not None and len(source.shape) == 3 else value


def tables_of(graph: OnnxGraph, rotaries: list[Rotary], limit: int | None) -> dict[tuple[str, str], Table]:
    """The tables of all ``rotaries`` whose angles depend on the position of a token alone, by the names of cos and sin.

    That is tried: positions are counted from 0, then from another place and for another length.
    """
    pairs = {(rotary.cos.name, rotary.sin.name): rotary for rotary in rotaries}
    if not pairs or limit is None or limit > _LONGEST:
        return {}
    found = {}
    shape = graph.value("input_ids").shape
    single = shape is not None and shape[1] == 1
    for number, names in enumerate(pairs):
        try:
            whole = _evaluate(graph, names, 0, 1, rows=limit) if single else _evaluate(graph, names, 0, limit)
            part = _evaluate(graph, names, 3, 1 if single else min(5, limit - 3))
        except ActgraphError:
            continue
        fits = all(_same(each, full) for each, full in zip(part, whole, strict=True))
        halves = [full[:, : full.shape[1] // 2] for full in whole]
        doubled = all(
            np.array_equal(full, np.concatenate([half, half], axis=1)) for full, half in zip(whole, halves, strict=True)
        )
        if fits and doubled:
            found[names] = Table(f"fused.rotary_{number}", *halves)
    return found


def _same(part: Array, whole: Array) -> bool:
    return bool(np.array_equal(part, whole[3 : 3 + len(part)]))


def _evaluate(graph: OnnxGraph, names: tuple[str, str], used: int, count: int, rows: int = 1) -> list[Array]:
    """Values [rows, count, head] for ``count`` tokens after ``used``, as [rows * count, head]. Raises an ActgraphError.

    rows: each is one position further than the one before, for graphs that take one token of each row.
    """
    maker = graph.clone()
    with maker.edit(by="rotary") as editor:
        for name, _ in maker.outputs():
            editor.remove_output(name)
        for number, name in enumerate(names):
            editor.add_output(maker.value(name), f"table.{number}")
        editor.erase_dead()
    tokens = Tokens(rows)
    zeros = np.zeros((rows, used + count), np.int64)
    tokens.end_prompt(used + count, None)
    tokens.add(zeros, None)
    wanted = {value.name: value.dtype.numpy for value in maker.inputs() if value.dtype is not None}
    feed = tokens.feed(used, {name: dtype for name, dtype in wanted.items() if name in FILLED})
    if rows > 1:
        if "position_ids" not in feed:
            raise UnsupportedError("positions are counted for all rows at once")
        feed["position_ids"] = feed["position_ids"] + np.arange(rows)[:, None]
    for slot in slots_of(graph).values():
        if slot.input in wanted:
            sizes = [size if isinstance(size, int) else rows if axis == 0 else used for axis, size in enumerate(slot.shape)]
            feed[slot.input] = np.zeros(sizes, slot.dtype.numpy)
    results = OrtExecutor().open(maker, optimize=False)(feed)
    tables = [np.asarray(results[f"table.{number}"]) for number in range(2)]
    return [table.reshape(-1, table.shape[-1]) for table in tables]
