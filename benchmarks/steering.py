"""What steering costs: tokens per second of decode of each runner beside its own rate without a vector.

    python benchmarks/steering.py                                        # all, the 110 M shape, context 100
    python benchmarks/steering.py --kinds one all --runners actgraph-torch transformers-hooks
    python benchmarks/steering.py --models tiny --tokens 4 --rounds 1          # in seconds

Kinds (every vector is added to the outputs of blocks): ``one`` (at one block), ``all`` (one vector at every block), ``three``
(three at every block, which we merge into one), ``clauses`` (three with different clauses, which stay three),
``folded`` (one at every block, in biases where that is exact), ``input`` (one at every block with ``scale=input``), and
``rows``: a batch of 16 rows, each of which picks its own of 16 vectors, beside a batch of 16 without.

Runners: ``actgraph-torch``, ``actgraph-onnxruntime``, ``transformers-hooks``, ``transformers-repeng`` and ``-nnsight``;
peers have the kinds that they can express. Each configuration of ours is a process of its own (both engines share it), each
peer is one process. In a round all kinds of all runners generate in turn; figures are medians, and ratios are medians of the
ratios to the same runner's unsteered rate of the same round. ``agrees``: how many greedy tokens are those of forward hooks.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
from common import Bandwidth, bytes_per_token, make_model, make_vector, round_to
from decode import CONTEXTS, Group, Output, agreement, ratio
from runners import Runner

ROWS = 16
_CACHE = "kv_cache{last_logits=true}"
#: The kinds, each with how much of the unsteered rate is the goal.
KINDS: dict[str, float] = {"one": 0.99, "all": 0.99, "three": 0.99, "clauses": 0.99, "folded": 1.0, "input": 0.99, "rows": 0.95}
#: What peers can express.
OF_PEERS = ("one", "all", "three", "rows")
#: Whose tokens a kind must have; ``clauses`` has no peer, and is compared with our own first.
SAME_AS = {"folded": "all", "input": "all"}
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
    return Runner(case.name, 32, "peers/hf.py", options, PEERS[case.tool], shares=case.tool)


def cases_of(args: argparse.Namespace) -> list[Case]:
    """What was asked for, and what it is measured beside."""
    asked = [Case(tool, kind) for kind in args.kinds for tool in args.runners if tool in ENGINES or kind in OF_PEERS]
    return list(dict.fromkeys([*(case.plain for case in asked), *asked]))


def references(cases: list[Case], tokens: dict[Case, list[int]]) -> Iterator[tuple[Case, list[int]]]:
    """The tokens that each case should have: those of forward hooks, or of the first runner that was measured."""
    for case in cases:
        kind = SAME_AS.get(case.kind, case.kind)
        alike = [other for other in tokens if other.kind == kind]
        best = sorted(alike, key=lambda other: other.tool != REFERENCE)
        if best:
            yield case, tokens[best[0]]


def measure(model: str, args: argparse.Namespace, out: Output, folder: Path) -> None:
    import numpy as np

    if not (folder / "config.json").exists():
        make_model(model, folder)
    config = json.loads((folder / "config.json").read_text())
    vectors = [str(make_vector(folder, number)) for number in range(ROWS)]
    cases = cases_of(args)
    by_name = {case.name: case for case in cases}
    context = args.context or CONTEXTS[model][0]
    count = min(args.tokens, config["max_position_embeddings"] - context)
    prompts = np.random.default_rng(0).integers(3, config["vocab_size"], (ROWS, context)).tolist()
    reads = Bandwidth(args.threads)
    runners = [runner_of(case, vectors, config["num_hidden_layers"]) for case in cases]
    group = Group(model, "steering", runners, folder, args, out)
    rates: dict[Case, list[float]] = {by_name[name]: [] for name in group.runners}
    tokens: dict[Case, list[int]] = {}
    try:
        bandwidth = reads.measure(5)
        del reads
        out.emit(
            figure="read bandwidth", model=model, value=round_to(bandwidth / 1e9), unit="GB/s", threads=args.threads,
            processor=common.processor(),
        )  # fmt: skip
        for round in range(-args.warmup, args.rounds):
            for name in list(group.runners):
                case = by_name[name]
                try:
                    _, rest, tokens[case] = group.run(name, prompts if case.rows > 1 else prompts[0], count)
                except RuntimeError as error:
                    group.drop(name, str(error))
                    continue
                if round >= 0:
                    rates[case].append(case.rows * (count - 1) / rest)
    finally:
        group.close()
    rates = {case: found for case, found in rates.items() if case.name in group.runners}
    expected = dict(references(list(rates), {case: tokens[case] for case in rates}))
    for case, found in rates.items():
        median, middle = statistics.median(found), context + count / 2
        limit = bandwidth * case.rows / bytes_per_token(config, 32, 0.0, case.rows * middle)
        out.emit(
            model=model, context=context, runner=case.name, tool=case.tool, kind=case.kind, rows=case.rows, unit="tokens/s",
            value=round_to(median), least=round_to(min(found)), most=round_to(max(found)), rounds=len(found), tokens=count,
            physical_limit=round_to(limit), of_limit=round_to(median / limit),
            agrees=agreeing(tokens[case], expected.get(case), case.rows),
        )  # fmt: skip
    for case, found in rates.items():
        if case.plain == case or case.plain not in rates:
            continue
        value = ratio(found, rates[case.plain])
        more = {"goal": KINDS[case.kind], "met": value >= KINDS[case.kind]} if case.tool in ENGINES else {}
        out.emit(model=model, context=context, ratio=f"{case.name} / {case.plain.name}", value=round_to(value), **more)


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
    parser.add_argument("--tokens", type=int, default=32, help="tokens generated in a round (fewer where the context ends)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=1, help="rounds before those that count")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--jobs", type=int, default=1, help="processes that open at the same time; more need cores")
    parser.add_argument("--env", type=Path, default=Path(".benchmarks"), help="folder of the environments of peers")
    parser.add_argument("--folder", type=Path, help="where models are made, and found again; default: a temporary one")
    parser.add_argument("--save", type=Path, help="append the lines to this file")
    args = parser.parse_args()
    args.env = args.env.absolute()
    out = Output(args.save, "steering")
    with tempfile.TemporaryDirectory() as scratch:
        for model in args.models:
            measure(model, args, out, (args.folder or Path(scratch)).absolute() / model)


if __name__ == "__main__":
    main()
