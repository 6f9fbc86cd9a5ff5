"""What travels beside a model file: tokenizer, configurations, sample inputs.

Files have their usual names (``tokenizer.json``, ``config.json`` ...), so that other tools find them; where the folder
already holds another file of that name, ours goes into ``<stem>.files/``. The model file records which ones are its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from actgraph.errors import InputError
from actgraph.formats.atomic import StagedFiles
from actgraph.graph.graph import Companions

CONFIG, GENERATION = "config.json", "generation_config.json"
#: Files of a tokenizer in the Hugging Face layout.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "vocab.txt", "tokenizer.model", "spiece.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def write_companions(companions: Companions, path: str | Path, staged: StagedFiles) -> dict[str, Any]:
    """Write the companions beside the model file ``path``; returns the record that ``read_companions`` takes.

    They take their names together with the other files of ``staged``, when the model is complete.

    The record is plain data: ``{"source": ..., "files": {name: relative path}}``.
    """
    path = Path(path)
    contents = dict(companions.tokenizer_files)
    if companions.tokenizer is not None and "tokenizer.json" not in contents:
        contents["tokenizer.json"] = companions.tokenizer.to_str(pretty=True).encode()
    if companions.config:
        contents[CONFIG] = _json(companions.config)
    if companions.generation_config:
        contents[GENERATION] = _json(companions.generation_config)
    files = {name: _write(staged, path, name, data) for name, data in sorted(contents.items())}
    if companions.sample_inputs:
        name = f"{path.stem}.sample_inputs.npz"
        buffer = BytesIO()
        arrays: dict[str, Any] = {key: np.asarray(value) for key, value in sorted(companions.sample_inputs.items())}
        np.savez(buffer, **arrays)
        files["sample_inputs"] = _write(staged, path, name, buffer.getvalue(), replace=True)
    record: dict[str, Any] = {}
    if companions.source:
        record["source"] = companions.source
    if files:
        record["files"] = files
    return record


def read_companions(path: str | Path, record: Mapping[str, Any] | None = None) -> Companions:
    """The companions beside ``path``: those that ``record`` lists, or, for a file of another tool, whatever lies there.

    A listed file that is gone is left out. Raises InputError for one that cannot be read.
    """
    path = Path(path)
    if record is None:
        files = {name: name for name in (*TOKENIZER_FILES, CONFIG, GENERATION) if (path.parent / name).is_file()}
        source = str(path)
    else:
        files, source = dict(record.get("files", {})), str(record.get("source", ""))
    companions = Companions(source=source)
    for name, place in files.items():
        target = path.parent / place
        if Path(place).is_absolute() or ".." in Path(place).parts or not target.is_file():
            continue
        if name == CONFIG:
            companions.config = _read_json(target)
        elif name == GENERATION:
            companions.generation_config = _read_json(target)
        elif name == "sample_inputs":
            companions.sample_inputs = _read_arrays(target)
        else:
            companions.tokenizer_files[name] = target.read_bytes()
    companions.tokenizer = _tokenizer(companions.tokenizer_files.get("tokenizer.json"))
    return companions


def _write(staged: StagedFiles, path: Path, name: str, data: bytes, *, replace: bool = False) -> str:
    """Write one file and return where it will be, relative to the model's folder."""
    target = path.parent / name
    if not replace and staged.exists(target):
        if staged.content(target) == data:
            return name
        target = path.parent / f"{path.stem}.files" / name
        staged.folder(target.parent)
    with staged.file(target) as file:
        file.stream.write(data)
    return target.relative_to(path.parent).as_posix()


def _tokenizer(data: bytes | None) -> Any:
    if data is None:
        return None
    try:
        from tokenizers import Tokenizer
    except ImportError:
        return None  # the optional extra is not installed; the files are kept all the same
    try:
        return Tokenizer.from_str(data.decode())
    except Exception as error:  # tokenizers raises plain Exception
        raise InputError(f"the tokenizer.json beside the model cannot be read: {error}") from error


def _json(data: Any) -> bytes:
    return (json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error
    return data if isinstance(data, dict) else {}


def _read_arrays(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (ValueError, OSError, EOFError) as error:
        raise InputError(f"{path} is not a valid .npz file") from error
