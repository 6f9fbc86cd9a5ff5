"""The order of the nodes of one ``ir.Graph``: constant-time comparison, logarithmic insertion.

onnx_ir keeps nodes in a linked list, which cannot tell which of two nodes comes first. Every node gets an integer label
with room between neighbours; a full graph is relabelled when the room between two nodes is used up.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence

import onnx_ir as ir

_GAP = 1 << 32


class Order:
    """Nodes of ``graph`` in order, kept in step with the linked list by ``insert`` and ``rebuild``."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self._nodes: list[ir.Node] = []
        self._labels: dict[ir.Node, int] = {}
        self.rebuild()

    def rebuild(self) -> None:
        """Read the order from the linked list again (after removals, sorting or a rollback)."""
        self._nodes = list(self.graph)
        self._labels = {node: position * _GAP for position, node in enumerate(self._nodes)}

    def __iter__(self) -> Iterator[ir.Node]:
        return iter(self._nodes)

    def __len__(self) -> int:
        return len(self._nodes)

    def __contains__(self, node: object) -> bool:
        return node in self._labels

    @property
    def nodes(self) -> Sequence[ir.Node]:
        return self._nodes

    def label(self, node: ir.Node) -> int:
        """A number that grows along the order. Valid until the next insertion."""
        return self._labels[node]

    def insert_after(self, anchor: ir.Node | None, node: ir.Node) -> None:
        """Insert ``node`` after ``anchor``, or first when there is none."""
        position = 0 if anchor is None else self._position(anchor) + 1
        if not self._nodes:
            self.graph.append(node)
        elif anchor is None:
            self.graph.insert_before(self._nodes[0], node)
        else:
            self.graph.insert_after(anchor, node)
        self._record(position, node)

    def insert_before(self, anchor: ir.Node, node: ir.Node) -> None:
        position = self._position(anchor)
        self.graph.insert_before(anchor, node)
        self._record(position, node)

    def _position(self, node: ir.Node) -> int:
        return bisect.bisect_left(self._nodes, self._labels[node], key=self._labels.__getitem__)

    def _record(self, position: int, node: ir.Node) -> None:
        low = self._labels[self._nodes[position - 1]] if position > 0 else None
        high = self._labels[self._nodes[position]] if position < len(self._nodes) else None
        self._nodes.insert(position, node)
        if low is None and high is None:
            self._labels[node] = 0
        elif high is None:
            self._labels[node] = low + _GAP if low is not None else 0
        elif low is None:
            self._labels[node] = high - _GAP
        elif high - low > 1:
            self._labels[node] = (low + high) // 2
        else:
            self._labels = {other: index * _GAP for index, other in enumerate(self._nodes)}
