"""``actgraph extract-vector --method``: each method's file is the one that its pass takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import actgraph as ag
from tests import zoo
from tests.cli.conftest import Outcome

Cli = Callable[..., Outcome]
PASSES = {
    "pca": "steer{vector=FILE site=blocks.2.resid_post scale=2}",
    "angular": "angular_steer{plane=FILE angle=40}",
    "selective": "selective_steer{plane=FILE angle=40 layers=all}",
    "austeer": "austeer{units=FILE k=5}",
    "steer2edit": "steer2edit{directions=FILE rho_att=0.2 rho_mlp=0.2 a=0.1}",
    "kif": "kif{signature=FILE}",
}


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sets")
    prompts = ["The girl was", "They were all", "Ben felt so", "Mom and Dad were"]
    paths = {}
    for name, word in (("positive", "happy"), ("negative", "sad")):
        lines = [{"prompt": prompt, "response": f" {word} today."} for prompt in prompts]
        paths[name] = folder / f"{name}.jsonl"
        paths[name].write_text("\n".join(map(json.dumps, lines)))
    return paths


@pytest.mark.parametrize("method", list(PASSES))
def test_a_method_makes_the_file_of_its_pass(cli: Cli, sets: dict[str, Path], method: str, model: Path, tmp_path: Path) -> None:
    target = tmp_path / "made.safetensors"
    given = ["--positive", sets["positive"], "--negative", sets["negative"], "--method", method, "-o", target, "--json"]
    more = {"pca": ["--site", "blocks.2.resid_post"], "kif": ["--position", "last"]}.get(method, [])
    made = cli("extract-vector", model, *given, *more)
    assert made.code == 0 and made.json["file"] == str(target), made
    stories = zoo.captured("stories260k")
    edited = ag.run(stories, PASSES[method].replace("FILE", str(target))).graph
    inputs = ag.sample_inputs(stories)
    assert np.abs(edited.run(inputs)["logits"] - stories.run(inputs)["logits"]).max() > 1e-4


def test_what_a_method_does_not_have_is_refused(cli: Cli, sets: dict[str, Path], model: Path, tmp_path: Path) -> None:
    given = ["--positive", sets["positive"], "--negative", sets["negative"], "-o", tmp_path / "v.safetensors", "-q"]
    for more, why in (
        ([], "none is named"),
        (["--method", "austeer", "--position", "mean"], "austeer has no position"),
        (["--method", "steer2edit", "--where", "2:"], "steer2edit has no where"),
    ):
        refused = cli("extract-vector", model, *given, *more)
        assert refused.code == 2 and why in refused.err, refused
    assert not (tmp_path / "v.safetensors").exists()
