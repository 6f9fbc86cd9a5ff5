"""Instruments: what watches passes run. Passes themselves neither time nor print nor check.

The manager calls ``before`` in the order of its list and ``after``/``failed`` in reverse, so the last instrument is nearest to
the pass (timing is last, so it measures the pass alone).
"""

from __future__ import annotations

import contextlib
import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from actgraph.errors import VerifyError
from actgraph.graph.graph import parameter_bytes
from actgraph.pipeline.base import Pass, PassResult
from actgraph.pipeline.report import PassRow, Report

if TYPE_CHECKING:
    from actgraph.graph import Graph
    from actgraph.pipeline.pipeline import Pipeline


@dataclass
class Run:
    """One pipeline running: what instruments may look at. ``row`` is the report row of the pass at ``index``."""

    source: Graph
    graph: Graph
    pipeline: Pipeline
    report: Report
    seed: int = 0
    index: int = 0
    row: PassRow = field(default_factory=lambda: PassRow("", ""))


class Instrument:
    """Base class; every hook does nothing. ``after`` may raise to reject what the pass did."""

    def start(self, run: Run) -> None:
        """Before the first pass."""

    def before(self, run: Run, step: Pass) -> None:
        """Before each pass."""

    def after(self, run: Run, step: Pass, result: PassResult) -> None:
        """After each pass that succeeded."""

    def failed(self, run: Run, step: Pass, error: BaseException) -> None:
        """When the pass, or a check after it, raised."""

    def finish(self, run: Run) -> None:
        """After the last pass."""


class Timing(Instrument):
    """Seconds of each pass, without calibration and checks."""

    def before(self, run: Run, step: Pass) -> None:
        self._started = time.perf_counter()

    def after(self, run: Run, step: Pass, result: PassResult) -> None:
        run.row.seconds = time.perf_counter() - self._started


class Sizes(Instrument):
    """Numbers of nodes and bytes of parameters, before and after."""

    def before(self, run: Run, step: Pass) -> None:
        run.row.nodes_before, run.row.bytes_before = _sizes(run.graph)

    def after(self, run: Run, step: Pass, result: PassResult) -> None:
        run.row.nodes_after, run.row.bytes_after = _sizes(run.graph)


def _sizes(graph: Graph) -> tuple[int, int]:
    return len(graph.nodes()), sum(parameter_bytes(parameter) for parameter in graph.parameters())


class Memory(Instrument):
    """The process's memory high-water mark during each pass (since the process began, where the mark cannot be reset)."""

    def before(self, run: Run, step: Pass) -> None:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the high-water mark so far

    def after(self, run: Run, step: Pass, result: PassResult) -> None:
        run.row.peak_bytes = peak_memory()


def peak_memory() -> int:
    """The memory high-water mark of this process in bytes; 0 where the system does not tell."""
    try:
        found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        if found:
            return int(found.group(1)) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Verification(Instrument):
    """The verifier, at the boundary (input and result) or after each pass."""

    def __init__(self, mode: str) -> None:
        self.mode = mode

    def start(self, run: Run) -> None:
        run.graph.verify()

    def after(self, run: Run, step: Pass, result: PassResult) -> None:
        if self.mode == "each":
            run.graph.verify()

    def finish(self, run: Run) -> None:
        if self.mode == "boundary" and len(run.pipeline):
            run.graph.verify()


class Provenance(Instrument):
    """Every node that a pass made must say so."""

    def before(self, run: Run, step: Pass) -> None:
        self._known = {node.name for node in run.graph.nodes()}

    def after(self, run: Run, step: Pass, result: PassResult) -> None:
        for node in run.graph.nodes():
            if node.name not in self._known and not node.origin.created_by:
                raise VerifyError(
                    f"{step.name} made {node.name} ({node.op}), which does not say where it comes from",
                    "change graphs through context.edit(graph) only",
                )


class PrintIR(Instrument):
    """Canonical text after passes.

    which: ``"changed"`` (only after passes that changed the graph), ``"all"``, or a comma-separated list of pass names.
    folder: one numbered file a pass (and ``000-input.txt``) instead of ``stream`` (standard error).
    """

    def __init__(self, which: str = "changed", folder: str | Path | None = None, stream: IO[str] | None = None) -> None:
        self.which = which
        self.folder = Path(folder) if folder is not None else None
        self.stream = stream

    def start(self, run: Run) -> None:
        self._last = run.graph.text()
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "000-input.txt").write_text(self._last, encoding="utf-8")

    def after(self, run: Run, step: Pass, result: PassResult) -> None:
        text = run.graph.text()
        changed, self._last = text != self._last, text
        names = self.which.split(",")
        if (self.which == "changed" and changed) or self.which == "all" or step.name in names:
            self._emit(run, step, text, "" if changed else " (unchanged)")

    def failed(self, run: Run, step: Pass, error: BaseException) -> None:
        try:
            text = run.graph.text()
        except Exception as broken:  # a graph left broken by the pass must not hide the pass's own error
            text = f"(cannot be printed: {broken})"
        self._emit(run, step, text, " (failed)")

    def _emit(self, run: Run, step: Pass, text: str, remark: str) -> None:
        if self.folder is not None:
            name = f"{run.index + 1:03d}-{step.name}{remark.replace(' ', '-').replace('(', '').replace(')', '')}.txt"
            (self.folder / name).write_text(text, encoding="utf-8")
        else:
            print(f"// after {run.index + 1}. {step}{remark}\n{text}", file=self.stream or sys.stderr)


class Progress(Instrument):
    """One line a pass on standard error."""

    def __init__(self, write: Any = None) -> None:
        self.write = write or (lambda line: print(line, file=sys.stderr))

    def before(self, run: Run, step: Pass) -> None:
        self.write(f"[{run.index + 1}/{len(run.pipeline)}] {step}")
