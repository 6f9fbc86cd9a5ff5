"""The direction of a linear probe that tells the two sets apart.

Source: standard practice (logistic regression on standardised activations). The probe's weights live in standardised space:
they are divided by the standard deviations, which makes a direction of raw activations (*Do LLMs Know What Is Private
Internally?*, 2026, does so).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from actgraph.passes.steer.caa import mean_difference
from actgraph.passes.steer.pca import towards

Array = np.ndarray[Any, Any]


def standardised(rows: Array) -> tuple[Array, Array, Array]:
    """``(rows - mean) / deviation`` in float64 with mean and deviation by channel (1 where a channel does not vary)."""
    wide = rows.astype(np.float64)
    mean, deviation = wide.mean(0), wide.std(0)
    deviation = np.where(deviation == 0, 1.0, deviation)
    return (wide - mean) / deviation, mean, deviation


def fit(rows: Array, labels: Array, *, strength: float = 1.0, steps: int = 50) -> tuple[Array, float]:
    """Weights ``[width]`` and bias that minimise ``strength * sum log(1 + exp(-y f)) + |w|^2 / 2`` by Newton's method.

    rows: ``[n, width]`` float64; labels: ``[n]`` bool. The bias is not penalised. Solved among combinations of the rows, so the
    width may be far larger than n.
    """
    left, sizes, right = np.linalg.svd(rows, full_matrices=False)
    rank = int((sizes > sizes[0] * 1e-12).sum()) if len(sizes) else 0
    features = np.concatenate([left[:, :rank] * sizes[:rank], np.ones((len(rows), 1))], 1)
    penalty = np.append(np.ones(rank), 0.0)
    weights, target = np.zeros(rank + 1), labels.astype(np.float64)

    def loss(candidate: Array) -> float:
        score = features @ candidate
        return float(strength * (np.logaddexp(0, score) - target * score).sum() + (penalty * candidate**2).sum() / 2)

    for _ in range(steps):
        chance = 1 / (1 + np.exp(-np.clip(features @ weights, -500, 500)))
        gradient = strength * features.T @ (chance - target) + penalty * weights
        curvature = strength * (features * (chance * (1 - chance))[:, None]).T @ features + np.diag(penalty + 1e-10)
        step = np.linalg.solve(curvature, gradient)
        size, before = 1.0, loss(weights)
        while size > 1e-8 and loss(weights - size * step) > before:
            size /= 2
        weights = weights - size * step
        if np.abs(size * step).max() < 1e-9:
            break
    return right[:rank].T @ weights[:rank], float(weights[rank])


def logistic(positive: Array, negative: Array) -> Array:
    """The probe's direction ``[width]`` in raw activations, turned and scaled to the difference of means."""
    rows, _, deviation = standardised(np.concatenate([positive, negative]))
    labels = np.arange(len(rows)) < len(positive)
    weights, _ = fit(rows, labels)
    return towards(weights / deviation, mean_difference(positive, negative))
