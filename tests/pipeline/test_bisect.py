"""Bisect finds the first pass that breaks a predicate, and tries no more prefixes than a binary search."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import actgraph as ag
from actgraph.errors import InputError
from actgraph.graph import Graph
from actgraph.pipeline import Pass, Pipeline
from actgraph.pipeline.bisect import Verdict, bisect, parity, perplexity_below, runs
from tests import zoo
from tests.pipeline import toys
from tests.pipeline.toys import Crash, Measure, Scale, Tidy


def steps(bad: int, total: int) -> Pipeline:
    """Harmless passes, and one at ``bad`` that triples an output."""
    passes: list[Pass] = [
        Scale(factor=3, site="linear.1") if i == bad else Scale(factor=1 + 1e-7 * (i + 1)) for i in range(total)
    ]
    return Pipeline(passes)


@settings(max_examples=8, deadline=None)
@given(total=st.integers(1, 9), data=st.data())
def test_the_first_bad_pass_is_found_by_binary_search(total: int, data: st.DataObject) -> None:
    bad = data.draw(st.integers(0, total - 1))
    graph = toys.net()
    report = bisect(graph, steps(bad, total), parity(graph, 1e-3))
    assert report.index == bad
    assert report.culprit == "toy_scale{factor=3.0 site=linear.1}"
    assert len(report.trials) <= 2 + total.bit_length() + 1
    tried = [trial.passes for trial in report.trials]
    assert len(set(tried)) == len(tried)
    assert {bad, bad + 1} <= set(tried)  # good before it, bad with it: both were seen


def test_the_search_is_logarithmic_in_the_judgements() -> None:
    graph = toys.net()
    report = bisect(graph, steps(8, 9), parity(graph, 1e-3))
    assert [trial.passes for trial in report.trials] == [0, 9, 4, 6, 7, 8]
    assert report.index == 8


def test_a_good_pipeline_is_said_to_be_good() -> None:
    graph = toys.net()
    report = bisect(graph, "toy_scale{factor=1.0000001}, toy_tidy", parity(graph, 1e-3))
    assert not report.found
    assert "every prefix that was tried is good" in str(report)
    assert [trial.passes for trial in report.trials] == [0, 2]


def test_a_crash_is_found_whatever_was_asked() -> None:
    graph = toys.net()
    pipeline = Pipeline([Scale(factor=1.0000001), Tidy(), Crash(), Tidy(), Tidy()])
    report = bisect(graph, pipeline, runs(graph))
    assert (report.index, report.culprit) == (2, "toy_crash")
    assert "ZeroDivisionError" in report.reason


def test_a_pass_before_the_crash_may_be_the_first_bad_one() -> None:
    graph = toys.net()
    pipeline = Pipeline([Tidy(), Scale(factor=3, site="linear.1"), Tidy(), Crash()])
    assert bisect(graph, pipeline, parity(graph, 1e-3)).index == 1


def test_a_graph_that_does_not_run_or_is_no_longer_finite_is_bad() -> None:
    graph = toys.net()
    report = bisect(graph, "toy_tidy, toy_scale{factor=inf}, toy_tidy", runs(graph))
    assert (report.index, report.reason) == (1, "output is no longer finite")


def test_a_predicate_of_ones_own_may_return_a_bool_or_raise() -> None:
    graph = toys.net()

    def few_nodes(candidate: Graph) -> bool:
        return len(candidate.nodes()) <= len(graph.nodes()) + 1

    def raises(candidate: Graph) -> Verdict:
        if len(candidate.nodes()) > len(graph.nodes()) + 1:
            raise ValueError("too many\nnodes")
        return Verdict(True)

    pipeline = "toy_scale{factor=2}, toy_scale{factor=3}, toy_scale{factor=4}"
    assert bisect(graph, pipeline, few_nodes).index == 1
    report = bisect(graph, pipeline, raises)
    assert (report.index, report.reason) == (1, "ValueError: too many")


def test_equal_passes_and_calibration_work_along_prefixes() -> None:
    graph = toys.net()
    pipeline = Pipeline([Measure(), Scale(factor=2, site="linear.1"), Scale(factor=2, site="linear.1"), Measure()])
    report = bisect(graph, pipeline, parity(graph, 1.5), toys.X)
    assert report.index == 2
    assert graph.history == []


def test_an_input_that_is_bad_already_is_an_error() -> None:
    graph = toys.net()
    with pytest.raises(InputError, match="is bad before any pass ran: no"):
        bisect(graph, "toy_tidy", lambda candidate: Verdict(False, "no"))


def test_the_folder_gets_the_report_and_both_graphs(tmp_path: Path) -> None:
    graph = toys.net()
    report = bisect(graph, steps(1, 3), parity(graph, 1e-3), folder=tmp_path)
    assert json.loads((tmp_path / "bisect.json").read_text())["index"] == report.index == 1
    good, bad = (tmp_path / "last-good.txt").read_text(), (tmp_path / "first-bad.txt").read_text()
    assert "3.0" in str(report)
    assert bad.count("by toy_scale") == good.count("by toy_scale") + 1
    assert [Path(path).name for path in report.files] == ["last-good.pt2", "first-bad.pt2"] and not report.problems
    loaded = [ag.load(path) for path in report.files]
    assert [len(each.history) for each in loaded] == [1, 2]
    before, after = (each.run(toys.X)["output"] for each in loaded)
    np.testing.assert_allclose(after, 3 * before, rtol=1e-5)


def test_a_graph_that_cannot_be_saved_does_not_hide_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = toys.net()

    def refuse(self: Graph, path: Path) -> None:
        raise ValueError("no way\nto write it")

    monkeypatch.setattr(type(graph), "save", refuse)
    report = bisect(graph, steps(1, 3), parity(graph, 1e-3), folder=tmp_path)
    assert report.index == 1 and report.files == []
    assert f"not written: {tmp_path / 'first-bad.pt2'}: no way" in str(report)
    assert json.loads((tmp_path / "bisect.json").read_text())["problems"] == report.problems


def test_a_perplexity_bound_on_the_real_model() -> None:
    graph = zoo.captured("stories260k")
    texts = ["Once upon a time there was a little girl named Lily. She loved to play outside in the park."]
    pipeline = "quantize, toy_scale{factor=0.2 site=blocks.2.mlp.out}, dce"
    good = perplexity_below(1e9, texts)(graph)
    assert isinstance(good, Verdict)
    assert good.value is not None
    report = bisect(graph, pipeline, perplexity_below(1.05 * good.value, texts))
    assert report.index == 1
    assert "perplexity" in report.reason


def test_the_report_as_json_names_the_pass_in_fields_of_its_own() -> None:
    graph = toys.net()
    data = json.loads(bisect(graph, steps(1, 3), parity(graph, 1e-3)).to_json())
    assert (data["found"], data["index"], data["step"]) == (True, 1, 2)
    assert (data["culprit_name"], data["culprit"]) == ("toy_scale", "toy_scale{factor=3.0 site=linear.1}")
    data = bisect(graph, "toy_tidy", parity(graph, 1e-3)).to_dict()
    assert (data["found"], data["step"], data["culprit_name"]) == (False, None, "")


def test_parity_about_nothing_is_not_good() -> None:
    graph = toys.net()
    nothing = parity(graph, 1e-3, {"x": np.full((2, 4), np.nan, np.float32)})
    with pytest.raises(InputError, match="is bad before any pass ran: output: nothing compared, all NaN"):
        bisect(graph, "toy_scale{factor=3}", nothing)
