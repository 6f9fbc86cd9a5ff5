"""Steering vectors on disk: a safetensors file of directions with a manifest.

Each tensor is a direction of shape ``[width]`` under the name of the site that it belongs to; the manifest (JSON in the
file's metadata) says from which model, by which method and at which token position it was extracted. A bare safetensors
file with one 1-D tensor is a steering vector too: it has no site of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from actgraph.errors import InputError
from actgraph.formats.atomic import atomic_file
from actgraph.ops.dtypes import DType
from actgraph.ops.shapes import TensorType

if TYPE_CHECKING:
    from actgraph.graph import Graph
    from actgraph.graph.graph import Value

Array = np.ndarray[Any, Any]
FORMAT = "actgraph.steering_vector/1"


@dataclass(frozen=True)
class SteeringVector:
    """Directions by site.

    directions: site name -> ``[width]`` float32 (``vector.directions["blocks.2.resid_post"]``); the name is empty for a vector
        without a site.
    model: fingerprint of the model that it was extracted from (``model_fingerprint``), empty when unknown.
    method, position: how it was extracted (``mean_difference``, ``last``).
    """

    directions: Mapping[str, Array]
    model: str = ""
    method: str = ""
    position: str = ""
    notes: Mapping[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        """One line: the sites with their widths and norms, and where the vector comes from."""
        shown = [f"{name or '(any site)'} [{len(v)}] norm {np.linalg.norm(v):.4g}" for name, v in self.directions.items()]
        more = [f"{len(shown) - 4} more"] if len(shown) > 4 else []
        how = [f"{key}={value!r}" for key, value in (("method", self.method), ("position", self.position)) if value]
        return f"SteeringVector({', '.join([*shown[:4], *more, *how])})"

    def for_site(self, names: tuple[str, ...]) -> Array:
        """The direction for a site known under ``names``; a vector without a site, or with a single one, serves any site."""
        for name in names:
            if name in self.directions:
                return self.directions[name]
        if len(self.directions) == 1:
            return next(iter(self.directions.values()))
        raise InputError(
            f"the steering vector has no direction for {names[0]}", f"it has directions for {', '.join(self.directions)}"
        )

    def save(self, path: str | Path) -> Path:
        """Write the file (beside, then renamed)."""
        from safetensors.numpy import save

        path = Path(path)
        manifest = {
            "format": FORMAT,
            "model": self.model,
            "method": self.method,
            "position": self.position,
            "notes": dict(self.notes),
        }
        tensors = {name or "vector": np.ascontiguousarray(v, np.float32) for name, v in self.directions.items()}
        with atomic_file(path) as stream:
            stream.write(save(tensors, metadata={"actgraph": json.dumps(manifest, sort_keys=True)}))
        return path


def model_fingerprint(graph: Graph) -> str:
    """A fingerprint of the model: type, sizes and sha256 of its token embeddings, such as ``f32[512,64]:116b84d59ccdfc6a``.

    The token embeddings are the largest table of rank 2 that rows are gathered from; without one it is the weight of the
    first linear layer as ``[out, in]``; empty for a model that has neither. Both dialects give the same, and edits of
    activations do not change it.
    """
    from actgraph.graph.graph import parameter_bytes
    from actgraph.graph.text import array_hash, data_hash

    tables: dict[Value, int] = {}
    for node in graph.nodes():
        prim = node.prim
        table = prim.operands[0] if prim is not None and prim.op == "gather" and prim.operands else None
        if table is not None and not isinstance(table, (int, float)) and table.is_parameter and len(table.shape or ()) == 2:
            tables[table] = parameter_bytes(table)
    if tables:
        largest = max(tables, key=lambda table: tables[table])  # the first of equal ones
        return _fingerprint(largest.type, data_hash(largest))
    for linear in graph.views.linears():
        weight = linear.read_weight()
        return _fingerprint(TensorType(DType.of(weight.dtype), weight.shape), array_hash(weight))
    return ""


def _fingerprint(kind: TensorType, digest: str) -> str:
    return f"{str(kind).replace(' ', '')}:{digest[:16]}"


def is_of_another_model(fingerprint: str, graph: Graph) -> bool:
    """Whether what has ``fingerprint`` surely comes from another model than ``graph``.

    Where the fingerprint is unknown, or the embeddings are stored in another type now, nothing can be said.
    """
    own = model_fingerprint(graph)
    (kind, colon, digest), (own_kind, _, own_digest) = fingerprint.rpartition(":"), own.rpartition(":")
    if not colon or not own:
        return False
    (dtype, _, sizes), (own_dtype, _, own_sizes) = kind.partition("["), own_kind.partition("[")
    return sizes != own_sizes or (dtype == own_dtype and digest != own_digest)


def load_vector(path: str | Path) -> SteeringVector:
    """Read a steering vector. Raises InputError for a missing, corrupt or unsuitable file."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no steering vector {path}", "make one with `actgraph extract-vector`")
    try:
        with safe_open(str(path), framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a safetensors file: {error}", "steering vectors are safetensors files") from error
    manifest = _manifest(path, metadata.get("actgraph", "{}"))
    wrong = [name for name, tensor in tensors.items() if tensor.ndim != 1]
    if wrong or not tensors:
        raise InputError(f"{path} holds no steering vector", "its tensors must be 1-D directions, named by site")
    if not all(np.isfinite(np.asarray(t, np.float32)).all() for t in tensors.values()):
        raise InputError(f"{path} holds NaN or infinite values", "extract the vector again")
    if not manifest and len(tensors) == 1:
        return SteeringVector({"": next(iter(tensors.values()))})
    directions = {("" if name == "vector" else name): t for name, t in tensors.items()}
    return SteeringVector(
        directions,
        str(manifest.get("model", "")),
        manifest.get("method", ""),
        manifest.get("position", ""),
        manifest.get("notes", {}),
    )


def _manifest(path: Path, text: str) -> dict[str, Any]:
    try:
        manifest = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"the manifest of {path} is damaged: {error.msg}", "extract the vector again") from error
    if not isinstance(manifest, dict):
        raise InputError(f"the manifest of {path} is no object", "extract the vector again")
    return manifest
