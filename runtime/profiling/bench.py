"""How fast a model runs: a prompt, then single tokens; or whole calls of a model that has no cache."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from actgraph.errors import InputError
from actgraph.graph.context import logits_output
from actgraph.graph.graph import Array
from actgraph.graph.parity import sample_inputs
from actgraph.runtime.profiling.floor import slot_bytes, weight_bytes
from actgraph.runtime.profiling.profile import Profile
from actgraph.runtime.profiling.sessions import stream_figure, threads_of
from actgraph.runtime.session import Compiled, Session, unknown_inputs

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Stage:
    """Calls of one kind. name: ``"prefill"``, ``"decode"`` or ``"forward"``. tokens: of a call; 0 where it takes none.

    seconds: of a call, the median. rate: tokens per second, the median over the rounds (calls per second where there are no
    tokens). bytes: that a call must read at most, weights and caches. limit: the rate at which these bytes can be read.
    """

    name: str
    tokens: int
    calls: int
    seconds: float
    rate: float
    bytes: int
    limit: float | None


@dataclass(frozen=True)
class Bench:
    """The figures of ``bench``. first_token: seconds from the prompt to its first new token. stream: bytes per second."""

    engine: str
    threads: int
    rounds: int
    stages: tuple[Stage, ...]
    first_token: float | None
    stream: float | None
    profile: Profile | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data. Seconds, bytes, tokens per second."""
        return {
            "engine": self.engine, "threads": self.threads, "rounds": self.rounds, "first_token_seconds": self.first_token,
            "stream_bytes_per_second": self.stream, "stages": {stage.name: vars(stage) for stage in self.stages},
            "profile": self.profile.to_json() if self.profile is not None else None,
        }  # fmt: skip


def bench(
    compiled: Compiled,
    *,
    prompt_tokens: int = 64,
    tokens: int = 32,
    rounds: int = 5,
    seed: int = 0,
    profile: bool = False,
    stream: bool | float = True,
    progress: Progress = lambda done, total: None,
) -> Bench:
    """Time a compiled model.

    A language model with a cache: each round feeds a prompt of ``prompt_tokens`` (drawn by ``seed``) to an empty session, then
    ``tokens`` - 1 single tokens, each the most likely one. Any other: each round is one call with sample inputs, of
    ``prompt_tokens`` tokens where it takes tokens. A first round is not counted. profile: profile one more (of a model without
    a cache ten), which is not counted either. stream: as for ``Session.profile``; it is measured once. progress: called with
    rounds done, and all.
    Raises InputError for numbers that do not fit the model, and for inputs that cannot be made up.
    """
    for name, count, least in (("prompt_tokens", prompt_tokens, 1), ("tokens", tokens, 1), ("rounds", rounds, 1)):
        if count < least:
            raise InputError(f"{name} is {count}", f"give at least {least}")
    figure = stream_figure(compiled, stream)
    plan = _Plan(compiled, prompt_tokens, tokens, rounds, seed, figure)
    cached = any(slot.update != "replace" for slot in compiled.slots) and "input_ids" in compiled.inputs
    one_round, stages_of = _language(plan) if cached else _forward(plan)
    times: list[list[float]] = []
    total = rounds + 1 + profile
    for number in range(rounds + 1):
        spent = one_round()
        times += [spent] if number else []
        progress(number + 1, total)
    found = None
    if profile:
        with compiled.profile(stream=figure or False) as found:
            again = (_language(plan) if cached else _forward(plan))[0]
            for _ in range(1 if cached else CALLS):
                again()
        progress(total, total)
    first = statistics.median(spent[0] for spent in times) if cached else None
    return Bench(compiled.engine, threads_of(compiled), rounds, tuple(stages_of(times)), first, figure, found)


#: Calls that are profiled of a model without a cache: the first ones of an engine take longer.
CALLS = 10


@dataclass(frozen=True)
class _Plan:
    compiled: Compiled
    prompt: int
    tokens: int
    rounds: int
    seed: int
    stream: float | None


#: A round, which gives the seconds of its calls, and the stages that follow from those of all rounds.
_Rounds = tuple[Callable[[], list[float]], Callable[[list[list[float]]], list[Stage]]]


def _language(plan: _Plan) -> _Rounds:
    compiled, prompt, tokens, stream = plan.compiled, plan.prompt, plan.tokens, plan.stream
    if compiled.capacity is not None and prompt + tokens - 1 > compiled.capacity:
        hint = "ask for fewer"
        raise InputError(f"a prompt of {prompt} tokens and {tokens} more do not fit the context of {compiled.capacity}", hint)
    unknown = next(unknown_inputs(compiled.graph), None)
    if unknown is not None:
        raise InputError(f"{compiled.graph.name} has an input {unknown!r} that a session cannot fill in", "time it by calls")
    scores = logits_output(compiled.graph)
    session = compiled.session()
    drawn = np.random.default_rng(plan.seed).integers(0, session._vocabulary or 256, (1, prompt))

    def stages(times: list[list[float]]) -> list[Stage]:
        graphs, driver = compiled.program.graphs, compiled.program.driver
        found = [_stage("prefill", prompt, [spent[:1] for spent in times], weight_bytes(graphs[driver.graph_at(0)]), stream)]
        if tokens > 1:
            caches = slot_bytes(compiled.slots, prompt + tokens // 2)  # half way through
            size = weight_bytes(graphs[driver.graph_at(1)]) + caches
            found.append(_stage("decode", 1, [spent[1:] for spent in times], size, stream))
        return found

    return lambda: _round(session, drawn, tokens, scores), stages


def _forward(plan: _Plan) -> _Rounds:
    inputs = sample_inputs(plan.compiled.graph, 1, plan.prompt, plan.seed)
    ids = inputs.get("input_ids")
    tokens = ids.shape[-1] if ids is not None and ids.ndim else 0

    def call() -> list[float]:
        begin = time.perf_counter()
        plan.compiled(inputs)
        return [time.perf_counter() - begin]

    return call, lambda times: [_stage("forward", tokens, times, weight_bytes(plan.compiled.graph), plan.stream)]


def _round(session: Session, prompt: Array, tokens: int, scores: str) -> list[float]:
    """Seconds of the prompt, and of each token behind the first."""
    session.reset()
    times: list[float] = []
    fed = prompt
    last = time.perf_counter()
    for _ in range(tokens):
        fed = session.feed(fed)[scores][:, -1:].argmax(-1)
        now = time.perf_counter()
        times.append(now - last)
        last = now
    return times


def _stage(name: str, tokens: int, rounds: list[list[float]], size: int, stream: float | None) -> Stage:
    """rounds: seconds of the calls of each round."""
    per_call = tokens or 1
    calls = [seconds for spent in rounds for seconds in spent]
    rate = statistics.median(per_call * len(spent) / sum(spent) for spent in rounds)
    limit = per_call * stream / size if stream and size else None
    return Stage(name, tokens, len(calls), statistics.median(calls), rate, size, limit)
