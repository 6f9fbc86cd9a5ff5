"""The options at which a pass says that it is the identity: they are accepted, and it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import actgraph as ag
from actgraph.formats.artifacts import Artifact
from actgraph.graph import Graph
from actgraph.passes.steer.austeer import UnitMomentum
from actgraph.passes.steer.steer2edit import Measured, Steer2EditDirections
from actgraph.passes.steer.weight_edits import RankOneEdit, RankOneEdits
from actgraph.pipeline.registry import all_passes
from tests import zoo
from tests.passes.conftest import in_dialect, run
from tests.passes.planes import a_plane
from tests.saes import random_sae, write_sae

REST: dict[str, dict[str, object]] = {
    "ablate": {"site": "blocks.0.resid_post", "direction": (1.0,) * 8},
    "orthogonalize": {"direction": (1.0, -1.0, 0.5, 0.0, 0.0, 2.0, 0.0, -0.5)},
    "clip": {"site": "blocks.0.mlp.hidden"},
    "mote": {"experts": "0:1"},
    "steer": {"site": "blocks.0.resid_post", "vector": (1.0,) * 8},
}
#: Passes about parts that the readable model lacks: a model that has them.
MODELS = {"mote": "mixtral_batched"}

SITE = "blocks.0.resid_post"
ONES = np.ones((1, 8), np.float32)
#: Passes that read a file: the option that names it, and what is in it.
FILES: dict[str, tuple[str, Artifact]] = {
    "guiding_giants": (
        "controller",
        Artifact(
            "controller",
            {"first": ONES, "first_bias": ONES[0, :1], "second": np.ones((2, 1), np.float32), "second_bias": ONES[0, :2],
             "direction": ONES[0]},
            {"inputs": [SITE], "layers": [SITE]},
        ),
    ),
}  # fmt: skip


def off_passes() -> list[str]:
    return sorted(name for name, cls in all_passes().items() if cls.off)


def test_they_are_the_known_ones() -> None:
    assert {"clip", "mote", "sparsify", "steer"} <= set(off_passes())


def files(folder: Path) -> dict[str, dict[str, object]]:
    """Options that are files, for the tiny model."""
    read = np.linspace(-1, 1, 12).astype(np.float32)
    edits = RankOneEdits({"blocks.0.mlp.hidden": RankOneEdit(np.ones(8, np.float32), read)})
    directions = Steer2EditDirections({"blocks.0.mlp.hidden": Measured(np.arange(8, dtype=np.float32), read)})
    rows, where = np.ones((2, 8), np.float32), {"site": "blocks.0.resid_post"}
    made = {
        "actadd": Artifact("actadd_prompts", {"blocks.0.resid_post": rows}),
        "ci_parametric": Artifact("ci_factors", {"blocks.0.resid_post": rows}, {"factors": ["a", "b"]}),
        "guardit": Artifact("guardit_clusters", {"vectors": rows, "centroids": rows}, {**where, "threshold": 0.5}),
        "kif": Artifact("kif_signature", {"directions": rows[:1].T / np.sqrt(8)}, {**where, "mean": 0.0, "deviation": 1.0}),
        "physics_steer": Artifact("physics_delta", {"pattern": rows[0]}, where),
    }
    saved = {name: str(artifact.save(folder / f"{name}.safetensors")) for name, artifact in made.items()}
    site = "blocks.0.resid_post"
    momentum = UnitMomentum({site: np.linspace(-1, 1, 8).astype(np.float32)})
    plane = {"plane": a_plane(folder, [site], [site], width=8)[0], "angle": 30.0}
    return {
        "actadd": {"prompts": saved["actadd"]},
        "ci_parametric": {"factors": saved["ci_parametric"]},
        "guardit": {"clusters": saved["guardit"]},
        "kif": {"signature": saved["kif"]},
        "physics_steer": {"delta": saved["physics_steer"], "axis": -1},
        "angular_steer": plane,
        "austeer": {"units": str(momentum.save(folder / "units.safetensors")), "k": 2},
        "selective_steer": plane,
        "rank_one": {"edits": str(edits.save(folder / "edits.safetensors"))},
        "sae_steer": {
            "sae": str(
                write_sae(folder / "sae", random_sae(width=8, latents=12), model_name="", hook_name="blocks.0.hook_resid_post")
            ),
            "latents": (1,),
            "mode": "clamp",
            "value": 2.0,
            "site": "blocks.0.resid_post",
        },
        "steer2edit": {"directions": str(directions.save(folder / "directions.safetensors")), "a": 0.1},
        **{name: {option: str(file.save(folder / f"{name}.safetensors"))} for name, (option, file) in FILES.items()},
    }


@pytest.mark.parametrize("name", off_passes())
def test_off_is_the_identity(tiny: Graph, dialect: str, name: str, tmp_path: Path) -> None:
    cls = all_passes()[name]
    step = cls(**{**REST.get(name, {}), **files(tmp_path).get(name, {}), **cls.off})
    graph = in_dialect(MODELS[name], dialect) if name in MODELS else tiny
    inputs = zoo.inputs(MODELS[name]) if name in MODELS else None
    assert np.array_equal(run(graph, inputs), run(ag.run(graph, [step]).graph, inputs))
    assert np.array_equal(run(graph, inputs), run(ag.run(graph, str(step)).graph, inputs)), "as pipeline text, too"
