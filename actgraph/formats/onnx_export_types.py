"""Types of ONNX values while a graph is being written: onnx's own inference, node by node."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from actgraph.ops.shapes import Dim, TensorType

#: Helpers are folded when all operands and results have at most this many elements.
FOLD_LIMIT = 1024


def set_type(value: ir.Value, kind: TensorType) -> None:
    """Write a known type; what is unknown stays as it is."""
    if kind.dtype is not None:
        value.type = ir.TensorType(ir.DataType(kind.dtype.onnx))
    if kind.shape is not None:
        value.shape = ir.Shape(kind.shape)


def dims_of(value: ir.Value) -> list[Dim] | None:
    """The shape as our symbolic sizes, or ``None``."""
    if value.shape is None:
        return None
    return [dim if isinstance(dim, int) else dim.value for dim in value.shape]


def infer_types(node: ir.Node, opset: int) -> None:
    """Infer the types of a standard node's outputs where onnx can; leave them unknown where it cannot."""
    if node.domain != "" or has_graph(node):
        return
    if all(value.type is not None and value.shape is not None for value in node.outputs):
        return
    named: dict[str, ir.Value] = {}
    proto = onnx.NodeProto(op_type=node.op_type)
    for index, value in enumerate(node.inputs):
        proto.input.append("" if value is None else f"i{index}")
        if value is not None:
            named[f"i{index}"] = value
    proto.output.extend(f"o{index}" for index in range(len(node.outputs)))
    proto.attribute.extend(ir.to_proto(attribute) for attribute in node.attributes.values())
    types, data = {}, {}
    for name, value in named.items():
        if value.type is None:
            return
        types[name] = _type_proto(value)
        if value.const_value is not None and value.const_value.size <= FOLD_LIMIT:
            data[name] = ir.to_proto(value.const_value)
    try:
        schema = onnx.defs.get_schema(node.op_type, opset, "")
        inferred = onnx.shape_inference.infer_node_outputs(
            schema, proto, types, data, opset_imports=[onnx.helper.make_opsetid("", opset)]
        )
    except Exception:  # no schema or no inference for this op: the type stays unknown
        return
    for index, value in enumerate(node.outputs):
        kind = inferred.get(f"o{index}")
        if kind is None or not kind.HasField("tensor_type") or not kind.tensor_type.elem_type:
            continue
        if value.type is None:
            value.type = ir.TensorType(ir.DataType(kind.tensor_type.elem_type))
        if value.shape is None and kind.tensor_type.HasField("shape"):
            value.shape = ir.Shape([_dim(dim) for dim in kind.tensor_type.shape.dim])


def _dim(dim: onnx.TensorShapeProto.Dimension) -> int | str | None:
    if dim.HasField("dim_value"):
        return int(dim.dim_value)
    return str(dim.dim_param) if dim.HasField("dim_param") and not dim.dim_param.startswith("unk__") else None


def _type_proto(value: ir.Value) -> onnx.TypeProto:
    shape = dims_of(value)
    assert value.dtype is not None
    return onnx.helper.make_tensor_type_proto(int(value.dtype), shape)


def has_graph(node: ir.Node) -> bool:
    """Whether the node has bodies (If, Loop, Scan)."""
    return any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values())
