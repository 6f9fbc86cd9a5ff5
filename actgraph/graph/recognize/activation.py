"""Pointwise nonlinearities, found by what they compute.

A file may spell GELU in a dozen ways. Instead of one pattern per spelling, a small expression of one variable (pointwise
ops, numbers, and one value) is evaluated at fixed points and compared with the known functions. The search starts at ops
that only activations use (``erf``, ``tanh``, ``sigmoid`` ...) and stays within a few nodes of them. An inlined op of ours is
no part of them, as it is none where it is kept: a ReLU that a pass clips at 6 is not ReLU6.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from actgraph.graph.graph import Array, Node, Value
from actgraph.graph.prims import Prim
from actgraph.graph.recognize.semantic import Operand, Semantics
from actgraph.graph.views import Activation

_POINTS = np.array([-25.0, -6.5, -3.3, -2.9, -2.1, -1.3, -0.6, -0.11, 0.07, 0.5, 1.1, 1.9, 2.7, 2.95, 3.2, 5.9, 6.4, 21.0])
_DEPTH = 8  # ops from the anchor to either end of an expression
_SIZE = 24  # ops of one expression

_erf = np.vectorize(math.erf, otypes=[np.float64])


def _sigmoid(x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-x)))


def _softplus(x: Array) -> Array:
    return np.logaddexp(x, 0.0)


def _gelu(x: Array) -> Array:
    return np.asarray(0.5 * x * (1 + _erf(x / math.sqrt(2))))


def _gelu_tanh(x: Array) -> Array:
    return np.asarray(0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))


_FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "relu6": lambda x: np.clip(x, 0, 6),
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": lambda x: x * _sigmoid(x),
    "quick_gelu": lambda x: x * _sigmoid(1.702 * x),
    "hardswish": lambda x: x * np.clip(x + 3, 0, 6) / 6,
    "hardsigmoid": lambda x: np.clip(x + 3, 0, 6) / 6,
    "mish": lambda x: x * np.tanh(_softplus(x)),
    "softplus": _softplus,
    "elu": lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))),
    "leaky_relu": lambda x: np.where(x > 0, x, 0.01 * x),
    "tanh": np.tanh,
    "sigmoid": _sigmoid,
}

#: Vocabulary ops that are activations by themselves, with the function that the view names.
_WHOLE = {
    "relu": "relu", "silu": "silu", "softplus": "softplus", "leaky_relu": "leaky_relu", "elu": "elu", "hardswish": "hardswish",
    "hardsigmoid": "hardsigmoid", "mish": "mish", "prelu": "prelu", "tanh": "tanh", "sigmoid": "sigmoid",
}  # fmt: skip
#: Of these, the ones that are also parts of others.
_PARTS = frozenset({"relu", "tanh", "sigmoid", "softplus", "hardsigmoid"})
_ANCHORS = frozenset({*_WHOLE, "gelu", "erf", "exp", "clip", "max", "gt", "ge", "lt", "le"})

_UNARY: dict[str, Callable[..., Any]] = {
    "neg": np.negative, "abs": np.abs, "sqrt": np.sqrt, "reciprocal": np.reciprocal, "exp": np.exp, "log": np.log, "erf": _erf,
    "relu": _FUNCTIONS["relu"], "tanh": np.tanh, "sigmoid": _sigmoid, "softplus": _softplus,
    "hardsigmoid": _FUNCTIONS["hardsigmoid"], "silu": _FUNCTIONS["silu"], "identity": np.positive, "cast": np.positive,
}  # fmt: skip
_BINARY: dict[str, Callable[..., Any]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "pow": np.power, "min": np.minimum,
    "max": np.maximum, "gt": np.greater, "ge": np.greater_equal, "lt": np.less, "le": np.less_equal,
}  # fmt: skip


@functools.cache
def _known() -> Array:
    """The values of the known functions, one row each, in the order of ``_FUNCTIONS``."""
    return np.stack([np.asarray(function(_POINTS)) for function in _FUNCTIONS.values()])


def activations(semantics: Semantics) -> list[Activation]:
    """All activations, in the order of the nodes that produce their outputs; parts of larger ones are not listed."""
    by_output: dict[Value, Activation] = {}
    inner: set[Node] = set()
    for prim in semantics.prims:
        if prim is None or prim.op not in _ANCHORS or not prim.outputs or prim.node.origin.inlined:
            continue
        found = _activation(semantics, prim)
        if found is not None:
            by_output.setdefault(found.output, found)
            inner.update(node for node in found.nodes if node.output != found.output)
    kept = [a for a in by_output.values() if a.nodes[-1] not in inner]
    return sorted(kept, key=lambda a: semantics.position(a.output))


def _activation(s: Semantics, prim: Prim) -> Activation | None:
    x = prim.operands[0]
    if not isinstance(x, Value) or not s.is_data(prim.output) or (x.dtype is not None and not x.dtype.is_float):
        return None
    if prim.op == "gelu":
        name = "gelu_tanh" if prim.attributes["approximate"] == "tanh" else "gelu"
        return Activation((prim.node,), name, s.root(x), prim.output)
    if prim.op in _WHOLE and prim.op not in _PARTS:
        return Activation((prim.node,), _WHOLE[prim.op], s.root(x), prim.output)
    larger = _expression(s, prim)
    if larger is not None and (larger.output != prim.output or prim.op not in _WHOLE):
        return larger
    if prim.op not in _WHOLE or _is_softcap(s, prim):
        return None
    return Activation((prim.node,), _WHOLE[prim.op], s.root(x), prim.output)


def _is_softcap(s: Semantics, prim: Prim) -> bool:
    """``c * tanh(x / c)`` bounds logits or scores; it is not an activation."""
    if prim.op != "tanh":
        return False
    inner = s.source(prim.operands[0], casts=True)
    scaled = inner is not None and inner.op in ("div", "mul") and any(isinstance(o, (int, float)) for o in inner.operands)
    read = s.only_reader(prim.output, casts=True)
    outer = read.prim if read is not None else None
    return scaled and outer is not None and outer.op == "mul" and any(isinstance(o, (int, float)) for o in outer.operands)


def _expression(s: Semantics, anchor: Prim) -> Activation | None:
    """The largest expression around ``anchor`` that is a known function of one value."""
    sources = list(_upstream(s, anchor))
    best: Activation | None = None
    for output in _downstream(s, anchor):
        for source in sources:
            cone = _Cone(s, source)
            values = cone.evaluate(output)
            if values is None:
                continue
            name = _name_of(values)
            if name is not None:
                nodes = sorted(cone.nodes, key=lambda node: s.position(node.output))
                best = Activation(tuple(nodes), name, source, output)
                break
    return best


def _name_of(values: Array) -> str | None:
    known = _known()
    with np.errstate(all="ignore"):
        equal = (np.abs(known - values) <= 2e-6 + 2e-5 * np.abs(known)).all(axis=1)
    return list(_FUNCTIONS)[int(equal.argmax())] if equal.any() else None


def _upstream(s: Semantics, anchor: Prim) -> Iterator[Value]:
    """Values that the anchor's operand is a pointwise expression of, nearest first."""
    level = [s.root(o) for o in anchor.operands if isinstance(o, Value)]
    seen: set[Value] = set()
    for _ in range(_DEPTH):
        following: list[Value] = []
        for value in level:
            if value in seen or value.is_parameter or len(seen) > _SIZE:
                continue
            seen.add(value)
            yield value
            maker = s.prim(value)
            if maker is not None and _is_pointwise(maker):
                following += [s.root(o) for o in maker.operands if isinstance(o, Value)]
        level = following


def _downstream(s: Semantics, anchor: Prim) -> Iterator[Value]:
    """Results of pointwise ops over the anchor's result, nearest first."""
    level = [anchor.output]
    seen: set[Value] = set()
    for _ in range(_DEPTH):
        following: list[Value] = []
        for value in level:
            if value in seen or len(seen) > _SIZE:
                continue
            seen.add(value)
            if value.dtype is None or value.dtype.is_float:
                yield value
            for read in s.readers(value):
                if read.prim is not None and _is_pointwise(read.prim):
                    following.append(read.prim.output)
        level = following


def _is_pointwise(prim: Prim) -> bool:
    if prim.op == "cast":
        return prim.attributes["to"] is not None and prim.attributes["to"].is_float
    known = prim.op in _UNARY or prim.op in _BINARY or prim.op in ("where", "clip")
    return known and not prim.node.origin.inlined


class _Cone:
    """The expression of one value as a function of another, evaluated at the fixed points."""

    def __init__(self, s: Semantics, source: Value) -> None:
        self.s = s
        self.nodes: list[Node] = []
        self.values: dict[Value, Array | None] = {s.root(source): _POINTS}

    def evaluate(self, operand: Operand) -> Any:
        """The operand's values; ``None`` when it is not an expression of the source alone."""
        number = self.s.number(operand)
        if number is not None or not isinstance(operand, Value):
            return number
        value = self.s.root(operand)
        if value not in self.values:
            self.values[value] = None  # also ends the walk on anything that is visited again
            if len(self.values) <= _SIZE:
                self.values[value] = self._apply(self.s.prim(value))
        return self.values[value]

    def _apply(self, prim: Prim | None) -> Array | None:
        if prim is None or not _is_pointwise(prim):
            return None
        operands = [self.evaluate(operand) for operand in prim.operands]
        if any(o is None and p is not None for o, p in zip(operands, prim.operands, strict=True)):
            return None
        self.nodes.append(prim.node)
        with np.errstate(all="ignore"):
            if prim.op in _UNARY:
                return np.asarray(_UNARY[prim.op](operands[0]))
            if prim.op in _BINARY:
                return np.asarray(_BINARY[prim.op](operands[0], operands[1]))
            if prim.op == "where":
                return np.asarray(np.where(operands[0], operands[1], operands[2]))
            low = -np.inf if operands[1] is None else operands[1]
            return np.asarray(np.clip(operands[0], low, np.inf if operands[2] is None else operands[2]))
