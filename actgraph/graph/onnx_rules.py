"""Type rules for ONNX ops that onnx's own inference does not serve: those that compute with symbolic sizes, control flow,
and the ops that onnxruntime contributes.

A rule takes the inference, the node and the types of its operands, and gives the types of its outputs, or ``None`` where
onnx's inference shall decide. It may raise ValueError on operands that do not fit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import onnx_ir as ir

from actgraph.graph.onnx_dims import Sizes, product, reshape_shape, slice_size
from actgraph.graph.onnx_native import native_dtype, set_native_type
from actgraph.graph.onnx_state import graph_attributes
from actgraph.ops.dtypes import DType
from actgraph.ops.shapes import Dim, Shape, TensorType, broadcast, dim_add, dim_mul

if TYPE_CHECKING:
    from actgraph.graph.onnx_types import Inference

Types = list[TensorType]
_Rule = Callable[["Inference", ir.Node, Types], Types | None]


def standard(inference: Inference, node: ir.Node, operands: Types) -> Types | None:
    """The types that a rule for a standard op gives."""
    rule = _RULES.get(node.op_type) if node.domain == "" else None
    return rule(inference, node, operands) if rule is not None else None


def contributed(inference: Inference, node: ir.Node, operands: Types) -> Types | None:
    """The types of an op of onnxruntime, which onnx has no schema for."""
    # onnxruntime itself writes SimplifiedLayerNormalization in the standard domain
    known = node.domain == "com.microsoft" or node.op_type == "SimplifiedLayerNormalization"
    rule = _CONTRIB.get(node.op_type) if known else None
    return rule(inference, node, operands) if rule is not None else None


def _unknown_of_rank(inference: Inference, value: ir.Value | None) -> Shape | None:
    """A shape of unknown sizes, as many as the int tensor ``value`` has elements."""
    shape = inference.type_of(value).shape
    return (None,) * shape[0] if shape is not None and len(shape) == 1 and isinstance(shape[0], int) else None


def _reshape(inference: Inference, node: ir.Node, operands: Types) -> Types | None:
    target = inference.shapes.of(node.inputs[1])
    if target is None:
        return [TensorType(operands[0].dtype, _unknown_of_rank(inference, node.inputs[1]))]
    allow_zero = inference.attribute(node, "allowzero")
    return [TensorType(operands[0].dtype, reshape_shape(operands[0].shape, target, bool(allow_zero and allow_zero.value)))]


def _expand(inference: Inference, node: ir.Node, operands: Types) -> Types | None:
    target = inference.shapes.of(node.inputs[1])
    if target is None:
        return [TensorType(operands[0].dtype, None)]
    return [TensorType(operands[0].dtype, broadcast([operands[0].shape, target]))]


def _constant_of_shape(inference: Inference, node: ir.Node, operands: Types) -> Types | None:
    fill_value = inference.attribute(node, "value")
    dtype = native_dtype(fill_value.as_tensor().dtype) if fill_value is not None else DType.F32
    target = inference.shapes.of(node.inputs[0])
    return [TensorType(dtype, target if target is not None else _unknown_of_rank(inference, node.inputs[0]))]


def _range(inference: Inference, node: ir.Node, operands: Types) -> Types | None:
    start, limit, delta = (inference.shapes.of(value) for value in node.inputs)
    size: Dim = None
    if start is not None and limit is not None and delta is not None:
        if delta[0] == 1 and start[0] == 0:
            size = limit[0]
        elif all(isinstance(part[0], int) for part in (start, limit, delta)) and delta[0]:
            size = len(range(start[0], limit[0], delta[0]))  # type: ignore[arg-type]
    return [TensorType(operands[0].dtype, (size,))]


def _slice(inference: Inference, node: ir.Node, operands: Types) -> Types | None:
    shape = operands[0].shape
    if shape is None:
        return [operands[0]]
    if len(node.inputs) < 3:
        starts, ends = (inference.attribute(node, name) for name in ("starts", "ends"))
        axes_attribute = inference.attribute(node, "axes")
        if starts is None or ends is None:
            return None
        begin: Sizes | None = starts.as_ints()
        end: Sizes | None = ends.as_ints()
        axes: Sequence[int] | None = axes_attribute.as_ints() if axes_attribute else None
        steps: Sequence[int] | None = None
    else:
        begin, end = inference.shapes.of(node.inputs[1]), inference.shapes.of(node.inputs[2])
        axes = inference.shapes.ints(node.inputs[3]) if len(node.inputs) > 3 else None
        steps = inference.shapes.ints(node.inputs[4]) if len(node.inputs) > 4 else None
        if len(node.inputs) > 3 and node.inputs[3] is not None and axes is None:
            return [TensorType(operands[0].dtype, (None,) * len(shape))]
        if len(node.inputs) > 4 and node.inputs[4] is not None and steps is None:
            begin = None
    result = list(shape)
    for place, axis in enumerate(axes if axes is not None else range(len(begin or end or shape))):
        low = begin[place] if begin is not None else None
        high = end[place] if end is not None else None
        result[axis] = slice_size(shape[axis], low, high, steps[place] if steps else 1)
    return [TensorType(operands[0].dtype, tuple(result))]


def _concat(inference: Inference, node: ir.Node, operands: Types) -> Types | None:
    shapes = [kind.shape for kind in operands]
    dtype = next((kind.dtype for kind in operands if kind.dtype is not None), None)
    known = [shape for shape in shapes if shape is not None]
    if not known:
        return [TensorType(dtype, None)]
    axis_attribute = inference.attribute(node, "axis")
    axis = axis_attribute.as_int() if axis_attribute is not None else 1
    result: list[Dim] = [None] * len(known[0])
    for shape in known:
        if len(shape) != len(result):
            raise ValueError(f"cannot concatenate ranks {len(result)} and {len(shape)}")
        for place, size in enumerate(shape):
            old = result[place]
            if isinstance(old, int) and isinstance(size, int) and old != size and place != axis % len(result):
                raise ValueError(f"cannot concatenate {known} along axis {axis}")
            result[place] = size if old is None or isinstance(size, int) else old
    total: Dim = 0
    for maybe in shapes:
        total = dim_add(total, maybe[axis] if maybe is not None else None)
    result[axis] = total
    return [TensorType(dtype, tuple(result))]


def _flatten(inference: Inference, node: ir.Node, operands: Types) -> Types | None:
    shape = operands[0].shape
    if shape is None:
        return [TensorType(operands[0].dtype, (None, None))]
    attribute = inference.attribute(node, "axis")
    axis = attribute.as_int() if attribute is not None else 1
    axis = axis + len(shape) if axis < 0 else axis
    return [TensorType(operands[0].dtype, (product(shape[:axis]), product(shape[axis:])))]


def _tile(inference: Inference, node: ir.Node, operands: Types) -> Types | None:
    shape, repeats = operands[0].shape, inference.shapes.of(node.inputs[1])
    if shape is None or repeats is None:
        return [TensorType(operands[0].dtype, (None,) * len(shape) if shape is not None else None)]
    return [TensorType(operands[0].dtype, tuple(dim_mul(s, r) for s, r in zip(shape, repeats, strict=True)))]


def _pad(inference: Inference, node: ir.Node, operands: Types) -> Types | None:
    shape = operands[0].shape
    attribute = inference.attribute(node, "pads")
    pads: Sizes | None = attribute.as_ints() if attribute is not None else None
    if attribute is None and len(node.inputs) > 1:
        pads = inference.shapes.of(node.inputs[1])
    if shape is None or pads is None:
        return [TensorType(operands[0].dtype, (None,) * len(shape) if shape is not None else None)]
    axes: Sequence[int] = range(len(shape))
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        given = inference.shapes.ints(node.inputs[3])
        if given is None:
            return [TensorType(operands[0].dtype, (None,) * len(shape))]
        axes = given
    result = list(shape)
    half = len(pads) // 2
    for place, axis in enumerate(axes):
        result[axis] = dim_add(result[axis], dim_add(pads[place], pads[place + half]))
    return [TensorType(operands[0].dtype, tuple(result))]


def _if(inference: Inference, node: ir.Node, operands: Types) -> Types | None:
    branches = [inference.walk_body(body) for _, graphs in graph_attributes(node) for body in graphs]
    return [_common(list(kinds)) for kinds in zip(*branches, strict=False)]


def _loop(inference: Inference, node: ir.Node, operands: Types) -> Types | None:
    body = node.attributes["body"].as_graph()
    carried = operands[2:]
    for value, kind in zip(body.inputs[2:], carried, strict=False):
        if value.type is None:
            set_native_type(value, TensorType(kind.dtype, (None,) * len(kind.shape) if kind.shape is not None else None))
    inner = inference.walk_body(body)[1:]
    result = [_common([before, after]) for before, after in zip(carried, inner, strict=False)]
    for kind in inner[len(carried) :]:
        result.append(TensorType(kind.dtype, (None, *kind.shape) if kind.shape is not None else None))
    return result


def _scan(inference: Inference, node: ir.Node, operands: Types) -> Types | None:
    inference.walk_body(node.attributes["body"].as_graph())
    return None


def _common(kinds: Types) -> TensorType:
    """What is true of every one of ``kinds``."""
    first = kinds[0]
    dtype = first.dtype if all(kind.dtype == first.dtype for kind in kinds) else None
    shapes = [kind.shape for kind in kinds]
    if any(shape is None or len(shape) != len(shapes[0] or ()) for shape in shapes):
        return TensorType(dtype, None)
    known = [shape for shape in shapes if shape is not None]
    return TensorType(dtype, tuple(sizes[0] if len(set(sizes)) == 1 else None for sizes in zip(*known, strict=True)))


_RULES: dict[str, _Rule] = {
    "Reshape": _reshape, "Expand": _expand, "ConstantOfShape": _constant_of_shape, "Range": _range, "Slice": _slice,
    "Concat": _concat, "Flatten": _flatten, "Tile": _tile, "Pad": _pad, "If": _if, "Loop": _loop, "Scan": _scan,
}  # fmt: skip


# --- onnxruntime's contributed ops, which onnx has no schema for ----------------------------------------------------------


def _like_first(inference: Inference, node: ir.Node, operands: Types) -> Types:
    return [operands[0]]


def _fused_matmul(inference: Inference, node: ir.Node, operands: Types) -> Types:
    left, right = operands[0].shape, operands[1].shape
    flags = [bool((a := inference.attribute(node, name)) and a.value) for name in ("transA", "transB")]
    if left is None or right is None or len(left) < 2 or len(right) < 2:
        return [TensorType(operands[0].dtype, None)]
    batch = broadcast([left[:-2], right[:-2]])
    rows, columns = left[-1 if flags[0] else -2], right[-2 if flags[1] else -1]
    return [TensorType(operands[0].dtype, (*batch, rows, columns) if batch is not None else None)]


def _matmul_nbits(inference: Inference, node: ir.Node, operands: Types) -> Types:
    shape = operands[0].shape
    return [TensorType(operands[0].dtype, (*shape[:-1], node.attributes["N"].as_int()) if shape is not None else None)]


_CONTRIB: dict[str, _Rule] = {
    **dict.fromkeys(
        ("Gelu", "FastGelu", "BiasGelu", "QuickGelu", "RotaryEmbedding", "SkipLayerNormalization",
         "SkipSimplifiedLayerNormalization", "LayerNormalization", "SimplifiedLayerNormalization", "BiasAdd"),
        _like_first,
    ),
    "FusedMatMul": _fused_matmul, "MatMulNBits": _matmul_nbits,
}  # fmt: skip
