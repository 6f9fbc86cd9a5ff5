"""Reproducers: a failure leaves a folder that shows it again.

The folder holds the input graph, the passes up to the failing one, seed, versions, calibration corpus and error, and depends on
nothing else (third-party passes must be installed). ``rerun(folder)`` raises the same error again.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from actgraph.errors import InputError
from actgraph.pipeline.report import versions

if TYPE_CHECKING:
    from actgraph.graph import Graph
    from actgraph.pipeline.manager import RunResult
    from actgraph.pipeline.pipeline import Pipeline

#: Where reproducers go when no folder is given.
VARIABLE = "ACTGRAPH_REPRODUCERS"
_FILE = "reproducer.json"
#: The file format of each dialect.
SUFFIX = {"fx": ".pt2", "onnx": ".onnx"}
_README = """Made when a pass failed. To see the failure again:

    python -c "from actgraph.pipeline.reproducer import rerun; rerun('.')"

in this folder: it ends in a traceback whose last line is the error. Passes that are not part of actgraph must be installed, or
imported first where they are registered by `@ag.register`.

reproducer.json holds the pipeline, the seed, the versions and the error; graph.* is the input of the pipeline. Open .pt2 files
from people you trust only.
"""


def folder_for(base: str | Path | None, graph: Graph, pipeline: Pipeline) -> Path:
    """The folder of a failure: ``<base>/<graph>-<pass>-<hash>``, so that one never overwrites another.

    Base is ``$ACTGRAPH_REPRODUCERS`` or the temporary folder where none is given.
    """
    usual = os.environ.get(VARIABLE) or Path(tempfile.gettempdir()) / "actgraph-reproducers"
    root = Path(usual if base is None else base)
    key = hashlib.sha256(f"{graph.name} {pipeline} {os.getpid()}".encode()).hexdigest()[:8]
    last = pipeline.passes[-1].name if len(pipeline) else "none"
    stem = "".join(c if c.isalnum() or c in "-_" else "-" for c in graph.name)
    return root / f"{stem}-{last}-{key}"


@dataclass(frozen=True)
class Setting:
    """What a manager was run with. settings: plain values among its arguments; inputs: the arrays that parity ran on."""

    seed: int = 0
    corpus: Any = None
    settings: dict[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, Any] | None = None


def write(folder: Path, graph: Graph, pipeline: Pipeline, error: BaseException, setting: Setting) -> list[str]:
    """Write the reproducer and return what could not be written. Raises InputError when the folder cannot be made."""
    problems: list[str] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as failure:
        raise InputError(f"cannot write a reproducer to {folder}: {failure.strerror or failure}") from failure
    suffix = SUFFIX.get(graph.dialect, "")
    try:
        graph.save(folder / f"graph{suffix}")
    except Exception as failure:  # whatever it is, the rest of the folder is still worth having
        problems.append(f"the graph was not saved ({failure}); its text is in graph.txt")
        suffix = ""
        (folder / "graph.txt").write_text(_text(graph), encoding="utf-8")
    if setting.inputs:
        _save_arrays(folder / "inputs.npz", setting.inputs)
    record = {
        "pipeline": str(pipeline),
        "seed": setting.seed,
        "settings": setting.settings,
        "graph": f"graph{suffix}" if suffix else None,
        "inputs": "inputs.npz" if setting.inputs else None,
        "source": graph.companions.source,
        "history": [entry.to_dict() for entry in graph.history],
        "corpus": _corpus(folder, setting.corpus, problems),
        "versions": versions(),
        "error": {"type": type(error).__name__, "message": str(error), "traceback": traceback.format_exception(error)},
        "problems": problems,
    }
    (folder / _FILE).write_text(json.dumps(record, indent=2, default=str), encoding="utf-8")
    (folder / "README.txt").write_text(_README, encoding="utf-8")
    return problems


def _text(graph: Graph) -> str:
    try:
        return graph.text()
    except Exception as failure:
        return f"(cannot be printed: {failure})"


def _corpus(folder: Path, corpus: Any, problems: list[str]) -> str | list[str] | None:
    """The corpus as files in the folder (texts, arrays), or its path; ``None`` for the packaged one."""
    from actgraph.calibrate.corpora import Corpus

    if corpus is None:
        return None
    if isinstance(corpus, (str, Path)):
        return str(Path(corpus).resolve())
    try:
        documents = Corpus.of(corpus).documents
    except InputError as error:
        problems.append(f"the corpus is not part of the reproducer: {error}")
        return None
    if all(isinstance(document, str) for document in documents):
        lines = [json.dumps({"text": document}) for document in documents]
        (folder / "corpus.jsonl").write_text("\n".join(lines), encoding="utf-8")
        return "corpus.jsonl"
    names: list[str] = []
    for document in documents:
        if not isinstance(document, Mapping):
            problems.append("the corpus has images or chats, which are not part of the reproducer")
            return None
        names.append(f"corpus-{len(names):04d}.npz")
        _save_arrays(folder / names[-1], document)
    return names


def _save_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    np.savez(path, **{name: np.asarray(array) for name, array in arrays.items()})  # type: ignore[arg-type]


def _load_arrays(path: Path) -> dict[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}") from error


def rerun(folder: str | Path) -> RunResult:
    """Run what the folder holds. Raises the recorded error again, if it still happens; InputError for a damaged folder."""
    from actgraph.formats import load
    from actgraph.pipeline.manager import PassManager

    folder = Path(folder)
    try:
        record = json.loads((folder / _FILE).read_text(encoding="utf-8"))
        name, text, seed, corpus = record["graph"], record["pipeline"], record["seed"], record["corpus"]
        settings = dict(record["settings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder} holds no reproducer: {error}", f"name the folder that has {_FILE} in it") from error
    if name is None:
        raise InputError(f"the reproducer {folder} has no graph: {'; '.join(record['problems'])}")
    if isinstance(corpus, list):
        corpus = [_load_arrays(folder / part) for part in corpus]
    elif corpus is not None:
        corpus = folder / corpus  # an absolute path stays what it is
    if record.get("inputs"):
        settings["inputs"] = _load_arrays(folder / record["inputs"])
    graph = load(folder / name)
    return PassManager(text, corpus, seed=seed, reproducer=False, **settings).run(graph)
