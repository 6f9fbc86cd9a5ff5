"""Feed-forwards: ``down(act(up(x)))`` and ``down(act(gate(x)) * up(x))``, with gate and up perhaps in one projection."""

from __future__ import annotations

from dataclasses import dataclass

from actgraph.graph.graph import Node, Value
from actgraph.graph.recognize.linear import by_output, input_of
from actgraph.graph.recognize.semantic import Operand, Read, Semantics
from actgraph.graph.views import Activation, Attention, FeedForward, Linear


@dataclass(frozen=True)
class _Half:
    """Where a value comes from: a linear's output, or one of its two halves (``start`` is its first feature)."""

    linear: Linear
    start: int | None  # None: the whole output


def feed_forwards(
    semantics: Semantics, linears: list[Linear], activations: list[Activation], attentions: list[Attention]
) -> list[FeedForward]:
    """All feed-forwards, in the order of their down projections."""
    outputs = by_output(semantics, linears)
    inputs = {(linear.input.node, linear.input.index): linear for linear in linears}
    taken = {attention.out_projection.output for attention in attentions if attention.out_projection is not None}
    found = []
    for activation in activations:
        feed_forward = _feed_forward(semantics, activation, outputs, inputs)
        if feed_forward is not None and feed_forward.down.output not in taken:
            found.append(feed_forward)
    return sorted(found, key=lambda f: semantics.position(f.down.output))


def _feed_forward(
    s: Semantics, activation: Activation, outputs: dict[Value, Linear], inputs: dict[tuple[Node | None, int], Linear]
) -> FeedForward | None:
    first = _half(s, activation.input, outputs)
    if first is None:
        return None
    if len({read.position for read in s.readers(activation.output, casts=True) if not _measures(s, read)}) != 1:
        return None  # others read the activation: a residual stream or several heads, not the neurons of one feed-forward
    for value, factor in _towards_down(s, activation.output):
        down = _reader(s, value, inputs)
        if down is None:
            continue
        hidden = input_of(down)
        if factor is None:
            if first.start is not None or down.in_features != first.linear.out_features:
                continue
            return FeedForward(None, first.linear, activation, down, activation.input, activation.output, hidden)
        second = _half(s, factor, outputs)
        if second is None or (second.start is None) != (first.start is None):
            continue
        if first.start is None:
            if second.linear is first.linear or second.linear.out_features != down.in_features:
                continue
            return FeedForward(
                first.linear, second.linear, activation, down, activation.input, activation.output, hidden, up_value=factor
            )
        if second.linear.output != first.linear.output or {first.start, second.start} != {0, down.in_features}:
            continue
        return FeedForward(
            first.linear, first.linear, activation, down, activation.input, activation.output, hidden, fused_gate_up=True,
            gate_first=first.start == 0, up_value=factor,
        )  # fmt: skip
    return None


def _measures(s: Semantics, read: Read) -> bool:
    """Whether a reader is a product with a stored vector: how far the value points along it, for an edit elsewhere."""
    if read.prim is None or read.prim.op != "matmul":
        return False
    vector = read.prim.operands[1]
    return isinstance(vector, Value) and s.is_constant(vector) and vector.type.rank == 1


def _towards_down(s: Semantics, act: Value) -> list[tuple[Value, Value | None]]:
    """Values that may be ``hidden``: the activation itself, and its product with another value, edits looked through."""
    found: list[tuple[Value, Value | None]] = []
    stack: list[tuple[Value, Value | None]] = [(act, None)]
    for _ in range(16):
        if not stack:
            break
        value, factor = stack.pop(0)
        found.append((value, factor))
        for read in s.readers(value, casts=True):
            edited = s.edits(read)
            if edited is not None:
                stack.append((edited, factor))
            elif read.prim is not None and read.prim.op == "mul" and factor is None:
                other = _other(read)
                if other is not None and s.is_data(other):
                    stack.append((read.prim.output, other))
    return found


def _other(read: Read) -> Value | None:
    assert read.prim is not None
    a, b = read.prim.operands
    other = b if a == read.value else a
    return other if isinstance(other, Value) and other != read.value else None


def _reader(s: Semantics, value: Value, inputs: dict[tuple[Node | None, int], Linear]) -> Linear | None:
    """The linear whose input is the value, plumbing looked through."""
    for read in s.readers(value, casts=True):
        for index, operand in enumerate(read.node.operands):
            if operand == read.value and (read.node, index) in inputs:
                return inputs[read.node, index]
    # the flattening before a product belongs to the linear, so its own node is the reader
    return None


def _half(s: Semantics, operand: Operand, outputs: dict[Value, Linear]) -> _Half | None:
    """The linear, or half of one, that a value is (edits and casts looked through)."""
    if not isinstance(operand, Value):
        return None
    value = operand
    for _ in range(8):
        value = s.root(s.edited(value), casts=True)
        if value in outputs:
            return _Half(outputs[value], None)
        prim = s.prim(value)
        if prim is None or not prim.operands or not isinstance(prim.operands[0], Value):
            return None
        start = _start_of_piece(s, value)
        if start is not None:
            source = s.root(s.edited(prim.operands[0]), casts=True)
            return _Half(outputs[source], start) if source in outputs else None
        if s.edited(value) == value:
            return None
    return None


def _start_of_piece(s: Semantics, value: Value) -> int | None:
    """The first feature of a half of the last axis."""
    prim = s.prim(value)
    if prim is None or prim.op not in ("split", "slice"):
        return None
    source = prim.operands[0]
    if not isinstance(source, Value) or source.shape is None or prim.attributes["axis"] != len(source.shape) - 1:
        return None
    if prim.op == "slice":
        start, step = prim.attributes["start"], prim.attributes["step"]
        size = source.shape[-1]
        if not isinstance(start, int) or step != 1 or not isinstance(size, int):
            return None
        return start + size if start < 0 else start
    start = 0
    for output in prim.outputs:
        if output == value:
            return start
        size = (output.shape or (None,))[-1]
        if not isinstance(size, int):
            return None
        start += size
    return None
