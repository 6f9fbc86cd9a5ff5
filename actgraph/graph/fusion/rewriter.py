"""What the rules of fusion share: the editor, what was done and declined, and the weights that were laid out anew."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from actgraph.errors import UnsupportedError
from actgraph.graph.editor import Editor
from actgraph.graph.evaluate import evaluate
from actgraph.graph.graph import Array, Graph, Node, Use, Value
from actgraph.ops.shapes import Shape

#: Whether a place is to be fused, by the values it gives and the operand edges that read its input.
Chooser = Callable[[Sequence[Value], Sequence[Use]], bool]


def everything(values: Sequence[Value], edges: Sequence[Use]) -> bool:
    """The ``Chooser`` of every place."""
    return True


@dataclass
class Fused:
    """counts: applications per rule (``linear``, ``feed_forward``, ``rms_norm``, ``layer_norm``, ``rotary``,
    ``attention``).

    declined: ``(value, reason)`` of places that a rule is meant for and could not take.
    """

    counts: Counter[str] = field(default_factory=Counter)
    declined: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Rewriter:
    """One run of ``fuse``."""

    editor: Editor
    chosen: Chooser
    dense: bool
    gates: bool = True
    result: Fused = field(default_factory=Fused)
    _made: dict[tuple[Value, str], Value] = field(default_factory=dict)

    @property
    def graph(self) -> Graph:
        return self.editor.graph

    def done(self, rule: str) -> None:
        self.result.counts[rule] += 1

    def decline(self, place: Value, reason: str) -> None:
        """Record a refusal under the name by which users know the place."""
        names = self.graph.site_table.names_of(place)
        name = self.graph.site_table.role_name_of(place) or (names[0] if names else place.name)
        self.result.declined.append((name, reason))

    def stored(self, value: Value, form: str, make: Callable[[Array], Array]) -> Value:
        """The parameter ``<value>_<form>``, made from a constant once however many places ask for it."""
        key = (value, form)
        if key not in self._made:
            data = np.ascontiguousarray(make(evaluate(self.graph, value)))
            self._made[key] = self.editor.add_parameter(f"{value.name}_{form}", data)
        return self._made[key]

    def vector(self, value: Value | None) -> Value | None:
        """A constant of n values, stored as [n]. What is computed stays so, such as ones in the size of an input."""
        flat = value is not None and len(value.shape or ()) == 1
        if value is None or (value.is_parameter and flat):
            return value
        try:
            return self.stored(value, "vector", lambda data: data.reshape(-1))
        except UnsupportedError:
            if flat:
                return value
            raise


def same_shape(left: Shape | None, right: Shape | None) -> bool:
    """Whether two shapes are known to have one rank and no sizes that differ."""
    if left is None or right is None or len(left) != len(right):
        return False
    return all(a == b or a is None or b is None for a, b in zip(left, right, strict=True))


def sole_user(value: Value) -> Node | None:
    """The one node that reads the value, through one operand or several; ``None`` where others or a graph output do."""
    nodes = {use.node for use in value.uses}
    return nodes.pop() if len(nodes) == 1 else None


def private(nodes: Sequence[Node], output: Value) -> bool:
    """Whether nothing outside ``nodes`` reads what they compute, except ``output``. Casts and reshapes between them that
    nothing else reads count as theirs."""
    inside = set(nodes)

    def own(node: Node | None, depth: int = 4) -> bool:
        if node is None:
            return False
        if node in inside:
            return True
        prim = node.prim
        if depth == 0 or prim is None or prim.op not in ("cast", "identity", "reshape", "expand"):
            return False
        uses = prim.output.uses
        return bool(uses) and all(own(use.node, depth - 1) for use in uses)

    return all(own(use.node) for node in nodes for value in node.outputs if value != output for use in value.uses)
