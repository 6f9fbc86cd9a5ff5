"""Up, gate, activation, threshold and down as ``actgraph.feed_forward``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from actgraph.graph.evaluate import evaluate
from actgraph.graph.fusion.linears import InputGate, input_gate
from actgraph.graph.fusion.rewriter import Rewriter, same_shape, sole_user
from actgraph.graph.fusion.weights import Matrix, matrix_of, place
from actgraph.graph.graph import Value
from actgraph.graph.views import FeedForward, Linear
from actgraph.ops.dtypes import COMPUTE_FLOATS, DType
from actgraph.ops.feed_forward import ACTIVATIONS
from actgraph.ops.registry import DOMAIN


@dataclass(frozen=True)
class _Plan:
    """A feed-forward that can be fused."""

    x: Value
    sparse: str
    gate: InputGate | None  # on the activation or on hidden
    up: Matrix
    down: Matrix
    gate_matrix: Matrix | None

    @property
    def matrices(self) -> list[Matrix]:
        return [self.up, self.down, *([self.gate_matrix] if self.gate_matrix is not None else [])]


def fuse_feed_forwards(rewriter: Rewriter) -> None:
    """Fuse every chosen feed-forward that drops neurons or holds codes (with ``dense`` every one), and whose inputs are not
    gated: those of its linears that are, ``linears`` fuses one by one."""
    for block in rewriter.graph.views.feed_forwards():
        linears = [linear for linear in (block.gate, block.up, block.down) if linear is not None]
        if rewriter.chosen([linear.output for linear in linears], [linear.input for linear in linears]):
            _fuse(rewriter, block)


def _fuse(rewriter: Rewriter, block: FeedForward) -> None:
    first = _operand(block.up)
    if input_gate(first) is not None or (block.gate is not None and input_gate(_operand(block.gate)) is not None):
        return
    plan = _plan(block)
    quantized = isinstance(plan, _Plan) and any(matrix.quantized for matrix in plan.matrices)
    if isinstance(plan, str):
        gated = any(use.node is not None and use.node.op == f"{DOMAIN}.gate" for use in block.act.uses)
        if rewriter.dense or gated or any(_is_quantized(linear) for linear in (block.up, block.down)):
            rewriter.decline(block.down.output, f"{plan}: its linears stay apart")
        return
    if plan.gate is None and not quantized and not rewriter.dense:
        return
    _insert(rewriter, block, plan)


def _is_quantized(linear: Linear) -> bool:
    matrix = matrix_of(linear)
    return isinstance(matrix, Matrix) and matrix.quantized


def _operand(linear: Linear) -> Value:
    node, index = linear.input
    value = node.operands[index] if node is not None else None
    assert value is not None
    return value


def _plan(block: FeedForward) -> _Plan | str:
    """How to fuse ``block``, or why not."""
    x = _operand(block.up)
    if block.fused_gate_up:
        return "gate and up are one projection"
    if block.activation.function not in ACTIVATIONS:
        return f"its activation is {block.activation.function}"
    if block.gate is not None and _operand(block.gate) != x:
        return "gate and up read different values"
    if x.dtype not in COMPUTE_FLOATS or block.down.output.dtype != x.dtype:
        return f"it takes {x.dtype} and gives {block.down.output.dtype}"
    if x.shape is None or block.down.output.shape is None or not same_shape(x.shape[:-1], block.down.output.shape[:-1]):
        return "its rows are rearranged"
    chain = _chain(block)
    if isinstance(chain, str):
        return chain
    sparse, gate = chain
    found = [matrix_of(linear) for linear in (block.up, block.down)]
    found += [matrix_of(block.gate)] if block.gate is not None else []
    for matrix in found:
        if isinstance(matrix, str):
            return matrix
        if matrix.quantized and not _is_symmetric(matrix):
            return "its codes are not symmetric"
    matrices = [matrix for matrix in found if isinstance(matrix, Matrix)]
    forms = {(matrix.block, matrix.packed) for matrix in matrices if matrix.quantized}
    if len(forms) > 1 or (any(packed for _, packed in forms) and not all(matrix.quantized for matrix in matrices)):
        return "its weights are quantized in different ways"
    if any(_odd(matrix) for matrix in matrices):
        return "an odd number of 4-bit codes does not fill bytes"
    return _Plan(x, sparse, gate, matrices[0], matrices[1], matrices[2] if len(matrices) > 2 else None)


def _odd(matrix: Matrix) -> bool:
    """Whether laying packed codes the other way would leave half a byte."""
    size = matrix.source.shape[0] if matrix.source.shape is not None else None
    return bool(matrix.packed) and isinstance(size, int) and size % 2 == 1


def _is_symmetric(matrix: Matrix) -> bool:
    if matrix.packed == "u4":
        return matrix.zero is not None and bool((evaluate(matrix.zero.graph, matrix.zero) == 8).all())
    return matrix.zero is None and (matrix.source.dtype is not DType.U8 or bool(matrix.packed))


def _chain(block: FeedForward) -> tuple[str, InputGate | None] | str:
    """``(sparse, gate)`` when nothing but one gate stands between the parts and nobody else reads what is in between."""
    other = "another value stands between its parts, or is read by others"
    first = block.gate or block.up
    if block.activation.input != first.output:
        return other
    starts = {use.node for use in first.output.uses}
    if not starts or not starts <= set(block.activation.nodes):
        return other
    value, sparse, gate = block.act, "none", None
    value, gate = _through_gate(value)
    sparse = "none" if gate is None else "act"
    if block.gate is not None:
        product = sole_user(value)
        prim = product.prim if product is not None else None
        if prim is None or prim.op != "mul" or sole_user(block.up.output) != product:
            return other
        if {value, block.up.output} != {operand for operand in prim.operands if isinstance(operand, Value)}:
            return other
        value = prim.output
    inner, second = _through_gate(value)
    if second is not None and gate is not None:
        return "both its activation and its hidden value are gated"
    if second is not None:
        sparse, gate = "hidden", second
    node, index = block.down.input
    if node is None or node.operands[index] != inner or len(inner.uses) != 1:
        return other
    return sparse, gate


def _through_gate(value: Value) -> tuple[Value, InputGate | None]:
    """What ``value`` becomes through a gate that is its only reader, and the gate."""
    node = sole_user(value)
    if node is None or node.op != f"{DOMAIN}.gate":
        return value, None
    gate = input_gate(node.output)
    return (node.output, gate) if isinstance(gate, InputGate) else (value, None)


def _insert(rewriter: Rewriter, block: FeedForward, plan: _Plan) -> None:
    up, down = place(rewriter, plan.up, "out_in"), place(rewriter, plan.down, "in_out")
    gate = place(rewriter, plan.gate_matrix, "out_in") if plan.gate_matrix is not None else None
    forms = [placed for placed in (up, down, gate) if placed is not None and placed.scale is not None]
    attributes: dict[str, Any] = {"activation": block.activation.function, "sparse": plan.sparse}
    if forms:
        attributes |= {"block_size": forms[0].block, "packed": forms[0].packed}
    thresholds = None
    if plan.gate is not None:
        attributes |= plan.gate.attributes
        thresholds = plan.gate.thresholds
    operands: list[Any] = [
        plan.x, up.weight, down.weight, gate.weight if gate is not None else None,
        up.scale, down.scale, gate.scale if gate is not None else None,
        rewriter.vector(block.up.bias), rewriter.vector(block.down.bias),
        rewriter.vector(block.gate.bias) if block.gate is not None else None, thresholds,
    ]  # fmt: skip
    made = rewriter.editor.insert(f"{DOMAIN}.feed_forward", operands, attributes, like=block.down.matrix_node)
    rewriter.editor.redirect(block.down.output, made.output)
    rewriter.done("feed_forward")
