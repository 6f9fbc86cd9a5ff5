"""Gated linears of the same x as one ``actgraph.linear``, and slices of its result.

Such linears skip the same rows of their weights. Stored side by side, what is read for an input is one long run of memory
instead of several short ones (queries, keys and values of a small model have rows of less than a kilobyte, of which memory
delivers half as many bytes per second as of longer ones), and x is gated once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from actgraph.graph.evaluate import evaluate
from actgraph.graph.fusion.rewriter import Rewriter
from actgraph.graph.graph import Array, Node, Value
from actgraph.ops.registry import DOMAIN

#: The operands of ``actgraph.linear``.
_X, _WEIGHT, _SCALE, _ZERO, _BIAS, _THRESHOLDS, _INDICES, _KEPT = range(8)


def merge_siblings(rewriter: Rewriter) -> None:
    """Merge gated linears of the same x and gate, whose weights are stored in the same way."""
    groups: dict[tuple[object, ...], list[Node]] = {}
    for node in rewriter.graph.nodes():
        if node.op == f"{DOMAIN}.linear" and node.attributes.get("layout") == "in_out":
            operands = _operands(node)
            weight, scale = operands[_WEIGHT], operands[_SCALE]
            plain = operands[_ZERO] is None and operands[_KEPT] is None
            stored = all(operand is None or operand.is_parameter for operand in (weight, scale, operands[_BIAS]))
            one = scale is not None and scale.shape is not None and all(size == 1 for size in scale.shape)
            if one and node.attributes.get("block_size", 0):
                continue
            if weight is None or not plain or not stored or node.attributes.get("keep", "none") == "none":
                continue
            same = (operands[_X], operands[_THRESHOLDS], operands[_INDICES], weight.dtype, scale is None)
            groups.setdefault((*same, *sorted(node.attributes.items())), []).append(node)
    for nodes in groups.values():
        if len(nodes) > 1:
            _merge(rewriter, nodes)


def _merge(rewriter: Rewriter, nodes: Sequence[Node]) -> None:
    editor, first = rewriter.editor, nodes[0]
    widths = [node.output.shape[-1] if node.output.shape is not None else None for node in nodes]
    sizes = [width for width in widths if isinstance(width, int)]
    scales = [_scale(node, size) for node, size in zip(nodes, sizes, strict=False)]
    if len(sizes) < len(nodes) or len({None if scale is None else scale.shape[:-1] for scale in scales}) > 1:
        return
    operands = _operands(first)
    name = f"{operands[_WEIGHT].name}_and_{len(nodes) - 1}"  # type: ignore[union-attr]
    operands[_WEIGHT] = editor.add_parameter(name, _joined([_data(node, _WEIGHT) for node in nodes]))
    if scales[0] is not None:
        operands[_SCALE] = editor.add_parameter(f"{name}_scale", _joined(scales))
    biases = [bias if bias is None else bias.reshape(-1) for bias in (_data(node, _BIAS) for node in nodes)]
    known = next((bias for bias in biases if bias is not None), None)
    if known is not None:
        filled = [np.zeros(size, known.dtype) if b is None else b for b, size in zip(biases, sizes, strict=True)]
        operands[_BIAS] = editor.add_parameter(f"{name}_bias", _joined(filled))
    made = editor.insert(first.op, operands, first.attributes, before=first, like=first)
    assert made.output.shape is not None
    axis, start = len(made.output.shape) - 1, 0
    for node, size in zip(nodes, sizes, strict=True):
        part = editor.insert("slice", [made.output], {"axis": axis, "start": start, "end": start + size}, after=made, like=node)
        editor.redirect(node.output, part.output)
        start += size
    rewriter.done("siblings")


def _operands(node: Node) -> list[Value | None]:
    return [*node.operands, *[None] * (8 - len(node.operands))]


def _data(node: Node, place: int) -> Array | None:
    value = _operands(node)[place]
    return evaluate(value.graph, value) if value is not None else None


def _scale(node: Node, outputs: int) -> Array | None:
    """The scales of a linear, one for each output (and group)."""
    scale = _data(node, _SCALE)
    return scale if scale is None or scale.size > 1 else np.broadcast_to(scale.reshape(-1), (outputs,))


def _joined(arrays: Sequence[Array | None]) -> Array:
    return np.ascontiguousarray(np.concatenate([array for array in arrays if array is not None], axis=-1))
