"""Convolutions, with a bias added after them where the operator itself has none."""

from __future__ import annotations

from actgraph.graph.graph import Use, Value
from actgraph.graph.prims import Prim
from actgraph.graph.recognize.semantic import Semantics
from actgraph.graph.views import Convolution


def convolutions(semantics: Semantics) -> list[Convolution]:
    """All convolutions whose weight is stored, in order."""
    found = [conv for prim in semantics.prims if prim is not None for conv in _convolution(semantics, prim)]
    return sorted(found, key=lambda conv: semantics.position(conv.output))


def _convolution(s: Semantics, prim: Prim) -> list[Convolution]:
    if prim.op not in ("conv", "conv_transpose"):
        return []
    x, weight, bias = prim.operands[:3]
    if not isinstance(x, Value) or not isinstance(weight, Value) or not s.is_constant(weight):
        return []
    transposed = prim.op == "conv_transpose"
    nodes, output = [prim.node], prim.output
    read = s.only_reader(output) if bias is None else None
    if read is not None and read.prim is not None and read.prim.op == "add" and read.node.output.shape == output.shape:
        groups = prim.attributes["groups"] or 1
        shape = weight.shape or ()
        features = shape[1] * groups if transposed and len(shape) > 1 and isinstance(shape[1], int) else (shape or (None,))[0]
        for operand in read.node.operands:
            if operand is not None and operand != read.value and _per_channel(operand, features, len(output.shape or ())):
                if s.is_constant(operand):
                    bias, output = operand, read.node.output
                    nodes.append(read.node)
                break
    source = s.root(weight, casts=True)
    return [
        Convolution(
            nodes=tuple(nodes), input=Use(prim.node, s.operand_index(prim.node, x, skip=weight)), output=output,
            weight=source if source.shape == weight.shape else weight, bias=bias if isinstance(bias, Value) else None,
            groups=prim.attributes["groups"] or 1, transposed=transposed,
        )
    ]  # fmt: skip


def _per_channel(value: Value, features: object, rank: int) -> bool:
    """Whether a constant adds one number per channel: ``[features, 1, 1]`` with any leading 1s."""
    shape = value.shape
    if shape is None or rank < 3 or len(shape) < rank - 1:
        return False
    channel = len(shape) - (rank - 1)
    return shape[channel] == features and all(size == 1 for i, size in enumerate(shape) if i != channel)
