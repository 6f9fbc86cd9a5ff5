"""The parameters of models of one topology, as matrices that can be compared and written back.

Linear weights are read as ``[out, in]``, however they are stored (GPT-2 stores them as ``[in, out]``); stacks of experts are
one matrix for each expert; kernels of convolutions are ``[out, inputs]``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from actgraph.errors import InputError
from actgraph.graph import Editor, Graph, Value
from actgraph.graph.graph import Array
from actgraph.graph.recognize.experts import expert_products

_BLOCK = re.compile(r".*?\.\d+(?=\.)")


@dataclass(frozen=True)
class Stored:
    """One stored parameter of floats. transposed: stored as ``[in, out]``. experts: how many matrices it holds (0: it is one).

    block: its name up to the number of its layer; empty outside of layers.
    """

    name: str
    value: Value
    transposed: bool = False
    experts: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """As it is stored."""
        return tuple(int(size) for size in self.value.shape or () if isinstance(size, int))

    @property
    def block(self) -> str:
        found = _BLOCK.match(self.name)
        return found.group() if found else ""

    def parts(self) -> list[Array]:
        """Its numbers, float64: one matrix ``[out, in]``, one for each expert, or a vector."""
        data = self.value.graph.read(self.value).astype(np.float64)
        if self.experts:
            return list(data)
        if data.ndim < 2:
            return [data]
        return [data.T if self.transposed else data.reshape(data.shape[0], -1)]

    def part_names(self) -> list[str]:
        """The names of ``parts``: ``weight[3]`` for the fourth expert."""
        return [f"{self.name}[{expert}]" for expert in range(self.experts)] or [self.name]

    def write(self, editor: Editor, parts: Sequence[Array]) -> None:
        """Replace its numbers, given as ``parts``, for every reader; rounded once to the type that they are stored in."""
        assert self.value.dtype is not None
        data = np.stack(parts) if self.experts else parts[0].T if self.transposed else parts[0].reshape(self.shape)
        editor.set_parameter(self.value, np.ascontiguousarray(data).astype(self.value.dtype.numpy))


def stored_parameters(graph: Graph) -> list[Stored]:
    """The parameters of floats that are read, in the order of the graph; single numbers are left out."""
    transposed = {linear.weight for linear in graph.views.linears() if linear.out_axis == 1}
    stacks = {_source(product.weights): product.experts for product in expert_products(graph.views.semantics)}
    found = []
    for value in graph.parameters():
        sizes = [size for size in value.shape or () if isinstance(size, int)]
        if value.dtype is not None and value.dtype.is_float and value.uses and math.prod(sizes) > 1:
            found.append(Stored(value.name, value, value in transposed, stacks.get(value, 0)))
    return found


def _source(weights: Value) -> Value:
    while weights.producer is not None and weights.producer.operands and weights.producer.operands[0] is not None:
        weights = weights.producer.operands[0]
    return weights


def same_topology(*graphs: Graph) -> None:
    """Raises InputError unless all graphs store parameters of the same names and shapes."""
    first, *others = ({p.name: p.shape for p in stored_parameters(graph)} for graph in graphs)
    for graph, other in zip(graphs[1:], others, strict=True):
        odd = sorted(set(first) ^ set(other))
        if odd:
            owner = "the first" if odd[0] in first else "the other"
            raise InputError(
                f"{graphs[0].name} and {graph.name} are not of one topology: only {owner} has {odd[0]}",
                "load models of one architecture in one way (all from checkpoints, or all from .onnx files)",
            )
        for name, shape in first.items():
            if other[name] != shape:
                raise InputError(f"{name} is {list(shape)} in {graphs[0].name} and {list(other[name])} in {graph.name}")
