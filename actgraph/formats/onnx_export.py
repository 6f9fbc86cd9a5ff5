"""FX graph to ONNX graph.

``to_onnx`` translates node by node (``onnx_export_translate``), keeps the names of inputs, outputs, values, parameters and
dimensions, shares the weights' memory, carries provenance and sites over, and attaches to every actgraph op its body for
the opset of the model, so that any ONNX runtime can run the result.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from actgraph.errors import UnsupportedError
from actgraph.formats.compat import torch_facade
from actgraph.formats.onnx_export_emit import Emitter, set_type
from actgraph.formats.onnx_export_translate import Translator
from actgraph.graph.fx import FxGraph
from actgraph.graph.fx_build import is_item, is_multiple, lookup, module_scope
from actgraph.graph.graph import Value
from actgraph.graph.provenance import KEY, Origin
from actgraph.ops.body import MIN_IR_VERSION, body_function, function_opsets
from actgraph.ops.dtypes import DType
from actgraph.ops.registry import DOMAIN, get_op

#: The oldest and newest opset that a graph is exported to.
MIN_OPSET, MAX_OPSET = 18, 21
#: ATen ops that a newer opset has as one op.
_NATIVE_SINCE = {torch.ops.aten.gelu.default: 20}


def lowest_opset(graph: FxGraph) -> int:
    """The lowest opset that serves every op and element type of ``graph``."""
    opset = MIN_OPSET
    for node in graph.nodes():
        target = node.key.target
        opset = max(opset, _NATIVE_SINCE.get(target, MIN_OPSET))
        if node.op.startswith(f"{DOMAIN}."):
            opset = max(opset, get_op(node.op).min_opset)
        for value in node.outputs:
            opset = max(opset, _opset_of(value.dtype))
    return max([opset, *(_opset_of(parameter.dtype) for parameter in graph.parameters())])


def _opset_of(dtype: DType | None) -> int:
    if dtype in (DType.I4, DType.U4):
        return 21
    return 19 if dtype in (DType.F8E4M3, DType.F8E5M2) else MIN_OPSET


def build_model(graph: FxGraph, opset: int) -> tuple[ir.Model, Translator]:
    """The ONNX model of ``graph``, and the translator, which knows what became of each node."""
    emit = Emitter(opset)
    translator = Translator(emit, graph.dims, keep=lambda node: False, describe=_Describer(graph))
    inputs = _inputs(graph, translator)
    parameters = _parameters(graph, translator)
    translator.run([node for node in graph.graph.nodes if node.op == "call_function"])
    outputs = _outputs(graph, translator)
    initializers = [*parameters, *emit.initializers.values()]
    container = ir.Graph(
        inputs, outputs, nodes=emit.nodes, initializers=initializers, opset_imports=function_opsets(opset), name=graph.name
    )
    model = ir.Model(container, ir_version=MIN_IR_VERSION, producer_name="actgraph", functions=list(translator.functions.values()))
    return model, translator


def _inputs(graph: FxGraph, translator: Translator) -> list[ir.Value]:
    found = []
    for value in graph.inputs():
        native = torch_facade().graph_value(value.name, translator.emit.opset)
        set_type(native, value.type)
        translator.emit.add_source(native)
        translator.values[value.key] = native
        for axis, dim in enumerate(value.type.shape or ()):
            if isinstance(dim, str):
                translator.size_sources.setdefault(dim, (native, axis))
        found.append(native)
    return found


def _parameters(graph: FxGraph, translator: Translator) -> list[ir.Value]:
    facade = torch_facade()
    found = []
    for value in graph.parameters():
        native = facade.graph_value(value.name, translator.emit.opset)
        native.const_value = facade.TorchTensor(graph.tensor(value).detach(), name=value.name)
        set_type(native, value.type)
        translator.emit.add_source(native)
        translator.values[value.key] = native
        found.append(native)
    return found


def _outputs(graph: FxGraph, translator: Translator) -> list[ir.Value]:
    """The graph outputs under their public names; a copy where a value is an input, a parameter or output twice."""
    taken: set[int] = set()
    found = []
    for name, value in graph.outputs():
        native = translator.values[value.key]
        producer = native.producer()
        if producer is None or id(native) in taken:
            native = translator.emit.op("Identity", native)
            translator.emit.finish(name, [(name, native, value.type)], lambda node: None)
        else:
            translator.emit.rename(native, name)
        taken.add(id(native))
        found.append(native)
    return found


class _Describer:
    """Attaches provenance and the viewer's namespace to the nodes written for an FX node."""

    def __init__(self, graph: FxGraph) -> None:
        self.graph = graph
        self.facade = torch_facade()

    def __call__(self, source: fx.Node, node: ir.Node) -> None:
        data = (source.meta.get("custom") or {}).get(KEY) or Origin((source.name,), module_scope(source)).to_dict()
        node.metadata_props.update({f"{KEY}.{key}": value for key, value in data.items()})
        if source.meta.get("nn_module_stack"):
            node.metadata_props["namespace"] = self.facade.namespace(source)
