"""The bytes that a graph cannot do without reading."""

from __future__ import annotations

from actgraph.graph.graph import Graph, Value, parameter_bytes

#: Primitives that read rows of their first operand, not all of it.
_LOOKS_UP = ("gather",)


def weight_bytes(graph: Graph) -> int:
    """Bytes of the weights that a call reads whole, each once. Tables that are only looked up in do not count."""
    return sum(parameter_bytes(value) for value in graph.parameters() if _is_read(value))


def _is_read(value: Value) -> bool:
    for use in value.uses:
        prim = use.node.prim if use.node is not None else None
        if use.node is not None and not (prim is not None and prim.op in _LOOKS_UP and use.index == 0):
            return True
    return False
