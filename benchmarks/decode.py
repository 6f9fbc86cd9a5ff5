"""Tokens per second of generation with a cache, beside transformers and onnxruntime-genai on the same weights.

    python benchmarks/decode.py                                      # everything: about half an hour on 2 cores
    python benchmarks/decode.py --models stories260k --runners actgraph-torch transformers-eager
    python benchmarks/decode.py --rounds 3 --tokens 16 --contexts 32

Each runner lives in a process of its own with the same number of threads and is idle while another one is measured. In a round
every runner in turn takes the same prompt of ``context`` tokens and generates; the rate is that of the tokens after the first.
Figures are medians over the rounds, ratios are medians of the ratios within a round. The physical limit is what reading every
weight and the cache once per token allows at the read bandwidth measured in the same run. Each figure is one JSON line.

Runners: ``actgraph-torch``, ``actgraph-compile`` (torch.compile), ``actgraph-onnxruntime``, each through ``ag.stream``, which
also makes text; ``transformers-eager`` and ``transformers-compiled``: its ``generate``, with the static cache for the latter;
``genai``: onnxruntime-genai on the file of its own model builder, and where that file cannot run (heads of 8 features) on one
that actgraph wrote. All in float32, greedy.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

CONTEXTS = {"stories260k": (32, 256, 480), "llama110m": (32, 256, 1000)}
RUNNERS = (
    "actgraph-torch", "actgraph-compile", "actgraph-onnxruntime", "transformers-eager", "transformers-compiled", "genai",
)  # fmt: skip
#: Ours, its peers, and how much of the peer's rate is the goal.
GOALS = {
    "llama110m": (("torch", "transformers-eager", 1.0), ("torch", "transformers-compiled", 1.0), ("onnxruntime", "genai", 1.0)),
    "stories260k": (
        ("torch", "transformers-eager", 1 / 1.2),
        ("torch", "transformers-compiled", 1 / 1.2),
        ("onnxruntime", "genai", 1 / 1.2),
    ),
}
ENGINES = {"torch": ("actgraph-torch", "actgraph-compile"), "onnxruntime": ("actgraph-onnxruntime",)}

#: Given a prompt and how many tokens to make, the seconds to the first token and those for the rest.
Run = Callable[[list[int], int], tuple[float, float]]


def emit(**figures: Any) -> None:
    print(json.dumps({"benchmark": "decode", **figures}), flush=True)


# --- models -------------------------------------------------------------------------------------------------------------------


def make_model(name: str, folder: Path) -> None:
    """A Hugging Face directory with the weights that every runner uses."""
    if name == "stories260k":
        import shutil

        import actgraph

        shutil.copytree(Path(actgraph.__file__).parent / "data" / "stories260k", folder, dirs_exist_ok=True)
        return
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=2048, vocab_size=32000,
        max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).eval().save_pretrained(folder)
    # the model builder of onnxruntime-genai wants some tokenizer; no runner of this benchmark uses it
    for file in (Path(__import__("actgraph").__file__).parent / "data" / "stories260k").glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())


def read_bandwidth(threads: int) -> float:
    """Bytes per second when summing an array much larger than the caches."""
    import torch

    torch.set_num_threads(threads)
    data = torch.ones(150_000_000)
    best = 0.0
    for _ in range(8):
        start = time.perf_counter()
        data.sum()
        best = max(best, data.nbytes / (time.perf_counter() - start))
    return best


# --- runners ------------------------------------------------------------------------------------------------------------------


def open_actgraph(folder: Path, engine: str) -> Run:
    import actgraph as ag

    compiled = ag.compile(ag.run(ag.load(str(folder)), "kv_cache{last_logits=true}").program, engine)
    if "stories" not in str(folder):
        for graph in compiled.program:
            graph.companions.tokenizer = None

    def run(prompt: list[int], count: int) -> tuple[float, float]:
        start = time.perf_counter()
        steps = ag.stream(compiled, prompt, count, stop_at_end=False)
        next(steps)
        first = time.perf_counter()
        made = 1 + sum(1 for _ in steps)
        end = time.perf_counter()
        assert made == count, f"{made} tokens instead of {count}"
        return first - start, end - first

    return run


def open_transformers(folder: Path, compiled: bool) -> Run:
    import torch
    from transformers import AutoModelForCausalLM, CompileConfig, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    class Clock:
        """What ``generate`` calls with the prompt and each token."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: Any) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    def run(prompt: list[int], count: int) -> tuple[float, float]:
        options: dict[str, Any] = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        if compiled:
            options["cache_implementation"] = "static"
            options["compile_config"] = CompileConfig(fullgraph=False, mode="default")
            options["compile_config"]._compile_all_devices = True
        clock = Clock()
        ids = torch.tensor([prompt])
        start = time.perf_counter()
        with torch.no_grad():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                streamer=clock,
                generation_config=GenerationConfig(eos_token_id=None, **options),
            )
        assert len(clock.times) == count + 1
        return clock.times[1] - start, clock.times[-1] - clock.times[1]

    return run


def open_genai(folder: Path) -> tuple[Run, str]:
    import numpy as np
    import onnxruntime_genai as genai

    def opened(source: Path) -> Run:
        model = genai.Model(str(source))

        def run(prompt: list[int], count: int) -> tuple[float, float]:
            options = genai.GeneratorParams(model)
            options.set_search_options(max_length=len(prompt) + count, min_length=len(prompt) + count, do_sample=False)
            start = time.perf_counter()
            generator = genai.Generator(model, options)
            generator.append_tokens(np.array([prompt], np.int32))
            generator.generate_next_token()
            generator.get_next_tokens()
            first = time.perf_counter()
            for _ in range(count - 1):
                generator.generate_next_token()
                generator.get_next_tokens()
            return first - start, time.perf_counter() - first

        return run

    own = folder / "genai-builder"
    try:
        build = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(folder), "-o", str(own)]
        build += ["-p", "fp32", "-e", "cpu", "-c", str(folder / "cache")]
        built = subprocess.run(build, capture_output=True, text=True)
        if built.returncode:
            raise RuntimeError(f"the model builder failed: {built.stderr.strip().splitlines()[-1]}")
        run = opened(own)
        run([3, 4, 5], 2)
        return run, "the file of its model builder"
    except Exception as error:  # what it cannot run is found out by running it
        import actgraph as ag
        from actgraph.formats.genai import save_genai

        reason = str(error).strip().splitlines()[-1]
        save_genai(ag.run(ag.load(str(folder)), "kv_cache{graphs=combined}").graph, folder / "genai-actgraph")
        return opened(folder / "genai-actgraph"), f"a file of actgraph; on that of its model builder: {reason}"


def serve(connection: Connection, runner: str, folder: Path, threads: int) -> None:
    """The process of one runner: opens it, then answers requests."""
    try:
        import torch

        torch.set_num_threads(threads)
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # others print as they build
        note = ""
        if runner == "genai":
            run, note = open_genai(folder)
        elif runner.startswith("transformers"):
            run = open_transformers(folder, runner.endswith("compiled"))
        else:
            kind = runner.removeprefix("actgraph-")
            run = open_actgraph(folder, "torch.compile" if kind == "compile" else kind)
        connection.send(("ready", note))
        while True:
            prompt, count = connection.recv()
            connection.send(("done", run(prompt, count)))
    except EOFError:
        pass
    except Exception as error:
        connection.send(("failed", f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"))


class Runner:
    """A runner in its process."""

    def __init__(self, name: str, folder: Path, threads: int) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=serve, args=(other, name, folder, threads), daemon=True)
        self._process.start()
        other.close()
        self.note = self._answer()

    def _answer(self) -> Any:
        try:
            kind, value = self._connection.recv()
        except EOFError:
            raise RuntimeError("the process ended") from None
        if kind == "failed":
            raise RuntimeError(value)
        return value

    def run(self, prompt: list[int], count: int) -> tuple[float, float]:
        self._connection.send((prompt, count))
        first, rest = self._answer()
        return first, rest

    def close(self) -> None:
        self._connection.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.terminate()


# --- measuring ----------------------------------------------------------------------------------------------------------------


def measure(model: str, args: argparse.Namespace, bandwidth: float) -> None:
    import numpy as np

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / model
        make_model(model, folder)
        config = json.loads((folder / "config.json").read_text())
        weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        runners = []
        for name in args.runners:
            try:
                runners.append(Runner(name, folder, args.threads))
                if runners[-1].note:
                    emit(model=model, runner=name, note=runners[-1].note)
            except RuntimeError as error:
                emit(model=model, runner=name, error=str(error))
        try:
            for context in args.contexts or CONTEXTS[model]:
                tokens = min(args.tokens, config["max_position_embeddings"] - context)
                head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
                entry = (
                    2
                    * 4
                    * config["num_hidden_layers"]
                    * config.get("num_key_value_heads", config["num_attention_heads"])
                    * head
                )
                read = weights + entry * (context + tokens / 2)
                prompt = np.random.default_rng(0).integers(3, config["vocab_size"], context).tolist()
                compare(model, context, tokens, prompt, runners, args.rounds, bandwidth / read)
        finally:
            for runner in runners:
                runner.close()


def compare(model: str, context: int, tokens: int, prompt: list[int], runners: list[Runner], rounds: int, limit: float) -> None:
    rates: dict[str, list[float]] = {runner.name: [] for runner in runners}
    prefill: dict[str, list[float]] = {runner.name: [] for runner in runners}
    for round in range(-2, rounds):  # the first two warm up: compiled runners compile, twice where sizes change
        for runner in runners:
            if runner.name not in rates:
                continue
            try:
                first, rest = runner.run(prompt, tokens)
            except RuntimeError as error:
                emit(model=model, context=context, runner=runner.name, error=str(error))
                del rates[runner.name]
                continue
            if round >= 0:
                rates[runner.name].append((tokens - 1) / rest)
                prefill[runner.name].append(first)
    for name, found in rates.items():
        median = statistics.median(found)
        emit(
            model=model, context=context, runner=name, unit="tokens/s", value=round_to(median), least=round_to(min(found)),
            most=round_to(max(found)), rounds=rounds, tokens=tokens,
            first_token_seconds=round_to(statistics.median(prefill[name])),
            physical_limit=round_to(limit), of_limit=round_to(median / limit),
        )  # fmt: skip
    for engine, peer, goal in GOALS[model]:
        for ours in ENGINES[engine]:
            if ours in rates and peer in rates:
                ratio = statistics.median(a / b for a, b in zip(rates[ours], rates[peer], strict=True))
                emit(
                    model=model,
                    context=context,
                    ratio=f"{ours} / {peer}",
                    value=round_to(ratio),
                    goal=round_to(goal),
                    met=ratio >= goal,
                )


def round_to(value: float) -> float:
    return float(f"{value:.4g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(CONTEXTS), default=list(CONTEXTS))
    parser.add_argument("--runners", nargs="+", choices=RUNNERS, default=list(RUNNERS))
    parser.add_argument("--contexts", nargs="+", type=int, help="prompt lengths; default: 32, 256 and 1000 (stories260k: 480)")
    parser.add_argument("--tokens", type=int, default=32, help="tokens generated in a round (fewer where the context ends)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    bandwidth = read_bandwidth(args.threads)
    emit(figure="read bandwidth", value=round_to(bandwidth / 1e9), unit="GB/s", threads=args.threads)
    for model in args.models:
        measure(model, args, bandwidth)


if __name__ == "__main__":
    main()
