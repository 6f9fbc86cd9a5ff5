"""Common-subexpression elimination."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from actgraph.graph import Graph, Node
from actgraph.pipeline.base import Pass, PassContext, PassResult


class CommonSubexpressions(Pass):
    """Compute equal nodes once.

    What carries a site stays as it is, be it a value, an edge or the inside of a fused op: an edit there must reach its own
    readers only. Two readers on one edge are one reader.
    """

    name: ClassVar[str] = "cse"
    family: ClassVar[str] = "cleanup"
    preserves: ClassVar[frozenset[str]] = frozenset({"values"})
    repeatable: ClassVar[bool] = True
    may_do_nothing: ClassVar[bool] = True

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        result = PassResult()
        seen: dict[Any, Node] = {}
        outputs = {value for _, value in graph.outputs()}
        table = graph.site_table
        with context.edit(graph) as editor:
            for node in graph.nodes():
                prim = node.prim
                if not node.outputs or prim is None or prim.op == "random":
                    continue  # what the vocabulary does not know may be random or have effects
                anchored = table.anchored_operands(node)
                if any(table.names_of(output) for output in node.outputs) or any(operand < 0 for _, operand in anchored):
                    continue
                key = (node.op, node.operands, anchored, _frozen(node.attributes), tuple(o.type for o in node.outputs))
                first = seen.setdefault(key, node)
                if first is node or any(o in outputs for o in node.outputs):
                    continue
                for kept, duplicate in zip(first.outputs, node.outputs, strict=True):
                    editor.redirect(duplicate, kept)
                result.counts["merged"] += 1
            if editor.touched:
                editor.erase_dead()
        return result


def _frozen(value: Any) -> Any:
    """A hashable image of an attribute value, equal for values of one type that are the same bit by bit."""
    if isinstance(value, dict):
        return tuple(sorted((key, _frozen(item)) for key, item in value.items()))
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(item) for item in value)
    if isinstance(value, (np.ndarray, np.generic)):
        return (str(value.dtype), value.shape, value.tobytes())
    if isinstance(value, (float, complex)):
        return (type(value).__name__, np.asarray(value).tobytes())  # 0.0 == -0.0, and one over them differs
    try:
        hash(value)
    except TypeError:
        return object()  # equal to nothing
    return (type(value).__name__, value)
