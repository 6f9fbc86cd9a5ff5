"""A quantile sketch made of integer counts in fixed bins.

The bins are equal steps of the float's own exponent and leading mantissa bits (``2**resolution`` per octave), so the bin of a
number never depends on the data, the order or the batch split: sketches of parts add up to exactly the sketch of the whole.
This is the bin layout of DDSketch (2019) with piecewise-linear instead of logarithmic interpolation of octaves; quantiles are
within ``2**-resolution`` of the true order statistic, relative. Magnitudes below 2**-40 count as zero.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Self

import numpy as np

from actgraph.calibrate.accumulators import Accumulator, Extreme, Layout, chunks, group_index
from actgraph.errors import InputError

Array = np.ndarray[Any, Any]

_LOWEST = -40  # exponents: smaller magnitudes count as zero,
_HIGHEST = 40  # and larger ones fall into the last bin
#: Above this many cells a batch is counted by sorting instead of by a table of all cells.
_TABLE = 1 << 22


class QuantileSketch(Accumulator):
    """Sparse counts: ``keys`` (group and bin in one number, sorted) and how many elements fell into each."""

    def __init__(self, layout: Layout, resolution: int = 8, *, absolute: bool = False) -> None:
        self.layout = layout
        self.resolution = resolution
        self.absolute = absolute
        self.keys: Array = np.empty((0,), np.int64)
        self.counts: Array = np.empty((0,), np.int64)
        self.low = Extreme("min", layout)
        self.high = Extreme("max", layout)

    @property
    def _half(self) -> int:
        """Bins on either side of zero."""
        return ((_HIGHEST - _LOWEST) << self.resolution) + 1

    @property
    def _span(self) -> int:
        return 2 * self._half + 1

    @property
    def empty(self) -> bool:
        return self.keys.size == 0

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one quantile: ``[]``, ``[channels]``, ``[positions]`` or ``[positions, channels]``."""
        return self.low.value.shape if self.low.value.size else ()

    def update(self, x: Array, positions: Array | None) -> None:
        if not x.size:
            return
        if self.absolute:
            x = np.abs(x)
        self.low.update(x, positions)
        self.high.update(x, positions)
        channels = x.shape[1]
        for part, where in chunks(x, positions):
            groups, shape = group_index(part, where, self.layout)
            self._add(*_count(groups * self._span + self._bin(part).ravel() + self._half, int(np.prod(shape)) * self._span))
        if self.layout.channels and self.shape[-1] != channels:
            raise InputError("the number of channels changed between batches")

    def _bin(self, x: Array) -> Array:
        """The signed bin of each element: 0 for zero, growing with the value."""
        if x.dtype == np.float64 or (x.dtype.kind != "f" and x.dtype.itemsize > 2):
            bits = np.abs(x.astype(np.float64)).view(np.int64)
            magnitude = (bits >> (52 - self.resolution)) - ((1023 + _LOWEST) << self.resolution) + 1
        else:
            bits = np.abs(x.astype(np.float32)).view(np.int32)
            magnitude = ((bits >> (23 - self.resolution)) - ((127 + _LOWEST) << self.resolution) + 1).astype(np.int64)
        np.clip(magnitude, 0, self._half, out=magnitude)
        return magnitude if self.absolute else np.where(np.signbit(x.astype(np.float64)), -magnitude, magnitude)

    def _add(self, keys: Array, counts: Array) -> None:
        if not self.keys.size:
            self.keys, self.counts = keys, counts
            return
        merged, inverse = np.unique(np.concatenate([self.keys, keys]), return_inverse=True)
        total = np.zeros(len(merged), np.int64)
        np.add.at(total, inverse, np.concatenate([self.counts, counts]))
        self.keys, self.counts = merged, total

    def merge(self, other: Self) -> Self:
        if (self.resolution, self.absolute, self.layout) != (other.resolution, other.absolute, other.layout):
            raise InputError("sketches of different kinds cannot merge")
        result = copy.copy(self)
        result.low, result.high = self.low.merge(other.low), self.high.merge(other.high)
        if other.keys.size:
            result._add(other.keys, other.counts)
        return result

    def quantile(self, q: float | Array) -> Array:
        """The ``q`` quantile (0 to 1) of each group: ``[*q.shape, *self.shape]`` float64; NaN where nothing was seen.

        The order statistic of rank ``q * n`` is found in its bin, and placed inside it as if the bin were filled evenly;
        0 and 1 give the exact minimum and maximum. Raises InputError when ``q`` is outside of 0 to 1.
        """
        wanted = np.asarray(q, np.float64)
        if np.isnan(wanted).any() or (wanted < 0).any() or (wanted > 1).any():
            raise InputError(f"the quantile {q} is outside of 0 to 1", "percentiles are given as 0.99, not 99")
        result = np.full((wanted.size, max(1, int(np.prod(self.shape)))), np.nan)
        low, high = self.low.value.reshape(-1), self.high.value.reshape(-1)
        for group, bins, counts in self._groups():
            above = np.cumsum(counts)
            rank = wanted.ravel() * above[-1]
            at = np.minimum(np.searchsorted(above, rank, side="left"), len(bins) - 1)
            share = (rank - (above[at] - counts[at])) / counts[at]
            left, right = self._edges(bins[at])
            left, right = np.maximum(left, low[group]), np.minimum(right, high[group])
            with np.errstate(invalid="ignore"):
                value = np.where(left == right, left, left + share * (right - left))
            value = np.where(wanted.ravel() == 0, low[group], np.where(wanted.ravel() == 1, high[group], value))
            result[:, group] = np.clip(value, low[group], high[group])
        return result.reshape((*wanted.shape, *self.shape))

    def cdf(self, x: float | Array) -> Array:
        """The share of elements that are <= ``x`` (broadcast over groups), float64, shaped like the sketch."""
        at = np.broadcast_to(np.asarray(x, np.float64), self.shape).reshape(-1)
        result = np.full(max(1, int(np.prod(self.shape))), np.nan)
        low, high = self.low.value.reshape(-1), self.high.value.reshape(-1)
        for group, bins, counts in self._groups():
            left, right = self._edges(bins)
            left, right = np.maximum(left, low[group]), np.minimum(right, high[group])
            point = at[group] if at.size > 1 else at[0]
            width = np.where(right > left, right - left, 1.0)
            with np.errstate(invalid="ignore"):  # an infinite bin is either below the point or not
                share = np.where(right <= point, 1.0, np.nan_to_num(np.clip((point - left) / width, 0.0, 1.0)))
            result[group] = float((counts * share).sum() / counts.sum())
        return result.reshape(self.shape)

    def histogram(self, edges: Array) -> Array:
        """Expected counts between ``edges``, ``[*shape, len(edges) - 1]`` float64 (a bin that an edge cuts is shared)."""
        total = self.count
        shares = np.stack([self.cdf(edge) for edge in np.asarray(edges, np.float64)], axis=-1)
        return np.asarray(np.diff(shares, axis=-1) * total[..., None])

    @property
    def count(self) -> Array:
        """How many elements each group saw, int64."""
        result = np.zeros(max(1, int(np.prod(self.shape))), np.int64)
        for group, _, counts in self._groups():
            result[group] = counts.sum()
        return result.reshape(self.shape)

    def _groups(self) -> list[tuple[int, Array, Array]]:
        """``(group, bins, counts)`` of each group that saw something."""
        groups, bins = self.keys // self._span, self.keys % self._span - self._half
        starts = np.flatnonzero(np.r_[True, groups[1:] != groups[:-1]]) if len(groups) else np.empty(0, np.int64)
        ends = np.r_[starts[1:], len(groups)]
        return [(int(groups[a]), bins[a:b], self.counts[a:b]) for a, b in zip(starts, ends, strict=True)]

    def _edges(self, bins: Array) -> tuple[Array, Array]:
        """Lower and upper bound of each bin's values."""
        near, far = self._magnitude(np.abs(bins)), self._magnitude(np.abs(bins) + 1)
        negative, zero = bins < 0, bins == 0
        low = np.where(zero, 0.0, np.where(negative, -far, near))
        high = np.where(zero, 0.0, np.where(negative, -near, far))
        return low, high

    def _magnitude(self, index: Array) -> Array:
        """The lower edge of magnitude bin ``index`` (1 is the first above zero); infinity past the last."""
        bits = (index.astype(np.int64) - 1 + ((1023 + _LOWEST) << self.resolution)) << (52 - self.resolution)
        return np.where(index > self._half, np.inf, bits.view(np.float64))

    def read(self) -> Array:
        return self.quantile(0.5)

    def state(self) -> dict[str, Array]:
        return {"keys": self.keys, "counts": self.counts, "low": self.low.value, "high": self.high.value}

    def load(self, state: Mapping[str, Array]) -> None:
        self.keys, self.counts = state["keys"], state["counts"]
        self.low.value, self.high.value = state["low"], state["high"]


def _count(keys: Array, cells: int) -> tuple[Array, Array]:
    """Sorted distinct keys and their counts."""
    if cells <= _TABLE:
        table = np.bincount(keys, minlength=1)
        found = np.flatnonzero(table)
        return found.astype(np.int64), table[found].astype(np.int64)
    found, counts = np.unique(keys, return_counts=True)
    return found, counts.astype(np.int64)
