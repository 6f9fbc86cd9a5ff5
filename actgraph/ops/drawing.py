"""Operands for the conformance grid: how a ``Sample`` draws its numpy arrays.

``draws(normal, boolean, None)`` gives the drawing rule of a sample whose operands are drawn by these functions; each takes
``(rng, shape, dtype)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from actgraph.ops.dtypes import DType

Array = np.ndarray[Any, Any]
Rule = Callable[[np.random.Generator, tuple[int, ...], DType], Array]


def draws(*rules: Rule | None) -> Callable[..., tuple[Any, ...]]:
    """The ``draw`` of a sample: one rule per operand."""

    def draw(rng: np.random.Generator, shapes: Sequence[tuple[int, ...] | None], dtype: DType) -> tuple[Any, ...]:
        return tuple(
            None if shape is None or rule is None else rule(rng, shape, dtype)
            for rule, shape in zip(rules, shapes, strict=True)
        )

    return draw


def normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: DType) -> Array:
    """Standard normal numbers of ``dtype``."""
    return rng.standard_normal(shape).astype(dtype.numpy)


def special(rng: np.random.Generator, shape: tuple[int, ...], dtype: DType) -> Array:
    """Normal numbers among which NaN, both infinities, both zeros and a subnormal-free tiny number are strewn."""
    values = rng.standard_normal(shape)
    flat = values.reshape(-1)
    for place, value in enumerate((math.nan, math.inf, -math.inf, -0.0, 0.0, 1e-4)):
        flat[place :: 7 + place] = value
    return values.astype(dtype.numpy)


def extreme(rng: np.random.Generator, shape: tuple[int, ...], dtype: DType) -> Array:
    """Normal numbers among which large ones and both zeros are strewn: what a quantizer saturates and must keep."""
    values = special(rng, shape, dtype).astype(np.float64)
    return np.nan_to_num(values, nan=3e4, posinf=6e4, neginf=-6e4).astype(dtype.numpy)


def grid(rng: np.random.Generator, shape: tuple[int, ...], dtype: DType) -> Array:
    """Multiples of a quarter in [-2, 2]: exact in every type, with many ties and values that lie on thresholds."""
    return (rng.integers(-8, 9, shape) / 4).astype(dtype.numpy)


def nan_vector(rng: np.random.Generator, shape: tuple[int, ...], dtype: DType) -> Array:
    """A vector of NaN and infinity, for settings that must not look at it."""
    return np.where(np.arange(int(np.prod(shape))).reshape(shape) % 2, math.nan, math.inf).astype(dtype.numpy)


def zeros(rng: np.random.Generator, shape: tuple[int, ...], dtype: DType) -> Array:
    return np.zeros(shape, dtype.numpy)


def boolean(rng: np.random.Generator, shape: tuple[int, ...], dtype: DType) -> Array:
    """A mask of both values (where it has two places)."""
    mask = rng.random(shape) < 0.5
    if mask.size > 1:
        mask.reshape(-1)[:2] = (True, False)
    return mask


def fraction(rng: np.random.Generator, shape: tuple[int, ...], dtype: DType) -> Array:
    """A float mask: 0, 1 and fractions."""
    return rng.choice(np.array([0.0, 0.25, 1.0]), shape).astype(dtype.numpy)


def positive(rng: np.random.Generator, shape: tuple[int, ...], dtype: DType) -> Array:
    """Numbers in [0.25, 1.25), as thresholds want them."""
    return (rng.random(shape) + 0.25).astype(dtype.numpy)


def scales(rng: np.random.Generator, shape: tuple[int, ...], dtype: DType) -> Array:
    """Quantization scales that make normal numbers use many codes and saturate some; always float32."""
    return (rng.random(shape) * 0.02 + 0.01).astype(np.float32)


def orthonormal(rng: np.random.Generator, shape: tuple[int, ...], dtype: DType) -> Array:
    """A matrix with orthonormal columns."""
    return np.linalg.qr(rng.standard_normal(shape))[0].astype(dtype.numpy)


def integers(low: int, high: int, kind: DType) -> Rule:
    """Integers of ``kind`` in [low, high)."""

    def rule(rng: np.random.Generator, shape: tuple[int, ...], dtype: DType) -> Array:
        return rng.integers(low, high, shape).astype(kind.numpy)

    return rule


def offsets(rows: int, kind: DType = DType.I32) -> Rule:
    """Ascending row offsets that end at ``rows``; the second expert gets none."""

    def rule(rng: np.random.Generator, shape: tuple[int, ...], dtype: DType) -> Array:
        ends = np.sort(rng.integers(0, rows + 1, shape))
        ends[-1] = rows
        if len(ends) > 2:
            ends[1] = ends[0]
        return ends.astype(kind.numpy)

    return rule
