"""Weight-only formats: codes, symmetric, per output channel or per group of inputs, stored behind ``actgraph.dequantize``; and
bfloat16, stored behind a cast."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from actgraph.errors import InputError
from actgraph.graph import Editor, Graph, Node, Use, Value
from actgraph.graph.graph import Array
from actgraph.graph.prims import Prim
from actgraph.graph.views import Convolution, Linear
from actgraph.ops.dtypes import DType
from actgraph.ops.quantizer import pack_nibbles, quantize_array, symmetric_parameters, weight_parameters


@dataclass(frozen=True)
class Format:
    """How weights are stored. group: inputs that share a scale, 0: one scale per output channel.

    int8: codes -127..127, scale = absmax / 127. int4: codes 1..15 around 8, scale = absmax / 7, two a byte along the last
    axis. fp8: e4m3, scale = absmax / 448. bf16: the numbers themselves, rounded to nearest even, without a scale.
    """

    name: str
    dtype: DType
    group: int = 0

    @property
    def packed(self) -> str:
        return "u4" if self.dtype is DType.U4 else ""

    def refuses(self, stored: Stored) -> str:
        """Why a weight cannot be stored so; empty when it can."""
        shape = stored.weight.shape or ()
        if self == BF16 and stored.weight.dtype is not None and stored.weight.dtype.bits <= DType.BF16.bits:
            return f"its weight is {stored.weight.dtype}, no wider than bf16"
        if (self.group or self.packed) and len(shape) != 2:
            return f"{self.name} is for linears: its weight has {len(shape)} axes"
        if self.packed and any(not isinstance(size, int) or size % 2 for size in shape):
            return f"an odd number of 4-bit codes does not fill bytes: its weight is {stored.weight.type}"
        return ""


INT8 = Format("int8", DType.I8)
BF16 = Format("bf16", DType.BF16)


def formats(name: str, group: int | None) -> Format:
    """The format of the options ``weights`` and ``group_size``."""
    dtype = {"int8": DType.I8, "int4": DType.U4, "fp8": DType.F8E4M3, "bf16": DType.BF16}[name]
    return Format(name, dtype, (32 if name == "int4" else 0) if group is None else group)


def quantized(weight: Array, axis: int, form: Format) -> tuple[Array, Array, Array | None]:
    """``(codes, scale, zero_point)`` of a weight whose output channels lie along ``axis``; codes are not packed.

    Scales are float32, [channels], or with groups the weight's shape with the axis of inputs divided. A group of zeros gets
    scale 1. Works block by block, so that the peak stays near the size of the model. Raises InputError for NaN or infinity.
    """
    if form == INT8:
        q, scale = symmetric_int8(weight, axis)
        return q, scale, np.zeros(scale.shape, np.int8)
    axis %= weight.ndim
    inner = 1 - axis if form.group else axis
    blocks = _row_blocks(weight, form.group or 1)
    if form.group:
        found = [weight_parameters(weight[rows], form.dtype, axis=inner, block_size=form.group) for rows in blocks]
        scale, zero = (np.concatenate(parts) for parts in zip(*found, strict=True))
        scales, zeros = ([pair[i] for pair in found] for i in (0, 1))
    else:
        others = tuple(i for i in range(weight.ndim) if i != axis)
        maxima = [np.abs(weight[rows]).astype(np.float32, copy=False).max(axis=others) for rows in blocks]
        scale, zero = symmetric_parameters(np.concatenate(maxima) if axis == 0 else np.max(maxima, axis=0), form.dtype)
        scales, zeros = ([each[rows] if axis == 0 else each for rows in blocks] for each in (scale, zero))
    q = np.empty(weight.shape, np.uint8 if form.packed else form.dtype.numpy)
    for rows, s, z in zip(blocks, scales, zeros, strict=True):
        offset = None if form.dtype.is_float else z
        q[rows] = quantize_array(weight[rows], s, offset, form.dtype, axis=inner, block_size=form.group)
    code = np.dtype(np.uint8) if form.packed else form.dtype.numpy
    return q, scale, None if form.dtype.is_float else zero.astype(code)


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


def bfloat16(weight: Array) -> Array:
    """``weight`` rounded to bfloat16, to nearest even. Raises InputError for NaN, infinity and what rounds to infinity."""
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = weight.astype(DType.BF16.numpy)
    if not all(np.isfinite(rounded[rows]).all() for rows in _row_blocks(rounded)):
        raise InputError("the weight to round is not finite in bfloat16", "look for NaN or infinity in the weights")
    return rounded


def _row_blocks(weight: Array, multiple: int = 1) -> list[slice]:
    """Slices along axis 0 of about 4 million elements, each a multiple of so many rows."""
    rows = max(1, (1 << 22) // max(1, weight[:1].size) // multiple) * multiple
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


def pack(
    editor: Editor, weight: Value, axis: int, readers: list[Stored], form: Format = INT8, *, as_stored: bool
) -> tuple[Value, Value | None]:
    """Quantize the parameter ``weight`` along ``axis`` for ``readers``; returns the codes and their scales (bf16: none).

    Where every reader reads it transposed in the same way, the codes are stored so (unless ``as_stored``); else transposes
    move in front of the dequantization, because engines fuse a product with the dequantization that feeds it (behind it where
    two codes share a byte). The float form stays for whoever else reads it, and a message says so.
    """
    perms = {reader.perm for reader in readers}
    stored = next(iter(perms)) if len(perms) == 1 and not as_stored else None
    if form == BF16:
        return _round(editor, weight, readers, stored), None
    q, scale, zero = quantized(editor.graph.read(weight), axis, form)
    if stored is not None:
        q, axis = np.ascontiguousarray(q.transpose(stored)), stored.index(axis)
        if form.group:
            scale = np.ascontiguousarray(scale.transpose(stored))
            zero = None if zero is None else np.ascontiguousarray(zero.transpose(stored))
    packed = editor.add_parameter(f"{weight.name}_{form.name}", pack_nibbles(q) if form.packed else q)
    scales = editor.add_parameter(f"{weight.name}_scale", scale)  # float32 whatever the weight: half precision would underflow
    # An explicit zero point: onnxruntime takes a missing one for uint8 when it moves quantizers about.
    zeros = editor.add_parameter(f"{weight.name}_zero_point", zero) if zero is not None else None
    attributes: dict[str, str | int] = {"dtype": str(weight.dtype), "block_size": form.group, "packed": form.packed}
    made: dict[Value, Value] = {}  # the float operand -> its dequantized form
    for reader in readers:
        node, index = reader.use
        assert node is not None
        operand = node.operands[index]
        assert operand is not None
        if operand not in made:
            turn = reader.perm if stored is None else None
            made[operand] = _dequantized(editor, [packed, scales, zeros], axis, turn, attributes, node)
        editor.redirect(operand, made[operand], [reader.use])
    return packed, scales


def _round(editor: Editor, weight: Value, readers: list[Stored], stored: tuple[int, ...] | None) -> Value:
    """Store ``weight`` in bfloat16, turned by ``stored``, and cast it in front of each reader: engines without bfloat16
    arithmetic (onnxruntime's CPU) have casts."""
    numbers = bfloat16(editor.graph.read(weight))
    if stored is not None:
        numbers = np.ascontiguousarray(numbers.transpose(stored))
    packed = editor.add_parameter(f"{weight.name}_{BF16.name}", numbers)
    made: dict[Value, Value] = {}  # the float operand -> its rounded form
    for reader in readers:
        node, index = reader.use
        operand = node.operands[index] if node is not None else None
        assert node is not None and operand is not None
        if operand not in made:
            value = packed
            if stored is None and reader.perm is not None:
                value = editor.insert("transpose", [value], {"perm": reader.perm}, before=node, like=node).output
            made[operand] = editor.insert("cast", [value], {"to": weight.dtype}, before=node, like=node).output
        editor.redirect(operand, made[operand], [reader.use])
    return packed


def _dequantized(
    editor: Editor,
    operands: list[Value | None],
    axis: int,
    perm: tuple[int, ...] | None,
    attributes: dict[str, str | int],
    node: Node,
) -> Value:
    """The dequantized codes before ``node``, transposed by ``perm``; ``axis`` is that of the output channels."""
    grouped = bool(attributes["block_size"])
    behind = perm is not None and (grouped or bool(attributes["packed"]))
    if perm is not None and not behind:
        operands = [editor.insert("transpose", operands[:1], {"perm": perm}, before=node, like=node).output, *operands[1:]]
        axis = perm.index(axis)
    attributes = {"axis": 1 - axis if grouped else axis, **attributes}
    value = editor.insert("actgraph.dequantize", operands, attributes, before=node, like=node).output
    if behind:
        value = editor.insert("transpose", [value], {"perm": perm}, before=node, like=node).output
    return value


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
