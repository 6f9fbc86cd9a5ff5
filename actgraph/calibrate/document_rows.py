"""One vector of each document at each site: what steering directions are made of."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from actgraph.calibrate.engine import collect
from actgraph.calibrate.statistics import Request, Statistic, Tokens
from actgraph.errors import OptionError, SiteError

if TYPE_CHECKING:
    from actgraph.graph import Graph, Site

Array = np.ndarray[Any, Any]

#: Which tokens of a document its vector is the mean of, by name.
POSITIONS = ("last", "mean", "response", "span", "first:K")
_TOKENS = {"last": Tokens.LAST, "mean": Tokens.ALL, "response": Tokens.RESPONSE, "span": Tokens.SPAN}


def pooled_request(site: str, kind: Statistic | str, position: str = "last", where: str = "all") -> Request:
    """A request about one vector for each document.

    position: ``last`` (the last token), ``mean`` (of all tokens), ``response`` (of those that predict the response: documents
    with a prompt and a response), ``span`` (of the marked ones), ``first:4`` (of the first four). where: a clause that tokens
    must meet as well. Raises OptionError for another position.
    """
    if position in _TOKENS:
        return Request(site, kind, axis=-1, tokens=_TOKENS[position], where=where, pool=True)
    first = re.fullmatch(r"first:([1-9][0-9]*)", position)
    if first is None:
        raise OptionError(f"there is no position {position!r}", f"positions are {', '.join(POSITIONS)}")
    clauses = f":{first[1]}" if where == "all" else " | ".join(f":{first[1]} & {part}" for part in where.split("|"))
    return Request(site, kind, axis=-1, where=clauses, pool=True)


def collect_rows(
    graph: Graph,
    sites: Sequence[str],
    corpus: Any,
    *,
    position: str = "last",
    where: str = "all",
    batch_size: int = 8,
    max_length: int | None = None,
    cache: bool | str | Path = True,
    progress: bool = True,
) -> dict[str, Array]:
    """``[documents, width]`` float32 for each site name, in the order of the corpus.

    position, where: see ``pooled_request``; other options as ``collect`` has them. Raises SiteError for a site without a fixed
    width and what ``collect`` raises.
    """
    for name in sites:
        check_width(graph.site(name))
    requests = {name: pooled_request(name, Statistic.ROWS, position, where) for name in sites}
    found = collect(
        graph, requests.values(), corpus, batch_size=batch_size, max_length=max_length, cache=cache, progress=progress
    )
    return {name: found.array(request) for name, request in requests.items()}


def check_width(site: Site) -> None:
    """A direction has one number for each channel, so the last axis must have one size for all texts. Raises SiteError."""
    shape = site.type.shape
    if shape is not None and (not shape or isinstance(shape[-1], str)):
        axis = f"its last axis is {shape[-1]}" if shape else "it is a single number"
        raise SiteError(f"site {site.name} has no fixed width: {axis}", "choose one such as blocks.1.resid_post")
