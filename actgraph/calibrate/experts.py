"""Which experts a corpus uses: selections and weights of every expert, summed over each document's tokens.

One streaming forward for all blocks. Counts are exact and sums of weights are float64 with a compensation term, so the
grouping of documents into batches changes nothing beyond the last bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from actgraph.calibrate.accumulators import Sum
from actgraph.calibrate.batches import Batch, batches
from actgraph.calibrate.corpora import Corpus
from actgraph.calibrate.encode import Signature, samples
from actgraph.calibrate.progress import progress_bar
from actgraph.errors import InputError
from actgraph.formats.expert_profiles import ExpertUsage
from actgraph.graph.context import token_dims
from actgraph.graph.executor import executor_for

if TYPE_CHECKING:
    from actgraph.graph import Graph
    from actgraph.graph.recognize.router import Router

Array = np.ndarray[Any, Any]


def collect_routing(
    graph: Graph,
    routers: Mapping[str, Router],
    corpus: Any = None,
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    progress: bool = True,
) -> ExpertUsage:
    """How the documents of ``corpus`` (anything that ``Corpus.of`` takes) use the experts of ``routers`` (by block).

    Tokens of padding do not count. The arrays of the result are ``[blocks, experts]``, as wide as the widest block. Raises
    InputError for a corpus that is empty or that the graph cannot take, and for a graph without token dimensions.
    """
    opened = Corpus.of(corpus)
    dims = token_dims(graph)
    if dims is None or len(dims) != 2:
        raise InputError(f"{graph.name} has no input with batch and sequence dimensions", "experts are chosen token by token")
    signature = Signature.of(graph)
    values = [value for router in routers.values() for value in (router.chosen, router.gates)]
    runner = executor_for(graph).open(graph, list(dict.fromkeys(values)))
    width = max(router.experts for router in routers.values())
    totals = [Sum.nothing() for _ in range(4)]
    documents = tokens = 0
    with progress_bar("profiling experts", len(opened), progress) as advance:
        for batch in batches(signature, samples(graph, opened, limit=max_length), batch_size=batch_size):
            outputs = runner(batch.inputs)
            valid = _valid(batch, dims)
            lengths = valid.sum(1).astype(np.float64)
            if not lengths.all():
                raise InputError(f"a document of the corpus {opened.name} has no tokens", "leave it out")
            counts = [_per_document(outputs, router, valid, width) for router in routers.values()]
            selections, weights = (np.stack([pair[i] for pair in counts], axis=1) for i in (0, 1))
            by_length = lengths[:, None, None]
            for i, rows in enumerate((selections, weights, selections / by_length, weights / by_length)):
                for row in rows:  # document by document: sums do not depend on the batches
                    totals[i] = totals[i].add(row)
            documents += batch.rows
            tokens += int(lengths.sum())
            advance(batch.rows)
    if not documents:
        raise InputError(f"the corpus {opened.name} is empty", "give a file with at least one document")
    return ExpertUsage(documents, tokens, *(total.value for total in totals))


def _valid(batch: Batch, dims: tuple[Any, ...]) -> Array:
    """Which tokens of the batch are real, ``[rows of the forward, seq]`` cut to the rows that are documents, bool."""
    mask = batch.masks.get(dims[1])
    if mask is None:
        given = next(array for array in batch.inputs.values() if array.ndim >= 2)
        mask = np.ones(given.shape[:2], bool)
    return np.asarray(mask[: batch.rows])


def _per_document(outputs: Mapping[str, Array], router: Router, valid: Array, width: int) -> tuple[Array, Array]:
    """``(selections, weights)`` of one block, ``[documents, width]`` float64 each."""
    rows, length = valid.shape
    chosen = outputs[router.chosen.name].reshape(-1, length, router.k)[:rows]
    gates = outputs[router.gates.name].astype(np.float64).reshape(-1, length, router.k)[:rows]
    if np.isnan(gates[valid]).any():
        raise InputError("the weights of experts are NaN", "find the pass or layer that makes them with `actgraph bisect`")
    place = (np.arange(rows)[:, None, None] * width + chosen)[valid].ravel()
    sizes = rows * width
    selections = np.bincount(place, minlength=sizes).astype(np.float64)
    weights = np.bincount(place, weights=gates[valid].ravel(), minlength=sizes)
    return selections.reshape(rows, width), weights.reshape(rows, width)
