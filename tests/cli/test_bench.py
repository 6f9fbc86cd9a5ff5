"""``actgraph bench``: figures of language models and of others, profiles, traces, and errors of one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import actgraph as ag
from tests import zoo
from tests.cli.conftest import Outcome

Cli = Callable[..., Outcome]
FEW = ("--rounds", 2, "--tokens", 3, "--prompt-tokens", 4, "--stream", 20)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a cache."""
    passes = "quantize{weights=int8}, kv_cache{last_logits=true}"
    made = ag.run(zoo.captured("llama"), passes, parity="none", reproducer=False).program.map(ag.formats.onnx_export.to_onnx)
    return made.save(tmp_path_factory.mktemp("bench") / "cached")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo.exported("llama").save(tmp_path_factory.mktemp("bench") / "llama.onnx")


@pytest.fixture(scope="module")
def mlp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo.captured("mlp").save(tmp_path_factory.mktemp("bench") / "mlp.pt2")


def test_figures(cli: Cli, program: Path) -> None:
    shown = cli("bench", program, *FEW, "--threads", 1)
    assert shown.code == 0, shown.err
    first, head, prefill, decode, last = shown.out.splitlines()
    assert first == "onnxruntime, 1 thread, median of 2 rounds" and "read limit (20.0 GB/s)" in head
    assert prefill.split()[:2] == ["prefill", "4"] and decode.split()[:2] == ["decode", "1"] and len(decode.split()) == 6
    assert last.startswith("first token after ") and last.endswith(" ms")
    data = cli("bench", program, *FEW, "--json").json
    assert data["model"] == str(program) and data["profile"] is None and data["stream_bytes_per_second"] == 20e9
    stage = data["stages"]["decode"]
    assert stage["calls"] == 4 and stage["limit"] == 20e9 / stage["bytes"] and stage["rate"] > 0


def test_a_profile_as_tables_json_and_trace(cli: Cli, program: Path, tmp_path: Path) -> None:
    shown = cli("bench", program, *FEW, "--profile")
    tables = shown.out.split("\n\n")[1:]
    assert [table.splitlines()[0].split()[:2] for table in tables] == [["stage", "role"], ["stage", "kernel"]]
    assert "blocks.*.mlp.gate" in tables[0] and "onnxruntime" in tables[1]
    short, whole = (cli("bench", program, *FEW, "--by", "node", *more).out for more in ((), ("-v",)))
    assert "more)" in short and "more)" not in whole and len(whole) > len(short)
    trace = tmp_path / "trace.json"
    done = cli("bench", program, *FEW, "--trace", trace, "--json")
    assert done.code == 0 and str(trace) in done.err
    events = json.loads(trace.read_text())["traceEvents"]
    assert {"prefill", "decode"} <= {event["name"] for event in events}
    rows = done.json["profile"]["rows"]
    assert sum(row["total"] for row in rows) == pytest.approx(done.json["profile"]["total"])
    assert {row["site"] for row in rows} >= {"blocks.0.attn.q", "blocks.1.mlp.out", "logits"}


def test_passes_and_a_cache_that_is_inserted(cli: Cli, plain: Path) -> None:
    shown = cli("bench", plain, *FEW, "-p", "sparsify{threshold=0.05}", "--json").json
    assert shown["passes"].startswith("sparsify") and set(shown["stages"]) == {"prefill", "decode"}
    whole = cli("bench", plain, *FEW, "--no-cache", "--json").json
    assert set(whole["stages"]) == {"forward"} and whole["stages"]["forward"]["tokens"] == 4
    assert whole["first_token_seconds"] is None


def test_a_model_that_takes_no_tokens(cli: Cli, mlp: Path) -> None:
    shown = cli("bench", mlp, *FEW, "--profile", "--by", "op")
    assert shown.code == 0 and shown.out.startswith("torch, ") and "calls/s" in shown.out and "aten.linear" in shown.out


def test_errors(cli: Cli, program: Path, tmp_path: Path) -> None:
    for arguments, *words in (
        ([program, "--by", "size"], "no table by 'size'", "site, role"),
        ([program, "--engine", "tvm"], "no engine 'tvm'"),
        ([program, "--engine", "torch"], "torch does not run"),
        ([program, "--tokens", "100"], "do not fit the context of 64"),
        ([program, "--rounds", "0"], "--rounds", "greater than or equal to 1"),
        ([program, "--trace", tmp_path / "trace.txt"], "the suffix says the format"),
        ([program, "--trace", tmp_path / "no" / "trace.json"], "no folder"),
        ([program, "-p", "nothing"], "nothing"),
        ([tmp_path / "missing.onnx"], "missing.onnx"),
    ):
        refused = cli("bench", *arguments, "--stream", 20)
        assert refused.code == 2 and refused.err.count("\n") == 1, refused.err
        assert refused.out == "" and all(word in refused.err for word in words), refused.err
