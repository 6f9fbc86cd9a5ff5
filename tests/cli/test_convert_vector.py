"""``actgraph convert-vector``: what arrives in the other format, for which sites, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import actgraph as ag
from actgraph.formats.vectors import model_fingerprint, tokenizer_fingerprint
from tests.cli.conftest import Outcome
from tests.cli.test_bad_input import refused

pytest.importorskip("gguf")

Cli = Callable[..., Outcome]
SITES = [f"blocks.{i}.resid_post" for i in range(3)]
DIRECTIONS = {site: np.full(64, i + 1, np.float32) for i, site in enumerate(SITES)}


@pytest.fixture
def vector(tmp_path: Path) -> Path:
    return ag.SteeringVector(DIRECTIONS, method="caa", where="generated").save(tmp_path / "v.safetensors")


def test_there_and_back(cli: Cli, vector: Path, tmp_path: Path) -> None:
    target, again = tmp_path / "v.gguf", tmp_path / "again.safetensors"
    refused(cli("convert-vector", vector, "-o", target), "blocks.0.resid_post", "layer 0")
    assert not target.exists()
    made = cli("convert-vector", vector, "--site", "blocks.{1..2}.*", "--model-hint", "llama", "-o", target)
    assert made.code == 0 and made.out == f"{target}\n" and "blocks.1.resid_post [64]" in made.err
    made = cli("convert-vector", target, "-o", again)
    assert made.code == 0 and "direction.n was read as blocks.n.resid_post" in made.err
    back = ag.load_vector(again)
    assert list(back.directions) == SITES[1:] and np.array_equal(back.directions[SITES[2]], DIRECTIONS[SITES[2]])
    assert (back.method, back.where, back.model_type) == ("caa", "generated", "llama")
    quiet = cli("convert-vector", target, "-o", again, "-q")
    assert quiet.err == "" and quiet.out == f"{again}\n"
    shown = cli("convert-vector", target, "-o", again, "--json").json
    assert shown["norms"] == {SITES[1]: 16.0, SITES[2]: 24.0} and len(shown["messages"]) == 1


def test_for_a_model(cli: Cli, model: Path, tmp_path: Path) -> None:
    """Sites get the model's names, and the file says which model it is for; the next one is then refused."""
    foreign = ag.SteeringVector(
        {"blocks.1.hook_resid_post": DIRECTIONS[SITES[1]], "model.layers[2].output": DIRECTIONS[SITES[2]]}
    )
    target = tmp_path / "named.safetensors"
    made = cli("convert-vector", foreign.save(tmp_path / "f.safetensors"), "--model", model, "-o", target)
    assert made.code == 0, made.err
    graph, named = ag.load(model), ag.load_vector(target)
    assert list(named.directions) == SITES[1:]
    assert (named.model, named.tokenizer) == (model_fingerprint(graph), tokenizer_fingerprint(graph))
    assert named.model and named.tokenizer and named.model_type == "llama"

    other = ag.SteeringVector(named.directions, named.model.replace(":", ":0")).save(tmp_path / "other.safetensors")
    refused(cli("convert-vector", other, "--model", model, "-o", target), "other.safetensors", "another model", "--any-model")
    freed = cli("convert-vector", other, "--model", model, "--any-model", "-o", target)
    assert freed.code == 0 and ag.load_vector(target).model == ""


def test_a_vector_without_a_site(cli: Cli, tmp_path: Path) -> None:
    save_file({"anything": np.ones(4, np.float32)}, tmp_path / "bare.safetensors")
    refused(cli("convert-vector", tmp_path / "bare.safetensors", "-o", tmp_path / "v.gguf"), "no site")
    made = cli("convert-vector", tmp_path / "bare.safetensors", "--at", "blocks.3.resid_post", "-o", tmp_path / "v.gguf")
    assert made.code == 0 and list(ag.load_vector(tmp_path / "v.gguf").directions) == ["blocks.3.resid_post"]
    shifted = cli("convert-vector", tmp_path / "v.gguf", "--layer-base", 1, "-o", tmp_path / "w.safetensors")
    assert shifted.code == 0 and list(ag.load_vector(tmp_path / "w.safetensors").directions) == ["blocks.2.resid_post"]


def test_bases_are_converted_too(cli: Cli, tmp_path: Path) -> None:
    plane = ag.SteeringVector({}, bases={SITES[1]: np.eye(2, 64, dtype=np.float32)}).save(tmp_path / "p.safetensors")
    made = cli("convert-vector", plane, "-o", tmp_path / "q.safetensors", "--json")
    assert made.json["bases"] == {SITES[1]: [2, 64]}
    refused(cli("convert-vector", plane, "-o", tmp_path / "q.gguf"), "bases")


def test_bad_input(cli: Cli, vector: Path, model: Path, tmp_path: Path) -> None:
    target = tmp_path / "o.safetensors"
    refused(cli("convert-vector", tmp_path / "none.gguf", "-o", target), "none.gguf")
    refused(cli("convert-vector", vector, "-o", tmp_path / "o.pt"), ".safetensors or .gguf")
    refused(cli("convert-vector", vector, "-o", tmp_path / "no" / "o.gguf"), "no folder")
    refused(cli("convert-vector", vector, "--site", "blocks.9.*", "-o", target), "selects nothing", SITES[0])
    refused(cli("convert-vector", vector, "--at", "embed", "-o", target), "sites of its own")
    refused(cli("convert-vector", vector, "--layer-base", 1, "-o", target), "--layer-base", ".gguf")
    narrow = ag.SteeringVector({SITES[1]: np.ones(63, np.float32)}).save(tmp_path / "narrow.safetensors")
    refused(cli("convert-vector", narrow, "--model", model, "-o", target), "63 numbers", SITES[1])
    absent = ag.SteeringVector({"blocks.99.resid_post": np.ones(64, np.float32)}).save(tmp_path / "absent.safetensors")
    refused(cli("convert-vector", absent, "--model", model, "-o", target), "blocks.99.resid_post")
    twice = {SITES[1]: np.ones(64, np.float32), "blocks.1.hook_out": np.ones(64, np.float32)}
    two = ag.SteeringVector(twice).save(tmp_path / "two.safetensors")
    refused(cli("convert-vector", two, "--model", model, "-o", target), "twice")
    assert not target.exists()
