"""Which passes share a forward over the corpus: only those between which no value changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from actgraph.calibrate import Request, Statistics
from actgraph.errors import SiteError
from actgraph.graph import Graph
from actgraph.pipeline import Pass, PassManager, Pipeline
from actgraph.pipeline.calibration import Calibrator
from tests.pipeline import toys
from tests.pipeline.toys import Measure, Scale, Tidy


def run(*passes: Pass) -> tuple[list[float], int]:
    Measure.seen.clear()
    report = PassManager(passes, toys.X, calibration={"cache": False}).run(toys.net()).report
    return list(Measure.seen), report.forwards


def test_passes_that_change_nothing_share_one_forward() -> None:
    seen, forwards = run(Measure(), Tidy(), Measure(kind="max"), Tidy(), Measure(site="linear.1"))
    assert forwards == 1
    apart = [run(step)[0][0] for step in (Measure(), Measure(kind="max"), Measure(site="linear.1"))]
    assert seen == apart


def test_a_pass_that_changes_values_ends_the_group() -> None:
    seen, forwards = run(Measure(), Measure(kind="max"), Scale(factor=2), Measure(), Tidy(), Measure(kind="max"))
    assert forwards == 2
    assert seen[2] == pytest.approx(2 * seen[0], rel=1e-6)
    assert seen[3] == pytest.approx(2 * seen[1], rel=1e-6)


def test_sharing_and_not_sharing_give_the_same_result() -> None:
    steps: list[Pass] = [
        Measure(),
        Tidy(),
        Measure(site="linear.1"),
        Scale(factor=3),
        Measure(site="linear.1"),
        Measure(kind="mean"),
    ]
    shared, forwards = run(*steps)
    graph, apart = toys.net(), []
    for index, step in enumerate(steps):
        Measure.seen.clear()
        graph = PassManager(steps, toys.X, calibration={"cache": False}).run(graph, start=index, stop=index + 1).graph
        apart += Measure.seen
        assert step is steps[index]
    assert forwards == 2
    assert shared == pytest.approx(apart, rel=1e-6)


def test_passes_that_ask_for_nothing_run_nothing() -> None:
    assert run(Tidy(), Scale(factor=2)) == ([], 0)


class _Log:
    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def collect(self, graph: Graph, requests: list[Request]) -> Statistics:
        self.asked.append([str(request) for request in requests])
        return Statistics({request: request.accumulator() for request in requests}, 3, 9)


class Late(Measure):
    """Can only say what it needs once the pass before has run."""

    ready: bool = False

    def requests(self, graph: Graph) -> Sequence[Request]:
        if not _LATE["ready"]:
            raise SiteError("not there yet")
        return super().requests(graph)


_LATE: dict[str, Any] = {}


def test_a_later_pass_that_cannot_say_yet_is_asked_again() -> None:
    _LATE["ready"] = False
    log = _Log()
    pipeline = Pipeline([Measure(), Late(kind="max")])
    calibrator = Calibrator(log.collect)
    graph = toys.net()
    calibrator.statistics(graph, pipeline, 0)
    calibrator.ran(pipeline.passes[0])
    _LATE["ready"] = True
    found = calibrator.statistics(graph, pipeline, 1)
    assert log.asked == [["absmax of linear.0"], ["max of linear.0"]]
    assert found is not None
    assert (found.documents, found.tokens) == (3, 9)


def test_only_what_is_missing_is_collected_later() -> None:
    log = _Log()
    pipeline = Pipeline([Measure(), Measure(kind="max"), Measure()])
    calibrator = Calibrator(log.collect)
    for index, step in enumerate(pipeline):
        assert calibrator.statistics(toys.net(), pipeline, index) is not None
        calibrator.ran(step)
    assert log.asked == [["absmax of linear.0", "max of linear.0"]]
    assert calibrator.forwards == 1


def test_nothing_is_collected_ahead_of_a_pass_that_changes_values() -> None:
    log = _Log()
    pipeline = Pipeline([Measure(), Scale(factor=2), Measure(kind="max")])
    calibrator = Calibrator(log.collect)
    for index, step in enumerate(pipeline):
        calibrator.statistics(toys.net(), pipeline, index)
        calibrator.ran(step)
    assert log.asked == [["absmax of linear.0"], ["max of linear.0"]]
