"""Fixing a named dimension of a graph: the same graph for one token, for one row, for images of one size.

What the general graph computes with a size that is fixed now (sizes read off tensors, sums of them) becomes a constant
and goes. Sites, roles, slots, provenance and history stay. Native by design: torch propagates types through fake execution,
ONNX declares them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from actgraph.errors import InputError
from actgraph.graph.anchors import SiteKind
from actgraph.graph.graph import Graph
from actgraph.ops.shapes import Dim, TensorType, canonical_dim

if TYPE_CHECKING:
    from actgraph.graph.fx import FxGraph
    from actgraph.graph.onnx import OnnxGraph

_NAME = re.compile(r"[A-Za-z_]\w*")


def specialise(graph: Graph, dims: Mapping[str, int]) -> Graph:
    """A copy of ``graph`` whose dimensions ``dims`` (``{"seq": 1}``) have these sizes; weights are shared.

    Sizes made of them follow: ``past + seq`` becomes ``past + 1``. Raises InputError for a dimension that no input has, and for
    a size that the graph does not take.
    """
    known = dimensions(graph)
    for name, size in dims.items():
        if name not in known:
            listed = f"its dimensions are {', '.join(known)}" if known else "all its sizes are fixed"
            raise InputError(f"no input of {graph.name} has the dimension {name!r}", listed)
        _check_size(graph, name, size)
    twin = graph.clone()
    if not dims:
        return twin
    table = twin.site_table  # names are assigned on the general graph
    if twin.dialect == "fx":
        _specialise_fx(twin, dims)  # type: ignore[arg-type]
    else:
        _specialise_onnx(twin, dims)  # type: ignore[arg-type]
    for name, anchor in table.anchors.items():
        if anchor.kind is SiteKind.VIRTUAL:
            table.anchors[name] = replace(anchor, type=fixed_type(anchor.type, dims))
    _drop_samples(twin)
    with twin.edit() as editor:
        editor.erase_dead()
    return twin


def dimensions(graph: Graph) -> list[str]:
    """The names of the dimensions of the inputs, in order; those inside of expressions as well."""
    texts = [size for value in graph.inputs() for size in value.shape or () if isinstance(size, str)]
    return list(dict.fromkeys(name for text in texts for name in _NAME.findall(text)))


def fixed_size(size: Dim, dims: Mapping[str, int]) -> Dim:
    """``size`` with the dimensions of ``dims`` replaced. Raises InputError where that leaves no whole number."""
    if not isinstance(size, str) or not any(name in dims for name in _NAME.findall(size)):
        return size
    text = _NAME.sub(lambda found: str(dims[found[0]]) if found[0] in dims else found[0], size)
    result = canonical_dim(text)
    if isinstance(result, str) and not _NAME.search(result):
        given = ", ".join(f"{name} = {value}" for name, value in dims.items())
        raise InputError(f"the size {size} is {result} for {given}", "choose a size that it divides")
    return result


def fixed_type(kind: TensorType, dims: Mapping[str, int]) -> TensorType:
    """``kind`` with the dimensions of ``dims`` replaced."""
    return kind if kind.shape is None else TensorType(kind.dtype, tuple(fixed_size(size, dims) for size in kind.shape))


def _check_size(graph: Graph, name: str, size: int) -> None:
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise InputError(f"the size of {name} is {size!r}", "give a whole number above 0")
    low, high = getattr(graph, "dim_ranges", {}).get(name, (None, None))
    # 2 is torch's least symbolic size and no limit of the model
    if (high is not None and size > high) or (low is not None and low > 2 and size < low):
        raise InputError(f"{graph.name} takes {name} from {low} to {high}, not {size}", "choose a size in that range")


def _drop_samples(graph: Graph) -> None:
    """Forget the sample inputs that no longer fit."""
    shapes = {value.name: value.shape for value in graph.inputs()}
    samples = graph.companions.sample_inputs
    for name, array in list(samples.items()):
        shape = shapes.get(name) or ()
        if any(isinstance(size, int) and size != given for size, given in zip(shape, np.shape(array), strict=False)):
            del samples[name]


# --- torch ------------------------------------------------------------------------------------------------------------------


def _specialise_fx(graph: FxGraph, dims: Mapping[str, int]) -> None:
    """Change the inputs first, then let everything that depends on them be executed with fake tensors again."""
    from actgraph.graph import fx_edit

    for text in graph.dims.names.values():  # seq/2 where the model splits the sequence in two
        fixed_size(text, dims)
    changed = []
    for value in graph.inputs():
        kind = fixed_type(value.type, dims)
        if kind != value.type:
            graph._set_input_type(value, kind)
            changed.append(value.key)
    fx_edit.retype(graph, [user for key in changed for user in key.users], propagate=True)
    _inline_sizes(graph)
    for symbol, text in list(graph.dims.names.items()):
        if set(_NAME.findall(text)) & set(dims):
            del graph.dims.names[symbol]
    for name in dims:
        graph.dim_ranges.pop(name, None)
    graph._index()


def _inline_sizes(graph: FxGraph) -> None:
    """Write sizes that are numbers now into their readers; the nodes that computed them are dead then."""
    from torch import fx

    sizes: dict[Any, int | float | bool] = {
        node: node.meta["val"]
        for node in graph.graph.nodes
        if node.op == "call_function" and type(node.meta.get("val")) in (int, float, bool)
    }
    outputs = set(graph._output_nodes())
    for node in {user: None for size in sizes for user in size.users if user.op == "call_function"}:
        node.args = fx.node.map_arg(node.args, lambda item: sizes.get(item, item))
        node.kwargs = fx.node.map_arg(node.kwargs, lambda item: sizes.get(item, item))
        graph._changed(node)
    for node in reversed(list(sizes)):
        if not node.users and node not in outputs:
            graph.graph.erase_node(node)


# --- ONNX -------------------------------------------------------------------------------------------------------------------


def _specialise_onnx(graph: OnnxGraph, dims: Mapping[str, int]) -> None:
    """Declared types follow by name; what depends on them is inferred again; known sizes become constants."""
    from actgraph.graph.onnx_edit import refresh_body
    from actgraph.graph.onnx_native import native_type, set_native_type
    from actgraph.graph.onnx_normalize import all_nodes
    from actgraph.graph.onnx_types import TypeConflict, renew

    native = graph.model.graph
    nodes = list(all_nodes(native))
    for value in [*native.inputs, *(output for node in nodes for output in node.outputs)]:
        kind = native_type(value)
        if (fixed := fixed_type(kind, dims)) != kind:
            set_native_type(value, fixed)
    inference = graph.inference()
    for node in native:
        try:
            if renew(inference, node):
                inference.shapes.forget()
        except TypeConflict:
            pass  # nodes that no rule understands keep what the file declared
    for node in nodes:
        refresh_body(graph, node)
    ranges = {name: limits for name, limits in graph.dim_ranges.items() if name not in dims}
    if "dim_ranges" in graph.metadata:
        import json

        graph.metadata["dim_ranges"] = json.dumps(ranges, sort_keys=True)
    graph._forget()
    _fold_sizes(graph)


def _fold_sizes(graph: OnnxGraph) -> None:
    """Replace what computes nothing but known sizes by its result, where something else reads it."""
    from actgraph.graph.onnx_dims import carries_sizes

    shapes = graph.inference().shapes
    known: dict[Any, tuple[int, ...]] = {}
    for node in graph.nodes():
        value = node.outputs[0] if node.outputs else None
        if value is not None and value.shape is not None and carries_sizes(node.key):
            found = shapes.ints(value.key)
            if found is not None and len(found) == int(np.prod([size for size in value.shape if isinstance(size, int)])):
                known[value] = found
    with graph.edit() as editor:
        for value, content in known.items():
            uses = [use for use in value.uses if use.node is None or not all(output in known for output in use.node.outputs)]
            if not uses or value.dtype is None or value.shape is None:
                continue
            array = np.asarray(content, value.dtype.numpy).reshape([int(size) for size in value.shape if size is not None])
            constant = editor.add_parameter(f"{value.name}_fixed", array, buffer=True)
            editor.redirect(value, constant, [use for use in uses if use.node is not None])
