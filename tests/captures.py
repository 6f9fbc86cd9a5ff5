"""Captures that test processes share: each is made once for a state of the sources, and then read from a file."""

from __future__ import annotations

import functools
import getpass
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import torch
import transformers
from filelock import FileLock

import actgraph
from actgraph import formats
from actgraph.graph.fx import FxGraph

_CAPTURING = ("errors.py", "data", "formats", "graph", "ops")


def folder() -> Path:
    """Where test processes of one user leave what others may read."""
    place = Path(tempfile.gettempdir()) / f"actgraph-zoo-{getpass.getuser()}"
    place.mkdir(parents=True, exist_ok=True)
    return place


def shared(name: str, capture: Callable[[], Any], recipe: str) -> FxGraph:
    """What ``capture()`` gives, or what it gave for the same sources; recipe: the text of the code that makes the model."""
    key = hashlib.sha256(f"{_sources()}\n{recipe}".encode()).hexdigest()[:12]
    path = folder() / f"{name}-{key}.pt2"
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            graph: FxGraph = capture()
            beside = path.with_suffix(f".{os.getpid()}.tmp.pt2")
            graph.save(beside)
            beside.replace(path)
            return graph
    graph = formats.load(path)
    assert isinstance(graph, FxGraph)
    return graph


@functools.cache
def _sources() -> str:
    """Changes with the code that captures, saves and loads, and with the libraries that it calls."""
    root = Path(actgraph.__file__).parent
    digest = hashlib.sha256()
    for part in _CAPTURING:
        place = root / part
        for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    versions = [module.__version__ for module in (torch, transformers, onnx, onnx_ir)]
    return f"{digest.hexdigest()} {versions}"
