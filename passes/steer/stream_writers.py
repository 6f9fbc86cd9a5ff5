"""What writes the residual stream: the weights from which every value of the stream is a sum.

Found by walking back from each residual add's branch, and from the start of the stream, through what a linear map of the
channels commutes with: sums, casts, reshapes, choices of rows, factors that are the same for all channels of a token. Anything
else on the way, a norm above all, is a refusal with its reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from actgraph.graph import Graph, Node, Use, Value
from actgraph.graph.prims import Prim
from actgraph.graph.recognize.blocks import Flow
from actgraph.graph.recognize.experts import ExpertProduct, expert_products
from actgraph.graph.recognize.semantic import Operand
from actgraph.graph.views import Block, Linear, Unit


@dataclass(frozen=True)
class Written:
    """One writer: a linear, or else a stored array whose axis ``axis`` is the stream's channels.

    kind: ``linear``, ``embedding`` (a table of rows, or a constant), ``experts`` (a stack of matrices).
    uses: the operands through which the array gets into the stream; its other readers are no writers.
    """

    kind: str
    linear: Linear | None = None
    array: Value | None = None
    axis: int = -1
    uses: tuple[Use, ...] = ()

    @property
    def name(self) -> str:
        """The name of the stored weight."""
        weight = self.linear.weight if self.linear is not None else self.array
        assert weight is not None
        return weight.name


class Refused(Exception):
    """A value that is not a sum of what weights write."""

    def __init__(self, value: Value, reason: str) -> None:
        super().__init__(reason)
        names = (value, value.graph.site_table.role_name_of(value) or f"%{value.name}")
        self.place, self.reason = names[1], reason


def stream_writers(graph: Graph) -> list[Written]:
    """Every writer of every residual stream, once, in the order of the graph. Raises Refused."""
    walk = _Walk(graph)
    previous: dict[str, Unit] = {}
    for block in graph.views.blocks():
        stream = block.prefix.partition("stages.")[0]
        for unit in block.units:
            walk.unit(unit, previous.get(stream), block)
            previous[stream] = unit
    return walk.found()


class _Walk:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.s = graph.views.semantics
        self.flow = Flow(graph.views)
        self.experts = {self.s.root(product.output): product for product in expert_products(self.s)}
        self.stacks: dict[Value, Written] = {}
        self.linears: dict[Linear, None] = {}
        self.arrays: dict[Value, dict[Use, None]] = {}
        self.seen: set[Value] = set()

    def found(self) -> list[Written]:
        arrays = [Written("embedding", array=array, uses=tuple(uses)) for array, uses in self.arrays.items()]
        return [*arrays, *(Written("linear", linear=linear) for linear in self.linears), *self.stacks.values()]

    def unit(self, unit: Unit, before: Unit | None, block: Block) -> None:
        """What the branches of one unit write, and that nothing else happens between it and the former one."""
        start = unit.source if unit.source is not None else unit.skip
        for value in dict.fromkeys([unit.skip, start]):
            if before is None:
                self.trace(value)
            else:
                self.continues(value, before.output)
        for branch in unit.branches:
            self.trace(branch)
        if self.s.root(block.resid_post) in self.flow.norms:
            raise Refused(block.resid_post, "the stream itself goes through a norm, which writes again what was removed")

    def continues(self, value: Value, end: Value) -> None:
        """Raises Refused unless ``value`` is the former sum ``end``, but for plumbing and a factor."""
        goal = self.s.root(end)
        while self.s.root(value) != goal:
            steps = list(self.steps(self.s.root(value)))
            if len(steps) != 1 or steps[0][1] is None:
                raise Refused(value, "something is added to the stream between its blocks")
            value = steps[0][1]

    def trace(self, value: Value) -> None:
        """Note every writer of ``value``."""
        todo = [value]
        while todo:
            value = self.s.root(todo.pop())
            if value in self.seen:
                continue
            self.seen.add(value)
            if value in self.flow.linears:
                self.linears[self.flow.linears[value]] = None
                continue
            if value in self.experts:
                stack = self.stack(value, self.experts[value])
                assert stack.array is not None
                self.stacks[stack.array] = stack
                continue
            for use, operand in self.steps(value):
                if operand is not None:
                    todo.append(operand)
                else:
                    self.store(use)

    def store(self, use: Use) -> None:
        assert use.node is not None
        array = use.node.operands[use.index]
        assert array is not None
        self.arrays.setdefault(array, {})[use] = None

    def stack(self, output: Value, product: ExpertProduct) -> Written:
        """The matrices of all experts, ``[experts, ., .]``, of which one axis is told by its size to be the output."""
        weights = product.weights
        while not weights.is_parameter:
            prim = self.s.prim(weights)
            before = prim.operands[0] if prim is not None and prim.op in ("transpose", "identity") else None
            if not isinstance(before, Value):
                raise Refused(output, f"the matrices of its {product.experts} experts are not stored as such")
            weights = before
        sizes = (product.rows.shape or (None,))[-1], (product.output.shape or (None,))[-1]
        shape = weights.shape or ()
        if len(shape) != 3 or sizes[0] == sizes[1] or set(shape[1:]) != set(sizes) or product.parts or len(weights.uses) != 1:
            raise Refused(output, f"which axis of the matrices of its {product.experts} experts is the output cannot be told")
        return Written("experts", array=weights, axis=shape.index(sizes[1], 1), uses=tuple(weights.uses))

    def steps(self, value: Value) -> Iterator[tuple[Use, Value | None]]:
        """The operands that ``value`` is a sum of: ``(use, operand)``, with no operand where the use reads a stored array.

        Raises Refused for anything that a linear map of the channels does not commute with.
        """
        s = self.s
        if value in self.flow.norms:
            raise Refused(value, "a norm sits between what is written and the residual add")
        if value in self.flow.activations:
            raise Refused(value, "an activation function sits between what is written and the stream")
        if s.edited(value) != value:
            by = value.producer.origin.created_by if value.producer is not None else ""
            raise Refused(value, f"{by or 'an edit'} changes it: put this pass first")
        prim = s.prim(value)
        if prim is None:
            what = value.producer.op if value.producer is not None else "an input"
            raise Refused(value, f"it is made by {what}")
        operands = prim.operands
        if prim.op in ("add", "sub", "concat") and not _joins_channels(prim.attributes.get("axis"), value):
            if any(isinstance(o, (int, float)) for o in operands):
                raise Refused(value, "a number is added to all of its channels")
            for operand in operands:
                yield self.step(prim.node, operand)
        elif _moves_rows(prim):
            yield self.step(prim.node, operands[0])
        elif prim.op in ("mul", "div"):
            factors = [o for o in operands if isinstance(o, Value) and not self.per_token(o)]
            if len(factors) != 1 or (prim.op == "div" and factors[0] is not operands[0]):
                raise Refused(value, "it is multiplied channel by channel")
            yield self.step(prim.node, factors[0])
        else:
            raise Refused(value, f"it is made by {prim.node.op}")

    def step(self, node: Node, operand: Operand) -> tuple[Use, Value | None]:
        assert isinstance(operand, Value)
        use = Use(node, self.s.operand_index(node, operand))
        if operand.is_parameter:
            return use, None
        if self.s.is_constant(operand) and self.s.prim(operand) is None:
            raise Refused(operand, "it is computed from stored data: fold it first")
        return use, operand

    def per_token(self, value: Value) -> bool:
        """Whether a factor is the same for all channels of a token."""
        return value.shape is not None and (not value.shape or value.shape[-1] == 1)


def _moves_rows(prim: Prim) -> bool:
    """Whether a node copies, chooses, repeats or adds up whole rows of channels of its first operand."""
    source, shape = prim.operands[0] if prim.operands else None, prim.output.shape
    if not isinstance(source, Value) or not source.shape or not shape or source.shape[-1] != shape[-1]:
        return False
    if prim.op in ("gather", "index"):
        return bool(prim.attributes.get("axis", 0) == 0) and len(source.shape) > 1
    if prim.op == "sum":
        return not any(_joins_channels(axis, source) for axis in prim.attributes["axes"])
    return prim.op in ("identity", "cast", "expand", "reshape")


def _joins_channels(axis: int | None, value: Operand) -> bool:
    """Whether a concatenation or sum is along the last axis."""
    rank = len(value.shape or ()) if isinstance(value, Value) else 0
    return axis is not None and axis in (-1, rank - 1)
