"""Where passes are found: the built-in table, packages that register entry points, and classes registered by hand.

Nothing is imported before it is asked for: the tables hold ``"module:Class"``. A name may be taken once only.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import re

from actgraph.errors import OptionError, PassError
from actgraph.pipeline.base import Pass
from actgraph.pipeline.suggest import nearest

#: Packages add passes under this entry point group: ``my_pass = "package.module:Class"``.
ENTRY_POINTS = "actgraph.passes"
_BUILT_IN = "actgraph.passes"
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")

_by_hand: dict[str, type[Pass]] = {}


@functools.cache
def _table() -> dict[str, str]:
    """Name -> ``"module:Class"`` of built-in passes and entry points. Raises PassError on a clash."""
    table: dict[str, str] = dict(importlib.import_module(_BUILT_IN).PASSES)
    for point in sorted(importlib.metadata.entry_points(group=ENTRY_POINTS), key=lambda p: (p.name, p.value)):
        if table.get(point.name, point.value) != point.value:
            raise PassError(
                f"two passes are called {point.name!r}: {table[point.name]} and {point.value}",
                "uninstall one of the packages, or rename its entry point",
            )
        table[point.name] = point.value
    return table


def pass_names() -> list[str]:
    """The names of all passes, sorted."""
    return sorted({*_table(), *_by_hand})


def get_pass_class(name: str) -> type[Pass]:
    """The class of the pass called ``name``. Raises OptionError naming the nearest passes, PassError if it cannot load."""
    if name in _by_hand:
        return _by_hand[name]
    table = _table()
    if name not in table:
        raise OptionError(f"there is no pass {name!r}", nearest(name, pass_names()))
    return _load(name, table[name])


@functools.cache
def _load(name: str, path: str) -> type[Pass]:
    module, _, attribute = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise PassError(f"pass {name!r} cannot be loaded from {path}: {error}") from error
    _check(found, name)
    return found  # type: ignore[no-any-return]


def all_passes() -> dict[str, type[Pass]]:
    """Every pass by name (imports all of them)."""
    return {name: get_pass_class(name) for name in pass_names()}


def register(cls: type[Pass]) -> type[Pass]:
    """Class decorator that makes a pass of a script or notebook known by its name.

    Defining the same class again (a notebook cell run twice) replaces it; another class of that name raises PassError.
    """
    _check(cls, cls.__dict__.get("name", ""))
    name = cls.name
    other = _table().get(name)
    mine = f"{cls.__module__}:{cls.__qualname__}"
    known = _by_hand.get(name)
    if known is not None:
        other = f"{known.__module__}:{known.__qualname__}"
    if other is not None and other != mine:
        raise PassError(f"a pass called {name!r} exists already ({other})", "choose another name")
    _by_hand[name] = cls
    return cls


def unregister(name: str) -> None:
    """Forget a pass that ``register`` added."""
    _by_hand.pop(name, None)


def _check(cls: object, name: str) -> None:
    if not (inspect.isclass(cls) and issubclass(cls, Pass)):
        raise PassError(f"pass {name!r} is {cls!r}, which is not a subclass of actgraph.pipeline.Pass")
    if inspect.isabstract(cls):
        raise PassError(f"pass {name!r} ({cls.__qualname__}) has no run method")
    if not _NAME.fullmatch(name):
        raise PassError(f"{name!r} cannot be the name of a pass", "use letters, digits, '-' and '_', beginning with a letter")
    taken = [option for option in cls.model_fields if hasattr(Pass, option)]
    if taken:
        raise PassError(
            f"pass {name!r} has an option called {taken[0]!r}, which every pass has as a member", "rename the option"
        )
    if cls.name != name:
        raise PassError(f"pass {name!r} calls itself {cls.name!r}", "its `name` must be the one that it is registered under")
