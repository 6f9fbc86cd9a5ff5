"""The ONNX dialect: an ``onnx_ir.Model`` as a ``Graph``.

Initializers (and Constant nodes, which become initializers) are parameters; nodes of the outermost graph are ``nodes()``;
those in the bodies of If, Loop and Scan and in model functions are listed by ``subgraph_nodes()`` under path names.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import onnx_ir as ir

from actgraph.graph import onnx_edit, onnx_verify
from actgraph.graph.graph import Array, Graph, Kind, Node, Role, Use, Value
from actgraph.graph.onnx_native import (
    PURE_DOMAINS,
    array_of,
    native_type,
    op_name,
    plain_attributes,
    set_native_type,
    signature_text,
)
from actgraph.graph.onnx_normalize import all_nodes, normalize, read_origin, unique
from actgraph.graph.onnx_order import Order
from actgraph.graph.onnx_state import ModelState, graph_attributes
from actgraph.graph.onnx_types import Inference, complete
from actgraph.graph.prims import Prim
from actgraph.graph.provenance import Origin
from actgraph.graph.sites import SiteTable
from actgraph.ops.registry import DOMAIN
from actgraph.ops.shapes import TensorType


class OnnxGraph(Graph):
    """A graph over ``model``, which it owns from now on.

    outputs: public names of the graph outputs where they differ from the names of their values.
    roles: roles of inputs and outputs other than USER. optional: names of inputs that have a default.
    typed: the model declares all that can be known of its types (a file that actgraph wrote), so nothing is inferred.
    """

    dialect: ClassVar[str] = "onnx"

    def __init__(
        self,
        model: ir.Model,
        name: str = "",
        *,
        outputs: Sequence[str] | None = None,
        roles: Mapping[str, Role] | None = None,
        optional: Iterable[str] | None = None,
        typed: bool = False,
    ) -> None:
        super().__init__(name or model.graph.name or "graph")
        normalize(model)
        self._model: ir.Model | None = model
        self._pending: tuple[ModelState, SiteTable | None] | None = None
        self._source: tuple[ir.Model, ModelState, SiteTable | None] | None = None
        self._output_names = list(outputs) if outputs is not None else [str(value.name) for value in model.graph.outputs]
        self._roles = dict(roles or {})
        self._optional = set(optional) if optional is not None else set(_optional_inputs(model))
        self._forget()
        if not typed:
            complete(self.inference(), model.graph)

    @property
    def site_table(self) -> SiteTable:
        _ = self.model  # building a clone brings its sites
        return super().site_table

    # --- the native model -----------------------------------------------------------------------------------------------

    @property
    def model(self) -> ir.Model:
        """The native model. A clone builds its own when it is first asked for."""
        if self._model is None:
            assert self._pending is not None
            state, sites = self._pending
            self._pending = None
            self._model, values, nodes = state.build()
            self._forget()
            if sites is not None:
                self._sites = sites.remap(
                    self, {str(old.name): str(new.name) for old, new in values.items()},
                    {str(old.name): str(new.name) for old, new in nodes.items()},
                )  # fmt: skip
        return self._model

    @property
    def opset(self) -> int:
        """The version of the standard operator set."""
        return self.model.opset_imports.get("", 0)

    @property
    def functions(self) -> Mapping[ir.OperatorIdentifier, ir.Function]:
        """Model functions by (domain, name, overload)."""
        return self.model.functions

    def inference(self) -> Inference:
        """Type inference with the opsets and functions of this model."""
        return Inference(self.model.opset_imports, self.model.ir_version, self.model.functions)

    def _forget(self) -> None:
        """Drop everything that is derived from the native model."""
        self._orders: dict[ir.Graph, Order] = {}
        self._owners: dict[ir.Graph, tuple[ir.Node | None, str]] | None = None
        self._by_name: dict[str, ir.Value] | None = None
        self._taken_values: set[str] = set()
        self._taken_nodes: set[str] | None = None

    def order(self, graph: ir.Graph | None = None) -> Order:
        """The order of the nodes of the outermost graph, or of a body."""
        key = graph if graph is not None else self.model.graph
        if key not in self._orders:
            self._orders[key] = Order(key)
        return self._orders[key]

    @property
    def owners(self) -> dict[ir.Graph, tuple[ir.Node | None, str]]:
        """The node that each body belongs to (none for model functions), and the path under which its nodes are named."""
        model = self.model  # building a clone forgets what is cached
        if self._owners is None:
            self._owners = {}
            self._find_owners(model.graph, "")
            for (domain, name, overload), function in model.functions.items():
                path = f"{domain}::{name}{':' + overload if overload else ''}/"
                self._owners[function.graph] = (None, path)
                self._find_owners(function.graph, path)
        return self._owners

    def _find_owners(self, graph: ir.Graph, path: str) -> None:
        assert self._owners is not None
        for node in graph:
            for name, bodies in graph_attributes(node):
                for index, body in enumerate(bodies):
                    part = f"{path}{node.name}/{name}" + (f"[{index}]" if len(bodies) > 1 else "")
                    self._owners[body] = (node, f"{part}/")
                    self._find_owners(body, f"{part}/")

    def path_of(self, graph: ir.Graph | None) -> str:
        """The prefix of names in a body; empty for the outermost graph."""
        if graph is None or (self._model is not None and graph is self._model.graph):
            return ""
        owner = self.owners.get(graph)
        return owner[1] if owner is not None else ""

    @property
    def values_by_name(self) -> dict[str, ir.Value]:
        """Every value of the outermost graph and its bodies, by path name."""
        graph = self.model.graph  # building a clone forgets what is cached
        if self._by_name is None:
            self._by_name = {}
            self._collect(graph, self._by_name)
            self._taken_values = {str(value.name) for value in self._by_name.values()}
        return self._by_name

    def register(self, value: ir.Value) -> None:
        """Note a new value of the outermost graph or a body."""
        self.values_by_name[f"{self.path_of(value.graph)}{value.name}"] = value
        self._taken_values.add(str(value.name))

    def _collect(self, graph: ir.Graph, into: dict[str, ir.Value]) -> None:
        path = self.path_of(graph)
        for value in (*graph.inputs, *graph.initializers.values()):
            into[f"{path}{value.name}"] = value
        for node in graph:
            for value in node.outputs:
                if value.name:
                    into[f"{path}{value.name}"] = value
            for _, bodies in graph_attributes(node):
                for body in bodies:
                    self._collect(body, into)

    @property
    def node_names(self) -> set[str]:
        """Every name of a node, bodies included."""
        if self._taken_nodes is None:
            self._taken_nodes = {str(node.name) for node in all_nodes(self.model.graph)}
        return self._taken_nodes

    # --- reading --------------------------------------------------------------------------------------------------------

    def inputs(self) -> tuple[Value, ...]:
        return tuple(Value(self, v) for v in self.model.graph.inputs if not v.is_initializer() or v.name in self._optional)

    def default(self, name: str) -> Array | None:
        """The default of an optional input; ``None`` for the others."""
        value = self.values_by_name.get(name)
        if value is None or name not in self._optional or value.const_value is None:
            return None
        return array_of(value.const_value)

    def outputs(self) -> tuple[tuple[str, Value], ...]:
        pairs = zip(self._public_names, self.model.graph.outputs, strict=True)
        return tuple((name, Value(self, value)) for name, value in pairs)

    @property
    def _public_names(self) -> list[str]:
        _ = self.model
        return self._output_names

    def role(self, name: str) -> Role:
        return self._roles.get(name, Role.USER)

    @property
    def roles(self) -> dict[str, Role]:
        """Roles other than USER, by input or output name."""
        return dict(self._roles)

    @property
    def optional(self) -> frozenset[str]:
        """Names of inputs that have a default."""
        return frozenset(self._optional)

    @property
    def dim_ranges(self) -> dict[str, tuple[int | None, int | None]]:
        """The smallest and largest size allowed, by dimension name. ONNX has no place for them: they are metadata."""
        ranges = json.loads(self.metadata.get("dim_ranges", "{}"))
        return {name: (low, high) for name, (low, high) in ranges.items()}

    def parameters(self) -> tuple[Value, ...]:
        return tuple(Value(self, v) for v in self.model.graph.initializers.values() if v.name not in self._optional)

    def aliases(self, parameter: Value) -> tuple[str, ...]:
        recorded = parameter.key.metadata_props.get("actgraph.aliases", "")
        return tuple(dict.fromkeys([parameter.name, *recorded.split()]))

    def nodes(self) -> Sequence[Node]:
        return [Node(self, node) for node in self.order()]

    def subgraph_nodes(self) -> Sequence[Node]:
        """Nodes in the bodies of If, Loop and Scan, then those of model functions, under path names."""
        inner = [node for node in all_nodes(self.model.graph) if node.graph is not self.model.graph]
        for function in self.model.functions.values():
            inner.extend(all_nodes(function.graph))
        return [Node(self, node) for node in inner]

    def function_signatures(self) -> Sequence[str]:
        return [signature_text(f) for key, f in self.model.functions.items() if key[0] != DOMAIN]

    def value(self, name: str) -> Value:
        return Value(self, self.values_by_name[name])

    def value_name(self, value: Value) -> str:
        key: ir.Value = value.key
        return f"{self.path_of(key.graph)}{key.name}"

    def value_kind(self, value: Value) -> Kind:
        key: ir.Value = value.key
        if key.is_initializer() and key.name not in self._optional:
            return Kind.PARAMETER
        return Kind.INPUT if key.is_graph_input() else Kind.RESULT

    def value_type(self, value: Value) -> TensorType:
        return native_type(value.key)

    def producer(self, value: Value) -> Node | None:
        node = value.key.producer()
        return Node(self, node) if node is not None else None

    def uses(self, value: Value) -> tuple[Use, ...]:
        key: ir.Value = value.key
        found: dict[tuple[ir.Node, int], None] = {}
        for use in key.uses():
            if use.node.graph is None:
                continue
            reader = self.enclosing(use.node, key.graph)
            index = use.idx if reader is use.node else len(reader.inputs) + self.captures(reader).index(key)
            found[reader, index] = None
        pairs = sorted(found, key=lambda pair: (self.position(pair[0]), pair[1])) if len(found) > 1 else list(found)
        uses = [Use(Node(self, reader), index) for reader, index in pairs]
        if key.is_graph_output():
            assert key.graph is not None
            uses += [Use(None, index) for index, output in enumerate(key.graph.outputs) if output is key]
        return tuple(uses)

    def enclosing(self, node: ir.Node, graph: ir.Graph | None) -> ir.Node:
        """The node of ``graph`` whose bodies contain ``node``, or ``node`` itself."""
        while node.graph is not graph and node.graph is not None:
            owner = self.owner(node.graph)
            if owner is None:
                break
            node = owner
        return node

    def captures(self, node: ir.Node) -> list[ir.Value]:
        """Values from outside that the bodies of ``node`` read, in the order of first reading.

        They count as operands of ``node`` after its own inputs, so that the flow of data is seen without entering bodies.
        """
        inside = [inner for _, bodies in graph_attributes(node) for body in bodies for inner in all_nodes(body)]
        if not inside:
            return []
        graphs = {inner.graph for inner in inside}
        read = (value for inner in inside for value in inner.inputs if value is not None and value.graph not in graphs)
        return list(dict.fromkeys(value for value in read if self._is_outside(value, node)))

    def _is_outside(self, value: ir.Value, node: ir.Node) -> bool:
        graph = value.graph
        while graph is not None and graph is not node.graph:
            owner = self.owner(graph)
            if owner is node:
                return False
            graph = owner.graph if owner is not None else None
        return True

    def position(self, node: ir.Node) -> tuple[int, ...]:
        """Labels along the path of bodies to ``node``; compares like the order of execution."""
        assert node.graph is not None
        label = self.order(node.graph).label(node)
        owner = self.owner(node.graph)
        return (label,) if owner is None else (*self.position(owner), label)

    def owner(self, graph: ir.Graph) -> ir.Node | None:
        """The node whose body ``graph`` is; ``None`` for the outermost graph and for functions."""
        return None if graph is self.model.graph else self.owners.get(graph, (None, ""))[0]

    def node_name(self, node: Node) -> str:
        key: ir.Node = node.key
        return f"{self.path_of(key.graph)}{key.name}"

    def node_op(self, node: Node) -> str:
        return op_name(node.key.domain, node.key.op_type)

    def operands(self, node: Node) -> tuple[Value | None, ...]:
        key: ir.Node = node.key
        values: list[ir.Value | None] = [*key.inputs]
        if any(True for _ in graph_attributes(key)):
            values += self.captures(key)
        return tuple(Value(self, value) if value is not None else None for value in values)

    def node_outputs(self, node: Node) -> tuple[Value, ...]:
        return tuple(Value(self, value) for value in node.key.outputs if value.name)

    def attributes(self, node: Node) -> dict[str, Any]:
        return plain_attributes(node.key)

    def origin(self, node: Node) -> Origin:
        return read_origin(node.key)

    def prim(self, node: Node) -> Prim | None:
        from actgraph.graph.onnx_prims import describe

        return describe(self, node)

    def read(self, parameter: Value) -> Array:
        tensor = parameter.key.const_value
        if tensor is None:
            raise KeyError(f"{parameter.name} has no stored data")
        return array_of(tensor)

    def stored(self, parameter: Value) -> tuple[object, int]:
        tensor = parameter.key.const_value
        return (self.read(parameter) if isinstance(tensor, ir.Tensor) else tensor), 0

    # --- changing -------------------------------------------------------------------------------------------------------

    def _insert(
        self,
        op: str,
        operands: Sequence[Value | None],
        attributes: Mapping[str, Any],
        *,
        after: Node | None,
        before: Node | None,
        name: str,
        origin: Origin,
    ) -> Node:
        keys = [value.key if value is not None else None for value in operands]
        place = onnx_edit.Place.find(
            self, keys, after.key if after is not None else None, before.key if before is not None else None
        )
        return Node(self, onnx_edit.insert(self, op, keys, attributes, place, name, origin))

    def _redirect(self, old: Value, new: Value, uses: Iterable[Use]) -> None:
        places = [(use.node.key if use.node is not None else None, use.index) for use in uses]
        onnx_edit.redirect(self, old.key, new.key, places)

    def _set_operand(self, node: Node, index: int, value: Value | None) -> None:
        onnx_edit.set_operand(self, node.key, index, value.key if value is not None else None)

    def _add_parameter(self, name: str, data: Array, *, buffer: bool) -> Value:
        return Value(self, onnx_edit.add_parameter(self, name, data))

    def _set_parameter(self, parameter: Value, data: Array) -> None:
        onnx_edit.set_parameter(self, parameter.key, data)

    def _add_input(self, name: str, type: TensorType, role: Role, default: Array | None) -> Value:
        value = onnx_edit.add_input(self, name, type, default)
        if default is not None:
            self._optional.add(name)
        if role is not Role.USER:
            self._roles[name] = role
        return Value(self, value)

    def _set_input_type(self, value: Value, type: TensorType) -> None:
        set_native_type(value.key, type)

    def _add_output(self, value: Value, name: str, role: Role) -> None:
        onnx_edit.add_output(self, value.key, name)
        self._output_names.append(name)
        if role is not Role.USER:
            self._roles[name] = role

    def _remove_output(self, name: str) -> None:
        index = self._public_names.index(name)
        self.model.graph.outputs.pop(index)
        self._output_names.pop(index)
        self._roles.pop(name, None)

    def _erase_dead(self, only: Collection[str] | None = None) -> list[str]:
        return onnx_edit.erase_dead(self, only)

    def is_pure(self, node: ir.Node) -> bool:
        """Whether ``node`` may be removed when nothing reads it."""
        known = node.domain in PURE_DOMAINS or (node.domain, node.op_type, node.overload) in self.model.functions
        return known and len(node.outputs) > 0

    def _copy_node(self, node: Node, operands: Sequence[Value | None], *, origin: Origin) -> Node:
        keys = [value.key if value is not None else None for value in operands]
        return Node(self, onnx_edit.copy_node(self, node.key, keys, origin))

    def _retype(self, nodes: Iterable[Node], *, propagate: bool = True) -> None:
        onnx_edit.retype(self, [node.key for node in nodes], propagate)

    def clone(self) -> OnnxGraph:
        state = ModelState.of(self.model)
        sites = _copy_sites(self._sites)
        twin = OnnxGraph.__new__(OnnxGraph)
        Graph.__init__(twin, self.name)
        twin._model = None
        twin._pending = (state, sites)
        twin._source = (self.model, state, sites)
        twin._output_names = list(self._output_names)
        twin._roles = dict(self._roles)
        twin._optional = set(self._optional)
        twin._forget()
        twin._take_notes(self)
        return twin

    def _take_notes(self, other: Graph) -> None:
        self.history = list(other.history)
        self.notes = list(other.notes)
        self.folds = list(other.folds)
        self.metadata = dict(other.metadata)
        self.companions = dataclasses.replace(other.companions)

    def _restore(self, snapshot: Graph) -> None:
        """Become ``snapshot`` again. Handles taken before the snapshot stay valid when it is a clone of this graph."""
        assert isinstance(snapshot, OnnxGraph)
        if snapshot._source is not None and snapshot._source[0] is self._model:
            _, state, sites = snapshot._source
            state.reinstate()
            self._sites = _copy_sites(sites)
        else:
            twin = snapshot.clone()
            self._model = twin.model
            self._sites = twin._sites
        self.name = snapshot.name
        self._output_names = list(snapshot._output_names)
        self._roles = dict(snapshot._roles)
        self._optional = set(snapshot._optional)
        self._forget()
        self._take_notes(snapshot)

    def structural_problems(self) -> Iterator[str]:
        return onnx_verify.problems(self)

    # --- names ----------------------------------------------------------------------------------------------------------

    def unique_value_name(self, stem: str) -> str:
        """``stem`` or a numbered variant that no value, in bodies neither, has."""
        _ = self.values_by_name
        return unique(stem, self._taken_values)

    def unique_node_name(self, stem: str) -> str:
        return unique(stem, self.node_names)


def _copy_sites(sites: SiteTable | None) -> SiteTable | None:
    """A table that edits to ``sites`` do not reach; anchors, which are immutable, are shared."""
    if sites is None:
        return None
    twin = copy.copy(sites)
    for field in dataclasses.fields(sites):
        value = getattr(sites, field.name)
        if isinstance(value, dict):
            value = {key: list(item) if isinstance(item, list) else item for key, item in value.items()}
        setattr(twin, field.name, set(value) if isinstance(value, set) else value)
    return twin


def _optional_inputs(model: ir.Model) -> Iterator[str]:
    """Inputs whose initializer is a default, not a weight: small ones, in a file that keeps its weights out of the inputs."""
    graph = model.graph
    if model.ir_version < 4 or all(value.is_graph_input() for value in graph.initializers.values()):
        return
    for value in graph.inputs:
        if value.is_initializer() and value.const_value is not None and value.const_value.size <= 1:
            yield str(value.name)
