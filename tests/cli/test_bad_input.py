"""Bad usage and bad input: exit code 2, one line on standard error, no traceback, nothing written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.cli.conftest import Outcome

Cli = Callable[..., Outcome]


def refused(outcome: Outcome, *words: str) -> None:
    assert outcome.code == 2, outcome
    assert outcome.out == ""
    assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1, outcome.err
    assert "Traceback" not in outcome.err
    for word in words:
        assert word in outcome.err, outcome.err


def test_usage(cli: Cli, model: Path) -> None:
    refused(cli("nonsense"), "nonsense", "actgraph --help")
    refused(cli("sites"), "MODEL", "actgraph sites --help")
    refused(cli("sites", model, "--nonsense"), "--nonsense")
    refused(cli("generate", model, "-n", "many"), "--max-new-tokens", "integer")
    refused(cli("run", model, "-p", "dce"), "-o OUT.onnx")
    refused(cli("export", model), "-o OUT.onnx")
    refused(cli("verify", model, model, "-p", "dce"), "second model or passes")
    refused(cli("bisect", model, "-p", "dce", "--tolerance", 1, "--perplexity", 1), "either")


@pytest.mark.parametrize("name", ["missing.onnx", "missing.pt2", "missing-folder", "no.such.module:factory", "org/"])
def test_missing_models(cli: Cli, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused(cli("sites", name), name.split(":")[0])


def test_corrupt_models(cli: Cli, model: Path, tmp_path: Path) -> None:
    for name, content in (
        ("a.onnx", b"not a model"),
        ("b.onnx", model.read_bytes()[:5000]),
        ("c.onnx", b""),
        ("d.pt2", b"PK\x03\x04"),
    ):
        (tmp_path / name).write_bytes(content)
        refused(cli("inspect", tmp_path / name), name)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text("{")
    refused(cli("inspect", tmp_path / "folder"), "folder")
    (tmp_path / "readme.txt").write_text("hello")
    refused(cli("inspect", tmp_path / "readme.txt"), "readme.txt")


@pytest.mark.parametrize(
    ("pipeline", "words"),
    [
        ("", ["no passes"]),
        ("sparsfy", ["sparsfy", "sparsify"]),
        ("sparsify{sparsty=0.4}", ["sparsty", "sparsity"]),
        ("sparsify{sparsity=1.5}", ["sparsity", "1.5"]),
        ("sparsify{sparsity=much}", ["sparsity", "much"]),
        ("sparsify{sparsity=0.4", ["never closed"]),
        ("steer{vector=missing.safetensors site=blocks.1.resid_post}", ["missing.safetensors"]),
        ("tap{site=blocks.9.resid_post}", ["blocks.9.resid_post"]),
        ("tap{site=blocks.1.resid_pots}", ["blocks.1.resid_post"]),
        ("steer{vector=[1, 2, 3] site=blocks.1.resid_post}", ["3", "64"]),
    ],
)
def test_bad_pipelines(cli: Cli, model: Path, tmp_path: Path, pipeline: str, words: list[str]) -> None:
    refused(cli("run", model, "-p", pipeline, "-o", tmp_path / "out.onnx", "-q"), *words)
    assert list(tmp_path.iterdir()) == []


def test_bad_recipes(cli: Cli, model: Path, tmp_path: Path) -> None:
    out = ("-o", tmp_path / "out.onnx")
    refused(cli("run", model, "-r", tmp_path / "none.yaml", *out), "none.yaml")
    recipe = tmp_path / "recipe.yaml"
    for text, word in (
        ("passes: [", "recipe"),
        ("actgraph: 7\npasses: []", "7"),
        ("actgraph: 1\npasses:\n  - sparsify: {a: 1}", "line 3"),
    ):
        recipe.write_text(text)
        refused(cli("run", model, "-r", recipe, *out), word)
    refused(cli("run", model, "-r", recipe, "-p", "dce", *out), "both")
    assert not (tmp_path / "out.onnx").exists()


def test_bad_corpora(cli: Cli, model: Path, tmp_path: Path) -> None:
    run = ("run", model, "-p", "sparsify{sparsity=0.3}", "-o", tmp_path / "out.onnx", "-q")
    empty, broken, arrays = tmp_path / "empty.txt", tmp_path / "broken.jsonl", tmp_path / "wrong.npz"
    empty.write_text("\n\n")
    broken.write_text('{"text": "fine"}\n{"text": \n')
    np.savez(arrays, other=np.zeros((2, 3)))
    refused(cli(*run, "--corpus", tmp_path / "none.txt"), "none.txt")
    refused(cli(*run, "--corpus", empty), "empty")
    refused(cli(*run, "--corpus", broken), "broken.jsonl")
    refused(cli(*run, "--corpus", arrays))
    assert not (tmp_path / "out.onnx").exists()


def test_bad_targets(cli: Cli, model: Path, tmp_path: Path) -> None:
    run = ("run", model, "-p", "dce", "-q", "-o")
    refused(cli(*run, tmp_path / "out.bin"), ".onnx or .pt2")
    refused(cli(*run, tmp_path / "none" / "out.onnx"), "no folder")
    (tmp_path / "dir.onnx").mkdir()
    refused(cli(*run, tmp_path / "dir.onnx"), "folder")
    refused(
        cli("extract-vector", model, "--positive", "a", "--negative", "b", "--site", "embed", "-o", "v.bin"), ".safetensors"
    )
    refused(cli(*run, tmp_path / "out.pt2", "--inline", "all"))
    refused(cli(*run, tmp_path / "out.onnx", "--inline", "nonsense"), "nonsense")
    assert {path.name for path in tmp_path.iterdir()} == {"dir.onnx"}


def test_read_only_target(cli: Cli, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    import actgraph as ag

    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(30, "Read-only file system")

    def load(*arguments: object, **options: object) -> None:
        raise AssertionError("the model was loaded before the target was checked")

    target = tmp_path / "old.onnx"
    target.write_bytes(b"old")
    monkeypatch.setattr(ag, "load", load)
    with monkeypatch.context() as patch:  # root may write anywhere, so modes of folders prove nothing
        patch.setattr(os, "access", lambda path, mode, **options: mode != os.W_OK)
        refused(cli("export", model, "-o", target), "old.onnx is read-only")
    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    where = tmp_path / "out"
    for command in (
        ["run", model, "-p", "dce", "-o", where.with_suffix(".onnx")],
        ["run", model, "-p", "dce", "--dry-run", "--report", where.with_suffix(".json")],
        ["run", model, "-p", "dce", "--dry-run", "--reproducer", where],
        ["export", model, "-o", where.with_suffix(".pt2")],
        [
            "extract-vector",
            model,
            "--positive",
            "a",
            "--negative",
            "b",
            "--site",
            "embed",
            "-o",
            where.with_suffix(".safetensors"),
        ],
        ["bisect", model, "-p", "dce", "-o", where / "deep"],
        ["demo", "--keep", where],
    ):
        refused(cli(*command), "cannot write to the folder", "Read-only file system")
    assert [path.name for path in tmp_path.iterdir()] == ["old.onnx"]


def test_a_target_that_fails_half_way_leaves_the_old_file(
    cli: Cli, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from actgraph.formats import onnx_stream

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    target = tmp_path / "out.onnx"
    target.write_bytes(b"old")
    monkeypatch.setattr(onnx_stream, "write_model", full)
    refused(cli("export", model, "-o", target), "no space left")
    assert target.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir() if "onnx" in path.name] == ["out.onnx"]


def test_debug_shows_the_traceback(cli: Cli, tmp_path: Path) -> None:
    from actgraph.errors import InputError

    with pytest.raises(InputError):
        cli("sites", tmp_path / "none.onnx", "--debug")
    refused(cli("sites", tmp_path / "none.onnx"), "none.onnx")


def test_a_bug_is_one_line_too(cli: Cli, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import actgraph as ag

    def broken(*args: object) -> None:
        raise ZeroDivisionError("a bug\nwith detail")

    monkeypatch.setattr(ag, "load", broken)
    refused(cli("sites", model), "ZeroDivisionError", "--debug")


def test_generation_needs_a_language_model(cli: Cli, tmp_path: Path) -> None:
    import torch

    import actgraph as ag

    graph = ag.trace(torch.nn.Linear(4, 2), (torch.zeros(3, 4),))
    graph.save(tmp_path / "linear.onnx")
    refused(cli("generate", tmp_path / "linear.onnx", "hello"))
