"""Collecting statistics: one streaming forward over a corpus for all sites."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actgraph.calibrate.batches import Batch, batches
from actgraph.calibrate.corpora import Corpus
from actgraph.calibrate.encode import Sample, Signature, samples
from actgraph.calibrate.files import VERSION, Cache, cache_folder
from actgraph.calibrate.progress import progress_bar
from actgraph.calibrate.rows import Axes, select
from actgraph.calibrate.statistics import Request, Statistics
from actgraph.errors import InputError
from actgraph.graph.executor import executor_for
from actgraph.graph.sites import SiteKind

if TYPE_CHECKING:
    from actgraph.graph import Graph, Value


def collect(
    graph: Graph,
    requests: Iterable[Request],
    corpus: Any = None,
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    max_tokens: int | None = None,
    start: int = 0,
    stop: int | None = None,
    cache: bool | str | Path = True,
    progress: bool = True,
) -> Statistics:
    """The statistics of ``requests`` over ``corpus`` (anything that ``Corpus.of`` takes).

    batch_size: documents in one forward; results do not depend on it. max_length: cut documents to that many tokens.
    max_tokens: stop after that many tokens. start, stop: the range of samples, to spread a corpus over processes (merge the
    results with ``Statistics.merge``). cache: a folder, ``False`` for none, ``True`` for the default one. progress: a bar, if
    standard error is a terminal. Raises SiteError for an unknown site, InputError for a corpus that the graph cannot take, that
    is empty, or that makes NaN.
    """
    wanted = list(dict.fromkeys(requests))
    opened = Corpus.of(corpus)
    limits = (max_length, max_tokens, start, stop)
    store = _cache(graph, opened, limits, cache) if wanted else None
    cached = {request: found for request in wanted if store is not None and (found := store.get(request)) is not None}
    missing = [request for request in wanted if request not in cached]
    fresh = Statistics()
    if missing or not wanted:
        source = limited(samples(graph, opened, limit=max_length), max_tokens, start, stop)
        fresh = _forward(graph, missing, source, batch_size, progress_bar("calibrating", len(opened), progress))
        if fresh.documents == 0:
            raise InputError(f"no document of the corpus {opened.name} is left to calibrate on", "change start and stop")
        if store is not None:
            store.put(fresh)
    known = fresh if missing else next(iter(cached.values()), fresh)
    accumulators = {request: (fresh if request in fresh else cached[request]).accumulator(request) for request in wanted}
    return Statistics(accumulators, known.documents, known.tokens)


def limited(source: Iterator[Sample], max_tokens: int | None, start: int, stop: int | None) -> Iterator[Sample]:
    """Samples ``start`` to ``stop``, ending before the one with which ``max_tokens`` would be exceeded (at least one)."""
    taken = 0
    for number, sample in enumerate(islice(source, start, stop)):
        size = len(sample["input_ids"]) if "input_ids" in sample else 1
        if max_tokens is not None and number and taken + size > max_tokens:
            return
        taken += size
        yield sample


def _cache(graph: Graph, corpus: Corpus, limits: Sequence[int | None], cache: bool | str | Path) -> Cache | None:
    folder = cache_folder() if cache is True else None if cache is False else Path(cache)
    if folder is None:
        return None
    companions = graph.companions
    digest = hashlib.sha256(f"{VERSION} {corpus.content_hash()} {list(limits)} {graph.dialect}".encode())
    if companions.tokenizer is not None:
        digest.update(companions.tokenizer.to_str().encode())
    for name in sorted(companions.tokenizer_files):
        if name in ("tokenizer_config.json", "preprocessor_config.json", "chat_template.jinja"):
            digest.update(companions.tokenizer_files[name])
    for settings in (companions.config, companions.generation_config):
        digest.update(repr(sorted((k, v) for k, v in settings.items() if isinstance(v, int))).encode())
    return Cache(folder, graph.content_hash(), digest.hexdigest()[:16])


def _forward(graph: Graph, requests: list[Request], source: Iterator[Sample], batch_size: int, bar: Any) -> Statistics:
    graph, values = locate(graph, requests)
    signature = Signature.of(graph)
    axes = {request.site: Axes.of(request.site, values[request.site].type, signature) for request in requests}
    runner = executor_for(graph).open(graph, list(dict.fromkeys(values.values())))
    result = Statistics({request: request.accumulator() for request in requests})
    pad = all(found.known for found in axes.values())
    names = {site: value.name for site, value in values.items()}
    with bar as advance:
        for batch in batches(signature, source, batch_size=batch_size, pad=pad):
            outputs = runner(batch.inputs)
            for request in requests:
                _update(result, request, outputs[names[request.site]], axes[request.site], batch)
            result.documents += batch.rows
            result.tokens += batch.tokens
            advance(batch.rows)
    return result


def _update(result: Statistics, request: Request, array: Any, axes: Axes, batch: Batch) -> None:
    x, positions = select(request, array, axes, batch)
    try:
        result.accumulators[request].update(x, positions)
    except InputError as error:
        raise InputError(f"calibration at {request.site}: {error.message}", error.hint) from error


def locate(graph: Graph, requests: Iterable[Request]) -> tuple[Graph, dict[str, Value]]:
    """The value that each requested site denotes now, by the site's name.

    Virtual sites are materialised on a clone, which is then the graph returned; ``graph`` itself is not changed.
    Raises SiteError for an unknown site.
    """
    names = list(dict.fromkeys(request.site for request in requests))
    if any(graph.site(name).kind is SiteKind.VIRTUAL for name in names):
        graph = graph.clone()
        with graph.edit("calibrate") as editor:
            for name in names:
                if graph.site(name).kind is SiteKind.VIRTUAL:
                    editor.site_value(graph.site(name))
    return graph, {name: graph.site(name).value for name in names}
