"""Bisect: the first pass of a pipeline that breaks something.

A predicate says whether a graph is good. The search is binary over prefixes of the pipeline and reuses the graphs of prefixes
that ran already; it assumes that what one pass breaks no later pass mends. Found is a pass ``n`` such that the prefix before
it was seen to be good and the prefix with it was seen to be bad. All state is in the objects here, and in ``folder`` if given.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from actgraph.errors import ActgraphError, InputError
from actgraph.graph.parity import compare, sample_inputs
from actgraph.pipeline.manager import PassManager
from actgraph.pipeline.pipeline import Pipeline, PipelineLike
from actgraph.pipeline.reproducer import SUFFIX

if TYPE_CHECKING:
    from actgraph.graph import Graph
    from actgraph.graph.program import Program


@dataclass(frozen=True)
class Verdict:
    """What a predicate says: good or bad, what it measured, and in words."""

    good: bool
    detail: str = ""
    value: float | None = None


#: Judges the graph after some passes; may return a bool. A predicate that raises says that the graph is bad.
Predicate = Callable[["Graph"], Verdict | bool]


@dataclass(frozen=True)
class Trial:
    """One prefix that was judged: the first ``passes`` passes."""

    passes: int
    good: bool
    detail: str = ""
    value: float | None = None


@dataclass
class BisectReport:
    """What was found.

    index: the first bad pass (from 0), ``None`` when the whole pipeline is good. culprit: that pass as pipeline text, and
    culprit_name its name; reason: why the predicate rejects it. trials: in the order of the search.
    files: the graphs written to the folder, and problems: those that could not be written.
    """

    graph: str
    pipeline: str
    index: int | None
    culprit: str = ""
    culprit_name: str = ""
    reason: str = ""
    trials: list[Trial] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def found(self) -> bool:
        return self.index is not None

    def to_dict(self) -> dict[str, Any]:
        """Plain values: the fields, ``found``, and ``step``, the number of the bad pass counted from 1 as reports do."""
        step = None if self.index is None else self.index + 1
        return {"found": self.found, "step": step, **asdict(self)}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        if self.index is None:
            head = f"{self.graph}: every prefix that was tried is good: {self.pipeline}"
        else:
            head = f"{self.graph}: pass {self.index + 1} is the first bad one: {self.culprit}\n  {self.reason}"
        rows = [f"  first {t.passes}: {'good' if t.good else 'bad'}{f' ({t.detail})' if t.detail else ''}" for t in self.trials]
        rows += [f"  written: {path}" for path in self.files] + [f"  not written: {problem}" for problem in self.problems]
        return "\n".join([head, *rows])


def bisect(
    graph: Graph | Program,
    pipeline: PipelineLike,
    predicate: Predicate,
    corpus: Any = None,
    *,
    seed: int = 0,
    calibration: dict[str, Any] | None = None,
    folder: str | Path | None = None,
) -> BisectReport:
    """Find the first pass after which ``predicate`` says that the graph is bad, or that fails itself.

    See ``parity``, ``perplexity_below`` and ``runs`` for predicates. folder: gets ``bisect.json``, and the last good and the
    first bad graph, as files that run (``last-good.onnx``, ``first-bad.onnx``; ``.pt2`` for torch graphs), and as text.
    There is no bad graph when the pass itself fails. Raises InputError when the predicate already rejects ``graph``,
    and for a program of several graphs.
    """
    graph = _single(graph)
    steps = Pipeline.of(pipeline)
    # Checks are the predicate's business here: a pass that breaks its own promise must not hide a later question.
    manager = PassManager(
        steps, corpus, verify="none", parity="none", seed=seed, calibration=calibration, reproducer=False
    )  # fmt: skip
    report = BisectReport(graph.name, str(steps), None)
    first = _judge(predicate, graph)
    report.trials.append(Trial(0, first.good, first.detail, first.value))
    if not first.good:
        raise InputError(f"{graph.name} is bad before any pass ran: {first.detail}", "check the predicate, or loosen its bound")
    search = _Search(manager, predicate, report, {0: graph})
    low, high = 0, len(steps) + 1  # prefix low is good; prefix high is bad, or not part of the pipeline
    probe = len(steps)
    while high - low > 1:
        good, reached = search.judge(probe)
        low, high = (reached, high) if good else (low, reached)
        probe = (low + high) // 2
    if high <= len(steps):
        culprit = steps.passes[high - 1]
        report.index, report.culprit, report.culprit_name = high - 1, str(culprit), culprit.name
        report.reason = next(trial.detail for trial in reversed(report.trials) if trial.passes == high)
    if folder is not None:
        _write(Path(folder), report, search.graphs.get(low), search.graphs.get(high))
    return report


def _single(graph: Graph | Program) -> Graph:
    """The graph, also of a program of one. Raises InputError for several, of which each may break at another pass."""
    from actgraph.graph.program import Program

    if not isinstance(graph, Program):
        return graph
    if len(graph) > 1:
        raise InputError(
            f"bisect takes one graph, and {graph.name} is a program of {len(graph)}", f"choose one of {', '.join(graph.graphs)}"
        )
    return graph.graph


class _Search:
    """Runs prefixes, starting from the longest one whose graph is known."""

    def __init__(self, manager: PassManager, predicate: Predicate, report: BisectReport, graphs: dict[int, Graph]) -> None:
        self.manager = manager
        self.predicate = predicate
        self.report = report
        self.graphs = graphs

    def judge(self, passes: int) -> tuple[bool, int]:
        """Whether the prefix is good, and its length (the length up to the failing pass, when one fails on the way)."""
        start = max(known for known in self.graphs if known <= passes)
        graph = self.graphs[start]
        for index in range(start, passes):
            try:
                graph = self.manager.run(graph, start=index, stop=index + 1).graph
            except Exception as error:
                message = error.message if isinstance(error, ActgraphError) else f"{type(error).__name__}: {error}"
                self.graphs[index] = graph
                before = self._verdict(index)
                if not before.good:
                    return False, index
                self.report.trials.append(Trial(index + 1, False, message))
                return False, index + 1
        self.graphs[passes] = graph
        return self._verdict(passes).good, passes

    def _verdict(self, passes: int) -> Trial:
        known = next((trial for trial in self.report.trials if trial.passes == passes), None)
        if known is not None:
            return known
        found = _judge(self.predicate, self.graphs[passes])
        trial = Trial(passes, found.good, found.detail, found.value)
        self.report.trials.append(trial)
        return trial


def _judge(predicate: Predicate, graph: Graph) -> Verdict:
    try:
        verdict = predicate(graph)
    except Exception as error:
        return Verdict(False, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}")
    return verdict if isinstance(verdict, Verdict) else Verdict(bool(verdict))


def _write(folder: Path, report: BisectReport, good: Graph | None, bad: Graph | None) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, graph in (("last-good", good), ("first-bad", bad)):
            if graph is None:
                continue
            (folder / f"{name}.txt").write_text(graph.text(), encoding="utf-8")
            path = folder / f"{name}{SUFFIX[graph.dialect]}"
            try:
                report.files.append(str(graph.save(path)))
            except Exception as error:  # a graph that a pass broke may be impossible to save, and the report is still wanted
                report.problems.append(f"{path}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
        (folder / "bisect.json").write_text(report.to_json(), encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror or error}") from error


def parity(
    graph: Graph | Program, tolerance: float = 1e-4, inputs: Mapping[str, Any] | None = None, seed: int = 0
) -> Predicate:
    """Good while all outputs stay within ``tolerance`` (relative to the largest of each) of those of ``graph``."""
    graph = _single(graph)
    chosen = dict(inputs) if inputs is not None else sample_inputs(graph, padding="both", seed=seed)

    def predicate(candidate: Graph) -> Verdict:
        found = compare(graph, candidate, [chosen], rtol=tolerance)
        if found.missing or not any(pair.compared or pair.problem for pair in found.outputs):
            return Verdict(False, found.problem)
        moved = float(found.max_rel)
        return Verdict(found.ok, f"outputs moved by {moved:.3g}, bound {tolerance:.3g}", moved if np.isfinite(moved) else None)

    return predicate


def perplexity_below(bound: float, corpus: Any = None, **options: Any) -> Predicate:
    """Good while the perplexity of ``corpus`` stays at or below ``bound``; options as in ``calibrate.perplexity``."""
    from actgraph.calibrate.perplexity import perplexity

    def predicate(candidate: Graph) -> Verdict:
        value = perplexity(candidate, corpus, **options)
        return Verdict(value <= bound, f"perplexity {value:.4g}, bound {bound:.4g}", value if np.isfinite(value) else None)

    return predicate


def runs(graph: Graph | Program, inputs: Mapping[str, Any] | None = None, seed: int = 0) -> Predicate:
    """Good while the graph verifies and runs with finite outputs (where those of ``graph`` are finite)."""
    graph = _single(graph)
    chosen = dict(inputs) if inputs is not None else sample_inputs(graph, padding="both", seed=seed)
    finite = {name for name, array in graph.run(chosen).items() if np.isfinite(array.astype(np.float64)).all()}

    def predicate(candidate: Graph) -> Verdict:
        candidate.verify()
        declared = {value.name for value in candidate.inputs()}
        outputs = candidate.run({name: array for name, array in chosen.items() if name in declared})
        broken = [name for name in sorted(finite & set(outputs)) if not np.isfinite(outputs[name].astype(np.float64)).all()]
        return Verdict(not broken, f"{broken[0]} is no longer finite" if broken else "")

    return predicate
