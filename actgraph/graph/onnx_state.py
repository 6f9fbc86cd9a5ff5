"""Remembering the state of an ``ir.Model``: what rollback returns to and what clones are made from.

A ``ModelState`` records the objects of a model with everything about them that an edit may change, in one linear walk and
without copying tensors, types or attributes (all of them immutable or replaced, never mutated, by the dialect). It can be
put back into the same objects, so handles taken before a transaction survive a rollback, or built anew as a clone.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir


@dataclass(frozen=True, slots=True)
class _ValueState:
    value: ir.Value
    name: str | None
    type: Any
    shape: ir.Shape | None
    const_value: Any
    metadata: dict[str, str] | None
    meta: Any  # what onnx_ir keeps beside a value: quantization annotations

    @staticmethod
    def of(value: ir.Value) -> _ValueState:
        metadata = value._metadata_props  # the property would allocate a dictionary for every value
        return _ValueState(
            value, value.name, value.type, value.shape, value.const_value, _copy(metadata), value._metadata or None
        )

    def reinstate(self) -> None:
        value = self.value
        if value.name != self.name:
            value.const_value = None  # renaming must not rename a tensor that a clone shares
            value.name = self.name
        value.type, value.shape, value.const_value = self.type, self.shape, self.const_value
        if self.metadata or value._metadata_props:
            value.metadata_props.clear()
            value.metadata_props.update(self.metadata or {})

    def build(self, values: dict[ir.Value, ir.Value]) -> ir.Value:
        new = ir.Value(
            name=self.name, type=self.type, shape=self.shape, const_value=self.const_value, metadata_props=_copy(self.metadata)
        )
        if self.meta:
            new.meta.update(self.meta)
        values[self.value] = new
        return new


@dataclass(frozen=True, slots=True)
class _NodeState:
    node: ir.Node
    name: str | None
    domain: str
    op_type: str
    overload: str
    inputs: tuple[ir.Value | None, ...]
    outputs: tuple[_ValueState, ...]
    attributes: dict[str, ir.Attr]
    metadata: dict[str, str] | None
    bodies: dict[str, tuple[_GraphState, ...]] | None

    @staticmethod
    def of(node: ir.Node) -> _NodeState:
        bodies = {name: tuple(_GraphState.of(body) for body in graphs) for name, graphs in graph_attributes(node)}
        return _NodeState(
            node, node.name, node.domain, node.op_type, node.overload, tuple(node.inputs),
            tuple(_ValueState.of(value) for value in node.outputs), dict(node.attributes.data),
            _copy(node._metadata_props), bodies or None,
        )  # fmt: skip

    def reinstate(self) -> None:
        node = self.node
        node.name, node.domain, node.op_type, node.overload = self.name, self.domain, self.op_type, self.overload
        set_inputs(node, self.inputs)
        for output in self.outputs:
            output.reinstate()
        if node.attributes.data != self.attributes:
            node.attributes.clear()
            node.attributes.update(self.attributes)
        node.metadata_props.clear()
        node.metadata_props.update(self.metadata or {})
        for graphs in (self.bodies or {}).values():
            for body in graphs:
                body.reinstate()

    def build(self, values: dict[ir.Value, ir.Value], nodes: dict[ir.Node, ir.Node]) -> ir.Node:
        attributes = dict(self.attributes)
        for name, graphs in (self.bodies or {}).items():
            built = [body.build(values, nodes) for body in graphs]
            many = attributes[name].type == ir.AttributeType.GRAPHS
            attributes[name] = ir.AttrGraphs(name, built) if many else ir.AttrGraph(name, built[0])
        outputs = [output.build(values) for output in self.outputs]
        new = ir.Node(
            self.domain, self.op_type, [_known(v, values) if v is not None else None for v in self.inputs], attributes,
            overload=self.overload, outputs=outputs, version=self.node.version, name=self.name,
            doc_string=self.node.doc_string, metadata_props=_copy(self.metadata),
        )  # fmt: skip
        nodes[self.node] = new
        return new


@dataclass(frozen=True, slots=True)
class _GraphState:
    graph: ir.Graph
    name: str | None
    inputs: tuple[_ValueState, ...]
    outputs: tuple[ir.Value, ...]
    initializers: tuple[_ValueState, ...]
    nodes: tuple[_NodeState, ...]
    opset_imports: dict[str, int]
    metadata: dict[str, str]

    @staticmethod
    def of(graph: ir.Graph) -> _GraphState:
        return _GraphState(
            graph, graph.name, tuple(_ValueState.of(v) for v in graph.inputs), tuple(graph.outputs),
            tuple(_ValueState.of(v) for v in graph.initializers.values()), tuple(_NodeState.of(n) for n in graph),
            dict(graph.opset_imports), dict(graph.metadata_props),
        )  # fmt: skip

    def reinstate(self) -> None:
        graph = self.graph
        kept = {state.node for state in self.nodes}
        for node in list(graph):
            if node not in kept:
                set_inputs(node, ())
        graph.remove(list(graph))
        graph.outputs.clear()
        graph.inputs.clear()
        graph.initializers.clear()
        for value_state in (*self.inputs, *self.initializers):
            value_state.reinstate()
        for node_state in self.nodes:
            node_state.reinstate()
        graph.extend([state.node for state in self.nodes])
        graph.inputs.extend([state.value for state in self.inputs])
        for value_state in self.initializers:
            graph.initializers.add(value_state.value)
        graph.outputs.extend(self.outputs)
        graph.name = self.name
        _replace(graph.opset_imports, self.opset_imports)
        _replace(graph.metadata_props, self.metadata)

    def build(self, values: dict[ir.Value, ir.Value], nodes: dict[ir.Node, ir.Node]) -> ir.Graph:
        inputs = [state.build(values) for state in self.inputs]
        initializers = [values.get(state.value) or state.build(values) for state in self.initializers]
        built = [state.build(values, nodes) for state in self.nodes]
        graph = ir.Graph(
            inputs, [_known(v, values) for v in self.outputs], nodes=built, initializers=initializers,
            opset_imports=dict(self.opset_imports), name=self.name, doc_string=self.graph.doc_string,
        )  # fmt: skip
        graph.metadata_props.update(self.metadata)
        return graph


@dataclass(frozen=True)
class ModelState:
    """Everything that edits may change in ``model``, as it was when recorded."""

    model: ir.Model
    graph: _GraphState
    ir_version: int
    functions: dict[Any, ir.Function]
    metadata: dict[str, str]

    @staticmethod
    def of(model: ir.Model) -> ModelState:
        """Record ``model``. Linear in nodes; tensors and function bodies are shared."""
        with collector_paused():
            graph = _GraphState.of(model.graph)
        return ModelState(model, graph, model.ir_version, dict(model.functions), dict(model.metadata_props))

    def reinstate(self) -> None:
        """Put the recorded state back into the recorded objects."""
        self.graph.reinstate()
        self.model.ir_version = self.ir_version
        _replace(self.model.functions, self.functions)
        _replace(self.model.metadata_props, self.metadata)

    def build(self) -> tuple[ir.Model, dict[ir.Value, ir.Value], dict[ir.Node, ir.Node]]:
        """A new model in the recorded state, with the maps recorded value -> new value and node -> node."""
        values: dict[ir.Value, ir.Value] = {}
        nodes: dict[ir.Node, ir.Node] = {}
        with collector_paused():
            graph = self.graph.build(values, nodes)
        old = self.model
        model = ir.Model(
            graph, ir_version=self.ir_version, producer_name=old.producer_name, producer_version=old.producer_version,
            domain=old.domain, model_version=old.model_version, doc_string=old.doc_string,
            functions=list(self.functions.values()), metadata_props=dict(self.metadata),
        )  # fmt: skip
        return model, values, nodes


_GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def graph_attributes(node: ir.Node) -> list[tuple[str, tuple[ir.Graph, ...]]]:
    """The attributes of ``node`` that hold graphs (bodies of If, Loop, Scan)."""
    found: list[tuple[str, tuple[ir.Graph, ...]]] = []
    for name, attribute in node.attributes.data.items():
        if attribute.type in _GRAPHS and not attribute.is_ref():
            found.append((name, (attribute.value,) if attribute.type == ir.AttributeType.GRAPH else tuple(attribute.value)))
    return found


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """No garbage collection while many objects are made at once, none of which is garbage."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def set_inputs(node: ir.Node, inputs: tuple[ir.Value | None, ...]) -> None:
    """Make ``inputs`` the inputs of ``node``, keeping usage records right."""
    if node.inputs == inputs:
        return
    node.resize_inputs(len(inputs))
    for index, value in enumerate(inputs):
        if node.inputs[index] is not value:
            node.replace_input_with(index, value)


def _copy(metadata: Mapping[str, str] | None) -> dict[str, str] | None:
    return dict(metadata) if metadata else None


def _replace(target: Any, source: Mapping[Any, Any]) -> None:
    target.clear()
    target.update(source)


def _known(value: ir.Value, values: dict[ir.Value, ir.Value]) -> ir.Value:
    # what nothing defines gets a twin too, so that the verifier can report it on a clone
    return values[value] if value in values else _ValueState.of(value).build(values)
