"""``package.module:factory``: a model made by the user's own code. Importing it runs that code: trusted input only."""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

from actgraph.errors import InputError
from actgraph.formats import is_transformers_model
from actgraph.graph import Graph

if TYPE_CHECKING:
    from actgraph.graph.fx import FxGraph


def load_factory(source: str, **options: Any) -> Graph:
    """The graph that ``factory(**options)`` makes.

    The factory returns a ``Graph``, a transformers model, or what ``actgraph.trace`` takes: ``(module, args)``,
    ``(module, args, kwargs)`` or ``(module, args, kwargs, dynamic)``. The current directory is importable.
    Raises InputError when the factory cannot be found or returns something else.
    """
    module_name, _, attribute = source.partition(":")
    factory = _find(module_name, attribute, source)
    made = factory(**options)
    if isinstance(made, Graph):
        graph: Graph = made
    elif isinstance(made, tuple) and 2 <= len(made) <= 4:
        graph = _trace(attribute, *made)
    elif is_transformers_model(made):
        from actgraph.formats.huggingface import load_huggingface

        graph = load_huggingface(made)
    else:
        raise InputError(
            f"{source} returned a {type(made).__name__}",
            "return a Graph, a transformers model, or (module, args, kwargs, dynamic)",
        )
    graph.companions.source = graph.companions.source or source
    return graph


def _trace(name: str, module: Any, args: Any, kwargs: Any = None, dynamic: Any = None) -> FxGraph:
    from actgraph.formats.trace import trace

    return trace(module, args, kwargs, dynamic=dynamic, name=name)


def _find(module_name: str, attribute: str, source: str) -> Any:
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise InputError(f"cannot find {source}: {error}", "write importable.module:function") from error
    if not callable(found):
        raise InputError(f"{source} is no function", "a factory takes keyword options and returns a model")
    return found
