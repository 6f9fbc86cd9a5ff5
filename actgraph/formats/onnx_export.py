"""FX graph to ONNX graph.

``to_onnx`` translates node by node (``onnx_export_translate``), keeps the names of inputs, outputs, values, parameters and
dimensions, shares the weights' memory, carries provenance and sites over, and attaches to every actgraph op its body for
the opset of the model, so that any ONNX runtime can run the result.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import InlinePass
from torch import fx, nn

from actgraph.errors import UnsupportedError
from actgraph.formats.compat import torch_facade
from actgraph.formats.onnx_export_emit import Emitter
from actgraph.formats.onnx_export_sites import Carrier
from actgraph.formats.onnx_export_translate import Translator, onnx_op
from actgraph.formats.onnx_export_types import set_type
from actgraph.graph.fx import FxGraph
from actgraph.graph.fx_build import lookup, module_scope
from actgraph.graph.onnx import OnnxGraph
from actgraph.graph.onnx_insert import attach_body
from actgraph.graph.onnx_native import loosen_results, native_type, tensor_of
from actgraph.graph.provenance import KEY, Origin
from actgraph.ops.body import MIN_IR_VERSION, function_opsets
from actgraph.ops.dtypes import DType
from actgraph.ops.registry import DOMAIN, get_op

#: The oldest and newest opset that a graph is exported to.
MIN_OPSET, MAX_OPSET = 18, 23
#: ATen ops that are one op from this opset on and several before.
_NATIVE_SINCE = {torch.ops.aten.gelu.default: 20}
_BRANCHES = "pkg.torch.__subgraph__"


def to_onnx(graph: FxGraph, opset: int | None = None) -> OnnxGraph:
    """``graph`` as an ONNX graph of ``opset`` (default: the lowest of 18 and up that serves its ops and types).

    Names, weights (shared, not copied), symbolic sizes, provenance, sites, history, notes and companions are kept; each
    FX value that still exists is the ONNX value of the same name. Saving gives graph outputs their public names.
    Raises UnsupportedError naming an op that ONNX cannot express.
    """
    needed = lowest_opset(graph)
    opset = needed if opset is None else opset
    if not needed <= opset <= MAX_OPSET:
        reason = f"{graph.name} needs at least {needed}" if opset < needed else f"the newest supported one is {MAX_OPSET}"
        raise UnsupportedError(f"cannot export {graph.name} to opset {opset}", reason)
    carrier = Carrier(graph)
    model, translator = build_model(graph, opset, carrier)
    result = OnnxGraph(
        model,
        graph.name,
        outputs=[name for name, _ in graph.outputs()],
        roles={**graph.input_roles, **graph.output_roles},
        optional=list(graph.defaults),
    )
    for native in result.model.graph:
        if native.domain == DOMAIN:
            attach_body(result, native)
    result.history = list(graph.history)
    result.notes = list(graph.notes)
    result.folds = [carrier.record(record, translator, result) for record in graph.folds]
    result.metadata = dict(graph.metadata)
    if graph.dim_ranges:
        result.metadata["dim_ranges"] = json.dumps(graph.dim_ranges, sort_keys=True)
    result.companions = dataclasses.replace(graph.companions)
    result._sites = carrier.table(result, translator)
    return result


def lowest_opset(graph: FxGraph) -> int:
    """The lowest opset that serves every op and element type of ``graph``."""
    opset = MIN_OPSET
    for node in graph.nodes():
        opset = max(opset, _NATIVE_SINCE.get(node.key.target, MIN_OPSET))
        if node.op.startswith("onnx."):
            opset = max(opset, onnx_op(node.key.target)[1])
        if node.op.startswith(f"{DOMAIN}."):
            opset = max(opset, get_op(node.op).min_opset)
        for value in node.outputs:
            opset = max(opset, _opset_of(value.dtype))
    return max([opset, *(_opset_of(parameter.dtype) for parameter in graph.parameters())])


def _opset_of(dtype: DType | None) -> int:
    if dtype in (DType.I4, DType.U4):
        return 21
    return 19 if dtype in (DType.F8E4M3, DType.F8E5M2) else MIN_OPSET


def build_model(graph: FxGraph, opset: int, carrier: Carrier) -> tuple[ir.Model, Translator]:
    """The ONNX model of ``graph``, and the translator, which knows what became of each node."""
    emit = Emitter(opset)
    translator = Translator(emit, graph.dims, carrier, _Describer())
    inputs = _inputs(graph, translator)
    parameters = _parameters(graph, translator)
    _branches(graph, translator)
    translator.run(graph.graph.nodes)
    outputs = _outputs(graph, translator)
    nodes = emit.live_nodes(outputs)
    initializers = [v for v in (*parameters, *emit.initializers.values()) if v.uses() or v in outputs]
    container = ir.Graph(
        inputs, outputs, nodes=nodes, initializers=initializers, opset_imports=_imports(nodes, opset), name=graph.name
    )
    for name, default in graph.defaults.items():
        value = translator.values[graph.input(name).key]
        value.const_value = tensor_of(np.asarray(default))
        container.register_initializer(value)
    loosen_results(container)
    functions = list(translator.functions.values())
    model = ir.Model(container, ir_version=MIN_IR_VERSION, producer_name="actgraph", functions=functions)
    if functions:
        InlinePass()(model)
    return model, translator


def _imports(nodes: Iterable[ir.Node], opset: int) -> dict[str, int]:
    """The operator sets that the model needs: ours, and those of foreign nodes in user code."""
    imports = function_opsets(opset)
    for node in nodes:
        imports.setdefault(node.domain, node.version or 1)
    return imports


def _inputs(graph: FxGraph, translator: Translator) -> list[ir.Value]:
    found = []
    for value in graph.inputs():
        native = torch_facade().graph_value(value.name, translator.emit.opset)
        set_type(native, translator.type_of(value.key))
        translator.emit.add_source(native)
        translator.values[value.key] = native
        for axis, dim in enumerate(value.type.shape or ()):
            if isinstance(dim, str) and value.name not in graph.defaults:  # a default has size 1 whatever it is called
                translator.size_sources.setdefault(dim, (native, axis))
        found.append(native)
    return found


def _parameters(graph: FxGraph, translator: Translator) -> list[ir.Value]:
    facade = torch_facade()
    found = []
    for value in graph.parameters():
        native = facade.graph_value(value.name, translator.emit.opset)
        tensor = graph.tensor(value).detach()
        tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        native.const_value = facade.TorchTensor(tensor, name=value.name)
        others = [alias for alias in graph.aliases(value) if alias != value.name]
        if others:
            native.metadata_props["actgraph.aliases"] = " ".join(others)
        set_type(native, translator.type_of(value.key))
        translator.emit.add_source(native)
        translator.values[value.key] = native
        found.append(native)
    return found


def _outputs(graph: FxGraph, translator: Translator) -> list[ir.Value]:
    """The graph outputs, as values; saving gives them their public names."""
    return [translator.values[value.key] for _, value in graph.outputs()]


class _Describer:
    """Attaches provenance and the viewer's namespace to the nodes written for an FX node."""

    def __init__(self) -> None:
        self.facade = torch_facade()

    def __call__(self, source: fx.Node, node: ir.Node) -> None:
        data = (source.meta.get("custom") or {}).get(KEY) or Origin((source.name,), module_scope(source)).to_dict()
        node.metadata_props.update({f"{KEY}.{key}": value for key, value in data.items()})
        if source.meta.get("nn_module_stack"):
            node.metadata_props["namespace"] = self.facade.namespace(source)


# --- functions ------------------------------------------------------------------------------------------------------------


def _branches(graph: FxGraph, translator: Translator) -> None:
    """Branches of control flow as functions, which the translations of ``cond`` and its like call; inlined afterwards."""
    for node in graph.graph.nodes:
        if node.op != "get_attr":
            continue
        found = lookup(graph.root, str(node.target))
        if isinstance(found, fx.GraphModule):
            translator.branches[str(node.target)] = _branch(found, str(node.target), translator)


def _branch(module: fx.GraphModule, path: str, outer: Translator) -> ir.Function:
    emit = Emitter(outer.emit.opset, constants_as_nodes=True, prefix=f"{path}.")
    inner = Translator(emit, outer.dims, None, _Describer())
    inputs = []
    for node in module.graph.nodes:
        if node.op == "placeholder":
            value = torch_facade().graph_value(node.name, emit.opset)
            set_type(value, inner.type_of(node))
            emit.add_source(value)
            inner.values[node] = value
            inputs.append(value)
        elif node.op == "get_attr":
            child = lookup(module, str(node.target))
            if isinstance(child, nn.Module):
                inner.branches[str(node.target)] = _branch(child, f"{path}.{node.target}", inner)  # type: ignore[arg-type]
            else:
                inner.values[node] = emit.constant(child.detach().cpu().numpy())
    inner.run(module.graph.nodes)
    listed: Any = module.graph.output_node().args[0]
    results = [inner.values[node] for node in listed]
    outputs = [emit.op("Identity", v) if v.producer() is None or v in results[:i] else v for i, v in enumerate(results)]
    emit.finish(path, [(f"{path}.output", v, native_type(v)) for v in outputs if emit.is_pending(v)], lambda node: None)
    outer.functions.update(inner.functions)
    body = ir.Graph(inputs, outputs, nodes=emit.live_nodes(outputs), opset_imports={"": emit.opset})
    function = ir.Function(_BRANCHES, path.replace(".", "__"), graph=body, attributes=[])
    outer.functions[function.identifier()] = function
    return function
