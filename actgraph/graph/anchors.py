"""What a site is: a name, and an anchor that says where in the graph it is."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from actgraph.errors import SiteError
from actgraph.graph.graph import Graph, Node, Use, Value
from actgraph.ops.shapes import UNKNOWN, TensorType


class SiteKind(enum.StrEnum):
    VALUE = "value"  # a value with all its readers
    EDGE = "edge"  # one operand of one node
    VIRTUAL = "virtual"  # inside a fused op; materialised when a pass edits or reads it


@dataclass(frozen=True)
class Anchor:
    """Where a site is in the graph.

    VALUE: ``value``. EDGE: ``node`` and operand ``index`` (``value`` is looked up when asked); ``more`` holds the other
    operands of the same edge where one logical reader (a norm, a module) is several nodes. VIRTUAL: ``node`` is the fused
    op, ``recipe`` names how to materialise it (``attention_pattern``, ``expert:3`` ...) and ``type`` is what it will be.
    """

    kind: SiteKind
    value: Value | None = None
    node: Node | None = None
    index: int = -1
    recipe: str = ""
    more: tuple[tuple[Node, int], ...] = ()
    type: TensorType = UNKNOWN

    @property
    def edges(self) -> tuple[tuple[Node, int], ...]:
        """The operands of an edge: ``(node, index)`` each."""
        return ((self.node, self.index), *self.more) if self.node is not None and self.index >= 0 else ()

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for two anchors exactly when they denote the same place."""
        if self.kind is SiteKind.VALUE:
            return ("value", self.value)
        if self.kind is SiteKind.EDGE:
            return ("edge", frozenset(self.edges))
        return ("virtual", self.node, self.recipe)


def value_anchor(value: Value) -> Anchor:
    """The anchor of a value with all its readers."""
    return Anchor(SiteKind.VALUE, value=value)


def edge_anchor(edges: Sequence[tuple[Node, int]]) -> Anchor:
    """The anchor of one edge, which may be several operands that read the same value."""
    (node, index), *more = edges
    return Anchor(SiteKind.EDGE, node=node, index=index, more=tuple(more))


def virtual_anchor(node: Node, recipe: str, type: TensorType) -> Anchor:
    """The anchor of a tensor inside the fused op ``node``."""
    return Anchor(SiteKind.VIRTUAL, node=node, recipe=recipe, type=type)


@dataclass(frozen=True)
class Site:
    """One site as it is now.

    name: the role name that a selector asked for, else the canonical name. aliases: the other names of the same site.
    role: ``resid_post``, ``hidden``, ``linear`` ... (the last part of the name without its index), or ``module``.
    """

    name: str
    kind: SiteKind
    role: str
    type: TensorType
    anchor: Anchor
    aliases: tuple[str, ...] = ()

    @property
    def graph(self) -> Graph:
        holder = self.anchor.value if self.anchor.value is not None else self.anchor.node
        assert holder is not None
        return holder.graph

    @property
    def value(self) -> Value:
        """The value its readers see now. Raises SiteError for a virtual site that was not materialised."""
        return read_anchor(self.name, self.graph.site_table.current(self))

    def uses(self, graph: Graph) -> tuple[Use, ...]:
        """The readers that an edit at this site affects: all uses of a value, or the one operand of an edge."""
        anchor = graph.site_table.current(self)
        if anchor.kind is SiteKind.EDGE:
            return tuple(Use(node, index) for node, index in anchor.edges)
        return read_anchor(self.name, anchor).uses

    def __repr__(self) -> str:
        return f"<{self.name}: {self.type}{'' if self.kind is SiteKind.VALUE else ' ' + self.kind.value}>"


def read_anchor(name: str, anchor: Anchor) -> Value:
    """The value that an anchor denotes now."""
    if anchor.kind is SiteKind.VALUE:
        assert anchor.value is not None
        return anchor.value
    if anchor.kind is SiteKind.VIRTUAL:
        raise SiteError(
            f"{name} is inside the fused op {anchor.node.name if anchor.node else '?'} and has no value yet",
            "Editor.site_value(site) takes the op apart and gives it one",
        )
    seen: list[Value] = []
    for node, index in anchor.edges:
        operand = node.operands[index]
        if operand is None:
            raise SiteError(f"operand {index} of {node.name}, which {name} names, is absent now", "choose another site")
        if operand not in seen:
            seen.append(operand)
    if len(seen) > 1:
        raise SiteError(
            f"the readers at {name} no longer see one value ({', '.join('%' + v.name for v in seen)})",
            "an earlier pass edited some of them alone: name the parts, or put this pass first",
        )
    return seen[0]


def type_now(anchor: Anchor) -> TensorType:
    if anchor.kind is SiteKind.VIRTUAL:
        return anchor.type
    if anchor.value is not None:
        return anchor.value.type
    assert anchor.node is not None
    operand = anchor.node.operands[anchor.index]
    return operand.type if operand is not None else UNKNOWN


def role_of(name: str) -> str:
    """``resid_post`` of ``blocks.2.resid_post``; ``linear`` of ``linear.7:in``."""
    parts = [part for part in name.partition(":")[0].split(".") if not part.isdigit()]
    return parts[-1] if parts else name
