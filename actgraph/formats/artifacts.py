"""What an analysis found, on disk: named arrays and a manifest in one safetensors file.

A kind (``kif_signature``, ``guardit_clusters`` ...) says what the file is for, so that a pass given another one says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from actgraph.errors import InputError
from actgraph.formats.atomic import atomic_file

Array = np.ndarray[Any, Any]
_KEY, _PREFIX = "actgraph.artifact", "actgraph."


@dataclass(frozen=True)
class Artifact:
    """arrays: by name. notes: numbers, texts and lists that JSON holds. model: the fingerprint of the model, empty: unknown."""

    kind: str
    arrays: Mapping[str, Array]
    notes: Mapping[str, Any] = field(default_factory=dict)
    model: str = ""

    def save(self, path: str | Path) -> Path:
        """Write the file (beside, then renamed)."""
        from safetensors.numpy import save

        path = Path(path)
        manifest = {"format": f"{_PREFIX}{self.kind}/1", "model": self.model, "notes": dict(self.notes)}
        tensors = {name: np.ascontiguousarray(array).reshape(np.shape(array)) for name, array in self.arrays.items()}
        with atomic_file(path) as stream:
            stream.write(save(tensors, metadata={_KEY: json.dumps(manifest, sort_keys=True)}))
        return path

    def array(self, name: str, rank: int | None = None) -> Array:
        """An array of the file. Raises InputError where it is missing, of another rank, or not finite."""
        if name not in self.arrays:
            raise InputError(f"the {self.kind} file has no {name!r}", f"it has {', '.join(self.arrays)}")
        found = self.arrays[name]
        if rank is not None and found.ndim != rank:
            raise InputError(f"{name!r} of the {self.kind} file has {found.ndim} axes, not {rank}", "make the file again")
        if found.dtype.kind == "f" and not np.isfinite(found).all():
            raise InputError(f"{name!r} of the {self.kind} file holds NaN or infinite values", "make the file again")
        return found


def load_artifact(path: str | Path, kind: str, made_by: str) -> Artifact:
    """Read a file of that kind. Raises InputError for a missing or damaged one, or one of another kind.

    made_by: how a user gets such a file, for the message.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no file {path}", made_by)
    try:
        with safe_open(str(path), framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        manifest = json.loads(metadata.get(_KEY, "{}"))
        found = str(manifest.get("format", "")).removeprefix(_PREFIX)
    except (SafetensorError, OSError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is no {kind} file: {error}", made_by) from error
    if found != f"{kind}/1":
        raise InputError(f"{path} is no {kind} file{f' but {found}' if found else ''}", made_by)
    return Artifact(kind, arrays, manifest.get("notes", {}), str(manifest.get("model", "")))
