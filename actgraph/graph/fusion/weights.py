"""The weight of a linear as ``actgraph.linear`` takes it: traced back to what is stored, and laid out anew where needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from actgraph.graph.evaluate import evaluate
from actgraph.graph.fusion.rewriter import Rewriter
from actgraph.graph.graph import Array, Node, Value
from actgraph.graph.views import Linear
from actgraph.ops.dtypes import COMPUTE_FLOATS, DType
from actgraph.ops.quantizer import pack_nibbles, unpack_nibbles
from actgraph.ops.registry import DOMAIN, get_op
from actgraph.ops.weights import WEIGHTS


@dataclass(frozen=True)
class Matrix:
    """A stored weight.

    source: numbers or codes; out_axis: its axis of output channels. scale, zero: of codes; scale_axis: the axis of output
    channels of scales by group. block, packed: as in ``actgraph.dequantize``. narrow: numbers that the product reads in a
    wider type.
    """

    source: Value
    out_axis: int
    scale: Value | None = None
    zero: Value | None = None
    scale_axis: int = 0
    block: int = 0
    packed: str = ""
    narrow: bool = False

    @property
    def quantized(self) -> bool:
        """Whether it is stored in fewer bits than the product reads."""
        return self.narrow or self.scale is not None or self.source.dtype not in COMPUTE_FLOATS


@dataclass(frozen=True)
class Placed:
    """Operands of ``actgraph.linear``."""

    weight: Value
    scale: Value | None
    zero: Value | None
    block: int
    packed: str


@dataclass(frozen=True)
class _Centre:
    """Unsigned codes around a zero point in the middle of their range, as the signed ones without one that they are."""

    centre: int
    packed: str
    signed: Callable[[Array], Array]


_CENTRES = {
    "u4": _Centre(8, "i4", lambda codes: codes ^ np.uint8(0x88)),
    "u8": _Centre(128, "", lambda codes: (codes ^ np.uint8(0x80)).view(np.int8)),
}


def matrix_of(linear: Linear) -> Matrix | str:
    """The weight of ``linear`` as it is stored, or why ``actgraph.linear`` does not take it."""
    if linear.matrix is None:
        return "it is a product of integers"
    if any(_narrows(node) for node in linear.nodes if node != linear.matrix_node):
        return "its weight is rounded to a narrower type before the product"
    value, axis = linear.weight, linear.out_axis
    prim = value.producer.prim if value.producer is not None else None
    if prim is not None and prim.op == "dequantize":
        return _dequantized(prim.node, axis)
    if not value.is_parameter:
        return f"its weight {value.name} is computed"
    if value.dtype not in COMPUTE_FLOATS:
        return f"its weight is {value.dtype} without a scale"
    node, index = linear.matrix
    operand = node.operands[index] if node is not None else None
    kinds = (value.dtype, operand.dtype if operand is not None else None)
    return Matrix(value, axis, narrow=kinds[0] is not None and kinds[1] is not None and kinds[0].bits < kinds[1].bits)


def _narrows(node: Node) -> bool:
    prim = node.prim
    if prim is None or prim.op != "cast" or not isinstance(prim.operands[0], Value):
        return False
    old, new = prim.operands[0].dtype, prim.output.dtype
    return old is None or new is None or (old != new and new.bits <= old.bits)


def _dequantized(node: Node, axis: int) -> Matrix | str:
    codes, scale, zero = (*node.operands, None)[:3]
    given = node.attributes
    if node.op.startswith(f"{DOMAIN}."):
        given = dict(get_op("dequantize").complete(given))
    along, block, packed = int(given.get("axis", 1)), int(given.get("block_size", 0)), str(given.get("packed", ""))
    if codes is None or scale is None or scale.shape is None or codes.dtype not in WEIGHTS:
        return f"its codes are {codes.dtype if codes is not None else 'unknown'}"
    single = all(size == 1 for size in scale.shape) and len(scale.shape) < 2
    along %= 2
    if not single and (along == axis) == bool(block):
        return "its scales lie along the inputs" if not block else "its groups lie along the outputs"
    scale_axis = axis
    while not packed and codes.producer is not None and (prim := codes.producer.prim) is not None:
        source = prim.operands[0]
        if prim.op != "transpose" or tuple(prim.attributes["perm"]) != (1, 0) or not isinstance(source, Value):
            break
        codes, axis = source, 1 - axis
    if zero is not None and not evaluate(zero.graph, zero).any():
        zero = None
    return Matrix(codes, axis, scale, zero, scale_axis, block, packed)


def place(rewriter: Rewriter, matrix: Matrix, layout: str) -> Placed:
    """The operands for ``layout``; what lies otherwise is transposed now, once, as ``<name>_<layout>``."""
    axis = 0 if layout == "out_in" else 1
    weight, packed = matrix.source, matrix.packed
    if matrix.out_axis != axis:
        turned = matrix.source.shape[0] if matrix.source.shape is not None else None
        if packed and isinstance(turned, int) and turned % 2:
            kind, packed = DType(packed), ""  # an odd number of codes does not fill bytes of two
            weight = rewriter.stored(weight, layout, lambda codes: unpack_nibbles(codes, kind).T)
        elif packed:
            kind = DType(packed)
            weight = rewriter.stored(weight, layout, lambda codes: _repack(codes, kind))
        else:
            weight = rewriter.stored(weight, layout, np.transpose)
    elif not weight.is_parameter:
        weight = rewriter.stored(weight, layout, lambda data: data)
    turn = matrix.block > 0 and matrix.scale_axis != axis
    flip = _CENTRES.get(packed or str(weight.dtype))
    if flip is not None and matrix.zero is not None and (evaluate(matrix.zero.graph, matrix.zero) == flip.centre).all():
        weight, packed = rewriter.stored(weight, "signed", flip.signed), flip.packed
        matrix = replace(matrix, zero=None)
    scale, zero = (_laid(rewriter, value, layout, turn) for value in (matrix.scale, matrix.zero))
    return Placed(weight, scale, zero, matrix.block, packed)


def _repack(codes: Array, kind: DType) -> Array:
    return pack_nibbles(unpack_nibbles(codes, kind).T)


def _laid(rewriter: Rewriter, value: Value | None, layout: str, turn: bool) -> Value | None:
    if value is None or (value.is_parameter and not turn):
        return value
    return rewriter.stored(value, layout, np.transpose if turn else (lambda data: data))
