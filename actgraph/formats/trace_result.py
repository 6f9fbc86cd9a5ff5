"""From an exported program to an ``FxGraph``: names of inputs, outputs and dimensions, and state that the model writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils import _pytree as pytree

from actgraph.errors import CaptureError
from actgraph.formats.trace_dims import Plan
from actgraph.graph import fx_build
from actgraph.graph.fx import FxGraph
from actgraph.graph.fx_types import DimNames, array_of
from actgraph.graph.graph import Role


def graph_of_program(program: torch.export.ExportedProgram, name: str, plan: Plan | None) -> FxGraph:
    """The graph of a functional ``ExportedProgram``, dimension names from ``plan`` (``d0``, ``d1`` ... without one)."""
    gm: Any = program.module(check_guards=False)
    root = fx_build.import_tensors(gm)
    native = fx_build.copy_graph(gm.graph)
    _drop_constant_inputs(native)
    writes = _take_writes(native)
    names = _output_names(native, program.call_spec.out_spec)
    dims = _dimension_names(native, program, plan)
    graph = FxGraph(native, root, name, output_names=names, dim_names=dims)
    for buffer, node in writes:
        _add_slot(graph, buffer, node)
    graph.dim_ranges = _ranges(program, dims)
    return graph


def _drop_constant_inputs(native: fx.Graph) -> None:
    """Arguments that are no tensors (flags, ``None``) were baked in; their placeholders say nothing."""
    for node in list(native.nodes):
        if node.op == "placeholder" and not node.users:
            value = node.meta.get("val")
            if not isinstance(value, (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)):
                native.erase_node(node)


def _take_writes(native: fx.Graph) -> list[tuple[str, fx.Node]]:
    """Remove the writes to buffers at the end of the program; returns each buffer with the value written."""
    writes: list[tuple[str, fx.Node]] = []
    for node in reversed(native.nodes):
        if node.op != "call_function" or node.target is not torch.ops.aten.copy_.default:
            continue
        target, value = node.args[0], node.args[1]
        assert isinstance(target, fx.Node) and isinstance(value, fx.Node)
        if target.op != "get_attr":
            raise CaptureError(f"the model writes into its argument {target.name!r}", "return the new value instead")
        node.replace_all_uses_with(value)
        native.erase_node(node)
        writes.append((str(target.target), value))
    return writes[::-1]


def _add_slot(graph: FxGraph, buffer: str, written: fx.Node) -> None:
    """A buffer that the model writes becomes a slot: read from an input, written to an output.

    One that no call reads before it is written (a scratch place, such as rotary frequencies chosen anew by each call) is none.
    """
    parameter = next((value for value in graph.parameters() if value.name == buffer), None)
    if parameter is None:
        return
    name = f"state_in.{buffer}"
    value = graph._add_input(name, parameter.type, Role.SLOT, array_of(graph.tensor(parameter)).copy())
    graph._redirect(parameter, value, parameter.uses)
    graph._add_output(graph._value(written), f"state_out.{buffer}", Role.SLOT)
    graph._erase_dead()


def _output_names(native: fx.Graph, out_spec: Any) -> list[str]:
    """Names after the fields of the model's output; results that are ``None`` or constants are dropped."""
    output = native.output_node()
    flat = pytree.tree_leaves(output.args[0], is_leaf=lambda item: isinstance(item, fx.Node) or item is None)
    labels = list(_labels(pytree.tree_unflatten(list(range(out_spec.num_leaves)), out_spec), ""))
    if len(labels) != len(flat):
        labels = [""] * len(flat)
    kept = [(label, item) for label, item in zip(labels, flat, strict=True) if isinstance(item, fx.Node)]
    output.args = (tuple(item for _, item in kept),)
    names: list[str] = []
    for index, (label, _) in enumerate(kept):
        plain = f"output_{index}" if index else "output"
        name = label if label and not label.isdigit() else plain
        while name in names:
            name = f"{name}_{index}"
        names.append(name)
    return names


def _labels(structure: Any, prefix: str) -> Iterator[str]:
    """One label per leaf, in flattening order: the path of field names and indices, joined by ``_``."""
    items: list[tuple[str, Any]] | None = None
    if isinstance(structure, Mapping):
        items = [(str(key), value) for key, value in structure.items()]
    elif isinstance(structure, tuple) and hasattr(structure, "_fields"):
        items = list(zip(structure._fields, structure, strict=True))
    elif isinstance(structure, (list, tuple)):
        items = [(str(index) if prefix else "", value) for index, value in enumerate(structure)]
    elif dataclasses.is_dataclass(structure) and not isinstance(structure, type):
        items = [(f.name, getattr(structure, f.name)) for f in dataclasses.fields(structure)]
    if items is None:
        yield prefix
        return
    for key, value in items:
        yield from _labels(value, f"{prefix}_{key}" if prefix and key else prefix or key)


def _dimension_names(native: fx.Graph, program: torch.export.ExportedProgram, plan: Plan | None) -> DimNames:
    dims = DimNames()
    placeholders = [n for n in native.nodes if n.op == "placeholder" and isinstance(n.meta.get("val"), torch.Tensor)]
    if plan is not None:
        for node, leaf in zip(placeholders, plan.leaves, strict=True):
            for size, name in zip(node.meta["val"].shape, leaf.dims, strict=True):
                if name is None or not isinstance(size, torch.SymInt):
                    continue
                expression = size.node.expr
                if expression.is_Symbol:
                    dims.names.setdefault(expression, name)
                elif len(expression.free_symbols) == 1:
                    symbol = next(iter(expression.free_symbols))
                    dims.names.setdefault(symbol, _inverse(expression, symbol, name))
    for node in placeholders:
        for size in node.meta["val"].shape:
            if isinstance(size, torch.SymInt):
                for symbol in sorted(size.node.expr.free_symbols, key=str):
                    if symbol not in dims.names:
                        dims.names[symbol] = f"d{len(dims.names)}"
    return dims


def _inverse(expression: sympy.Expr, symbol: sympy.Symbol, name: str) -> str:
    """What to call ``symbol`` where ``expression`` of it is the size called ``name``: ``4*s`` makes it ``name/4``."""
    solutions = sympy.solve(sympy.Eq(expression, sympy.Symbol(name, integer=True, positive=True)), symbol)
    return str(solutions[0]) if len(solutions) == 1 else f"_{name}"


def _ranges(program: torch.export.ExportedProgram, dims: DimNames) -> dict[str, tuple[int | None, int | None]]:
    ranges: dict[str, tuple[int | None, int | None]] = {}
    for symbol, bounds in program.range_constraints.items():
        name = dims.names.get(symbol)
        low = int(bounds.lower) if isinstance(bounds.lower, (int, sympy.Integer)) and bounds.lower > 1 else None
        high = int(bounds.upper) if isinstance(bounds.upper, (int, sympy.Integer)) else None
        if name is not None and (low is not None or high is not None):
            ranges[name] = (low, high)
    return ranges
