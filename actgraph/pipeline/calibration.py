"""When statistics are collected, and which passes share one forward over the corpus.

Rule: a pass sees statistics of the graph as the former passes left it. Requests of consecutive passes are collected together
only as far as that changes nothing: looking ahead from a pass stops after the first pass that does not preserve values
(``"values" in Pass.preserves``: every surviving site keeps its numbers). When a later pass of the group comes to run, its
requests are made again on the graph of that moment; what was collected for the same site and statistic is reused, the rest is
collected then. Everything collected is dropped as soon as a pass has run that does not preserve values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from actgraph.calibrate.statistics import Request, Statistics
from actgraph.errors import ActgraphError
from actgraph.pipeline.base import Pass

if TYPE_CHECKING:
    from actgraph.graph import Graph
    from actgraph.pipeline.pipeline import Pipeline

#: ``collect(graph, requests) -> Statistics``.
Collect = Callable[["Graph", list[Request]], Statistics]


class Calibrator:
    """The statistics of one run. ``forwards`` counts the passes over the corpus."""

    def __init__(self, collect: Collect) -> None:
        self.collect = collect
        self.forwards = 0
        self._known: dict[Request, Any] = {}
        self._size = (0, 0)

    def statistics(self, graph: Graph, pipeline: Pipeline, index: int) -> Statistics | None:
        """What pass ``index`` asked for on ``graph`` as it is now; ``None`` when it asked for nothing."""
        wanted = list(dict.fromkeys(pipeline.passes[index].requests(graph)))
        if not wanted:
            return None
        missing = [request for request in wanted if request not in self._known]
        if missing:
            ahead = [request for request in self._ahead(graph, pipeline, index) if request not in self._known]
            found = self.collect(graph, list(dict.fromkeys(missing + ahead)))
            self.forwards += 1
            self._known.update(found.accumulators)
            self._size = (found.documents, found.tokens)
        return Statistics({request: self._known[request] for request in wanted}, *self._size)

    def ran(self, step: Pass) -> None:
        """``step`` has run: what was collected before holds only if it preserves values."""
        if "values" not in step.preserves:
            self._known.clear()

    def _ahead(self, graph: Graph, pipeline: Pipeline, index: int) -> list[Request]:
        """Requests of later passes that hold already now."""
        found: list[Request] = []
        for position in range(index, len(pipeline) - 1):
            if "values" not in pipeline.passes[position].preserves:
                break
            try:
                found += pipeline.passes[position + 1].requests(graph)
            except ActgraphError:
                break  # it needs what a pass between makes first; it is asked again when its turn comes
        return found
