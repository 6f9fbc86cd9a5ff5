"""What every engine asks of the arrays that it is given: one rule and one wording for all of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from actgraph.errors import InputError
from actgraph.graph.graph import Graph
from actgraph.graph.input_values import shown_type
from actgraph.ops.dtypes import DType
from actgraph.ops.shapes import Shape, TensorType

Array = np.ndarray[Any, Any]
Ranges = Mapping[str, tuple[int | None, int | None]]


class InputChecker:
    """The inputs that a graph declares, as they were when the checker was made.

    ranges: the smallest and largest size allowed, by dimension name. optional: inputs that may be left out. Where the default
    of one has size 1 along a named dimension, what is given may have that, too.
    """

    def __init__(self, graph: Graph, ranges: Ranges, optional: Collection[str]) -> None:
        self._name = graph.name
        self._types = {value.name: value.type for value in graph.inputs()}
        for value in graph.inputs():
            if value.name in optional and value.shape and value.shape[0] is None:
                self._types[value.name] = shown_type(graph, value.name)
        self._ranges = dict(ranges)
        self._optional = frozenset(optional)
        self._ones = {name: _broadcast(self._types[name].shape, graph, name) for name in self._optional & self._types.keys()}

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The given inputs as arrays, in the order of the graph's inputs.

        Nothing is converted. Raises InputError where no mapping is given, or naming the first input that is unknown or missing,
        or whose dtype, rank or sizes are not those declared: a number must be met, a name means one size everywhere, within
        its limits.
        """
        if not isinstance(inputs, Mapping):
            given = type(inputs).__name__
            raise InputError(f"the inputs of {self._name} are a mapping of names to arrays, not a {given}", self._known())
        unknown = sorted(set(inputs) - set(self._types))
        if unknown:
            raise InputError(f"{self._name} has no input {unknown[0]!r}", self._known())
        sizes: dict[str, int] = {}
        arrays: dict[str, Array] = {}
        for key, kind in self._types.items():
            if key not in inputs:
                if key not in self._optional:
                    raise InputError(f"input {key!r} of {self._name} is missing", self._known())
                continue
            array = np.asarray(inputs[key])
            if kind.dtype is not None and not _is_of(array, kind.dtype):
                raise InputError(f"input {key!r} of {self._name} is {array.dtype}, the graph takes {kind}", "convert it")
            if kind.shape is not None:
                self._check_shape(key, array, kind, kind.shape, sizes)
            arrays[key] = array
        return arrays

    def _check_shape(self, key: str, array: Array, kind: TensorType, shape: Shape, sizes: dict[str, int]) -> None:
        wrong = array.ndim != len(shape)
        ones = self._ones.get(key, ())
        for axis, (size, declared) in enumerate(zip(array.shape, shape, strict=False)):
            if size == 1 and axis in ones:
                continue
            if isinstance(declared, int):
                wrong = wrong or size != declared
            elif declared is not None and declared.isidentifier() and not wrong:
                wrong = sizes.setdefault(declared, size) != size
                low, high = self._ranges.get(declared, (None, None))
                if high is not None and size > high:
                    raise InputError(f"input {key!r} of {self._name} has {declared} = {size}, the limit is {high}")
                if low is not None and size < low:
                    raise InputError(f"input {key!r} of {self._name} has {declared} = {size}, the least is {low}")
        if wrong:
            known = ", ".join(f"{name} = {size}" for name, size in sizes.items())
            raise InputError(f"input {key!r} of {self._name} has shape {list(array.shape)}, the graph takes {kind}", known)

    def _known(self) -> str:
        return f"its inputs are {', '.join(self._types)}"


def _broadcast(shape: Shape | None, graph: Graph, name: str) -> tuple[int, ...]:
    """The axes along which the default of an optional input serves whatever size the named dimension has."""
    named = [axis for axis, size in enumerate(shape or ()) if isinstance(size, str)]
    default = graph.default(name) if named else None
    return () if default is None else tuple(axis for axis in named if axis < default.ndim and default.shape[axis] == 1)


def _is_of(array: Array, dtype: DType) -> bool:
    return array.dtype.kind in "OSU" if dtype is DType.STRING else array.dtype == dtype.numpy
