"""Tokens per second of generation with a cache, beside what users would run instead, on the same weights.

    python benchmarks/decode.py                                            # all groups of the 110 M shape, context 100
    python benchmarks/decode.py --groups int8 --peers llama-q8_0           # ours of one format and one peer
    python benchmarks/decode.py --models stories260k llama110m --groups f32 --contexts 32 256
    python benchmarks/decode.py --save run.jsonl                           # again with the same file: goes on where it was

Each runner lives in a process of its own (one pipeline of ours in several engines shares one) with the same number of threads,
and is idle while another one is measured. In a round every runner of a group (a width of the weights, or steering) in turn
takes the same prompt of ``context`` tokens and generates greedily; the rate is that of the tokens after the first. Figures are
medians over the rounds, ratios are medians of the ratios within a round. The physical limit is what reading every weight that
is not gated off and the cache once per token allows, at the read bandwidth measured with the same group. Each figure is one
JSON line.

``agrees`` is with how many of the tokens that transformers generates in float32 a runner begins; the weights are random, so
that formats with fewer bits soon go another way, and in float32 fewer than all are said in a note. docs/benchmarks.md names the
runners and the environments of the peers.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

import common
from common import Bandwidth, bytes_per_token, make_model, make_vector, round_to
from runners import ALIASES, GROUPS, RUNNERS, Generated, Process, Runner, python_of

CONTEXTS = {"llama110m": (100,), "stories260k": (100,), "tiny": (8,)}
#: The reference of all tokens: what transformers generates in float32, plain and steered.
REFERENCES = {False: "transformers-eager-f32", True: "transformers-hooks"}
#: Ours (of each engine the faster way), the gating, and how much of the best dense peer of the group is the goal.
GOALS = {
    "f32": (("f32", 1.0), ("f32-gated50", 1.5), ("f32-gated70", 2.0)),
    "bf16": (("bf16", 1.1),),
    "int8": (("int8", 1.1), ("int8-gated50", 1.6)),
    "int4": (("int4", 1.1),),
}
#: A vector at every block costs less than 1 % of a step.
STEER_GOAL = 0.99
#: Our engines, each with the ways to run it.
ENGINES = {"torch": ("torch", "compile"), "onnxruntime": ("onnxruntime",)}
#: What one runner may take to open, and for one run (the first generates code).
OPEN_SECONDS, RUN_SECONDS = 600.0, 600.0


class Output:
    """The lines: printed, and kept in a file from which a later run learns what is done."""

    def __init__(self, path: Path | None, benchmark: str = "decode") -> None:
        self._path, self._benchmark = path, benchmark
        lines = path.read_text().splitlines() if path is not None and path.exists() else []
        self._done = {self._key(found) for found in map(json.loads, lines) if found.get("figure") == "group done"}

    @staticmethod
    def _key(line: dict[str, Any]) -> tuple[Any, ...]:
        return line["model"], line["group"], line["context"]

    def is_done(self, model: str, group: str, context: int) -> bool:
        return (model, group, context) in self._done

    def emit(self, **figures: Any) -> None:
        common.emit(self._benchmark, **figures)
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps({"benchmark": self._benchmark, **figures}) + "\n")


# --- one group ----------------------------------------------------------------------------------------------------------------


class Group:
    """The runners of a group, opened; those that fail are left out with a line that says why."""

    def __init__(
        self, model: str, name: str, runners: list[Runner], folder: Path, args: argparse.Namespace, out: Output
    ) -> None:
        self.model, self.name, self.out = model, name, out
        self.runners: dict[str, Runner] = {}
        known = {runner.name: runner for runner in runners}
        self._processes: dict[str, Process] = {}
        waiting: dict[str, list[Runner]] = {}
        for runner in runners:
            waiting.setdefault(runner.process, []).append(runner)
        jobs, vector = list(waiting.values()), make_vector(folder)
        for begin in range(0, len(jobs), args.jobs):  # threads of several that wait for each other cost far more than they gain
            started = []
            for job in jobs[begin : begin + args.jobs]:
                try:
                    started.append((job, Process(python_of(job[0].env, args.env), job, folder, vector, args.threads)))
                except (RuntimeError, OSError) as error:
                    self._failed([runner.name for runner in job], str(error))
            for _, process in started:
                for opened, note, error in process.wait(OPEN_SECONDS):
                    if error:
                        self._failed([opened], error)
                        continue
                    self._processes[opened] = process
                    self.runners[opened] = known[opened]
                    out.emit(model=model, group=name, runner=opened, note=note)

    def _failed(self, names: Iterable[str], error: str, **more: Any) -> None:
        for name in names:
            self.out.emit(model=self.model, group=self.name, runner=name, **more, error=error)

    def drop(self, runner: str, error: str, **more: Any) -> None:
        self._failed([runner], error, **more)
        self.runners.pop(runner, None)

    def run(self, runner: str, prompt: list[Any], count: int) -> Generated:
        return self._processes[runner].run(runner, prompt, count, RUN_SECONDS)

    def slices(self, runner: str, prompt: list[Any], count: int, size: int) -> Generator[Generated | None, None, None]:
        return self._processes[runner].slices(runner, prompt, count, size, RUN_SECONDS)

    def close(self) -> None:
        for process in set(self._processes.values()):
            process.close()


def compare(
    group: Group, context: int, prompt: list[int], args: argparse.Namespace, config: dict[str, Any], bandwidth: float
) -> None:
    """Rounds of all runners of a group on one prompt, and what comes out of them."""
    count = min(args.tokens, config["max_position_embeddings"] - context)
    where = {"model": group.model, "group": group.name, "context": context}
    rates: dict[str, list[float]] = {name: [] for name in group.runners}
    prefill: dict[str, list[float]] = {name: [] for name in group.runners}
    tokens: dict[str, list[int]] = {}
    for round in range(-args.warmup, args.rounds):  # the first ones warm up: compiled runners compile, twice where sizes change
        for name in list(group.runners):
            try:
                made = group.run(name, prompt, count)
            except RuntimeError as error:
                group.drop(name, str(error), context=context)
                continue
            tokens[name] = made.tokens
            if round >= 0:
                rates[name].append(made.rate)
                prefill[name].append(made.seconds[0])
    references = {steered: tokens.get(name) or args.references.get((context, steered)) for steered, name in REFERENCES.items()}
    for steered, found in references.items():
        if found is not None:
            args.references[context, steered] = found
            args.known |= set() if steered else {context}
    rates = {name: found for name, found in rates.items() if name in group.runners}
    for name, found in rates.items():
        runner, median = RUNNERS[name], statistics.median(found)
        limit = bandwidth / bytes_per_token(config, runner.bits, runner.gated, context + count / 2)
        agrees = agreement(tokens[name], references[runner.steered])
        group.out.emit(
            **where, runner=name, unit="tokens/s", value=round_to(median), least=round_to(min(found)),
            most=round_to(max(found)), rounds=len(found), tokens=count,
            first_token_seconds=round_to(statistics.median(prefill[name])),
            physical_limit=round_to(limit), of_limit=round_to(median / limit), agrees=agrees,
        )  # fmt: skip
        if runner.bits == 32 and not runner.gated and agrees is not None and agrees < count:
            note = f"its greedy tokens differ from those of {REFERENCES[runner.steered]} from token {agrees + 1} on"
            group.out.emit(**where, runner=name, note=note)
    if group.name == "steer":
        steering(group, where, rates)
    else:
        ratios(group, where, rates)


def agreement(tokens: list[int], reference: list[int] | None) -> int | None:
    """How many tokens two texts begin with in common; ``None`` without a reference."""
    if reference is None:
        return None
    differ = (place for place, (a, b) in enumerate(zip(tokens, reference, strict=True)) if a != b)
    return next(differ, len(tokens))


def ratios(group: Group, where: dict[str, Any], rates: dict[str, list[float]]) -> None:
    """Ours of each engine beside the best peer, all peers of the same width being dense."""
    peers = [name for name in rates if not RUNNERS[name].ours]
    if not peers:
        return
    peer = max(peers, key=lambda name: statistics.median(rates[name]))
    for kind, goal in GOALS[group.name]:
        made = {}
        for engine, ways in ENGINES.items():
            ours = [f"actgraph-{way}-{kind}" for way in ways if f"actgraph-{way}-{kind}" in rates]
            if ours:
                made[engine] = max(ours, key=lambda name: statistics.median(rates[name]))
        values = {name: ratio(rates[name], rates[peer]) for name in made.values()}
        for name, value in values.items():
            best = value == max(values.values())
            more = {"met": value >= goal} if best else {}  # the better engine is what the goal is for
            group.out.emit(**where, ratio=f"{name} / {peer}", value=round_to(value), goal=goal, better_engine=best, **more)
    if group.name == "f32":  # each engine beside what runs on it
        for a, b in (("torch", "transformers-eager-f32"), ("torch", "transformers-compiled-f32"), ("onnxruntime", "genai-f32")):
            for way in ENGINES[a]:
                name = f"actgraph-{way}-f32"
                if name in rates and b in rates:
                    value = ratio(rates[name], rates[b])
                    group.out.emit(**where, ratio=f"{name} / {b}", value=round_to(value), goal=1.0, met=value >= 1.0)


def steering(group: Group, where: dict[str, Any], rates: dict[str, list[float]]) -> None:
    """Each steered runner beside the same one without a vector."""
    for name in rates:
        if not RUNNERS[name].steered:
            continue
        plain = name.removesuffix("-steer") if RUNNERS[name].ours else REFERENCES[False]
        if plain not in rates:
            continue
        value = ratio(rates[name], rates[plain])
        more = {"goal": STEER_GOAL, "met": value >= STEER_GOAL} if RUNNERS[name].ours else {}
        group.out.emit(**where, ratio=f"{name} / {plain}", value=round_to(value), **more)


def ratio(ours: list[float], theirs: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


# --- all ----------------------------------------------------------------------------------------------------------------------


def measure(model: str, args: argparse.Namespace, out: Output, folder: Path) -> None:
    import numpy as np

    contexts = args.contexts or CONTEXTS[model]
    args.references, args.known = {}, set()
    for name in args.groups:
        wanted = [context for context in contexts if not out.is_done(model, name, context)]
        runners = chosen(name, args)
        if not wanted or not runners:
            continue
        if not (folder / "config.json").exists():
            make_model(model, folder)
        config = json.loads((folder / "config.json").read_text())
        reads = Bandwidth(args.threads)
        group = Group(model, name, runners, folder, args, out)
        try:
            bandwidth = reads.measure(5)
            out.emit(
                figure="read bandwidth", model=model, group=name, value=round_to(bandwidth / 1e9), unit="GB/s", how=reads.how,
                threads=args.threads, processor=common.processor(),
            )  # fmt: skip
            del reads
            prompts = {c: np.random.default_rng(0).integers(3, config["vocab_size"], c).tolist() for c in wanted}
            if not (args.no_reference or REFERENCES[False] in group.runners or set(prompts) <= args.known):
                refer(model, prompts, folder, args, config, out)
            for context, prompt in prompts.items():
                compare(group, context, prompt, args, config, bandwidth)
                out.emit(figure="group done", model=model, group=name, context=context)
        finally:
            group.close()


def refer(
    model: str, prompts: dict[int, list[int]], folder: Path, args: argparse.Namespace, config: dict[str, Any], out: Output
) -> None:
    """The tokens of the reference where it is not among the runners."""
    runner = RUNNERS[REFERENCES[False]]
    process = Process(python_of("", args.env), [runner], folder, folder, args.threads)
    try:
        error = next(iter(process.wait(OPEN_SECONDS)))[2]
        for context, prompt in () if error else prompts.items():
            count = min(args.tokens, config["max_position_embeddings"] - context)
            args.references[context, False] = process.run(runner.name, prompt, count, RUN_SECONDS).tokens
            args.known.add(context)
    except RuntimeError as failure:
        error = str(failure)
    finally:
        process.close()
    if error:
        out.emit(model=model, runner=runner.name, error=f"no reference: {error}")


def chosen(group: str, args: argparse.Namespace) -> list[Runner]:
    """The runners of a group that were asked for."""
    names = GROUPS[group]
    if args.runners is not None:
        asked = [ALIASES.get(name, name) for name in args.runners]
        bits = {32: "f32", 16: "bf16", 8: "int8", 4: "int4"}
        of = {n: "steer" if RUNNERS[n].steered else bits[RUNNERS[n].bits] for n in asked}
        return [RUNNERS[n] for n in asked if n in names or of[n] == group]
    if args.peers is not None:
        names = [name for name in names if RUNNERS[name].ours or name in args.peers or RUNNERS[name].env in args.peers]
    return [RUNNERS[name] for name in names]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(CONTEXTS), default=["llama110m"])
    parser.add_argument("--groups", nargs="+", choices=[*GROUPS, "quality"], default=[*GROUPS, "quality"])
    parser.add_argument("--runners", nargs="+", choices=[*RUNNERS, *ALIASES], metavar="NAME", help="these alone")
    parser.add_argument("--peers", nargs="*", metavar="NAME", help="all of ours, and of the others these (none: ours alone)")
    parser.add_argument("--contexts", nargs="+", type=int, help="prompt lengths; default: 100")
    parser.add_argument("--tokens", type=int, default=32, help="tokens generated in a round (fewer where the context ends)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=2, help="rounds before those that count")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--jobs", type=int, default=1, help="processes that open at the same time; more need cores")
    parser.add_argument("--env", type=Path, default=Path(".benchmarks"), help="folder of the environments of peers")
    parser.add_argument("--folder", type=Path, help="where models are made, and found again; default: a temporary one")
    parser.add_argument("--no-reference", action="store_true", help="leave `agrees` out where transformers is no runner")
    parser.add_argument("--save", type=Path, help="append the lines to this file, and leave out the groups that it has")
    args = parser.parse_args()
    peers = {name for runner in RUNNERS.values() if not runner.ours for name in (runner.name, runner.env) if name}
    if unknown := set(args.peers or ()) - peers:
        parser.error(f"there is no peer {', '.join(sorted(unknown))}: they are {', '.join(sorted(peers))}")
    args.env = args.env.absolute()
    quality = "quality" in args.groups
    args.groups = [group for group in args.groups if group != "quality"]
    out = Output(args.save)
    with tempfile.TemporaryDirectory() as scratch:
        for model in args.models:
            measure(model, args, out, (args.folder or Path(scratch)).absolute() / model)
    if quality and args.runners is None and not out.is_done("", "quality", 0):
        from quality import measure as measure_quality

        measure_quality(out.emit)
        out.emit(figure="group done", model="", group="quality", context=0)


if __name__ == "__main__":
    main()
