"""Merging edits that follow each other at one place, for the same tokens, into one.

``x + a`` and ``+ b`` is one shift by ``a + b``; factors multiply; low-rank maps compose: with bases ``A``, ``B`` and matrices
``M``, ``N`` the two are one map with the basis ``[A B]`` and the matrix ``[[M, M A^T B N], [0, N]]`` (of one basis: ``M + N +
M A^T A N``). Shifts add up under any common mask; maps and factors under a mask that is 0 or 1 for every token, for which
applying both or none is what the two did.
"""

from __future__ import annotations

import numpy as np

from actgraph.errors import UnsupportedError
from actgraph.graph import Editor, Graph, Node, Use, Value
from actgraph.graph.evaluate import evaluate
from actgraph.graph.graph import Array
from actgraph.ops import get_op
from actgraph.ops.dtypes import DType
from actgraph.ops.layout import from_end
from actgraph.ops.registry import single
from actgraph.passes.steer.edits import EDITS, axis_of

_MASK = {"actgraph.shift": 3, "actgraph.lowrank_map": 3, "actgraph.channel_scale": 2}
_DEPTH = 40  # operations that two masks may consist of


def merge_edits(graph: Graph, editor: Editor, node: Node) -> Node | None:
    """Merge the edit ``node`` into the one before it, if only ``node`` reads that; the node the two have become, or ``None``.

    Both must be of one op, axis and clause, with stored operands; shifts without norms and strengths.
    """
    x = node.operands[0] if node.op in EDITS else None
    first = x.producer if x is not None else None
    if x is None or first is None or first.op != node.op or {use.node for use in x.uses} != {node}:
        return None
    mask = _operand(first, _MASK[node.op])
    if not _same(mask, _operand(node, _MASK[node.op]), _DEPTH) or not _one_kind(first, node):
        return None
    if mask is not None and node.op != "actgraph.shift" and not _is_0_or_1(mask, _DEPTH):
        return None
    merged = _merged(graph, first, node)
    if merged is None:
        return None
    for index, data in merged.items():
        old = first.operands[index]
        assert old is not None and old.dtype is not None
        data = data.astype(old.dtype.numpy)
        if old.is_parameter:
            editor.set_parameter(old, data, uses=[Use(first, index)])
        else:
            editor.set_operand(first, index, data)
    editor.redirect(node.output, first.output)
    editor.erase(node)
    return first


def _operand(node: Node, index: int) -> Value | None:
    return node.operands[index] if index < len(node.operands) else None


def _one_kind(first: Node, second: Node) -> bool:
    """Whether two nodes of one op have equal axes, and shifts neither norms nor strengths."""
    settings = [get_op(each.op).complete(each.attributes) for each in (first, second)]
    rank = first.output.type.rank
    axes = {from_end(axis_of(each), rank) if rank else axis_of(each) for each in settings}
    plain = all(each.get("norm", "none") == "none" for each in settings)
    strengths = first.op == "actgraph.shift" and any(_operand(each, 2) is not None for each in (first, second))
    return len(axes) == 1 and plain and not strengths


def _merged(graph: Graph, first: Node, second: Node) -> dict[int, Array] | None:
    """The stored operands of the merged edit, by their place in ``first``."""
    count = 2 if first.op == "actgraph.lowrank_map" else 1
    try:
        a, b = ([_wide(graph, node.operands[1 + i]) for i in range(count)] for node in (first, second))
    except UnsupportedError:
        return None
    if first.op == "actgraph.lowrank_map":
        (basis, matrix), (other, second_matrix) = a, b
        if basis.shape == other.shape and np.array_equal(basis, other):
            return {2: matrix + second_matrix + matrix @ (basis.T @ basis) @ second_matrix}
        across = matrix @ (basis.T @ other) @ second_matrix
        zero = np.zeros((second_matrix.shape[0], matrix.shape[1]))
        return {1: np.hstack([basis, other]), 2: np.block([[matrix, across], [zero, second_matrix]])}
    if a[0].ndim != b[0].ndim and min(a[0].size, b[0].size) != 1:
        return None  # one number per channel lies along the channel axis, other shapes are broadcast from the last axis
    if first.op == "actgraph.channel_scale":
        return {1: a[0] * b[0]}
    old, new = (single(get_op(node.op).complete(node.attributes)["scale"]) for node in (first, second))
    return {1: a[0] + b[0] * (new / old)} if old != 0 else None


def _wide(graph: Graph, value: Value | None) -> Array:
    return evaluate(graph, value, limit=64).astype(np.float64) if value is not None else np.zeros(())


def _same(left: Value | None, right: Value | None, depth: int) -> bool:
    """Whether two values are one, or computed in the same way from the same."""
    if left is None or right is None or left == right:
        return left is right or left == right
    if left.is_parameter and right.is_parameter:
        a, b = left.graph.read(left), right.graph.read(right)
        return a.dtype == b.dtype and a.shape == b.shape and a.size <= 64 and a.tobytes() == b.tobytes()
    one, other = left.producer, right.producer
    if one is None or other is None or depth == 0 or one.op != other.op or len(one.operands) != len(other.operands):
        return False
    if one.outputs.index(left) != other.outputs.index(right) or repr(one.attributes) != repr(other.attributes):
        return False
    return all(_same(a, b, depth - 1) for a, b in zip(one.operands, other.operands, strict=True))


def _is_0_or_1(mask: Value, depth: int) -> bool:
    """Whether a mask is 0 or 1 by how it is computed: from booleans, from whole numbers clipped to 0 and 1, and products."""
    if mask.dtype is DType.BOOL:
        return True
    prim = mask.producer.prim if mask.producer is not None else None
    if mask.is_parameter:
        return bool(np.isin(mask.graph.read(mask), (0, 1)).all())
    if prim is None or depth == 0:
        return False
    values = [operand for operand in prim.operands if isinstance(operand, Value)]
    if prim.op == "clip":
        return tuple(prim.operands[1:]) == (0, 1) and _is_whole(values[0])
    if prim.op in ("cast", "reshape", "expand", "identity", "mul"):
        return len(values) == len(prim.operands) and all(_is_0_or_1(value, depth - 1) for value in values)
    if prim.op == "sub":
        whole, part = prim.operands
        one = whole == 1 if not isinstance(whole, Value) else False
        return one and isinstance(part, Value) and _is_0_or_1(part, depth - 1)
    return False


def _is_whole(value: Value) -> bool:
    if value.dtype is not None and value.dtype.is_integer:
        return True
    prim = value.producer.prim if value.producer is not None else None
    source = prim.operands[0] if prim is not None and prim.op == "cast" else None
    return isinstance(source, Value) and source.dtype is not None and source.dtype.is_integer
