"""The parity instrument: declared sizes are enforced, broken numbers never pass, and agreement about nothing is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

import actgraph as ag
from actgraph.errors import InputError, ParityError
from actgraph.formats.artifacts import Artifact
from actgraph.graph import Graph
from actgraph.passes.steer.austeer import UnitMomentum
from actgraph.passes.steer.steer2edit import Measured, Steer2EditDirections
from actgraph.passes.steer.taugate import NeuronGates, TauGates
from actgraph.passes.steer.weight_edits import RankOneEdit, RankOneEdits
from actgraph.pipeline import ROUNDING, UNBOUNDED, Pass, PassContext, PassManager, PassResult, all_passes
from actgraph.pipeline.parity import measure
from tests import zoo
from tests.passes.planes import a_plane
from tests.pipeline import toys
from tests.saes import random_sae, write_sae


def run(pipeline: Any, graph: Graph | None = None, **options: Any) -> ag.RunResult:
    return PassManager(pipeline, toys.X, reproducer=False, **options).run(graph or toys.net())


class Indexed(torch.nn.Module):
    """Scores, and the index of the best one."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.softmax(x, -1), x.argmax(-1)


class Flip(Pass):
    """Nudges an input so that the best index changes by much and the scores hardly."""

    name: ClassVar[str] = "toy_flip"
    family: ClassVar[str] = "toy"
    reason: str = "exact"

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        with context.edit(graph) as editor:
            (value,) = graph.inputs()
            node = editor.insert("add", [value, np.array([0.0, 0.0, 0.0, 2e-3], np.float32)])
            editor.redirect(value, node.output, [use for use in value.uses if use.node != node])
        result = PassResult(expected_change=self.reason, expected_size=0.01)
        result.counts["nudged"] = 1
        return result


def test_a_pass_that_declares_a_reason_and_no_size_promises_rounding() -> None:
    with pytest.raises(ParityError, match=r"'the site is scaled' within 1e-05.*expected_size"):
        run("toy_scale{factor=1.01 site=linear.1 claim=vague}")
    row = run("toy_scale{factor=1.01 site=linear.1}").report[0]
    assert row.change is not None and row.change.tolerance is None  # no bound, and said so


@pytest.mark.parametrize("claim", ["honest", "small", "exact"])
@pytest.mark.parametrize("mode", ["each", "boundary"])
def test_new_nan_or_infinity_is_rejected_whatever_was_declared(claim: str, mode: str) -> None:
    for factor in ("inf", "nan"):
        with pytest.raises(ParityError, match="became NaN or infinite over toy_scale"):
            run(f"toy_scale{{factor={factor} site=linear.1 claim={claim}}}", parity=mode)


def test_numbers_that_were_broken_before_may_stay_so() -> None:
    inputs = {"x": np.array([[1, 2, 3, 4], [np.nan, 0, 0, 0]], np.float32)}
    report = run("toy_scale{factor=2 site=linear.1}", inputs=inputs, parity="each").report
    assert report[0].change is not None
    assert (report[0].change.relative, report[0].change.compared) == (pytest.approx(1.0), 3)
    before = {"y": np.array([np.inf, 1.0, np.nan]), "z": np.ones(2)}
    assert measure(before, {"y": np.array([0.0, 1.0, 2.0]), "z": np.ones(2)}).broken == ""
    assert measure(before, {"y": np.array([np.inf, np.nan, 2.0]), "z": np.ones(2)}).broken == "y"
    assert measure(before, {"y": before["y"], "z": np.array([1.0, np.inf, 1.0])}).broken == "z"  # also where it was reshaped


def test_the_ends_are_held_to_what_all_passes_allow_together() -> None:
    step = "toy_scale{factor=1.009 site=linear.1 claim=small}"
    report = run(f"{step}, {step}", parity="boundary").report
    assert report.change is not None and report.change.tolerance == pytest.approx(1.01**2 - 1)
    assert report.change.relative == pytest.approx(1.009**2 - 1, rel=1e-3)
    with pytest.raises(ParityError, match=r"toy_scale and toy_tidy promise .* within 0\.01"):
        run("toy_scale{factor=1.02 site=linear.1 claim=small}, toy_tidy", parity="boundary")


def test_an_index_may_flip_where_a_change_was_declared_and_must_not_where_none_was() -> None:
    x = torch.tensor([[1.0, 0.0, 0.0, 0.999]])
    graph = ag.trace(Indexed(), (x,), name="indexed")
    inputs = {"x": x.numpy()}
    row = run(Flip(reason="rounded"), graph, inputs=inputs).report[0]
    assert row.change is not None and row.change.relative > 1  # it is measured all the same
    with pytest.raises(ParityError, match="moved by"):
        run(Flip(), graph, inputs=inputs)


def test_agreement_about_nan_or_nothing_is_no_proof() -> None:
    nan = {"x": np.full((2, 4), np.nan, np.float32)}
    for mode in ("each", "boundary"):
        with pytest.raises(InputError, match="gives no numbers but NaN on sample inputs"):
            run("toy_scale{factor=2}", inputs=nan, parity=mode)
    report = run("toy_scale{factor=2}", inputs=nan).report
    assert report.parity.startswith("not checked: the input graph gives no numbers but NaN")
    assert report[0].change is None and report.change is None
    with pytest.raises(InputError, match="proves nothing"):
        run("toy_scale{factor=2}", inputs={"x": np.zeros((0, 4), np.float32)}, parity="each")


def test_imaginary_parts_are_compared() -> None:
    found = measure({"z": np.array([3 + 1j])}, {"z": np.array([3 + 2j])})
    assert found.relative == pytest.approx(1 / 3)


#: How far each built-in pass lets the outputs move, with the options under which it says so.
SIZES = [
    ("dce", ROUNDING), ("cse", ROUNDING), ("fold", ROUNDING), ("identity", ROUNDING), ("fuse", ROUNDING),
    ("tap{site=blocks.0.resid_post}", ROUNDING), ("kv_cache{graphs=combined}", ROUNDING),
    ("quantize", 0.5), ("quantize{activations=dynamic}", 1.0), ("quantize{activations=static}", 1.0),
    ("quantize{weights=int4}", 2.0), ("quantize{weights=fp8}", 1.0),
    ("cast{dtype=f16}", 0.1), ("cast{dtype=bf16}", 0.5), ("cast{dtype=f64}", 1e-3),
    ("sparsify{threshold=0.0}", ROUNDING), ("sparsify{threshold=0.01}", UNBOUNDED),
    ("prune{ratio=0.25 importance=magnitude}", UNBOUNDED),
    ("clip{site=blocks.0.mlp.hidden max=1.0}", UNBOUNDED),
    ("steer{site=blocks.0.resid_post vector=V scale=0.0}", ROUNDING), ("steer{site=blocks.0.resid_post vector=V}", UNBOUNDED),
    ("ablate{site=blocks.0.resid_post direction=V}", UNBOUNDED),
    ("orthogonalize{direction=V amount=0.0}", ROUNDING), ("orthogonalize{direction=V}", UNBOUNDED),
    ("rank_one{edits=FOLDER/edits.safetensors scale=0.0}", ROUNDING), ("rank_one{edits=FOLDER/edits.safetensors}", UNBOUNDED),
    ("steer2edit{directions=FOLDER/measured.safetensors a=0.1}", UNBOUNDED),
    ("safety_project{aligned=FOLDER/aligned.pt2 base=FOLDER/base.pt2}", UNBOUNDED),
    ("mote{experts=0:1}", UNBOUNDED), ("mote{experts=0:1 amount=0}", ROUNDING),
    ("actadd{prompts=FOLDER/actadd.safetensors}", UNBOUNDED),
    ("ci_parametric{factors=FOLDER/ci.safetensors alpha=[1.0, 0.5]}", UNBOUNDED),
    ("guardit{clusters=FOLDER/guardit.safetensors}", UNBOUNDED), ("kif{signature=FOLDER/kif.safetensors}", UNBOUNDED),
    ("physics_steer{delta=FOLDER/physics.safetensors axis=-1}", UNBOUNDED),
    ("sae_steer{sae=FOLDER/sae latents=[1] mode=clamp value=2.0 site=blocks.0.resid_post}", UNBOUNDED),
    ("fold_edits", ROUNDING), ("unfold", ROUNDING),
    ("guiding_giants{controller=FOLDER/giants.safetensors where=all}", UNBOUNDED),
    ("taugate{gates=FOLDER/gates.safetensors}", UNBOUNDED),
    ("angular_steer{plane=FOLDER/plane5.safetensors angle=30}", UNBOUNDED),
    ("angular_steer{plane=FOLDER/plane5.safetensors angle=30 scale=0}", ROUNDING),
    ("selective_steer{plane=FOLDER/plane5.safetensors angle=30}", UNBOUNDED),
    ("selective_steer{plane=FOLDER/plane5.safetensors angle=360}", ROUNDING),
    ("austeer{units=FOLDER/units.safetensors k=3}", UNBOUNDED),
    ("austeer{units=FOLDER/units.safetensors k=3 scale=0.0}", ROUNDING),
]  # fmt: skip


#: What some passes need to find.
BEFORE = {
    "fold_edits": "steer{site=blocks.0.mlp.out vector=V fold=false}", "unfold": "steer{site=blocks.0.mlp.out vector=V}",
}  # fmt: skip


def test_every_built_in_pass_is_listed_with_its_size() -> None:
    names = {name for name, cls in all_passes().items() if cls.__module__.startswith("actgraph.passes.")}
    assert {text.split("{")[0] for text, _ in SIZES} == names


def _files(graph: Graph, folder: Path) -> None:
    """The files that passes take."""
    linear = graph.views.feed_forwards()[0].down
    write, read = (np.ones(size, np.float32) for size in (linear.out_features, linear.in_features))
    RankOneEdits({"blocks.0.mlp.hidden": RankOneEdit(write, read)}).save(folder / "edits.safetensors")
    Steer2EditDirections({"blocks.0.mlp.hidden": Measured(write, read)}).save(folder / "measured.safetensors")
    rows, where = np.stack([write, -write]), {"site": "blocks.0.resid_post"}
    for name, artifact in {
        "actadd": Artifact("actadd_prompts", {"blocks.0.resid_post": rows}),
        "ci": Artifact("ci_factors", {"blocks.0.resid_post": rows}, {"factors": ["a", "b"]}),
        "guardit": Artifact("guardit_clusters", {"vectors": rows, "centroids": rows}, {**where, "threshold": 0.5}),
        "kif": Artifact("kif_signature", {"directions": rows[:1].T / np.sqrt(rows.shape[1])}, where),
        "physics": Artifact("physics_delta", {"pattern": write}, where),
        "giants": Artifact(
            "controller",
            {
                "first": rows[:1],
                "first_bias": write[:1],
                "second": np.ones((2, 1), np.float32),
                "second_bias": write[:2],
                "direction": write,
            },
            {"inputs": [where["site"]], "layers": [where["site"]]},
        ),
    }.items():
        artifact.save(folder / f"{name}.safetensors")
    TauGates({"blocks.0.mlp.act": NeuronGates(0 * read, 2 * read)}, 8.0).save(folder / "gates.safetensors")
    write_sae(folder / "sae", random_sae(width=len(write), latents=12), model_name="", hook_name="blocks.0.hook_resid_post")
    site = "blocks.0.resid_post"
    a_plane(folder, [site], [site], width=zoo.WIDTH)
    UnitMomentum({site: np.linspace(-1, 1, zoo.WIDTH, dtype=np.float32)}).save(folder / "units.safetensors")
    for name, index in (("aligned", 0), ("base", 1)):
        other = graph.clone()
        with other.edit("train") as editor:
            down = other.views.feed_forwards()[index].down
            down.write_weight(editor, down.read_weight() * 1.5)
        other.save(folder / f"{name}.pt2")


@pytest.mark.parametrize(("text", "size"), SIZES)
def test_sizes_of_built_in_passes(text: str, size: float, tmp_path: Path) -> None:
    model = "mixtral_batched" if text.startswith("mote") else "llama"
    graph = zoo.captured(model)
    if "FOLDER" in text:
        _files(graph, tmp_path)
        text = text.replace("FOLDER", str(tmp_path))
    width = graph.site("blocks.0.resid_post").type.shape
    assert width is not None
    text = text.replace("V", str([1.0] * int(width[-1])))
    if text in BEFORE:
        graph = ag.run(graph, BEFORE[text].replace("V", str([1.0] * int(width[-1]))), parity="none").graph
    change = ag.run(graph, text, corpus=[zoo.inputs(model)], parity="each", reproducer=False).report[0].change
    assert change is not None and change.compared
    assert change.tolerance == (None if size == UNBOUNDED else pytest.approx(max(size, ROUNDING)))
