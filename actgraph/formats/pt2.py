"""Loading and saving ``.pt2`` files (torch.export archives).

A file that we write is decomposed to ATen ops, so that stock ``torch.export.load`` runs it; beside the program it carries our
own description of the graph (ops kept whole, names, sites, provenance, companions), over the same weights. A ``.pt2`` holds
pickles by torch's own design: open trusted files only.
"""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import torch

from actgraph.errors import InputError, UnsupportedError
from actgraph.formats.atomic import atomic_file
from actgraph.formats.pt2_graph import decode, encode
from actgraph.formats.pt2_program import program_of
from actgraph.formats.trace_result import graph_of_program
from actgraph.graph.fx import FxGraph
from actgraph.graph.graph import Graph

EXTRA = "actgraph.json"


def save_pt2(graph: Graph, path: str | Path, *, ops: str = "decomposed") -> Path:
    """Write an FX graph to ``path`` and return it. The file appears whole or not at all, each weight once.

    ops: ``decomposed`` (the program holds ATen ops only) or ``kept`` (actgraph's ops stay; running the file needs actgraph).
    Raises UnsupportedError for an ONNX graph.
    """
    if not isinstance(graph, FxGraph):
        raise UnsupportedError(f"{graph.name} is an ONNX graph and cannot become a .pt2", "save it as .onnx")
    if ops not in ("decomposed", "kept"):
        raise InputError(f"ops must be decomposed or kept, not {ops!r}")
    program = program_of(graph, keep_ops=ops == "kept")
    description = json.dumps(encode(graph), ensure_ascii=False, sort_keys=True)
    with atomic_file(path) as stream, _quiet():
        torch.export.save(program, stream, extra_files={EXTRA: description})
    return Path(path)


def load_pt2(path: str | Path, **options: Any) -> FxGraph:
    """The graph in a ``.pt2``: equal to the one that was saved, or captured from a program that another tool wrote.

    Raises InputError for a file that is missing, corrupt or no torch.export archive.
    """
    if options:
        raise InputError(f"a .pt2 file has no loading option {next(iter(options))!r}")
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    try:
        with _quiet():
            description, tensors = _read_ours(path)
            program = torch.export.load(path) if not description else None
    except Exception as error:  # zip, JSON, pickle and torch each raise errors of their own
        reason = str(error).strip().splitlines()
        said = reason[0][:200] if reason else type(error).__name__
        raise InputError(f"{path} is no readable torch.export file: {said}") from error
    if program is not None:
        return _foreign(program, path)
    try:
        return decode(json.loads(description), tensors)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        said = f"{type(error).__name__}: {error}"
        raise InputError(f"{path} is damaged: its description of the graph does not fit ({said[:200]})") from error


def _read_ours(path: Path) -> tuple[str, dict[str, torch.Tensor]]:
    """Our description (empty in a file of another tool) and the tensors by name.

    torch's own program in the file is left alone: reading it takes several times as long as everything else, and we have no
    use for it.
    """
    from torch.export.pt2_archive import _package as archive  # public functions read whole programs only
    from torch.export.pt2_archive.constants import EXTRA_DIR

    _register_ops()
    with archive.PT2ArchiveReader(str(path)) as reader:
        if f"{EXTRA_DIR}{EXTRA}" not in reader.get_file_names():
            return "", {}
        description = reader.read_string(f"{EXTRA_DIR}{EXTRA}")
        tensors: dict[str, torch.Tensor] = {}
        for part in (archive._load_state_dict(reader, "model"), archive._load_constants(reader, "model")):
            if isinstance(part, dict):
                tensors |= part
        return description, tensors


def _foreign(program: torch.export.ExportedProgram, path: Path) -> FxGraph:
    with _quiet(), torch.no_grad():
        graph = graph_of_program(program.run_decompositions({}), path.stem, None)
    graph.companions.source = str(path)
    return graph


def _register_ops() -> None:
    from actgraph.ops.torch_library import register_all

    register_all()


class _quiet:
    """No warnings and log lines from torch's serializer."""

    def __enter__(self) -> None:
        self._warnings = warnings.catch_warnings()
        self._warnings.__enter__()
        warnings.simplefilter("ignore")
        self._logger = logging.getLogger("torch.export")
        self._level = self._logger.level
        self._logger.setLevel(logging.CRITICAL)

    def __exit__(self, *error: object) -> None:
        self._logger.setLevel(self._level)
        self._warnings.__exit__(*error)  # type: ignore[arg-type]
