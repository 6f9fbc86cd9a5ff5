"""``--input``, ``--adapter`` and ``export-adapter``: values of optional inputs on the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import actgraph as ag
from tests import zoo
from tests.cli.conftest import Outcome

Cli = Callable[..., Outcome]
SITE = "blocks.2.resid_post"


@pytest.fixture(scope="module")
def steered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model with two edits: one whose strength is given, and one whose vector is."""
    passes = f"steer{{site={SITE} vector={[1, -1] * 32} scale=input}}, steer{{site={SITE} vector=input}}"
    made = ag.run(zoo.captured("stories260k"), passes, parity="none").graph
    return made.save(tmp_path_factory.mktemp("steered") / "steered.onnx")


def text(outcome: Outcome) -> str:
    assert outcome.code == 0, outcome.err
    return outcome.out


def test_generate_with_inputs_and_adapters(cli: Cli, steered: Path, tmp_path: Path) -> None:
    run = ("generate", steered, "Once upon a time", "-n", 12, "--no-cache", "-q")
    plain, strong = text(cli(*run)), text(cli(*run, "--input", "steer.scale=3"))
    assert plain != strong == text(cli(*run, "--input", "steer.scale=[3.0]"))
    assert text(cli(*run, "--input", "steer.scale=0")) == plain
    vector = np.float32([3, -3] * 32)
    np.save(tmp_path / "v.npy", vector)
    ag.SteeringVector({SITE: vector, "other": -vector}).save(tmp_path / "v.safetensors")
    for name in ("v.npy", "v.safetensors"):
        assert text(cli(*run, "--input", f"steer.vector.{SITE}={tmp_path / name}")) == strong
    target = tmp_path / "strong.onnx_adapter"
    made = cli("export-adapter", steered, "--input", "steer.scale=3", "-o", target)
    assert made.out == f"{target}\n" and "steer.scale: float32[1]" in made.err
    assert text(cli(*run, "--adapter", target)) == strong
    shown = cli("export-adapter", steered, "--input", "steer.scale=[1, 2]", "-o", target, "--version", 7, "--json").json
    assert shown == {"file": str(target), "inputs": {"steer.scale": "float32[2]"}}


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("steer.scal=1",), r"did you mean steer.scale?"),
        (("steer.scale",), "is no name=value"),
        (("steer.scale=strong",), "no number, list of numbers"),
        (('steer.scale="3"',), "no number or list"),
        (("steer.scale=1", "steer.scale=2"), "given twice"),
        (("steer.scale=none.npy",), "cannot be read as an array"),
        (("steer.scale=none.safetensors",), "there is no steering vector"),
        (("steer.scale=[1, 2]",), "has shape [2]"),
    ],
)
def test_bad_inputs(cli: Cli, steered: Path, tmp_path: Path, arguments: tuple[str, ...], why: str) -> None:
    given = [part for argument in arguments for part in ("--input", argument)]
    runs = [cli("generate", steered, "x", "--no-cache", *given)]
    if "has shape" not in why:  # an adapter may be for two rows
        runs.append(cli("export-adapter", steered, *given, "-o", tmp_path / "a.onnx_adapter"))
    for refused in runs:
        assert refused.code == 2 and why in refused.err and not (tmp_path / "a.onnx_adapter").exists()


def test_bad_files(cli: Cli, steered: Path, tmp_path: Path) -> None:
    refused = cli("export-adapter", steered, "--input", "steer.scale=1", "-o", tmp_path / "a.onnx")
    assert refused.code == 2 and ".onnx_adapter" in refused.err
    refused = cli("generate", steered, "x", "--adapter", tmp_path / "none.onnx_adapter", "--no-cache")
    assert refused.code == 2 and "there is no adapter" in refused.err
