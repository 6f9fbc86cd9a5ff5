"""The ladder: what each rung compares, that a wrong edit falls from it, and the formulas of the passes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import actgraph as ag
from actgraph.cli.verify_ladder import check_hooks, check_ladder
from actgraph.formats.artifacts import Artifact
from actgraph.passes.steer.austeer import UnitMomentum
from actgraph.pipeline import Pipeline
from tests import zoo
from tests.passes.conftest import in_dialect
from tests.passes.planes import a_plane

Cli = Callable[..., Any]
SITE = "blocks.1.resid_post"
RNG = np.random.default_rng(5)
VECTOR = "[" + ", ".join(repr(float(v)) for v in RNG.normal(size=zoo.WIDTH)) + "]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    basis = np.linalg.qr(RNG.normal(size=(zoo.WIDTH, 2)))[0].astype(np.float32)
    notes = {"site": SITE, "mean": 0.5, "deviation": 0.3}
    Artifact("kif_signature", {"directions": basis}, notes).save(folder / "kif")
    Artifact("ci_factors", {SITE: basis.T}, {"factors": ["a", "b"]}).save(folder / "ci")
    UnitMomentum({SITE: np.linspace(-1, 1, zoo.WIDTH).astype(np.float32)}).save(folder / "units")
    a_plane(folder, [SITE], [SITE], width=zoo.WIDTH)
    return folder


PASSES = [
    "steer{vector=V site=S scale=2}", "steer{vector=V site=S norm=restore}", "steer{vector=V site=S norm=relative scale=-0.5}",
    "steer{vector=V site=S where='1: ! prompt[-1]'}", "ablate{direction=V site=S}",
    "ablate{direction=V site=S scale=2 where=2:}",
    "kif{signature=FOLDER/kif}", "kif{signature=FOLDER/kif gate=projection where=generated}",
    "ci_parametric{factors=FOLDER/ci alpha=[2.0, -1.0]}", "ci_parametric{factors=FOLDER/ci alpha=[2.0, -1.0] norm=restore}",
    "angular_steer{plane=FOLDER/plane5.safetensors angle=40}",
    "angular_steer{plane=FOLDER/plane5.safetensors angle=40 adaptive=true threshold=0.1 scale=0.5}",
    "selective_steer{plane=FOLDER/plane5.safetensors angle=40 where=:4}",
    "selective_steer{plane=FOLDER/plane5.safetensors mode=reflect}", "austeer{units=FOLDER/units k=4}",
]  # fmt: skip


def step_of(text: str, folder: Path) -> Any:
    filled = text.replace("FOLDER", str(folder)).replace("=V", f"={VECTOR}").replace("=S", f"={SITE}").replace("'", '"')
    return Pipeline.of(filled).passes[0]


@pytest.mark.parametrize("dialect", ["fx", "onnx"])
@pytest.mark.parametrize("text", PASSES)
def test_graphs_equal_their_formulas(text: str, dialect: str, folder: Path) -> None:
    graph, step = in_dialect("llama", dialect), step_of(text, folder)
    made = ag.run(graph, [step], parity="none").graph
    (check,) = check_hooks(step, graph, made, 1e-4)
    assert check.ok and check.checked and check.change is not None, check
    assert float(check.detail.rsplit(" ", 1)[1]) > 1e-3, "the edit moves the outputs"
    wrong = ag.run(graph, f"steer{{vector={VECTOR} site=blocks.0.resid_post}}", parity="none").graph
    (check,) = check_hooks(step, graph, wrong, 1e-4)
    assert not check.ok and check.checked


def test_what_has_no_formula_does_not_count(folder: Path) -> None:
    graph = zoo.captured("llama")
    for text in ("steer{vector=V site=S scale=input}", "kif{signature=FOLDER/kif gate=input}"):
        step = step_of(text, folder)
        (check,) = check_hooks(step, graph, ag.run(graph, [step], parity="none").graph, 1e-4)
        assert check.ok and not check.checked and check.verdict == "-"
    assert not list(check_hooks(Pipeline.of("tap{site=embed}").passes[0], graph, graph, 1e-4))


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_rungs_of_an_edited_model(model: str) -> None:
    graph = zoo.captured(model)
    made = ag.run(graph, f'steer{{vector={VECTOR} site={SITE} where="prompt[-1] | generated ! row(1)"}}', parity="none").graph
    checks = list(check_ladder(made, 1e-4))
    assert [check.what for check in checks] == [
        "a row of a padded batch = the row alone", "padding on the left = on the right", "with a cache = without",
        "a prompt in chunks of 2 = at once",
    ]  # fmt: skip
    assert all(check.ok and check.checked for check in checks), checks


def test_an_edit_by_place_falls() -> None:
    """An edit of the first places of a call, whatever tokens they hold: wrong behind padding, caches and chunks."""
    graph = zoo.captured("llama").clone()
    with graph.edit("wrong") as editor:
        value = editor.site_value(graph.site(SITE))
        first = editor.insert("slice", [value], {"axis": 1, "start": 0, "end": 1}).output
        editor.insert_at(graph.site(SITE), "add", [first], keep=[first.producer])  # type: ignore[list-item]
    failed = [check.what for check in check_ladder(graph, 1e-4) if not check.ok]
    assert "padding on the left = on the right" in failed


def test_other_models_have_no_rungs() -> None:
    assert not list(check_ladder(zoo.captured("resnet"), 1e-4))


def test_the_command(cli: Cli, model: Path, tmp_path: Path) -> None:
    path = ag.SteeringVector({"blocks.2.resid_post": np.ones(64, np.float32)}).save(tmp_path / "v.safetensors")
    shown = cli("verify", model, "-p", f"steer{{vector={path} where=generated}}", "--json")
    what = [check["what"] for check in shown.json["checks"]]
    assert shown.code == 0 and any("hooks" in each for each in what) and any("chunks" in each for each in what)
    last = shown.json["checks"][-1]
    assert last["what"] == "what the passes cost" and "ms before" in last["detail"]
    assert all(check["seconds"] is not None for check in shown.json["checks"] if check["checked"])
