"""What folding an edit into weights leaves behind, so that it can be taken out again.

A ``FoldRecord`` is data: names, attributes and small arrays. It travels with the graph (copies, export, files of both
dialects). Weights come back bit for bit: a record holds what the change was made of (the coordinates and directions of a
low-rank change, the factors of a scaling, a vector as it was) and, of the numbers that rounding did not let come back that
way, their bits, as a difference that compresses well (a few percent of the weight where each of its numbers was changed).
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from actgraph.graph.graph import Array
from actgraph.graph.provenance import Origin
from actgraph.ops.dtypes import DType

Data = dict[str, Any]


@dataclass(frozen=True)
class WeightChange:
    """One parameter as folding changed it.

    parameter: its name now. original: what its readers read before, where that is another value (the weight was untied), and
    sha256 of its data.
    kind: ``values`` (``values`` holds it as it was), ``lowrank`` (rows along ``axis`` had ``coordinates @ directions`` added,
    ``[n, r]`` and ``[r, width]``, float64), ``scale`` (multiplied by ``factor`` along ``axis``), ``untied``, ``created``.
    digest: sha256 of the data that folding left; another one says that somebody changed it since.
    """

    parameter: str
    kind: str
    digest: str
    original: str = ""
    original_digest: str = ""
    axis: int = -1
    arrays: Mapping[str, Array] = field(default_factory=dict)

    def undone(self, data: Array) -> Array:
        """The parameter as it was before, from ``data``, which is as folding left it."""
        if self.kind == "values":
            return self.arrays["values"]
        return _repair(self._nearly(data), self.arrays.get("patch"))

    def _nearly(self, data: Array) -> Array:
        if self.kind == "lowrank":
            return add_lowrank(data, self.axis, -self.arrays["coordinates"], self.arrays["directions"])
        factor = self.arrays["factor"]
        back = np.divide(1.0, factor, out=np.zeros_like(factor), where=factor != 0)
        return scale_along(data, self.axis, back)

    def repaired(self, before: Array, after: Array) -> WeightChange:
        """This change with the bits that ``undone(after)`` lacks to be ``before``."""
        missing = _difference(before, self._nearly(after))
        return self if missing is None else replace(self, arrays={**self.arrays, "patch": missing})

    @property
    def nbytes(self) -> int:
        """How much is recorded."""
        return sum(int(array.nbytes) for array in self.arrays.values())

    def to_dict(self) -> Data:
        arrays = {name: _encode(array) for name, array in self.arrays.items()}
        return {
            "parameter": self.parameter,
            "kind": self.kind,
            "digest": self.digest,
            "original": self.original,
            "original_digest": self.original_digest,
            "axis": self.axis,
            "arrays": arrays,
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> WeightChange:
        arrays = {name: _decode(array) for name, array in data["arrays"].items()}
        return WeightChange(
            data["parameter"], data["kind"], data["digest"], data["original"], data["original_digest"], data["axis"], arrays
        )


@dataclass(frozen=True)
class FoldRecord:
    """One edit that was moved into weights.

    site, rule, condition: where it was, where it went, and why that computes the same.
    node, output, op, attributes, origin: the node that was there, and the name of its result.
    operands: the stored operands behind the activation, each a name and its data, or ``None``.
    value: the value that holds the edited activation now; empty where the edit went into ``readers``.
    readers: the weights of the linears that read the activation, and compute now what they did behind the edit.
    path: the values between the changed bias and ``value``, which hold the edit, too.
    sites: rows of the site table (see ``SiteTable.rows_on``) of the names that were lost.
    """

    site: str
    rule: str
    condition: str
    node: str
    output: str
    op: str
    attributes: Mapping[str, Any]
    origin: Origin
    operands: tuple[tuple[str, Array] | None, ...]
    changes: tuple[WeightChange, ...]
    value: str = ""
    readers: tuple[str, ...] = ()
    path: tuple[str, ...] = ()
    sites: tuple[Mapping[str, Any], ...] = ()

    @property
    def nbytes(self) -> int:
        """How much is recorded, in bytes."""
        return sum(c.nbytes for c in self.changes) + sum(int(o[1].nbytes) for o in self.operands if o is not None)

    def to_dict(self) -> Data:
        """As JSON data."""
        return {
            "site": self.site,
            "rule": self.rule,
            "condition": self.condition,
            "node": self.node,
            "output": self.output,
            "op": self.op,
            "attributes": dict(self.attributes),
            "origin": self.origin.to_dict(),
            "operands": [None if o is None else [o[0], _encode(o[1])] for o in self.operands],
            "changes": [change.to_dict() for change in self.changes],
            "value": self.value,
            "readers": list(self.readers),
            "path": list(self.path),
            "sites": [dict(row) for row in self.sites],
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> FoldRecord:
        """The record that ``to_dict`` wrote."""
        return FoldRecord(
            data["site"],
            data["rule"],
            data["condition"],
            data["node"],
            data["output"],
            data["op"],
            {key: tuple(item) if isinstance(item, list) else item for key, item in data["attributes"].items()},
            Origin.from_dict(data["origin"]),
            tuple(None if o is None else (o[0], _decode(o[1])) for o in data["operands"]),
            tuple(WeightChange.from_dict(change) for change in data["changes"]),
            data["value"],
            tuple(data["readers"]),
            tuple(data["path"]),
            tuple(data["sites"]),
        )


# --- the arithmetic of a change ---------------------------------------------------------------------------------------------


def add_lowrank(data: Array, axis: int, coordinates: Array, directions: Array) -> Array:
    """``data`` with ``coordinates @ directions`` added to its rows along ``axis``, rounded once to its type.

    Summed in float64, one direction after the other, so that every machine gets the same bits.
    """
    rows = np.moveaxis(data, axis, -1)
    total = rows.astype(np.float64).reshape(-1, directions.shape[1])
    for coordinate, direction in zip(coordinates.T, directions, strict=True):
        total += coordinate[:, None] * direction
    return np.ascontiguousarray(np.moveaxis(_rounded(total, data.dtype).reshape(rows.shape), -1, axis))


def scale_along(data: Array, axis: int, factor: Array) -> Array:
    """``data`` times ``factor`` (``[width]``, float64) along ``axis``, rounded once to its type."""
    rows = np.moveaxis(data, axis, -1).astype(np.float64) * factor
    return np.ascontiguousarray(np.moveaxis(_rounded(rows, data.dtype), -1, axis))


def _rounded(data: Array, dtype: np.dtype[Any]) -> Array:
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(data.astype(dtype))


def _bits(data: Array) -> Array:
    """The bytes of ``data`` as ``[itemsize, n]``: bytes of one significance side by side."""
    flat = np.ascontiguousarray(data).reshape(-1)
    return np.ascontiguousarray(flat.view(np.uint8).reshape(-1, flat.itemsize).T)


def _difference(wanted: Array, given: Array) -> Array | None:
    bits = _bits(wanted) ^ _bits(given)
    return np.frombuffer(zlib.compress(bits.tobytes(), 6), np.uint8) if bits.any() else None


def _repair(given: Array, difference: Array | None) -> Array:
    if difference is None:
        return given
    own = _bits(given)
    bits = own ^ np.frombuffer(zlib.decompress(difference.tobytes()), np.uint8).reshape(own.shape)
    return np.ascontiguousarray(bits.T).reshape(-1).view(given.dtype).reshape(given.shape)


def _encode(array: Array) -> Data:
    raw = zlib.compress(np.ascontiguousarray(array).tobytes(), 6)
    return {"dtype": DType.of(array.dtype).value, "shape": list(array.shape), "zlib": base64.b64encode(raw).decode()}


def _decode(data: Mapping[str, Any]) -> Array:
    raw = np.frombuffer(zlib.decompress(base64.b64decode(data["zlib"])), dtype=DType(data["dtype"]).numpy)
    return raw.reshape(data["shape"]).copy()
