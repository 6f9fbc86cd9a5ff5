"""``[gate] + [dequantize] + linear (+ bias)`` as ``actgraph.linear``.

A gated linear reads rows of its weight by input channel ("in_out"), so that what belongs to dropped inputs is never read; any
other reads them by output channel ("out_in").
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from actgraph.graph.fusion.rewriter import Rewriter, same_shape, sole_user
from actgraph.graph.fusion.weights import Matrix, matrix_of, place
from actgraph.graph.graph import Node, Use, Value
from actgraph.graph.views import Linear
from actgraph.ops.dtypes import COMPUTE_FLOATS
from actgraph.ops.registry import DOMAIN, get_op


@dataclass(frozen=True)
class InputGate:
    """A gate on the input of a linear: what it reads, and its operands and attributes as those of ``actgraph.linear``."""

    source: Value
    attributes: dict[str, Any] = field(default_factory=dict)
    thresholds: Value | None = None
    indices: Value | None = None


def fuse_linears(rewriter: Rewriter) -> None:
    """Fuse every chosen linear that is gated, quantized or output-gated (with ``dense`` every one)."""
    for linear in rewriter.graph.views.linears():
        if rewriter.chosen([linear.output], [linear.input]):
            _fuse(rewriter, linear)


def _fuse(rewriter: Rewriter, linear: Linear) -> None:
    editor = rewriter.editor
    x = _input(linear)
    gate = input_gate(x) if rewriter.gates else None
    matrix = matrix_of(linear)
    kept = _kept(linear.output) if rewriter.gates else None
    quantized = isinstance(matrix, Matrix) and matrix.quantized
    if gate is None and kept is None and not quantized and not rewriter.dense:
        return
    reason = gate if isinstance(gate, str) else matrix if isinstance(matrix, str) else _refusal(linear, x)
    if reason:
        rewriter.decline(linear.output, reason)
        return
    assert isinstance(matrix, Matrix) and not isinstance(gate, str)
    layout = "out_in" if gate is None else "in_out"
    placed = place(rewriter, matrix, layout)
    attributes = {"layout": layout, "block_size": placed.block, "packed": placed.packed}
    source, thresholds, indices = x, None, None
    if gate is not None:
        source, thresholds, indices = gate.source, gate.thresholds, gate.indices
        attributes |= gate.attributes
    made = editor.insert(
        f"{DOMAIN}.linear",
        [source, placed.weight, placed.scale, placed.zero, rewriter.vector(linear.bias), thresholds, indices, kept],
        attributes,
        like=linear.matrix_node,
    )
    if gate is None:
        editor.move_edges(linear.input, Use(made, 0))
    else:
        editor.forget_edge(linear.input, editor.by)  # the gated copy of the input exists no more
    editor.redirect(linear.output, made.output)
    rewriter.done("linear")


def _input(linear: Linear) -> Value:
    node, index = linear.input
    value = node.operands[index] if node is not None else None
    assert value is not None
    return value


def _refusal(linear: Linear, x: Value) -> str:
    output = linear.output
    if x.dtype not in COMPUTE_FLOATS or output.dtype != x.dtype:
        return f"it takes {x.dtype} and gives {output.dtype}"
    if x.shape is None or output.shape is None or not same_shape(x.shape[:-1], output.shape[:-1]):
        return f"its rows are rearranged between {x.type} and {output.type}"
    return ""


def input_gate(x: Value) -> InputGate | str | None:
    """The gate that ``x`` comes from; ``None`` where there is none, a reason where a linear cannot take it."""
    node = x.producer
    if node is None or node.op not in (f"{DOMAIN}.gate", f"{DOMAIN}.topk_gate", f"{DOMAIN}.index_gate"):
        return None
    source = node.operands[0]
    extra = node.operands[1] if len(node.operands) > 1 else None
    given = get_op(node.op).complete(node.attributes)
    if source is None or x.shape is None or given["axis"] not in (-1, len(x.shape) - 1):
        return "its input is gated along another axis"
    if node.op.endswith(".topk_gate"):
        if given["group_size"]:
            return "its input is gated in groups"
        return InputGate(source, {"keep": "top_k", "k": given["k"]})
    if node.op.endswith(".index_gate"):
        return InputGate(source, {"keep": "listed"}, indices=extra)
    if extra is not None and extra.shape not in ((), x.shape[-1:]):
        return "its thresholds are neither one number nor one per channel"
    return InputGate(source, {"keep": given["keep"], "threshold": given["threshold"]}, thresholds=extra)


def _kept(output: Value) -> Value | None:
    """The gated activation that is all that the output of a linear is multiplied by: outputs where it is 0 do not count."""
    reader = sole_user(output)
    prim = reader.prim if reader is not None else None
    if prim is None or prim.op != "mul":
        return None
    others = [operand for operand in prim.operands if operand != output]
    gated = others[0] if len(others) == 1 else None
    if not isinstance(gated, Value) or not _is_gate(gated.producer) or not same_shape(gated.shape, output.shape):
        return None
    return gated if gated.dtype in COMPUTE_FLOATS else None


def _is_gate(node: Node | None) -> bool:
    return node is not None and node.op in (f"{DOMAIN}.gate", f"{DOMAIN}.topk_gate", f"{DOMAIN}.index_gate")
