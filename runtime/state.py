"""The state of a session: what its slots hold between calls, and the two ways of keeping it.

Explicit: a slot is an array that is fed as an input and taken from an output. Any graph of any engine can run so; it is what
others' runtimes do with the file, and what the held form is tested against. Held: a slot is a buffer of the engine that the
graph writes in place (see ``torch_held`` and ``ort_held``).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from typing import Protocol

import numpy as np

from actgraph.errors import InputError
from actgraph.graph.executor import Runner
from actgraph.graph.graph import Array, Graph, Role
from actgraph.graph.slots import Slot, advance, initial, slots_of

#: The axis of the tokens in slots of keys and values, [batch, heads, tokens, head].
TOKENS = 2
#: Slots with an entry for each token.
BY_TOKEN = ("append", "scatter")


class State(Protocol):
    """The slots of one session. ``used`` is how many tokens they hold entries of; the session counts them."""

    @property
    def bytes(self) -> int:
        """Bytes of all slots: of those that grow the entries, without room that is kept for more."""
        ...

    def reset(self) -> None:
        """Every slot as at the beginning."""
        ...

    def run(self, stage: str, inputs: Mapping[str, Array], used: int) -> dict[str, Array]:
        """Run a graph of the program: its outputs without the slots'. The slots hold their new content afterwards."""
        ...

    def read(self, start: int, stop: int) -> dict[str, Array]:
        """Copies of the entries of tokens ``start`` to ``stop`` in the slots that have one for each token, by slot name."""
        ...

    def load(self, contents: Mapping[str, Array], count: int) -> None:
        """Take the entries of the first ``count`` tokens, as ``read`` gives them, into slots that hold none."""
        ...


class ExplicitState:
    """Slots as arrays that go in and come out."""

    def __init__(self, graphs: Mapping[str, Graph], runner: Callable[[str], Runner], slots: Sequence[Slot], batch: int) -> None:
        self._graphs, self._runner, self._slots, self._batch = graphs, runner, slots, batch
        self._of = {name: list(slots_of(graph).values()) for name, graph in graphs.items()}
        self._arrays: dict[str, Array] = {}
        self.reset()

    @property
    def bytes(self) -> int:
        return sum(array.nbytes for array in self._arrays.values())

    def reset(self) -> None:
        self._arrays |= {slot.input: initial(slot, self._batch) for slot in to_reset(self._slots, self._arrays)}

    def run(self, stage: str, inputs: Mapping[str, Array], used: int) -> dict[str, Array]:
        own = self._of[stage]
        results = self._runner(stage)({**inputs, **{slot.input: self._arrays[slot.input] for slot in own}})
        self._arrays |= advance(own, results)
        return without_slots(self._graphs[stage], results)

    def read(self, start: int, stop: int) -> dict[str, Array]:
        return {slot.name: entries(self._arrays[slot.input], start, stop).copy() for slot in by_token(self._slots)}

    def load(self, contents: Mapping[str, Array], count: int) -> None:
        check_contents(contents, self._slots, count)
        for slot in by_token(self._slots):
            if slot.update == "append":
                self._arrays[slot.input] = contents[slot.name].copy()
            else:
                array = self._arrays[slot.input].copy()
                entries(array, 0, count)[...] = contents[slot.name]
                self._arrays[slot.input] = array


def without_slots(graph: Graph, results: Mapping[str, Array]) -> dict[str, Array]:
    """The results of a run that are not the content of slots."""
    return {name: array for name, array in results.items() if graph.role(name) is not Role.SLOT}


def to_reset(slots: Sequence[Slot], known: Container[str]) -> list[Slot]:
    """The slots that a reset fills anew, by the scope that they declare; those that are not ``known`` yet begin."""
    return [slot for slot in slots if slot.reset == "request" or slot.input not in known]


def by_token(slots: Sequence[Slot]) -> list[Slot]:
    """The slots that have an entry for each token."""
    return [slot for slot in slots if slot.update in BY_TOKEN]


def entries(array: Array, start: int, stop: int) -> Array:
    """The entries of tokens ``start`` to ``stop``, a view."""
    return array[(slice(None),) * TOKENS + (slice(start, stop),)]


def check_contents(contents: Mapping[str, Array], slots: Sequence[Slot], count: int) -> None:
    """Raises InputError where ``contents`` are not the entries of ``count`` tokens of one row for ``slots``."""
    wanted = {slot.name for slot in by_token(slots)}
    if set(contents) != wanted or len(wanted) != len(slots):
        odd = sorted(set(contents) ^ wanted) or sorted({slot.name for slot in slots} - wanted)
        raise InputError(f"the contents do not fit the slots: {odd[0]}", "give what Session.read returned")
    for slot in slots:
        array = contents[slot.name]
        sizes = (1, *slot.shape[1:TOKENS], count, *slot.shape[TOKENS + 1 :])
        given = array.shape[TOKENS] if array.ndim > TOKENS else count
        if given != count:
            raise InputError(f"slot {slot.name} would have {given} tokens, not {count}", "give as many")
        if array.shape != sizes or array.dtype != slot.dtype.numpy:  # assigning would repeat or convert it
            wanted_type = f"{slot.dtype}[{', '.join(map(str, sizes))}]"
            raise InputError(
                f"slot {slot.name} takes {wanted_type}, not {array.dtype} {list(array.shape)}", "give what read gave"
            )


#: Places of a new buffer. Memory that has never been written costs nothing; copying what has been does.
FIRST_ROOM = 1024


def room_for(needed: int, room: int, limit: int | None) -> int:
    """Places of a buffer that grows: twice as many as before, so that all copying together is linear in the length."""
    more = max(FIRST_ROOM, 2 * room)
    return max(needed, more if limit is None else min(more, limit))


def filled(slot: Slot, batch: int, places: int = 0) -> Array:
    """A new buffer for ``slot``: its first content, with ``places`` along the axis of the tokens where it grows."""
    if slot.update != "append":
        return initial(slot, batch)
    sizes = [size if isinstance(size, int) else batch for size in slot.shape]
    sizes[TOKENS] = places
    return np.zeros(sizes, slot.dtype.numpy)
