"""Programs of several graphs on the command line, and folders for onnxruntime-genai."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import actgraph as ag
from tests import zoo
from tests.cli.conftest import Outcome

Cli = Callable[..., Outcome]


@pytest.fixture(scope="module")
def program(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as prefill and decode graphs, written by ``actgraph run``."""
    from actgraph.cli import main

    folder = tmp_path_factory.mktemp("program") / "cached"
    assert main(["run", str(model), "-p", "kv_cache{last_logits=true}", "-o", str(folder), "-q"]) == 0
    return folder


def test_run_writes_a_folder_that_loads(program: Path, model: Path) -> None:
    names = {path.name for path in program.iterdir()}
    assert {"program.json", "prefill.onnx", "decode.onnx", "tokenizer.json"} <= names
    (weights,) = program.glob("*.data")
    assert weights.stat().st_size < 1.1 * model.stat().st_size  # once, not twice
    loaded = ag.load(program)
    loaded.verify()
    assert list(loaded.graphs) == ["prefill", "decode"]


def test_a_file_cannot_hold_it_which_is_said_first(cli: Cli, model: Path, program: Path, tmp_path: Path) -> None:
    for arguments in (
        ("run", model, "-p", "kv_cache", "-o", tmp_path / "out.onnx"),
        ("export", program, "-o", tmp_path / "out.onnx"),
        ("run", program, "-p", "dce", "-o", tmp_path / "out.pt2"),
    ):
        refused = cli(*arguments)
        assert refused.code == 2 and refused.out == "" and refused.err.count("\n") == 1
        assert "the result is a program of several graphs" in refused.err and "kv_cache{graphs=combined}" in refused.err
    assert not list(tmp_path.iterdir())
    assert "the suffix says the format" in cli("run", model, "-p", "dce", "-o", tmp_path / "folder").err
    one = cli("run", model, "-p", "kv_cache{graphs=combined}", "-o", tmp_path / "out.onnx", "-q")
    assert one.code == 0 and (tmp_path / "out.onnx").is_file()


def test_inspect_and_diff(cli: Cli, program: Path, model: Path) -> None:
    shown = cli("inspect", program)
    assert shown.code == 0
    for line in ("driver: step 0 -> prefill; else -> decode", "# prefill", "# decode", "input: input_ids: i64[batch, 1]"):
        assert line in shown.out.splitlines()
    facts = cli("inspect", program, "--json").json
    assert set(facts["graphs"]) == {"prefill", "decode"} and len(facts["slots"]) == 10
    assert cli("inspect", program, "--text").out.startswith("program ")
    assert cli("diff", program, program).code == 0
    changed = cli("diff", model, program)
    assert changed.code == 1 and "prefill" in changed.out


def test_passes_run_on_each_graph(cli: Cli, program: Path, tmp_path: Path) -> None:
    made = cli("run", program, "-p", "quantize{weights=int8}", "-o", tmp_path / "small", "--json", "-q")
    assert made.code == 0 and set(made.json["reports"]) == {"prefill", "decode"}
    (small,), (large,) = (tmp_path / "small").glob("*.data"), program.glob("*.data")
    assert small.stat().st_size < 0.6 * large.stat().st_size
    copied = cli("export", program, "-o", tmp_path / "copy", "-q")
    assert copied.code == 0 and cli("diff", program, tmp_path / "copy", "-q").code == 0


def test_verify(cli: Cli, model: Path, program: Path) -> None:
    checked = cli("verify", model, "-p", "kv_cache, dce", "--json", "-q")
    assert checked.code == 0
    whats = [check["what"] for check in checked.json["checks"]]
    assert whats[0].startswith("kv_cache: keeps its promise")
    assert {what.partition(":")[0] for what in whats[1:]} == {"prefill", "decode"}
    same = cli("verify", program, program, "--json")
    assert same.code == 0 and len(same.json["checks"]) == 2
    other = cli("verify", model, program)
    assert other.code == 2 and "leave last_logits out" in other.err


def test_verify_one_graph_against_a_program(cli: Cli, model: Path, tmp_path: Path) -> None:
    """By what the program's graph for prompts gives with empty slots, which a steered one does not."""
    for options in ("", "{form=static max_length=5}"):
        folder = tmp_path / f"cached{len(options)}"
        assert cli("run", model, "-p", f"kv_cache{options}", "-o", folder, "-q").code == 0
        for pair in ((model, folder), (folder, model)):
            first, second = (found := cli("verify", *pair, "--json").json)["checks"]
            assert found["ok"] and max(first["change"], second["change"]) < 1e-4
            assert first["what"].endswith("prefill, with empty slots")
            assert second["what"].endswith(": tokens one by one, with their slots")
    steer = f"steer{{site=blocks.2.resid_post vector={[1, -1] * 32} where=3:}}"
    assert cli("run", model, "-p", f"{steer}, kv_cache", "-o", tmp_path / "steered", "-q").code == 0
    assert cli("verify", model, tmp_path / "steered").code == 1


def test_verify_finds_a_broken_graph_for_single_tokens(cli: Cli, model: Path, tmp_path: Path) -> None:
    """The graph for prompts is as it was, and gives what the model gives."""
    program = ag.run(ag.load(model), "kv_cache").program
    decode = program.graphs["decode"]
    with decode.edit("test") as editor:
        editor.insert_at(decode.site("blocks.2.resid_post"), "mul", [np.float32(1.01)])
    program.save(tmp_path / "broken")
    for pair in ((model, tmp_path / "broken"), (tmp_path / "broken", model)):
        found = cli("verify", *pair, "--json")
        first, second = found.json["checks"]
        assert found.code == 1 and first["ok"] and not second["ok"]
        assert second["what"].endswith("tokens one by one, with their slots") and 1e-4 < second["change"] < 1


def test_verify_takes_tokens_one_by_one_from_one_graph_with_a_cache(cli: Cli, model: Path, tmp_path: Path) -> None:
    """On tokens that are given, too."""
    cached = tmp_path / "cached.onnx"
    assert cli("run", model, "-p", "kv_cache{graphs=combined}", "-o", cached, "-q").code == 0
    ids = np.array([[1, 403, 407, 261, 378]])
    given = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(5)[None]}
    np.savez(tmp_path / "given.npz", **given)
    for arguments in ([], ["--inputs", tmp_path / "given.npz"]):
        found = cli("verify", cached, model, "--json", *arguments)
        assert found.code == 0 and [check["ok"] for check in found.json["checks"]] == [True, True], found.json
    np.savez(tmp_path / "one.npz", **{name: array[:, :1] for name, array in given.items()})
    found = cli("verify", cached, model, "--inputs", tmp_path / "one.npz")
    assert found.code == 1 and "NOT CHECKED" in found.out


@pytest.mark.parametrize("options", ["", "{graphs=combined}"])
def test_statistics_behind_a_cache_are_refused(cli: Cli, model: Path, tmp_path: Path, options: str) -> None:
    passes = f"kv_cache{options}, sparsify{{method=teal sparsity=0.3}}"
    refused = cli("run", model, "-p", passes, "-o", tmp_path / ("m.onnx" if options else "m"), "-q")
    assert refused.code == 2 and "it needs statistics, and " in refused.err and "has state" in refused.err
    assert "put it before the pass that adds the state (kv_cache)" in refused.err and not list(tmp_path.iterdir())


def test_a_vector_is_extracted_without_a_cache(cli: Cli, program: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("Once upon a time\n")
    given = ["--positive", texts, "--negative", texts, "--site", "blocks.2.resid_post", "-o", tmp_path / "v.safetensors"]
    refused = cli("extract-vector", program / "prefill.onnx", *given, "-q")
    assert refused.code == 2 and "has state (a cache)" in refused.err and "without a cache" in refused.err


def test_a_short_cache_is_checked_on_short_inputs(cli: Cli, model: Path, tmp_path: Path) -> None:
    checked = cli("verify", model, "-p", "kv_cache{form=static max_length=4 graphs=combined}, dce", "--json")
    assert checked.code == 0 and len(checked.json["checks"]) > 2


def test_generate_takes_a_folder(cli: Cli, model: Path, program: Path) -> None:
    made, expected = (cli("generate", source, "Once upon a time", "-n", 20, "-q") for source in (program, model))
    assert made.code == 0 and made.out == expected.out and len(made.out) > 30


def test_generate_without_the_cache_of_a_program_says_that_it_cannot(cli: Cli, program: Path) -> None:
    assert "--no-cache changes nothing" in cli("generate", program, "Once", "-n", 2, "--no-cache").err
    for arguments in (["--no-cache", "-q"], []):
        assert "--no-cache" not in cli("generate", program, "Once", "-n", 2, *arguments).err


def test_folders_of_files_say_what_to_name(cli: Cli, model: Path, program: Path, tmp_path: Path) -> None:
    """A program that lost its manifest, and a folder for onnxruntime-genai, which also has a config.json."""
    lost = tmp_path / "lost"
    shutil.copytree(program, lost)
    (lost / "program.json").unlink()
    for config in (False, True):
        if config:
            (lost / "config.json").write_text("{}")
        refused = cli("inspect", lost)
        assert refused.code == 2 and "holds decode.onnx and prefill.onnx, and program.json is missing" in refused.err
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "model.onnx").write_bytes(model.read_bytes())
    refused = cli("inspect", tmp_path / "one")
    assert refused.code == 2 and "it holds model.onnx" in refused.err and "name that file" in refused.err


def test_folders_with_other_files_are_refused_first(cli: Cli, model: Path, program: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for arguments in (["run", model, "-p", "kv_cache"], ["export", program], ["export", model, "--genai"]):
        refused = cli(*arguments, "-o", tmp_path)
        assert refused.code == 2 and "holds something else (config.json)" in refused.err and refused.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert "(program.json)" in cli("export", model, "--genai", "-o", program).err
    folder = tmp_path / "genai"
    assert [cli("export", model, "--genai", "-o", folder, "-q").code for _ in range(2)] == [0, 0]  # over itself
    assert "(genai_config.json)" in cli("export", program, "-o", folder).err


def test_sites_of_each_graph(cli: Cli, program: Path) -> None:
    shown = cli("sites", program, "blocks.*.resid_post")
    assert shown.code == 0 and [line for line in shown.out.splitlines() if line.startswith("#")] == ["# prefill", "# decode"]
    assert "f32[batch, seq, 64]" in shown.out and "f32[batch, 1, 64]" in shown.out
    facts = cli("sites", program, "--json").json
    assert set(facts) == {"prefill", "decode"} and {"name", "kind", "role"} <= set(facts["decode"][0])


def test_verbs_for_one_graph_say_so(cli: Cli, program: Path, tmp_path: Path) -> None:
    refused = cli("bisect", program, "-p", "dce", "-o", tmp_path / "found")
    assert refused.code == 2 and "is a program of 2 graphs" in refused.err and ".onnx" in refused.err


# --- onnxruntime-genai -------------------------------------------------------------------------------------------------------


def genai_tokens(folder: Path, prompt: list[int], length: int) -> list[int]:
    """What onnxruntime-genai generates from ``folder``, greedy, to ``length`` tokens in all."""
    og = pytest.importorskip("onnxruntime_genai")
    model = og.Model(str(folder))
    options = og.GeneratorParams(model)
    options.set_search_options(max_length=length, do_sample=False)
    generator = og.Generator(model, options)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)][len(prompt) :]


@pytest.mark.parametrize("verb", ["export", "run"])
def test_genai_folders_give_the_same_tokens(cli: Cli, model: Path, tmp_path: Path, verb: str) -> None:
    folder = tmp_path / "genai"
    passes = ["-p", "sparsify{threshold=0.05}"] if verb == "run" else []
    made = cli(verb, model, *passes, "--genai", "-o", folder, "-q")
    assert (made.code, made.out.strip()) == (0, str(folder)), made.err
    assert {"model.onnx", "genai_config.json", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
    expected = list(ag.generate(ag.load(folder / "model.onnx"), [1, 403, 407], 37).tokens)
    assert len(expected) == 37 and genai_tokens(folder, [1, 403, 407], 40) == expected
    if verb == "export":
        assert list(ag.generate(zoo.captured("stories260k"), [1, 403, 407], 37).tokens) == expected


def test_what_genai_cannot_take_is_one_line(cli: Cli, model: Path, program: Path, tmp_path: Path) -> None:
    folder = tmp_path / "no"
    for arguments, why in (
        (["export", model, "--genai", "-o", tmp_path / "m.onnx"], "--genai writes a folder"),
        (["export", model, "--genai", "--inline", "all", "-o", folder], "--inline is for .onnx files"),
        (["export", program, "--genai", "-o", folder], "--genai takes one graph"),
        (["run", model, "-p", "kv_cache", "--genai", "-o", folder], "--genai takes one graph"),
        (["run", model, "-p", "kv_cache{graphs=combined form=static max_length=64}", "--genai", "-o", folder], "no growing"),
        (["export", zoo.captured("bert").save(tmp_path / "bert.onnx"), "--genai", "-o", folder], "see later ones"),
    ):
        refused = cli(*arguments, "-q")
        assert refused.code == 2 and why in refused.err and refused.err.count("\n") == 1 and refused.out == ""
    planned = cli("export", model, "--genai", "-o", folder, "--dry-run", "-q")
    assert planned.code == 0 and "onnxruntime-genai" in planned.out and not folder.exists()


def test_generate_inserts_a_cache_where_logits_are_read_by_more_than_the_sampling(capsys: pytest.CaptureFixture[str]) -> None:
    from actgraph.cli.generate import _with_cache

    tapped = ag.run(zoo.captured("gpt2"), 'tap{site=logits prefix="t."}', parity="none", reproducer=False).program
    for model in (tapped, ag.Program.of(zoo.captured("gpt2"))):
        assert list(_with_cache(model, quiet=False).graphs) == ["prefill", "decode"]
    assert capsys.readouterr().err == ""
