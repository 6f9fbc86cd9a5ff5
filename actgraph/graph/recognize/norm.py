"""Normalisations: whole operators, and RMS and layer norms written out in elementary ones.

Written out, both are ``c * inv(mean(c * c) + eps)`` with ``c = x`` (RMS) or ``c = x - mean(x)`` (layer norm), where ``inv``
is spelled ``rsqrt``, ``sqrt`` and ``reciprocal``, a division by ``sqrt``, or a power; then a weight on either side, perhaps
as ``1 + weight``, a bias, and casts anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

from actgraph.graph.graph import Node, Value
from actgraph.graph.prims import Prim
from actgraph.graph.recognize.semantic import Operand, Semantics
from actgraph.graph.views import Norm

_WHOLE = frozenset({"layer_norm", "rms_norm", "batch_norm", "group_norm"})


def norms(semantics: Semantics) -> list[Norm]:
    """All normalisations, in the order of the nodes that produce their outputs."""
    found: list[Norm] = []
    for prim in semantics.prims:
        if prim is None:
            continue
        norm = _whole(semantics, prim) if prim.op in _WHOLE else _written_out(semantics, prim)
        if norm is not None:
            found.append(norm)
    return sorted(found, key=lambda norm: semantics.position(norm.output))


def _whole(s: Semantics, prim: Prim) -> Norm | None:
    x, *rest = prim.operands
    if not isinstance(x, Value):
        return None
    weight, bias = (rest[i] if i < len(rest) and isinstance(rest[i], Value) else None for i in (0, 1))
    if prim.op == "rms_norm":
        bias = None
    assert weight is None or isinstance(weight, Value)
    assert bias is None or isinstance(bias, Value)
    eps = float(prim.attributes["eps"])
    scale, offset = _scale(s, weight) if weight is not None else (None, 0.0)
    return Norm((prim.node,), prim.op, s.root(x), prim.output, scale, bias, eps, offset)


@dataclass
class _Tail:
    """The result so far, and the nodes that compute it."""

    output: Value
    nodes: list[Node]


def _written_out(s: Semantics, prim: Prim) -> Norm | None:
    """The norm whose root is taken at ``prim``."""
    half = prim.operands[1] if prim.op == "pow" else None
    inverse = prim.op == "rsqrt" or half == -0.5
    if not (inverse or prim.op == "sqrt" or half == 0.5):
        return None
    statistic = _statistic(s, prim.operands[0])
    if statistic is None:
        return None
    centred, x, kind, eps, nodes = statistic
    normalised = _normalised(s, prim, centred, inverse)
    if normalised is None:
        return None
    tail = _Tail(normalised[-1].output, [*nodes, prim.node, *normalised])
    weight, offset = _weight(s, tail)
    bias = _bias(s, tail) if kind == "layer_norm" else None
    _cast_back(s, tail, x)
    ordered = sorted(dict.fromkeys(tail.nodes), key=lambda node: s.position(node.output))
    return Norm(tuple(ordered), kind, x, tail.output, weight, bias, eps, offset)


def _statistic(s: Semantics, value: Operand) -> tuple[Value, Value, str, float, list[Node]] | None:
    """``(c, x, kind, eps, nodes)`` of a value ``mean(c * c) + eps``."""
    maker, eps, nodes = s.source(value, casts=True), 0.0, []
    if maker is not None and maker.op == "add":
        number = next((o for o in maker.operands if isinstance(o, (int, float))), None)
        rest = next((o for o in maker.operands if isinstance(o, Value)), None)
        if number is None or rest is None or not 0 <= number < 0.1:
            return None
        nodes.append(maker.node)
        eps, maker = float(number), s.source(rest, casts=True)
    if maker is None:
        return None
    if maker.op == "var" and maker.attributes["correction"] == 0:
        x = maker.operands[0]
        # the variance stands for the centred input that it is computed from
        return (maker.output, s.root(x, casts=True), "layer_norm", eps, [*nodes, maker.node]) if isinstance(x, Value) else None
    if maker.op != "mean" or not maker.attributes["axes"]:
        return None
    square = s.source(maker.operands[0], casts=True)
    if square is None or not isinstance(square.operands[0], Value):
        return None
    whole = square.op == "pow" and square.operands[1] == 2
    if not whole and not (square.op == "mul" and s.same(square.operands[0], square.operands[1], casts=True)):
        return None
    centred = square.operands[0]
    nodes += [maker.node, square.node]
    difference = _difference(s, centred)
    if difference is None:
        return centred, s.root(centred, casts=True), "rms_norm", eps, nodes
    return centred, s.root(difference[0], casts=True), "layer_norm", eps, [*nodes, *difference[1]]


def _difference(s: Semantics, value: Value) -> tuple[Value, list[Node]] | None:
    """``x`` of a value ``x - mean(x)``, and the nodes."""
    maker = s.source(value, casts=True)
    if maker is None or maker.op != "sub" or not isinstance(maker.operands[0], Value):
        return None
    mean = s.source(maker.operands[1], casts=True)
    if mean is None or mean.op != "mean" or not s.same(mean.operands[0], maker.operands[0], casts=True):
        return None
    return maker.operands[0], [mean.node, maker.node]


def _normalised(s: Semantics, root: Prim, centred: Value, inverse: bool) -> list[Node] | None:
    """The nodes from the root to ``c * inv`` or ``c / sqrt``."""
    for read in s.readers(root.output, casts=True):
        prim = read.prim
        if prim is None:
            continue
        if inverse:
            if prim.op == "mul" and _other_is(s, prim, read.value, centred):
                return [prim.node]
            continue
        if prim.op == "div" and s.same(prim.operands[1], read.value) and _is_centred(s, prim.operands[0], centred):
            return [prim.node]
        reciprocal = prim.op == "reciprocal" or (prim.op == "div" and prim.operands[0] == 1)
        if reciprocal:
            for after in s.readers(prim.output, casts=True):
                if after.prim is not None and after.prim.op == "mul" and _other_is(s, after.prim, after.value, centred):
                    return [prim.node, after.prim.node]
    return None


def _other_is(s: Semantics, prim: Prim, known: Value, centred: Value) -> bool:
    """Whether ``prim`` multiplies ``known`` by the centred input."""
    a, b = prim.operands
    return (a == known and _is_centred(s, b, centred)) or (b == known and _is_centred(s, a, centred))


def _is_centred(s: Semantics, value: Operand, centred: Value) -> bool:
    """Whether a value is the centred input: the very same, or the difference computed once more (old exporters do)."""
    if not isinstance(value, Value):
        return False
    if s.same(value, centred, casts=True):
        return True
    ours, maker = _difference(s, value), s.source(centred, casts=True)
    theirs = maker.operands[0] if maker is not None and maker.op in ("sub", "var") else None
    return ours is not None and s.same(ours[0], theirs, casts=True)


def _weight(s: Semantics, tail: _Tail) -> tuple[Value | None, float]:
    """The weight that the normalised value is multiplied by next, and its offset; extends the tail."""
    read = s.only_reader(tail.output, casts=True)
    if read is None or read.prim is None or read.prim.op != "mul" or read.node.output.shape != tail.output.shape:
        return None, 0.0
    for operand in read.prim.operands:
        if isinstance(operand, Value) and operand != read.value and s.is_constant(operand):
            tail.nodes.append(read.node)
            tail.output = read.node.output
            return _scale(s, operand)
    return None, 0.0


def _scale(s: Semantics, operand: Value) -> tuple[Value, float]:
    """The stored weight of a scale ``weight`` or ``1 + weight``."""
    root = s.root(operand, casts=True)
    maker = s.prim(root)
    if maker is not None and maker.op == "add":
        number = next((o for o in maker.operands if isinstance(o, (int, float))), None)
        rest = next((o for o in maker.operands if isinstance(o, Value)), None)
        if number == 1 and rest is not None:
            return s.root(rest, casts=True), 1.0
    return root, 0.0


def _bias(s: Semantics, tail: _Tail) -> Value | None:
    read = s.only_reader(tail.output, casts=True)
    if read is None or read.prim is None or read.prim.op != "add" or read.node.output.shape != tail.output.shape:
        return None
    for operand in read.node.operands:
        if operand is not None and operand != read.value and s.is_constant(operand):
            tail.nodes.append(read.node)
            tail.output = read.node.output
            return s.root(operand, casts=True)
    return None


def _cast_back(s: Semantics, tail: _Tail, x: Value) -> None:
    """Include the cast that returns to the element type of the input."""
    if x.dtype is None or tail.output.dtype == x.dtype:
        return
    read = s.only_reader(tail.output)
    if read is not None and read.prim is not None and read.prim.op == "cast" and read.node.output.dtype == x.dtype:
        tail.nodes.append(read.node)
        tail.output = read.node.output
