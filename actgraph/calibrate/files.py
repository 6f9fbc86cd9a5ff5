"""Statistics on disk: safetensors with the requests as metadata. Never pickle.

``save`` and ``load`` keep whole ``Statistics``, so that shards of a corpus may be collected by several processes and merged.
``Cache`` keeps single results under a key of graph, corpus and request.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from actgraph.calibrate.accumulators import Accumulator
from actgraph.calibrate.statistics import Request, Statistics
from actgraph.errors import ActgraphError, InputError

Array = np.ndarray[Any, Any]

#: Changes when what is stored changes its meaning.
VERSION = "3"
#: The folder of the cache; ``off`` turns it off.
VARIABLE = "ACTGRAPH_CACHE"


def save(statistics: Statistics, path: str | Path) -> Path:
    """Write ``statistics`` to a ``.safetensors`` file (whole or not at all)."""
    from safetensors.numpy import save as serialise

    arrays: dict[str, Array] = {}
    requests = []
    for number, (request, accumulator) in enumerate(statistics.accumulators.items()):
        requests.append(request.to_dict())
        for key, array in accumulator.state().items():
            arrays[f"{number}.{key}"] = np.ascontiguousarray(array).reshape(array.shape)
    metadata = {
        "actgraph.statistics": VERSION,
        "requests": json.dumps(requests),
        "documents": str(statistics.documents),
        "tokens": str(statistics.tokens),
    }
    path = Path(path)
    try:
        _write(path, serialise(arrays, metadata=metadata))
    except OSError as error:
        raise InputError(f"cannot write statistics to {path}: {error.strerror or error}") from error
    return path


def load(path: str | Path) -> Statistics:
    """Read what ``save`` wrote. Raises InputError when the file is no such thing."""
    from safetensors import safe_open

    try:
        with safe_open(str(path), framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no iterator)
    except Exception as error:  # safetensors raises its own and several built-in kinds
        raise InputError(f"cannot read statistics from {path}: {error}") from error
    if metadata.get("actgraph.statistics") != VERSION:
        raise InputError(f"{path} holds no statistics of this version of actgraph", "collect them again")
    try:
        accumulators: dict[Request, Accumulator] = {}
        for number, data in enumerate(json.loads(metadata["requests"])):
            request = Request.from_dict(data)
            prefix = f"{number}."
            accumulators[request] = request.accumulator()
            accumulators[request].load({k.removeprefix(prefix): a for k, a in arrays.items() if k.startswith(prefix)})
        return Statistics(accumulators, int(metadata["documents"]), int(metadata["tokens"]))
    except (KeyError, ValueError, TypeError, ActgraphError) as error:
        raise InputError(f"the statistics in {path} are damaged: {error!r}") from error


def _write(path: Path, data: bytes) -> None:
    """Write beside, then rename, so that readers and other processes never see half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def cache_folder() -> Path | None:
    """Where cached statistics are: ``$ACTGRAPH_CACHE``, else the user's cache folder; ``None`` when turned off."""
    chosen = os.environ.get(VARIABLE)
    if chosen is not None:
        return None if chosen in ("", "0", "off", "none") else Path(chosen)
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "actgraph"


class Cache:
    """Results of single requests for one graph and one corpus. A damaged or unwritable entry counts as absent."""

    def __init__(self, folder: Path, graph: str, corpus: str) -> None:
        self.folder = folder / "statistics" / f"{graph}-{corpus}"

    def _path(self, request: Request) -> Path:
        text = json.dumps([VERSION, request.to_dict()], sort_keys=True)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:20]}.safetensors"

    def get(self, request: Request) -> Statistics | None:
        path = self._path(request)
        if not path.is_file():
            return None
        try:
            found = load(path)
        except InputError:
            return None
        return found if set(found) == {request} else None

    def put(self, statistics: Statistics) -> None:
        for request in statistics:
            try:
                save(statistics.only([request]), self._path(request))
            except InputError:
                return  # a read-only or full cache must not stop the work
