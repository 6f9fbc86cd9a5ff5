"""A graph in half precision as a copy that rounds nowhere to half: what a cache does is shown on it, apart from rounding."""

from __future__ import annotations

from actgraph.graph import Graph
from actgraph.ops.dtypes import DType
from actgraph.passes.cast.cast import Cast
from actgraph.pipeline.base import PassContext

HALF = frozenset({DType.F16, DType.BF16})


def in_float32(graph: Graph, by: str) -> Graph:
    """A copy of ``graph`` whose weights are float32, and so is what it computes and gives.

    The pass ``cast`` leaves casts that a model makes itself (behind norms), and gives outputs in the types that they had; each
    of these rounds to half, by 2**-11 or 2**-8 relative, which is more than a cache may move. Here they round no more.
    """
    copy = graph.clone()
    Cast(dtype="f32").run(copy, PassContext(name=by))
    with copy.edit(by=by) as editor:
        for node in list(copy.nodes()):
            prim = node.prim
            if prim is not None and prim.op == "cast" and prim.output.dtype in HALF:
                (source,) = (operand for operand in node.operands[:1] if operand is not None)
                made = editor.insert("cast", [source], {"to": DType.F32}, before=node)
                editor.redirect(node.output, made.output)
            else:
                editor.retype([node], propagate=False)
        editor.erase_dead()
    return copy


#: Ops that drop a channel or keep it: what is next to a threshold goes either way by rounding.
GATES = frozenset({"actgraph.gate", "actgraph.topk_gate"})


def with_open_gates(graph: Graph, by: str) -> Graph:
    """A copy of ``graph`` whose gates keep everything.

    A gate looks at the channels of one token, so that what a cache does is the same with and without it; but where rounding in
    another order moves a channel over its threshold, results jump, by more than a cache may move them.
    """
    copy = graph.clone()
    with copy.edit(by=by) as editor:
        for node in [node for node in copy.nodes() if node.op in GATES]:
            (source,) = (operand for operand in node.operands[:1] if operand is not None)
            editor.redirect(node.output, source)
        editor.erase_dead()
    return copy
