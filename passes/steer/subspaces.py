"""Energy subspaces of matrices, their overlap, and projections of updates on them.

Source: Safety Subspaces are Not Distinct: A Fine-Tuning Case Study, 2025. The *energy basis* of a matrix holds its first left
singular vectors, as many as carry a share of its energy (the sum of squares); the *mode-subspace overlap* of two bases is
``|Qa^T Qb|^2 / min(ka, kb)``, between 0 (orthogonal) and 1 (one holds the other).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from actgraph.errors import InputError
from actgraph.graph.graph import Array


@dataclass(frozen=True)
class Energies:
    """A matrix ``[d, n]`` by its left singular vectors.

    vectors: ``[d, r]`` orthonormal, of each the entry of largest magnitude positive. energies: ``[r]``, squared singular
    values, descending. All float64.
    """

    vectors: Array
    energies: Array

    @property
    def size(self) -> int:
        """The dimension of the space, d."""
        return int(self.vectors.shape[0])

    def rank(self, share: float) -> int:
        """The least number of vectors that carry at least ``share`` of the energy; 0 for a matrix of zeros."""
        if not 0 < share <= 1:
            raise InputError(f"a share of the energy is {share}", "it is above 0 and at most 1")
        total = float(self.energies.sum())
        if total == 0:
            return 0
        reached = np.cumsum(self.energies) >= share * total * (1 - 1e-12)
        return int(np.argmax(reached)) + 1 if reached.any() else len(self.energies)

    def basis(self, share: float) -> Array:
        """The energy basis, ``[d, k]``."""
        return self.vectors[:, : self.rank(share)]


def energies_of(matrix: Array) -> Energies:
    """By a singular value decomposition of ``matrix [d, n]``."""
    wide = _finite(matrix)
    vectors, values, _ = np.linalg.svd(wide, full_matrices=False)
    return Energies(_signed(vectors), np.square(values))


def energies_of_gram(gram: Array) -> Energies:
    """By the Gram matrix ``X X^T [d, d]`` of a matrix that need not be held: what streams over a corpus.

    Squares lose half of the digits: directions below 1e-8 of the largest singular value are noise.
    """
    wide = _finite(gram)
    if wide.shape[0] != wide.shape[1] or not np.allclose(
        wide, wide.T, rtol=1e-6, atol=1e-12 * max(1.0, float(np.abs(wide).max()))
    ):
        raise InputError(f"a Gram matrix is symmetric, and this is {list(gram.shape)}")
    values, vectors = np.linalg.eigh((wide + wide.T) / 2)
    return Energies(_signed(vectors[:, ::-1]), np.maximum(values[::-1], 0.0))


def _finite(matrix: Array) -> Array:
    wide = np.asarray(matrix, np.float64)
    if wide.ndim != 2 or not wide.size:
        raise InputError(f"energy bases are of matrices, and this has the shape {list(wide.shape)}")
    if not np.isfinite(wide).all():
        raise InputError("a matrix with NaN or infinite numbers has no energy basis")
    return wide


def _signed(vectors: Array) -> Array:
    largest = np.abs(vectors).argmax(axis=0)
    signs = np.sign(vectors[largest, np.arange(vectors.shape[1])])
    return np.asarray(vectors * np.where(signs == 0, 1.0, signs))


def mode_overlap(a: Array, b: Array) -> float:
    """The mode-subspace overlap of two orthonormal bases ``[d, ka]`` and ``[d, kb]``; NaN where one of them is empty."""
    if a.shape[0] != b.shape[0]:
        raise InputError(f"bases of spaces of {a.shape[0]} and {b.shape[0]} dimensions have no overlap")
    smaller = min(a.shape[1], b.shape[1])
    return float(np.square(a.T @ b).sum() / smaller) if smaller else float("nan")


def random_overlap(ka: int, kb: int, d: int) -> float:
    """What the overlap of two random subspaces of ``ka`` and ``kb`` dimensions in ``d`` is on average (exactly)."""
    return max(ka, kb) / d


def random_basis(rng: np.random.Generator, d: int, k: int) -> Array:
    """A subspace drawn uniformly: ``[d, k]`` orthonormal."""
    return np.asarray(np.linalg.qr(rng.standard_normal((d, k)))[0])


@dataclass(frozen=True)
class Overlap:
    """One row of a report: the two subspaces at one place that carry ``energy``, of ``k_a`` and ``k_b`` dimensions in ``size``.

    overlap: 0 to 1. random: what it would be on average for random subspaces of these dimensions.
    """

    place: str
    energy: float
    k_a: int
    k_b: int
    size: int
    overlap: float
    random: float


def overlaps(place: str, a: Energies, b: Energies, shares: Sequence[float]) -> list[Overlap]:
    """The rows of one place."""
    rows = []
    for share in shares:
        left, right = a.basis(share), b.basis(share)
        k_a, k_b = left.shape[1], right.shape[1]
        rows.append(Overlap(place, share, k_a, k_b, a.size, mode_overlap(left, right), random_overlap(k_a, k_b, a.size)))
    return rows
