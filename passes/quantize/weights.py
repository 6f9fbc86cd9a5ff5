"""Weight-only int8: symmetric, per output channel, stored packed behind ``actgraph.dequantize``."""

from __future__ import annotations

import numpy as np

from actgraph.graph import Editor, Graph, Use, Value
from actgraph.graph.graph import Array
from actgraph.graph.prims import Prim


def symmetric_int8(weight: Array, axis: int) -> tuple[Array, Array]:
    """``(q, scale)`` with ``weight ~ q * scale`` along ``axis``: scale = absmax / 127, codes in -127..127.

    A channel of zeros gets scale 1. ``q`` is int8 of the weight's shape, ``scale`` float32 ``[channels]``.
    """
    axis %= weight.ndim
    others = tuple(i for i in range(weight.ndim) if i != axis)
    absmax = np.abs(weight).max(axis=others).astype(np.float32) if weight.size else np.zeros(weight.shape[axis], np.float32)
    scale = np.where(absmax > 0, absmax / np.float32(127), np.float32(1)).astype(np.float32)
    column = [1] * weight.ndim
    column[axis] = -1
    scales = scale.reshape(column)
    q = np.empty(weight.shape, np.int8)
    for rows in _row_blocks(weight):  # block by block, so that the peak stays near the size of the model
        block = weight[rows].astype(np.float32) / (scales[rows] if axis == 0 else scales)
        q[rows] = np.clip(np.rint(block), -127, 127).astype(np.int8)
    return q, scale


def _row_blocks(weight: Array) -> list[slice]:
    """Slices along axis 0 of about 4 million elements."""
    rows = max(1, (1 << 22) // max(1, weight[:1].size))
    return [slice(start, start + rows) for start in range(0, weight.shape[0], rows)]


def embeddings(graph: Graph) -> list[Prim]:
    """The lookups of rows in a stored two-dimensional float table."""
    found = []
    for node in graph.nodes():
        prim = node.prim
        if prim is None or prim.op != "gather" or prim.attributes.get("axis", 0) != 0:
            continue
        table = prim.operands[0]
        if (
            isinstance(table, Value)
            and table.is_parameter
            and len(table.shape or ()) == 2
            and table.dtype is not None
            and table.dtype.is_float
        ):
            found.append(prim)
    return found


def pack(editor: Editor, weight: Value, axis: int, uses: list[Use]) -> tuple[Value, Value]:
    """Quantize the parameter ``weight`` for ``uses`` and return the packed parameter and its scale.

    The packed form replaces the float one; where other readers keep the float, both are stored and a message says so.
    """
    graph = editor.graph
    data = graph.read(weight)
    q, scale = symmetric_int8(data, axis)
    stem = weight.name
    packed = editor.add_parameter(f"{stem}_int8", q)
    scales = editor.add_parameter(f"{stem}_scale", scale.astype(data.dtype if data.dtype != np.float64 else np.float32))
    node = editor.insert(
        "actgraph.dequantize", [packed, scales], {"axis": axis % data.ndim}, before=uses[0].node, like=uses[0].node
    )
    if len(uses) < len(weight.uses):
        others = ", ".join(use.node.name for use in weight.uses if use not in uses and use.node is not None)
        editor.messages.append(f"{stem} stays in float for {others}: both forms are stored")
    editor.redirect(weight, node.output, uses)
    return packed, scales
