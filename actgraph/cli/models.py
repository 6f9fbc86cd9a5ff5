"""Opening what the command line names (models, tokenizers, pipelines), and checking where it wants to write."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from actgraph.errors import InputError, OptionError

if TYPE_CHECKING:
    from actgraph.graph import Graph
    from actgraph.pipeline import Pipeline


def open_model(model: str, tokenizer: Path | None = None, *, quiet: bool = False) -> Graph:
    """Load MODEL, say what was kept static, and attach the tokenizer of ``--tokenizer``."""
    import actgraph as ag
    from actgraph.cli.output import remark, waiting

    with waiting(f"loading {model}", quiet=quiet):
        graph = ag.load(model)
    for note in graph.notes:
        remark(f"note: {note}", quiet=quiet)
    if tokenizer is not None:
        attach_tokenizer(graph, tokenizer)
    return graph


def attach_tokenizer(graph: Graph, folder: Path) -> None:
    """Give ``graph`` the tokenizer of a folder, and its generation settings if it has none. Raises InputError."""
    from actgraph.formats.companions import read_companions

    if not (folder / "tokenizer.json").is_file():
        raise InputError(f"there is no tokenizer.json in {folder}", "--tokenizer takes the folder that holds it")
    found = read_companions(folder / "model")
    if found.tokenizer is None:
        raise InputError("reading a tokenizer needs the package tokenizers", "pip install 'actgraph[hf]'")
    graph.companions.tokenizer = found.tokenizer
    graph.companions.tokenizer_files = found.tokenizer_files
    graph.companions.generation_config = graph.companions.generation_config or found.generation_config


def read_pipeline(passes: str | None, recipe: Path | None) -> Pipeline:
    """The pipeline of ``-p`` or ``-r``. Raises OptionError when there is not exactly one of them."""
    from actgraph.pipeline import Pipeline

    if passes is not None and recipe is not None:
        raise OptionError("both -p and -r are given", "give the passes as text or as a recipe")
    if recipe is not None:
        return Pipeline.read(recipe)
    if passes is None or not passes.strip():
        raise OptionError(
            "there are no passes to run", "give -p 'name{key=value}' or -r recipe.yaml; `actgraph passes` lists them"
        )
    return Pipeline.parse(passes)


def check_output(path: Path, suffixes: Sequence[str]) -> None:
    """Refuse a target that cannot be written before any work is done. Raises InputError."""
    if path.suffix not in suffixes:
        raise InputError(f"cannot write {path}", f"the suffix says the format: {' or '.join(suffixes)}")
    if path.is_dir():
        raise InputError(f"{path} is a folder", "name a file")
    folder = path.parent
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}", "make it first")
    if not os.access(folder, os.W_OK):
        raise InputError(f"the folder {folder} is read-only", "choose another folder")
