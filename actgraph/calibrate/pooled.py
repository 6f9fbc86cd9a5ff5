"""One vector for each document: the mean over the tokens that count."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np

from actgraph.calibrate.accumulators import Accumulator
from actgraph.errors import InputError

Array = np.ndarray[Any, Any]


def pooled(site: str, x: Array, rows: Array, indices: Sequence[int]) -> tuple[Array, Array]:
    """The means of ``x [n, channels]`` over each row of the batch (``rows [n]``) as float64, and the documents' places.

    indices: the document of each row; further rows only fill a batch. Raises InputError for a document without a row of ``x``.
    """
    counts = np.bincount(rows, minlength=len(indices))[: len(indices)]
    if not counts.all():
        document = indices[int(np.argmin(counts))]
        raise InputError(
            f"no token of document {document} (from 0) counts at {site}",
            "widen where (all tokens of a plain text are prompt: give prompts and responses), or leave the document out",
        )
    sums = np.zeros((max(len(indices), int(rows.max()) + 1), x.shape[1]))
    np.add.at(sums, rows, x.astype(np.float64))
    return sums[: len(indices)] / counts[:, None], np.asarray(indices, np.int64)


class Rows(Accumulator):
    """The vectors themselves, ``[documents, channels]`` float32, in the order of the corpus."""

    def __init__(self) -> None:
        self._parts: list[Array] = []
        self._places: list[Array] = []

    @property
    def empty(self) -> bool:
        return not self._parts

    def update(self, x: Array, positions: Array | None) -> None:
        """``positions``: the place of each row in the corpus."""
        assert positions is not None
        self._parts.append(np.asarray(x, np.float32))
        self._places.append(positions)

    def merge(self, other: Self) -> Self:
        """The rows of ``other`` stand behind all of this one."""
        result = copy.copy(self)
        behind = 1 + max((int(places.max()) for places in self._places if len(places)), default=-1)
        result._parts = self._parts + other._parts
        result._places = self._places + [places + behind for places in other._places]
        return result

    def read(self) -> Array:
        return np.concatenate(self._parts)[np.argsort(np.concatenate(self._places), kind="stable")]

    def state(self) -> dict[str, Array]:
        if self.empty:
            return {}
        return {"rows": self.read(), "places": np.sort(np.concatenate(self._places))}

    def load(self, state: Mapping[str, Array]) -> None:
        self._parts, self._places = ([state["rows"]], [state["places"]]) if "rows" in state else ([], [])
