"""What steering costs: tokens per second of decode of each runner beside its own rate without a vector.

    python benchmarks/steering.py                                        # all, the 110 M shape, context 100
    python benchmarks/steering.py --kinds one all --runners actgraph-torch transformers-hooks
    python benchmarks/steering.py --models tiny --tokens 4 --rounds 1          # in seconds

Kinds (every vector is added to the outputs of blocks): ``one`` (at one block), ``all`` (one vector at every block), ``three``
(three at every block, which we merge into one), ``clauses`` (three with different clauses, which stay three),
``folded`` (one at every block, in biases where that is exact), ``input`` (one at every block with ``scale=input``), and
``rows``: a batch of 16 rows, each of which picks its own of 16 vectors, beside a batch of 16 without.

Runners: ``actgraph-torch``, ``actgraph-onnxruntime``, ``transformers-hooks``, ``transformers-repeng`` and ``-nnsight``;
peers have the kinds that they can express. ``same`` is the unsteered runner once more: what a ratio is where nothing differs.

A percent of a step is less than what memory changes by from one second to the next, so that a runner and the same one without
a vector, each in a process of its own, take turns after every few steps (``--slice``), either first every other time. The first
step of a turn is left out: it finds caches and threads as the other left them. A ratio is the median over all pairs of turns;
``low`` and ``high`` hold 95 of 100 medians of pairs that are drawn again. ``agrees``: how many greedy tokens are those of
forward hooks.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
from common import Bandwidth, bytes_per_token, make_model, make_vector, round_to
from decode import CONTEXTS, Group, Output, agreement
from runners import Generated, Runner

ROWS = 16
#: Seconds between turns: threads of onnxruntime spin for tens of milliseconds before they sleep.
REST = 0.1
_CACHE = "kv_cache{last_logits=true}"
#: The kinds, each with how much of the unsteered rate is the goal.
KINDS: dict[str, float] = {
    "same": 1.0, "folded": 1.0, "one": 0.99, "all": 0.99, "three": 0.99, "clauses": 0.99, "input": 0.99, "rows": 0.95,
}  # fmt: skip
#: What peers can express.
OF_PEERS = ("same", "one", "all", "three", "rows")
#: Whose tokens a kind must have; ``clauses`` has no peer, and is compared with our own first.
SAME_AS = {"folded": "all", "input": "all", "same": "plain"}
ENGINES = {"actgraph-torch": "torch", "actgraph-onnxruntime": "onnxruntime"}
PEERS = {"transformers-hooks": "", "transformers-repeng": "repeng", "transformers-nnsight": ""}
REFERENCE = "transformers-hooks"


@dataclass(frozen=True)
class Case:
    """One kind of one runner."""

    tool: str
    kind: str

    @property
    def name(self) -> str:
        return f"{self.tool}-{self.kind}"

    @property
    def rows(self) -> int:
        return ROWS if self.kind in ("rows", "plain-rows") else 1

    @property
    def plain(self) -> Case:
        """The same runner without a vector."""
        return Case(self.tool, "plain" if self.rows == 1 else "plain-rows")


def steps_of(kind: str, vectors: list[str], layers: int) -> str:
    """The passes of a kind, before the cache."""
    every, first = "site=blocks.*.resid_post", vectors[0]
    return {
        "one": f"steer{{vector={first} site=blocks.{layers // 2}.resid_post fold=false}}, ",
        "all": f"steer{{vector={first} {every} fold=false}}, ",
        "three": "".join(f"steer{{vector={vector} {every} fold=false}}, " for vector in vectors[:3]),
        "clauses": "".join(
            f'steer{{vector={vector} {every} where="{clause}"}}, '
            for vector, clause in zip(vectors, ("generated", "prompt | generated & 2:", "4:"), strict=False)
        ),
        "folded": f"steer{{vector={first} {every}}}, ",
        "input": f"steer{{vector={first} {every} scale=input}}, ",
        "rows": f"steer{{vector=[{','.join(vectors)}] {every} pick=row}}, ",
    }.get(kind, "")


def runner_of(case: Case, vectors: list[str], layers: int) -> Runner:
    if case.tool in ENGINES:
        inputs: dict[str, Any] = {"input": {"steer.scale": 1.0}, "rows": {"steer.index": list(range(1, ROWS + 1))}}
        options = {
            "engine": ENGINES[case.tool], "pipeline": steps_of(case.kind, vectors, layers) + _CACHE, "calibrate": False,
            "inputs": inputs.get(case.kind),
        }  # fmt: skip
        return Runner(case.name, 32, "ours.py", options)
    given = {"one": vectors[:1], "all": vectors[:1], "three": vectors[:3], "rows": vectors}.get(case.kind, [])
    options = {
        "dtype": "float32",
        "by": case.tool.removeprefix("transformers-"),
        "vectors": given,
        "by_row": case.kind == "rows",
    }
    if case.kind == "one":
        options["blocks"] = [layers // 2]
    return Runner(case.name, 32, "peers/hf.py", options, PEERS[case.tool])


def references(cases: list[Case], tokens: dict[Case, list[int]]) -> Iterator[tuple[Case, list[int]]]:
    """The tokens that each case should have: those of forward hooks, or of the first runner that was measured."""
    for case in cases:
        kind = SAME_AS.get(case.kind, case.kind)
        alike = [other for other in tokens if other.kind == kind]
        best = sorted(alike, key=lambda other: other.tool != REFERENCE)
        if best:
            yield case, tokens[best[0]]


@dataclass
class Pairs:
    """Seconds of a step, for each turn of a case and of its runner without a vector."""

    case: list[float]
    plain: list[float]

    @property
    def ratios(self) -> list[float]:
        """The rate with a vector, of that without."""
        return [plain / case for plain, case in zip(self.plain, self.case, strict=True)]


def turns(
    runs: tuple[Generator[Generated | None, None, None], Generator[Generated | None, None, None]],
) -> tuple[Generated, Generated]:
    """Both in turn, each first every other time."""
    made: dict[int, Generated] = {}
    turn = 0
    try:
        while len(made) < 2:
            for side in (0, 1) if turn % 2 else (1, 0):
                time.sleep(REST)
                if (found := next(runs[side])) is not None:
                    made[side] = found
            turn += 1
    finally:
        for run in runs:
            run.close()
    return made[0], made[1]


def by_turn(seconds: list[float], size: int) -> list[float]:
    """The mean step of each turn: without the prompt, the first step of each turn, and a turn that is not whole."""
    steps = seconds[1:]
    return [statistics.fmean(steps[at + 1 : at + size]) for at in range(0, len(steps) - size + 1, size)]


def interval(values: list[float]) -> tuple[float, float]:
    """Where 95 of 100 medians lie, of as many values drawn from these."""
    import numpy as np

    drawn = np.random.default_rng(0).choice(values, (2000, len(values)))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    return float(low), float(high)


def pair(
    case: Group, plain: Group, prompt: list[Any], count: int, args: argparse.Namespace
) -> tuple[Pairs, list[list[int]]] | None:
    """All rounds of a case beside its runner without a vector, and the tokens of both; None, and a line, where one fails."""
    if not case.runners:
        return None
    pairs = Pairs([], [])
    ((steered,), (unsteered,)) = case.runners, plain.runners
    for round in range(-args.warmup, args.rounds):
        try:
            made = turns((case.slices(steered, prompt, count, args.slice), plain.slices(unsteered, prompt, count, args.slice)))
        except RuntimeError as error:
            case.drop(steered, str(error))
            return None
        if round >= 0:
            pairs.case += by_turn(made[0].seconds, args.slice)
            pairs.plain += by_turn(made[1].seconds, args.slice)
    return pairs, [each.tokens for each in made]


def measure(model: str, args: argparse.Namespace, out: Output, folder: Path) -> None:
    import numpy as np

    if not (folder / "config.json").exists():
        make_model(model, folder)
    config = json.loads((folder / "config.json").read_text())
    vectors = [str(make_vector(folder, number)) for number in range(ROWS)]
    context = args.context or CONTEXTS[model][0]
    count = min(args.tokens, config["max_position_embeddings"] - context)
    prompts = np.random.default_rng(0).integers(3, config["vocab_size"], (ROWS, context)).tolist()
    reads = Bandwidth(args.threads)
    bandwidth = reads.measure(5)
    del reads
    out.emit(
        figure="read bandwidth", model=model, value=round_to(bandwidth / 1e9), unit="GB/s", threads=args.threads,
        processor=common.processor(),
    )  # fmt: skip
    tokens: dict[Case, list[int]] = {}
    seconds: dict[Case, list[float]] = {}

    def open_case(case: Case) -> Group:
        return Group(model, "steering", [runner_of(case, vectors, config["num_hidden_layers"])], folder, args, out)

    for tool in args.runners:
        asked = [Case(tool, kind) for kind in args.kinds if tool in ENGINES or kind in OF_PEERS]
        for plain, group in itertools.groupby(sorted(asked, key=lambda case: case.rows), key=lambda case: case.plain):
            with contextlib.closing(open_case(plain)) as beside:
                for case in group if beside.runners else ():
                    with contextlib.closing(open_case(case)) as steered:
                        found = pair(steered, beside, prompts if case.rows > 1 else prompts[0], count, args)
                    if found is None:
                        continue
                    pairs, (tokens[case], tokens[plain]) = found
                    seconds.setdefault(plain, []).extend(pairs.plain)
                    seconds[case] = pairs.case
                    report(case, pairs, model, context, out)
    expected = dict(references(list(tokens), tokens))
    for case, steps in seconds.items():
        value, middle = case.rows / statistics.median(steps), context + count / 2
        limit = bandwidth * case.rows / bytes_per_token(config, 32, 0.0, case.rows * middle)
        out.emit(
            model=model, context=context, runner=case.name, tool=case.tool, kind=case.kind, rows=case.rows, unit="tokens/s",
            value=round_to(value), tokens=count, physical_limit=round_to(limit), of_limit=round_to(value / limit),
            agrees=agreeing(tokens[case], expected.get(case), case.rows),
        )  # fmt: skip


def report(case: Case, pairs: Pairs, model: str, context: int, out: Output) -> None:
    values = pairs.ratios
    value, (low, high) = statistics.median(values), interval(values)
    more = {"goal": KINDS[case.kind], "met": value >= KINDS[case.kind]} if case.tool in ENGINES and case.kind != "same" else {}
    out.emit(
        model=model, context=context, ratio=f"{case.name} / {case.plain.name}", value=round_to(value), low=round_to(low),
        high=round_to(high), pairs=len(values), milliseconds=round_to(1e3 * statistics.median(pairs.case)),
        without=round_to(1e3 * statistics.median(pairs.plain)), **more,
    )  # fmt: skip


def agreeing(tokens: list[int], reference: list[int] | None, rows: int) -> int | None:
    """The tokens that rows begin with in common with their reference, of all rows together."""
    if reference is None:
        return None
    size = len(tokens) // rows
    return sum(agreement(tokens[at : at + size], reference[at : at + size]) or 0 for at in range(0, len(tokens), size))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(CONTEXTS), default=["llama110m"])
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--runners", nargs="+", choices=[*ENGINES, *PEERS], default=[*ENGINES, *PEERS])
    parser.add_argument("--context", type=int, help="tokens of the prompt; default: 100")
    parser.add_argument("--tokens", type=int, default=101, help="tokens generated in a round (fewer where the context ends)")
    parser.add_argument("--slice", type=int, default=5, help="steps after which the other takes its turn, at least 2")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--warmup", type=int, default=1, help="rounds before those that count")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--jobs", type=int, default=1, help="processes that open at the same time; more need cores")
    parser.add_argument("--env", type=Path, default=Path(".benchmarks"), help="folder of the environments of peers")
    parser.add_argument("--folder", type=Path, help="where models are made, and found again; default: a temporary one")
    parser.add_argument("--save", type=Path, help="append the lines to this file")
    args = parser.parse_args()
    if args.slice < 2 or args.tokens <= args.slice:
        parser.error("--slice is at least 2, and fewer than --tokens")
    args.env = args.env.absolute()
    out = Output(args.save, "steering")
    with tempfile.TemporaryDirectory() as scratch:
        for model in args.models:
            measure(model, args, out, (args.folder or Path(scratch)).absolute() / model)


if __name__ == "__main__":
    main()
