"""Extracting steering vectors from contrasting texts: one streaming run for each set, and a method for what it saw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from actgraph.calibrate.corpora import Corpus
from actgraph.calibrate.document_rows import check_width, collect_rows, pooled_request
from actgraph.calibrate.engine import collect
from actgraph.calibrate.statistics import Statistic, Statistics
from actgraph.errors import InputError
from actgraph.formats.vectors import SteeringVector
from actgraph.graph import Graph, Site
from actgraph.passes.steer.logistic import logistic
from actgraph.passes.steer.pca import pca, pca_of_differences

Array = np.ndarray[Any, Any]

#: Methods that look at the vectors of all documents: ``(positive [n, width], negative [m, width]) -> [width]``.
OF_ROWS: dict[str, Callable[[Array, Array], Array]] = {
    "pca": pca,
    "pca_of_differences": pca_of_differences,
    "logistic": logistic,
}
METHODS = ("mean_difference", *OF_ROWS)
Method = Literal["mean_difference", "pca", "pca_of_differences", "logistic"]


def extract_vector(
    graph: Graph,
    positive: Any,
    negative: Any,
    *,
    site: str | Sequence[str],
    method: Method = "mean_difference",
    position: str = "last",
    where: str = "all",
    batch_size: int = 8,
    max_length: int | None = None,
    cache: bool | str | Path = True,
    progress: bool = True,
) -> SteeringVector:
    """The direction from ``negative`` to ``positive`` at each site.

    positive, negative: corpora (a file with a text a line, a list of texts, prompts with responses ...); they need not be of
    one size, except for ``pca_of_differences``, which takes them as pairs.
    site: one selector or several; the vector holds a ``[width]`` float32 direction for each site matched.
    method: ``mean_difference`` (CAA), ``pca`` (first component of both sets), ``pca_of_differences`` (of pairs) or ``logistic``
    (a probe). Directions of all methods point from negative to positive and are as long as the difference of means, so that a
    scale means the same.
    position: what of a document is looked at: ``last``, ``mean``, ``response``, ``span`` or ``first:K`` (see
    ``actgraph.calibrate.document_rows``). where: a clause that tokens must meet as well.
    progress: show a progress bar on a terminal.

    The sums are float64 and do not depend on the batch size. Raises InputError when the two sets cannot be told apart,
    OptionError for an unknown position or clause, and SiteError when ``site`` matches nothing or a place whose last axis has
    no fixed size (attention probabilities).
    """
    if method != "mean_difference" and method not in OF_ROWS:
        raise InputError(f"there is no extraction {method!r}", f"methods are mean_difference, {', '.join(OF_ROWS)}")
    sites = graph.sites(site)
    for each in sites:
        check_width(each)
    corpora = [Corpus.of(source) for source in (positive, negative)]
    options = {"batch_size": batch_size, "max_length": max_length, "cache": cache, "progress": progress}
    if method == "mean_difference":
        differences = _means(graph, sites, corpora, position, where, options)
    else:
        names = [each.name for each in sites]
        rows = [collect_rows(graph, names, corpus, position=position, where=where, **options) for corpus in corpora]  # type: ignore[arg-type]
        differences = {name: _told_apart(rows[0][name], rows[1][name], name, OF_ROWS[method]) for name in names}
    for name, difference in differences.items():
        if not np.any(difference):
            raise InputError(f"positive and negative texts give the same mean at {name}", "use sets that differ")
    counts = {key: str(len(corpus)) for key, corpus in zip(("positive", "negative"), corpora, strict=True)}
    notes = counts if where == "all" else counts | {"where": where}  # of the texts: where to steer is another question
    directions = {name: difference.astype(np.float32) for name, difference in differences.items()}
    return SteeringVector.extracted(graph, directions, method=method, position=position, notes=notes)


def _means(
    graph: Graph, sites: Sequence[Site], corpora: Sequence[Corpus], position: str, where: str, options: dict[str, Any]
) -> dict[str, Array]:
    """The differences of the means over documents, of which no rows are kept."""
    requests = {site.name: pooled_request(site.name, Statistic.MEAN, position, where) for site in sites}
    found: list[Statistics] = [collect(graph, requests.values(), corpus, **options) for corpus in corpora]
    return {name: found[0].array(request) - found[1].array(request) for name, request in requests.items()}


def _told_apart(positive: Array, negative: Array, site: str, method: Callable[[Array, Array], Array]) -> Array:
    if np.array_equal(positive.mean(0, dtype=np.float64), negative.mean(0, dtype=np.float64)):
        return np.zeros(positive.shape[1])
    try:
        return method(positive, negative)
    except InputError as error:
        raise InputError(f"{site}: {error.message}", error.hint) from error
