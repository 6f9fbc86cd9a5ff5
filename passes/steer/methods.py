"""Every method that starts from two sets of texts, by name: what ``actgraph extract-vector --method`` offers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from actgraph.errors import InputError
from actgraph.graph import Graph
from actgraph.passes.steer.extract import METHODS, extract_vector


class Extracted(Protocol):
    """What a method found; ``save`` writes the file that its pass takes."""

    def save(self, path: str | Path) -> Path: ...


def _angular(graph: Graph, positive: Any, negative: Any, **options: Any) -> Extracted:
    from actgraph.passes.steer.plane import extract_plane

    return extract_plane(
        graph, positive, negative, method="angular", **_only(options, "site", "position", "batch_size", "progress")
    )


def _selective(graph: Graph, positive: Any, negative: Any, **options: Any) -> Extracted:
    from actgraph.passes.steer.plane import extract_plane

    known = _only(options, "site", "position", "batch_size", "progress")
    return extract_plane(graph, positive, negative, method="selective", **known)


def _austeer(graph: Graph, positive: Any, negative: Any, **options: Any) -> Extracted:
    from actgraph.passes.steer.austeer import extract_momentum

    return extract_momentum(graph, positive, negative, **_only(options, "site", "batch_size", "max_length", "progress"))


def _steer2edit(graph: Graph, positive: Any, negative: Any, **options: Any) -> Extracted:
    from actgraph.passes.steer.steer2edit import steer2edit_directions

    return steer2edit_directions(graph, positive, negative, **_only(options, "batch_size", "max_length", "progress"))


def _kif(graph: Graph, positive: Any, negative: Any, **options: Any) -> Extracted:
    from actgraph.passes.steer.kif import mine_signature

    return mine_signature(graph, positive, negative, **_only(options, "site", "position", "batch_size", "progress"))


#: Methods whose files are not steering vectors: how they are made, and the pass that takes them.
OTHERS: dict[str, tuple[Callable[..., Extracted], str]] = {
    "angular": (_angular, "angular_steer{plane=FILE angle=DEGREES}"),
    "selective": (_selective, "selective_steer{plane=FILE angle=DEGREES}"),
    "austeer": (_austeer, "austeer{units=FILE k=10}"),
    "steer2edit": (_steer2edit, "steer2edit{directions=FILE rho_att=0.2 rho_mlp=0.4 a=0.7}"),
    "kif": (_kif, "kif{signature=FILE}"),
}


def extract(
    graph: Graph, positive: Any, negative: Any, *, method: str, site: str | Sequence[str] = (), **options: Any
) -> Extracted:
    """What ``method`` makes of two sets of texts, ready to ``save``.

    method: one of ``extract_vector``'s (a steering vector), or ``angular``, ``selective`` (a plane), ``austeer`` (units),
    ``steer2edit`` (directions of weights; documents with prompts and responses) or ``kif`` (positive: a subject's texts with
    its name as ``span``, negative: controls). site: default: the method's own sites; methods of vectors need it.
    options: ``position``, ``where``, ``batch_size``, ``max_length``, ``progress``, where the method has them.
    Raises InputError for a method that there is not, or an option that it does not have.
    """
    if method in METHODS:
        if not site:
            raise InputError(f"{method} gives a vector for each site, and none is named", "say --site blocks.2.resid_post")
        return extract_vector(graph, positive, negative, site=site, method=method, **options)  # type: ignore[arg-type]
    if method not in OTHERS:
        raise InputError(f"there is no extraction {method!r}", f"methods are {', '.join([*METHODS, *OTHERS])}")
    return OTHERS[method][0](graph, positive, negative, **{**options, **({"site": site} if site else {}), "method": method})


def _only(options: dict[str, Any], *known: str) -> dict[str, Any]:
    """Those of ``options`` that a method has. Raises InputError for another one that was set."""
    method = options.pop("method")
    for name, value in options.items():
        if name not in known and value not in (None, "all", "last", True) and name not in ("batch_size", "progress"):
            raise InputError(f"{method} has no {name.replace('_', '-')}", f"it has {', '.join(known)}")
    return {name: value for name, value in options.items() if name in known and value is not None}
