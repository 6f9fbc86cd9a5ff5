"""Clusters of embeddings: k-means with a fixed seed, and how many by the silhouette."""

from __future__ import annotations

from typing import Any

import numpy as np

from actgraph.errors import InputError

Array = np.ndarray[Any, Any]


def normalised(rows: Array) -> Array:
    """Each row of ``[n, e]`` at unit length, float64. Raises InputError for a row of zeros or NaN."""
    wide = np.asarray(rows, np.float64)
    if wide.ndim != 2:
        raise InputError(f"embeddings have the shape {list(wide.shape)}", "embeddings are [texts, size]")
    sizes = np.linalg.norm(wide, axis=1, keepdims=True)
    if not np.isfinite(sizes).all() or (sizes == 0).any():
        raise InputError("an embedding is zero or no number", "embeddings are [texts, size], each of some length")
    return np.asarray(wide / sizes)


def k_means(rows: Array, count: int, seed: int = 0, steps: int = 100) -> Array:
    """The cluster of each row ``[n]``, 0 to ``count - 1`` in order of their first rows (k-means++, Lloyd's iterations)."""
    random = np.random.default_rng(seed)
    centres = [rows[int(random.integers(len(rows)))]]
    while len(centres) < count:
        distance = np.min([((rows - centre) ** 2).sum(1) for centre in centres], axis=0)
        chances = distance / distance.sum() if distance.sum() > 0 else np.full(len(rows), 1 / len(rows))
        centres.append(rows[int(random.choice(len(rows), p=chances))])
    labels = np.zeros(len(rows), np.int64)
    for step in range(steps):
        distance = np.stack([((rows - centre) ** 2).sum(1) for centre in centres], 1)
        nearest = distance.argmin(1)
        if step and np.array_equal(nearest, labels):
            break
        labels = nearest
        centres = [rows[labels == k].mean(0) if (labels == k).any() else rows[distance.min(1).argmax()] for k in range(count)]
    order = {old: new for new, old in enumerate(dict.fromkeys(labels.tolist()))}
    return np.array([order[label] for label in labels.tolist()])


def silhouette(rows: Array, labels: Array) -> float:
    """The mean over rows of ``(b - a) / max(a, b)``: the mean distance to the own cluster's other rows, and to the next
    one's.
    """
    distance = np.sqrt(np.maximum(((rows[:, None] - rows[None]) ** 2).sum(-1), 0))
    found = []
    for row, label in enumerate(labels):
        own = labels == label
        if own.sum() == 1:
            found.append(0.0)
            continue
        a = distance[row, own].sum() / (own.sum() - 1)
        b = min(distance[row, labels == other].mean() for other in np.unique(labels) if other != label)
        found.append((b - a) / max(a, b) if max(a, b) > 0 else 0.0)
    return float(np.mean(found))


def best_clusters(rows: Array, count: int | None = None, seed: int = 0, most: int = 20) -> Array:
    """Labels of ``count`` clusters, or of as many (2 to ``most``) as have the best silhouette (the fewest of equal ones)."""
    if count is not None:
        if not 1 <= count <= len(rows):
            raise InputError(f"{count} clusters of {len(rows)} texts", "there is at least one text in a cluster")
        return k_means(rows, count, seed)
    tried = [k_means(rows, k, seed) for k in range(2, min(most, len(rows) - 1) + 1)]
    tried = [labels for labels in tried if labels.max() > 0]
    if not tried:
        return np.zeros(len(rows), np.int64)
    return max(tried, key=lambda labels: silhouette(rows, labels))  # max takes the first of equal ones
