"""What only the ONNX dialect can see broken: names, scopes, opset imports, function bodies."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import onnx_ir as ir

from actgraph.errors import ActgraphError
from actgraph.graph.onnx_insert import body_of
from actgraph.graph.onnx_native import plain_attributes, registered
from actgraph.graph.onnx_normalize import all_nodes
from actgraph.graph.onnx_state import graph_attributes
from actgraph.ops.registry import DOMAIN

if TYPE_CHECKING:
    from actgraph.graph.onnx import OnnxGraph


def problems(graph: OnnxGraph) -> Iterator[str]:
    """Broken invariants of the native model, one line each."""
    model = graph.model
    yield from _scopes(graph, model.graph, set(), "")
    yield from _outputs(graph)
    yield from _names(graph)
    for node in all_nodes(model.graph):
        yield from _node(graph, node)
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            yield f"initializer {name} has no data"
        elif value.shape is not None and not _fits(value, name in graph.optional):
            yield f"initializer {name} holds {tuple(value.const_value.shape)} but declares {value.shape}"
    yield from _order(graph)


def _fits(value: ir.Value, optional: bool) -> bool:
    """Whether stored data has the declared shape. The default of an optional input may have size 1 where a name stands."""
    assert value.shape is not None and value.const_value is not None
    declared, stored = tuple(value.shape), tuple(value.const_value.shape)
    if declared == stored:
        return True
    free = [optional and size == 1 and not isinstance(dim, int) for dim, size in zip(declared, stored, strict=False)]
    return len(declared) == len(stored) and all(d == s or f for d, s, f in zip(declared, stored, free, strict=True))


def _scopes(graph: OnnxGraph, native: ir.Graph, outside: set[ir.Value], path: str) -> Iterator[str]:
    """SSA and order: every operand is defined before it is read, in this graph or one around it."""
    known = outside | set(native.inputs) | set(native.initializers.values())
    for node in native:
        for value in node.inputs:
            if value is not None and value not in known:
                yield f"{path}{node.name} reads %{value.name}, which is not defined before it"
        for name, bodies in graph_attributes(node):
            for body in bodies:
                yield from _scopes(graph, body, known, f"{path}{node.name}/{name}/")
        for value in node.outputs:
            if value.producer() is not node:
                yield f"{path}{node.name} does not own its output %{value.name}"
            known.add(value)
    for value in native.outputs:
        if value not in known:
            yield f"output %{value.name} of {path or graph.name} is not defined"


def _outputs(graph: OnnxGraph) -> Iterator[str]:
    names = [name for name, _ in graph.outputs()]
    if len(names) != len(graph.model.graph.outputs):
        yield f"{len(graph.model.graph.outputs)} outputs have {len(names)} names"
    inputs = {value.name for value in graph.model.graph.inputs}
    yield from (f"{name!r} is both an input and an output" for name in names if name in inputs)


def _names(graph: OnnxGraph) -> Iterator[str]:
    """Value names are unique across the graph and may not be shadowed in bodies."""
    outer: set[str] = set()
    listed = [*graph.model.graph.inputs, *graph.model.graph.initializers.values()]
    values = [*dict.fromkeys(listed), *(value for node in graph.model.graph for value in node.outputs if value.name)]
    for value in values:
        if str(value.name) in outer:
            yield f"two values are called %{value.name}"
        outer.add(str(value.name))
    for name, value in graph.model.graph.initializers.items():
        if value.name != name:
            yield f"initializer {name} is called %{value.name}"
    nodes: set[str] = set()
    for node in all_nodes(graph.model.graph):
        if not node.name:
            yield f"a {node.op_type} node has no name"
        elif node.name in nodes:
            yield f"two nodes are called {node.name}"
        nodes.add(str(node.name))
        if node.graph is not graph.model.graph:
            yield from (f"%{v.name} in a body hides a value outside" for v in node.outputs if v.name and v.name in outer)


def _node(graph: OnnxGraph, node: ir.Node) -> Iterator[str]:
    if not (node.metadata_props.get("actgraph.sources") or node.metadata_props.get("actgraph.pass")):
        yield f"{node.name} has no provenance"
    if node.domain not in graph.model.opset_imports:
        yield f"{node.name} needs an opset import of domain {node.domain!r}"
    if node.domain != DOMAIN:
        return
    definition = registered(node.op_type)
    if definition is None:
        yield f"{node.name}: there is no op {DOMAIN}.{node.op_type}"
        return
    try:
        definition.complete(plain_attributes(node))
    except ActgraphError as error:
        yield f"{node.name}: {error.message}"
    if (node.domain, node.op_type, node.overload) not in graph.model.functions:
        yield f"{node.name}: the model has no body for {node.op_type} {node.overload!r}".rstrip()
    elif not _has_fitting_body(graph, node):
        yield f"{node.name}: its function body was made for other operands or attributes"
    elif node.overload and graph.model.ir_version < 10:
        yield f"{node.name}: overloads need IR version 10, the model has {graph.model.ir_version}"


def _has_fitting_body(graph: OnnxGraph, node: ir.Node) -> bool:
    try:
        body = body_of(graph, node)
    except ActgraphError:
        return True  # the operands themselves do not fit, which the shared verifier says
    return body is None or body.overload == node.overload


def _order(graph: OnnxGraph) -> Iterator[str]:
    if list(graph.order().nodes) != list(graph.model.graph):
        yield "the recorded order of nodes is not that of the native graph"
