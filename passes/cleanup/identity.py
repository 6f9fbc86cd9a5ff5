"""Removing nodes that return their input."""

from __future__ import annotations

from typing import ClassVar

from actgraph.graph import Graph, Value
from actgraph.graph.prims import Prim
from actgraph.pipeline.base import Pass, PassContext, PassResult

#: Copies that give a tensor the layout that later views rely on.
_LAYOUT = frozenset({"aten.clone", "aten.contiguous"})


class RemoveIdentities(Pass):
    """Remove aliases, no-op slices, casts to the same type, reshapes to the same shape, ``x + 0`` on integers and ``x * 1``.

    ``x + 0`` on floats stays: it turns -0.0 into 0.0.
    """

    name: ClassVar[str] = "identity"
    family: ClassVar[str] = "cleanup"
    preserves: ClassVar[frozenset[str]] = frozenset({"values"})
    repeatable: ClassVar[bool] = True
    may_do_nothing: ClassVar[bool] = True

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        result = PassResult()
        with context.edit(graph) as editor:
            for node in graph.nodes():
                prim = node.prim
                source = passes_through(prim) if prim is not None else None
                if prim is None or node.op in _LAYOUT or source is None or source.kind != source.kind.RESULT:
                    continue
                if (
                    source.dtype != prim.output.dtype
                    or source.shape is None
                    or None in source.shape
                    or source.shape != prim.output.shape
                ):
                    continue
                table = graph.site_table
                if table.names_of(prim.output) and len(source.uses) > 1:
                    continue  # a site must not gain the readers that only its source had
                editor.redirect(prim.output, source)
                result.counts[prim.op] += 1
            if editor.touched:
                editor.erase_dead()
        return result


def passes_through(prim: Prim) -> Value | None:
    """The operand that ``prim`` returns unchanged (given equal types), if it does."""
    operands = prim.operands
    first = operands[0] if operands else None
    match prim.op:
        case "identity" | "cast" | "reshape" | "expand":
            return first if isinstance(first, Value) else None
        case "transpose":
            perm = tuple(prim.attributes.get("perm") or ())
            return first if isinstance(first, Value) and perm == tuple(range(len(perm))) and perm else None
        case "mul" | "div":
            return _beside(operands, 1, commutes=prim.op == "mul")
        case "add" | "sub" if prim.output.dtype is not None and prim.output.dtype.is_integer:
            return _beside(operands, 0, commutes=prim.op == "add")
    return None


def _beside(operands: tuple[object, ...], neutral: int, *, commutes: bool) -> Value | None:
    """The other operand of a binary op one of whose operands is the neutral number."""
    a, b = operands
    if isinstance(a, Value) and not isinstance(b, Value) and b == neutral:
        return a
    if commutes and isinstance(b, Value) and not isinstance(a, Value) and a == neutral:
        return b
    return None
