"""Gains per neuron, moved into the weights of the linears that read the neurons.

``W (gamma * y) = (W diag(gamma)) y``: legal where every reader of ``y`` is a linear with stored weights, also behind products
with other values of its shape (``gamma * act * up``). The values on the way then lack the gains, so their sites are given up.
"""

from __future__ import annotations

from actgraph.graph import Editor, Graph, Value
from actgraph.graph.graph import Array
from actgraph.graph.views import Linear
from actgraph.ops.dtypes import DType
from actgraph.passes.steer.folding import fold_edit


def fold_gains(graph: Graph, editor: Editor, value: Value, gamma: Array, by: str) -> str:
    """Multiply the columns of the linears that read ``value [.., width]`` by ``gamma [width]``, and say what was done.

    by: what removed sites are told to have been removed by. Weights of 16 bits are left alone: they would be rounded. What was
    folded is recorded in ``graph.folds``, as a channel scale in front of the linears. The result is ``gains folded``, or
    ``gains in front of linears`` (folding declined, and the scale stays there), or empty: nothing was done.
    """
    linears = graph.views.linears()
    between, end = [], value
    while not (readers := _readers(end, linears)):
        product = _product(end)
        if product is None:
            return ""
        between.append(end)
        end = product
    if not all(_foldable(linear, len(gamma)) for linear in readers):
        return ""
    node = editor.insert("actgraph.channel_scale", [end, gamma])
    editor.redirect(end, node.output)
    folded = fold_edit(graph, editor, node).folded
    for each in between:
        editor.forget_sites(each, by)
    return "gains folded" if folded else "gains in front of linears"


def _readers(value: Value, linears: list[Linear]) -> list[Linear]:
    """The linears that read ``value`` where nothing else does; empty otherwise."""
    edges = {linear.input: linear for linear in linears}
    uses = value.uses
    return [edges[use] for use in uses] if all(use in edges for use in uses) else []


def _product(value: Value) -> Value | None:
    """The product of ``value`` and another value of its shape, where nothing else reads it."""
    uses = value.uses
    node = uses[0].node if len(uses) == 1 else None
    prim = node.prim if node is not None else None
    if prim is None or prim.op not in ("mul", "identity") or prim.output.shape != value.shape or value.shape is None:
        return None
    squared = prim.op == "mul" and prim.operands[0] == prim.operands[1]
    return None if squared else prim.output


def _foldable(linear: Linear, width: int) -> bool:
    return (
        linear.weight.is_parameter
        and linear.matrix is not None
        and linear.in_features == width
        and linear.weight.dtype in (DType.F32, DType.F64)
    )
