"""From what an attention reads back to its projections, and from its result on to the output projection."""

from __future__ import annotations

from actgraph.graph.graph import Node, Value
from actgraph.graph.recognize.linear import input_of
from actgraph.graph.recognize.semantic import Semantics
from actgraph.graph.views import Linear

_REACH = 64  # nodes between an attention and its projections, at most, in one direction


def projections(s: Semantics, ends: tuple[Value, ...], outputs: dict[Value, Linear]) -> list[Value | None]:
    """For each of query, key and value: the earliest value through which all of it flows and none of the others does."""
    slices = [_slice_to_linears(s, end, outputs) for end in ends]
    result: list[Value | None] = []
    for index, (end, values) in enumerate(zip(ends, slices, strict=True)):
        others = {value for other, kept in enumerate(slices) if other != index and ends[other] != end for value in kept}
        result.append(_choke_point(s, s.root(end), values, others, outputs))
    return result


def _slice_to_linears(s: Semantics, end: Value, outputs: dict[Value, Linear]) -> set[Value]:
    """The values between linear outputs (included) and ``end`` that carry a linear's output to it."""
    visited: dict[Value, bool] = {}

    def carries(value: Value, depth: int) -> bool:
        value = s.root(value)
        if value in visited:
            return visited[value]
        if value in outputs:
            visited[value] = True
            return True
        visited[value] = False
        position = s.position(value)
        if position < 0 or depth == 0 or len(visited) > 4 * _REACH or not s.is_data(value):
            return False
        operands = [o for o in s.nodes[position].operands if o is not None]
        reached = [carries(operand, depth - 1) for operand in operands]  # all of them: each is part of the slice
        visited[value] = any(reached)
        return visited[value]

    carries(end, _REACH)
    return {value for value, kept in visited.items() if kept}


def _choke_point(
    s: Semantics, end: Value, values: set[Value], others: set[Value], outputs: dict[Value, Linear]
) -> Value | None:
    """The first of ``values`` (in order) that every way from a linear to ``end`` goes through and that is in no other slice."""
    if end not in values:
        return None
    ordered = sorted(values, key=s.position)
    waiting: dict[Value, int] = {}  # live value -> how many of its readers inside the slice are still to come
    counts: dict[Value, int] = {}
    for value in ordered:
        if value in outputs:
            continue
        for operand in _carried(s, value, values):
            counts[operand] = counts.get(operand, 0) + 1
    for index, value in enumerate(ordered):
        if value not in outputs:
            for operand in _carried(s, value, values):
                if operand in waiting:
                    waiting[operand] -= 1
                    if waiting[operand] == 0:
                        del waiting[operand]
        waiting[value] = counts.get(value, 0)
        later_sources = any(later in outputs for later in ordered[index + 1 :])
        if len(waiting) == 1 and not later_sources and value not in others:
            return value
    return end if end not in others else None


def _carried(s: Semantics, value: Value, values: set[Value]) -> set[Value]:
    node = s.nodes[s.position(value)]
    return {root for o in node.operands if o is not None and (root := s.root(o)) in values}


def out_projection(s: Semantics, output: Value, inputs: dict[tuple[Node | None, int], Linear]) -> Linear | None:
    """The linear that reads the attention's result through transposes, reshapes, edits and perhaps a gate."""
    current = output
    for _ in range(12):
        step: Value | None = None
        for position in s.direct_readers(current):
            node, prim = s.nodes[position], s.prims[position]
            linear = inputs.get((node, s.operand_index(node, current)))
            if linear is not None and input_of(linear) == current:
                return linear
            passes = prim is not None and prim.op in ("identity", "cast", "transpose", "reshape")
            gated = prim is not None and prim.op == "mul" and prim.output.shape == current.shape
            if passes or gated or (node.operands and node.operands[0] == current and node.op.startswith("actgraph.")):
                step = node.output
        if step is None:
            return None
        current = step
    return None
