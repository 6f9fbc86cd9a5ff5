"""Where users know a node: its site, or else the layer that it works for.

What is executed is not what users see: nodes were fused, lowered and renamed. Values keep their names through that, and sites
are on values; a node between two sites works for the next one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from actgraph.graph.graph import Graph, Node

#: The site of nodes that work for no layer, or for several: masks, positions, tables.
OTHER = "other"


@dataclass(frozen=True)
class Wiring:
    """One executed node as far as places go: what it gives and reads, by value name, and its module scope."""

    name: str
    outputs: tuple[str, ...]
    operands: tuple[str, ...]
    scope: str = ""


@dataclass(frozen=True)
class SiteNames:
    """The sites of a graph by the name of their value. roles: those that are role names."""

    of_value: Mapping[str, str]
    roles: frozenset[str]

    @staticmethod
    def of(graph: Graph) -> SiteNames:
        table = graph.site_table
        found: dict[str, str] = {}
        roles = set()
        for node in graph.nodes():
            for value in node.outputs:
                role = table.role_name_of(value)
                names = table.names_of(value)
                if role:
                    roles.add(role)
                if role or names:
                    found[value.name] = role or names[0]
        for node in graph.nodes():
            whole = node.outputs[0].name if node.outputs else ""
            parts = _parts(node, found) if whole and whole not in found else []
            if parts:
                found[whole] = "+".join([parts[0], *(part.rpartition(".")[2] for part in parts[1:])])
                roles |= {found[whole]} if roles.issuperset(parts) else set()
        return SiteNames(found, frozenset(roles))


def _parts(node: Node, found: Mapping[str, str]) -> list[str]:
    """The sites that slices of a linear are, where it stands for several: ``blocks.0.mlp.gate`` and ``blocks.0.mlp.up``."""
    if node.op != "actgraph.linear":
        return []
    readers = [use.node.prim if use.node is not None else None for use in node.output.uses]
    if not all(reader is not None and reader.op == "slice" for reader in readers):
        return []
    return sorted(found.get(reader.output.name, "") for reader in readers if reader is not None)


def reads_sizes(op: str) -> bool:
    """Whether an op reads how large its operands are and not what is in them: it does not belong to their layer."""
    return op in _SIZES or op.startswith(("aten.sym_", "sym."))


_SIZES = frozenset(
    {"actgraph.length", "actgraph.positions", "actgraph.ring_positions", "onnx.Shape", "onnx.Size", "Shape", "Size"}
)


def layer_of(role: str) -> str:
    """``blocks.3.mlp`` for ``blocks.3.mlp.gate``; what is in no layer (``embed``, ``logits``) is its own."""
    return role.rpartition(".")[0] or role


def place(nodes: Sequence[Wiring], sites: SiteNames) -> dict[str, str]:
    """The site of each node, by name. ``nodes`` are in topological order.

    That of a value that it gives; or of the value that it is a step of, where both belong to one innermost module (a norm that
    is written out); or the layer of the sites that read it (``blocks.3.attn``); or ``"other"``.
    """
    readers: dict[str, list[Wiring]] = {}
    for node in nodes:
        for name in node.operands:
            readers.setdefault(name, []).append(node)
    inner = _innermost(node.scope for node in nodes)
    own = {node.name: _own(node, sites) for node in nodes}
    layers: dict[str, str | None] = {}  # None: nothing with a site reads it
    found: dict[str, str] = {}
    for node in reversed(nodes):
        after = [reader for name in node.outputs for reader in readers.get(name, ())]
        layer = _common([layers[reader.name] for reader in after])
        layers[node.name] = layer_of(own[node.name]) if own[node.name] in sites.roles else layer
        if own[node.name]:
            found[node.name] = own[node.name]
            continue
        into = {found[reader.name] for reader in after if reader.scope == node.scope}
        step = node.scope in inner and len(into) == 1 and all(reader.scope == node.scope for reader in after)
        found[node.name] = next(iter(into)) if step else layer or OTHER
    return found


def _own(node: Wiring, sites: SiteNames) -> str:
    names = [sites.of_value[name] for name in node.outputs if name in sites.of_value]
    return next((name for name in names if name in sites.roles), names[0] if names else "")


def _innermost(scopes: Iterable[str]) -> set[str]:
    """Scopes that no other is within."""
    every = {scope for scope in scopes if scope}
    outer = {scope[:place] for scope in every for place, letter in enumerate(scope) if letter == "."}
    return every - outer


def _common(layers: Sequence[str | None]) -> str | None:
    """The layer that all of them are in; ``""`` where there is none, ``None`` where nothing is known."""
    known = {layer for layer in layers if layer is not None}
    if len(known) < 2:
        return next(iter(known), None)
    shared = []
    for parts in zip(*(layer.split(".") for layer in known), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared) if any(part.isdigit() for part in shared) else ""


def from_neighbours(known: Sequence[str | None]) -> list[str]:
    """Sites in the order of execution, where nodes that are not known (``None``) stand in the layer that they are within."""
    before: list[str] = []
    for site in known:
        before.append(site if site is not None else before[-1] if before else OTHER)
    after: list[str] = []
    for site in reversed(known):
        after.append(site if site is not None else after[-1] if after else OTHER)
    after.reverse()
    return [
        site if site is not None else _common([layer_of(first), layer_of(last)]) or OTHER
        for site, first, last in zip(known, before, after, strict=True)
    ]
