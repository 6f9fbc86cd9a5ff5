"""Residual adds: ``skip + branch`` where the branch is computed from the skip through at least one weighted layer.

Found by data flow alone. For each addition the branch is searched backwards, later nodes first, down to where the skip is
made, so that a search stays inside its own block and all of them together are linear in the graph's size.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from actgraph.graph.graph import Node, Value
from actgraph.graph.prims import Prim
from actgraph.graph.recognize.semantic import Semantics

#: A search that visits more nodes than this, and than a few times the largest block so far, is no block.
_FLOOR = 20_000
_STEPS = 6  # pass-through nodes between the skip as added and the value that the branch reads

_WEIGHTED = frozenset({"linear", "conv", "conv_transpose", "grouped_matmul", "matmul_integer"})


@dataclass
class Residual:
    """One residual add.

    skip: the operand as added. source: the stream value that the branch reads, which ``skip`` is up to plumbing and a scale.
    branches: what is added to it (two in a parallel block that adds twice). path: positions of the nodes between ``source``
    and the branches, in order. projected: the skip goes through a convolution of its own (first block of a ResNet stage).
    """

    node: Node
    position: int
    skip: Value
    source: Value
    branches: list[Value]
    output: Value
    path: list[int]
    projected: bool = False
    nodes: set[int] = field(default_factory=set)  # positions of the add itself, or of both

    def has(self, position: int) -> bool:
        """Whether the node at ``position`` is in a branch."""
        place = bisect_left(self.path, position)
        return place < len(self.path) and self.path[place] == position


def residuals(s: Semantics, inside: set[Node]) -> list[Residual]:
    """All residual adds in topological order, without those inside another one's branch.

    inside: nodes that are part of something else (an attention's mask, a norm's epsilon) and add no residual.
    """
    search = _Search(s)
    found: dict[Value, Residual] = {}
    for position, prim in enumerate(s.prims):
        if prim is None or prim.op != "add" or prim.node in inside:
            continue
        residual = _residual(s, search, position, prim, found)
        if residual is not None:
            found[residual.output] = residual
    return _outermost(s, sorted(found.values(), key=lambda r: r.position))


def _residual(s: Semantics, search: _Search, position: int, prim: Prim, found: dict[Value, Residual]) -> Residual | None:
    a, b = prim.operands
    if not isinstance(a, Value) or not isinstance(b, Value) or not s.is_data(a) or not s.is_data(b):
        return None
    if a.dtype is None or not a.dtype.is_float or not _same_shape(a, b) or a == b:
        return None
    for skip, branch in ((a, b), (b, a)):
        for source in _stream_values(s, skip):
            path = search.path(source, branch)
            if path:
                return Residual(prim.node, position, skip, source, [branch], prim.output, path, nodes={position})
    for first, branch in ((a, b), (b, a)):
        joined = _second_of_parallel(s, search, position, prim, found, first, branch)
        if joined is not None:
            return joined
    for skip, branch in ((a, b), (b, a)):
        shortcut = _projection(s, skip)
        path = search.path(shortcut, branch) if shortcut is not None else []
        if shortcut is not None and path:
            return Residual(prim.node, position, skip, shortcut, [branch], prim.output, path, projected=True, nodes={position})
    return None


def _same_shape(a: Value, b: Value) -> bool:
    """Whether both have one shape, as far as it is known (exporters lose symbolic sizes)."""
    if a.shape is None or b.shape is None:
        return a.shape == b.shape
    if len(a.shape) != len(b.shape):
        return False
    return all(x == y or x is None or y is None or _unlike(x, y) for x, y in zip(a.shape, b.shape, strict=True))


def _unlike(x: int | str, y: int | str) -> bool:
    """Two spellings that may be one size: a symbol and an expression or number of another origin (never 1, a broadcast)."""
    return isinstance(x, str) != isinstance(y, str) and 1 not in (x, y)


def _stream_values(s: Semantics, skip: Value) -> Iterator[Value]:
    """The skip and what it is but for plumbing and a factor, as far as several nodes read it."""
    value = skip
    for _ in range(_STEPS):
        value = s.root(value)
        if sum(1 for _ in s.readers(value)) > 1:
            yield value
        step = through(s, value)
        if step is None:
            return
        value = step


def through(s: Semantics, value: Value) -> Value | None:
    """The value before a cast, a reshape, an edit in place, a constant added or a multiplication by a number."""
    edited = s.edited(value)
    if edited != value:
        return edited
    prim = s.prim(value)
    if prim is None or not prim.operands:
        return None
    first = prim.operands[0]
    if prim.op in ("identity", "cast", "reshape") and isinstance(first, Value):
        return first
    if prim.op in ("add", "sub"):
        data = [operand for operand in prim.operands if isinstance(operand, Value) and s.is_data(operand)]
        kept = len(data) == 1 and data[0].shape == prim.output.shape and (prim.op == "add" or data[0] is first)
        return data[0] if kept else None
    if prim.op in ("mul", "div"):
        second = prim.operands[1]
        if isinstance(first, Value) and isinstance(second, (int, float)):
            return first
        if prim.op == "mul" and isinstance(second, Value) and isinstance(first, (int, float)):
            return second
    return None


def _second_of_parallel(
    s: Semantics, search: _Search, position: int, prim: Prim, found: dict[Value, Residual], first: Value, branch: Value
) -> Residual | None:
    """``(x + f(x)) + g(x)``: the sum of a parallel block, written as two additions."""
    before = found.get(s.root(first))
    if before is None or before.projected or s.only_reader(before.output) is None:
        return None
    path = search.path(before.source, branch)
    if not path:
        return None
    del found[before.output]
    both = sorted({*before.path, *path})
    return Residual(
        prim.node, position, before.skip, before.source, [*before.branches, branch], prim.output, both,
        nodes={*before.nodes, position},
    )  # fmt: skip


def _projection(s: Semantics, skip: Value) -> Value | None:
    """What a projected shortcut reads: one convolution, perhaps with a norm and pooling, over a value that others read too."""
    value, convolutions = s.root(skip), 0
    for _ in range(_STEPS):
        prim = s.prim(value)
        first = prim.operands[0] if prim is not None and prim.operands else None
        if prim is None or not isinstance(first, Value):
            break
        if prim.op == "conv":
            convolutions += 1
        elif prim.op not in ("batch_norm", "group_norm", "avg_pool", "cast"):
            break
        value = s.root(first)
    return value if convolutions == 1 and len(list(s.readers(value))) > 1 else None


def _outermost(s: Semantics, found: list[Residual]) -> list[Residual]:
    """Without residuals inside another one's branch (Mamba's ``D`` skip), and without skips over a chain of others."""
    positions = [r.position for r in found]
    dropped: set[int] = set()
    for index, outer in enumerate(found):
        start, end = bisect_right(positions, outer.path[0] - 1), index
        inner = [i for i in range(start, end) if i not in dropped and outer.has(found[i].position)]
        if any(s.position(found[j].source) >= found[i].position for i, j in pairwise(inner)):
            dropped.add(index)
        else:
            dropped.update(inner)
    return [residual for index, residual in enumerate(found) if index not in dropped]


class _Search:
    """Bounded reachability between values."""

    def __init__(self, s: Semantics) -> None:
        self.s = s
        self.largest = 0

    def path(self, source: Value, target: Value) -> list[int]:
        """Positions of the nodes on the ways from ``source`` to ``target``, if a weighted layer is among them; else empty."""
        visited = self._backwards(source, target)
        if visited is None:
            return []
        s, reached, path = self.s, {source}, []
        for position in visited:
            node = s.nodes[position]
            if any(operand is not None and (operand in reached or s.root(operand) == source) for operand in node.operands):
                reached.update(node.outputs)
                path.append(position)
        if not any(self._is_weighted(position) for position in path):
            return []
        self.largest = max(self.largest, len(visited))
        return path

    def _backwards(self, source: Value, target: Value) -> list[int] | None:
        """Ancestors of ``target`` made after ``source``, in order; ``None`` when ``source`` is not one of them."""
        s = self.s
        bound = s.position(source)
        start = s.position(target)
        if start <= bound:
            return None
        limit = max(_FLOOR, 8 * self.largest)
        heap, visited, meets = [-start], {start}, False
        while heap:
            position = -heapq.heappop(heap)
            for operand in s.nodes[position].operands:
                if operand is None or not s.is_data(operand):
                    continue
                if operand == source or s.root(operand) == source:
                    meets = True
                    continue
                before = s.position(operand)
                if before > bound and before not in visited:
                    visited.add(before)
                    heapq.heappush(heap, -before)
            if len(visited) > limit:
                return None
        return sorted(visited) if meets else None

    def _is_weighted(self, position: int) -> bool:
        prim = self.s.prims[position]
        if prim is None:
            return False
        if prim.op == "matmul":
            return any(isinstance(o, Value) and self.s.is_constant(o) for o in prim.operands)
        return prim.op in _WEIGHTED
