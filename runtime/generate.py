"""Text generation from a causal language model, in either dialect.

A graph with slots (see the pass ``kv_cache``) computes each token once. For one without, the whole sequence is computed again
at each step: any exported file works, at a cost that is quadratic in the length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeGuard, cast, overload

import numpy as np

from actgraph.errors import InputError
from actgraph.graph.context import context_length, logits_output, token_dims
from actgraph.graph.graph import Array, Graph
from actgraph.graph.input_values import InputValue
from actgraph.graph.program import Program
from actgraph.runtime.given import with_adapter
from actgraph.runtime.sampling import Sampling
from actgraph.runtime.session import Compiled, compile, unknown_inputs
from actgraph.runtime.text import INCOMPLETE, TextStream, Tokenizer, continuation

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
    model: Graph | Program | Compiled, prompt: Prompt = ..., max_new_tokens: int = ..., *, temperature: float = ...,
    top_k: int = ..., top_p: float = ..., seed: int = ..., stop: str | Sequence[str] = ..., stop_at_end: bool = ...,
    inputs: Mapping[str, InputValue] | None = ..., adapter: str | Path | None = ...,
) -> Generation: ...  # fmt: skip


@overload
def generate(
    model: Graph | Program | Compiled, prompt: Sequence[Prompt], max_new_tokens: int = ..., *, temperature: float = ...,
    top_k: int = ..., top_p: float = ..., seed: int = ..., stop: str | Sequence[str] = ..., stop_at_end: bool = ...,
    inputs: Mapping[str, InputValue] | None = ..., adapter: str | Path | None = ...,
) -> list[Generation]: ...  # fmt: skip


def generate(
    model: Graph | Program | Compiled,
    prompt: Prompt | Sequence[Prompt] = "",
    max_new_tokens: int = 60,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: str | Sequence[str] = (),
    stop_at_end: bool = True,
    inputs: Mapping[str, InputValue] | None = None,
    adapter: str | Path | None = None,
) -> Generation | list[Generation]:
    """Continue ``prompt`` (text, or token ids) by up to ``max_new_tokens`` tokens; of several prompts, each.

    Several prompts are one batch, padded on the left, where the model takes an attention mask; else they run one by one.
    temperature, top_k, top_p, seed: see ``actgraph.runtime.sampling.Sampling``; greedy by default.
    stop: generation of a row ends before the first of these strings.
    stop_at_end: stop at an end token of the generation config (which is not part of the result).
    inputs, adapter: values for inputs that say more than tokens do, such as ``{"steer.scale": 2}``, for all prompts or one for
    each, and a file with such values; see ``Compiled.session``.

    model: a graph, a program of a prefill and a decode graph, or either compiled; open it once with ``compile`` for several
    calls. One prompt on a model compiled with ``prefixes`` computes only what the cache of prefixes does not have.

    Raises InputError when the model is not a causal language model or has no tokenizer for a text prompt.
    """
    sampling = Sampling(temperature, top_k, top_p, seed)
    stops = (stop,) if isinstance(stop, str) else tuple(stop)

    values = with_adapter(inputs, adapter)

    def run(
        model: Graph | Program | Compiled, prompts: Sequence[Prompt], given: Mapping[str, InputValue], row: int = 0
    ) -> list[Generation]:
        return _finished(_Generator(model, prompts, max_new_tokens, sampling, stops, stop_at_end, row, given, follow=False))

    if not _is_batch(prompt):
        return run(model, [cast("Prompt", prompt)], values)[0]
    if not prompt:
        raise InputError("there are no prompts", "give at least one")
    compiled = model if isinstance(model, Compiled) else compile(model)
    if any(value.name == "attention_mask" for value in _main_graph(compiled).inputs()):
        return run(compiled, list(prompt), values)
    givable = compiled.givable
    checked = givable.checked(values, len(prompt))
    return [run(compiled, [each], givable.of_row(checked, row), row)[0] for row, each in enumerate(prompt)]


def stream(
    model: Graph | Program | Compiled,
    prompt: Prompt = "",
    max_new_tokens: int = 60,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: str | Sequence[str] = (),
    stop_at_end: bool = True,
    inputs: Mapping[str, InputValue] | None = None,
    adapter: str | Path | None = None,
) -> Iterator[Step]:
    """As ``generate`` for one prompt, one ``Step`` at a time. Bad arguments raise before the first step is asked for."""
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    sampling, given = Sampling(temperature, top_k, top_p, seed), with_adapter(inputs, adapter)
    generator = _Generator(model, [prompt], max_new_tokens, sampling, stops, stop_at_end, given=given)
    return (step for steps in generator for step in steps.values())


def _is_batch(prompt: Prompt | Sequence[Prompt]) -> TypeGuard[Sequence[Prompt]]:
    return not isinstance(prompt, str) and (len(prompt) == 0 or not isinstance(prompt[0], (int, np.integer)))


def _finished(generator: _Generator) -> list[Generation]:
    for _ in generator:
        pass
    return [row.generation() for row in generator.rows]


class _Numbers:
    """What stands for text where there is no tokenizer."""

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


@dataclass
class _Row:
    """One prompt and what has been made of it.

    stream: the text so far, where somebody looks at it before the end; else it is made at the end, at once.
    """

    tokenizer: Tokenizer | None
    prompt: tuple[int, ...]
    number: int
    stops: tuple[str, ...] = ()
    stream: TextStream | None = None
    tokens: list[int] = field(default_factory=list)
    shown: list[str] = field(default_factory=list)
    held: str = ""  # complete text that may be the beginning of a stop string
    reason: str = ""

    @property
    def context(self) -> tuple[int, ...]:
        """The tokens whose text stands before the continuation."""
        return self.prompt if self.tokenizer is not None else ()

    def follow(self) -> None:
        """From now on steps tell their text."""
        self.stream = TextStream(self.tokenizer or _Numbers(), self.context)

    def take(self, token: int, last: bool) -> Step:
        """Add a token; the step holds the text that can no longer change."""
        self.tokens.append(token)
        if last:
            self.reason = "length"
        if self.stream is None:
            return Step(token, "")
        text = self.held + self.stream.push(token)
        if self.stops:
            seen = text + self.stream.pending.rstrip(INCOMPLETE)
            found = [place for place in map(seen.find, self.stops) if place >= 0]
            if found:
                self.reason, self.held = "stop", ""
                return self._show(token, seen[: min(found)])
        if last:
            self.held = text
            return self._show(token, self._rest())
        end = len(text) - _may_become(text, self.stops)
        self.held = text[end:]
        return self._show(token, text[:end])

    def end(self, reason: str) -> Step | None:
        """No token follows: the step with the text that was held back, if there is any."""
        self.reason = reason
        rest = self._rest()
        return self._show(None, rest) if rest else None

    def _rest(self) -> str:
        text = self.held + (self.stream.finish() if self.stream is not None else "")
        self.held = ""
        return text

    def _show(self, token: int | None, text: str) -> Step:
        self.shown.append(text)
        return Step(token, text)

    def generation(self) -> Generation:
        made = "".join(self.shown)
        if self.stream is None:
            made = continuation(self.tokenizer or _Numbers(), self.context, self.tokens)
        return Generation(self.prompt, tuple(self.tokens), made, self.reason or "length")


def _may_become(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of ``text`` are the beginning of a stop string."""
    return max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)


class _Generator:
    """Generation of a batch of rows; yields the steps of each round by row. follow: the steps tell their text."""

    def __init__(
        self,
        model: Graph | Program | Compiled,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        sampling: Sampling,
        stops: Sequence[str] = (),
        stop_at_end: bool = True,
        row: int = 0,
        given: Mapping[str, InputValue] | None = None,
        follow: bool = True,
    ) -> None:
        if max_new_tokens < 0:
            raise InputError(f"max_new_tokens must not be negative, and is {max_new_tokens}")
        graph = _main_graph(model)
        tokenizer = graph.companions.tokenizer
        stops = tuple(stop for stop in stops if stop)
        if stops and tokenizer is None:
            raise InputError(f"{graph.name} has no tokenizer, and stop strings are text", "give --tokenizer DIR, or no stop")
        self.rows = [_Row(tokenizer, _encode(graph, prompt), row + n, stops) for n, prompt in enumerate(prompts)]
        if follow or stops:
            for each in self.rows:
                each.follow()
        self.limit = context_length(graph)
        self._refuse_longer(self.limit)
        self.logits_name = logits_output(graph)
        dims = token_dims(graph)
        if dims is not None and isinstance(dims[1], int):
            raise InputError(
                f"{graph.name} takes {dims[1]} token{'s' if dims[1] > 1 else ''} at a time, and not a text",
                "a decode graph runs as part of its program: give its folder"
                if dims[1] == 1
                else "capture it with a dynamic length",
            )
        for member in model.program if isinstance(model, Compiled) else model if isinstance(model, Program) else (graph,):
            for name in unknown_inputs(member, given or ()):
                raise InputError(
                    f"generation does not know what to feed input {name!r} of {member.name}", "it fills token inputs"
                )
        self.ends = _end_tokens(graph) if stop_at_end else frozenset[int]()
        self.max_new_tokens, self.sampling = max_new_tokens, sampling
        self.compiled = model if isinstance(model, Compiled) else compile(model)
        self._refuse_longer(self.compiled.capacity)
        self.session = self.compiled.session(len(self.rows), inputs=given)

    def _refuse_longer(self, limit: int | None) -> None:
        longest = max(len(row.prompt) for row in self.rows)
        if limit is not None and longest > limit:
            raise InputError(f"the prompt has {longest} tokens and the model's context holds {limit}", "shorten it")

    def __iter__(self) -> Iterator[dict[int, Step]]:
        rows, name = self.rows, self.logits_name
        feed: Callable[[Array, Array | None], dict[str, Array]] = self._prompt
        longest = max(len(row.prompt) for row in rows)
        ids = np.zeros((len(rows), longest), np.int64)
        valid = np.zeros_like(ids)
        for place, row in enumerate(rows):
            ids[place, longest - len(row.prompt) :], valid[place, longest - len(row.prompt) :] = row.prompt, 1
        mask = None if valid.all() else valid
        capacity = self.compiled.capacity
        for count in range(self.max_new_tokens):
            if capacity is not None and self.session.length + ids.shape[1] > capacity:
                yield from self._context_is_full()
                return
            logits = feed(ids, mask)[name]
            yield self._round(logits, last=count + 1 == self.max_new_tokens)
            going = [not row.reason for row in rows]
            if not any(going):
                return
            feed = self.session.feed
            if all(going):
                ids, mask = np.array([[row.tokens[-1]] for row in rows], np.int64), None
            else:  # Rows that ended go on as padding, until the others have.
                ids = np.array([[0 if row.reason else row.tokens[-1]] for row in rows], np.int64)
                mask = np.array(going, np.int64)[:, None]

    def _prompt(self, ids: Array, valid: Array | None) -> dict[str, Array]:
        """Feed the prompt, of whose beginning the keys and values may be known already."""
        prefixes = self.compiled.prefixes
        if prefixes is None or len(self.rows) > 1:
            return self.session.feed(ids, valid)
        return prefixes.feed(self.session, ids)

    def _round(self, logits: Array, last: bool) -> dict[int, Step]:
        made = {}
        for place, row in enumerate(self.rows):
            if row.reason:
                continue
            token = self.sampling.pick(logits[place, -1], len(row.tokens), row.number)
            step = row.end("end") if token in self.ends else row.take(token, last)
            if step is not None:
                made[row.number] = step
        return made

    def _context_is_full(self) -> Iterator[dict[int, Step]]:
        ended = {row.number: row.end("context") for row in self.rows if not row.reason}
        rest = {number: step for number, step in ended.items() if step is not None}
        if rest:
            yield rest


def _main_graph(model: Graph | Program | Compiled) -> Graph:
    """The graph that tells about the model: of a program the one that takes the prompt."""
    if not isinstance(model, (Graph, Program, Compiled)):
        raise InputError(f"generation takes a graph, not {type(model).__name__}", "ag.load opens a model by its name")
    if isinstance(model, Compiled):
        return model.graph
    return model.graphs[model.driver.graph_at(0)] if isinstance(model, Program) else model


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
