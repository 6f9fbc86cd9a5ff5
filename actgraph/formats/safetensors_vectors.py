"""Steering vectors as safetensors: one tensor for each direction and basis, and a manifest in the file's metadata.

A direction has its site's name, a basis ``basis:`` before it; the manifest says for every tensor which site it belongs to.
Files without a manifest (one tensor, or directions alone), or with an older one that lacks some keys, are read as well.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from actgraph.errors import InputError
from actgraph.formats.atomic import atomic_file
from actgraph.formats.vectors import Array, SteeringVector

if TYPE_CHECKING:
    from collections.abc import Mapping

FORMAT, VERSION = "actgraph.steering_vector", 2
_BASIS = "basis:"
#: The name of the tensor of a vector without a site.
_NAMELESS = "vector"
_TEXTS = ("model", "tokenizer", "model_type", "method", "position", "where", "scale")


def write_safetensors(vector: SteeringVector, path: Path) -> Path:
    """Write the file (beside, then renamed). Equal vectors give equal bytes. Raises InputError where it cannot be written."""
    from safetensors.numpy import save

    tensors: dict[str, Array] = {}
    sites: dict[str, str] = {}
    for prefix, arrays in (("", vector.directions), (_BASIS, vector.bases)):
        for site, array in arrays.items():
            name = prefix + (site or _NAMELESS)
            tensors[name], sites[name] = np.ascontiguousarray(array, np.float32), site
    manifest: dict[str, Any] = {
        "format": f"{FORMAT}/{VERSION}",
        "sites": sites,
        "notes": {key: str(value) for key, value in vector.notes.items()},
    }
    manifest |= {key: getattr(vector, key) for key in _TEXTS}
    manifest["recommended_scale"] = vector.recommended_scale
    with atomic_file(path) as stream:
        stream.write(save(tensors, metadata={"actgraph": json.dumps(manifest, sort_keys=True)}))
    return path


def read_safetensors(path: Path) -> SteeringVector:
    """Read the file. Raises InputError for a corrupt or unsuitable one."""
    metadata, tensors = _read(path)
    manifest = _manifest(path, metadata.get("actgraph.artifact") or metadata.get("actgraph", "{}"))
    kind = str(manifest.get("format", FORMAT)).partition("/")[0]
    if kind != FORMAT:
        what = kind.removeprefix("actgraph.").replace("_", " ")
        raise InputError(f"{path} holds {what}, no steering vector", "give it to the pass that it is for")
    # Without a manifest a table among other tensors is no basis: it may be any file, such as a model's weights.
    ranks = (1, 2) if manifest or len(tensors) == 1 else (1,)
    wrong = [name for name, tensor in tensors.items() if tensor.ndim not in ranks or not all(tensor.shape)]
    if wrong or not tensors:
        raise InputError(
            f"{path} holds no steering vector", "its tensors must be 1-D directions (or bases [k, width]), named by site"
        )
    arrays = {name: np.asarray(tensor, np.float32) for name, tensor in tensors.items()}
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise InputError(f"{path} holds NaN or infinite values", "extract the vector again")
    if not manifest and len(arrays) == 1:
        (array,) = arrays.values()
        return SteeringVector({"": array}) if array.ndim == 1 else SteeringVector({}, bases={"": array})
    sites = manifest.get("sites", {})
    directions = {_site(name, sites): array for name, array in arrays.items() if array.ndim == 1}
    bases = {_site(name, sites): array for name, array in arrays.items() if array.ndim == 2}
    if len(directions) + len(bases) < len(arrays):
        raise InputError(f"{path} names one site twice", "extract the vector again")
    keys = (*_TEXTS, "notes", "recommended_scale")
    try:
        return SteeringVector(directions, bases=bases, **{key: manifest[key] for key in keys if key in manifest})
    except InputError as error:
        raise InputError(f"the manifest of {path} is damaged: {error.message}", error.hint) from error


def _site(name: str, sites: Mapping[str, str]) -> str:
    if name in sites:
        return sites[name]
    name = name.removeprefix(_BASIS)
    return "" if name == _NAMELESS else name


def _read(path: Path) -> tuple[dict[str, str], dict[str, Array]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="numpy") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, TypeError) as error:  # TypeError: a type that numpy does not have
        raise InputError(f"{path} is not a safetensors file: {error}", "steering vectors are safetensors files") from error


def _manifest(path: Path, text: str) -> dict[str, Any]:
    again = "extract the vector again"
    try:
        manifest = json.loads(text)
    except ValueError as error:
        raise InputError(f"the manifest of {path} is damaged: {getattr(error, 'msg', error)}", again) from error
    if not isinstance(manifest, dict):
        raise InputError(f"the manifest of {path} is no object", again)
    name, _, version = str(manifest.get("format", "")).rpartition("/")
    if name == FORMAT and version.isdigit() and int(version) > VERSION:
        raise InputError(f"{path} was written by a newer actgraph (version {version} of the format)", "update actgraph")
    for key in ("sites", "notes"):
        rows = manifest.setdefault(key, {}) if manifest else {}
        if not isinstance(rows, dict) or (key == "sites" and not all(isinstance(value, str) for value in rows.values())):
            raise InputError(f"the manifest of {path} is damaged: {key} is no table of texts", again)
    manifest |= {"notes": {key: str(value) for key, value in manifest["notes"].items()}} if manifest else {}
    if not all(isinstance(manifest.get(key, ""), str) for key in _TEXTS):
        raise InputError(f"the manifest of {path} is damaged: one of {', '.join(_TEXTS)} is no text", again)
    factor = manifest.get("recommended_scale")
    if factor is not None and (isinstance(factor, bool) or not isinstance(factor, (int, float))):
        raise InputError(f"the manifest of {path} is damaged: recommended_scale is no number", again)
    return manifest
