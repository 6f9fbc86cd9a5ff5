"""What a value is computed from: an edit that is driven by a value can act only on what comes after it."""

from __future__ import annotations

from actgraph.graph import Value


def computed_from(value: Value) -> frozenset[Value]:
    """The values that ``value`` is computed from, itself left out."""
    found: set[Value] = set()
    pending = [value]
    while pending:
        node = pending.pop().producer
        for operand in node.operands if node is not None else ():
            if operand is not None and operand not in found:
                found.add(operand)
                pending.append(operand)
    return frozenset(found)
