"""Which runners there are, in which groups they are compared, and the processes in which they live."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Generator, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import ROOT

HERE = Path(__file__).resolve().parent

# --- our side -----------------------------------------------------------------------------------------------------------------

#: Stands for the file of the steering vector.
VECTOR = "@vector@"
_TEAL = "sparsify{{method=teal sparsity={0}}}"
_CACHE = "kv_cache{last_logits=true}"
#: Beside weights of fewer bits keys and values are float16, as those of llama.cpp are.
_HALF = "kv_cache{last_logits=true storage=float16}"
#: The pipeline of each format and gating; the head stays dense (teal gates the linears of the blocks), quantized or not.
PIPELINES = {
    "f32": _CACHE,
    "f32-gated50": f"{_TEAL.format(0.5)}, {_CACHE}",
    "f32-gated70": f"{_TEAL.format(0.7)}, {_CACHE}",
    "bf16": f"quantize{{weights=bf16}}, {_HALF}",
    "bf16-gated50": f"{_TEAL.format(0.5)}, quantize{{weights=bf16}}, {_HALF}",
    "int8": f"quantize{{weights=int8}}, {_HALF}",
    "int8-gated50": f"{_TEAL.format(0.5)}, quantize{{weights=int8}}, {_HALF}",
    "int8-gated70": f"{_TEAL.format(0.7)}, quantize{{weights=int8}}, {_HALF}",
    "int4": f"quantize{{weights=int4 group_size=32}}, {_HALF}",
    "int4-gated50": f"{_TEAL.format(0.5)}, quantize{{weights=int4 group_size=32}}, {_HALF}",
    # a vector at every block that is not folded into a bias
    "f32-steer": f"steer{{vector={VECTOR} site=blocks.*.resid_post fold=false}}, {_CACHE}",
}
ENGINES = {"torch": "torch", "compile": "torch.compile", "onnxruntime": "onnxruntime"}
BITS = {"f32": 32, "bf16": 16, "int8": 8, "int4": 4}


@dataclass(frozen=True)
class Runner:
    """One side of a comparison. script, options: what is run in which way; env: its environment (``""``: the running one).

    shares: a name that those with which it shares a process have as well.
    """

    name: str
    bits: int
    script: str
    options: dict[str, Any] = field(hash=False)
    env: str = ""
    gated: float = 0.0
    steered: bool = False
    shares: str = ""

    @property
    def ours(self) -> bool:
        return self.name.startswith("actgraph-")

    @property
    def process(self) -> str:
        """Runners with the same value share a process: what one pipeline of ours makes, in several engines."""
        return self.shares or (f"actgraph {self.options['pipeline']}" if self.ours else self.name)


def _ours(engine: str, kind: str) -> Runner:
    options = {"engine": ENGINES[engine], "pipeline": PIPELINES[kind], "calibrate": "gated" in kind}
    gated = int(kind.split("gated")[1]) / 100 if "gated" in kind else 0.0
    return Runner(
        f"actgraph-{engine}-{kind}", BITS[kind.split("-")[0]], "ours.py", options, gated=gated, steered="steer" in kind
    )


def _peers() -> Iterable[Runner]:
    def hf(name: str, bits: int, **options: Any) -> Runner:
        env = options.pop("env", "")
        return Runner(name, bits, "peers/hf.py", options, env, steered="by" in options)

    yield hf("transformers-eager-f32", 32, dtype="float32")
    yield hf("transformers-compiled-f32", 32, dtype="float32", compiled=True)
    yield Runner("torch-compile-f32", 32, "peers/compiled.py", {"dtype": "float32"})
    yield Runner("onnxruntime-f32", 32, "peers/ort.py", {})
    yield Runner("openvino-f32", 32, "peers/ov.py", {"precision": "f32"}, "openvino")
    yield Runner("llama-f32", 32, "peers/llama.py", {"type": "F32"}, "llama")
    yield Runner("genai-f32", 32, "peers/genai.py", {"precision": "fp32"})
    yield hf("transformers-eager-bf16", 16, dtype="bfloat16")
    yield Runner("torch-compile-bf16", 16, "peers/compiled.py", {"dtype": "bfloat16"})
    yield Runner("openvino-bf16", 16, "peers/ov.py", {"precision": "bf16"}, "openvino")
    yield Runner("llama-bf16", 16, "peers/llama.py", {"type": "BF16"}, "llama")
    yield Runner("torchao-int8", 8, "peers/compiled.py", {"dtype": "bfloat16", "torchao": "int8"}, "torchao")
    yield Runner("onnxruntime-int8", 8, "peers/ort.py", {"bits": 8})
    yield Runner("onnxruntime-qdq-int8", 8, "peers/ort.py", {"qdq": "quantize{weights=int8}"})
    yield Runner("openvino-int8", 8, "peers/ov.py", {"precision": "f32", "bits": 8}, "openvino")
    yield Runner("llama-q8_0", 8, "peers/llama.py", {"type": "Q8_0"}, "llama")
    yield Runner("genai-int8", 8, "peers/genai.py", {"precision": "int8"})
    yield Runner("torchao-int4", 4, "peers/compiled.py", {"dtype": "bfloat16", "torchao": "int4"}, "torchao")
    yield Runner("onnxruntime-int4", 4, "peers/ort.py", {"bits": 4})
    yield Runner("openvino-int4", 4, "peers/ov.py", {"precision": "f32", "bits": 4}, "openvino")
    yield Runner("llama-q4_0", 4, "peers/llama.py", {"type": "Q4_0"}, "llama")
    yield Runner("genai-int4", 4, "peers/genai.py", {"precision": "int4"})
    yield hf("transformers-hooks", 32, dtype="float32", vectors=[VECTOR], by="hooks")
    yield hf("transformers-repeng", 32, dtype="float32", vectors=[VECTOR], by="repeng", env="repeng")
    yield hf("transformers-nnsight", 32, dtype="float32", vectors=[VECTOR], by="nnsight")


RUNNERS: dict[str, Runner] = {
    runner.name: runner for runner in (*(_ours(engine, kind) for kind in PIPELINES for engine in ENGINES), *_peers())
}
#: Names of earlier versions of this benchmark.
ALIASES = {
    "actgraph-torch": "actgraph-torch-f32", "actgraph-compile": "actgraph-compile-f32", "genai": "genai-f32",
    "actgraph-onnxruntime": "actgraph-onnxruntime-f32", "transformers-eager": "transformers-eager-f32",
    "transformers-compiled": "transformers-compiled-f32",
}  # fmt: skip

_STEERING = ("actgraph-torch-f32", "actgraph-compile-f32", "actgraph-onnxruntime-f32", "transformers-eager-f32")
#: What is measured side by side: all of one width, and a vector at every block beside the same model without.
GROUPS: dict[str, list[str]] = {
    name: [r.name for r in RUNNERS.values() if r.bits == bits and not r.steered] for name, bits in BITS.items()
}
GROUPS["steer"] = [r.name for r in RUNNERS.values() if r.steered or r.name in _STEERING]
#: Left out unless they are named: code is generated for minutes, and the gates run the same kernels in ``torch``.
ON_REQUEST = {r.name for r in RUNNERS.values() if r.name.startswith("actgraph-compile") and ("gated" in r.name or r.steered)}
GROUPS = {group: [name for name in names if name not in ON_REQUEST] for group, names in GROUPS.items()}


# --- processes ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Generated:
    """seconds: of each step, that of the prompt first; tokens: those of all rows, one row behind the other."""

    seconds: list[float]
    tokens: list[int]

    @property
    def rate(self) -> float:
        """Steps per second behind the prompt."""
        return (len(self.seconds) - 1) / sum(self.seconds[1:])


class Process:
    """A process with one or more runners; ``wait`` tells which of them opened."""

    def __init__(self, python: Path, runners: list[Runner], folder: Path, vector: Path, threads: int) -> None:
        self._log = folder / f"{runners[0].name}.log"
        self._unread = b""
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [python, HERE / runners[0].script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                bufsize=1, env=environment,
            )  # fmt: skip
        self._waiting = [runner.name for runner in runners]
        described = {runner.name: {k: _filled(v, vector) for k, v in runner.options.items()} for runner in runners}
        self._send({"folder": str(folder), "threads": threads, "runners": described})

    def wait(self, seconds: float) -> Iterable[tuple[str, str, str]]:
        """``(runner, note, error)`` of each, as they open."""
        end = time.monotonic() + seconds
        while self._waiting:
            try:
                answer = self._answer(end - time.monotonic())
            except RuntimeError as error:
                yield from ((name, "", str(error)) for name in self._waiting)
                self.close()
                return
            name = answer.get("ready") or answer["failed"]
            self._waiting.remove(name)
            yield name, answer.get("note", ""), answer.get("error", "")

    def run(self, runner: str, prompt: list[Any], count: int, seconds: float) -> Generated:
        """Raises RuntimeError when it fails or takes longer than ``seconds``; the process may have ended then."""
        (made,) = self.slices(runner, prompt, count, 0, seconds)
        assert made is not None
        return made

    def slices(
        self, runner: str, prompt: list[Any], count: int, size: int, seconds: float
    ) -> Generator[Generated | None, None, None]:
        """``run`` in parts (the prompt, then ``size`` steps each), none before it is asked for; None but for the last."""
        self._send({"runner": runner, "prompt": prompt, "count": count, "pause": size})
        while "paused" in (answer := self._answer(seconds)):
            try:
                yield None
            except GeneratorExit:
                self._send({"stop": True})
                self._answer(seconds)
                raise
            self._send({})
        if "error" in answer:
            raise RuntimeError(answer["error"])
        yield Generated(answer["seconds"], answer["tokens"])

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError, ValueError):  # the answer tells that it ended
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()

    def _answer(self, seconds: float) -> dict[str, Any]:
        out = self._process.stdout
        assert out is not None
        end = time.monotonic() + seconds
        while b"\n" not in self._unread:  # several answers may come at once: a buffered reader would hide them from select
            if out.closed or not select.select([out], [], [], max(end - time.monotonic(), 0.0))[0]:
                self.close(now=True)
                raise RuntimeError(f"no answer within {seconds:.0f} s")
            piece = os.read(out.fileno(), 1 << 16)
            self._unread += piece
            if not piece:
                break
        line, _, self._unread = self._unread.partition(b"\n")
        if not line:
            lines = self._log.read_text(errors="replace").strip().splitlines()
            raise RuntimeError(f"the process ended: {lines[-1] if lines else 'it said nothing'}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self, now: bool = False) -> None:
        if self._process.stdin is not None and not self._process.stdin.closed:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        try:
            self._process.wait(0 if now else 10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


def _filled(value: Any, vector: Path) -> Any:
    if isinstance(value, list):
        return [_filled(each, vector) for each in value]
    return value.replace(VECTOR, str(vector)) if isinstance(value, str) else value


def python_of(env: str, folder: Path) -> Path:
    """The interpreter of an environment; RuntimeError when there is none."""
    if not env:
        return Path(sys.executable)
    path = folder / env / "bin" / "python"
    if not path.exists():
        raise RuntimeError(f"no environment {folder / env}: python benchmarks/peers/environments.py {env} --env {folder}")
    return path
