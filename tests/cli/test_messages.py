"""What the command line says: once, in plain words, about the user's own files and code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest

import actgraph as ag
from tests import zoo
from tests.cli.conftest import Outcome
from tests.cli.test_bad_input import refused

Cli = Callable[..., Outcome]
CLIP = "clip{site=activation.0 max=1.0}"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """An ONNX file of opset 8: our ops need a newer one."""
    helper, tensor = onnx.helper, onnx.TensorProto.FLOAT
    x, y = (helper.make_tensor_value_info(name, tensor, ["batch", 4]) for name in ("x", "y"))
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"], name="relu")], "old", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 8)], ir_version=3)
    onnx.save(model, tmp_path / "old.onnx")
    return tmp_path / "old.onnx"


def test_a_note_is_told_when_it_arises_and_then_kept_as_history(cli: Cli, old: Path, tmp_path: Path) -> None:
    new, newer = tmp_path / "new.onnx", tmp_path / "newer.onnx"
    first = cli("run", old, "-p", CLIP, "-o", new)
    assert first.code == 0 and (first.out + first.err).count("opset raised from 8") == 1
    assert "note: opset raised from 8" in cli("inspect", new).out
    second = cli("run", new, "-p", "tap{site=activation.0}", "-o", newer)
    assert second.code == 0, second.err
    later = [second, cli("sites", new), cli("export", new, "-o", tmp_path / "copy.onnx"), cli("verify", new, newer)]
    assert all(one.code == 0 and "opset raised" not in one.out + one.err for one in later)
    assert cli("inspect", newer, "--json").json["notes"] == ag.load(new).notes != []


def test_models_without_text_are_told_what_to_give(cli: Cli, old: Path, tmp_path: Path) -> None:
    calibrate = ("run", old, "-p", "clip{site=activation.0 percentile=90}", "-o", tmp_path / "out.onnx")
    refused(cli(*calibrate), "x f32[batch, 4]", "no text", "--corpus data.npz with the arrays x")
    refused(cli("generate", old, "hello"), "no language model", "x f32[batch, 4]")
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32))
    done = cli(*calibrate, "--corpus", tmp_path / "data.npz")
    assert done.code == 0 and "calibrated on data.npz: 20 samples\n" in done.out and "old (onnx): 1 pass in" in done.out
    np.savez(tmp_path / "one.npz", x=np.ones((1, 4), np.float32))
    assert ": 1 sample\n" in cli(*calibrate, "--corpus", tmp_path / "one.npz").out


def test_diff_names_the_files_and_counts_in_words(cli: Cli, old: Path, model: Path, tmp_path: Path) -> None:
    new = tmp_path / "new.onnx"
    cli("run", old, "-p", f"{CLIP}, tap{{site=activation.0}}", "-o", new)
    shown = cli("diff", old, new)
    assert shown.code == 1
    assert shown.out.startswith(f"--- {old}\n+++ {new}\n")
    assert "@@ passes\n" in shown.out and "passs" not in shown.out
    assert "2 passes added" in shown.out and "1 node added" in shown.out
    assert cli("diff", old, new, "--json").json["left"] == str(old)


def test_diff_of_different_models_is_one_line(cli: Cli, old: Path, model: Path) -> None:
    shown = cli("diff", old, model)
    assert shown.code == 1
    (line,) = shown.out.splitlines()[3:]
    assert line.startswith("different models: the first takes x f32[batch, 4], the second input_ids i64[batch, seq], ")
    assert cli("diff", old, model, "--json").json["changes"]


def test_usage_errors_have_no_prefix(cli: Cli, model: Path) -> None:
    for arguments in (["run", model, "-p", "dce"], ["generate", model, "-n", "many"], ["generate", model, "-n", "-1"]):
        shown = cli(*arguments)
        refused(shown)
        assert "Invalid value" not in shown.err and "Input should" not in shown.err


def test_options_are_checked_before_the_model_is_loaded(
    cli: Cli, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*arguments: object, **options: object) -> None:
        raise AssertionError("the model was loaded first")

    monkeypatch.setattr(ag, "load", load)
    run, out = ("run", model, "-p", "dce", "-o"), tmp_path / "out"
    refused(cli(*run, f"{out}.pt2", "--inline", "all"), "--inline is for .onnx files")
    refused(cli("export", model, "-o", f"{out}.pt2", "--external-data"), "--external-data is for .onnx files")
    refused(cli(*run, f"{out}.onnx", "--inline", "nonsense"), "nonsense", "none, all or the name of an op")
    refused(cli(*run, f"{out}.onnx", "--tokenizer", tmp_path), "no tokenizer.json")
    refused(cli(*run, f"{out}.onnx", "--dtype", "f8"), "float32, float16, bfloat16, auto")
    refused(cli(*run, f"{out}.onnx", "--dtype", "float16"), "Hugging Face", "cast")
    refused(cli(*run, f"{out}.onnx", "--corpus", "none.txt"), "none.txt")
    refused(cli("bisect", model, "-p", "dce", "--corpus", "none.txt"), "none.txt")
    refused(cli("bisect", model, "-p", "dce", "-o", model), "is a file")
    vector = ("--site", "embed", "-o", f"{out}.safetensors")
    refused(cli("extract-vector", model, "--positive", "none.txt", "--negative", "none.txt", *vector), "none.txt")


def test_dtype_of_a_hugging_face_model(cli: Cli) -> None:
    facts = cli("inspect", "stories260k", "--dtype", "bfloat16", "--json").json
    assert facts["outputs"][0]["type"].startswith("bf16") and "bf16" in facts["parameters"]


_CODE = """import torch


def build():
    sizes = {"a": 1}
    return torch.nn.Linear(sizes["b"], 2), (torch.zeros(1, 2),)


def number():
    return 3
"""


def test_code_of_the_user_that_fails_is_named_with_its_line(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, text in (
        ("cli_factory", _CODE),
        ("cli_import", "import no_such_package\n"),
        ("cli_top", "x = 1\ny = x / 0\n"),
        ("cli_syntax", "def f(:\n"),
    ):
        (tmp_path / f"{name}.py").write_text(text)
    refused(cli("sites", "cli_factory:build"), "cli_factory:build failed: KeyError: 'b'", "line 6 of", 'sizes["b"]')
    refused(cli("sites", "cli_factory:number"), "returned a value of type int")
    refused(cli("sites", "cli_factory:none"), "cannot find cli_factory:none")
    refused(cli("sites", "cli_import:f"), "importing cli_import failed", "no_such_package", "line 1 of")
    refused(cli("sites", "cli_top:f"), "importing cli_top failed: ZeroDivisionError", "line 2 of", "y = x / 0")
    refused(cli("sites", "cli_syntax:f"), "importing cli_syntax failed: SyntaxError", "line 1 of")
    refused(cli("sites", "cli_nowhere:f"), "cannot find cli_nowhere:f")


_PASSES = """from typing import ClassVar

import actgraph as ag
from actgraph.passes.places import SitePass
from actgraph.pipeline.base import UNBOUNDED, PassResult


@ag.register
class Halve(SitePass):
    "Caps activations."

    name: ClassVar[str] = "cli_halve"
    family: ClassVar[str] = "clip"

    def run(self, graph, context):
        result = PassResult(expected_change="capped", expected_size=UNBOUNDED)
        with context.edit(graph) as editor:
            for site in self.select(graph):
                editor.insert_at(site, "actgraph.clip", attributes={"max": 0.5})
                result.counts["capped"] += 1
        return result
"""


def test_passes_of_ones_own_reach_the_command_line(
    cli: Cli, old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from actgraph.pipeline.registry import unregister

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "cli_own_passes.py").write_text(_PASSES)
    (tmp_path / "cli_broken_passes.py").write_text("x = 1\ny = x / 0\n")
    own, out = "cli_halve{site=activation.0}", tmp_path / "out.onnx"
    refused(cli("run", old, "-p", own, "-o", out), "there is no pass 'cli_halve'")
    try:
        done = cli("run", old, "-p", own, "--import", "cli_own_passes", "-o", out)
        assert done.code == 0 and "capped 1" in done.out, done.err
        assert cli("passes", "cli_halve", "--import", "cli_own_passes").code == 0
        verified = cli("verify", old, "-p", own, "--import", "cli_own_passes", "--tolerance", "0.001")
        assert "cli_halve" in verified.out and "there is no pass" not in verified.err
        assert cli("bisect", old, "-p", own, "--import", "cli_own_passes").code == 0
    finally:
        unregister("cli_halve")
    refused(cli("run", old, "-p", own, "--import", "no_such_passes", "-o", out), "cannot find the module no_such_passes")
    failed = cli("run", old, "-p", own, "--import", "cli_broken_passes", "-o", out)
    refused(failed, "importing cli_broken_passes failed: ZeroDivisionError", "line 2 of")


def test_the_demo_keeps_its_files_in_a_new_folder_only(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    refused(cli("demo", "--keep", tmp_path), "is not empty", "name a new one")
    assert (tmp_path / "config.json").read_text() == "{}"


def test_what_takes_its_time_is_said(cli: Cli, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from contextlib import contextmanager

    from actgraph.cli import output

    said: list[str] = []

    @contextmanager
    def waiting(text: str, *, quiet: bool = False) -> Iterator[None]:
        said.append(text)
        yield

    monkeypatch.setattr(output, "waiting", waiting)
    monkeypatch.setattr(ag, "load", lambda *a, **o: ag.Graph)
    cli("sites", "stories260k")
    cli("sites", model)
    assert said[0].startswith("capturing stories260k ...") and said[1] == f"loading {model}"


def test_a_site_that_was_removed_is_told_once(cli: Cli, model: Path, tmp_path: Path) -> None:
    vector = tmp_path / "v.safetensors"
    ag.SteeringVector({"": np.ones(64, np.float32)}).save(vector)
    text = f"steer{{vector={vector} site=blocks.0.mlp.out}}, steer{{vector={vector} site=blocks.0.resid_post}}"
    pipeline = f"{text}, clip{{site=blocks.0.mlp.out max=1}}"
    shown = cli("run", model, "-p", pipeline, "-o", tmp_path / "out.onnx")
    refused(shown, "site blocks.0.mlp.out was removed by steer (", "(put this pass before steer, or choose another site)")


def test_a_mixture_of_experts_has_nothing_to_prune_and_shares_are_not_rounded_up(cli: Cli, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    experts = zoo.captured("mixtral").save(tmp_path / "mixtral.onnx")
    refused(
        cli("run", experts, "-p", "prune{ratio=0.5}", "-o", out), "no feed-forward that can be pruned", "experts of a mixture"
    )
    done = cli("run", model, "-p", "prune{ratio=0.995 importance=magnitude}", "-o", out)
    assert done.code == 0 and "99.5% of the feed-forward neurons are removed" in done.out, done.err
