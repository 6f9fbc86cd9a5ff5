"""PassManager: runs a pipeline on a graph, watched by instruments, and says what happened."""

from __future__ import annotations

import contextlib
import gc
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actgraph.calibrate.statistics import Request, Statistics
from actgraph.errors import ActgraphError, InputError, OptionError, ParityError, PassError, VerifyError
from actgraph.graph.context import token_dims
from actgraph.graph.program import Program
from actgraph.graph.provenance import PassRecord, RecordedNote
from actgraph.graph.slots import slots_of
from actgraph.pipeline import reproducer as reproducers
from actgraph.pipeline.base import Pass, PassContext, PassResult
from actgraph.pipeline.calibration import Calibrator
from actgraph.pipeline.instruments import Instrument, Memory, Progress, Provenance, Run, Sizes, Timing, Verification
from actgraph.pipeline.parity import MODES, Parity
from actgraph.pipeline.pipeline import Pipeline, PipelineLike
from actgraph.pipeline.report import PassRow, Report, versions

if TYPE_CHECKING:
    from actgraph.graph import Graph


@dataclass(frozen=True)
class RunResult:
    """What was rewritten, and the reports of how it came about: one a graph, by name.

    A graph, or a program of one, is read as ``graph`` and ``report``; a program of several as ``program`` and ``reports``.
    Where a pass made a program of a graph, there is one ``report`` as long as no later pass ran on its graphs one by one.
    """

    rewritten: Graph | Program
    reports: Mapping[str, Report]

    @property
    def graph(self) -> Graph:
        """The only graph. Raises InputError where there are several."""
        return self.rewritten.graph if isinstance(self.rewritten, Program) else self.rewritten

    @property
    def program(self) -> Program:
        """The rewritten program; that of one graph where a graph was given."""
        return self.rewritten if isinstance(self.rewritten, Program) else Program.of(self.rewritten)

    @property
    def report(self) -> Report:
        """The report of the only graph, or of all where they have one in common. Raises InputError where there are several."""
        if len({id(report) for report in self.reports.values()}) != 1:
            raise InputError(f"there are {len(self.reports)} reports", f"choose one of reports: {', '.join(self.reports)}")
        return next(iter(self.reports.values()))

    def __repr__(self) -> str:
        return "\n".join([repr(self.rewritten), *map(str, self._distinct())])

    def _repr_html_(self) -> str:
        return "\n".join(report._repr_html_() for report in self._distinct())

    def _distinct(self) -> list[Report]:
        return list({id(report): report for report in self.reports.values()}.values())


class PassManager:
    """Runs ``pipeline``.

    corpus: what passes calibrate on (see ``actgraph.calibrate.corpora``); default: the packaged sample text.
    verify: ``"none"``, ``"boundary"`` (input and result) or ``"each"``.
    parity: ``"none"``, ``"boundary"``, ``"each"``, or ``"auto"`` (each, unless the model is large); inputs: what it runs on.
    seed: of everything random. calibration: options of ``calibrate.engine.collect`` (``batch_size``, ``max_tokens`` ...).
    progress: one line a pass on standard error, when that is a terminal. instruments: more of them, around the built-in ones.
    reproducer: where a pass that breaks leaves a folder (``True``: the default place, ``False``: nowhere). Mistakes in what was
    asked for (options, sites, files) leave none unless a folder is named.
    """

    def __init__(
        self,
        pipeline: PipelineLike,
        corpus: Any = None,
        *,
        verify: str = "boundary",
        parity: str = "auto",
        seed: int = 0,
        progress: bool = False,
        instruments: Sequence[Instrument] = (),
        calibration: dict[str, Any] | None = None,
        inputs: Mapping[str, Any] | None = None,
        reproducer: bool | str | Path = True,
    ) -> None:
        for name, mode, modes in (("verify", verify, ("none", "boundary", "each")), ("parity", parity, MODES)):
            if mode not in modes:
                raise OptionError(f"{name} is {mode!r}", f"choose {', '.join(modes)}")
        self.pipeline = Pipeline.of(pipeline)
        self.corpus = corpus
        self.verify = verify
        self.parity = parity
        self.seed = seed
        self.progress = progress
        self.calibration = dict(calibration or {})
        self.inputs = inputs
        self.instruments = list(instruments)
        self.reproducer = reproducer

    def run(self, graph: Graph | Program, *, start: int = 0, stop: int | None = None) -> RunResult:
        """Run the passes on a copy of ``graph``, which is not changed (tensors are shared until a pass replaces them).

        A program's graphs go through the pipeline one by one, each on its own calibration and checks; their weights are shared
        again afterwards (see ``Program.map``). ``inputs`` then serve each graph.
        start, stop: run a part of the pipeline only, on a graph that the passes before ``start`` have made.
        Raises what the passes raise, prefixed with the pass; PassError when a pass matched nothing, was applied before or takes
        another dialect; VerifyError or ParityError when a pass did not keep what it promises. For a program of several graphs
        the message begins with the graph's name, and a shared weight that they do not agree on is a PassError.
        """
        if isinstance(graph, Program) and len(graph) > 1:
            return RunResult(*self._run_each(graph, start, stop, self.inputs))
        member = graph.graph if isinstance(graph, Program) else graph
        rewritten, reports = self._run(member, start, stop, self.inputs)
        if isinstance(graph, Program) and not isinstance(rewritten, Program):
            return RunResult(
                Program(dict.fromkeys(graph.graphs, rewritten), graph.driver, graph.name),
                dict(zip(graph.graphs, reports.values(), strict=True)),
            )
        return RunResult(rewritten, reports)

    def _run_each(
        self, program: Program, start: int, stop: int | None, inputs: Mapping[str, Any] | None
    ) -> tuple[Program, dict[str, Report]]:
        """The pipeline on each graph of ``program``, whose weights are shared again afterwards."""
        reports: dict[str, Report] = {}
        names = iter(program.graphs)

        def rewrite(member: Graph) -> Graph:
            name = next(names)
            with _naming(name):
                rewritten, made = self._run(member, start, stop, inputs)
                if isinstance(rewritten, Program):
                    raise PassError("a graph of a program cannot become a program", "start from the single graph")
            (reports[name],) = made.values()
            return rewritten

        result = program.map(rewrite)
        if self.verify != "none":
            result.verify()
        return result, reports

    def _run(
        self, graph: Graph, start: int, stop: int | None, inputs: Mapping[str, Any] | None
    ) -> tuple[Graph | Program, dict[str, Report]]:
        """The pipeline on one graph, and from the pass on that makes a program of it on each graph of that."""
        begun = time.perf_counter()
        stop = len(self.pipeline) if stop is None else stop
        self._check(graph, start)
        report = Report(graph.name, graph.dialect, str(self.pipeline), seed=self.seed, versions=versions())
        run = Run(graph, graph.clone(), self.pipeline, report, self.seed)
        instruments = self._instruments(inputs)
        calibrator = Calibrator(lambda g, requests: self._collect(g, requests, report))
        program: Program | None = None
        for instrument in instruments:
            instrument.start(run)
        with _existing_objects_set_aside():
            for index in range(start, stop):
                step = self.pipeline.passes[index]
                run.index, run.row = index, PassRow(step.name, str(step))
                report.rows.append(run.row)
                program = self._step(run, step, calibrator, instruments)
                if program is not None:
                    break
        for instrument in reversed(instruments):
            instrument.finish(run)
        report.forwards = calibrator.forwards
        report.seconds = time.perf_counter() - begun
        report.notes = [note for note in run.graph.notes if not isinstance(note, RecordedNote)]
        if program is None:
            return run.graph, {graph.name: report}
        if run.index + 1 == stop:
            return program, dict.fromkeys(program.graphs, report)
        rest, later = self._run_each(program, run.index + 1, stop, None)  # inputs are those of the one graph
        return rest, {name: report.followed_by(found) for name, found in later.items()}

    def _instruments(self, inputs: Mapping[str, Any] | None) -> list[Instrument]:
        chosen: list[Instrument] = [*self.instruments]
        if self.progress and sys.stderr.isatty():
            chosen.append(Progress())
        chosen.append(Parity(self.parity, inputs))
        if self.verify != "none":
            chosen.append(Verification(self.verify))
        return [*chosen, Provenance(), Sizes(), Memory(), Timing()]

    def _step(self, run: Run, step: Pass, calibrator: Calibrator, instruments: Sequence[Instrument]) -> Program | None:
        """Run one pass; returns the program that it made of the graph, if it did."""
        row = run.row
        try:
            begun = time.perf_counter()
            statistics = calibrator.statistics(run.graph, run.pipeline, run.index)
            row.calibration_seconds = time.perf_counter() - begun
            row.statistics = len(statistics) if statistics is not None else 0
            for instrument in instruments:
                instrument.before(run, step)
            context = PassContext(seed=self.seed, statistics=statistics, text=row.text, name=step.name)
            result = step.run(run.graph, context)
            self._take(run, step, context, result)
            for instrument in reversed(instruments):
                instrument.after(run, step, result)
            begun = time.perf_counter()
            program = step.program(run.graph, result)
            if program is not None:
                if self.verify != "none":
                    program.verify()
                row.messages = list(result.messages)
                row.seconds += time.perf_counter() - begun
        except Exception as error:
            for instrument in reversed(instruments):
                instrument.failed(run, step, error)
            raise self._explained(run, step, error) from error
        calibrator.ran(step)
        return program

    @staticmethod
    def _take(run: Run, step: Pass, context: PassContext, result: PassResult) -> None:
        """The result into the report and the graph's history, where a pass that did nothing leaves no line."""
        row = run.row
        row.counts = {rule: int(count) for rule, count in result.counts.items()}
        row.declined, row.details, row.messages = list(result.declined), list(result.details), list(result.messages)
        row.expected_change = result.expected_change
        if any(row.counts.values()):
            record = PassRecord(step.name, row.text, dict(row.counts), run.report.versions["actgraph"])
            run.graph.history.append(record)
        elif not step.may_do_nothing:
            if not result.declined and context.edited:
                raise PassError(
                    "it edited the graph and counted nothing, and counts are how a pass says what it did",
                    'count each place in its result: result.counts["inserted"] += 1',
                )
            why = f": {result.declined[0].site}: {result.declined[0].reason}" if result.declined else ""
            raise PassError(f"nothing matched, so nothing was changed{why}", "widen `site`, or leave the pass out")

    def _explained(self, run: Run, step: Pass, error: Exception) -> ActgraphError:
        """The error with the pass named, and the reproducer's folder where there is one."""
        where = f"pass {run.index + 1} ({step.name})"
        expected = isinstance(error, ActgraphError) and not isinstance(error, (VerifyError, ParityError))
        named = not isinstance(self.reproducer, bool)
        hint = error.hint if isinstance(error, ActgraphError) else ""
        if named or (self.reproducer and not expected):
            left = self._reproduce(run, error)
            hint = f"{hint}; {left}" if hint else left
        if isinstance(error, ActgraphError):
            return _restated(error, f"{where}: {error.message.removeprefix(f'{step.name}: ')}", hint)
        return PassError(f"{where} failed: {type(error).__name__}: {_one_line(error)}", hint)

    def _reproduce(self, run: Run, error: Exception) -> str:
        base = None if isinstance(self.reproducer, bool) else self.reproducer
        prefix = self.pipeline[run.index + 1 - len(run.report.rows) : run.index + 1]  # from the pass that began on the source
        folder = reproducers.folder_for(base, run.source, prefix)
        settings = {"verify": self.verify, "parity": self.parity, "calibration": self.calibration}
        record = reproducers.Setting(self.seed, self.corpus, settings, self.inputs)
        try:
            problems = reproducers.write(folder, run.source, prefix, error, record)
        except InputError as failure:
            return failure.message
        return f"reproducer in {folder}" + (f", without all: {problems[0]}" if problems else "")

    def _check(self, graph: Graph, start: int) -> None:
        """What can be refused before anything runs. On a continued run the history holds this pipeline's own passes."""
        done = set() if start else {record.text for record in graph.history}
        seen: set[str] = set()
        for number, step in enumerate(self.pipeline, 1):
            where = f"pass {number} ({step.name})"
            if graph.dialect not in step.dialects:
                raise PassError(
                    f"{where} takes {' and '.join(sorted(step.dialects))} graphs, and {graph.name} is {graph.dialect}",
                    "apply it to the model in its other form",
                )
            text = str(step)
            if not step.may_do_nothing:
                if text in done:
                    raise PassError(f"{where}: {text} was applied to {graph.name} before", "start from the original model")
                if text in seen and not step.repeatable:
                    raise PassError(f"{where}: {text} is in the pipeline twice", "remove one of the two")
            seen.add(text)

    def _collect(self, graph: Graph, requests: list[Request], report: Report) -> Statistics:
        from actgraph.calibrate.corpora import Corpus
        from actgraph.calibrate.engine import collect

        if slots_of(graph):
            dims = token_dims(graph)
            one = dims is not None and dims[1:] == (1,)
            why = "computes one token at a time" if one else "has state, as a cache, which a corpus does not fill"
            raise PassError(
                f"it needs statistics, and {graph.name} {why}",
                "put it before the pass that adds the state (kv_cache)",
            )
        corpus = Corpus.of(self.corpus)
        found = collect(graph, requests, corpus, **self.calibration)
        report.corpus, report.documents, report.tokens = corpus.name, found.documents, found.tokens
        report.unit = corpus.unit
        return found


@contextlib.contextmanager
def _naming(graph: str) -> Iterator[None]:
    """Begin the messages of errors with the name of the graph."""
    try:
        yield
    except ActgraphError as error:
        raise _restated(error, f"{graph}: {error.message}", error.hint) from error


def _restated(error: ActgraphError, message: str, hint: str) -> ActgraphError:
    """The error in other words, of its own class where that takes no more than words."""
    kind = type(error) if type(error).__init__ is ActgraphError.__init__ else PassError
    return kind(message, hint)


#: Who has frozen objects: a run of ours that goes on, or somebody else, which is remembered. Counting them walks them all.
_FROZEN = {"by us": False, "by others": False}


@contextlib.contextmanager
def _existing_objects_set_aside() -> Iterator[None]:
    """Keep Python's garbage collector off the objects that exist already.

    Passes make many objects and few cycles, so that full collections set in again and again, and each walks all of the model,
    torch and transformers for nothing: that made the time of a pass depend on what was imported before.
    """
    if not any(_FROZEN.values()):
        _FROZEN["by others"] = gc.get_freeze_count() > 0
    if any(_FROZEN.values()):
        yield  # unfreezing is all or nothing
        return
    gc.freeze()
    _FROZEN["by us"] = True
    try:
        yield
    finally:
        _FROZEN["by us"] = False
        gc.unfreeze()


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else "no message"
