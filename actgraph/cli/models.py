"""Opening what the command line names (models, tokenizers, pipelines), and checking where it wants to write."""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from actgraph.errors import ActgraphError, InputError, OptionError

if TYPE_CHECKING:
    from actgraph.graph import Graph
    from actgraph.graph.program import Program
    from actgraph.pipeline import Pipeline


#: What ``--dtype`` takes: ``auto`` is the checkpoint's own.
DTYPES = ("float32", "float16", "bfloat16", "auto")


def open_model(
    model: str, tokenizer: Path | None = None, *, dtype: str | None = None, quiet: bool = False, notes: bool = True
) -> Graph:
    """``open_any`` for verbs that take one graph. Raises InputError for a program of several."""
    graph = open_any(model, tokenizer, dtype=dtype, quiet=quiet, notes=notes)
    if len(graph) != 1:
        raise InputError(f"{model} is a program of {len(graph)} graphs", "give one of the .onnx files in it")
    return graph.graph


def open_any(
    model: str, tokenizer: Path | None = None, *, dtype: str | None = None, quiet: bool = False, notes: bool = True
) -> Program:
    """Load MODEL in ``--dtype``, say what was kept static (``notes``), and attach the tokenizer of ``--tokenizer``.

    A file with one graph is a program of one.
    """
    import actgraph as ag
    from actgraph.cli.output import remark, waiting
    from actgraph.graph.provenance import RecordedNote

    loading = {} if dtype is None else {"dtype": _dtype(dtype, model)}
    if tokenizer is not None:
        _check_tokenizer(tokenizer)
    with waiting(_progress(model), quiet=quiet):
        loaded = ag.load(model, **loading)
    program = loaded if isinstance(loaded, ag.Program) else ag.Program.of(loaded)
    for note in dict.fromkeys(note for graph in program for note in graph.notes):
        if not isinstance(note, RecordedNote):  # those are history, which `inspect` shows
            remark(f"note: {note}", quiet=quiet or not notes)
    if tokenizer is not None:
        for graph in program:
            attach_tokenizer(graph, tokenizer)
    return program


def _progress(model: str) -> str:
    """What is going on while ``model`` is opened; capturing takes its time even for a tiny model."""
    from actgraph.formats import kind_of

    if kind_of(model) in ("huggingface", "factory"):
        return f"capturing {Path(model).name} ... (some 15 s even for a tiny model)"
    return f"loading {model}"


def _dtype(dtype: str, model: str) -> str:
    """``--dtype`` as the loader wants it. Raises InputError for an unknown one, and for models whose file fixes it."""
    from actgraph.formats import kind_of

    if dtype not in DTYPES:
        raise InputError(f"--dtype is {dtype!r}", f"choose {', '.join(DTYPES)}")
    kind = kind_of(model)
    if kind != "huggingface":
        what = {
            "program": "the files of a program have their own",
            "factory": "the factory decides the dtype of its model",
            "onnx": "an .onnx file has its own dtype",
        }
        told = what.get(kind, f"a .{kind} file has its own dtype")
        raise InputError(f"--dtype is for Hugging Face models: {told}", "use the pass cast{dtype=...} to change it")
    return dtype


def _check_tokenizer(folder: Path) -> None:
    if not (folder / "tokenizer.json").is_file():
        raise InputError(f"there is no tokenizer.json in {folder}", "--tokenizer takes the folder that holds it")


def attach_tokenizer(graph: Graph, folder: Path) -> None:
    """Give ``graph`` the tokenizer of a folder, and its generation settings if it has none. Raises InputError."""
    from actgraph.formats.companions import read_companions

    _check_tokenizer(folder)
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


def import_passes(name: str) -> None:
    """Import the module of ``--import``; the current folder is importable. Raises InputError naming the line that failed."""
    from actgraph.formats.factory import describe

    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        importlib.import_module(name)
    except ActgraphError:
        raise
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
            hint = "write package.module, without .py; modules in the current folder are found"
            raise InputError(f"--import: cannot find the module {name}", hint) from error
        raise InputError(f"--import: importing {name} failed: {describe(error)}") from error


def check_output(path: Path, suffixes: Sequence[str]) -> None:
    """Refuse a target that cannot be written before any work is done. Raises InputError."""
    if path.suffix not in suffixes:
        raise InputError(f"cannot write {path}", f"the suffix says the format: {' or '.join(suffixes)}")
    if path.is_dir():
        raise InputError(f"{path} is a folder", "name a file")
    if path.exists() and not os.access(path, os.W_OK):
        raise InputError(f"the file {path} is read-only", "choose another name")
    _check_folder(path.parent, "make it first")


def check_output_folder(path: Path) -> None:
    """Refuse a folder that cannot be made or written to before any work is done. Raises InputError."""
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file", "name a folder")
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.is_dir())
    _check_folder(existing, "make it first")


def _check_folder(folder: Path, hint: str) -> None:
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}", hint)
    try:
        with tempfile.TemporaryFile(dir=folder):  # permission bits do not tell: mounts, quotas and root have their own rules
            pass
    except OSError as error:
        raise InputError(f"cannot write to the folder {folder}: {error.strerror or error}", "choose another folder") from error


def check_save(
    path: Path, suffixes: Sequence[str], *, inline: str, external_data: bool, several: bool = False, genai: bool = False
) -> None:
    """``check_output`` for a model, with the options of its format. Raises InputError, OptionError for an unknown op.

    several: the result is a program of several graphs, which is a folder; genai: it is a folder for onnxruntime-genai.
    """
    if genai or several:
        from actgraph.formats.program_file import GENAI_MANIFEST, MANIFEST, refuse_other_content

        what = "--genai writes a folder" if genai else "the result is a program of several graphs"
        if genai and several:
            raise InputError("--genai takes one graph, and this is a program of several", "use kv_cache{graphs=combined}")
        if path.suffix in suffixes:
            hint = "name a folder, without a suffix" + ("" if genai else ", or use kv_cache{graphs=combined} to get one graph")
            raise InputError(f"cannot write {path}: {what}", hint)
        check_output_folder(path)
        refuse_other_content(path, GENAI_MANIFEST if genai else MANIFEST)
    else:
        check_output(path, suffixes)
    given = [name for name, on in (("--inline", inline != "none"), ("--external-data", external_data)) if on]
    if given and path.suffix != ".onnx":
        raise InputError(f"{given[0]} is for .onnx files", f"leave it out for {path}")
    if inline not in ("none", "all"):
        from actgraph.ops.registry import get_op

        try:
            get_op(inline)
        except OptionError as error:
            raise OptionError(f"--inline {inline}: {error.message}", "give none, all or the name of an op") from error
