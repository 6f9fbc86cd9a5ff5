"""GGUF control vectors, the format of repeng and llama.cpp: one F32 tensor ``direction.<n>`` for each layer.

The layer rule: ``direction.n`` is added to the output of block ``n``, counted from 0, which is our ``blocks.n.resid_post``.
llama.cpp refuses files with ``direction.0``: it cannot steer the first block, and neither can a file that we write. repeng
trains on ``hidden_states[n + 1]``, the same place. ``controlvector.layer_count`` is the number of directions as repeng writes
it; other writers put the number of the model's layers there, so nothing is concluded from it. Some writers count blocks from
1: what they wrote is read one block late unless ``layer_base`` says so. llama.cpp wants all tensors of one width, and steers
every token by ``factor * direction``, with the factor given on its command line.

Keys of our own begin with ``controlvector.actgraph.``; other readers skip them.

Needs the package ``gguf`` (``pip install 'actgraph[gguf]'``).
"""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from actgraph.errors import InputError, UnsupportedError
from actgraph.formats.atomic import atomic_file
from actgraph.formats.vectors import Array, SteeringVector
from actgraph.graph.spellings import spell

ARCHITECTURE = "controlvector"
_OWN = f"{ARCHITECTURE}.actgraph"
_FORMAT = "actgraph.steering_vector/2"
_TEXTS = ("model", "tokenizer", "method", "position", "where", "scale")
#: What is written where the architecture is not known: repeng refuses files without a hint.
UNKNOWN = "unknown"
_ALL = "llama.cpp steers every token by factor * direction"


def write_gguf(vector: SteeringVector, path: str | Path) -> Path:
    """Write ``vector`` as a control vector (beside, then renamed). Equal vectors give equal bytes.

    Directions must be those of ``blocks.n.resid_post`` with n >= 1 (or another spelling of it, such as
    ``blocks.{n+1}.resid_pre``), all of one width. Raises InputError for anything that GGUF cannot express: block 0, other
    sites, vectors without a site, bases, a scale relative to the activation's norm; UnsupportedError without the package
    ``gguf``.
    """
    gguf, path = _gguf(), Path(path)
    layers = _layers(vector)
    with tempfile.TemporaryDirectory() as folder, atomic_file(path) as stream:
        written = Path(folder) / "vector.gguf"
        writer = gguf.GGUFWriter(written, ARCHITECTURE)
        writer.add_string(f"{ARCHITECTURE}.model_hint", vector.model_type or UNKNOWN)
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(layers))
        writer.add_string(f"{_OWN}.format", _FORMAT)
        writer.add_string(f"{_OWN}.site", "blocks.{n}.resid_post")
        writer.add_uint32(f"{_OWN}.layer_base", 0)
        for key in _TEXTS:
            writer.add_string(f"{_OWN}.{key}", getattr(vector, key))
        if vector.recommended_scale is not None:
            writer.add_float64(f"{_OWN}.recommended_scale", vector.recommended_scale)
        notes = {key: str(value) for key, value in vector.notes.items() if key not in ("mapping", "layer_count")}
        if notes:
            writer.add_string(f"{_OWN}.notes", json.dumps(notes, sort_keys=True))
        for layer in sorted(layers):
            writer.add_tensor(f"direction.{layer}", np.ascontiguousarray(layers[layer], np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        stream.write(written.read_bytes())
    return path


def _layers(vector: SteeringVector) -> dict[int, Array]:
    """Layer number -> direction. Raises InputError for what a control vector cannot hold."""
    elsewhere = "save it as .safetensors"
    if vector.bases:
        listed = ", ".join(name or "(any site)" for name in vector.bases)
        raise InputError(f"a GGUF control vector holds no bases, and this one has some for {listed}", elsewhere)
    if vector.scale == "relative":
        raise InputError(f"a GGUF control vector cannot be relative to the activation's norm: {_ALL}", elsewhere)
    layers: dict[int, Array] = {}
    for site, direction in vector.directions.items():
        layer = layer_of(site)
        if layer is None:
            what = f"{site} is no output of a block" if site else "the vector has no site"
            raise InputError(
                f"{what}, and a GGUF control vector steers those alone",
                f"give it a site such as blocks.5.resid_post, or {elsewhere}",
            )
        if layer == 0:
            raise InputError(
                f"{site} cannot be written to a GGUF control vector: llama.cpp cannot steer layer 0, the first block's output",
                f"leave that site out, or {elsewhere}",
            )
        if layer in layers:
            raise InputError(f"{site} is the output of block {layer}, for which the vector has another direction", elsewhere)
        layers[layer] = direction
    widths = sorted({len(direction) for direction in layers.values()})
    if len(widths) != 1:
        raise InputError(f"a GGUF control vector has directions of one width, not {widths}", elsewhere)
    return layers


def layer_of(site: str) -> int | None:
    """The block, counted from 0, whose output ``site`` is in any spelling: 5 for ``blocks.5.resid_post``; else ``None``.

    What block 6 reads (``blocks.6.resid_pre``) is what block 5 wrote.
    """
    number = re.search(r"\d+", site)
    if number is None:
        return None
    block = int(number.group())
    roles = {f"blocks.{block}.resid_post": block, f"blocks.{block}.resid_pre": block - 1}
    role = spell(dict.fromkeys(roles, "")).get(site, site)
    layer = roles.get(role)
    return None if layer is None or layer < 0 else layer


def read_gguf(path: str | Path, *, layer_base: int = 0) -> SteeringVector:
    """Read a control vector: ``direction.n`` becomes ``blocks.{n - layer_base}.resid_post``.

    layer_base: what the writer of the file called the first block. By the rule of llama.cpp and repeng it is 0.

    ``notes["mapping"]`` says in words how layers were read, and what is odd about the file. Raises InputError for a file that
    holds no control vector, UnsupportedError without the package ``gguf``.
    """
    path = Path(path)
    fields, tensors = _read(path)
    directions: dict[int, Array] = {}
    for name, tensor in tensors.items():
        if not name.startswith("direction."):
            continue
        digits = name.removeprefix("direction.")
        layer = int(digits) - layer_base if re.fullmatch("[0-9]{1,6}", digits) else -1
        if layer < 0 or layer in directions:
            raise InputError(f"{path} names a direction {name}", f"layers are numbers from {layer_base} on, each once")
        if tensor.ndim != 1 or tensor.dtype not in (np.float32, np.float16, np.float64):
            raise InputError(f"{path}: {name} is {tensor.dtype}{list(tensor.shape)}", "directions are F32 tensors of rank 1")
        directions[layer] = np.array(tensor, np.float32)
    if not directions:
        raise InputError(f"{path} holds no control vector", "it has no tensors direction.1, direction.2 ...")
    if not all(np.isfinite(direction).all() for direction in directions.values()):
        raise InputError(f"{path} holds NaN or infinite values", "extract the vector again")
    hint = _text(fields, f"{ARCHITECTURE}.model_hint")
    own = {key: _text(fields, f"{_OWN}.{key}") for key in _TEXTS}
    texts: dict[str, Any] = {key: value for key, value in own.items() if value}
    texts.setdefault("method", _text(fields, f"{ARCHITECTURE}.method"))
    factor = fields.get(f"{_OWN}.recommended_scale")
    notes = _notes(path, _text(fields, f"{_OWN}.notes"))
    notes["mapping"] = _mapping(fields, directions, layer_base)
    if f"{ARCHITECTURE}.layer_count" in fields:
        notes["layer_count"] = str(fields[f"{ARCHITECTURE}.layer_count"])
    try:
        return SteeringVector(
            {f"blocks.{layer}.resid_post": directions[layer] for layer in sorted(directions)},
            notes=notes,
            model_type="" if hint == UNKNOWN else hint,
            recommended_scale=factor if isinstance(factor, float) else None,
            **texts,
        )
    except InputError as error:
        raise InputError(f"{path} is damaged: {error.message}", error.hint) from error


def _mapping(fields: dict[str, object], directions: dict[int, Array], layer_base: int) -> str:
    """In words: how layers were read, and what is odd about the file."""
    shown = "n" if layer_base == 0 else f"{{n-{layer_base}}}"
    parts = [f"direction.n was read as blocks.{shown}.resid_post, the output of a block counted from 0"]
    if 0 in directions and layer_base == 0:
        parts.append("direction.0 as that of the first block, for which llama.cpp would refuse the file")
    architecture = _text(fields, "general.architecture")
    if architecture != ARCHITECTURE:
        parts.append(f"the file says general.architecture={architecture or '(nothing)'} and not {ARCHITECTURE}")
    return "; ".join(parts)


def _notes(path: Path, text: str) -> dict[str, str]:
    try:
        notes = json.loads(text or "{}")
    except ValueError as error:
        raise InputError(f"the notes of {path} are damaged", "extract the vector again") from error
    if not isinstance(notes, dict):
        raise InputError(f"the notes of {path} are damaged", "extract the vector again")
    return {str(key): str(value) for key, value in notes.items()}


def _text(fields: dict[str, object], key: str) -> str:
    value = fields.get(key, "")
    return value if isinstance(value, str) else ""


def _read(path: Path) -> tuple[dict[str, object], dict[str, Array]]:
    """Metadata and tensors of a GGUF file, copied. Raises InputError for a damaged one."""
    gguf = _gguf()
    try:
        reader = _strict(gguf.GGUFReader)(path)
        fields = {name: field.contents() for name, field in reader.fields.items() if field.types}
        return fields, {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError, OSError) as error:
        detail = str(error) or type(error).__name__
        hint = "control vectors are GGUF files with tensors direction.<n>"
        raise InputError(f"{path} is not a GGUF file: {detail}", hint) from error


def _strict(reader: Any) -> Any:
    """The reader, refusing to read beyond the end: in a damaged file the length of an array may be anything."""

    def get(self: Any, offset: int, dtype: Any, count: int = 1, *more: Any, **named: Any) -> Any:
        part = reader._get(self, offset, dtype, count, *more, **named)
        if len(part) != int(count):
            raise ValueError("it ends too early")
        return part

    return type("StrictReader", (reader,), {"_get": get})


def _gguf() -> ModuleType:
    try:
        import gguf
    except ImportError as error:
        raise UnsupportedError(
            "GGUF control vectors need the package gguf", "pip install 'actgraph[gguf]', or save as .safetensors"
        ) from error
    module: ModuleType = gguf
    return module
