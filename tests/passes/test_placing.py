"""What passes that edit activations share: rows of run-time inputs, merging and folding, and the precision of bases."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import actgraph as ag
from actgraph.errors import PassError
from actgraph.formats.artifacts import Artifact
from actgraph.graph import Graph
from actgraph.graph.graph import Array
from actgraph.graph.hooks import run_with_hooks
from actgraph.ops.dtypes import DType
from actgraph.passes.steer.austeer import UnitMomentum
from tests.passes.conftest import apply, as_dialect, in_dialect, relative, run, token_inputs
from tests.passes.planes import a_plane
from tests.saes import random_sae, write_sae

SITE, ANY = "blocks.1.mlp.out", "any"
RNG = np.random.default_rng(4)


class Swapped(torch.nn.Module):
    """A value of [seq, batch, 8] in the middle."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x.transpose(0, 1)).transpose(0, 1)


class Pooled(torch.nn.Module):
    """A value of [batch, seq, 8], and one of [batch, 8]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(torch.tanh(x).mean(1))


def traced(model: torch.nn.Module, dialect: str) -> tuple[Graph, dict[str, str]]:
    """The graph, and the sites of its functions."""
    graph = ag.trace(model, (torch.ones(2, 3, 8),), dynamic={"x": ("batch", "seq", None)}, name="small")
    graph = as_dialect(graph, dialect)
    return graph, {n.prim.op: f"%{n.outputs[0].name}" for n in graph.nodes() if n.prim is not None}


def saved(folder: Path, name: str, width: int = 8, site: str = ANY) -> str:
    """A file for a pass, with random directions."""
    rows = np.linalg.qr(np.random.default_rng(7).normal(size=(width, 2)))[0].T.astype(np.float32)
    files = {
        "actadd": Artifact("actadd_prompts", {site: rows}),
        "ci_parametric": Artifact("ci_factors", {site: rows}, {"factors": ["a", "b"]}),
        "guardit": Artifact("guardit_clusters", {"vectors": rows, "centroids": rows}, {"site": site, "threshold": 0.5}),
        "kif": Artifact("kif_signature", {"directions": rows.T}, {"site": site, "mean": 0.0, "deviation": 1.0}),
    }
    path = folder / f"{name}.safetensors"
    if name == "austeer":
        return str(UnitMomentum({site: np.linspace(-1, 1, width).astype(np.float32)}).save(path))
    if name == "plane":
        return a_plane(folder, [site], [site], width=width)[0]
    if name == "sae":
        return str(write_sae(folder / "sae", random_sae(width=width, latents=12), model_name="", hook_name=""))
    return str(files[name].save(path))


def given_at_run_time(folder: Path, site: str) -> dict[str, tuple[str, list[str]]]:
    """Pipelines with something for each row, and the inputs that they add."""
    plane = saved(folder, "plane")
    return {
        "ablate": ("ablate{direction=[1.0, 2, 0, 0, 1, 0, 0, 0] scale=input", ["ablate.scale"]),
        "angular_steer": (f"angular_steer{{plane={plane} angle=input", ["angular_steer.angle", "angular_steer.scale"]),
        "austeer": (f"austeer{{units={saved(folder, 'austeer', site=site)} k=3 scale=input", ["austeer.scale"]),
        "ci_parametric": (f"ci_parametric{{factors={saved(folder, 'ci_parametric')} alpha=input", ["ci_parametric.alpha"]),
        "guardit": (f"guardit{{clusters={saved(folder, 'guardit')}", ["guardit.similarity"]),
        "kif": (f"kif{{signature={saved(folder, 'kif')} gate=input", ["kif.gate"]),
        "sae_steer": (
            f"sae_steer{{sae={saved(folder, 'sae')} latents=[1] mode=clamp value=2 strength=input other_site=allow",
            ["sae_steer.strength"],
        ),
        "selective_steer": (f"selective_steer{{plane={plane} angle=input", ["selective_steer.angle"]),
        "steer": ("steer{vector=[1.0, 2, 0, 0, 1, 0, 0, 0] scale=input", ["steer.scale"]),
    }


# --- rows ---------------------------------------------------------------------------------------------------------------


BY_ROW = ("ablate", "angular_steer", "austeer", "ci_parametric", "guardit", "kif", "sae_steer", "selective_steer", "steer")


@pytest.mark.parametrize("name", BY_ROW)
def test_rows_are_not_laid_along_another_axis(dialect: str, name: str, tmp_path: Path) -> None:
    """With as many positions as rows the numbers of rows would fit, and change the positions of all rows."""
    graph, sites = traced(Swapped(), dialect)
    step, _ = given_at_run_time(tmp_path, sites["tanh"])[name]
    reason = r"for each row of the batch \(batch\), which is not the first axis of \[seq, batch, 8\]"
    with pytest.raises(PassError, match=reason):
        apply(graph, f"{step} site={sites['tanh']}}}")


def test_positions_are_not_laid_along_another_axis(dialect: str, tmp_path: Path) -> None:
    graph, sites = traced(Swapped(), dialect)
    with pytest.raises(PassError, match=r"is not \[batch, seq, channels\]"):
        apply(graph, f"actadd{{prompts={saved(tmp_path, 'actadd')} site={sites['tanh']}}}")


def test_sites_of_several_ranks_share_an_input(dialect: str) -> None:
    graph, sites = traced(Pooled(), dialect)
    x, direction = {"x": RNG.normal(size=(3, 3, 8)).astype(np.float32)}, "[1.0, 0, 0, 0, 0, 0, 0, 0]"
    both = f"site=[{sites['tanh']}, {sites['sin']}]"
    made = apply(graph, f"ablate{{direction={direction} scale=input {both}}}")
    assert [value.name for value in made.inputs()] == ["x", "ablate.scale"]
    plain = run(graph, x)
    found = run(made, {**x, "ablate.scale": np.array([0, 1, 0], np.float32)})
    assert np.array_equal(found[[0, 2]], plain[[0, 2]]) and not found[1, 0] and np.abs(plain[:, 0]).min() > 0


def test_inputs_are_named_after_the_pass_and_its_option(tmp_path: Path) -> None:
    graph, sites = traced(Pooled(), "fx")
    for step, names in given_at_run_time(tmp_path, sites["tanh"]).values():
        made = apply(graph, f"{step} site={sites['tanh']}}}")
        assert [value.name for value in made.inputs()][1:] == names
    steps = given_at_run_time(tmp_path, sites["tanh"])
    assert set(steps) == set(BY_ROW)
    both = apply(graph, ", ".join(f"{steps[name][0]} site={sites['tanh']}}}" for name in ("steer", "austeer", "steer")))
    assert [value.name for value in both.inputs()][1:] == ["steer.scale", "austeer.scale", "steer.scale_1"]


# --- merging and folding ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "op"),
    [
        ("kif", "signature={0} strength=-0.8", "actgraph.lowrank_map"),
        ("ci_parametric", "factors={0} alpha=[2.0, -1.0]", "actgraph.shift"),
    ],
)
def test_fixed_edits_fold(stories: Graph, name: str, options: str, op: str, tmp_path: Path) -> None:
    step = f"{name}{{{options.format(saved(tmp_path, name, 64, SITE))}"
    folded, kept = (ag.run(stories, f"{step}{more}}}") for more in ("", " fold=false"))
    assert folded.report[0].counts == {"folded": 1} and kept.report[0].counts == {"inserted": 1}
    assert folded.report[0].details[0]["rule"] == "folded"
    assert not any(node.op == op for node in folded.graph.nodes()) and any(node.op == op for node in kept.graph.nodes())
    assert relative(run(kept.graph), run(folded.graph)) < 1e-5 < 1e-3 < relative(run(stories), run(kept.graph))
    assert np.array_equal(run(apply(folded.graph, "unfold")), run(kept.graph))


@pytest.mark.parametrize("more", ["where=1:", "gate=projection", "gate=input"])
def test_capsules_for_some_tokens_stay(stories: Graph, more: str, tmp_path: Path) -> None:
    made = ag.run(stories, f"kif{{signature={saved(tmp_path, 'kif', 64, SITE)} {more}}}")
    assert made.report[0].counts == {"inserted": 1}


def test_a_shift_that_keeps_norms_stays(stories: Graph, tmp_path: Path) -> None:
    file = saved(tmp_path, "ci_parametric", 64, SITE)
    made = ag.run(stories, f"ci_parametric{{factors={file} alpha=[2.0, 1.0] norm=restore}}")
    assert made.report[0].counts == {"inserted": 1}


STREAM = ("blocks.1.resid_post", "blocks.3.resid_post")


def test_rotations_at_a_place_merge(stories: Graph, tmp_path: Path) -> None:
    """Also where sites share the stored plane; what they merge into is one rotation by the sum."""
    file, sites = saved(tmp_path, "plane", 64), f"site=[{', '.join(STREAM)}]"
    twice = ag.run(stories, ", ".join(f"selective_steer{{plane={file} angle={angle} {sites}}}" for angle in (30, 40)))
    assert [row.counts for row in twice.report] == [{"inserted": 2}, {"merged": 2}]
    assert sum(node.op == "actgraph.lowrank_map" for node in twice.graph.nodes()) == 2
    once = apply(stories, f"selective_steer{{plane={file} angle=70 {sites}}}")
    assert relative(run(once), run(twice.graph)) < 1e-5 < 1e-2 < relative(run(stories), run(once))


def test_factors_and_capsules_merge(stories: Graph, tmp_path: Path) -> None:
    momentum = np.linspace(-1, 1, 64)
    factors = np.ones(64)
    largest = np.argsort(-np.abs(momentum), kind="stable")[:10]
    factors[largest] += 0.5 * momentum[largest]
    step = f"austeer{{units={saved(tmp_path, 'austeer', 64, STREAM[0])} k=10 scale=0.5}}"
    twice = ag.run(stories, f"{step}, {step}")
    assert [row.counts for row in twice.report] == [{"inserted": 1}, {"merged": 1}]
    wanted = run_with_hooks(stories, token_inputs(), {STREAM[0]: lambda h: (h * factors**2).astype(h.dtype)})["logits"]
    assert relative(wanted, run(twice.graph)) < 1e-5
    direction = "[" + ", ".join(map(str, np.eye(64)[3])) + "]"
    kif = f"kif{{signature={saved(tmp_path, 'kif', 64, STREAM[0])}}}"
    both = ag.run(stories, f"ablate{{direction={direction} site={STREAM[0]}}}, {kif}")
    assert [row.counts for row in both.report] == [{"inserted": 1}, {"merged": 1}]
    one_by_one = apply(stories, f"ablate{{direction={direction} site={STREAM[0]}}}, {kif.replace('}', ' where=0:}')}")
    assert relative(run(one_by_one), run(both.graph)) < 1e-5


# --- precision ----------------------------------------------------------------------------------------------------------


def unit(width: int) -> Array:
    found = np.random.default_rng(9).normal(size=width)
    return found / np.linalg.norm(found)


def half_steps(folder: Path, width: int, site: str) -> dict[str, str]:
    direction = "[" + ", ".join(map(repr, unit(width).tolist())) + "]"
    return {
        "ablate": f"ablate{{direction={direction} site={site}",
        "kif": f"kif{{signature={saved(folder, 'kif', width, site)} strength=-1",
    }


@pytest.mark.parametrize("name", ["ablate", "kif"])
@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_bases_beside_half_precision_stay_float32(stories: Graph, dtype: str, name: str, tmp_path: Path) -> None:
    graph = apply(stories, f"cast{{dtype={dtype}}}", parity="none")
    step = half_steps(tmp_path, 64, STREAM[1])[name]
    made = apply(graph, f"{step}}}, tap{{site={STREAM[1]}}}", parity="none")
    (node,) = (node for node in made.nodes() if node.op == "actgraph.lowrank_map")
    assert [operand.dtype for operand in node.operands if operand is not None][1:] == [DType.F32] * 2
    made.verify()
    directions = made.read(node.operands[1]).astype(np.float64)  # type: ignore[arg-type]
    np.testing.assert_allclose(directions.T @ directions, np.eye(directions.shape[1]), atol=1e-6)
    if dtype == "bf16" and stories.dialect == "onnx":
        return  # onnxruntime's CPU has no kernels for it
    after = made.run(token_inputs())[STREAM[1]].astype(np.float64)
    before = apply(graph, f"tap{{site={STREAM[1]}}}", parity="none").run(token_inputs())[STREAM[1]].astype(np.float64)
    rounding = 2.0 ** (-11 if dtype == "f16" else -8) * np.linalg.norm(after, axis=-1).max()  # of the result alone
    assert np.abs(after @ directions).max() < rounding < 0.1 * np.abs(before @ directions).max()
    if dtype == "bf16":
        return
    path = made.save(tmp_path / "made.onnx", inline="all")
    assert relative(run(made).astype(np.float32), run(ag.load(path)).astype(np.float32)) < 0.05


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_a_fold_into_half_precision_reads_the_exact_basis(dialect: str, dtype: str, tmp_path: Path) -> None:
    """The folded weight is the exact one rounded once."""
    graph = apply(in_dialect("gpt2", dialect), f"cast{{dtype={dtype}}}", parity="none")
    site = graph.site("blocks.0.mlp.out")
    (linear,) = (each for each in graph.views.linears() if each.output == site.value)
    weight = linear.read_weight()
    v = unit(weight.shape[0])
    folded = apply(graph, f"{half_steps(tmp_path, len(v), site.name)['ablate']}}}", parity="none")
    (written,) = (e for e in folded.views.linears() if e.output == folded.site(site.name).value)
    v32 = v.astype(np.float32).astype(np.float64)
    wide = weight.astype(np.float64)
    exact = (wide - np.outer(v32, v32 @ wide)).astype(weight.dtype)
    same = np.mean(written.read_weight() == exact)
    assert same > 0.98, f"{same:.3f} of the numbers are those rounded once"


def test_bases_beside_float64_are_float64(tmp_path: Path) -> None:
    graph = ag.trace(Pooled(), (torch.ones(2, 3, 8, dtype=torch.float64),), dynamic={"x": ("batch", "seq", None)}, name="wide")
    (tanh,) = (n for n in graph.nodes() if n.prim is not None and n.prim.op == "tanh")
    for step in half_steps(tmp_path, 8, f"%{tanh.outputs[0].name}").values():
        made = apply(graph, f"{step} fold=false}}")
        (node,) = (node for node in made.nodes() if node.op == "actgraph.lowrank_map")
        assert node.operands[1] is not None and node.operands[1].dtype is DType.F64
