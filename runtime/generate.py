"""Text generation from a causal language model, in either dialect.

The whole sequence is computed again at each step: no cache is needed in the graph, any exported file works, and every
edit acts on prompt and continuation alike. The cost is quadratic in the length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from actgraph.errors import InputError
from actgraph.graph.context import logits_output
from actgraph.graph.executor import Runner, executor_for
from actgraph.graph.graph import Array, Graph, Role

#: The inputs that a causal language model is fed with, and how each follows from the token ids ``[1, seq]`` and the number
#: of prompt tokens among them. The second half are context values (``actgraph.graph.context``).
_FILL: dict[str, Callable[[Array, int], Array]] = {
    "input_ids": lambda ids, prompt: ids,
    "attention_mask": lambda ids, prompt: np.ones_like(ids),
    "position_ids": lambda ids, prompt: np.arange(ids.shape[1])[None],
    "token_type_ids": lambda ids, prompt: np.zeros_like(ids),
    "positions": lambda ids, prompt: np.arange(ids.shape[1])[None],
    "valid_tokens": lambda ids, prompt: np.ones_like(ids),
    "prompt_lengths": lambda ids, prompt: np.asarray([prompt]),
    "row_index": lambda ids, prompt: np.zeros(1),
    "step": lambda ids, prompt: np.asarray([ids.shape[1] - prompt]),
}


@dataclass(frozen=True)
class Step:
    """One generated token and the text that became final with it (empty while a character is incomplete)."""

    token: int
    text: str


@dataclass(frozen=True)
class Generation:
    """What was generated. ``text`` is the continuation alone; both are empty when the model ended at once.

    reason: ``"length"`` (max_new_tokens reached), ``"end"`` (the model's end token), or ``"context"`` (the model's
    context is full).
    """

    prompt_tokens: tuple[int, ...]
    tokens: tuple[int, ...]
    text: str
    reason: str

    def __str__(self) -> str:
        return self.text


def generate(
    graph: Graph,
    prompt: str | Sequence[int] = "",
    max_new_tokens: int = 60,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    seed: int = 0,
    stop_at_end: bool = True,
) -> Generation:
    """Continue ``prompt`` (text, or token ids) by up to ``max_new_tokens`` tokens.

    temperature: 0 takes the most likely token; above, tokens are drawn from ``softmax(logits / temperature)``.
    top_k: draw among the k most likely tokens only; 0 means all.
    seed: the draw of token n depends on ``(seed, n)`` and the probabilities alone.
    stop_at_end: stop at an end token of the generation config (which is not part of the result).

    Raises InputError when the graph is not a causal language model or has no tokenizer for a text prompt.
    """
    steps = _Generator(graph, prompt, max_new_tokens, temperature, top_k, seed, stop_at_end)
    for _ in steps:
        pass
    return Generation(steps.prompt_tokens, tuple(steps.tokens), steps.text, steps.reason)


def stream(
    graph: Graph,
    prompt: str | Sequence[int] = "",
    max_new_tokens: int = 60,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    seed: int = 0,
    stop_at_end: bool = True,
) -> Iterator[Step]:
    """As ``generate``, one ``Step`` at a time. Bad arguments raise before the first step is asked for."""
    return iter(_Generator(graph, prompt, max_new_tokens, temperature, top_k, seed, stop_at_end))


class _Generator:
    def __init__(
        self,
        graph: Graph,
        prompt: str | Sequence[int],
        max_new_tokens: int,
        temperature: float,
        top_k: int,
        seed: int,
        stop_at_end: bool,
    ) -> None:
        if max_new_tokens < 0:
            raise InputError(f"max_new_tokens must not be negative, and is {max_new_tokens}")
        if not (temperature >= 0 and np.isfinite(temperature)):
            raise InputError(f"temperature must be a finite number >= 0, and is {temperature}")
        if top_k < 0:
            raise InputError(f"top_k must not be negative, and is {top_k}")
        self.tokenizer = graph.companions.tokenizer
        self.prompt_tokens = _encode(graph, prompt)
        self.limit = _context_length(graph)
        if self.limit is not None and len(self.prompt_tokens) > self.limit:
            raise InputError(
                f"the prompt has {len(self.prompt_tokens)} tokens and the model's context holds {self.limit}", "shorten it"
            )
        self.logits_name = logits_output(graph)
        self.feeds = _feeds(graph)
        self.ends = _end_tokens(graph) if stop_at_end else frozenset[int]()
        self.max_new_tokens = max_new_tokens
        self.temperature, self.top_k, self.seed = temperature, top_k, seed
        self.tokens: list[int] = []
        self.reason = "length"
        self.runner: Runner = executor_for(graph).open(graph)

    def __iter__(self) -> Iterator[Step]:
        shown = ""
        while len(self.tokens) < self.max_new_tokens:
            ids = list(self.prompt_tokens) + self.tokens
            if self.limit is not None and len(ids) > self.limit:
                self.reason = "context"
                break
            token = self._pick(self._logits(np.asarray([ids], dtype=np.int64)))
            if token in self.ends:
                self.reason = "end"
                break
            self.tokens.append(token)
            text = self.text
            last = len(self.tokens) == self.max_new_tokens
            whole = last or not text.endswith("\ufffd")  # else the first bytes of a character: wait for the rest
            yield Step(token, text[len(shown) :] if whole else "")
            shown = text if whole else shown

    @property
    def text(self) -> str:
        """The continuation so far. Decoders treat a leading space unlike an inner one, so the prompt is decoded along."""
        if self.tokenizer is None:
            return " ".join(str(token) for token in self.tokens)
        start = str(self.tokenizer.decode(list(self.prompt_tokens)))
        whole = str(self.tokenizer.decode([*self.prompt_tokens, *self.tokens]))
        return whole[len(start) :] if whole.startswith(start) else str(self.tokenizer.decode(self.tokens))

    def _logits(self, ids: Array) -> Array:
        prompt = len(self.prompt_tokens)
        inputs = {name: np.asarray(_FILL[name](ids, prompt), dtype=dtype) for name, dtype in self.feeds.items()}
        logits = self.runner(inputs)[self.logits_name]
        return np.asarray(logits[0, -1], dtype=np.float64)

    def _pick(self, logits: Array) -> int:
        if not np.isfinite(logits).any() or np.isnan(logits).any():
            raise InputError("the model's logits are not numbers", "`actgraph bisect` finds the pass that broke them")
        if self.temperature == 0:
            return int(np.argmax(logits))
        order = np.argsort(-logits, kind="stable")[: self.top_k or None]
        scaled = logits[order] / self.temperature
        weights = np.exp(scaled - scaled.max())
        draw = np.random.Generator(np.random.Philox(key=[self.seed, len(self.tokens)])).random()
        place = int(np.searchsorted(np.cumsum(weights), draw * weights.sum(), side="right"))
        return int(order[min(place, len(order) - 1)])


def _feeds(graph: Graph) -> dict[str, np.dtype[Any]]:
    """The graph's inputs that generation fills in, with their dtypes."""
    feeds: dict[str, np.dtype[Any]] = {}
    for value in graph.inputs():
        if value.name in _FILL:
            feeds[value.name] = value.dtype.numpy if value.dtype is not None else np.dtype(np.int64)
        elif graph.role(value.name) is Role.USER:
            raise InputError(
                f"generation does not know what to feed input {value.name!r} of {graph.name}", f"it fills {', '.join(_FILL)}"
            )
    return feeds


def _encode(graph: Graph, prompt: str | Sequence[int]) -> tuple[int, ...]:
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


def _context_length(graph: Graph) -> int | None:
    config = graph.companions.config
    for key in ("max_position_embeddings", "n_positions", "n_ctx"):
        if isinstance(config.get(key), int):
            return int(config[key])
    return None
