"""Folding: edits that earlier passes inserted are moved into weights and biases, where they cost nothing."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from actgraph.errors import PassError
from actgraph.graph import Editor, Graph, Node, Site, SiteKind, Use
from actgraph.ops.dtypes import DType
from actgraph.passes.places import Selector, SitePass
from actgraph.passes.steer.edits import EDITS
from actgraph.passes.steer.folding import Folding, fold_edit, site_of
from actgraph.passes.steer.merging import merge_edits
from actgraph.pipeline.base import ROUNDING, Declined, PassContext, PassResult

#: How far outputs may move where weights are rounded to half precision once more.
_HALF = {DType.F16: 0.05, DType.BF16: 0.3}


class FoldEdits(SitePass):
    """Move shifts, low-rank maps and channel scales that earlier passes inserted into biases and weights.

    A shift moves into the bias of what writes the site (or, where all readers are linears with biases, into theirs), a
    linear map into the weights of what writes it or of all that read it. Each edit is reported with the rule that was used
    and why it computes the same, or what stands against folding it: other readers, a mask, a strength given at run time,
    quantized weights ... Edits that follow each other for the same tokens are merged first. What is folded is recorded in the
    graph and its files, and ``unfold`` takes it out again, weights bit for bit; the record takes a few percent of the size of
    each weight that a map was folded into, and next to nothing for biases.
    """

    name: ClassVar[str] = "fold_edits"
    family: ClassVar[str] = "steer"
    repeatable: ClassVar[bool] = True

    site: Selector = Field(default=(), description="Fold the edits at these sites; default: all that there are.")

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        edits = self._edits(graph)
        if not edits:
            raise PassError("fold_edits found no edit", "insert one first: steer{... fold=false}, or choose another site")
        result = PassResult()
        with context.edit(graph) as editor:
            left = _merge(graph, editor, edits, result)
            done = _fold(graph, editor, left)
        for folding in done:
            result.counts[folding.rule] += folding.folded
            if not folding.folded:
                result.declined.append(Declined(folding.site, f"{folding.op}: {folding.condition}"))
            row = {"site": folding.site, "op": folding.op, "rule": folding.rule, "condition": folding.condition}
            result.details.append({**row, "recorded bytes": folding.nbytes})
        result.messages += editor.messages
        if not any(folding.folded for folding in done):
            reasons = "; ".join(f"{each.site}: {each.reason}" for each in result.declined[:5])
            raise PassError(f"fold_edits folded nothing: {reasons}", "leave the pass out: the edits work as they are")
        result.expected_change, result.expected_size = promise(graph)
        return result

    def _edits(self, graph: Graph) -> list[Node]:
        """The edits at the chosen sites, in topological order."""
        everything = [node for node in graph.nodes() if node.op in EDITS]
        if not self.site:
            dropped = {node for site in (graph.sites(self.ignore) if self.ignore else ()) for node in _edits_at(graph, site)}
            return [node for node in everything if node not in dropped]
        chosen = {node for site in self.select(graph) for node in _edits_at(graph, site)}
        return [node for node in everything if node in chosen]


def _edits_at(graph: Graph, site: Site) -> list[Node]:
    """The edits that the readers at a site, and no others, see: the last one first."""
    found: list[Node] = []
    if site.kind is SiteKind.VIRTUAL:
        return found
    node, readers = site.value.producer, set(site.uses(graph))
    while node is not None and node.op in EDITS and set(node.output.uses) <= readers:
        found.append(node)
        x = node.operands[0]
        node, readers = (x.producer if x is not None else None), {Use(node, 0)}
    return found


def promise(graph: Graph) -> tuple[str, float]:
    """Why and how far outputs may move when edits go into the weights of ``graph``, or come out."""
    types = {parameter.dtype for parameter in graph.parameters()}
    rounded = [size for dtype, size in _HALF.items() if dtype in types]
    return ("weights are rounded to half precision" if rounded else "exact"), max([ROUNDING, *rounded])


def _merge(graph: Graph, editor: Editor, edits: list[Node], result: PassResult) -> list[Node]:
    left: list[Node] = []
    for node in edits:
        site = site_of(graph, node)
        merged = merge_edits(graph, editor, node) if left else None
        if merged is None:
            left.append(node)
            continue
        result.counts["merged"] += 1
        result.details.append({"site": site, "op": merged.op, "rule": "merged", "condition": "one op, place and clause"})
    return left


def _fold(graph: Graph, editor: Editor, edits: list[Node]) -> list[Folding]:
    """Fold what can be; an edit may become possible when its neighbour is gone, so those that are left are tried again."""
    folded: list[Folding] = []
    sites = {node: site_of(graph, node) for node in edits}
    while True:
        declined: dict[Node, Folding] = {}
        for node in edits:
            folding = fold_edit(graph, editor, node, site=sites[node])
            if folding.folded:
                folded.append(folding)
            else:
                declined[node] = folding
        if len(declined) in (0, len(edits)):
            return folded + list(declined.values())
        edits = list(declined)
