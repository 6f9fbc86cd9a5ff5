"""One result for each document: what statistics over all tokens of a corpus cannot tell apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from actgraph.calibrate.batches import batches
from actgraph.calibrate.corpora import Corpus
from actgraph.calibrate.encode import Signature, samples
from actgraph.calibrate.engine import locate
from actgraph.calibrate.progress import progress_bar
from actgraph.calibrate.rows import Axes
from actgraph.calibrate.statistics import Request, Statistic
from actgraph.errors import InputError
from actgraph.graph.executor import executor_for

if TYPE_CHECKING:
    from actgraph.graph import Graph

Array = np.ndarray[Any, Any]


def per_document(
    graph: Graph,
    site: str,
    corpus: Any,
    function: Callable[[Array], Array],
    *,
    axis: int = -1,
    batch_size: int = 8,
    max_length: int | None = None,
    progress: bool = True,
) -> Array:
    """``function`` of the activations of each document, ``[documents, ...]`` in the order of the corpus.

    function: takes the activations of a document's tokens, ``[tokens, channels]`` without padding, and returns an array of one
    shape for all documents. axis: the channel axis of the site. max_length: cut documents to that many tokens. Results do not
    depend on ``batch_size``, but for the rounding of the model. Raises SiteError for an unknown site and InputError for a site
    whose rows of a batch cannot be told apart, and for NaN.
    """
    request = Request(site, Statistic.COUNT)
    located, values = locate(graph, [request])
    value = values[site]
    signature = Signature.of(located)
    axes = Axes.of(site, value.type, signature)
    if axes.batch != 0 or axes.flat is not None or len(axes.tokens) > 1:
        raise InputError(f"{site} ({value.type}) has no rows of documents", "choose a site such as blocks.2.resid_post")
    run = executor_for(located).open(located, [value])
    opened = Corpus.of(corpus)
    results: dict[int, Array] = {}
    source = samples(located, opened, limit=max_length)
    with progress_bar("reading", len(opened), progress) as advance:
        for batch in batches(signature, source, batch_size=batch_size, pad=axes.known):
            array = run(batch.inputs)[value.name]
            rows = np.moveaxis(array.astype(np.float32, copy=False), axis, -1)
            for row, index in enumerate(batch.indices):
                tokens = rows[row]
                if axes.tokens:
                    place, size = axes.tokens[0]
                    place -= 1 + (axis % array.ndim < place)  # of a row, with the channels moved behind
                    tokens = np.compress(batch.masks[size][row], tokens, axis=place)
                flat = tokens.reshape(-1, rows.shape[-1])
                if np.isnan(flat).any():
                    raise InputError(f"the activations at {site} are NaN in document {index}", "find the pass that makes them")
                results[index] = function(flat)
            advance(batch.rows)
    if not results:
        raise InputError(f"no document of the corpus {opened.name} could be read")
    return np.stack([results[index] for index in sorted(results)])
