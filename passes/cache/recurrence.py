"""A recurrence that capturing unrolled: the state of a state-space model, written out step by step for one length."""

from __future__ import annotations

from actgraph.graph import Graph, Value
from actgraph.graph.context import token_dims

_SAME = frozenset({"identity", "cast", "reshape"})


def unrolled_steps(graph: Graph) -> int:
    """How many steps ``state = factor * state + new`` follow one another, where they are about as many as there are tokens.

    0 where there is no such recurrence. A scan over a dynamic length cannot be unrolled, so only graphs of a fixed length
    are looked at.
    """
    dims = token_dims(graph)
    if dims is None or len(dims) < 2 or not isinstance(dims[1], int) or dims[1] < 3:
        return 0
    steps: dict[Value, int] = {}  # of a state, or of a state times a factor
    products: dict[Value, int] = {}
    for node in graph.nodes():
        prim = node.prim
        if prim is None:
            continue
        before = [operand for operand in prim.operands if isinstance(operand, Value)]
        if prim.op in _SAME and before:
            for known in (steps, products):
                if before[0] in known:
                    known[prim.output] = known[before[0]]
        elif prim.op == "mul":
            products[prim.output] = max((steps.get(value, 0) for value in before), default=0)
        elif prim.op == "add" and any(value in products for value in before):
            steps[prim.output] = 1 + max(products.get(value, 0) for value in before)
    longest = max(steps.values(), default=0)
    return longest if longest >= dims[1] - 1 else 0
