"""What sets a graph in memory apart from its file: public output names, functions to inline, and metadata.

Saving works on a clone. In a file the name of an output is the name of its value; in memory they are two things, so that
an edit at ``logits`` neither renames the value that was there nor the output. What saving renames is recorded, and loading
takes it back.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import onnx_ir as ir

from actgraph.errors import UnsupportedError
from actgraph.graph.context import KINDS
from actgraph.graph.folds import FoldRecord
from actgraph.graph.graph import Graph, Role
from actgraph.graph.onnx import OnnxGraph
from actgraph.graph.onnx_insert import operand_types
from actgraph.graph.onnx_native import native_type, plain_attributes, registered
from actgraph.graph.onnx_normalize import lift_constants, read_origin, unique, write_origin
from actgraph.graph.onnx_types import complete
from actgraph.graph.provenance import KEY, PassRecord, RecordedNote
from actgraph.graph.sites import SiteTable
from actgraph.ops.body import expand
from actgraph.ops.registry import DOMAIN, get_op

_OUTPUT = f"{KEY}.output"


def finish(graph: OnnxGraph) -> dict[str, str]:
    """Make the native model of a clone what the file shall hold; returns what was renamed."""
    drop_unused_functions(graph)
    renamed = name_outputs(graph)
    graph.model.graph.name = graph.name
    return renamed


# --- output names -----------------------------------------------------------------------------------------------------


def name_outputs(graph: OnnxGraph) -> dict[str, str]:
    """Give the values of graph outputs their public names. Returns file name -> name in the graph of every renamed value.

    An input, a parameter, or a value that is output twice gets an Identity node, which loading removes again.
    """
    native = graph.model.graph
    values = list(graph.values_by_name.values())  # before Identity nodes double names
    wanted: dict[ir.Value, str] = {}
    for index, (name, value) in enumerate(zip([n for n, _ in graph.outputs()], list(native.outputs), strict=True)):
        if value.producer() is None or value in wanted:
            node = ir.Node(
                "", "Identity", [value], outputs=[ir.Value(name=name, type=value.type, shape=value.shape)],
                name=graph.unique_node_name(f"output.{name}"), metadata_props={_OUTPUT: name},
            )  # fmt: skip
            native.append(node)
            native.outputs[index] = node.outputs[0]
            wanted[node.outputs[0]] = name
        else:
            wanted[value] = name
    return _rename(values, wanted)


def _rename(values: Sequence[ir.Value], wanted: Mapping[ir.Value, str]) -> dict[str, str]:
    taken = {str(value.name) for value in values} | set(wanted.values())
    public = set(wanted.values())
    renamed: dict[str, str] = {}
    for value in values:
        if value.name in public and value not in wanted:
            before = str(value.name)
            value.name = unique(f"{before}.inner", taken)
            taken.add(str(value.name))
            renamed[str(value.name)] = before
    changed = [(value, str(value.name), name) for value, name in wanted.items() if value.name != name]
    for value, before, _ in changed:
        value.name = unique(f"{before}.renamed", taken)
    for value, before, name in changed:
        value.name = name
        renamed[name] = before
    return renamed


def take_back_names(model: ir.Model, renamed: Mapping[str, str]) -> list[str]:
    """Undo ``name_outputs`` on a loaded model; returns the public names of the outputs."""
    native = model.graph
    names = [str(value.name) for value in native.outputs]
    for index, value in enumerate(list(native.outputs)):
        node = value.producer()
        if node is not None and node.op_type == "Identity" and _OUTPUT in node.metadata_props and node.inputs[0] is not None:
            native.outputs[index] = node.inputs[0]
            if not value.uses():
                node.replace_input_with(0, None)
                native.remove(node)
    values = {str(v.name): v for v in (*native.inputs, *native.initializers.values())}
    values.update({str(v.name): v for node in native for v in node.outputs})
    found = [(values[new], old) for new, old in renamed.items() if new in values]
    free = set(values) - {str(value.name) for value, _ in found}
    found = [(value, old) for value, old in found if old not in free]
    for number, (value, _) in enumerate(found):
        value.name = f"\0{number}"
    for value, old in found:
        value.name = old
    return names


# --- inlining ---------------------------------------------------------------------------------------------------------


def inline_ops(graph: OnnxGraph, names: Collection[str] | None) -> int:
    """Replace actgraph nodes by their bodies: those of the ops ``names``, or all. Returns how many.

    Output values keep their names (so sites survive), nodes get the provenance of the call.
    """
    chosen = None if names is None else {get_op(name).onnx_name for name in names}
    return inline_calls(graph, lambda node: chosen is None or node.op_type in chosen)


def inline_calls(graph: OnnxGraph, chosen: Callable[[ir.Node], bool]) -> int:
    """Replace the actgraph nodes that are ``chosen`` by their bodies. Returns how many. See ``inline_ops``."""
    calls = [node for node in graph.model.graph.all_nodes() if node.domain == DOMAIN and chosen(node)]
    for node in calls:
        _inline(graph, node)
    if calls:
        graph._forget()
        lift_constants(graph.model.graph)
        complete(graph.inference(), graph.model.graph)
        graph._forget()
    return len(calls)


def _inline(graph: OnnxGraph, call: ir.Node) -> None:
    definition = registered(call.op_type)
    if definition is None:
        raise UnsupportedError(f"{call.name} is of an unknown op {call.op_type} and cannot be inlined", "keep its function")
    container = call.graph
    assert isinstance(container, ir.Graph)
    prefix = f"{call.name}/"
    nodes, results = expand(
        definition, plain_attributes(call), list(call.inputs), operand_types(definition, call), graph.opset, prefix=prefix
    )
    origin = replace(read_origin(call), inlined=definition.qualified_name)
    for node in nodes:
        write_origin(node, origin)
        node.name = graph.unique_node_name(str(node.name))
        graph.node_names.add(str(node.name))
        for value in node.outputs:
            value.name = graph.unique_value_name(str(value.name))
            graph.values_by_name[str(value.name)] = value
    container.insert_after(call, nodes)
    for old, new in zip(call.outputs, results, strict=True):
        new.type, new.shape = old.type, old.shape
        name = str(old.name)
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        old.name = f"{name}.call"
        new.name = name
        graph.values_by_name[name] = new
    for index in range(len(call.inputs)):
        call.replace_input_with(index, None)
    container.remove(call)


def drop_unused_functions(graph: OnnxGraph) -> None:
    """Drop actgraph bodies that no node calls, and the import of the domain with the last of them."""
    used = {(node.domain, node.op_type, node.overload) for node in graph.model.graph.all_nodes()}
    for function in graph.model.functions.values():
        used.update((node.domain, node.op_type, node.overload) for node in function.all_nodes())
    for key in [key for key in graph.model.functions if key[0] == DOMAIN and key not in used]:
        del graph.model.functions[key]
    for key, function in graph.model.functions.items():
        for value in function.inputs if key[0] == DOMAIN else ():
            value.type = None  # onnx_ir writes types of function inputs and does not read them
    if not any(domain == DOMAIN for domain, _, _ in used):
        graph.model.opset_imports.pop(DOMAIN, None)


# --- metadata ---------------------------------------------------------------------------------------------------------


def write_metadata(graph: OnnxGraph, source: Graph, renamed: Mapping[str, str], companions: Mapping[str, Any]) -> None:
    """Record in the model what ONNX has no place for, and in its context inputs what they are and what holds without them.
    ``source`` is the graph that is saved, ``graph`` the clone.
    """
    from actgraph import __version__

    for value in graph.model.graph.inputs:
        name = str(value.name)
        if graph.roles.get(name) is Role.CONTEXT and name in KINDS and not value.doc_string:
            value.doc_string = KINDS[name].doc

    data: dict[str, Any] = {
        "history": [record.to_dict() for record in source.history],
        "notes": source.notes,
        "folds": [record.to_dict() for record in source.folds],
        "metadata": source.metadata,
        "roles": {name: role.value for name, role in graph.roles.items()},
        "optional": sorted(graph.optional),
        "renamed": dict(renamed),
        "sites": source.site_table.to_dict() if source._sites is not None else None,
        "companions": dict(companions),
    }
    props = graph.model.metadata_props
    for key in [key for key in props if key.startswith(f"{KEY}.")]:
        del props[key]
    props[f"{KEY}.version"] = __version__
    props[f"{KEY}.untyped"] = str(count_untyped(graph.model))
    for key, value in data.items():
        if value:
            props[f"{KEY}.{key}"] = json.dumps(value, sort_keys=key != "sites", separators=(",", ":"))


def read_metadata(model: ir.Model) -> dict[str, Any]:
    """What ``write_metadata`` recorded, taken out of the model; empty for files of other tools."""
    props = model.metadata_props
    found: dict[str, Any] = {}
    for key in [key for key in props if key.startswith(f"{KEY}.")]:
        text = props.pop(key)
        try:
            found[key.removeprefix(f"{KEY}.")] = json.loads(text) if not key.endswith(".version") else text
        except ValueError:
            continue  # written by another tool under our name: not ours to read
    return found


def restore(graph: OnnxGraph, found: Mapping[str, Any]) -> None:
    """Give a loaded graph its history, notes, metadata and sites back."""
    graph.history = [PassRecord.from_dict(record) for record in found.get("history", [])]
    graph.notes = [RecordedNote(note) for note in found.get("notes", [])]
    graph.metadata = dict(found.get("metadata", {}))
    graph.folds = [FoldRecord.from_dict(record) for record in found.get("folds", [])]
    if found.get("sites"):
        graph._sites = SiteTable.from_dict(graph, found["sites"])


def stored_roles(found: Mapping[str, Any]) -> dict[str, Role]:
    return {name: Role(role) for name, role in found.get("roles", {}).items()}


def count_untyped(model: ir.Model) -> int:
    """How many values do not declare their whole type. Equal before and after a file: then nothing is left to infer."""
    kinds = (native_type(value) for node in model.graph.all_nodes() for value in node.outputs if value.name)
    return sum(kind.dtype is None or kind.shape is None or None in kind.shape for kind in kinds)
