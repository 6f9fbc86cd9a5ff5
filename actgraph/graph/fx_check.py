"""What must hold of an FX graph beside what holds of every graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import fx

from actgraph.graph import fx_build
from actgraph.graph.provenance import KEY

if TYPE_CHECKING:
    from actgraph.graph.fx import FxGraph


def problems(graph: FxGraph) -> Iterator[str]:
    """Broken invariants, one line each: SSA and order, functional calls, types and provenance present, tensors stored."""
    try:
        graph.graph.lint()
    except (RuntimeError, AssertionError) as error:
        yield f"the native graph is broken: {str(error).splitlines()[0]}"
        return
    if len(graph.output_names) != len(graph._output_nodes()):
        yield f"{len(graph._output_nodes())} outputs have {len(graph.output_names)} names"
    for node in graph.graph.nodes:
        if node.op == "output":
            continue
        if node.op == "get_attr":
            yield from _parameter_problems(graph, node)
        elif node.op in ("call_module", "call_method"):
            yield f"{node.name} calls {node.op.removeprefix('call_')} {node.target}, which is no op"
        elif node.op == "call_function":
            yield from _call_problems(node)
        if "val" not in node.meta and node.op != "get_attr":
            yield f"{node.name} has no type"


def _parameter_problems(graph: FxGraph, node: fx.Node) -> Iterator[str]:
    try:
        found = fx_build.lookup(graph.root, str(node.target))
    except AttributeError:
        yield f"parameter {node.target} has no stored data"
        return
    if not isinstance(found, torch.Tensor):
        return
    value = node.meta.get("val")
    if value is None:
        yield f"parameter {node.target} has no type"
    elif tuple(value.shape) != tuple(found.shape) or value.dtype != found.dtype:
        yield f"parameter {node.target} is {found.dtype}{list(found.shape)} but typed {value.dtype}{list(value.shape)}"


def _call_problems(node: fx.Node) -> Iterator[str]:
    schema = getattr(node.target, "_schema", None)
    if schema is not None and schema.is_mutable:
        yield f"{node.name} writes into its operands ({node.target}): the graph must be functional"
    if fx_build.is_item(node):
        return
    if KEY not in (node.meta.get("custom") or {}):
        yield f"{node.name} has no origin"
