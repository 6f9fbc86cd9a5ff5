"""Sites: the shared language of passes.

A site is a named activation. Names are assigned once, when a graph is first asked for them, and carried by edits: a
``SiteTable`` maps each name to an *anchor*, and the editor moves anchors when readers move. What a name means is fixed in
docs/sites.md; how the names are found is in ``actgraph.graph.recognize``.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from actgraph.graph.graph import Graph, Node, Use, Value
from actgraph.ops.shapes import TensorType

if TYPE_CHECKING:
    from actgraph.graph.editor import Editor


class SiteKind(enum.StrEnum):
    VALUE = "value"  # a value with all its readers
    EDGE = "edge"  # one operand of one node
    VIRTUAL = "virtual"  # inside a fused op; materialised when a pass edits or reads it


@dataclass(frozen=True)
class Anchor:
    """Where a site is in the graph.

    VALUE: ``value``. EDGE: ``node`` and operand ``index`` (``value`` is looked up when asked). VIRTUAL: ``node`` is the fused
    op and ``recipe`` names how to materialise it (``attention_pattern``, ``expert:3`` ...).
    """

    kind: SiteKind
    value: Value | None = None
    node: Node | None = None
    index: int = -1
    recipe: str = ""


@dataclass(frozen=True)
class Site:
    """One site as it is now.

    name: the canonical name. aliases: other accepted spellings of the same site (role, structural and module names).
    role: ``resid_post``, ``hidden``, ``linear`` ... (the last part of the name without its index), or ``module``.
    """

    name: str
    kind: SiteKind
    role: str
    type: TensorType
    anchor: Anchor
    aliases: tuple[str, ...] = ()

    @property
    def value(self) -> Value:
        """The value its readers see now. Raises SiteError for a virtual site that was not materialised."""
        ...

    def uses(self, graph: Graph) -> tuple[Use, ...]:
        """The readers that an edit at this site affects: all uses of a value, or the one operand of an edge."""
        ...


@dataclass
class SiteTable:
    """All sites of one graph, in topological order. Owned by the graph; changed by the editor only."""

    anchors: dict[str, Anchor] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)  # other spelling -> canonical name
    removed: dict[str, str] = field(default_factory=dict)  # name -> pass that removed it

    def select(self, graph: Graph, selector: str | Sequence[str] | None, ignore: str | Sequence[str] = ()) -> list[Site]: ...

    def one(self, graph: Graph, name: str) -> Site: ...

    def materialise(self, editor: Editor, site: Site) -> Value: ...

    def move(self, old: Value, new: Value) -> None:
        """Value anchors on ``old`` now denote ``new``."""
        ...

    def mark_removed(self, graph: Graph, names: Sequence[str], by: str) -> None:
        """Forget anchors whose node or value (by native name) is gone, remembering who removed them."""
        ...

    def remap(self, graph: Graph, values: dict[str, str], nodes: dict[str, str]) -> SiteTable:
        """The table for another container of the same graph (a clone, an exported file), names mapped old -> new."""
        ...
