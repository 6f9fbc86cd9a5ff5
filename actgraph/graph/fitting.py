"""Operand shapes that do not fit together: pointwise operands that do not broadcast, products of unequal inner sizes.

Engines refuse such nodes when they run, and fake tensors when they are made; a graph holds one after an edit that changed
a parameter or an operand and left its readers behind. Only sizes that are known numbers are compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from actgraph.graph.graph import Node, Value
from actgraph.graph.prims import Prim
from actgraph.ops.shapes import Dim, Shape, broadcast

_BROADCASTING = frozenset({
    "add", "sub", "mul", "div", "pow", "where", "min", "max", "clip", "and", "or", "eq", "ne", "lt", "le", "gt", "ge",
})  # fmt: skip


def misfits(node: Node) -> Iterator[str]:
    """What is wrong with the operand shapes of ``node``, one line each."""
    prim = node.prim
    if prim is None:
        return
    if prim.op in _BROADCASTING:
        fits = _broadcasts([operand.shape for operand in prim.operands if isinstance(operand, Value)])
        if not fits and "broadcast" not in node.attributes:  # before opset 7, operands said how they broadcast
            yield f"{node.name}: the operands of {node.op} do not broadcast: {_listed(prim)}"
    elif prim.op in ("matmul", "linear"):
        yield from _product(node, prim)


def _product(node: Node, prim: Prim) -> Iterator[str]:
    left, right = (operand.shape if isinstance(operand, Value) else None for operand in prim.operands[:2])
    if not left or not right:
        return
    if prim.op == "linear":
        out_axis = int(prim.attributes["out_axis"])
        rows, columns = right[1 - out_axis], right[out_axis]
        bias = prim.operands[2] if len(prim.operands) > 2 else None
        if isinstance(bias, Value) and not _broadcasts([bias.shape, (columns,)]):
            yield f"{node.name}: the bias of {node.op} does not fit its weight: {_listed(prim)}"
    else:
        rows = right[-2] if len(right) > 1 else right[0]
        if not _broadcasts([left[:-2], right[:-2]]):
            yield f"{node.name}: the batches of {node.op} do not broadcast: {_listed(prim)}"
    if _differ(left[-1], rows):
        yield f"{node.name}: the inner sizes of {node.op} differ, {left[-1]} and {rows}: {_listed(prim)}"


def _broadcasts(shapes: Sequence[Shape | None]) -> bool:
    try:
        broadcast([shape for shape in shapes if shape is not None])
    except ValueError:
        return False
    return True


def _differ(left: Dim, right: Dim) -> bool:
    return isinstance(left, int) and isinstance(right, int) and left != right


def _listed(prim: Prim) -> str:
    return ", ".join(f"%{operand.name} is {operand.type}" for operand in prim.operands if isinstance(operand, Value))
