"""The manager: what runs, what is refused, what is left of a failure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

import actgraph as ag
from actgraph.errors import ActgraphError, InputError, OptionError, ParityError, PassError, SiteError, VerifyError
from actgraph.graph import Graph
from actgraph.pipeline import Pass, PassContext, PassManager, PassResult
from actgraph.pipeline.instruments import Instrument, PrintIR, Run
from actgraph.pipeline.reproducer import rerun
from tests.pipeline import toys

CORPUS = toys.X


def run(pipeline: Any, graph: Graph | None = None, **options: Any) -> ag.RunResult:
    return PassManager(pipeline, CORPUS, **options).run(graph or toys.net())


def test_the_input_is_not_modified_and_the_result_is() -> None:
    graph = toys.net()
    before, output = graph.text(), graph.run(toys.X)["output"]
    result = run("toy_scale{factor=2 site=linear.1}", graph)
    assert graph.text() == before
    assert graph.history == []
    np.testing.assert_allclose(result.graph.run(toys.X)["output"], 2 * output, rtol=1e-6)


def test_history_and_provenance_say_what_was_done() -> None:
    result = run("toy_scale{factor=2}, toy_tidy")
    assert [(r.name, r.text, r.counts) for r in result.graph.history] == [
        ("toy_scale", "toy_scale{factor=2.0}", {"scaled": 1})
    ]  # cleanup that found nothing leaves no line
    assert result.graph.history[0].version
    made = [node for node in result.graph.nodes() if node.origin.created_by]
    assert [(node.origin.created_by, node.origin.options) for node in made] == [("toy_scale", "toy_scale{factor=2.0}")]


def test_an_empty_pipeline_is_a_copy() -> None:
    graph = toys.net()
    result = run("", graph)
    assert result.graph is not graph
    assert result.graph.text() == graph.text()
    assert result.report.rows == []


def test_a_pass_that_matched_nothing_is_an_error_that_says_why() -> None:
    with pytest.raises(PassError, match=r"pass 2 \(toy_nothing\): nothing matched.*linear\.0: it is too small"):
        run("toy_tidy, toy_nothing")


class Silent(toys.Scale):
    """Edits like Scale and counts nothing."""

    name: ClassVar[str] = "toy_silent"

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        super().run(graph, context)
        return PassResult()


def test_a_pass_that_edits_and_counts_nothing_is_told_that_counts_are_what_it_says() -> None:
    with pytest.raises(PassError, match=r"pass 1 \(toy_silent\): it edited the graph and counted nothing.*result\.counts\["):
        run(Silent(factor=2))


def test_running_a_recipe_on_its_own_output_is_an_error_and_cleanup_the_identity() -> None:
    once = run("toy_scale{factor=2}, toy_tidy").graph
    with pytest.raises(PassError, match=r"toy_scale\{factor=2.0\} was applied to net before"):
        run("toy_scale{factor=2}, toy_tidy", once)
    again = run("toy_tidy", once).graph
    assert again.text() == once.text()
    assert again.content_hash() == once.content_hash()
    assert run("toy_scale{factor=3}", once).graph.history[-1].text == "toy_scale{factor=3.0}"


def test_equal_passes_in_one_pipeline_compose_if_they_may_and_are_an_error_if_not() -> None:
    output = toys.net().run(toys.X)["output"]
    twice = run("toy_scale{factor=2 site=linear.1}, toy_scale{factor=2 site=linear.1}").graph
    np.testing.assert_allclose(twice.run(toys.X)["output"], 4 * output, rtol=1e-6)
    with pytest.raises(PassError, match="is in the pipeline twice"):
        run("toy_crash, toy_crash")


def test_a_pass_for_another_dialect_is_refused_before_anything_runs() -> None:
    with pytest.raises(PassError, match=r"pass 2 \(toy_onnx_only\) takes onnx graphs, and net is fx"):
        run("toy_crash, toy_onnx_only")


@pytest.mark.parametrize("option", [{"verify": "always"}, {"parity": "maybe"}])
def test_unknown_modes_are_refused(option: dict[str, str]) -> None:
    with pytest.raises(OptionError):
        PassManager("toy_tidy", **option)  # type: ignore[arg-type]


def test_user_mistakes_keep_their_kind_and_name_the_pass() -> None:
    with pytest.raises(SiteError, match=r"^pass 1 \(toy_scale\): ") as caught:
        run("toy_scale{site=linear.7}")
    assert "reproducer" not in str(caught.value)


def test_statistics_reach_the_pass_that_asked() -> None:
    result = run("toy_measure")
    hidden = toys.X["x"] @ _weight("up.weight").T + _weight("up.bias")
    assert toys.Measure.seen == [pytest.approx(float(np.abs(hidden).max()), rel=1e-5)]
    assert result.report["toy_measure"].statistics == 1
    assert result.report.documents == 32


def _weight(name: str) -> Any:
    graph = toys.net()
    return graph.read(next(p for p in graph.parameters() if name in graph.aliases(p)))


def test_each_pass_is_calibrated_on_what_the_former_ones_left() -> None:
    run("toy_measure, toy_scale{factor=3}, toy_measure{kind=max}, toy_measure")
    before, _, after = toys.Measure.seen
    assert after == pytest.approx(3 * before, rel=1e-6)


# --- instruments -----------------------------------------------------------------------------------------------------------


class Recorder(Instrument):
    """Writes down which hook was called."""

    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def start(self, run: Run) -> None:
        self.log.append(f"{self.name} start")

    def before(self, run: Run, step: Pass) -> None:
        self.log.append(f"{self.name} before {step.name}")

    def after(self, run: Run, step: Pass, result: PassResult) -> None:
        self.log.append(f"{self.name} after {step.name} {sum(result.counts.values())}")

    def failed(self, run: Run, step: Pass, error: BaseException) -> None:
        self.log.append(f"{self.name} failed {step.name} {type(error).__name__}")

    def finish(self, run: Run) -> None:
        self.log.append(f"{self.name} finish")


def test_instruments_are_nested_around_each_pass() -> None:
    log: list[str] = []
    run("toy_scale", instruments=[Recorder(log, "a"), Recorder(log, "b")])
    around = ["a before toy_scale", "b before toy_scale", "b after toy_scale 1", "a after toy_scale 1"]
    assert log == ["a start", "b start", *around, "b finish", "a finish"]
    log.clear()
    with pytest.raises(PassError):
        run("toy_scale, toy_crash", instruments=[Recorder(log, "a")])
    assert log[-1] == "a failed toy_crash ZeroDivisionError"


def test_nodes_without_provenance_are_an_error() -> None:
    with pytest.raises(VerifyError, match="does not say where it comes from"):
        run("toy_anonymous", reproducer=False)


def test_printing_after_change_writes_numbered_files(tmp_path: Path) -> None:
    run("toy_scale{factor=2}, toy_tidy, toy_scale{factor=3}", instruments=[PrintIR("changed", tmp_path)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000-input.txt", "001-toy_scale.txt", "003-toy_scale.txt"]
    assert (tmp_path / "001-toy_scale.txt").read_text() != (tmp_path / "000-input.txt").read_text()


def test_printing_all_and_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("toy_scale{factor=2}, toy_tidy", instruments=[PrintIR("all", tmp_path)])
    assert (tmp_path / "002-toy_tidy-unchanged.txt").exists()
    run("toy_scale{factor=2}, toy_tidy", instruments=[PrintIR("toy_tidy")])
    printed = capsys.readouterr().err
    assert "// after 2. toy_tidy (unchanged)" in printed
    assert "after 1." not in printed
    with pytest.raises(PassError):
        run("toy_crash", instruments=[PrintIR("changed", tmp_path)], reproducer=False)
    assert (tmp_path / "001-toy_crash-failed.txt").exists()


def test_each_mode_of_verification_runs_the_verifier_as_often_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(Graph, "verify", lambda self: calls.append(self.name))
    for mode, times in (("none", 0), ("boundary", 2), ("each", 4)):
        calls.clear()
        run("toy_scale{factor=2}, toy_tidy, toy_scale{factor=3}", verify=mode)
        assert len(calls) == times


def test_a_graph_that_a_pass_broke_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def verify(graph: Graph) -> None:
        if graph.site_table and any(node.origin.created_by for node in graph.nodes()):
            raise VerifyError("broken")

    monkeypatch.setattr(Graph, "verify", verify)
    with pytest.raises(VerifyError, match=r"pass 1 \(toy_scale\): broken"):
        run("toy_scale{factor=2}, toy_tidy", verify="each", reproducer=False)


# --- parity ----------------------------------------------------------------------------------------------------------------


def test_parity_measures_declared_changes() -> None:
    report = run("toy_scale{factor=1.5 site=linear.1}, toy_scale{factor=2 site=linear.1}").report
    moved = [row.change.relative for row in report.rows if row.change is not None]
    assert moved == [pytest.approx(0.5, rel=1e-5), pytest.approx(1.0, rel=1e-5)]
    assert report.change is not None
    assert report.change.relative == pytest.approx(2.0, rel=1e-5)
    assert report.change.output == "output"


@pytest.mark.parametrize("mode", ["each", "auto"])
def test_a_pass_that_breaks_its_promise_is_an_error(mode: str) -> None:
    with pytest.raises(
        ParityError, match=r"pass 1 \(toy_scale\): the output output moved by 0\.01 .* exact outputs within 1e-05"
    ):
        run("toy_scale{factor=1.01 site=linear.1 claim=exact}", parity=mode, reproducer=False)
    with pytest.raises(ParityError, match=r"'the site is scaled' within 0\.01"):
        run("toy_scale{factor=1.02 site=linear.1 claim=small}", parity=mode, reproducer=False)
    run("toy_scale{factor=1.009 site=linear.1 claim=small}, toy_scale{site=linear.1 claim=exact}", parity=mode)


def test_parity_may_be_left_out_or_be_of_the_ends_only() -> None:
    report = run("toy_scale{factor=1.01 claim=exact}", parity="none").report
    assert report.parity == "not checked"
    assert report.rows[0].change is None
    assert "not checked" in str(report)
    report = run("toy_scale{factor=2 site=linear.1}, toy_scale{factor=3 site=linear.1}", parity="boundary").report
    assert [row.change for row in report.rows] == [None, None]
    assert report.change is not None
    assert report.change.relative == pytest.approx(5.0, rel=1e-5)


def test_large_models_are_not_run_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actgraph.pipeline.parity.LARGE", 10)
    assert "not checked: the model has" in run("toy_scale{factor=2}").report.parity
    assert run("toy_scale{factor=2}", parity="each").report.rows[0].change is not None


def test_parity_runs_on_given_inputs() -> None:
    zeros = {"x": np.zeros((1, 4), np.float32)}
    report = run("toy_scale{factor=2 site=linear.1}", inputs=zeros).report
    assert "x [1, 4]" in report.parity
    with pytest.raises(InputError, match="does not run on sample inputs"):
        run("toy_scale{factor=2}", inputs={"y": zeros["x"]}, parity="each")


# --- reproducers -----------------------------------------------------------------------------------------------------------


def test_a_crash_leaves_a_folder_that_shows_it_again(tmp_path: Path) -> None:
    with pytest.raises(
        PassError, match=r"pass 2 \(toy_crash\) failed: ZeroDivisionError: division by zero \(reproducer in "
    ) as caught:
        run("toy_scale{factor=2}, toy_crash, toy_tidy", reproducer=tmp_path, seed=7)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    (folder,) = tmp_path.iterdir()
    assert str(folder) in str(caught.value)
    record = json.loads((folder / "reproducer.json").read_text())
    assert record["pipeline"] == "toy_scale{factor=2.0}, toy_crash"
    assert record["seed"] == 7
    assert record["error"]["type"] == "ZeroDivisionError"
    assert "torch" in record["versions"]
    assert "raise ZeroDivisionError" in "".join(record["error"]["traceback"])


def test_broken_promises_leave_a_folder_in_the_default_place(tmp_path: Path) -> None:
    with pytest.raises(ParityError, match="reproducer in "):
        run("toy_scale{factor=1.01 site=linear.1 claim=exact}")
    assert len(list((tmp_path / "reproducers").iterdir())) == 1


def test_mistakes_leave_a_folder_only_where_one_is_named(tmp_path: Path) -> None:
    with pytest.raises(PassError):
        run("toy_nothing")
    assert not (tmp_path / "reproducers").exists()
    with pytest.raises(PassError, match="reproducer in"):
        run("toy_nothing", reproducer=tmp_path / "here")
    with pytest.raises(PassError) as caught:
        run("toy_crash", reproducer=False)
    assert "reproducer" not in str(caught.value)


def test_a_reproducer_that_cannot_be_written_does_not_hide_the_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(PassError, match=r"ZeroDivisionError: division by zero \(cannot write a reproducer"):
        run("toy_crash", reproducer=tmp_path / "file")


@pytest.mark.parametrize("pipeline", ["toy_scale{factor=2}, toy_crash", "toy_scale{factor=1.01 site=linear.1 claim=exact}"])
def test_rerunning_a_reproducer_raises_the_same_error(tmp_path: Path, pipeline: str) -> None:
    inputs = {"x": np.ones((3, 4), np.float32)}
    with pytest.raises(ActgraphError) as first:
        run(pipeline, reproducer=tmp_path, inputs=inputs)
    (folder,) = tmp_path.iterdir()
    assert json.loads((folder / "reproducer.json").read_text())["problems"] == []
    with pytest.raises(type(first.value)) as second:
        rerun(folder)
    assert second.value.message == first.value.message


def test_a_folder_that_is_no_reproducer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no reproducer"):
        rerun(tmp_path)
    (tmp_path / "reproducer.json").write_text("{}")
    with pytest.raises(InputError, match="holds no reproducer"):
        rerun(tmp_path)


# --- the report ------------------------------------------------------------------------------------------------------------


def test_the_report_is_a_table_json_and_html() -> None:
    report = run("toy_scale{factor=2}, toy_tidy").report
    text = str(report)
    assert "toy_scale{factor=2.0}" in text
    assert "scaled 1" in text
    assert "nothing to do" in text
    assert "the site is scaled" in text
    data = json.loads(report.to_json())
    assert data["rows"][0]["counts"] == {"scaled": 1}
    assert data["rows"][0]["details"] == [{"site": "linear.0", "factor": 2.0}]
    assert data["rows"][0]["nodes_after"] == data["rows"][0]["nodes_before"] + 1
    assert data["rows"][0]["seconds"] > 0
    assert data["rows"][0]["peak_bytes"] > 1e6
    assert data["versions"]["numpy"] == np.__version__
    page = report._repr_html_()
    assert page.count("<tr>") == 3
    assert "toy_scale{factor=2.0}" in page
    assert "linear.0" in report.details("toy_scale")


def test_the_report_escapes_html_and_keeps_json_valid() -> None:
    report = run("toy_scale{factor=2}").report
    report.rows[0].messages.append("<script>")
    report.rows[0].details.append({"value": float("nan"), "array": np.arange(2)})
    assert "<script>" not in report._repr_html_()
    assert json.loads(report.to_json())["rows"][0]["details"][-1] == {"value": None, "array": [0, 1]}


def test_the_report_on_a_terminal_is_a_rich_table() -> None:
    from rich.console import Console

    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(run("toy_scale{factor=2}").report)
    assert "toy_scale{factor=2.0}" in console.export_text()
