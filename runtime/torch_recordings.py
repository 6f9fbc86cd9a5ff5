"""Recordings between sessions: one that has ended leaves its recorded steps to the next one of the same shapes."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from actgraph.graph.graph import Array
from actgraph.runtime.state import TOKENS
from actgraph.runtime.torch_recorded import Recording

if TYPE_CHECKING:
    from actgraph.runtime.torch_held import HeldGraph

#: How many recordings are kept for sessions to come: of one shape, and shapes.
_SPARE = 4


def shapes_of(held: HeldGraph, inputs: Mapping[str, Array], slots: Mapping[str, torch.Tensor], used: int) -> tuple[Any, ...]:
    """What is equal for sessions that can share a recording, one after the other."""
    appended = {slot.input for slot in held.slots.values() if slot.update == "append"}
    given = [(n, array.shape, n in held.growing and array.shape[-1] == used + 1) for n, array in inputs.items()]
    shapes = [(name, shape[:-1] if grown and len(shape) > 1 else shape) for name, shape, grown in given]
    buffers = [
        (n, *(size for axis, size in enumerate(t.shape) if axis != TOKENS or n not in appended)) for n, t in slots.items()
    ]
    return tuple(shapes), tuple(buffers)


class Recordings:
    """The recordings of one graph that no session uses at the moment."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[tuple[Any, ...], list[Recording]] = {}
        #: Given back, perhaps by a finalizer in the middle of anything: nothing is locked for it.
        self._returned: deque[tuple[tuple[Any, ...], Recording]] = deque(maxlen=_SPARE)

    def take(self, shapes: tuple[Any, ...]) -> Recording | None:
        with self._lock:
            while self._returned:
                of, recording = self._returned.popleft()
                self._known[of] = [*self._known.pop(of, []), recording][-_SPARE:]  # the newest shapes last
            while len(self._known) > _SPARE:
                del self._known[next(iter(self._known))]
            found = self._known.get(shapes)
            return found.pop() if found else None

    def give(self, shapes: tuple[Any, ...], recording: Recording) -> None:
        """Keep a recording for the next session."""
        if recording.portable:
            recording.let_go()
            self._returned.append((shapes, recording))
