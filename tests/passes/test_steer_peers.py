"""Steering is what other libraries compute: the same vectors applied with nnsight and with repeng give the same logits."""

from __future__ import annotations

import copy
import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import actgraph as ag
from actgraph.formats.vectors import SteeringVector
from actgraph.graph import Graph
from actgraph.graph.graph import Array
from tests.passes.conftest import apply, hf_stories, relative, token_inputs

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = (1, 2)
SCALE = 1.5
MODELS = ("stories260k", "qwen3")


@functools.cache
def module(name: str) -> Any:
    if name == "stories260k":
        return hf_stories()
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=8, intermediate_size=64,
        vocab_size=512, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval()


@functools.cache
def graph_of(name: str) -> Graph:
    if name == "stories260k":
        return ag.load(name)
    ids = torch.arange(6).reshape(2, 3) + 3
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": torch.arange(3).expand(2, 3)}
    dynamic = dict.fromkeys(inputs, ("batch", "seq"))
    return ag.trace(module(name), (), kwargs={**inputs, "use_cache": False}, dynamic=dynamic, name=name)


def vector_of(name: str) -> SteeringVector:
    """A direction for each of the blocks, no two alike."""
    rng = np.random.default_rng(5)
    width = module(name).config.hidden_size
    return SteeringVector({f"blocks.{n}.resid_post": rng.normal(0, 0.5, width).astype(np.float32) for n in BLOCKS})


def steered(name: str, path: Path, scale: float = SCALE, fold: str = "true") -> Array:
    graph = apply(graph_of(name), f"steer{{vector={path} scale={scale} fold={fold}}}")
    return np.asarray(graph.run(inputs_of(graph))["logits"])


def inputs_of(graph: Graph) -> dict[str, Array]:
    names = {value.name for value in graph.inputs()}
    return {key: array for key, array in token_inputs().items() if key in names}


def with_nnsight(name: str, shift: int = 0, sign: float = 1.0) -> Array:
    """Logits of nnsight, each block's output being edited. shift: of the blocks' numbers."""
    from nnsight import NNsight

    model = NNsight(copy.deepcopy(module(name)))  # whose modules it patches
    given = {key: torch.from_numpy(array) for key, array in token_inputs().items()}
    added = [torch.from_numpy(v) * SCALE * sign for v in vector_of(name).directions.values()]
    with torch.no_grad(), model.trace(**given, use_cache=False):
        for number, vector in zip(BLOCKS, added, strict=True):
            model.model.layers[number + shift].output[:] += vector
        logits = model.lm_head.output.save()
    return np.asarray(logits.numpy())


@pytest.mark.parametrize("name", MODELS)
def test_nnsight_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    path = vector_of(name).save(tmp_path / "v.safetensors")
    reference = with_nnsight(name)
    for fold in ("true", "false"):
        assert relative(reference, steered(name, path, fold=fold)) < 1e-5
    assert relative(with_nnsight(name, shift=-1), steered(name, path)) > 1e-3, "the wrong blocks must be noticed"
    assert relative(with_nnsight(name, sign=-1.0), steered(name, path)) > 1e-3


#: Runs in the environment of repeng: reads our GGUF file with its own reader, and applies it with its own wrapped blocks.
_REPENG = """
import json, sys
import numpy as np, torch
from repeng import ControlModel, ControlVector
from transformers import AutoModelForCausalLM

job = json.loads(sys.stdin.read())
model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).eval()
vector = ControlVector.import_gguf(job["vector"])
assert sorted(vector.directions) == job["blocks"], sorted(vector.directions)
control = ControlModel(model, job["blocks"])
given = {key: torch.from_numpy(array) for key, array in np.load(job["inputs"]).items()}
results = {}
for name, scale in (("steered", job["scale"]), ("negative", -job["scale"]), ("reset", None)):
    control.reset() if scale is None else control.set_control(vector, scale)
    with torch.no_grad():
        results[name] = control(**given, use_cache=False).logits.numpy()
np.savez(job["logits"], **results)
"""


@pytest.fixture(scope="module")
def repeng(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with repeng, which wants an older numpy than we do; made here."""
    folder = tmp_path_factory.mktemp("peers")
    script = ROOT / "benchmarks" / "peers" / "environments.py"
    made = subprocess.run([sys.executable, script, "repeng", "--env", folder], capture_output=True, text=True, timeout=1800)
    if made.returncode:
        pytest.skip(f"the environment of repeng cannot be made here: {made.stderr.strip().splitlines()[-1]}")
    return folder / "repeng" / "bin" / "python"


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_repeng_reads_our_file_and_gives_the_same_logits(name: str, repeng: Path, tmp_path: Path) -> None:
    ours = vector_of(name)
    files = {kind: ours.save(tmp_path / f"v.{kind}") for kind in ("gguf", "safetensors")}
    module(name).save_pretrained(tmp_path / "model")
    given = token_inputs()
    np.savez(tmp_path / "inputs.npz", **given)
    job = {
        "model": str(tmp_path / "model"), "vector": str(files["gguf"]), "blocks": list(BLOCKS), "scale": SCALE,
        "inputs": str(tmp_path / "inputs.npz"), "logits": str(tmp_path / "logits.npz"),
    }  # fmt: skip
    run = subprocess.run([repeng, "-c", _REPENG], input=json.dumps(job), capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    theirs = np.load(tmp_path / "logits.npz")
    for path in files.values():
        assert relative(theirs["steered"], steered(name, path)) < 1e-5
        assert relative(theirs["negative"], steered(name, path, scale=-SCALE)) < 1e-5
    plain = np.asarray(graph_of(name).run(inputs_of(graph_of(name)))["logits"])
    assert relative(theirs["reset"], plain) < 1e-5
    assert relative(theirs["steered"], plain) > 1e-2
