"""Reading inserted edits: nodes of the edit ops whose effect on an activation is fixed and the same for every token.

Such an edit acts on the row of channels ``x`` of one token: a shift ``x + s``, a low-rank map ``x + (x left) right``, or
factors ``x * g``. These three fold into weights, and those of one kind merge.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from actgraph.errors import UnsupportedError
from actgraph.graph import Graph, Node, Value
from actgraph.graph.evaluate import evaluate
from actgraph.graph.folds import add_lowrank, scale_along
from actgraph.graph.graph import Array
from actgraph.ops import get_op
from actgraph.ops.layout import from_end
from actgraph.ops.registry import Attributes, single

#: The edit ops that can be moved into weights.
EDITS = ("actgraph.shift", "actgraph.lowrank_map", "actgraph.channel_scale")


@dataclass(frozen=True)
class Edit:
    """A fixed edit of the channels (axis ``axis``, negative) of ``x``, of ``width`` numbers; arrays are float64.

    shift: ``[width]``. left, right: ``[width, r]`` and ``[r, width]``. factor: ``[width]``. One of the three is there.
    """

    node: Node
    x: Value
    output: Value
    axis: int
    width: int
    shift: Array | None = None
    left: Array | None = None
    right: Array | None = None
    factor: Array | None = None

    @property
    def is_shift(self) -> bool:
        return self.shift is not None

    def transposed(self) -> tuple[Array, Array] | None:
        """``left`` and ``right`` of the map as the weights of a reader see it."""
        return (self.right.T, self.left.T) if self.left is not None and self.right is not None else None

    def on_rows(self, data: Array, axis: int, *, reader: bool = False) -> Array:
        """``data`` with the linear map applied along ``axis``, rounded to its type; of a reader's weight the transposed one."""
        if self.factor is not None:
            return scale_along(data, axis, self.factor)
        coordinates, directions = self.lowrank_on(data, axis, reader=reader)
        return add_lowrank(data, axis, coordinates, directions)

    def lowrank_on(self, data: Array, axis: int, *, reader: bool = False) -> tuple[Array, Array]:
        """What the map adds to the rows of ``data`` along ``axis``: ``coordinates [n, r] @ directions [r, width]``."""
        pair = self.transposed() if reader else (self.left, self.right)
        assert pair is not None and pair[0] is not None and pair[1] is not None
        rows = np.moveaxis(data, axis, -1).reshape(-1, self.width).astype(np.float64)
        return rows @ pair[0], np.ascontiguousarray(pair[1])


def read_edit(graph: Graph, node: Node) -> Edit | str:
    """The edit that ``node`` makes, or why its effect is not fixed and the same for every token."""
    if node.op not in EDITS:
        return f"{node.op} is not an edit that weights can carry: it is no shift, low-rank map or channel scale"
    x, *rest = node.operands
    operands = [*rest, None, None, None]
    attributes = get_op(node.op).complete(node.attributes)
    mask = operands[2] if node.op != "actgraph.channel_scale" else operands[1]
    if mask is not None:
        return "it has a mask, and weights are the same for every token"
    if node.op == "actgraph.shift" and operands[1] is not None:
        return "it has a strength operand, which may be another one at every call"
    if attributes.get("norm", "none") != "none":
        return f"norm={attributes['norm']} makes it depend on the activation's norm, and a bias does not"
    rank = x.type.rank if x is not None else None
    if x is None or x.shape is None or rank is None:
        return "the type of its activation is unknown"
    axis = from_end(axis_of(attributes), rank)
    width = x.shape[axis]
    if not isinstance(width, int):
        return f"its channel axis has no fixed size ({x.type})"
    arrays = []
    for operand in operands[: 2 if node.op == "actgraph.lowrank_map" else 1]:
        try:
            arrays.append(evaluate(graph, operand, limit=64).astype(np.float64) if operand is not None else np.zeros(0))
        except UnsupportedError:
            return f"its operand {operand.name if operand is not None else ''} is computed at run time"
    return _of_arrays(node, x, axis, width, arrays, single(attributes.get("scale", 1.0)))


def axis_of(attributes: Attributes) -> int:
    """The channel axis among the complete attributes of an edit op."""
    axis = attributes["axis"]
    assert isinstance(axis, int)
    return axis


def _of_arrays(node: Node, x: Value, axis: int, width: int, arrays: list[Array], scale: float) -> Edit | str:
    if node.op == "actgraph.lowrank_map":
        basis, matrix = arrays
        return Edit(node, x, node.output, axis, width, left=basis @ matrix, right=np.ascontiguousarray(basis.T))
    numbers = per_channel(arrays[0], axis, width)
    if numbers is None:
        return f"its operand of shape {list(arrays[0].shape)} is not one number per channel"
    if node.op == "actgraph.shift":
        return Edit(node, x, node.output, axis, width, shift=numbers * scale)
    return Edit(node, x, node.output, axis, width, factor=numbers)


def per_channel(data: Array, axis: int, width: int) -> Array | None:
    """``[width]`` numbers from an operand that is one number, one per channel, or ``None`` from one that varies otherwise."""
    if data.size == 1:
        return np.full(width, data.reshape(()))
    if data.ndim == 1:
        return data if data.shape == (width,) else None
    place = data.ndim + axis
    one_axis = place >= 0 and data.shape[place] == width and data.size == width
    return data.reshape(-1) if one_axis else None
