"""Text generation from a causal language model, in either dialect.

A graph with slots (see the pass ``kv_cache``) computes each token once. For one without, the whole sequence is computed again
at each step: any exported file works, at a cost that is quadratic in the length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeGuard, cast, overload

import numpy as np

from actgraph.errors import InputError
from actgraph.graph.context import context_length, logits_output
from actgraph.graph.graph import Array, Graph
from actgraph.runtime.sampling import Sampling
from actgraph.runtime.session import Compiled, compile, unknown_inputs

#: A prompt: text, or token ids.
Prompt = str | Sequence[int]


@dataclass(frozen=True)
class Step:
    """One generated token and the text that became final with it.

    The text is empty while a character is incomplete, or while it may be the beginning of a stop string. ``token`` is ``None``
    for text that was held back when the model ended.
    """

    token: int | None
    text: str


@dataclass(frozen=True)
class Generation:
    """What was generated. ``text`` is the continuation alone; both are empty when the model ended at once.

    reason: ``"length"`` (max_new_tokens reached), ``"end"`` (the model's end token), ``"stop"`` (a stop string, which is not
    part of the text), or ``"context"`` (the model's context is full).
    """

    prompt_tokens: tuple[int, ...]
    tokens: tuple[int, ...]
    text: str
    reason: str

    def __str__(self) -> str:
        return self.text


@overload
def generate(  # type: ignore[overload-overlap]  # text is a sequence of texts to the type checker, and one prompt to us
    model: Graph | Compiled, prompt: Prompt = ..., max_new_tokens: int = ..., *, temperature: float = ..., top_k: int = ...,
    top_p: float = ..., seed: int = ..., stop: str | Sequence[str] = ..., stop_at_end: bool = ...,
) -> Generation: ...  # fmt: skip


@overload
def generate(
    model: Graph | Compiled, prompt: Sequence[Prompt], max_new_tokens: int = ..., *, temperature: float = ...,
    top_k: int = ..., top_p: float = ..., seed: int = ..., stop: str | Sequence[str] = ..., stop_at_end: bool = ...,
) -> list[Generation]: ...  # fmt: skip


def generate(
    model: Graph | Compiled,
    prompt: Prompt | Sequence[Prompt] = "",
    max_new_tokens: int = 60,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: str | Sequence[str] = (),
    stop_at_end: bool = True,
) -> Generation | list[Generation]:
    """Continue ``prompt`` (text, or token ids) by up to ``max_new_tokens`` tokens; of several prompts, each.

    Several prompts are one batch, padded on the left, where the model takes an attention mask; else they run one by one.
    temperature, top_k, top_p, seed: see ``actgraph.runtime.sampling.Sampling``; greedy by default.
    stop: generation of a row ends before the first of these strings.
    stop_at_end: stop at an end token of the generation config (which is not part of the result).

    Raises InputError when the model is not a causal language model or has no tokenizer for a text prompt.
    """
    sampling = Sampling(temperature, top_k, top_p, seed)
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if not _is_batch(prompt):
        generator = _Generator(model, [cast("Prompt", prompt)], max_new_tokens, sampling, stops, stop_at_end)
        return _finished(generator)[0]
    if not prompt:
        raise InputError("there are no prompts", "give at least one")
    compiled = model if isinstance(model, Compiled) else compile(model)
    if "attention_mask" in compiled.inputs:
        return _finished(_Generator(compiled, list(prompt), max_new_tokens, sampling, stops, stop_at_end))
    single = [_Generator(compiled, [p], max_new_tokens, sampling, stops, stop_at_end, row=r) for r, p in enumerate(prompt)]
    return [_finished(generator)[0] for generator in single]


def stream(
    model: Graph | Compiled,
    prompt: Prompt = "",
    max_new_tokens: int = 60,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: str | Sequence[str] = (),
    stop_at_end: bool = True,
) -> Iterator[Step]:
    """As ``generate`` for one prompt, one ``Step`` at a time. Bad arguments raise before the first step is asked for."""
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    generator = _Generator(model, [prompt], max_new_tokens, Sampling(temperature, top_k, top_p, seed), stops, stop_at_end)
    return (step for steps in generator for step in steps.values())


def _is_batch(prompt: Prompt | Sequence[Prompt]) -> TypeGuard[Sequence[Prompt]]:
    return not isinstance(prompt, str) and (len(prompt) == 0 or not isinstance(prompt[0], (int, np.integer)))


def _finished(generator: _Generator) -> list[Generation]:
    for _ in generator:
        pass
    return [row.generation() for row in generator.rows]


@dataclass
class _Row:
    """One prompt and what has been made of it."""

    tokenizer: object
    prompt: tuple[int, ...]
    number: int
    tokens: list[int] = field(default_factory=list)
    shown: str = ""
    cut: int | None = None  # where a stop string begins
    reason: str = ""

    @property
    def text(self) -> str:
        """The continuation so far. Decoders treat a leading space unlike an inner one, so the prompt is decoded along."""
        if self.tokenizer is None:
            return " ".join(str(token) for token in self.tokens)
        decode = self.tokenizer.decode  # type: ignore[attr-defined]
        start, whole = str(decode(list(self.prompt))), str(decode([*self.prompt, *self.tokens]))
        text = whole[len(start) :] if whole.startswith(start) else str(decode(self.tokens))
        return text if self.cut is None else text[: self.cut]

    def take(self, token: int, stops: Sequence[str], last: bool) -> Step:
        """Add a token; the step holds the text that can no longer change."""
        self.tokens.append(token)
        text = self.text
        found = [place for place in (text.find(stop) for stop in stops if stop) if place >= 0]
        if found:
            self.cut, self.reason = min(found), "stop"
            text = text[: self.cut]
        elif last:
            self.reason = "length"
        whole = bool(self.reason) or not text.endswith("\ufffd")  # else the first bytes of a character: wait for the rest
        end = len(text) if self.reason else len(text) - _may_become(text, stops)
        new = text[len(self.shown) : end] if whole else ""
        self.shown += new
        return Step(token, new)

    def generation(self) -> Generation:
        return Generation(self.prompt, tuple(self.tokens), self.text, self.reason or "length")


def _may_become(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of ``text`` are the beginning of a stop string."""
    return max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)


class _Generator:
    """Generation of a batch of rows; yields the steps of each round by row."""

    def __init__(
        self,
        model: Graph | Compiled,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        sampling: Sampling,
        stops: Sequence[str] = (),
        stop_at_end: bool = True,
        row: int = 0,
    ) -> None:
        if max_new_tokens < 0:
            raise InputError(f"max_new_tokens must not be negative, and is {max_new_tokens}")
        graph = model.graph if isinstance(model, Compiled) else model
        tokenizer = graph.companions.tokenizer
        if stops and tokenizer is None:
            raise InputError(f"{graph.name} has no tokenizer, and stop strings are text", "give --tokenizer DIR, or no stop")
        self.rows = [_Row(tokenizer, _encode(graph, prompt), row + n) for n, prompt in enumerate(prompts)]
        self.limit = context_length(graph)
        longest = max(len(r.prompt) for r in self.rows)
        if self.limit is not None and longest > self.limit:
            raise InputError(f"the prompt has {longest} tokens and the model's context holds {self.limit}", "shorten it")
        self.logits_name = logits_output(graph)
        for name in unknown_inputs(graph):
            raise InputError(f"generation does not know what to feed input {name!r} of {graph.name}", "it fills token inputs")
        self.ends = _end_tokens(graph) if stop_at_end else frozenset[int]()
        self.max_new_tokens, self.sampling, self.stops = max_new_tokens, sampling, stops
        self.compiled = model if isinstance(model, Compiled) else compile(model)
        self.session = self.compiled.session(len(self.rows))

    def __iter__(self) -> Iterator[dict[int, Step]]:
        longest = max(len(row.prompt) for row in self.rows)
        ids = np.zeros((len(self.rows), longest), np.int64)
        valid = np.zeros_like(ids)
        for place, row in enumerate(self.rows):
            ids[place, longest - len(row.prompt) :], valid[place, longest - len(row.prompt) :] = row.prompt, 1
        for count in range(self.max_new_tokens):
            capacity = self.compiled.capacity
            if capacity is not None and self.session.length + ids.shape[1] > capacity:
                for row in self.rows:
                    row.reason = row.reason or "context"
                return
            logits = self.session.feed(ids, valid)[self.logits_name][:, -1]
            steps = self._round(logits, last=count + 1 == self.max_new_tokens)
            yield {row.number: step for row, step in steps}
            if all(row.reason for row in self.rows):
                return
            # Rows that ended go on as padding, until the others have.
            ids = np.asarray([[0 if row.reason else row.tokens[-1]] for row in self.rows], np.int64)
            valid = np.asarray([[0 if row.reason else 1] for row in self.rows], np.int64)

    def _round(self, logits: Array, last: bool) -> list[tuple[_Row, Step]]:
        made = []
        for place, row in enumerate(self.rows):
            if row.reason:
                continue
            token = self.sampling.pick(logits[place], len(row.tokens), row.number)
            if token in self.ends:
                row.reason = "end"
                rest = row.text[len(row.shown) :]
                if rest:
                    row.shown += rest
                    made.append((row, Step(None, rest)))
                continue
            made.append((row, row.take(token, self.stops, last)))
        return made


def _encode(graph: Graph, prompt: Prompt) -> tuple[int, ...]:
    if isinstance(prompt, str):
        if graph.companions.tokenizer is None:
            raise InputError(
                f"{graph.name} has no tokenizer", "give --tokenizer DIR (Python: graph.companions.tokenizer), or token ids"
            )
        tokens = tuple(int(i) for i in graph.companions.tokenizer.encode(prompt).ids)
    else:
        tokens = tuple(int(i) for i in prompt)
    if not tokens:
        start = graph.companions.generation_config.get("bos_token_id", graph.companions.config.get("bos_token_id"))
        if not isinstance(start, int):
            raise InputError("the prompt is empty and the model names no start token", "give a prompt")
        tokens = (start,)
    return tokens


def _end_tokens(graph: Graph) -> frozenset[int]:
    end = graph.companions.generation_config.get("eos_token_id", graph.companions.config.get("eos_token_id"))
    if end is None:
        return frozenset()
    return frozenset({end} if isinstance(end, int) else end)
