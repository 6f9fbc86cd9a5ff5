"""What recognisers look at: one graph in the shared vocabulary, with plumbing looked through.

``Semantics`` is built once per reading of a graph. It maps every node to its ``Prim``, records who makes and who reads
each value, and tells three kinds of values apart: *constant* ones (computed from stored data alone), *shape* ones
(computed from sizes alone) and data. Reading sizes off a tensor does not count as reading it, and values that are equal by
construction (clones, reshapes to the same shape, additions of 0) are one value under its earliest name.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from actgraph.graph.graph import Graph, Node, Role, Value
from actgraph.graph.prims import Prim, Scalar, as_scalar, is_single
from actgraph.ops.registry import DOMAIN

Operand = Value | Scalar | None


class Read(NamedTuple):
    """One reader of a value: the node at ``position``, in the vocabulary where it has a name, and the value as it reads it."""

    position: int
    node: Node
    prim: Prim | None
    value: Value


class Semantics:
    """See the module docstring. Linear in the graph's size to build; every question is answered locally."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.nodes: list[Node] = list(graph.nodes())
        self.prims: list[Prim | None] = [graph.prim(node) for node in self.nodes]
        self._place: dict[Node, int] = {node: position for position, node in enumerate(self.nodes)}
        self._maker: dict[Value, int] = {}
        self._readers: dict[Value, list[int]] = {}
        self._alias: dict[Value, Value] = {}
        self._outputs = {value for _, value in graph.outputs()}
        self.constant: set[Value] = set()
        self.shape_only: set[Value] = set()
        # lifted graphs take their parameters as inputs
        stored = (Role.PARAMETER, Role.BUFFER)
        self.constant.update(value for value in graph.inputs() if graph.role(value.name) in stored)
        for position, (node, prim) in enumerate(zip(self.nodes, self.prims, strict=True)):
            self._record(position, node, prim)

    def _record(self, position: int, node: Node, prim: Prim | None) -> None:
        operands = [value for value in node.operands if value is not None]
        outputs = node.outputs
        for output in outputs:
            self._maker[output] = position
        sizes = prim is not None and prim.op == "shape_of"
        if not sizes:
            for value in dict.fromkeys(operands):
                self._readers.setdefault(value, []).append(position)
        if prim is not None and outputs:
            source = _unchanged(prim)
            if source is not None:
                self._alias[outputs[0]] = source
        random = prim is not None and prim.op == "random"
        if sizes or (operands and all(v in self.shape_only or self.is_constant(v) for v in operands)):
            constant = not sizes and all(self.is_constant(v) for v in operands)
            (self.constant if constant and not random else self.shape_only).update(outputs)
        elif not operands and not random:
            self.constant.update(outputs)

    # --- values ---------------------------------------------------------------------------------------------------------

    def is_constant(self, value: Value) -> bool:
        """Whether the value is stored, or computed from stored data alone."""
        return value in self.constant or value.is_parameter

    def is_constant_operand(self, operand: Operand) -> bool:
        """Whether an operand is a number or a constant value."""
        return not isinstance(operand, Value) or self.is_constant(operand)

    def is_data(self, value: Value) -> bool:
        """Whether the value depends on an input's elements (not on its sizes only)."""
        return value not in self.constant and value not in self.shape_only and not value.is_parameter

    def is_output(self, value: Value) -> bool:
        return value in self._outputs

    def position(self, value: Value) -> int:
        """Where the value's producer stands in the order of nodes; -1 for inputs and parameters."""
        return self._maker.get(value, -1)

    def place(self, node: Node) -> int:
        """Where a node stands in the order of nodes."""
        return self._place[node]

    def prim(self, value: Operand) -> Prim | None:
        """What makes the value."""
        if not isinstance(value, Value):
            return None
        position = self._maker.get(value)
        return self.prims[position] if position is not None else None

    def root(self, value: Value, *, casts: bool = False) -> Value:
        """The earliest value that ``value`` equals by construction; with ``casts`` up to its element type."""
        while True:
            if value in self._alias:
                value = self._alias[value]
                continue
            prim = self.prim(value) if casts else None
            source = prim.operands[0] if prim is not None and prim.op == "cast" else None
            if not isinstance(source, Value):
                return value
            value = source

    def copied_from(self, value: Value) -> Value | None:
        """The value that ``value`` is a copy of, one step back; ``None`` when it is computed."""
        return self._alias.get(value)

    def same(self, left: Operand, right: Operand, *, casts: bool = False) -> bool:
        """Whether two operands are one value."""
        if not isinstance(left, Value) or not isinstance(right, Value):
            return False
        return self.root(left, casts=casts) == self.root(right, casts=casts)

    def source(self, value: Operand, *, casts: bool = False) -> Prim | None:
        """What makes the value, with plumbing looked through."""
        return self.prim(self.root(value, casts=casts)) if isinstance(value, Value) else None

    def number(self, operand: Operand) -> Scalar | None:
        """The number that an operand is, or that a constant tensor is filled with."""
        if not isinstance(operand, Value):
            return operand
        if operand.is_parameter:
            return as_scalar(self.graph.read(operand)) if is_single(operand.shape) else None
        prim = self.source(operand, casts=True)
        if prim is not None and prim.op == "expand":
            return self.number(prim.operands[0])
        value = prim.attributes["value"] if prim is not None and prim.op == "full" else None
        return value if isinstance(value, (bool, int, float)) else None

    # --- readers ----------------------------------------------------------------------------------------------------------

    def direct_readers(self, value: Value) -> list[int]:
        """Positions of the nodes that read the elements of the value itself."""
        return self._readers.get(value, [])

    def readers(self, value: Value, *, casts: bool = False) -> Iterator[Read]:
        """Everything that reads the elements of the value, with plumbing looked through."""
        for position in self._readers.get(value, ()):
            prim = self.prims[position]
            through = prim is not None and (
                (prim.output in self._alias and self._alias[prim.output] == value) or (casts and prim.op == "cast")
            )
            if through and prim is not None:
                yield from self.readers(prim.output, casts=casts)
            else:
                yield Read(position, self.nodes[position], prim, value)

    def only_reader(self, value: Value, *, casts: bool = False) -> Read | None:
        """The one node that reads the value, if there is one and no graph output does."""
        found: Read | None = None
        for read in self.readers(value, casts=casts):
            if found is not None and read.position != found.position:
                return None
            found = read
        return None if found is None or self.escapes(value, casts=casts) else found

    def escapes(self, value: Value, *, casts: bool = False) -> bool:
        """Whether the value is a graph output, directly or through plumbing."""
        if value in self._outputs:
            return True
        for position in self._readers.get(value, ()):
            prim = self.prims[position]
            if prim is None:
                continue
            alias = prim.output in self._alias and self._alias[prim.output] == value
            if (alias or (casts and prim.op == "cast")) and self.escapes(prim.output, casts=casts):
                return True
        return False

    def operand_index(self, node: Node, value: Value, skip: Value | None = None) -> int:
        """Which native operand of ``node`` is ``value``; ``skip`` is another operand that must not be taken for it."""
        for index, operand in enumerate(node.operands):
            if operand == value and operand != skip:
                return index
        raise ValueError(f"{value.name} is not an operand of {node.name}")

    # --- edits that passes made ---------------------------------------------------------------------------------------------

    def edited(self, value: Value) -> Value:
        """What ``value`` was before the edits that passes made in place (``actgraph`` ops, quantize and dequantize)."""
        while True:
            value = self.root(value)
            position = self._maker.get(value)
            source = self._edits(position) if position is not None else None
            if source is None:
                return value
            value = source

    def edits(self, read: Read) -> Value | None:
        """The result when a reader edits the value it reads in place; ``None`` for any other reader."""
        if read.prim is not None and read.prim.op == "quantize":
            after = self.only_reader(read.prim.output)
            read_back = after is not None and self._edits(after.position) == read.value
            return after.node.output if after is not None and read_back else None
        return read.node.output if self._edits(read.position) == read.value else None

    def _edits(self, position: int) -> Value | None:
        """The value that the node at ``position`` edits in place: an activation whose shape it keeps."""
        node, prim = self.nodes[position], self.prims[position]
        source: Operand
        if prim is not None and prim.op == "dequantize":
            rounded = self.source(prim.operands[0])
            source = rounded.operands[0] if rounded is not None and rounded.op == "quantize" else None
        elif node.op.startswith(f"{DOMAIN}.") and node.op not in _WHOLE and len(node.outputs) == 1 and node.operands:
            source = node.operands[0]
        else:
            return None
        if not isinstance(source, Value) or not self.is_data(source) or source.shape is None:
            return None
        return source if source.shape == node.output.shape else None


#: Ops that stand for a part of the model, not for an edit, also where they keep the shape of their input.
_WHOLE = frozenset(f"{DOMAIN}.{name}" for name in ("linear", "feed_forward", "rms_norm", "layer_norm", "rotary", "take_along"))


def _unchanged(prim: Prim) -> Value | None:
    """The operand that the node's result equals by construction."""
    if not prim.operands:
        return None
    first = prim.operands[0]
    if prim.op == "identity":
        return first if isinstance(first, Value) else None
    if prim.op in ("mul", "div", "add", "sub") and len(prim.operands) == 2:
        neutral = 1 if prim.op in ("mul", "div") else 0
        second = prim.operands[1]
        if prim.op in ("mul", "add") and not isinstance(first, Value):
            first, second = second, first
        if isinstance(first, Value) and not isinstance(second, Value) and second is not None and second == neutral:
            return first if first.type == prim.output.type else None
    return None
