"""Models without slots, with kernels: the graph is opened twice, for calls of few tokens and for calls of many.

Kernels read a gated weight again for each token, and skip what that token drops; an engine's product reads all of it once for
all tokens. Which of the two graphs takes a call depends on how many rows the inputs of its linears have.
"""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable, Mapping
from typing import Any

from actgraph.graph.graph import Array, Graph
from actgraph.ops.shapes import Shape
from actgraph.runtime.claims import Claims
from actgraph.runtime.inputs import InputChecker

#: Rows up to which the graph for few tokens is the faster one.
FEW = 4


class Slotless:
    """A runner of one graph. Thread-safe. Subclasses say how an engine holds a graph, and calls it."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._rows = {linear.output.shape[:-1] if linear.output.shape else None for linear in graph.views.linears()}
        least = max((_product(shape, {}, 1) for shape in self._rows if shape is not None), default=0)
        known = all(shape is not None and all(isinstance(size, int) for size in shape) for shape in self._rows)
        #: Which calls there can be: of few rows (True), of many (False).
        self.kinds = [True] * (least <= FEW) + [False] * (least > FEW or not known)
        self._lock = threading.Lock()
        self._opened: dict[bool, Any] = {}
        self._wrap: Callable[[Any], Any] | None = None
        self.check: InputChecker

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name. Raises InputError for inputs that are not as declared."""
        arrays = self.check(inputs)
        return self._call(self.held(self._are_few(arrays)), arrays)

    def prepare(self, inputs: Mapping[str, Array]) -> None:
        """Open what a call with ``inputs`` needs."""
        self.held(self._are_few(self.check(inputs)))

    def open(self) -> None:
        """Open the graph for many rows, where there are such calls: what the engine cannot run is an error then."""
        self.held(self.kinds[-1])

    @property
    def claims(self) -> Claims:
        """Of calls of few rows, where there are such calls."""
        return self.claims_of(self.kinds[0])

    def claims_of(self, few: bool) -> Claims:
        found: Claims = self.held(few).claims
        return found

    def held(self, few: bool) -> Any:
        with self._lock:
            if few not in self._opened:
                held = self._hold(few)
                self._opened[few] = held if self._wrap is None else self._wrap(held)
            return self._opened[few]

    def wrapped(self, wrap: Callable[[Any], Any]) -> Slotless:
        """A twin that calls what ``wrap`` makes of each graph."""
        twin = copy.copy(self)
        twin._opened, twin._lock = {}, threading.Lock()
        twin._wrap = wrap
        twin._hold = lambda few: self.held(few)  # type: ignore[method-assign]
        return twin

    def _are_few(self, inputs: Mapping[str, Array]) -> bool:
        if len(self.kinds) == 1:
            return self.kinds[0]
        sizes: dict[str, int] = {}
        for value in self.graph.inputs():
            if value.name in inputs and self.graph.default(value.name) is None:  # which may serve all rows with one
                named = zip(value.shape or (), inputs[value.name].shape, strict=False)
                sizes |= {name: size for name, size in named if isinstance(name, str)}
        return all(shape is not None and _product(shape, sizes, FEW + 1) <= FEW for shape in self._rows)

    def _hold(self, few: bool) -> Any:
        raise NotImplementedError

    def _call(self, held: Any, inputs: dict[str, Array]) -> dict[str, Array]:
        raise NotImplementedError


def _product(shape: Shape, sizes: Mapping[str, int], unknown: int) -> int:
    """How many rows a shape is; each size that is not known counts as ``unknown``."""
    return math.prod(size if isinstance(size, int) else sizes.get(size or "", unknown) for size in shape)


class SlotlessTorch(Slotless):
    """By torch."""

    def __init__(self, graph: Graph) -> None:
        from actgraph.graph.fx import FxGraph
        from actgraph.runtime.torch_packed import Packed

        assert isinstance(graph, FxGraph)
        super().__init__(graph)
        self._packed = Packed()
        self.check = InputChecker(graph, graph.dim_ranges, graph.defaults)

    def _hold(self, few: bool) -> Any:
        from actgraph.runtime.torch_held import HeldGraph

        return HeldGraph(self.graph, self._packed, kernels=True, prompts=not few, few=few)  # type: ignore[arg-type]

    def _call(self, held: Any, inputs: dict[str, Array]) -> dict[str, Array]:
        from actgraph.graph.fx_types import tensor_of
        from actgraph.runtime.torch_engine import array_of_result

        results = held({name: tensor_of(array) for name, array in inputs.items()}, 0)
        return {name: array_of_result(result) for name, result in results.items()}


class SlotlessOnnx(Slotless):
    """By onnxruntime."""

    def __init__(self, graph: Graph) -> None:
        from actgraph.graph.onnx import OnnxGraph

        assert isinstance(graph, OnnxGraph)
        super().__init__(graph)
        self.check = InputChecker(graph, graph.dim_ranges, graph.optional)
        self._names = [name for name, _ in graph.outputs()]

    def _hold(self, few: bool) -> Any:
        from actgraph.runtime.ort_held import HeldOnnx

        held = HeldOnnx(self.graph, None, kernels=True, prompts=not few, few=few)
        _ = held.plain  # opened here, where what onnxruntime cannot run is an error
        return held

    def _call(self, held: Any, inputs: dict[str, Array]) -> dict[str, Array]:
        from actgraph.runtime.ort_engine import needs_values, run_session

        session = held.plain.session
        results = run_session(session, self._names, inputs, values=needs_values(session))
        return dict(zip(self._names, results, strict=True))


def slotless(graph: Graph) -> Slotless:
    """A runner with kernels for a graph without slots, on the CPU."""
    return SlotlessTorch(graph) if graph.dialect == "fx" else SlotlessOnnx(graph)
