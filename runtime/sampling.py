"""Choosing the next token from logits."""

from __future__ import annotations

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

    def pick(self, logits: Array, number: int, row: int = 0) -> int:
        """The token ``number`` of ``row`` (both from 0). logits: [vocabulary]. Raises InputError where they are NaN."""
        logits = np.asarray(logits, np.float64)
        if not np.isfinite(logits).any() or np.isnan(logits).any():
            raise InputError("the model's logits are not numbers", "`actgraph bisect` finds the pass that broke them")
        if self.temperature == 0:
            return int(np.argmax(logits))
        order = np.argsort(-logits, kind="stable")[: self.top_k or None]
        scaled = logits[order] / self.temperature
        weights = np.exp(scaled - scaled.max())
        if self.top_p < 1:
            before = np.cumsum(weights) - weights
            kept = int((before < self.top_p * weights.sum()).sum())
            order, weights = order[:kept], weights[:kept]
        draw = np.random.Generator(np.random.Philox(key=[self.seed, (row << 32) + number])).random()
        place = int(np.searchsorted(np.cumsum(weights), draw * weights.sum(), side="right"))
        return int(order[min(place, len(order) - 1)])
