"""The guide to steering tells the truth: its commands steer as far as it says, and its tables name all that there is."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

import actgraph as ag
from actgraph.calibrate.perplexity import log_likelihoods
from actgraph.cli import main
from actgraph.graph import Graph
from actgraph.graph.where import Where
from actgraph.pipeline.registry import all_passes
from tests import zoo
from tests.passes.test_extract import sentences
from tests.test_docs import ROOT, blocks

PAGE = "docs/steering.md"


def text() -> str:
    return (ROOT / PAGE).read_text(encoding="utf-8")


def flat() -> str:
    """The page without line breaks."""
    return " ".join(text().split())


def commands() -> list[list[str]]:
    """The five commands, as lists of arguments of ``actgraph``."""
    first = next(block for block in blocks(PAGE) if block.language == "bash")
    return [shlex.split(line)[1:] for line in first.text.splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The guide's files, the exported model and the extracted vector."""
    export, extract, *_ = commands()
    assert export == ["export", "stories260k", "-o", "stories.onnx"]
    folder = tmp_path_factory.mktemp("guide")
    for block in blocks(PAGE):
        if block.file:
            (folder / block.file).write_text(block.text, encoding="utf-8")
    zoo.captured("stories260k").save(folder / "stories.onnx")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main([*extract, "--quiet"]) == 0
    return folder


@pytest.fixture(autouse=True)
def _there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def preference(graph: Graph) -> float:
    """Log-likelihood per token of bright sentences minus that of gloomy ones; none of them is in the guide's files."""
    seen = {line for name in ("bright.txt", "gloomy.txt") for line in Path(name).read_text().splitlines()}
    means = []
    for texts in sentences():
        found = log_likelihoods(graph, [each for each in texts if each not in seen], batch_size=32, progress=False)
        means.append(float((found.totals / found.counts).mean()))
    return means[0] - means[1]


def steered(scale: float, *, site: str = "", vector: str = "bright.safetensors") -> float:
    """The preference of the file that the guide's command writes, with another scale."""
    command = commands()[2]
    assert command[:2] == ["run", "stories.onnx"] and "scale=3}" in command[3]
    pipeline = (
        command[3].replace("scale=3", f"scale={scale}{f' site={site}' if site else ''}").replace("bright.safetensors", vector)
    )
    assert main([*command[:3], pipeline, "-o", f"at{scale}.onnx", "--quiet"]) == 0
    return preference(ag.load(f"at{scale}.onnx"))


def test_the_five_commands_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(commands()) == 5
    for command in commands()[2:]:
        assert main(command) == 0, command
    assert "Once upon a time" in capsys.readouterr().out


def test_likelihood_of_unseen_sentences_rises_with_the_scale_as_the_guide_says() -> None:
    got = {scale: steered(scale) for scale in (-2, 0, 1, 3)}
    assert list(got.values()) == sorted(got.values())
    said_there = re.search(r"is (\S+) without steering, (\S+) at scale 1, (\S+) at scale 3 and (\S+) at scale -2", flat())
    assert said_there is not None
    without, one, three, back = map(float, said_there.groups())
    for scale, said in ((0, without), (1, one), (3, three), (-2, back)):
        assert got[scale] == pytest.approx(said, abs=0.01), scale
    plain = preference(ag.load("stories.onnx"))
    assert got[0] == plain, "scale 0 is the model before"


def test_the_opposite_vector_and_a_random_one_do_not_do_that() -> None:
    plain = preference(ag.load("stories.onnx"))
    vector = ag.load_vector("bright.safetensors")
    (site,) = vector.directions
    (-1 * vector).save("back.safetensors")
    assert steered(3, vector="back.safetensors") < plain
    norm, rng = np.linalg.norm(vector.directions[site]), np.random.default_rng(0)
    moved = steered(3) - plain
    for number in range(3):
        direction = rng.standard_normal(64)
        ag.SteeringVector({site: norm * direction / np.linalg.norm(direction)}).save(f"random{number}.safetensors")
        assert abs(steered(3, vector=f"random{number}.safetensors") - plain) < moved / 2


def test_another_site_does_what_the_guide_says() -> None:
    assert "at `blocks.1.resid_post` the same texts do the reverse" in flat()
    command = [word.replace("blocks.3.resid_post", "blocks.1.resid_post") for word in commands()[1]]
    assert main([*command[:-1], "other.safetensors", "--quiet"]) == 0
    assert steered(3, vector="other.safetensors") < preference(ag.load("stories.onnx"))


def test_all_passes_of_the_family_are_in_the_guide() -> None:
    missing = [name for name, each in all_passes().items() if each.family == "steer" and f"`{name}`" not in text()]
    assert not missing


def test_what_the_tables_name_exists() -> None:
    table = text().split("## Methods")[1].split("\n\n```")[0]
    named = re.findall(r"`([a-z_0-9]+)\.([a-z_0-9]+)`", table)
    assert len(named) > 15
    for module, function in named:
        if module == "ag":
            assert callable(getattr(ag, function))
            continue
        assert callable(getattr(importlib.import_module(f"actgraph.passes.steer.{module}"), function)), (module, function)
    passes = set(all_passes())
    for row in re.findall(r"^\| [^|]+ \| `(\w+)` \|", table, re.MULTILINE):
        assert row in passes, row


def test_clauses_of_the_table_are_clauses() -> None:
    table = text().split("| clause | tokens |")[1].split("\n\n")[0]
    cells = [re.split(r"(?<!\\)\|", row)[1] for row in table.splitlines() if row]
    found = [clause.replace("\\|", "|") for cell in cells for clause in re.findall(r"`([^`]+)`", cell)]
    assert len(found) > 14
    for clause in found:
        Where.parse(clause)
