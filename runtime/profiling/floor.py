"""The bytes that a graph cannot do without reading."""

from __future__ import annotations

import math
from collections.abc import Iterable

from actgraph.graph.graph import Graph, Value, parameter_bytes
from actgraph.graph.slots import Slot
from actgraph.runtime.state import TOKENS

#: Primitives that read rows of their first operand, not all of it.
_LOOKS_UP = ("gather",)


def weight_bytes(graph: Graph) -> int:
    """Bytes of the weights that a call reads whole, each once. Tables that are only looked up in do not count."""
    return sum(parameter_bytes(value) for value in graph.parameters() if _is_read(value))


def slot_bytes(slots: Iterable[Slot], tokens: int) -> int:
    """Bytes that the slots of one row hold of ``tokens`` tokens: of buffers of fixed size what is written."""
    total = 0
    for slot in slots:
        sizes = [size if isinstance(size, int) else 1 for size in slot.shape]
        if slot.update != "replace":
            room = slot.shape[TOKENS]
            sizes[TOKENS] = min(tokens, room) if isinstance(room, int) else tokens
        total += math.prod(sizes) * slot.dtype.bits // 8
    return total


def _is_read(value: Value) -> bool:
    for use in value.uses:
        prim = use.node.prim if use.node is not None else None
        if use.node is not None and not (prim is not None and prim.op in _LOOKS_UP and use.index == 0):
            return True
    return False
