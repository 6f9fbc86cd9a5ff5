"""Structural sites: the n-th of its kind in topological order, which every graph has in both dialects.

``linear.7`` and ``conv.0`` are outputs (after the bias), ``linear.7:in`` the operand that the linear reads. A norm,
activation or attention that a dialect spells as several nodes is one site; its input edge is every operand that reads the
input inside it. ``attention.3:in[0]``, ``[1]`` and ``[2]`` are query, key and value.
"""

from __future__ import annotations

from collections.abc import Iterator

from actgraph.graph.anchors import Anchor, edge_anchor, value_anchor
from actgraph.graph.graph import Use, Value
from actgraph.graph.recognize.naming import STRUCTURAL, Named, reads
from actgraph.graph.views import Views


def structural_sites(views: Views) -> Iterator[Named]:
    """All structural sites of the graph that ``views`` reads."""
    for kind, found in (("linear", views.linears()), ("conv", views.convs())):
        for i, each in enumerate(found):
            yield from _site(f"{kind}.{i}", each.output, _edge(each.input))
    for kind, pointwise in (("norm", views.norms()), ("activation", views.activations())):
        for i, unary in enumerate(pointwise):
            yield from _site(f"{kind}.{i}", unary.output, reads(views.semantics, unary.input, unary.nodes))
    for i, attention in enumerate(views.attentions()):
        yield Named(f"attention.{i}", value_anchor(attention.output), STRUCTURAL)
        for index, operand in enumerate((attention.query, attention.key, attention.value)):
            edge = reads(views.semantics, operand, attention.nodes)
            if edge is not None:
                yield Named(f"attention.{i}:in[{index}]", edge, STRUCTURAL, at=attention.output)


def _site(name: str, output: Value, edge: Anchor | None) -> Iterator[Named]:
    yield Named(name, value_anchor(output), STRUCTURAL)
    if edge is not None:
        yield Named(f"{name}:in", edge, STRUCTURAL)


def _edge(use: Use) -> Anchor | None:
    return edge_anchor([(use.node, use.index)]) if use.node is not None else None
