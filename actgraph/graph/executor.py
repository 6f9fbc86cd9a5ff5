"""How the compiler runs a graph without depending on an engine.

``graph``, ``calibrate`` and ``pipeline`` execute graphs (parity, calibration, bisect) through the ``Executor`` protocol.
``actgraph/__init__`` installs the engines of ``actgraph.runtime`` by import path, so nothing is imported before it is used.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from actgraph.graph.graph import Graph, Value

Arrays = Mapping[str, "np.ndarray[Any, Any]"]


class Runner(Protocol):
    """A graph made ready to run many times."""

    def __call__(self, inputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        """Outputs by name for ``inputs`` by name (numpy arrays of the declared dtypes)."""
        ...


class Executor(Protocol):
    """Opens graphs of one dialect."""

    def open(self, graph: Graph, values: Sequence[Value] = (), *, optimize: bool = True) -> Runner:
        """A runner that returns the graph's outputs and, under ``Value.name``, the extra ``values``.

        optimize: let the engine prepare the graph for many runs; without, it opens sooner and runs node by node.
        """
        ...


_PATHS: dict[str, str] = {}
_EXECUTORS: dict[str, Executor] = {}


def install_executor(dialect: str, path: str) -> None:
    """Name the executor of a dialect as ``"package.module:Class"``; it is imported when first used."""
    _PATHS[dialect] = path
    _EXECUTORS.pop(dialect, None)


def executor_for(graph: Graph) -> Executor:
    """The installed executor of the graph's dialect."""
    if graph.dialect not in _EXECUTORS:
        module, _, name = _PATHS[graph.dialect].partition(":")
        _EXECUTORS[graph.dialect] = getattr(importlib.import_module(module), name)()
    return _EXECUTORS[graph.dialect]
