"""Choosing the next token from logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from actgraph.errors import InputError
from actgraph.graph.graph import Array


@dataclass(frozen=True)
class Sampling:
    """temperature: 0 takes the most likely token; above, tokens are drawn from ``softmax(logits / temperature)``.

    top_k: draw among the k most likely tokens only; 0 means all. top_p: draw among the most likely tokens that together have at
    least this probability (The Curious Case of Neural Text Degeneration, 2019); 1 means all; applied after top_k.
    seed: the draw of token n of row r depends on ``(seed, r, n)`` and the probabilities alone.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and np.isfinite(self.temperature)):
            raise InputError(f"temperature must be a finite number >= 0, and is {self.temperature}")
        if self.top_k < 0:
            raise InputError(f"top_k must not be negative, and is {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be above 0 and at most 1, and is {self.top_p}")
        if not 0 <= self.seed < 1 << 64:
            raise InputError(f"seed must be from 0 to 2**64 - 1, and is {self.seed}")

    def pick(self, logits: Array, number: int, row: int = 0) -> int:
        """The token ``number`` of ``row`` (both from 0). logits: [vocabulary]. Raises InputError where they are NaN."""
        best = int(np.argmax(logits))  # the first NaN, where there is one
        if not math.isfinite(logits[best]):
            raise InputError("the model's logits are not numbers", "`actgraph bisect` finds the pass that broke them")
        if self.temperature == 0:
            return best
        scores = (np.asarray(logits, np.float64) - float(logits[best])) / self.temperature
        draw = self._draw(number, row)
        if self.top_k and self.top_k < len(scores):
            order = _largest(scores, self.top_k)
            return self._choose(order, np.exp(scores[order]), draw)
        weights = np.exp(scores)
        total = weights.sum()
        # Tokens count from the most likely one, and what is drawn is nearly always among few: those above a bound are enough
        # as soon as they hold the draw.
        for width in (6.0, 14.0):
            order = _sorted(scores, np.flatnonzero(scores >= -width))
            most = weights[order]
            if most.sum() > total * (self.top_p if self.top_p < 1 else draw):
                return self._choose(order, most, draw, total)
        order = _sorted(scores, np.arange(len(scores)))
        return self._choose(order, weights[order], draw, total)

    def _choose(self, order: Array, weights: Array, draw: float, total: float | None = None) -> int:
        """The token of ``order`` (most likely first, at least as many as can be drawn) at ``draw``, a number from 0 to 1."""
        summed = np.cumsum(weights)
        total = float(summed[-1]) if total is None else total
        if self.top_p < 1:
            kept = int(((summed - weights) < self.top_p * total).sum())
            order, summed = order[:kept], summed[:kept]
            total = float(summed[-1])
        place = int(np.searchsorted(summed, draw * total, side="right"))
        return int(order[min(place, len(order) - 1)])

    def _draw(self, number: int, row: int) -> float:
        key = np.asarray([self.seed, (row << 32) + number], np.uint64)
        return float(np.random.Generator(np.random.Philox(key=key)).random())


def _largest(scores: Array, count: int) -> Array:
    """The indices of the ``count`` largest scores, largest first; of equal ones those that stand first."""
    bound = np.partition(scores, len(scores) - count)[len(scores) - count]
    above = np.flatnonzero(scores > bound)
    equal = np.flatnonzero(scores == bound)[: count - len(above)]
    return _sorted(scores, np.sort(np.concatenate([above, equal])))


def _sorted(scores: Array, indices: Array) -> Array:
    """Ascending ``indices`` by falling score; of equal ones in their order."""
    result: Array = indices[np.argsort(-scores[indices], kind="stable")]
    return result
