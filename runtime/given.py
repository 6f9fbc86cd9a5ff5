"""What hosts give sessions beside tokens: strengths, angles and vectors of edits, and other inputs that no session fills in.

A value is checked when it is given, holds for every call until it is changed, and is fed to each graph of the program that
takes it. Where nothing is given an input has its default, which leaves the model as it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from actgraph.errors import InputError
from actgraph.graph.context import KINDS, token_dims
from actgraph.graph.graph import Array, Graph, Role
from actgraph.graph.input_values import InputValue, as_input, given_twice, has_rows, table_rows, unknown_input
from actgraph.graph.program import Program
from actgraph.graph.slots import slots_of
from actgraph.runtime.tokens import FILLED


@dataclass(frozen=True)
class _Takes:
    """One input of a program. rows: its first axis is that of the batch. table: how many rows it may name of a table."""

    name: str
    graph: Graph
    default: Array | None
    rows: bool
    table: int | None

    def value(self, value: InputValue, batch: int, of: str) -> Array:
        """``value`` as the engines take it, in memory of its own. Raises InputError."""
        array = as_input(self.name, value, self.graph, batch=batch, of=of)
        if self.table is not None and array.size and not 0 <= array.min() <= array.max() < self.table:
            odd = array.min() if array.min() < 0 else array.max()
            raise InputError(f"input {self.name!r} of {of} is {odd}", f"it may be 0 to {self.table - 1}")
        return self.whole(array, batch)

    def whole(self, array: Array, batch: int) -> Array:
        """A copy of ``array`` with an entry for each row."""
        if self.rows and len(array) != batch:
            array = np.broadcast_to(array, (batch, *array.shape[1:]))
        return np.array(array)


class Givable:
    """The inputs of a program that its sessions do not fill in themselves."""

    def __init__(self, program: Program) -> None:
        self.name = program.name
        self.inputs: dict[str, _Takes] = {}
        self.stages: dict[str, tuple[str, ...]] = {}
        for stage, graph in program.graphs.items():
            names = [value.name for value in graph.inputs() if _is_givable(graph, value.name)]
            self.stages[stage] = tuple(names)
            for name in names:
                kind = graph.value(name).type
                rows, table = has_rows(graph, name), table_rows(graph, name)
                found = self.inputs.setdefault(name, _Takes(name, graph, graph.default(name), rows, table))
                other = found.graph.value(name).type
                if (kind.dtype, len(kind.shape or ())) != (other.dtype, len(other.shape or ())):
                    raise InputError(f"input {name!r} is {kind} in the graph {stage!r} and {other} in another", "rename one")

    def checked(self, inputs: Mapping[str, InputValue], batch: int) -> dict[str, Array]:
        """Values for ``batch`` rows, each ``[1]`` or ``[batch]``, as arrays for all rows. Raises InputError."""
        return {name: self.checked_one(name, value, batch) for name, value in inputs.items()}

    def checked_one(self, name: str, value: InputValue, batch: int) -> Array:
        """One value. Raises InputError."""
        takes = self.inputs.get(name)
        if takes is None:
            if name in FILLED:
                raise InputError(f"sessions fill in {name!r} of {self.name} themselves", "feed tokens, and which are valid")
            raise unknown_input(name, self.inputs, self.name)
        kind, dims = takes.graph.value(name).type, token_dims(takes.graph)
        if dims is not None and isinstance(dims[1], str) and dims[1] in (kind.shape or ()):
            raise InputError(
                f"input {name!r} of {self.name} is {kind}: it has an entry for each token, and a session gives the same with "
                "every call", "call the graph with its inputs"
            )  # fmt: skip
        return takes.value(value, batch, self.name)

    def of_row(self, values: Mapping[str, Array], row: int) -> dict[str, Array]:
        """What ``checked`` gave, for one of its rows alone."""
        return {name: array[row : row + 1] if self.inputs[name].rows else array for name, array in values.items()}


def _is_givable(graph: Graph, name: str) -> bool:
    slots = {slot.input for slot in slots_of(graph).values()}
    return name not in FILLED and name not in KINDS and name not in slots and graph.role(name) is Role.USER


class GivenInputs(Mapping[str, Array]):
    """The inputs of one session beside its tokens, by name: ``session.inputs["steer.scale"] = 2``.

    A value is a number, a list or an array, for all rows (``[1]``) or one for each (``[batch]``); it is checked at once and
    holds from the next call on. ``del`` gives an input its default back. Reading gives an array of all rows that cannot be
    written to. Iterating goes over all names that may be given.
    """

    def __init__(self, givable: Givable, batch: int) -> None:
        self._givable, self._batch = givable, batch
        self._given: dict[str, Array] = {}
        self._fed: dict[str, dict[str, Array]] = {}  # by stage
        #: Defaults for each row are fed like values that are given, so that both run through the same code.
        self._defaults = {
            name: takes.whole(takes.default, batch)
            for name, takes in givable.inputs.items()
            if takes.rows and takes.default is not None
        }

    def __repr__(self) -> str:
        given = ", ".join(f"{name}={_shown(array)}" for name, array in self._given.items())
        return f"<inputs of {self._givable.name}: {given or 'all have their defaults'}>"

    def __iter__(self) -> Iterator[str]:
        return iter(self._givable.inputs)

    def __len__(self) -> int:
        return len(self._givable.inputs)

    def __getitem__(self, name: str) -> Array:
        """What is fed. Raises KeyError for an unknown name, and for one that must be given and is not."""
        takes = self._givable.inputs[name]
        found = self._given.get(name, self._defaults.get(name, takes.default))
        if found is None:
            raise KeyError(name)
        view = found.view()
        view.setflags(write=False)
        return view

    def __setitem__(self, name: str, value: InputValue) -> None:
        """Give a value from the next call on. Raises InputError."""
        self._given[name] = self._givable.checked_one(name, value, self._batch)
        self._fed.clear()

    def __delitem__(self, name: str) -> None:
        """Give an input its default back. Raises KeyError for an unknown name."""
        if name not in self._givable.inputs:
            raise KeyError(name)
        self._given.pop(name, None)
        self._fed.clear()

    def update(self, inputs: Mapping[str, InputValue]) -> None:
        """Give several: all or, where one is wrong, none. Raises InputError."""
        self._given |= self._givable.checked(inputs, self._batch)
        self._fed.clear()

    def clear(self) -> None:
        """Every input has its default."""
        self._given.clear()
        self._fed.clear()

    def feed(self, stage: str) -> dict[str, Array]:
        """What the graph ``stage`` is fed. Raises InputError for an input that must be given and is not."""
        found = self._fed.get(stage)
        if found is None:
            found = {}
            for name in self._givable.stages[stage]:
                if name in self._given or name in self._defaults:
                    found[name] = self._given[name] if name in self._given else self._defaults[name]
                elif self._givable.inputs[name].default is None:
                    raise InputError(f"input {name!r} of {self._givable.name} is not given", f"session.inputs[{name!r}] = ...")
            self._fed[stage] = found
        return found

    def digest(self) -> bytes:
        """A hash of all that is fed."""
        hashed = hashlib.sha256()
        for name in sorted(self._given.keys() | self._defaults.keys()):
            array = self._given.get(name, self._defaults.get(name))
            assert array is not None
            hashed.update(repr((name, str(array.dtype), array.shape)).encode())
            hashed.update(repr(array.tolist()).encode() if array.dtype.kind in "OSU" else array.tobytes())
        return hashed.digest()


def with_adapter(inputs: Mapping[str, InputValue] | None, adapter: str | Path | None) -> dict[str, InputValue]:
    """``inputs`` and the values in a file that ``save_adapter`` wrote. Raises InputError where a name is in both."""
    values = dict(inputs or {})
    if adapter is None:
        return values
    from actgraph.formats.adapters import load_adapter

    loaded = load_adapter(adapter)
    given_twice(values, loaded, adapter)
    return {**values, **loaded}


def _shown(array: Array) -> str:
    return str(array.tolist()) if array.size <= 4 else f"{array.dtype}{list(array.shape)}"
