"""``package.module:factory``: a model made by the user's own code. Importing it runs that code: trusted input only."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actgraph.errors import ActgraphError, InputError
from actgraph.formats import is_transformers_model
from actgraph.graph import Graph

if TYPE_CHECKING:
    from actgraph.graph.fx import FxGraph


_OURS = str(Path(__file__).resolve().parents[1]) + os.sep
_STANDARD = os.path.dirname(os.__file__) + os.sep


def load_factory(source: str, **options: Any) -> Graph:
    """The graph that ``factory(**options)`` makes.

    The factory returns a ``Graph``, a transformers model, or what ``actgraph.trace`` takes: ``(module, args)``,
    ``(module, args, kwargs)`` or ``(module, args, kwargs, dynamic)``. The current directory is importable.
    Raises InputError when the factory cannot be found, fails (naming the line of its code) or returns something else.
    """
    module_name, _, attribute = source.partition(":")
    factory = _find(module_name, attribute, source)
    try:
        made = factory(**options)
    except ActgraphError:
        raise
    except Exception as error:
        raise InputError(f"{source} failed: {describe(error)}") from error
    if isinstance(made, Graph):
        graph: Graph = made
    elif isinstance(made, tuple) and 2 <= len(made) <= 4:
        graph = _trace(attribute, *made)
    elif is_transformers_model(made):
        from actgraph.formats.huggingface import load_huggingface

        graph = load_huggingface(made)
    else:
        raise InputError(
            f"{source} returned a value of type {type(made).__name__}",
            "return a Graph, a transformers model, or (module, args, kwargs, dynamic)",
        )
    graph.companions.source = graph.companions.source or source
    return graph


def describe(error: Exception) -> str:
    """An exception of the user's code on one line: its kind, its message, and the line of their code that it came from."""
    text = " ".join(str(error).split())
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error.msg} (line {error.lineno} of {error.filename})"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_users(frame.filename)]
    where = f" (line {frames[-1].lineno} of {frames[-1].filename}: {frames[-1].line})" if frames else ""
    return f"{type(error).__name__}{f': {text}' if text else ''}{where}"


def _is_users(filename: str) -> bool:
    """Whether a file is neither ours nor installed nor of the standard library."""
    return not filename.startswith((_OURS, _STANDARD, "<")) and "site-packages" not in filename


def _trace(name: str, module: Any, args: Any, kwargs: Any = None, dynamic: Any = None) -> FxGraph:
    from actgraph.formats.trace import trace

    return trace(module, args, kwargs, dynamic=dynamic, name=name)


def _find(module_name: str, attribute: str, source: str) -> Any:
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
            raise InputError(f"cannot find {source}: {error}", "write importable.module:function") from error
        raise InputError(f"{source}: importing {module_name} failed: {describe(error)}") from error
    try:
        for part in attribute.split("."):
            found = getattr(found, part)
    except AttributeError as error:
        raise InputError(f"cannot find {source}: {error}", "write importable.module:function") from error
    if not callable(found):
        raise InputError(f"{source} is no function", "a factory takes keyword options and returns a model")
    return found
