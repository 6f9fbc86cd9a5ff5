"""Weight-only int8: symmetric, per output channel, stored packed behind ``actgraph.dequantize``."""

from __future__ import annotations

import numpy as np

from actgraph.errors import UnsupportedError
from actgraph.graph import Editor, Graph, Use, Value
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


def packable(place: Linear | Convolution) -> Use | None:
    """The operand at which the product reads the stored weight as it is or transposed; ``None`` when it reads it otherwise."""
    use = place.matrix if isinstance(place, Linear) else Use(place.input.node, 1)
    if use is None or use.node is None or not place.weight.is_parameter:
        return None
    operand = use.node.operands[use.index]
    try:
        return use if operand is not None and _transposes(operand, place.weight) is not None else None
    except UnsupportedError:
        return None


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


def pack(editor: Editor, weight: Value, axis: int, readers: list[Use]) -> tuple[Value, Value]:
    """Quantize the parameter ``weight`` for ``readers`` and return the packed parameter and its scale ``[channels]``.

    readers: the operands at which products read the weight, as it is or transposed. Transposes move in front of the
    dequantization, because engines fuse a product with the dequantization that feeds it. The float form stays for whoever
    else reads it, and a message says so.
    """
    graph = editor.graph
    data = graph.read(weight)
    q, scale = symmetric_int8(data, axis)
    packed = editor.add_parameter(f"{weight.name}_int8", q)
    scales = editor.add_parameter(f"{weight.name}_scale", scale)  # float32 whatever the weight: half precision would underflow
    # An explicit zero point: onnxruntime takes a missing one for uint8 when it moves quantizers about.
    zero = editor.add_parameter(f"{weight.name}_zero_point", np.zeros(scale.shape, np.int8))
    dtype = str(weight.dtype)
    made: dict[Value, Value] = {}  # the float operand -> its dequantized form
    for node, index in readers:
        assert node is not None
        operand = node.operands[index]
        assert operand is not None
        if operand not in made:
            way = _transposes(operand, weight)
            source, stored_axis = packed, axis
            for step in way:
                source = editor.copy_region([step.node], {step.node.operands[0] or weight: source})[step.output]
                stored_axis = list(step.attributes["perm"]).index(stored_axis)
            made[operand] = editor.insert(
                "actgraph.dequantize", [source, scales, zero], {"axis": stored_axis, "dtype": dtype}, before=node, like=node
            ).output
        editor.redirect(operand, made[operand], [Use(node, index)])
    return packed, scales


def float_readers(weight: Value) -> list[str]:
    """The nodes that still read the float form of a packed weight."""
    return [use.node.name for use in weight.uses if use.node is not None and any(output.uses for output in use.node.outputs)]


def _transposes(operand: Value, weight: Value) -> list[Prim]:
    """The transposes between the stored weight and the operand of the product, in order of execution."""
    way: list[Prim] = []
    value = operand
    while value != weight:
        prim = value.producer.prim if value.producer is not None else None
        if prim is None or prim.op != "transpose" or not isinstance(prim.operands[0], Value):
            raise UnsupportedError(f"{operand.name} is computed from {weight.name}", "fold constants first")
        way.insert(0, prim)
        value = prim.operands[0]
    return way
