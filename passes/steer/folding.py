"""When an edit at a site may be moved into weights or biases, and where to.

A constant shift of a value ``s`` moves into the bias of a linear whose output reaches ``s`` through additions alone, if no
value on the way (the linear's output included, ``s`` excluded) has another reader: then only readers of ``s`` notice.
A linear map of a value moves into the linear that writes it, or into the linears that read it when all readers are linears.
"""

from __future__ import annotations

from actgraph.graph import Graph, Value
from actgraph.graph.views import Linear


def bias_writer(graph: Graph, value: Value, linears: dict[Value, Linear]) -> tuple[Linear, list[Value]] | None:
    """The linear whose bias can carry a constant added to ``value``, and the values whose meaning that changes.

    linears: linear views by output. The second part lists the values on the way (not ``value``): after folding they
    contain the shift, so sites there no longer denote what they did. ``None``: not foldable.
    """
    if value in linears:
        return linears[value], []
    node = value.producer
    prim = node.prim if node is not None else None
    if prim is None or prim.op not in ("add", "identity"):
        return None
    for operand in reversed([o for o in prim.operands if isinstance(o, Value)]):
        if operand.is_parameter or len(operand.uses) != 1 or operand.shape != value.shape:
            continue
        found = bias_writer(graph, operand, linears)
        if found is not None:
            return found[0], [operand, *found[1]]
    return None


def linear_readers(graph: Graph, value: Value, linears: list[Linear]) -> list[Linear] | None:
    """The linears that read ``value`` if every reader is one; ``None`` otherwise."""
    readers = [linear for linear in linears if linear.input.node is not None and _reads(linear, value)]
    edges = {(linear.input.node, linear.input.index) for linear in readers}
    return readers if readers and all((use.node, use.index) in edges for use in value.uses) else None


def _reads(linear: Linear, value: Value) -> bool:
    node = linear.input.node
    return node is not None and node.operands[linear.input.index] == value
