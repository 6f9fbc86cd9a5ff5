"""The ladder: what each rung compares, that a wrong edit falls from it, and the formulas of the passes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

import actgraph as ag
from actgraph.cli.verify import check_pipeline
from actgraph.cli.verify_ladder import check_defaults, check_hooks, check_ladder, ladder_inputs
from actgraph.formats.artifacts import Artifact
from actgraph.passes.steer.austeer import UnitMomentum
from actgraph.passes.steer.guiding_giants import Controller
from actgraph.passes.steer.physics import Delta
from actgraph.passes.steer.steer import Steer
from actgraph.passes.steer.taugate import NeuronGates, TauGates
from actgraph.pipeline import Pipeline
from tests import zoo
from tests.passes.conftest import in_dialect
from tests.passes.planes import a_plane
from tests.saes import random_sae, write_sae

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
    rows = RNG.normal(size=(3, zoo.WIDTH)).astype(np.float32)
    Artifact("actadd_prompts", {SITE: rows}).save(folder / "prompts")
    Delta(SITE, rows[0].astype(np.float64)).save(folder / "delta")
    for gate in ("embedding", "activation"):
        arrays = {"vectors": rows, "centroids": rows}
        Artifact("guardit_clusters", arrays, {"site": SITE, "threshold": -1.0, "gate": gate}).save(folder / gate)
    for name, settings in (("sae", {}), ("normal", {"normalize_activations": "layer_norm"})):
        sae = random_sae("jumprelu", zoo.WIDTH, 12, **settings)  # type: ignore[arg-type]
        write_sae(folder / name, sae, model_name="", hook_name="blocks.1.hook_resid_post")
    first, second = rows[:2, :1].repeat(zoo.WIDTH, 1), rows[:2, :2]
    bias = np.ones(2, np.float32)
    Controller(("blocks.0.resid_post",), (SITE,), first, bias, second, bias, rows[0]).save(folder / "controller")
    gates = NeuronGates(np.zeros(zoo.HIDDEN, np.float32), np.full(zoo.HIDDEN, 2, np.float32))
    TauGates({"blocks.1.mlp.act": gates}, 4.0).save(folder / "gates")
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
    "actadd{prompts=FOLDER/prompts}", "actadd{prompts=FOLDER/prompts start=1 scale=-2 where='3 | generated'}",
    "physics_steer{delta=FOLDER/delta axis=-1}", "physics_steer{delta=FOLDER/delta axis=-1 alpha=-2 where=2:}",
    "sae_steer{sae=FOLDER/sae latents=[1, 5] mode=add value=[2.0, -1.0]}",
    "sae_steer{sae=FOLDER/sae latents=[3] mode=add value=9 where=generated}",
    "sae_steer{sae=FOLDER/sae latents=[0, 1, 2, 3] mode=clamp value=3 strength=0.5}",
    "sae_steer{sae=FOLDER/normal latents=[0, 1, 2, 3] mode=ablate where='all ! 1'}",
    "sae_steer{sae=FOLDER/normal latents=[0, 1, 2, 3] mode=scale value=[4, 1, 2, 3]}",
    "ci_parametric{factors=FOLDER/ci alpha=2}",
    "steer{vector=V site=S norm=relative scale=[-0.5]}",
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


NO_FORMULA = [
    "steer{vector=V site=S scale=input}", "kif{signature=FOLDER/kif gate=input}", "guardit{clusters=FOLDER/embedding}",
    "guardit{clusters=FOLDER/activation}", "guiding_giants{controller=FOLDER/controller}", "taugate{gates=FOLDER/gates}",
]  # fmt: skip


def test_what_has_no_formula_does_not_count(folder: Path) -> None:
    graph = zoo.captured("llama")
    for text in NO_FORMULA:
        step = step_of(text, folder)
        (check,) = check_hooks(step, graph, ag.run(graph, [step], parity="none").graph, 1e-4)
        assert check.ok and not check.checked and check.verdict == "-"
    assert not list(check_hooks(Pipeline.of("tap{site=embed}").passes[0], graph, graph, 1e-4))
    cached = ag.run(graph, "kv_cache{graphs=combined}", parity="none").graph
    step = step_of("steer{vector=V site=S where=2:}", folder)
    (check,) = check_hooks(step, cached, ag.run(cached, [step], parity="none").graph, 1e-4)
    assert check.ok and not check.checked and "cache" in check.detail


def test_an_off_option_that_is_given_at_run_time_is_off_by_default() -> None:
    """A number in its place would be another pass: ``amount=input`` names no experts."""
    graph = zoo.captured("mixtral_batched")
    checks = list(check_pipeline(graph, Pipeline.of("mote{mode=bias amount=input}"), None, None, 1e-4, quiet=True))
    assert all(check.ok for check in checks), checks
    assert "mote: defaults of its inputs = the graph before" in [check.what for check in checks if check.checked]


@pytest.mark.parametrize("dialect", ["fx", "onnx"])
@pytest.mark.parametrize("adapt", ["drop", "pad", "none"])
def test_fields_equal_their_formula(adapt: str, dialect: str, tmp_path: Path) -> None:
    """Space of fixed size or (with drop) of any, and a pattern that is smaller and larger."""
    torch.manual_seed(1)
    net = torch.nn.Sequential(torch.nn.Conv2d(2, 6, 3, padding=1), torch.nn.Tanh(), torch.nn.Conv2d(6, 2, 3, padding=1))
    space = ("height", "width") if adapt == "drop" else (None, None)
    graph = ag.trace(net.eval(), (torch.randn(2, 2, 8, 10),), dynamic={"input": ("batch", None, *space)}, name="field")
    shape = (6, 1, 12) if adapt == "none" else (6, 5, 12)
    path = Delta("activation.0", RNG.normal(size=shape)).save(tmp_path / "d.safetensors")
    (step,) = Pipeline.of(f"physics_steer{{delta={path} adapt={adapt}}}").passes
    graph = graph if dialect == "fx" else ag.load(graph.save(tmp_path / "field.onnx"))
    made = ag.run(graph, [step], parity="none").graph
    (check,) = check_hooks(step, graph, made, 1e-4)
    assert check.ok and check.checked and float(check.detail.rsplit(" ", 1)[1]) > 1e-3, check
    other = ag.run(graph, [step.model_copy(update={"alpha": -0.3})], parity="none").graph
    assert not next(check_hooks(step, graph, other, 1e-4)).ok


GIVEN = [
    "steer{vector=V site=S scale=input norm=restore}", "steer{vector=input site=S scale=2}",
    "steer{vector=input site=S scale=input}",
    "ablate{direction=V site=S scale=input}", "kif{signature=FOLDER/kif gate=input}",
    "ci_parametric{factors=FOLDER/ci alpha=input}",
    "angular_steer{plane=FOLDER/plane5.safetensors angle=input}",
    "angular_steer{plane=FOLDER/plane5.safetensors angle=40 scale=input}",
    "selective_steer{plane=FOLDER/plane5.safetensors angle=input}", "austeer{units=FOLDER/units scale=input}",
    "selective_steer{plane=FOLDER/plane5.safetensors mode=ablate scale=input}", "guardit{clusters=FOLDER/embedding}",
    "guiding_giants{controller=FOLDER/controller eta=input}",
    "sae_steer{sae=FOLDER/normal latents=[0, 1] mode=clamp value=3 strength=input}",
]  # fmt: skip


def defaults(step: Any, before: ag.Graph, after: ag.Graph) -> list[Any]:
    def other(options: dict[str, Any]) -> ag.Graph:
        return ag.run(before, [step.model_copy(update=options)], parity="none").graph

    return list(check_defaults(step, before, after, other, [ladder_inputs(before)]))


@pytest.mark.parametrize("dialect", ["fx", "onnx"])
@pytest.mark.parametrize("text", GIVEN)
def test_inputs_that_nobody_gives_change_nothing(text: str, dialect: str, folder: Path) -> None:
    graph, step = in_dialect("llama", dialect), step_of(text, folder)
    made = ag.run(graph, [step], parity="none").graph
    (check,) = defaults(step, graph, made)
    assert check.ok and check.change == 0 and check.what == f"{step.name}: defaults of its inputs = the graph before"
    nearly = ag.run(made, f"steer{{vector={VECTOR} site={SITE} scale=1e-5}}", parity="none").graph
    (check,) = defaults(step, graph, nearly)
    assert not check.ok and 0 < check.change < 1e-4, "bit for bit"


def test_a_default_that_is_not_neutral_is_what_the_pass_says(folder: Path) -> None:
    graph, step = zoo.captured("llama"), step_of("angular_steer{plane=FOLDER/plane5.safetensors angle=input scale=1}", folder)
    made = ag.run(graph, [step], parity="none").graph
    (check,) = defaults(step, graph, made)
    assert check.ok and check.what == "angular_steer: defaults of its inputs = angle=0.0"
    fixed = step_of("angular_steer{plane=FOLDER/plane5.safetensors angle=30}", folder)
    assert not defaults(step, graph, ag.run(made, [fixed], parity="none").graph)[0].ok
    assert not defaults(fixed, graph, ag.run(graph, [fixed], parity="none").graph), "nothing is given at run time"
    late = step_of("steer{vector=V site=S where=generated}", folder)
    assert not defaults(late, graph, ag.run(graph, [late], parity="none").graph), "sessions tell the lengths of prompts"


class Nearly(Steer):
    """An off setting within the tolerance."""

    name: ClassVar[str] = "nearly"
    off: ClassVar[dict[str, Any]] = {"scale": 1e-6}


def test_off_is_bit_for_bit() -> None:
    step = Nearly(site=SITE, vector=tuple(RNG.normal(size=zoo.WIDTH).tolist()))
    checks = {
        check.what: check for check in check_pipeline(zoo.captured("llama"), Pipeline([step]), None, None, 1e-4, quiet=True)
    }
    (check,) = (check for what, check in checks.items() if what.endswith("is the identity"))
    assert not check.ok and check.change is not None and 0 < check.change < 1e-4
    assert checks["nearly at fold=False gives the same outputs"].ok, "within the tolerance"


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
    delta = Delta("blocks.2.resid_post", np.ones(64)).save(tmp_path / "d.safetensors")
    shown = cli("verify", model, "-p", f"physics_steer{{delta={delta} axis=-1}}, steer{{vector={path} scale=input}}", "--json")
    checks = {check["what"]: check for check in shown.json["checks"]}
    assert shown.code == 0 and checks["physics_steer: graph = hooks at its sites"]["checked"]
    assert checks["steer: defaults of its inputs = the graph before"]["change"] == 0
    assert all(check["seconds"] is not None for check in shown.json["checks"] if check["checked"])
