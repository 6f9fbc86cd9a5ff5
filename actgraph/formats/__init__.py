"""Loading and saving: one file per format, chosen here by what the source looks like.

``load`` takes a Hugging Face directory, hub id or live model, an ``.onnx`` or ``.pt2`` file, the folder of a program,
``package.module:factory``, or ``stories260k``. ``save`` writes ``.onnx`` or ``.pt2`` by the suffix. Formats are imported when
used.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actgraph.errors import InputError

if TYPE_CHECKING:
    from actgraph.graph import Graph

#: The model inside the package: ``load("stories260k")`` works offline.
EMBEDDED = "stories260k"

_LOADERS = {
    "huggingface": "actgraph.formats.huggingface:load_huggingface",
    "onnx": "actgraph.formats.onnx_file:load_onnx",
    "pt2": "actgraph.formats.pt2:load_pt2",
    "factory": "actgraph.formats.factory:load_factory",
    "program": "actgraph.formats.program_file:load_program",
}
_SAVERS = {
    ".onnx": "actgraph.formats.onnx_file:save_onnx",
    ".pt2": "actgraph.formats.pt2:save_pt2",
}


def load(source: Any, **options: Any) -> Graph | Any:
    """The graph of ``source``; the ``Program`` of a folder that ``Program.save`` wrote.

    Typed ``Graph | Any``, the convention for results that are nearly always of one type: with ``Graph | Program`` every caller
    would have to rule programs out, and with ``Graph`` asking ``isinstance(result, Program)`` would look pointless.
    options: those of the format's loader (``dtype=`` and ``revision=`` for Hugging Face models ...).
    Raises InputError when there is no such source, or when it cannot be read.
    """
    return _import(_LOADERS[kind_of(source)])(source, **options)


def kind_of(source: Any) -> str:
    """Which loader reads ``source``: ``huggingface``, ``onnx``, ``pt2``, ``program`` or ``factory``. InputError for none."""
    if not isinstance(source, (str, Path)):
        if is_transformers_model(source):
            return "huggingface"
        if hasattr(source, "forward"):
            raise InputError(
                f"a {type(source).__name__} cannot be loaded without example inputs", "use actgraph.trace(module, args, ...)"
            )
        raise InputError(f"cannot load a {type(source).__name__}", "give a path, a hub id, package.module:factory or a model")
    text = str(source)
    path = Path(text)
    if text == EMBEDDED and not path.exists():
        return "huggingface"
    if path.suffix in (".onnx", ".pt2"):
        if not path.is_file():
            raise InputError(f"there is no file {text}")
        return path.suffix[1:]
    if path.is_dir():
        if (path / "program.json").is_file():  # looked for first: the companions of a program may include a config.json
            return "program"
        _refuse_folder_of_onnx(path)
        if (path / "config.json").is_file():
            return "huggingface"
        raise InputError(f"{text} has no config.json", "a Hugging Face model directory holds config.json and *.safetensors")
    if path.exists():
        raise InputError(
            f"{text} is no model file", "models are .onnx, .pt2, Hugging Face directories or package.module:factory"
        )
    if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", text):
        return "factory"
    if re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", text) and not text.startswith((".", "/")):
        return "huggingface"
    raise InputError(f"there is no model {text!r}", f"give a path, org/name[@revision], package.module:factory or {EMBEDDED}")


def _refuse_folder_of_onnx(folder: Path) -> None:
    """Raises InputError for a folder without weights of a Hugging Face model, where .onnx files stand beside each other."""
    files = sorted(path.name for path in folder.glob("*.onnx"))
    if not files or any(folder.glob("*.safetensors")):
        return
    if {"prefill.onnx", "decode.onnx"} & set(files):
        hint = "save the program again, or name one of these files"
        raise InputError(f"{folder} holds {' and '.join(files)}, and program.json is missing", hint)
    hint = "name that file" if len(files) == 1 else "name one of these files"
    raise InputError(f"{folder} is no Hugging Face model: it holds {', '.join(files[:4])}", hint)


def is_transformers_model(thing: Any) -> bool:
    """Whether ``thing`` is a live transformers model (told by its configuration, without importing transformers)."""
    return hasattr(thing, "forward") and hasattr(getattr(thing, "config", None), "model_type")


def save(graph: Graph, path: str | Path, **options: Any) -> Path:
    """Write ``graph`` to ``path`` (``.onnx`` or ``.pt2``) and return the path.

    options: those of the format's writer. Raises InputError for another suffix, UnsupportedError where the format cannot
    hold the graph. The file appears whole or not at all.
    """
    suffix = Path(path).suffix
    if suffix not in _SAVERS:
        raise InputError(f"cannot save to {path}", f"the suffix says the format: {' or '.join(_SAVERS)}")
    return _import(_SAVERS[suffix])(graph, Path(path), **options)  # type: ignore[no-any-return]


def _import(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)
