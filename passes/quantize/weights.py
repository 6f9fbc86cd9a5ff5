"""Weight-only int8: symmetric, per output channel, stored packed behind ``actgraph.dequantize``."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from actgraph.graph import Editor, Graph, Node, Use, Value
from actgraph.graph.graph import Array
from actgraph.graph.prims import Prim
from actgraph.graph.views import Convolution, Linear
from actgraph.ops.quantizer import quantize_array, symmetric_parameters


def symmetric_int8(weight: Array, axis: int) -> tuple[Array, Array]:
    """``(q, scale)`` with ``weight ~ q * scale`` along ``axis``: scale = absmax / 127, codes in -127..127.

    A channel of zeros gets scale 1. ``q`` is int8 of the weight's shape, ``scale`` float32 ``[channels]``. Works block by
    block, so that the peak stays near the size of the model. Raises InputError for NaN or infinity.
    """
    axis %= weight.ndim
    others = tuple(i for i in range(weight.ndim) if i != axis)
    blocks = _row_blocks(weight)
    maxima = [np.abs(weight[rows]).astype(np.float32, copy=False).max(axis=others) for rows in blocks]
    scale, _ = symmetric_parameters(np.concatenate(maxima) if axis == 0 else np.max(maxima, axis=0))
    q = np.empty(weight.shape, np.int8)
    for rows in blocks:
        q[rows] = quantize_array(weight[rows], scale[rows] if axis == 0 else scale, axis=axis)
    return q, scale


def _row_blocks(weight: Array) -> list[slice]:
    """Slices along axis 0 of about 4 million elements."""
    rows = max(1, (1 << 22) // max(1, weight[:1].size))
    return [slice(start, start + rows) for start in range(0, weight.shape[0], rows)]


@dataclass(frozen=True)
class Stored:
    """A weight as a product reads it.

    weight: the parameter; axis: its axis of output channels. use: the operand edge at the product. perm: axis i of the operand
    is axis ``perm[i]`` of the parameter (``None``: the axes are in order).
    """

    weight: Value
    axis: int
    use: Use
    perm: tuple[int, ...] | None


def stored_weight(place: Linear | Convolution) -> Stored | None:
    """Where the product reads its stored weight, as it is or transposed; ``None`` when it reads it otherwise."""
    use = place.matrix if isinstance(place, Linear) else Use(place.input.node, 1)
    operand = use.node.operands[use.index] if use is not None and use.node is not None else None
    if use is None or operand is None:
        return None
    weight, perm = _way(operand)
    if not weight.is_parameter or (isinstance(place, Linear) and place.weight != weight):
        return None
    axis = place.out_axis if isinstance(place, Linear) else perm[0] if perm is not None else 0
    return Stored(weight, axis, use, perm)


def _way(operand: Value) -> tuple[Value, tuple[int, ...] | None]:
    """Back from an operand through transposes, and reshapes that together change nothing (Mamba squeezes the weight of its
    convolution and unsqueezes it again): what it is made of, and in which order the operand has the axes of that."""
    value, order = operand, list(range(len(operand.shape or ())))
    while True:
        prim = value.producer.prim if value.producer is not None else None
        source = prim.operands[0] if prim is not None and prim.operands else None
        if prim is None or not isinstance(source, Value):
            break
        if prim.op == "transpose":
            perm = prim.attributes["perm"]
            value, order = source, [int(perm[axis]) for axis in order]
        elif prim.op in ("reshape", "identity") and (same := _same_shape(value)) is not None:
            value = same
        else:
            break
    return value, None if order == sorted(order) else tuple(order)


def _same_shape(value: Value) -> Value | None:
    """The nearest value of the same shape that reshapes and nothing else made ``value`` from."""
    source = value
    while True:
        prim = source.producer.prim if source.producer is not None else None
        operand = prim.operands[0] if prim is not None and prim.op in ("reshape", "identity") else None
        if not isinstance(operand, Value) or value.shape is None:
            return None
        source = operand
        if source.shape == value.shape:
            return source


def embeddings(graph: Graph) -> list[tuple[Prim, Value]]:
    """The lookups of rows in a stored two-dimensional float table, each with its table."""
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
            found.append((prim, table))
    return found


def pack(editor: Editor, weight: Value, axis: int, readers: list[Stored], *, as_stored: bool) -> tuple[Value, Value]:
    """Quantize the parameter ``weight`` along ``axis`` for ``readers``; returns the codes and their scale ``[channels]``.

    Where every reader reads it transposed in the same way, the codes are stored so (unless ``as_stored``); else transposes
    move in front of the dequantization, because engines fuse a product with the dequantization that feeds it. The float form
    stays for whoever else reads it, and a message says so.
    """
    q, scale = symmetric_int8(editor.graph.read(weight), axis)
    perms = {reader.perm for reader in readers}
    stored = next(iter(perms)) if len(perms) == 1 and not as_stored else None
    if stored is not None:
        q, axis = np.ascontiguousarray(q.transpose(stored)), stored.index(axis)
    packed = editor.add_parameter(f"{weight.name}_int8", q)
    scales = editor.add_parameter(f"{weight.name}_scale", scale)  # float32 whatever the weight: half precision would underflow
    # An explicit zero point: onnxruntime takes a missing one for uint8 when it moves quantizers about.
    zero = editor.add_parameter(f"{weight.name}_zero_point", np.zeros(scale.shape, np.int8))
    dtype = str(weight.dtype)
    made: dict[Value, Value] = {}  # the float operand -> its dequantized form
    for reader in readers:
        node, index = reader.use
        assert node is not None
        operand = node.operands[index]
        assert operand is not None
        if operand not in made:
            source, channel = packed, axis
            if reader.perm is not None and stored is None:
                source = editor.insert("transpose", [packed], {"perm": reader.perm}, before=node, like=node).output
                channel = reader.perm.index(axis)
            made[operand] = editor.insert(
                "actgraph.dequantize", [source, scales, zero], {"axis": channel, "dtype": dtype}, before=node, like=node
            ).output
        editor.redirect(operand, made[operand], [reader.use])
    return packed, scales


def float_readers(weight: Value) -> list[str]:
    """The nodes that still read the float form of a packed weight."""
    return [use.node.name for use in weight.uses if use.node is not None and _is_read(use.node)]


def _is_read(node: Node) -> bool:
    """Whether anything reads the node; transposes and reshapes that only the like of them read do not count."""
    uses = [use for output in node.outputs for use in output.uses]
    prim = node.prim
    if prim is None or prim.op not in ("transpose", "reshape", "identity"):
        return bool(uses)
    return any(use.node is None or _is_read(use.node) for use in uses)
