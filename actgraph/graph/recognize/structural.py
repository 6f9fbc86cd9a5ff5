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
    s = views.semantics
    for i, linear in enumerate(views.linears()):
        yield from _site(f"linear.{i}", linear.output, _edge(linear.input))
    for i, conv in enumerate(views.convs()):
        yield from _site(f"conv.{i}", conv.output, _edge(conv.input))
    for i, norm in enumerate(views.norms()):
        yield from _site(f"norm.{i}", norm.output, reads(s, norm.input, norm.nodes))
    for i, activation in enumerate(views.activations()):
        yield from _site(f"activation.{i}", activation.output, reads(s, activation.input, activation.nodes))
    for i, attention in enumerate(views.attentions()):
        yield Named(f"attention.{i}", value_anchor(attention.output), STRUCTURAL)
        for index, operand in enumerate((attention.query, attention.key, attention.value)):
            edge = reads(s, operand, attention.nodes)
            if edge is not None:
                yield Named(f"attention.{i}:in[{index}]", edge, STRUCTURAL, at=attention.output)


def _site(name: str, output: Value, edge: Anchor | None) -> Iterator[Named]:
    yield Named(name, value_anchor(output), STRUCTURAL)
    if edge is not None:
        yield Named(f"{name}:in", edge, STRUCTURAL)


def _edge(use: Use) -> Anchor | None:
    return edge_anchor([(use.node, use.index)]) if use.node is not None else None
