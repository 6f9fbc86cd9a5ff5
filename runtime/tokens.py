"""The tokens of a session: which there are, which of them are padding, and what a graph wants to be told about them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from actgraph.graph.graph import Array


class Tokens:
    """All tokens of ``batch`` rows so far, in memory that grows by doubling."""

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.length = 0
        self._ids: Array = np.zeros((batch, 64), np.int64)
        self._valid: Array = np.zeros((batch, 64), np.int64)
        self.padded = False
        self.prompt: Array | None = None  # tokens of each prompt, once it is known
        self.prompt_places = 0  # of the longest, with its padding

    def add(self, ids: Array, valid: Array | None) -> None:
        """Add new tokens [batch, n]; valid: 0 for padding, all 1 where it is ``None``."""
        first, last = self.length, self.length + ids.shape[1]
        if last > self._ids.shape[1]:
            room = np.zeros((self.batch, max(last, 2 * self._ids.shape[1]) - self._ids.shape[1]), np.int64)
            self._ids, self._valid = np.concatenate([self._ids, room], axis=1), np.concatenate([self._valid, room], axis=1)
        self._ids[:, first:last] = ids
        self._valid[:, first:last] = 1 if valid is None else valid
        self.padded = self.padded or (valid is not None and not valid.all())
        self.length = last

    def end_prompt(self, more: int, valid: Array | None) -> None:
        """The ``more`` tokens that come next are the last of the prompt."""
        new = np.full(self.batch, more) if valid is None else valid.sum(axis=1)
        self.prompt = self._valid[:, : self.length].sum(axis=1) + new
        self.prompt_places = self.length + more

    def feed(self, first: int, wanted: Mapping[str, np.dtype[Any]]) -> dict[str, Array]:
        """The inputs ``wanted`` (of ``FILLED``) in these types, for a call that computes the tokens from ``first`` on."""
        view = _View(self, first)
        return {name: _MAKERS[name](view).astype(dtype, copy=False) for name, dtype in wanted.items()}


class _View:
    """What a call is told: ``valid`` is about all tokens, the rest about those from ``first`` on."""

    def __init__(self, tokens: Tokens, first: int) -> None:
        self.tokens, self.first, self.last = tokens, first, tokens.length

    def ids(self) -> Array:
        return np.ascontiguousarray(self.tokens._ids[:, self.first : self.last])

    def attention_mask(self) -> Array:
        return np.ascontiguousarray(self.tokens._valid[:, : self.last])

    def valid(self) -> Array:
        return np.ascontiguousarray(self.tokens._valid[:, self.first : self.last])

    def places(self) -> Array:
        """Positions among the tokens of each row that are no padding."""
        tokens = self.tokens
        if not tokens.padded:
            counted = np.arange(self.first, self.last, dtype=np.int64)[None]
            return counted if tokens.batch == 1 else np.repeat(counted, tokens.batch, axis=0)
        places: Array = np.maximum(np.cumsum(tokens._valid[:, : self.last], axis=1) - 1, 0)[:, self.first :]
        return places

    def prompt_lengths(self) -> Array:
        lengths: Array | None = self.tokens.prompt
        assert lengths is not None
        return lengths

    def step(self) -> Array:
        """How many tokens have been generated when the call is made."""
        return np.array([max(0, self.last - self.tokens.prompt_places)], np.int64)


_MAKERS: dict[str, Callable[[_View], Array]] = {
    "input_ids": _View.ids,
    "attention_mask": _View.attention_mask,
    "position_ids": _View.places,
    "token_type_ids": lambda view: np.zeros((view.tokens.batch, view.last - view.first), np.int64),
    "cache_position": lambda view: np.array([view.first], np.int64),
    "positions": _View.places,
    "valid_tokens": _View.valid,
    "prompt_lengths": _View.prompt_lengths,
    "row_index": lambda view: np.arange(view.tokens.batch),
    "step": _View.step,
}
#: What a session can fill in.
FILLED = frozenset(_MAKERS)
