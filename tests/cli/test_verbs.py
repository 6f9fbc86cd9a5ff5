"""Each verb on a real model: what it prints, writes and returns."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import actgraph as ag
from actgraph.cli.generate import unescaped
from tests import zoo
from tests.cli.conftest import Outcome

Cli = Callable[..., Outcome]
VERBS = [
    "sites", "passes", "run", "inspect", "diff", "verify", "export", "generate", "bench", "bisect", "extract-vector",
    "convert-vector", "export-adapter", "demo",
]  # fmt: skip
SPARSE = "sparsify{method=teal threshold=0.05}"


def test_help_of_every_verb_shows_an_example(cli: Cli) -> None:
    top = cli("--help")
    assert top.code == 0
    for verb in VERBS:
        assert verb in top.out
        shown = cli(verb, "--help")
        assert shown.code == 0 and f"Example:\n    actgraph {verb}" in shown.out


def test_help_is_fast_because_it_imports_no_engine() -> None:
    code = (
        "import sys; from actgraph.cli import main; main(['run', '--help']);"
        "print([m for m in ('torch', 'onnx', 'onnxruntime', 'numpy.linalg.lapack', 'transformers') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.splitlines()[-1] == "[]"


def test_version(cli: Cli) -> None:
    assert cli("--version").out == f"actgraph {ag.__version__}\n"


def test_sites(cli: Cli, model: Path) -> None:
    shown = cli("sites", model, "blocks.*.mlp.hidden", "--ignore", "blocks.0.*")
    assert shown.code == 0
    assert [line.split()[0] for line in shown.out.splitlines()[1:]] == [f"blocks.{i}.mlp.hidden" for i in range(1, 5)]
    listed = cli("sites", model, "blocks.{1..2}.resid_post", "--json").json
    assert [site["name"] for site in listed] == ["blocks.1.resid_post", "blocks.2.resid_post"]
    assert listed[0]["shape"] == ["batch", "seq", 64] and listed[0]["dtype"] == "f32"


def test_passes(cli: Cli) -> None:
    listed = cli("passes")
    assert {"steer", "sparsify", "quantize", "prune"} <= {line.split()[0] for line in listed.out.splitlines()}
    assert "sparsity" in cli("passes", "sparsify").out
    schema = cli("passes", "sparsify", "--json").json
    assert schema["properties"]["method"]["enum"] == ["teal", "cats"]
    assert "sparsify" in json.dumps(cli("passes", "--json").json)


def test_run_writes_a_file_that_knows_what_was_done(cli: Cli, model: Path, tmp_path: Path) -> None:
    target, report = tmp_path / "out.onnx", tmp_path / "report.json"
    done = cli("run", model, "-p", f"{SPARSE}, quantize{{weights=int8}}", "-o", target, "--report", report)
    assert done.code == 0 and done.out.splitlines()[-1] == str(target)
    rows = json.loads(report.read_text())["rows"]
    assert [row["name"] for row in rows] == ["sparsify", "quantize"] and rows[0]["counts"]
    shown = cli("inspect", target)
    assert SPARSE.replace("method=teal ", "") in shown.out and "qdq_matmulnbits_accuracy_level=1" in shown.out
    facts = cli("inspect", target, "--json").json
    assert [record["name"] for record in facts["history"]] == ["sparsify", "quantize"]
    assert any("Gate" in name for name in facts["functions"])
    both = tmp_path / "both.onnx"  # quantized activations are no reason to quantize them again
    assert cli("run", model, "-p", "quantize{activations=dynamic}", "-o", both, "-q").code == 0
    assert cli("inspect", both, "--json").json["session options"] == {"session.qdq_matmulnbits_accuracy_level": "1"}
    inlined = tmp_path / "inlined.onnx"
    assert cli("run", model, "-p", SPARSE, "--inline", "all", "-o", inlined, "-q").out == f"{inlined}\n"
    assert cli("inspect", inlined, "--json").json["functions"] == {}
    assert cli("verify", inlined, model).code == 1  # sparse is not the same


def test_run_with_a_recipe_equals_text(cli: Cli, model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("actgraph: 1\npasses:\n  - sparsify: {threshold: 0.05}\n")
    assert cli("run", model, "-r", recipe, "-o", tmp_path / "a.onnx", "-q").code == 0
    assert cli("run", model, "-p", SPARSE, "-o", tmp_path / "b.onnx", "-q").code == 0
    same = cli("diff", tmp_path / "a.onnx", tmp_path / "b.onnx")
    assert same.code == 0 and "no difference" in same.out


def test_dry_run_writes_nothing(cli: Cli, model: Path, tmp_path: Path) -> None:
    shown = cli("run", model, "-p", "sparsify{sparsity=0.3}", "-o", tmp_path / "out.onnx", "--dry-run")
    assert shown.code == 0 and "needs 35 statistics" in shown.out
    assert cli("export", model, "-o", tmp_path / "out.onnx", "--dry-run").code == 0
    assert list(tmp_path.iterdir()) == []


def test_diff_tells_what_changed(cli: Cli, model: Path, tmp_path: Path) -> None:
    cli("run", model, "-p", SPARSE, "-o", tmp_path / "sparse.onnx")
    changed = cli("diff", model, tmp_path / "sparse.onnx", "--json")
    assert changed.code == 1
    assert changed.json["counts"]["node added"] == 35
    assert cli("diff", model, model, "-q").out == ""


def test_diff_and_verify_across_dialects(cli: Cli, tmp_path: Path) -> None:
    """One graph saved from torch in both formats: sites and views of passes' ops included."""
    import torch

    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    graph = ag.trace(model, (torch.zeros(2, 4),), dynamic={"input": ("batch", None)})
    out = ag.run(graph, "clip{site=activation.0 max=1.0}").graph
    out.save(tmp_path / "m.pt2")
    out.save(tmp_path / "m.onnx")
    assert cli("verify", tmp_path / "m.pt2", tmp_path / "m.onnx").code == 0
    same = cli("diff", tmp_path / "m.pt2", tmp_path / "m.onnx")
    assert same.code == 0 and "compared: signature, sites and views" in same.out


def test_verify_two_models(cli: Cli, model: Path, tmp_path: Path) -> None:
    cli("export", model, "--inline", "all", "-o", tmp_path / "copy.onnx")
    assert cli("verify", model, tmp_path / "copy.onnx").code == 0
    cli("run", model, "-p", "quantize", "-o", tmp_path / "int8.onnx")
    failed = cli("verify", model, tmp_path / "int8.onnx", "--json")
    assert failed.code == 1 and not failed.json["ok"]
    assert cli("verify", model, tmp_path / "int8.onnx", "--tolerance", "0.5").code == 0
    np.savez(tmp_path / "inputs.npz", **ag.sample_inputs(ag.load(model)))
    assert cli("verify", model, tmp_path / "int8.onnx", "--inputs", tmp_path / "inputs.npz", "-q").code == 1


def test_verify_a_pipeline(cli: Cli, model: Path, tmp_path: Path) -> None:
    vector = tmp_path / "v.safetensors"
    ag.SteeringVector({"blocks.2.resid_post": np.linspace(-1, 1, 64, dtype=np.float32)}).save(vector)
    pipeline = f"steer{{vector={vector} scale=0.5}}, sparsify{{threshold=0.05}}, prune{{ratio=0.25 importance=magnitude}}"
    shown = cli("verify", model, "-p", pipeline, "--json")
    assert shown.code == 0, shown.out
    what = [check["what"] for check in shown.json["checks"]]
    for expected in (
        "steer at scale=0.0 is the identity",
        "steer at fold=False gives the same outputs",
        "sparsify at threshold=0.0 is the identity",
        "prune at mode=mask gives the same outputs",
        "onnxruntime = exported ONNX, functions kept",
        "onnxruntime = exported ONNX, inlined",
    ):
        assert expected in what


def test_verify_notices_a_pass_that_is_not_the_identity_where_it_should_be(cli: Cli, model: Path) -> None:
    from typing import ClassVar

    from actgraph.pipeline import UNBOUNDED, Pass, PassContext, PassResult, registry

    class Liar(Pass):
        name: ClassVar[str] = "liar"
        family: ClassVar[str] = "test"
        off: ClassVar[dict[str, object]] = {"threshold": 0.0}
        threshold: float = 0.5

        def run(self, graph: ag.Graph, context: PassContext) -> PassResult:
            with context.edit(graph) as editor:
                editor.insert_at(graph.site("blocks.1.mlp.hidden"), "actgraph.gate", attributes={"threshold": 0.5})
            result = PassResult(expected_change="something", expected_size=UNBOUNDED)
            result.counts["inserted"] = 1
            return result

    registry.register(Liar)
    try:
        shown = cli("verify", model, "-p", "liar", "--json")
    finally:
        registry.unregister("liar")
    assert shown.code == 1
    assert [check["what"] for check in shown.json["checks"] if not check["ok"]] == ["liar at threshold=0.0 is the identity"]


def test_generate(cli: Cli, model: Path, tmp_path: Path) -> None:
    shown = cli("generate", model, "Once upon a time", "-n", 12)
    assert shown.code == 0 and shown.out == "Once upon a time, there was a little girl named Lily. She\n"
    drawn = [cli("generate", model, "-n", 20, "--temperature", 1.0, "--seed", seed, "--json").json for seed in (1, 1, 2)]
    for each in drawn:
        assert each.pop("tokens_per_second") == pytest.approx(20 / each.pop("seconds")) and each["engine"] == "onnxruntime"
    assert drawn[0] == drawn[1] and drawn[0]["tokens"] != drawn[2]["tokens"]
    assert len(drawn[0]["tokens"]) == 20 and drawn[0]["stopped_by"] == "length"
    assert re.fullmatch(r"12 tokens: first token after \d+\.\d\d s, then \d+ tokens/s", shown.err.splitlines()[-1])


def test_generate_stops_before_a_text_with_escapes(cli: Cli, model: Path) -> None:
    """A shell passes \\n as it is written."""
    whole = cli("generate", model, "Once upon a time", "-n", 200, "-q").out
    assert "\n" in whole.rstrip("\n")
    for stop in ("\\n", "\\x0a", "\\u000A"):
        shown = cli("generate", model, "Once upon a time", "-n", 200, "--stop", stop, "-q")
        assert shown.code == 0 and shown.out == whole.split("\n")[0] + "\n"
    for text, meant in (
        (r"\d\\n", "\\d\\n"), (r"C:\Users", r"C:\Users"), (r"\t|\r", "\t|\r"), ("\\", "\\"), (r"\U0001F600", "😀"),
        (r"\UFFFFFFFF", r"\UFFFFFFFF"), ("ü\n", "ü\n"),
    ):  # fmt: skip
        assert unescaped(text) == meant


def test_generate_in_an_engine(cli: Cli, model: Path, tmp_path: Path) -> None:
    """A torch graph runs in both; the graphs of the program that it becomes are opened before the clock starts."""
    torch_graph, told = zoo.captured("stories260k").save(tmp_path / "stories.pt2"), {}
    for engine in ("torch", "onnxruntime"):
        shown = cli("generate", torch_graph, "Once upon a time", "-n", 8, "--engine", engine, "-v")
        assert shown.code == 0 and f"opened for {engine} in " in shown.err and "tokens/s" in shown.err
        assert "10 slots" in shown.err
        told[engine] = shown.out
    assert told["torch"] == told["onnxruntime"] == "Once upon a time, there was a little girl\n"
    assert "no cache" in cli("generate", model, "Once", "-n", 2, "--no-cache", "-v").err
    refused = cli("generate", model, "Once", "--engine", "tensorrt")
    assert refused.code == 2 and "torch.compile, onnxruntime" in refused.err
    refused = cli("generate", model, "Once", "--engine", "torch")
    assert refused.code == 2 and "ONNX graph" in refused.err


def test_tokenizer_option(cli: Cli, model: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare.onnx"
    bare.write_bytes(model.read_bytes())
    refused = cli("generate", bare, "Once")
    assert refused.code == 2 and "tokenizer" in refused.err
    assert cli("generate", bare, "Once upon a time", "-n", 2, "--tokenizer", model.parent).code == 0


def test_bisect(cli: Cli, model: Path, tmp_path: Path) -> None:
    pipeline = "sparsify{threshold=0.0}, tap{site=blocks.1.resid_post}, quantize, dce"
    found = cli("bisect", model, "-p", pipeline, "--tolerance", 0.001, "-o", tmp_path / "found", "--json")
    assert found.code == 1 and found.json["culprit"] == "quantize"
    assert (found.json["found"], found.json["step"], found.json["culprit_name"]) == (True, 3, "quantize")
    assert (tmp_path / "found" / "bisect.json").is_file()
    good, bad = (ag.load(tmp_path / "found" / name) for name in ("last-good.onnx", "first-bad.onnx"))
    assert (len(good.history), len(bad.history)) == (2, 3) and bad.history[-1].name == "quantize"
    assert cli("bisect", model, "-p", "sparsify{threshold=0.0}, dce").code == 0
    corpus = tmp_path / "texts.txt"
    corpus.write_text("Once upon a time there was a little girl.\nTom had a red ball.\n")
    loose = cli("bisect", model, "-p", "quantize", "--perplexity", 1000, "--corpus", corpus)
    assert loose.code == 0


def test_extract_vector_and_steer(cli: Cli, model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Tim was happy.\nLily smiled and laughed.\n")
    (tmp_path / "b.txt").write_text("Tim was sad.\nLily cried and cried.\n")
    target = tmp_path / "v.safetensors"
    sets = ("--positive", tmp_path / "a.txt", "--negative", tmp_path / "b.txt")
    made = cli("extract-vector", model, *sets, "--site", "blocks.1.resid_post", "-o", target)
    assert made.code == 0 and made.out == f"{target}\n" and "norm" in made.err
    assert list(ag.load_vector(target).directions) == ["blocks.1.resid_post"]
    assert cli("run", model, "-p", f"steer{{vector={target} scale=8}}", "-o", tmp_path / "steered.onnx").code == 0
    assert cli("generate", tmp_path / "steered.onnx", "-n", 30).out != cli("generate", model, "-n", 30).out


@pytest.mark.slow
def test_demo(cli: Cli, tmp_path: Path) -> None:
    shown = cli("demo", "--keep", tmp_path / "kept")
    assert shown.code == 0, shown.out + shown.err
    assert "FAILED" not in shown.out and "5.17" in shown.out
    assert "before: Once upon a time, there was a little girl named Lily. She loved to play outside in the park." in shown.out
    assert (tmp_path / "kept" / "demo-standard.onnx").is_file()
