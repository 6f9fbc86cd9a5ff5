"""Choosing linears and convolutions by ``site``: what weight passes share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from actgraph.errors import PassError
from actgraph.graph import Graph, Value
from actgraph.graph.recognize.experts import expert_products
from actgraph.graph.sites import Anchor
from actgraph.graph.views import Convolution, Linear, Views
from actgraph.passes.places import Selector

Weighted = TypeVar("Weighted", Linear, Convolution)


@dataclass(frozen=True)
class Places:
    """What a selector covers: value sites by value, edge sites by (node, operand index)."""

    values: frozenset[Value]
    edges: frozenset[tuple[object, int]]

    @staticmethod
    def of(graph: Graph, selector: Selector) -> Places:
        """What is selected. Raises SiteError when a selector matches nothing."""
        return Places._from(site.anchor for site in graph.sites(selector)) if selector else Places(frozenset(), frozenset())

    @staticmethod
    def ignored(graph: Graph, ignore: Selector) -> Places:
        """What is left out; patterns may match nothing."""
        return Places._from(graph.site_table.ignored(graph, ignore)) if ignore else Places(frozenset(), frozenset())

    @staticmethod
    def _from(anchors: Iterable[Anchor]) -> Places:
        listed = list(anchors)
        return Places(
            frozenset(anchor.value for anchor in listed if anchor.value is not None),
            frozenset(edge for anchor in listed for edge in anchor.edges),
        )

    def covers(self, weighted: Linear | Convolution) -> bool:
        """Whether the selector names the operator's output or its input edge."""
        return weighted.output in self.values or (weighted.input.node, weighted.input.index) in self.edges

    def covers_input(self, linear: Linear) -> bool:
        """Whether the selector names the linear's input: its edge, or the value that the edge reads."""
        return (linear.input.node, linear.input.index) in self.edges or input_value(linear) in self.values


def input_value(weighted: Linear | Convolution) -> Value:
    """The value that the operator reads now."""
    node = weighted.input.node
    value = node.operands[weighted.input.index] if node is not None else None
    if value is None:
        raise PassError(f"the operator behind {weighted.output.name} has no input")
    return value


def edge_name(graph: Graph, weighted: Linear | Convolution) -> str:
    """The name of the operator's input edge, as sites spell it."""
    node, index = weighted.input
    name = graph.site_table.edge_name(node, index) if node is not None else ""
    return name or f"%{input_value(weighted).name}"


def chosen(graph: Graph, weighted: Sequence[Weighted], site: Selector, ignore: Selector) -> list[Weighted]:
    """Those of ``weighted`` that ``site`` names (all of them when empty) and ``ignore`` does not."""
    wanted, unwanted = Places.of(graph, site), Places.ignored(graph, ignore)
    return [w for w in weighted if (not site or wanted.covers(w)) and not unwanted.covers(w)]


def check_selectors(graph: Graph, site: Selector, acts: Callable[[Places], bool], what: str) -> None:
    """Raises PassError for a selector that names sites but nothing that the pass acts on (``acts``): asked for, not done."""
    for selector in (site,) if isinstance(site, str) else site:
        if selector and not acts(Places.of(graph, selector)):
            raise PassError(f"{selector!r} names no {what}", "list the sites with `actgraph sites MODEL`")


def expert_weights(graph: Graph, views: Views, site: Selector, ignore: Selector) -> list[tuple[str, str]]:
    """``(value, reason)`` for each selected product of a mixture of experts: no linear of its own, so passes over linears
    decline it."""
    wanted, unwanted = Places.of(graph, site), Places.ignored(graph, ignore)
    found = []
    for product in expert_products(views.semantics):
        around = {product.rows, product.output}
        if (not site or around & wanted.values) and not around & unwanted.values:
            weight = next((v for v in _constants(product.weights) if v.is_parameter), product.weights)
            found.append((product.output.name, f"{weight.name} holds the matrices of {product.experts} experts"))
    return found


def _constants(value: Value) -> Iterable[Value]:
    """A constant and what its first operands are made of."""
    yield value
    while value.producer is not None and value.producer.operands and value.producer.operands[0] is not None:
        value = value.producer.operands[0]
        yield value
