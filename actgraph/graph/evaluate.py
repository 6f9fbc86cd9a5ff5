"""Evaluating single nodes on known operands: what constant folding and reading computed weights need.

Native by design: each dialect runs its own op, torch on the CPU or the ONNX reference implementation of one operator.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from actgraph.errors import UnsupportedError
from actgraph.graph.graph import Array, Graph, Node, Value

if TYPE_CHECKING:
    from actgraph.graph.fx import FxGraph
    from actgraph.graph.onnx import OnnxGraph


def evaluate(graph: Graph, value: Value, known: Mapping[Value, Array] | None = None, *, limit: int = 4096) -> Array:
    """The value computed from parameters (and ``known`` values) alone.

    limit: at most this many nodes are evaluated. Raises UnsupportedError when the value depends on an input.
    """
    results: dict[Value, Array] = dict(known or {})
    stack = [value]
    steps = 0
    while stack:
        top = stack[-1]
        if top in results:
            stack.pop()
            continue
        if top.is_parameter:
            results[top] = graph.read(top)
            continue
        node = top.producer
        if node is None:
            raise UnsupportedError(f"{value.name} depends on the input {top.name}", "only constant values can be evaluated")
        missing = [operand for operand in node.operands if operand is not None and operand not in results]
        if missing:
            stack.extend(missing)
            continue
        steps += 1
        if steps > limit:
            raise UnsupportedError(f"{value.name} takes more than {limit} nodes to evaluate", "raise the limit")
        operands = [None if operand is None else results[operand] for operand in node.operands]
        for output, array in zip(node.outputs, evaluate_node(graph, node, operands), strict=False):
            results[output] = array
    return results[value]


def evaluate_node(graph: Graph, node: Node, operands: list[Array | None]) -> list[Array]:
    """The outputs of one node for the given operands."""
    if graph.dialect == "fx":
        from actgraph.graph.fx import FxGraph

        assert isinstance(graph, FxGraph)
        return _evaluate_fx(graph, node, operands)
    from actgraph.graph.onnx import OnnxGraph

    assert isinstance(graph, OnnxGraph)
    return _evaluate_onnx(graph, node, operands)


def _evaluate_fx(graph: FxGraph, node: Node, operands: list[Array | None]) -> list[Array]:
    import torch
    from torch.fx.node import map_arg

    from actgraph.graph.fx_types import array_of, tensor_of

    values = {
        operand.key: tensor_of(array)
        for operand, array in zip(node.operands, operands, strict=True)
        if operand is not None and array is not None
    }

    def concrete(n: Any) -> Any:
        value = values[n]
        return value.item() if isinstance(n.meta.get("val"), (torch.SymInt, torch.SymFloat, int, float)) else value

    args = map_arg(node.key.args, concrete)
    kwargs = map_arg(node.key.kwargs, concrete)
    with torch.no_grad():
        result = node.key.target(*args, **kwargs)
    several = result if isinstance(result, (list, tuple)) else (result,)
    return [array_of(torch.as_tensor(item)) for item in several if item is not None]


_QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")  # the reference has only new versions of these; the meaning is the same


def _evaluate_onnx(graph: OnnxGraph, node: Node, operands: list[Array | None]) -> list[Array]:
    import onnx_ir as ir
    from onnx.reference import ReferenceEvaluator

    native: ir.Node = node.key
    inputs = [
        None
        if value is None
        else ir.Value(name=f"i{index}", type=value.type, shape=ir.Shape(array.shape) if array is not None else None)
        for index, (value, array) in enumerate(zip(native.inputs, operands, strict=True))
    ]
    copy = ir.Node(
        native.domain,
        native.op_type,
        inputs,
        list(native.attributes.values()),
        overload=native.overload,
        num_outputs=len(native.outputs),
    )
    for index, (output, original) in enumerate(zip(copy.outputs, native.outputs, strict=True)):
        output.name = f"o{index}"
        output.type = original.type
    # the reference looks functions up by name alone: of the variants of this one it must see the one that is called
    functions = [
        f
        for f in graph.model.functions.values()
        if f.domain == native.domain and (f.name != native.op_type or f.overload == native.overload)
    ]
    opsets = dict(graph.model.opset_imports)
    if native.domain == "" and native.op_type in _QUANTIZERS:
        opsets[""] = max(opsets.get("", 0), 21)
    model = ir.Model(
        ir.Graph([v for v in inputs if v is not None], list(copy.outputs), nodes=[copy], opset_imports=opsets, name="one"),
        ir_version=max(graph.model.ir_version, 10),
        functions=functions,
    )
    proto = ir.to_proto(model)
    for function in proto.functions:
        if any(inner.op_type in _QUANTIZERS for inner in function.node):
            for entry in function.opset_import:
                entry.version = max(entry.version, 21) if entry.domain == "" else entry.version
    session = ReferenceEvaluator(proto)
    feed = {f"i{index}": np.asarray(array) for index, array in enumerate(operands) if array is not None}
    return [np.asarray(array) for array in session.run(None, feed)]
