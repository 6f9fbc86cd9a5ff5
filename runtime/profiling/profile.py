"""What a profile says: rows by node, tables by site, op, kernel or node, JSON and a Chrome trace."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from actgraph.errors import InputError
from actgraph.runtime.profiling.record import BETWEEN, OUTSIDE, PROFILER, RECORDING, Bytes, Call, Executed, Recorder, Step
from actgraph.runtime.profiling.table import Table, percent, rate, size

_SECONDS = 1e-9


@dataclass(frozen=True)
class Row:
    """A node in one stage, or time that belongs to none.

    node, op: as the engine executes them, after fusion. site: see ``docs/profiling.md``. stage: ``"prefill"``, ``"decode"`` or
    ``"forward"``. kernel: of ours, or the engine; why: the reason where an op of ours has no kernel. calls: in all steps.
    steps: in how many steps it occurs. total: seconds of all calls. median: seconds that such a step spends on it. weights,
    caches, activations: bytes that all calls must read; at_most: the kernel skips some of the weights, how many is not known.

    Rows whose ``node`` is in parentheses are the rest of the wall time: ``(outside nodes)`` Python and what the engine does
    before and after its loop, ``(between nodes)`` that loop, ``(recording)`` what the first single token takes longer because
    those behind it run from C, ``(profiler)`` the profile itself.
    """

    node: str
    op: str
    site: str
    stage: str
    kernel: str
    why: str
    calls: int
    steps: int
    total: float
    median: float
    weights: int = 0
    caches: int = 0
    activations: int = 0
    at_most: bool = False

    @property
    def bytes(self) -> int:
        return self.weights + self.caches + self.activations

    @property
    def bandwidth(self) -> float:
        """Bytes per second, in a step that takes the median time."""
        return self.bytes / self.steps / self.median if self.median else 0.0


#: What a table may be by, and the name of a row in it.
_KEYS: dict[str, Callable[[Row], str]] = {
    "site": lambda row: row.site,
    "role": lambda row: re.sub(r"(?<![^.])\d+(?![^.])", "*", row.site),
    "op": lambda row: row.op or row.node,
    "kernel": lambda row: row.kernel if row.op else row.node,
    "node": lambda row: row.node,
}
BY = tuple(_KEYS)
#: Rows that are no part of an ordinary step.
_ONCE = (RECORDING, PROFILER)


@dataclass
class Profile:
    """A finished profile; see ``Session.profile``.

    engine, threads: what ran. stream: bytes per second of a plain read loop, measured behind the profile; ``None`` where it was
    not. notes: what the figures lack.
    """

    engine: str
    threads: int
    stream: float | None = None
    notes: tuple[str, ...] = ()
    _steps: list[Step] | None = field(default=None, repr=False)
    _rows: tuple[Row, ...] | None = field(default=None, repr=False)

    def _finish(self, recorder: Recorder, stream: float | None) -> None:
        self._steps, self.notes, self.stream = recorder.steps, tuple(recorder.notes), stream

    @property
    def steps(self) -> list[Step]:
        if self._steps is None:
            raise InputError("the profile is not finished", "read it behind the with block")
        return self._steps

    @property
    def rows(self) -> tuple[Row, ...]:
        """One for each node and stage, in the order of execution, and the rest of the wall time: ``total`` in all."""
        if self._rows is None:
            self._rows = tuple(_rows(self.steps))
        return self._rows

    @property
    def total(self) -> float:
        """Seconds of wall time in all steps."""
        return sum(step.time for step in self.steps) * _SECONDS

    @property
    def bytes(self) -> int:
        """What all nodes must read."""
        return sum(row.bytes for row in self.rows)

    @property
    def bandwidth(self) -> float:
        """Bytes per second that were read in all, of the wall time without the profiler's."""
        spent = self.total - sum(row.total for row in self.rows if row.node == PROFILER)
        return self.bytes / spent if spent else 0.0

    def table(self, by: str = "site", *, stage: str = "", top: int = 0) -> Table:
        """Rows grouped ``by`` site, role (sites without their numbers), op, kernel or node, of one stage or of all.

        Print it, or use its ``headers`` and ``rows``. In each stage the slowest come first, with ``top`` no more than so many.
        Per step: milliseconds (the median over the steps) and bytes, and of these GB/s and its share of the stream figure.
        share: of the whole step, in medians too, without the profiler's time. Raises InputError for an unknown ``by``.
        """
        if by not in BY:
            raise InputError(f"there is no table by {by!r}", f"choose {', '.join(BY)}")
        lines: list[tuple[str, ...]] = []
        for name in dict.fromkeys(row.stage for row in self.rows):
            if stage in ("", name):
                lines += self._stage(name, by, top)
        return Table(("stage", by, *_FIGURES, *_ABOUT[by]), tuple(lines), _FIGURES)

    def _stage(self, stage: str, by: str, top: int) -> Iterable[tuple[str, ...]]:
        steps = [step for step in self.steps if step.stage == stage]
        groups: dict[str, list[Row]] = {}
        for row in self.rows:
            if row.stage == stage:
                groups.setdefault(_KEYS[by](row), []).append(row)
        whole = statistics.median(step.time - step.rest.get(PROFILER, 0) for step in steps) * _SECONDS
        medians = _medians(steps, lambda node: _KEYS[by](_blank(node)))
        medians |= {name: rows[0].median for name, rows in groups.items() if name not in medians}
        order = sorted(groups, key=lambda name: (name in _ONCE, -medians[name] * groups[name][0].steps))
        for name in order[:top] if top else order:
            rows = groups[name]
            read = sum(row.bytes for row in rows) / max(row.steps for row in rows)
            figures = self._figures(rows, medians[name], read)
            share = percent(medians[name] / whole) if name not in _ONCE else ""
            yield stage, name, str(sum(row.calls for row in rows)), figures[0], share, *figures[1:], *self._about(rows, by)
        if 0 < top < len(order):
            yield stage, f"({len(order) - top} more)", *("" for _ in (*_FIGURES, *_ABOUT[by]))
        figures = self._figures(self._of(stage), whole, sum(step_bytes(step) for step in steps) / len(steps))
        yield stage, "all", str(len(steps)), figures[0], percent(1.0), *figures[1:], *self._about([], by)

    def _of(self, stage: str) -> list[Row]:
        return [row for row in self.rows if row.stage == stage]

    def _figures(self, rows: Sequence[Row], seconds: float, read: float) -> tuple[str, str, str, str]:
        """Milliseconds, bytes, their rate and its share of the stream figure."""
        time = f"{1e3 * seconds:.3f}"
        if not read or not seconds:
            return time, "", "", ""
        bound = "<= " if any(row.at_most for row in rows) else ""
        share = bound + percent(read / seconds / self.stream) if self.stream else ""
        return time, bound + size(read), bound + rate(read / seconds), share

    def _about(self, rows: Sequence[Row], by: str) -> tuple[str, ...]:
        return tuple(_joined(getattr(row, name) for row in rows) for name in _ABOUT[by])

    def to_json(self) -> dict[str, Any]:
        """Everything but the single calls, as plain data. Seconds, bytes, bytes per second."""
        rows = [asdict(row) | {"bytes": row.bytes, "bandwidth": row.bandwidth} for row in self.rows]
        return {
            "engine": self.engine, "threads": self.threads, "stream": self.stream, "total": self.total, "bytes": self.bytes,
            "bandwidth": self.bandwidth, "notes": list(self.notes), "rows": rows,
            "steps": [{"stage": step.stage, "tokens": step.tokens, "seconds": step.time * _SECONDS} for step in self.steps],
        }  # fmt: skip

    def chrome_trace(self) -> dict[str, Any]:
        """Every call in the Trace Event Format: what ``save_chrome_trace`` writes."""
        from actgraph.runtime.profiling.trace import trace

        return trace(self)

    def save_chrome_trace(self, path: str | Path) -> Path:
        """Write every call as a file for https://ui.perfetto.dev or chrome://tracing, whole or not at all."""
        from actgraph.runtime.profiling.trace import save

        return save(self, Path(path))

    def __str__(self) -> str:
        return "\n".join([f"{self!r}", str(self.table()), *(f"note: {note}" for note in self.notes)])

    def __repr__(self) -> str:
        if self._steps is None:
            return f"<Profile of {self.engine}, not finished>"
        stream = f" of {rate(self.stream)}" if self.stream else ""
        return f"<Profile of {self.engine}: {len(self.steps)} steps, {self.total:.3f} s, {rate(self.bandwidth)}{stream} GB/s>"


#: The columns of numbers, and what tables show behind them.
_FIGURES = ("calls", "ms/step", "share", "bytes/step", "GB/s", "of stream")
_ABOUT = {
    "site": ("op", "kernel", "why"),
    "role": ("op", "kernel", "why"),
    "op": ("kernel", "why"),
    "kernel": ("op",),
    "node": ("site", "op", "kernel", "why"),
}


def step_bytes(step: Step) -> int:
    return sum(call.bytes.all for call in step.calls)


def _rows(steps: Sequence[Step]) -> Iterable[Row]:
    stages = dict.fromkeys(step.stage for step in steps)
    for stage in stages:
        own = [step for step in steps if step.stage == stage]
        calls: dict[Executed, list[Call]] = {}
        for step in own:
            for call in step.calls:
                calls.setdefault(call.node, []).append(call)
        medians = _medians(own, lambda node: node)
        occurs = Counter(node for step in own for node in {call.node for call in step.calls})
        for node, found in calls.items():
            read = Bytes(*(sum(getattr(call.bytes, name) for call in found) for name in ("weights", "caches", "activations")))
            yield Row(
                node.name, node.op, node.site, stage, node.kernel, node.why, len(found), occurs[node],
                sum(call.time for call in found) * _SECONDS, medians[node], read.weights, read.caches, read.activations,
                node.at_most,
            )  # fmt: skip
        rest = {OUTSIDE: [step.outside for step in own]}
        rest |= {name: [step.rest.get(name, 0) for step in own] for name in (BETWEEN, RECORDING, PROFILER)}
        for name, times in rest.items():
            seconds = [time * _SECONDS for time in times if time]
            if seconds:
                yield Row(name, "", name, stage, "", "", len(seconds), len(seconds), sum(seconds), statistics.median(seconds))


def _medians(steps: Sequence[Step], key: Callable[[Executed], Any]) -> dict[Any, float]:
    """Seconds that a step spends on what has a key: the median over the steps in which it occurs."""
    found: dict[Any, list[int]] = {}
    for step in steps:
        sums: dict[Any, int] = {}
        for call in step.calls:
            name = key(call.node)
            sums[name] = sums.get(name, 0) + call.time
        for name, time in sums.items():
            found.setdefault(name, []).append(time)
    return {name: statistics.median(times) * _SECONDS for name, times in found.items()}


def _blank(node: Executed) -> Row:
    """A row without figures, for its keys."""
    return Row(node.name, node.op, node.site, "", node.kernel, node.why, 0, 0, 0.0, 0.0)


def _joined(texts: Iterable[str]) -> str:
    every = [text for text in dict.fromkeys(texts) if text]
    return ", ".join(every[:3]) + (f" and {len(every) - 3} more" if len(every) > 3 else "")
