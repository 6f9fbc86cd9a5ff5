"""Module sites: what the modules of the traced model take in and give out, from the scopes of its nodes.

The output of a module is what is made inside it (or below) and read outside; its inputs are what it reads from outside, in
the order of first use (floating-point ones before masks, positions and indices, stored data excepted). ``path`` is the
output, ``path:out[k]`` one of several; ``path:in`` is the first input and ``path:in[k]`` one of several. A module called
again is ``path@1``, ``path@2`` ... Sizes and index ranges that cross a boundary are no activations and have no site.
"""

from __future__ import annotations

from collections.abc import Iterator

from actgraph.graph.anchors import edge_anchor, value_anchor
from actgraph.graph.graph import Graph, Node, Value
from actgraph.graph.recognize.naming import MODULE, Named

Edges = list[tuple[Node, int]]


def module_sites(graph: Graph) -> Iterator[Named]:
    """All module sites; none where the graph has no scopes. Linear in edges times the depth of modules."""
    scopes = _Scopes()
    for node in graph.nodes():
        scopes.add(node)
    made = {output: scopes.paths(node) for node in scopes.nodes for output in node.outputs}
    outputs: dict[str, dict[Value, None]] = {}
    inputs: dict[str, dict[Value, Edges]] = {}
    crosses: dict[Value, bool] = {}
    for node in scopes.nodes:
        here = scopes.paths(node)
        for index, value in enumerate(node.operands):
            if value is None or value.is_parameter:
                continue
            there = made.get(value, ())
            shared = _common(here, there)
            if shared == len(here) == len(there):
                continue
            if value not in crosses:
                crosses[value] = _is_activation(value)
            if crosses[value]:
                for path in there[shared:]:
                    outputs.setdefault(path, {})[value] = None
                for path in here[shared:]:
                    inputs.setdefault(path, {}).setdefault(value, []).append((node, index))
    for _, value in graph.outputs():
        for path in made.get(value, ()):
            if _is_activation(value):
                outputs.setdefault(path, {})[value] = None
    order = {output: place for place, output in enumerate(made)}
    for path in scopes.found:
        made_here, read_here = sorted(outputs.get(path, ()), key=order.__getitem__), inputs.get(path, {})
        # A list of modules computes nothing as a whole; a sequence does, and shows by one input and one output.
        if not scopes.is_container(path) or len(made_here) == len(read_here) == 1:
            yield from _sites(scopes.display(path), made_here, read_here)


def _sites(name: str, outputs: list[Value], inputs: dict[Value, Edges]) -> Iterator[Named]:
    if len(outputs) == 1:
        yield Named(name, value_anchor(outputs[0]), MODULE)
    else:
        yield from (Named(f"{name}:out[{k}]", value_anchor(value), MODULE) for k, value in enumerate(outputs))
    edges = [edge_anchor(inputs[value]) for value in sorted(inputs, key=_is_discrete)]
    if edges:
        yield Named(f"{name}:in", edges[0], MODULE)
    if len(edges) > 1:
        yield from (Named(f"{name}:in[{k}]", edge, MODULE) for k, edge in enumerate(edges))


class _Scopes:
    """The module paths of all nodes: for each node its scope and every enclosing one, outermost first."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.found: dict[str, None] = {}
        self._paths: dict[str, tuple[str, ...]] = {"": ()}
        self._scope: dict[Node, str] = {}
        self._children: dict[str, bool] = {}  # module -> whether all its parts are numbered

    def add(self, node: Node) -> None:
        scope = node.origin.scope
        self.nodes.append(node)
        self._scope[node] = scope
        if scope not in self._paths:
            pieces = scope.split(".")
            self._paths[scope] = tuple(".".join(pieces[: depth + 1]) for depth in range(len(pieces)))
            self.found.update(dict.fromkeys(self._paths[scope]))
            for parent, piece in zip(self._paths[scope], pieces[1:], strict=False):
                self._children[parent] = self._children.get(parent, True) and piece.partition("@")[0].isdigit()

    def is_container(self, path: str) -> bool:
        """Whether a path has no nodes of its own and its parts are numbered: a list or a sequence of modules."""
        return path not in self._paths and self._children[path]

    def paths(self, node: Node) -> tuple[str, ...]:
        return self._paths[self._scope[node]]

    @staticmethod
    def display(path: str) -> str:
        """The path as users write it: the call number of the module itself only (``encoder.layer.linear@1``)."""
        *outer, last = path.split(".")
        return ".".join([*(piece.partition("@")[0] for piece in outer), last])


def _common(left: tuple[str, ...], right: tuple[str, ...]) -> int:
    count = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        count += 1
    return count


def _is_discrete(value: Value) -> bool:
    return value.dtype is not None and not value.dtype.is_float


def _is_activation(value: Value) -> bool:
    """Whether a value that crosses a module's boundary is data: not a size, not a list of indices."""
    dtype, shape = value.type
    if dtype is None or not dtype.is_integer:
        return True
    return shape is not None and len(shape) > 1
