"""The plain torch engine: runs an FX graph eagerly, numpy arrays in and out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from actgraph.errors import InputError
from actgraph.graph.executor import Runner
from actgraph.graph.fx import FxGraph
from actgraph.graph.fx_build import copy_graph
from actgraph.graph.fx_types import array_of, tensor_of
from actgraph.graph.graph import Graph, Value

Array = np.ndarray[Any, Any]


class TorchExecutor:
    """Opens FX graphs (see ``actgraph.graph.executor.Executor``)."""

    def open(self, graph: Graph, values: Sequence[Value] = ()) -> Runner:
        """A runner over the graph as it is now; later edits do not change it. ``values`` cost no second forward."""
        if not isinstance(graph, FxGraph):
            raise InputError(f"the torch engine runs FX graphs, {graph.name} is a graph of dialect {graph.dialect}")
        return _TorchRunner(graph, values)


class _TorchRunner:
    def __init__(self, graph: FxGraph, values: Sequence[Value]) -> None:
        self.name = graph.name
        self.types = {value.name: value.type for value in graph.inputs()}
        self.defaults = dict(graph.defaults)
        self.ranges = dict(graph.dim_ranges)
        self.names = [*graph.output_names, *(value.name for value in values)]
        if len(set(self.names)) != len(self.names):
            twice = next(name for name in self.names if self.names.count(name) > 1)
            raise InputError(f"two results would be called {twice!r}", "read the output instead of the value of that name")
        native = copy_graph(graph.graph)
        if values:
            by_name = {node.name: node for node in native.nodes}
            output = native.output_node()
            output.args = ((*output.args[0], *(by_name[value.key.name] for value in values)),)  # type: ignore[misc]
        self.module = fx.GraphModule(graph.root, native)

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        arrays = check_inputs(self.name, self.types, self.defaults, self.ranges, inputs)
        with torch.no_grad():
            results = self.module(*(tensor_of(array) for array in arrays.values()))
        return {name: _array(result) for name, result in zip(self.names, results, strict=True)}


def check_inputs(
    name: str,
    types: Mapping[str, Any],
    defaults: Mapping[str, Array],
    ranges: Mapping[str, tuple[int | None, int | None]],
    inputs: Mapping[str, Array],
) -> dict[str, Array]:
    """``inputs`` complete, in order and of the declared dtypes and sizes. Raises InputError naming the first mismatch."""
    unknown = sorted(set(inputs) - set(types))
    if unknown:
        raise InputError(f"{name} has no input {unknown[0]!r}", f"its inputs are {', '.join(types)}")
    sizes: dict[str, int] = {}
    arrays: dict[str, Array] = {}
    for key, kind in types.items():
        if key not in inputs:
            if key not in defaults:
                raise InputError(f"input {key!r} of {name} is missing", f"its inputs are {', '.join(types)}")
            arrays[key] = defaults[key]
            continue
        array = np.asarray(inputs[key])
        if kind.dtype is not None and array.dtype != kind.dtype.numpy:
            raise InputError(f"input {key!r} of {name} is {array.dtype}, the graph takes {kind}", "convert it")
        if kind.shape is not None:
            _check_shape(name, key, array, kind, sizes, ranges)
        arrays[key] = array
    return arrays


def _check_shape(
    name: str, key: str, array: Array, kind: Any, sizes: dict[str, int], ranges: Mapping[str, tuple[int | None, int | None]]
) -> None:
    wrong = len(array.shape) != len(kind.shape)
    for size, declared in zip(array.shape, kind.shape, strict=False):
        if isinstance(declared, int):
            wrong = wrong or size != declared
        elif isinstance(declared, str) and declared.isidentifier():
            wrong = wrong or sizes.setdefault(declared, size) != size
            low, high = ranges.get(declared, (None, None))
            if high is not None and size > high:
                raise InputError(f"input {key!r} of {name} has {declared} = {size}, the limit is {high}")
            if low is not None and size < low:
                raise InputError(f"input {key!r} of {name} has {declared} = {size}, the least is {low}")
    if wrong:
        known = ", ".join(f"{n} = {s}" for n, s in sizes.items())
        raise InputError(f"input {key!r} of {name} has shape {list(array.shape)}, the graph takes {kind}", known)


def _array(result: Any) -> Array:
    return array_of(result) if isinstance(result, torch.Tensor) else np.asarray(result)
