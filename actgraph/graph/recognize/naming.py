"""From what the recognisers found to the table of sites: one entry per place, the best of its names first."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from actgraph.graph.anchors import Anchor, SiteKind, edge_anchor, role_of, value_anchor
from actgraph.graph.graph import Graph, Node, Value
from actgraph.graph.recognize.semantic import Semantics
from actgraph.graph.sites import SiteTable

#: Kinds of names, best first: the best name of a place is its canonical one.
ROLE, STRUCTURAL, MODULE = 0, 1, 2

#: Where one value has several roles, the earlier of these is canonical (``resid_post`` is the next block's ``resid_pre``).
_ROLE_ORDER = (
    "logits", "resid_post", "embed", "resid_mid", "hidden", "head_out", "q", "k", "v", "gate", "up", "out", "norm",
)  # fmt: skip


@dataclass(frozen=True)
class Named:
    """One name found for one place.

    kind: ``ROLE``, ``STRUCTURAL`` or ``MODULE``. at: the result beside which the site is listed, where the anchor's own
    place depends on how a file spells an operator (the parts of an attention stand beside its result).
    """

    name: str
    anchor: Anchor
    kind: int
    at: Value | None = None


def reads(s: Semantics, value: Value, nodes: Iterable[Node]) -> Anchor | None:
    """The edge through which ``nodes`` read ``value`` (or a copy of it); ``None`` when they do not."""
    edges = [
        (node, index)
        for node in nodes
        for index, operand in enumerate(node.operands)
        if operand is not None and s.root(operand) == s.root(value)
    ]
    seen = {node.operands[index] for node, index in edges}
    return edge_anchor(edges) if len(seen) == 1 else None


def earliest(s: Semantics, value: Value) -> Value:
    """The same tensor before clones and dropouts, as long as nothing else reads it there."""
    while (source := s.copied_from(value)) is not None and len(s.direct_readers(source)) == 1 and not s.is_output(source):
        value = source
    return value


def build_table(s: Semantics, found: Iterable[Named]) -> SiteTable:
    """One site per place, in topological order: a value stands where it is made, an edge where it is read."""
    graph: Graph = s.graph
    places: dict[tuple[object, ...], list[Named]] = {}
    taken: set[str] = set()
    for named in found:
        if named.name not in taken:
            taken.add(named.name)
            if named.anchor.value is not None:
                named = replace(named, anchor=value_anchor(earliest(s, named.anchor.value)))
            places.setdefault(named.anchor.key, []).append(named)
    inputs = {value: place for place, value in enumerate(graph.inputs())}

    def order(names: list[Named]) -> tuple[int, int, int, str]:
        anchor, best = names[0].anchor, min(names, key=_preference).name
        beside = next((named.at for named in names if named.at is not None), None)
        if anchor.kind is SiteKind.EDGE:
            place = min(s.place(node) for node, _ in anchor.edges) if beside is None else s.position(beside)
            return (place, 0, anchor.index if beside is None else 0, best)
        if anchor.kind is SiteKind.VIRTUAL or beside is not None:
            if beside is not None:
                return (s.position(beside), 1, 0, best)
            assert anchor.node is not None
            return (s.place(anchor.node), 1, 0, best)
        value = anchor.value
        assert value is not None
        return (s.position(value), 2, inputs.get(value, 0), best)

    table = SiteTable()
    for names in sorted(places.values(), key=order):
        first, *others = sorted(names, key=_preference)
        role_names = [named.name for named in names if named.kind == ROLE]
        role = "module" if first.kind == MODULE else role_of(first.name)
        table.add(first.name, first.anchor, role, [named.name for named in others], role_names)
    return table


def _preference(named: Named) -> tuple[int, int, int]:
    if named.kind != ROLE:
        return (named.kind, len(named.name.split(".")), len(named.name))
    role = role_of(named.name)
    return (ROLE, _ROLE_ORDER.index(role) if role in _ROLE_ORDER else len(_ROLE_ORDER), 0)


def at_value(name: str, value: Value | None, kind: int) -> list[Named]:
    """The name of a value, or nothing when there is no value."""
    return [Named(name, value_anchor(value), kind)] if value is not None else []
