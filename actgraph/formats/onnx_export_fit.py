"""Ops that cannot have an element type: they compute in float32 between casts.

What an op takes is a matter of its schema in the opset of the model: ``Cos`` has no bfloat16 below opset 22.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from actgraph.formats.onnx_export_types import has_graph
from actgraph.graph.onnx_schema import NOTHING, refused, refuses_result
from actgraph.ops.dtypes import DType

if TYPE_CHECKING:
    from actgraph.formats.onnx_export_emit import Emitter

_F32 = DType.F32.onnx


def in_float32(emit: Emitter, node: ir.Node) -> list[ir.Value] | None:
    """The results of ``node`` computed in float32, where its schema excludes its type; ``None`` where it takes the type."""
    if node.domain != "" or node.op_type in ("Cast", "Constant") or has_graph(node):
        return None
    kinds = tuple(None if value is None or value.dtype is None else DType.of(value.dtype) for value in node.inputs)
    operands, results = refused(node.op_type, node.domain, emit.opset, kinds, len(node.outputs))
    made = _made_type(node)
    wide = made is not None and refuses_result(node.op_type, node.domain, emit.opset, made)
    if (operands, results) == NOTHING and not wide:
        return None
    narrow = made if wide else kinds[operands[0]]
    assert narrow is not None
    inputs = [
        emit.cast(value, DType.F32) if i in operands and value is not None else value for i, value in enumerate(node.inputs)
    ]
    attributes = {name: _widened(attribute) if wide else attribute for name, attribute in node.attributes.items()}
    copy = ir.Node(node.domain, node.op_type, inputs, attributes.values(), num_outputs=len(node.outputs))
    outputs = list(emit.add(copy))
    for index in results or ((0,) if wide else ()):
        outputs[index] = emit.op("Cast", outputs[index], to=narrow.onnx)
    return outputs


def _made_type(node: ir.Node) -> DType | None:
    """The element type that an attribute gives the result: ``dtype`` of random numbers, ``value`` of a constant."""
    dtype, value = node.attributes.get("dtype"), node.attributes.get("value")
    if dtype is not None and dtype.type is ir.AttributeType.INT:
        return DType.of(ir.DataType(dtype.as_int()))
    return DType.of(value.as_tensor().dtype) if value is not None and value.type is ir.AttributeType.TENSOR else None


def _widened(attribute: ir.Attr) -> ir.Attr:
    if attribute.name == "dtype" and attribute.type is ir.AttributeType.INT:
        return ir.AttrInt64("dtype", _F32)
    if attribute.name == "value" and attribute.type is ir.AttributeType.TENSOR:
        return ir.AttrTensor("value", ir.tensor(attribute.as_tensor().numpy().astype(np.float32)))
    return attribute
