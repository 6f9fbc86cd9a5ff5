"""Changing an ONNX graph: where new nodes go, and every primitive edit. Called by ``OnnxGraph`` only."""

from __future__ import annotations

import contextlib
import heapq
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from actgraph.errors import ActgraphError, UnsupportedError
from actgraph.graph.onnx_dims import carries_sizes
from actgraph.graph.onnx_native import array_of, is_state, loosened, native_type, set_native_type, tensor_of
from actgraph.graph.onnx_normalize import all_nodes, write_origin
from actgraph.graph.onnx_state import graph_attributes, set_inputs
from actgraph.graph.onnx_types import TypeConflict, renew
from actgraph.graph.provenance import Origin
from actgraph.ops.registry import DOMAIN
from actgraph.ops.shapes import TensorType

if TYPE_CHECKING:
    from actgraph.graph.onnx import OnnxGraph

Operands = Sequence[ir.Value | None]
#: What a model that imports no standard ops gets with the first of them.
DEFAULT_OPSET = 18


@dataclass
class Place:
    """Where new nodes go: after ``anchor`` in ``container`` (first of all without one), or right before ``before``."""

    graph: OnnxGraph
    container: ir.Graph
    anchor: ir.Node | None
    before: ir.Node | None = None

    @staticmethod
    def find(graph: OnnxGraph, operands: Operands, after: ir.Node | None, before: ir.Node | None) -> Place:
        """The place asked for, moved down as far as the operands need. Raises UnsupportedError where there is none."""
        given = after if after is not None else before
        values = [value for value in operands if value is not None]
        if given is not None:
            assert given.graph is not None
            container: ir.Graph = given.graph
        else:
            container = max((home(graph, v) for v in values), key=lambda g: depth(graph, g), default=graph.model.graph)
        check_editable(graph, container)
        order = graph.order(container)
        anchor = after
        for value in values:
            maker = within(graph, value, container)
            if maker is not None and (anchor is None or order.label(maker) > order.label(anchor)):
                anchor = maker
        if before is not None and anchor is not None and order.label(anchor) >= order.label(before):
            raise UnsupportedError(
                f"cannot insert before {before.name}: an operand is computed after it", "insert after the operand instead"
            )
        return Place(graph, container, anchor, before)

    def put(self, node: ir.Node, origin: Origin) -> ir.Node:
        """Insert ``node`` here; the next one goes after it. Types are inferred, names registered."""
        graph = self.graph
        write_origin(node, origin if origin != Origin() else Origin(created_by="edit"))
        order = graph.order(self.container)
        if self.before is not None:
            order.insert_before(self.before, node)
        else:
            order.insert_after(self.anchor, node)
            self.anchor = node
        graph.node_names.add(str(node.name))
        for value in node.outputs:
            graph.register(value)
        return node


def home(graph: OnnxGraph, value: ir.Value) -> ir.Graph:
    """The graph or body that ``value`` belongs to."""
    owner = value.graph
    if owner is None:
        raise UnsupportedError(f"value {value.name} is not part of {graph.name}", "take the handle from the graph again")
    return owner


def depth(graph: OnnxGraph, container: ir.Graph) -> int:
    owner, levels = graph.owner(container), 0
    while owner is not None:
        levels += 1
        assert owner.graph is not None
        owner = graph.owner(owner.graph)
    return levels


def within(graph: OnnxGraph, value: ir.Value, container: ir.Graph) -> ir.Node | None:
    """The node of ``container`` that computes ``value``; ``None`` when it is there from the start.

    Raises UnsupportedError when ``value`` lives in a body that ``container`` cannot see into.
    """
    origin = home(graph, value)
    inner: ir.Graph = container
    while inner is not origin:
        owner = graph.owner(inner)
        if owner is None:
            raise UnsupportedError(
                f"value {value.name} is inside the body {graph.path_of(origin)} and cannot be read outside of it",
                "edit within the body, or choose a value of the outer graph",
            )
        assert owner.graph is not None
        inner = owner.graph
    return value.producer() if container is origin else None


def check_editable(graph: OnnxGraph, container: ir.Graph) -> None:
    if container is not graph.model.graph and graph.owner(container) is None:
        raise UnsupportedError(
            f"{graph.path_of(container) or 'a model function'} is the body of a function, which all of its calls share",
            "inline the function first (save with inline='all')",
        )


def insert(
    graph: OnnxGraph,
    op: str,
    operands: Operands,
    attributes: Mapping[str, Any],
    place: Place,
    name: str,
    origin: Origin,
) -> ir.Node:
    """Insert ``op`` (a registry op or a name of the shared vocabulary) and return the node that computes its result."""
    from actgraph.graph.onnx_insert import insert_registered, insert_vocabulary

    if op.startswith(f"{DOMAIN}."):
        return insert_registered(place, op, operands, attributes, name, origin)
    return insert_vocabulary(place, op, operands, attributes, name, origin)


def infer_new(graph: OnnxGraph, node: ir.Node) -> None:
    """Types of a node just made. Raises UnsupportedError when its operands do not fit together."""
    try:
        found = graph.inference().infer(node)
    except TypeConflict as error:
        for index in range(len(node.inputs)):
            node.replace_input_with(index, None)
        hint = "check the shapes and dtypes of the operands"
        raise UnsupportedError(f"cannot insert {node.op_type}: {error}", hint) from error
    for value, kind in zip(node.outputs, found, strict=True):
        set_native_type(value, kind)


# --- rewiring ---------------------------------------------------------------------------------------------------------


def redirect(graph: OnnxGraph, old: ir.Value, new: ir.Value, uses: Sequence[tuple[ir.Node | None, int]]) -> None:
    readers = [place for node, index in uses if node is not None for place in inner_readers(node, index, old)]
    for node, _ in readers:
        assert node.graph is not None
        check_editable(graph, node.graph)
        within(graph, new, node.graph)  # raises when the reader cannot see the value
    outputs = [index for node, index in uses if node is None]
    if outputs and home(graph, old) is not home(graph, new):
        raise UnsupportedError(
            f"{new.name} is not in the graph whose output it would become", "edits inside a body need no new outer output"
        )
    for node, index in readers:
        node.replace_input_with(index, new)
    for index in outputs:
        owner = old.graph
        assert isinstance(owner, ir.Graph)
        owner.outputs[index] = new
    restore_order(graph, new, [node for node, _ in readers])
    for node, _ in readers:
        refresh_body(graph, node)


def inner_readers(node: ir.Node, index: int, value: ir.Value) -> list[tuple[ir.Node, int]]:
    """The places that operand ``index`` of ``node`` stands for: itself, or the readers in its bodies."""
    if index < len(node.inputs):
        return [(node, index)]
    inside = {inner for _, bodies in graph_attributes(node) for body in bodies for inner in all_nodes(body)}
    return [(use.node, use.idx) for use in value.uses() if use.node in inside]


def set_operand(graph: OnnxGraph, node: ir.Node, index: int, value: ir.Value | None) -> None:
    assert node.graph is not None
    captured = graph.captures(node)
    if index >= len(node.inputs) and captured:
        if value is None or index >= len(node.inputs) + len(captured):
            raise UnsupportedError(f"the body of {node.name} needs its operand {index}", "give it another value")
        old = captured[index - len(node.inputs)]
        redirect(graph, old, value, [(node, index)])
        return
    check_editable(graph, node.graph)
    if value is not None:
        within(graph, value, node.graph)
    if index >= len(node.inputs):
        node.resize_inputs(index + 1)
    node.replace_input_with(index, value)
    if value is not None:
        restore_order(graph, value, [node])
    refresh_body(graph, node)


def restore_order(graph: OnnxGraph, value: ir.Value, readers: Sequence[ir.Node]) -> None:
    """Sort again when ``value`` is now computed after one of its ``readers``. Raises UnsupportedError on a cycle."""
    maker = value.producer()
    if maker is None or maker.graph is None:
        return
    place = graph.position(maker)
    if all(graph.position(reader)[: len(place)] > place for reader in readers):
        return
    try:
        graph.model.graph.sort()
    except ValueError as error:
        raise UnsupportedError(
            f"{value.name} depends on a node that would read it", "an edit must not make the graph a cycle"
        ) from error
    for container in list(graph._orders.values()):
        container.rebuild()


# --- parameters and signature -----------------------------------------------------------------------------------------


def add_parameter(graph: OnnxGraph, name: str, data: np.ndarray[Any, Any]) -> ir.Value:
    free_signature(graph)
    name = graph.unique_value_name(name)
    tensor = tensor_of(data, name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor)
    graph.model.graph.register_initializer(value)
    graph.register(value)
    return value


def set_parameter(graph: OnnxGraph, value: ir.Value, data: np.ndarray[Any, Any]) -> None:
    if not value.is_initializer():
        raise UnsupportedError(f"{value.name} is not a parameter", "only values with stored data can be replaced")
    old = native_type(value)
    tensor = tensor_of(data, value.name)
    value.const_value = tensor
    value.type = ir.TensorType(tensor.dtype)
    value.shape = ir.Shape(tensor.shape.numpy())
    if native_type(value) != old:
        for node in dict.fromkeys(use.node for use in value.uses()):
            refresh_body(graph, node)


def free_signature(graph: OnnxGraph) -> None:
    """Take weights out of the graph inputs, where IR 3 wants them; hosts must not override what passes compute with."""
    model = graph.model
    listed = [v for v in model.graph.inputs if v.is_initializer() and v.name not in graph.optional]
    for value in listed:
        model.graph.inputs.remove(value)
    model.ir_version = max(model.ir_version, 4)


def add_input(graph: OnnxGraph, name: str, kind: TensorType, default: np.ndarray[Any, Any] | None) -> ir.Value:
    if name in graph.values_by_name or name in {public for public, _ in graph.outputs()}:
        raise UnsupportedError(f"a value named {name!r} exists already", "choose another name for the input")
    free_signature(graph)
    value = ir.Value(name=name)
    set_native_type(value, kind)
    graph.model.graph.inputs.append(value)
    if default is not None:
        value.const_value = tensor_of(default, name)
        if value.shape is not None:
            value.shape = value.shape if is_state(value) else loosened(value.shape, default)
        graph.model.graph.register_initializer(value)
    graph.register(value)
    return value


def add_output(graph: OnnxGraph, value: ir.Value, name: str) -> None:
    if home(graph, value) is not graph.model.graph:
        raise UnsupportedError(
            f"{value.name} is inside a body and cannot be an output of the graph", "choose a value of the outer graph"
        )
    if any(v.name == name for v in graph.model.graph.inputs):
        raise UnsupportedError(f"the graph has an input named {name!r}", "choose another name for the output")
    graph.model.graph.outputs.append(value)


# --- removing and copying ---------------------------------------------------------------------------------------------


def erase_dead(graph: OnnxGraph, only: Collection[str] | None = None) -> list[str]:
    native = graph.model.graph
    dead: list[ir.Node] = []
    for node in reversed(list(native)):
        if only is not None and node.name not in only:
            continue
        if not graph.is_pure(node) or _has_effects(graph, node):
            continue
        if any(value.uses() or value.is_graph_output() for value in node.outputs):
            continue
        _detach(node)
        dead.append(node)
    native.remove(dead)
    removed = [str(node.name) for node in reversed(dead)]
    for name, value in list(native.initializers.items()):
        if only is not None and name not in only:
            continue
        if not value.uses() and not value.is_graph_output() and name not in graph.optional:
            removed.append(name)
            if value.is_graph_input():
                native.inputs.remove(value)
            del native.initializers[name]
    if removed:
        graph._forget()
    return removed


def _has_effects(graph: OnnxGraph, node: ir.Node) -> bool:
    bodies = [body for _, graphs in graph_attributes(node) for body in graphs]
    return any(not graph.is_pure(inner) or _has_effects(graph, inner) for body in bodies for inner in body)


def _detach(node: ir.Node) -> None:
    """Make ``node`` and the nodes of its bodies read nothing."""
    for _, graphs in graph_attributes(node):
        for body in graphs:
            for inner in body:
                _detach(inner)
    set_inputs(node, (None,) * len(node.inputs))


def copy_node(graph: OnnxGraph, node: ir.Node, operands: Operands, origin: Origin) -> ir.Node:
    if any(True for _ in graph_attributes(node)):
        raise UnsupportedError(f"{node.name} has bodies and cannot be copied", "copy a region without If, Loop or Scan")
    place = Place.find(graph, operands, node, None)
    new = ir.Node(
        node.domain, node.op_type, operands, dict(node.attributes), overload=node.overload,
        outputs=[ir.Value(name=graph.unique_value_name(f"{v.name}_copy") if v.name else "") for v in node.outputs],
        name=graph.unique_node_name(f"{node.name}_copy"), version=node.version,
    )  # fmt: skip
    for key, text in node.metadata_props.items():
        if not key.startswith("actgraph."):
            new.metadata_props[key] = text
    for old, copied in zip(node.outputs, new.outputs, strict=True):
        set_native_type(copied, native_type(old))
    place.put(new, origin)
    pairs = [(a, b) for a, b in zip(node.inputs, operands, strict=False) if a is not None and b is not None]
    if any(native_type(old) != native_type(given) for old, given in pairs):
        retype(graph, [new])
    refresh_body(graph, new)
    return new


# --- types ------------------------------------------------------------------------------------------------------------


def retype(graph: OnnxGraph, nodes: Sequence[ir.Node], propagate: bool = True) -> None:
    """Infer again for ``nodes`` and (with ``propagate``) whatever reads an output that changed, in topological order."""
    inference = graph.inference()
    queue = [(graph.position(node), id(node), node) for node in nodes]
    heapq.heapify(queue)
    seen = {id(node) for node in nodes}
    while queue:
        _, _, node = heapq.heappop(queue)
        try:
            changed = renew(inference, node)
        except TypeConflict as error:
            raise UnsupportedError(
                f"after the edit {node.name} does not fit its operands: {error}", "change all readers of an edited shape"
            ) from error
        refresh_body(graph, node)
        if changed:
            inference.shapes.forget()
        elif not carries_sizes(node):  # a shape computation changes in content while its own type stays
            continue
        if not propagate:
            continue
        for value in node.outputs:
            for use in value.uses():
                if use.node.graph is not None and id(use.node) not in seen:
                    seen.add(id(use.node))
                    heapq.heappush(queue, (graph.position(use.node), id(use.node), use.node))


def refresh_body(graph: OnnxGraph, node: ir.Node) -> None:
    """Give an actgraph node the function body that fits its operands now.

    Between two edits operands may not fit each other (a vector is cut before the activation it is added to). Then the body
    stays; inferring the types of the node, which comes after the last of such edits, looks again.
    """
    if node.domain == DOMAIN and node.graph is not None:
        from actgraph.graph.onnx_insert import attach_body

        with contextlib.suppress(ActgraphError):
            attach_body(graph, node)


def constant_array(value: ir.Value | None) -> np.ndarray[Any, Any] | None:
    """The stored data of ``value`` if it is a parameter."""
    if value is None or value.const_value is None or not value.is_initializer():
        return None
    return array_of(value.const_value)
