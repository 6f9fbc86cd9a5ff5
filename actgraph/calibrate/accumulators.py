"""Accumulators: what a statistic keeps while a corpus streams by.

Each is a commutative monoid (an empty state, ``update`` with rows, ``merge``): counts, bins, minima and maxima are integers or
exact selections, so any batch split gives the same bits; sums are float64 with a compensation term (Neumaier, 1974), so moments
agree within 1e-9 for any split. ``update`` takes ``x [rows, channels]`` (valid rows only) and the position of each row.
"""

from __future__ import annotations

import abc
import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np

from actgraph.errors import InputError

Array = np.ndarray[Any, Any]

#: Elements converted to float64 at a time: bounds the memory of a long batch.
_CHUNK = 1 << 20


class Layout(NamedTuple):
    """What results are kept for: everything together, or each channel, position, or both."""

    channels: bool
    positions: bool


class Accumulator(abc.ABC):
    """The state of one statistic."""

    @property
    @abc.abstractmethod
    def empty(self) -> bool:
        """Whether nothing was seen yet."""

    @abc.abstractmethod
    def update(self, x: Array, positions: Array | None) -> None:
        """Take in ``x [rows, channels]`` of any real dtype; ``positions [rows]`` where results are kept by position."""

    @abc.abstractmethod
    def merge(self, other: Self) -> Self:
        """The state after both; neither is changed."""

    @abc.abstractmethod
    def read(self) -> Array:
        """The statistic."""

    @abc.abstractmethod
    def state(self) -> dict[str, Array]:
        """All there is to save, as arrays."""

    @abc.abstractmethod
    def load(self, state: Mapping[str, Array]) -> None:
        """Become what ``state`` was taken from."""


def grouped(ufunc: np.ufunc, x: Array, positions: Array | None, layout: Layout, neutral: float | int) -> Array:
    """``ufunc`` reduced over rows (by position where kept) and over channels (unless kept)."""
    if not layout.positions:
        rows = ufunc.reduce(x, axis=0, initial=neutral) if layout.channels else ufunc.reduce(x, axis=None, initial=neutral)
        return np.asarray(rows)
    if positions is None:
        raise InputError("a statistic by position needs a sequence axis", "leave out positions")
    if not layout.channels:
        x = ufunc.reduce(x, axis=1, keepdims=True)
    length = int(positions.max()) + 1 if len(positions) else 0
    result = np.full((length, x.shape[1]), neutral, x.dtype)
    if length:
        order = np.argsort(positions, kind="stable")
        ordered = positions[order]
        starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
        result[ordered[starts]] = ufunc.reduceat(x[order], starts, axis=0)
    return result if layout.channels else result[:, 0]


def widen(array: Array, shape: tuple[int, ...], neutral: float | int) -> Array:
    """``array`` extended along its first axis (positions) with ``neutral``; an empty start takes any shape."""
    if array.shape == shape:
        return array
    if array.size == 0:
        return np.full(shape, neutral, array.dtype)
    if array.shape[1:] != shape[1:]:
        raise InputError(f"the number of channels changed from {array.shape[1:]} to {shape[1:]} between batches")
    result = np.full(shape, neutral, array.dtype)
    result[: len(array)] = array
    return result


def common(left: Array, right: Array, neutral: float | int) -> tuple[Array, Array]:
    """Both arrays widened to the shape that holds both."""
    if left.shape == right.shape:
        return left, right
    if left.size == 0 or right.size == 0:
        shape = right.shape if left.size == 0 else left.shape
    else:
        shape = (max(len(left), len(right)), *left.shape[1:]) if left.ndim and right.ndim else left.shape
    return widen(left, shape, neutral), widen(right, shape, neutral)


def chunks(x: Array, positions: Array | None) -> list[tuple[Array, Array | None]]:
    """``x`` in pieces of at most ``_CHUNK`` elements (at least one row)."""
    step = max(1, _CHUNK // max(1, x.shape[1]))
    return [(x[i : i + step], None if positions is None else positions[i : i + step]) for i in range(0, len(x), step)]


class Extreme(Accumulator):
    """Minimum, maximum, or maximum magnitude; infinite (the neutral element) at a position that no row reached."""

    def __init__(self, kind: str, layout: Layout) -> None:
        self.kind = kind
        self.layout = layout
        self.neutral = np.inf if kind == "min" else -np.inf
        self.value: Array = np.empty((0,), np.float64)

    @property
    def empty(self) -> bool:
        return self.value.size == 0

    def update(self, x: Array, positions: Array | None) -> None:
        if not x.size:
            return
        ufunc = np.minimum if self.kind == "min" else np.maximum
        data = np.abs(x) if self.kind == "absmax" else x
        neutral = self.neutral if data.dtype.kind == "f" else _integer_limit(data.dtype, self.kind)
        self._take(grouped(ufunc, data, positions, self.layout, neutral).astype(np.float64))

    def _take(self, found: Array) -> None:
        mine, theirs = common(self.value, found, self.neutral)
        self.value = np.asarray(np.minimum(mine, theirs) if self.kind == "min" else np.maximum(mine, theirs))

    def merge(self, other: Self) -> Self:
        result = copy.copy(self)
        if other.value.size:
            result._take(other.value)
        return result

    def read(self) -> Array:
        return self.value

    def state(self) -> dict[str, Array]:
        return {"value": self.value}

    def load(self, state: Mapping[str, Array]) -> None:
        self.value = state["value"]


def _integer_limit(dtype: np.dtype[Any], kind: str) -> int:
    if dtype.kind == "b":
        return int(kind == "min")
    return int(np.iinfo(dtype).max if kind == "min" else np.iinfo(dtype).min)


class Count(Accumulator):
    """How many elements were seen, or were exactly zero."""

    def __init__(self, kind: str, layout: Layout) -> None:
        self.kind = kind
        self.layout = layout
        self.value: Array = np.empty((0,), np.int64)
        self.seen = 0

    @property
    def empty(self) -> bool:
        return self.seen == 0

    def update(self, x: Array, positions: Array | None) -> None:
        if not x.size:
            return
        flags = (x == 0) if self.kind == "zeros" else np.ones(x.shape, bool)
        mine, found = common(self.value, grouped(np.add, flags.astype(np.int64), positions, self.layout, 0), 0)
        self.value = np.asarray(mine + found)
        self.seen += x.size

    def merge(self, other: Self) -> Self:
        result = copy.copy(self)
        mine, theirs = common(self.value, other.value, 0)
        result.value, result.seen = np.asarray(mine + theirs), self.seen + other.seen
        return result

    def read(self) -> Array:
        return self.value

    def state(self) -> dict[str, Array]:
        return {"value": self.value, "seen": np.asarray(self.seen, np.int64)}

    def load(self, state: Mapping[str, Array]) -> None:
        self.value, self.seen = state["value"], int(state["seen"])


@dataclass
class Sum:
    """A float64 sum with its compensation: as good as twice the precision."""

    high: Array
    low: Array

    @staticmethod
    def nothing() -> Sum:
        return Sum(np.empty((0,)), np.empty((0,)))

    def add(self, high: Array, low: Array | None = None) -> Sum:
        a, b = common(self.high, high, 0.0)
        mine, theirs = common(self.low, np.zeros_like(high) if low is None else low, 0.0)
        with np.errstate(invalid="ignore"):
            total = a + b
            error = np.where(np.abs(a) >= np.abs(b), (a - total) + b, (b - total) + a)
        return Sum(np.asarray(total), np.asarray(mine + theirs + error))

    @property
    def value(self) -> Array:
        return np.asarray(self.high + self.low)


def _finite(total: Array) -> None:
    if not np.isfinite(total).all():
        raise InputError("infinite activations have no moments", "ask for min, max or quantiles, or clip before")


class Moment(Accumulator):
    """Means of x, |x|, x*x or of row norms, and the root of the sum of x*x."""

    def __init__(self, kind: str, layout: Layout) -> None:
        self.kind = kind
        self.layout = layout
        self.sum = Sum.nothing()
        self.count: Array = np.empty((0,), np.int64)

    @property
    def empty(self) -> bool:
        return self.count.size == 0 or not self.count.any()

    def update(self, x: Array, positions: Array | None) -> None:
        if not x.size:
            return
        if self.kind == "norm":
            rows = [np.sqrt(np.square(part.astype(np.float64)).sum(1)) for part, _ in chunks(x, None)]
            x = np.concatenate(rows)[:, None]
        for part, where in chunks(x, positions):
            data = part.astype(np.float64)
            if self.kind == "absmean":
                data = np.abs(data)
            elif self.kind in ("second_moment", "l2"):
                data = np.square(data)
            found = grouped(np.add, data, where, self.layout, 0.0)
            _finite(found)
            self.sum = self.sum.add(found)
            ones = grouped(np.add, np.ones(part.shape, np.int64), where, self.layout, 0)
            mine, theirs = common(self.count, ones, 0)
            self.count = np.asarray(mine + theirs)

    def merge(self, other: Self) -> Self:
        result = copy.copy(self)
        result.sum = self.sum.add(other.sum.high, other.sum.low)
        mine, theirs = common(self.count, other.count, 0)
        result.count = np.asarray(mine + theirs)
        return result

    def read(self) -> Array:
        """The statistic; NaN at a position that no row reached."""
        if self.kind == "l2":
            return np.asarray(np.sqrt(self.sum.value))
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(self.sum.value / self.count)

    def state(self) -> dict[str, Array]:
        return {"high": self.sum.high, "low": self.sum.low, "count": self.count}

    def load(self, state: Mapping[str, Array]) -> None:
        self.sum, self.count = Sum(state["high"], state["low"]), state["count"]


class Gram(Accumulator):
    """The sum over rows of ``x x^T``, float64, exactly symmetric."""

    def __init__(self) -> None:
        self.sum = Sum.nothing()
        self.rows = 0

    @property
    def empty(self) -> bool:
        return self.rows == 0

    def update(self, x: Array, positions: Array | None) -> None:
        for part, _ in chunks(x, None):
            data = part.astype(np.float64)
            found = data.T @ data
            _finite(found)
            self.sum = self.sum.add((found + found.T) / 2)
        self.rows += len(x)

    def merge(self, other: Self) -> Self:
        result = copy.copy(self)
        result.sum, result.rows = self.sum.add(other.sum.high, other.sum.low), self.rows + other.rows
        return result

    def read(self) -> Array:
        return self.sum.value

    def state(self) -> dict[str, Array]:
        return {"high": self.sum.high, "low": self.sum.low, "rows": np.asarray(self.rows, np.int64)}

    def load(self, state: Mapping[str, Array]) -> None:
        self.sum, self.rows = Sum(state["high"], state["low"]), int(state["rows"])


class Histogram(Accumulator):
    """Counts in equal bins of ``[low, high)``.

    ``counts [..., bins + 2]``: first what lies below ``low``, last what is at or above ``high``; leading axes by layout.
    """

    def __init__(self, layout: Layout, low: float, high: float, bins: int) -> None:
        self.layout = layout
        self.edges: Array = np.linspace(low, high, bins + 1)
        self.counts: Array = np.empty((0,), np.int64)

    @property
    def empty(self) -> bool:
        return self.counts.size == 0 or not self.counts.any()

    def update(self, x: Array, positions: Array | None) -> None:
        if not x.size:
            return
        slots = len(self.edges) + 1
        index = np.searchsorted(self.edges, x.ravel(), side="right")
        groups, shape = group_index(x, positions, self.layout)
        counted = np.bincount(groups * slots + index, minlength=int(np.prod(shape)) * slots).astype(np.int64)
        mine, found = common(self.counts, counted.reshape((*shape, slots)), 0)
        self.counts = mine + found

    def merge(self, other: Self) -> Self:
        if not np.array_equal(self.edges, other.edges):
            raise InputError("histograms with different bins cannot merge")
        result = copy.copy(self)
        mine, theirs = common(self.counts, other.counts, 0)
        result.counts = mine + theirs
        return result

    def read(self) -> Array:
        return self.counts

    def state(self) -> dict[str, Array]:
        return {"counts": self.counts}

    def load(self, state: Mapping[str, Array]) -> None:
        self.counts = state["counts"]


def group_index(x: Array, positions: Array | None, layout: Layout) -> tuple[Array, tuple[int, ...]]:
    """The group of each element of ``x [rows, channels]``, flattened, and the shape of all groups."""
    rows, channels = x.shape
    groups = np.zeros((rows, channels), np.int64)
    shape: tuple[int, ...] = ()
    if layout.positions:
        if positions is None:
            raise InputError("a statistic by position needs a sequence axis", "leave out positions")
        groups += positions[:, None]
        shape = (int(positions.max()) + 1 if rows else 0,)
    if layout.channels:
        groups = groups * channels + np.arange(channels)
        shape = (*shape, channels)
    return groups.ravel(), shape
