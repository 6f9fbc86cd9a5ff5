"""The plain torch engine: runs an FX graph eagerly, numpy arrays in and out, on the CPU or on a CUDA device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx

from actgraph.errors import InputError
from actgraph.graph.executor import Runner
from actgraph.graph.fx import FxGraph
from actgraph.graph.fx_build import copy_graph
from actgraph.graph.fx_types import array_of, tensor_of
from actgraph.graph.graph import Graph, Value
from actgraph.ops.torch_library import op_of, reference_call
from actgraph.runtime.inputs import InputChecker

if TYPE_CHECKING:
    from actgraph.runtime.claims import Claims
    from actgraph.runtime.torch_device import Placed

Array = np.ndarray[Any, Any]


class TorchExecutor:
    """Opens FX graphs (see ``actgraph.graph.executor.Executor``).

    placed: the weights on the device to run on, by default the CPU; kernels: with the kernels that were installed there.
    """

    def __init__(self, placed: Placed | None = None, *, kernels: bool = False) -> None:
        self._placed, self._kernels = placed, kernels

    def open(self, graph: Graph, values: Sequence[Value] = (), *, optimize: bool = True) -> Runner:
        """A runner over the graph as it is now; later edits do not change it. ``values`` cost no second forward.

        optimize: generate Python code for the graph; without, it is interpreted.
        """
        if not isinstance(graph, FxGraph):
            raise InputError(f"the torch engine runs FX graphs, {graph.name} is a graph of dialect {graph.dialect}")
        return TorchRunner(graph, values, optimize, self._placed, self._kernels)


class TorchRunner:
    """An opened graph. claims: what kernels have claimed, where there are any for the device."""

    def __init__(
        self, graph: FxGraph, values: Sequence[Value], optimize: bool, placed: Placed | None = None, kernels: bool = False
    ) -> None:
        self.claims: Claims | None = None
        if placed is not None and kernels:
            from actgraph.runtime.torch_device import find_triton_kernels

            self.claims = find_triton_kernels(graph)
        self.device = None if placed is None else placed.device
        self.check = InputChecker(graph, graph.dim_ranges, graph.defaults)
        self.order = [value.name for value in graph.inputs()]
        self.defaults = dict(graph.defaults)
        self.names = [*graph.output_names, *(value.name for value in values)]
        if len(set(self.names)) != len(self.names):
            twice = next(name for name in self.names if self.names.count(name) > 1)
            raise InputError(f"two results would be called {twice!r}", "read the output instead of the value of that name")
        native = copy_graph(graph.graph)
        for node in native.nodes:
            op = op_of(node.target)
            if op is not None and self.claims is None:  # not through the dispatcher, where another model may have put kernels
                node.target = reference_call(op)
        if values:
            by_name = {node.name: node for node in native.nodes}
            output = native.output_node()
            output.args = ((*output.args[0], *(by_name[value.key.name] for value in values)),)  # type: ignore[misc]
        self.run: Callable[..., Any]
        if placed is not None:
            self.run = placed.module(native, graph.root)
        elif optimize:
            self.run = fx.GraphModule(graph.root, native)
        else:
            self.run = fx.Interpreter(graph.root, graph=native).run

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        arrays = {**self.defaults, **self.check(inputs)}
        with torch.no_grad():
            results = self.run(*(tensor_of(arrays[name]).to(self.device) for name in self.order))
        return {name: array_of_result(result) for name, result in zip(self.names, results, strict=True)}


def array_of_result(result: Any) -> Array:
    """What a graph of torch returns, a tensor or a number, as an array."""
    return array_of(result) if isinstance(result, torch.Tensor) else np.asarray(result)
