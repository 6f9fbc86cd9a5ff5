"""What is written down while a profile runs: steps, and the nodes executed in them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

clock = time.perf_counter_ns

#: What time is spent on beside nodes; see ``Row.node``.
OUTSIDE, BETWEEN, RECORDING, PROFILER = "(outside nodes)", "(between nodes)", "(recording)", "(profiler)"


@dataclass(frozen=True, eq=False)
class Executed:
    """One node of what an engine executes.

    kernel: of ours, or the name of the engine; why: the reason where an op of ours has none. at_most: a kernel skips weights
    that the bytes count. graph: the graph of the program that it belongs to.
    """

    name: str
    op: str
    site: str
    kernel: str
    graph: str
    why: str = ""
    at_most: bool = False


@dataclass(frozen=True)
class Bytes:
    """What a call must read."""

    weights: int = 0
    caches: int = 0
    activations: int = 0

    @property
    def all(self) -> int:
        return self.weights + self.caches + self.activations


@dataclass(frozen=True)
class Call:
    """One call of a node; times in nanoseconds of ``clock``."""

    node: Executed
    begin: int
    time: int
    bytes: Bytes


@dataclass
class Step:
    """One call of a session or model. tokens: of each row. rest: nanoseconds beside nodes, by name."""

    stage: str
    tokens: int
    begin: int
    time: int = 0
    calls: list[Call] = field(default_factory=list)
    rest: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, time: int) -> None:
        self.rest[name] = self.rest.get(name, 0) + time

    @property
    def outside(self) -> int:
        """Nanoseconds that nothing else is known of."""
        return self.time - sum(call.time for call in self.calls) - sum(self.rest.values())


class Recorder:
    """Steps in their order. Calls outside a step are not recorded."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.now: Step | None = None
        self.held: Callable[[], int] = lambda: 0  # tokens of the session, those of the running call included
        self.notes: list[str] = []

    @contextmanager
    def step(self, stage: str, tokens: int) -> Iterator[Step]:
        """A step; one that raises is forgotten."""
        self.now = Step(stage, tokens, clock())
        try:
            yield self.now
            self.now.time = clock() - self.now.begin
            self.steps.append(self.now)
        finally:
            self.now = None

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
