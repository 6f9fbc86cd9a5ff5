"""Raising the opset of a model in place.

onnx's version converter rewrites a copy without weights; what it changed is then carried over into the objects that the
graph already has, matched by the names of outputs. Handles stay valid and nodes of foreign domains are untouched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir

from actgraph.errors import UnsupportedError
from actgraph.graph.onnx_normalize import constant_tensor, read_origin, unique, write_origin
from actgraph.graph.onnx_state import graph_attributes, set_inputs
from actgraph.graph.provenance import Origin
from actgraph.ops.registry import DOMAIN

if TYPE_CHECKING:
    from actgraph.graph.onnx import OnnxGraph

#: The newest standard opset that the oldest supported onnxruntime (1.23) loads.
MAX_OPSET = 23
#: Constants up to this size stay in the copy that is converted: converters read axes, shapes and scales.
_SMALL = 4096


def ensure_opset(graph: OnnxGraph, opset: int, reason: str) -> None:
    """Lift the model to ``opset`` when it is older, and note why. Raises UnsupportedError when that cannot be done."""
    if graph.opset >= opset:
        return
    if opset > MAX_OPSET:
        raise UnsupportedError(f"{reason} needs opset {opset}", f"the newest that onnxruntime 1.23 loads is {MAX_OPSET}")
    before = graph.opset
    if "" not in graph.model.opset_imports:
        graph.model.opset_imports[""] = opset
        return
    lift(graph, opset)
    graph.notes.append(f"opset raised from {before} to {opset} for {reason}")


def lift(graph: OnnxGraph, opset: int) -> None:
    """Convert the standard nodes of ``graph`` to ``opset``."""
    from actgraph.graph.onnx_edit import free_signature

    free_signature(graph)
    model = graph.model
    proto = _without_weights(model)
    try:
        converted = onnx.version_converter.convert_version(proto, opset)
    except (RuntimeError, onnx.version_converter.ConvertError) as error:
        detail = str(error).strip().splitlines()[-1] if str(error).strip() else "unknown reason"
        raise UnsupportedError(
            f"{graph.name} cannot be converted from opset {graph.opset} to {opset}: {detail}",
            "export the model again with a newer opset",
        ) from error
    _Graft(graph, graph.opset, opset).apply(model.graph, ir.serde.deserialize_graph(converted.graph))
    model.opset_imports[""] = opset
    model.ir_version = max(model.ir_version, 10)
    graph._forget()
    for key in [key for key in graph.model.functions if key[0] == DOMAIN]:
        del graph.model.functions[key]
    renew_bodies(graph)


def _without_weights(model: ir.Model) -> onnx.ModelProto:
    """The model with large initializers as inputs and without what the converter does not keep anyway."""
    proto = onnx.ModelProto(ir_version=max(model.ir_version, 4))
    for domain, version in model.opset_imports.items():
        proto.opset_import.add(domain=domain, version=version)
    graph = proto.graph
    graph.name = model.graph.name or "graph"
    listed = {value.name for value in model.graph.inputs}
    for value in model.graph.inputs:
        ir.serde.serialize_value_into(graph.input.add(), value)
    for value in model.graph.initializers.values():
        if value.name not in listed:
            ir.serde.serialize_value_into(graph.input.add(), value)
        tensor = value.const_value
        if tensor is not None and tensor.nbytes <= _SMALL:
            item = ir.serde.serialize_tensor(tensor)
            item.name = str(value.name)
            graph.initializer.append(item)
    for node in model.graph:
        ir.serde.serialize_node_into(graph.node.add(), node)
        for value in node.outputs:
            if value.name and value.type is not None and not value.is_graph_output():
                ir.serde.serialize_value_into(graph.value_info.add(), value)
    for value in dict.fromkeys(model.graph.outputs):
        ir.serde.serialize_value_into(graph.output.add(), value)
    return proto


class _Graft:
    """Carries a converted graph over into the objects of the original one."""

    def __init__(self, graph: OnnxGraph, before: int, after: int) -> None:
        self.graph = graph
        self.span = f"opset {before} -> {after}"
        self.taken_values = {str(v.name) for v in graph.values_by_name.values()}
        self.taken_nodes = set(graph.node_names)

    def apply(self, old: ir.Graph, new: ir.Graph, outer: dict[str, ir.Value] | None = None) -> None:
        values: dict[str, ir.Value] = dict(outer or {})
        for value in (*old.inputs, *old.initializers.values()):
            values[str(value.name)] = value
        makers: dict[str, ir.Node] = {}
        for node in old:
            for value in node.outputs:
                values[str(value.name)] = value
                makers[str(value.name)] = node
        order: list[ir.Node] = []
        converted = list(new)
        created: dict[str, ir.Value] = {}
        reused: set[ir.Node] = set()
        for name, value in new.initializers.items():
            if name not in values and value.const_value is not None:
                created[name] = self._constant(value, value.const_value)
        for node in converted:
            target = makers.get(str(node.outputs[0].name)) if node.outputs else None
            if node.op_type == "Constant" and target is None:
                tensor = constant_tensor(node)
                if tensor is None:
                    raise UnsupportedError(f"the {self.span} conversion of {self.graph.name} made a constant without data")
                created[str(node.outputs[0].name)] = self._constant(node.outputs[0], tensor)
                continue
            inputs = tuple(self._value(v, values, created) for v in node.inputs)
            if target is not None and target not in reused:
                self._overwrite(target, node, inputs, values)
                reused.add(target)
                order.append(target)
            else:
                order.append(self._create(node, inputs, created, new, values))
        lost = [node for node in old if node not in reused]
        if any(use.node not in lost for node in lost for v in node.outputs for use in v.uses()):
            raise UnsupportedError(f"the {self.span} conversion of {self.graph.name} lost node {lost[0].name}")
        for node in lost:
            set_inputs(node, (None,) * len(node.inputs))
        old.remove(list(old))
        old.extend(order)

    def _value(self, value: ir.Value | None, values: dict[str, ir.Value], created: dict[str, ir.Value]) -> ir.Value | None:
        if value is None:
            return None
        name = str(value.name)
        found = created.get(name) or values.get(name)
        if found is None:
            raise UnsupportedError(f"the {self.span} conversion of {self.graph.name} reads an unknown value {name}")
        return found

    def _overwrite(
        self, target: ir.Node, source: ir.Node, inputs: tuple[ir.Value | None, ...], values: dict[str, ir.Value]
    ) -> None:
        """Make ``target`` what ``source`` is. Its outputs, name and metadata stay."""
        if [v.name for v in target.outputs] != [v.name for v in source.outputs]:
            raise UnsupportedError(f"the {self.span} conversion of {self.graph.name} changes the outputs of {target.name}")
        if target.domain != "":
            return  # foreign nodes are as they were; their operands keep their names
        set_inputs(target, inputs)
        target.op_type = source.op_type
        bodies = dict(graph_attributes(target))
        attributes = {name: a for name, a in source.attributes.items() if name not in bodies}
        for name in [name for name in target.attributes if name not in bodies]:
            del target.attributes[name]
        target.attributes.update(attributes)
        for name, graphs in graph_attributes(source):
            for mine, theirs in zip(bodies[name], graphs, strict=True):
                self.apply(mine, theirs, values)

    def _create(
        self,
        source: ir.Node,
        inputs: tuple[ir.Value | None, ...],
        created: dict[str, ir.Value],
        new: ir.Graph,
        values: dict[str, ir.Value],
    ) -> ir.Node:
        """A node that the converter added. It stands for the source nodes of what reads it."""
        reader = next((u.node for v in source.outputs for u in v.uses()), None)
        stem = f"{reader.name or reader.outputs[0].name if reader is not None else source.op_type}.{source.op_type.lower()}"
        node = ir.Node(
            source.domain, source.op_type, inputs, dict(source.attributes),
            outputs=[ir.Value(name=self._name(f"{stem}"), type=v.type, shape=v.shape) for v in source.outputs],
            name=unique(stem, self.taken_nodes),
        )  # fmt: skip
        self.taken_nodes.add(str(node.name))
        origin = Origin()
        while reader is not None:
            twin = values.get(str(reader.outputs[0].name))
            maker = twin.producer() if twin is not None else None
            if maker is not None:
                origin = read_origin(maker)
                break
            reader = next((u.node for v in reader.outputs for u in v.uses()), None)
        write_origin(node, Origin(origin.sources or (str(source.op_type),), origin.scope))
        for mine, theirs in zip(node.outputs, source.outputs, strict=True):
            created[str(theirs.name)] = mine
        return node

    def _constant(self, source: ir.Value, tensor: ir.TensorProtocol) -> ir.Value:
        """An initializer for a constant that the converter made, named after what reads it."""
        reader = next((u.node for u in source.uses()), None)
        name = self._name(f"{(reader.name or reader.outputs[0].name) if reader is not None else 'opset'}.const")
        data = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=name)
        value = ir.Value(name=name, type=ir.TensorType(data.dtype), shape=ir.Shape(data.shape.numpy()), const_value=data)
        self.graph.model.graph.register_initializer(value)
        return value

    def _name(self, stem: str) -> str:
        name = unique(stem, self.taken_values)
        self.taken_values.add(name)
        return name


def renew_bodies(graph: OnnxGraph) -> None:
    """Build the function bodies of all actgraph nodes again, for the opset and the ops of now."""
    from actgraph.graph.onnx_edit import refresh_body

    nodes = [node for node in graph.model.graph.all_nodes() if node.domain == DOMAIN]
    for node in nodes:
        refresh_body(graph, node)
    used = {(node.domain, node.op_type, node.overload) for node in nodes}
    for key in [key for key in graph.model.functions if key[0] == DOMAIN and key not in used]:
        del graph.model.functions[key]
