"""Blocks: the repeated residual units of a model, grouped from its residual adds by data flow.

Residual adds whose skips continue each other form a *stream*. Along a stream, an attention or a mixer opens a block, and
cross-attention and feed-forward (or mixture of experts) join it; a convolutional or parallel unit is a block by itself.
Streams tell encoder, decoder and stages apart; no module name or class is looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from actgraph.graph.graph import Value
from actgraph.graph.recognize.residual import Residual, residuals, through
from actgraph.graph.recognize.semantic import Semantics
from actgraph.graph.views import Attention, Block, FeedForward, MixtureOfExperts, Norm, Unit, Views

_STEPS = 16  # pass-through nodes between one unit's sum and the next one's skip

#: The order of units within a block; a unit that does not come later than the last one opens a new block.
_ORDER = {"attn": 0, "mixer": 0, "conv": 0, "parallel": 0, "cross_attn": 1, "mlp": 2, "moe": 2}


@dataclass
class _Part:
    """A unit with what its branch holds. passed: what lies between the former unit's sum and this one's skip."""

    unit: Unit
    residual: Residual
    attention: Attention | None
    cross_attention: Attention | None
    feed_forward: FeedForward | None
    moe: MixtureOfExperts | None
    passed: frozenset[str] = frozenset()


@dataclass
class _Stream:
    """Parts in order, and the blocks made of them."""

    parts: list[_Part]
    prefix: str = ""
    blocks: list[list[_Part]] = field(default_factory=list)

    @property
    def post(self) -> str:
        """What follows every sum in this stream: ``norm`` (post-norm encoders), ``activation`` (ResNet) or nothing."""
        inner = [part.passed for part in self.parts[1:] if "projection" not in part.passed]
        for kind in ("norm", "activation"):
            if any(kind in passed for passed in inner):
                return kind
        return ""


def blocks(views: Views) -> list[Block]:
    """All blocks, stream by stream in topological order."""
    s = views.semantics
    flow = Flow(views)
    inside = {node for attention in views.attentions() for node in attention.nodes}
    inside |= {node for norm in views.norms() for node in norm.nodes}
    inside |= {node for activation in views.activations() for node in activation.nodes}
    held = _Held(views)
    parts = [_part(held, residual) for residual in residuals(s, inside)]
    streams = _streams(flow, parts)
    _name(s, streams)
    return [block for stream in streams for block in _blocks(flow, stream)]


# --- units ------------------------------------------------------------------------------------------------------------


class _Held:
    """Attentions, feed-forwards and mixtures by the position of their result."""

    def __init__(self, views: Views) -> None:
        self.s = s = views.semantics
        self.attentions = {s.position(s.root(a.output)): a for a in views.attentions()}
        self.feed_forwards = {s.position(s.root(f.down.output)): f for f in views.feed_forwards()}
        self.mixtures = {s.position(s.root(m.output)): m for m in views.moe()}


def _part(held: _Held, residual: Residual) -> _Part:
    """What is between the stream and the sum."""
    s = held.s

    def holds(value: Value) -> bool:
        return residual.has(s.position(s.root(value)))

    attentions = [held.attentions[place] for place in residual.path if place in held.attentions]
    own = next((a for a in attentions if holds(a.key)), None)
    cross = next((a for a in attentions if not holds(a.key) and holds(a.query)), None)
    mixtures = [held.mixtures[place] for place in residual.path if place in held.mixtures]
    moe = next((m for m in mixtures if holds(m.router_logits)), None)
    found = [held.feed_forwards[place] for place in residual.path if place in held.feed_forwards]
    feed_forward = next((f for f in found if holds(f.pre_act)), None)
    if (own is not None or cross is not None) and (feed_forward is not None or moe is not None):
        kind = "parallel"
    elif own is not None:
        kind = "attn"
    elif cross is not None:
        kind = "cross_attn"
    elif moe is not None or feed_forward is not None:
        kind = "moe" if moe is not None else "mlp"
    else:
        kind = _plain_kind(s, residual)
    unit = Unit(kind, residual.skip, residual.branches[-1], residual.output, residual.node, residual.source,
                tuple(residual.branches))  # fmt: skip
    return _Part(unit, residual, own, cross, feed_forward, moe)


def _plain_kind(s: Semantics, residual: Residual) -> str:
    """A branch without attention and feed-forward: image convolutions, or a mixer over the sequence."""
    ops = {prim.op for position in residual.path if (prim := s.prims[position]) is not None}
    return "conv" if "conv" in ops and not ops & {"linear", "matmul"} else "mixer"


# --- streams ------------------------------------------------------------------------------------------------------------


class Flow:
    """Which unit a value continues, through norms, activations, plumbing and at most one projection."""

    def __init__(self, views: Views) -> None:
        self.s = views.semantics
        root = self.s.root
        self.norms: dict[Value, Norm] = {root(norm.output): norm for norm in views.norms()}
        self.norms_of: dict[Value, Norm] = {root(norm.input): norm for norm in reversed(views.norms())}
        self.activations = {root(a.output): a for a in views.activations()}
        self.activations_of = {root(a.input): a for a in reversed(views.activations())}
        self.linears = {root(linear.output): linear for linear in views.linears()}

    def before(self, value: Value, ends: dict[Value, int], steps: int = _STEPS) -> tuple[int, frozenset[str]] | None:
        """The end in ``ends`` that ``value`` continues and what lies between; ``None`` when it continues none."""
        passed: set[str] = set()
        for _ in range(steps):
            value = self.s.root(value)
            if value in ends:
                return ends[value], frozenset(passed)
            if value in self.norms:
                passed.add("norm")
                value = self.norms[value].input
            elif value in self.activations:
                passed.add("activation")
                value = self.activations[value].input
            else:
                step = self._step(value, passed, ends, steps // 2)
                if isinstance(step, tuple):
                    return step[0], step[1] | passed
                if step is None:
                    return None
                value = step
        return None

    def _step(
        self, value: Value, passed: set[str], ends: dict[Value, int], steps: int
    ) -> Value | tuple[int, frozenset[str]] | None:
        plain = through(self.s, value) if value not in self.linears else None
        if plain is not None:
            return plain
        prim = self.s.prim(value)
        if prim is None or not prim.operands:
            return None
        first = prim.operands[0]
        if prim.op in ("transpose", "max_pool", "avg_pool", "slice", "pad") and isinstance(first, Value):
            return first
        if prim.op == "concat" and steps > 0:  # patch merging: pieces of one stream side by side
            found = [self.before(o, ends, steps) for o in prim.operands if isinstance(o, Value)]
            if found and all(f is not None and f[0] == found[0][0] for f in found if found[0] is not None):
                return None if found[0] is None else (found[0][0], found[0][1] | {"projection"})
            return None
        if "projection" in passed:
            return None
        passed.add("projection")
        if value in self.linears:
            node, index = self.linears[value].input
            return node.operands[index] if node is not None else None
        return first if prim.op == "conv" and isinstance(first, Value) else None

    def after(self, output: Value, post: str) -> Value:
        """What the stream is after the norm or activation that follows each of its sums."""
        root = self.s.root(output)
        if post == "norm" and root in self.norms_of:
            return self.norms_of[root].output
        if post == "activation" and root in self.activations_of:
            return self.activations_of[root].output
        edited = next((r.node.output for r in self.s.readers(output) if self.s.edits(r) is not None), None)
        return self.after(edited, post) if edited is not None else output


def _streams(flow: Flow, parts: list[_Part]) -> list[_Stream]:
    ends: dict[Value, int] = {}
    following: dict[int, list[int]] = {}
    starts: list[int] = []
    for index, part in enumerate(parts):
        assert part.unit.source is not None
        found = flow.before(part.unit.source, ends)
        if found is None:
            starts.append(index)
        else:
            following.setdefault(found[0], []).append(index)
            part.passed = found[1]
        ends[flow.s.root(part.unit.output)] = index
    # Where several units continue one, the first carries the stream on and the others open streams of their own.
    starts += [index for others in following.values() for index in others[1:]]
    streams = []
    for start in sorted(starts):
        chain = [start]
        while chain[-1] in following:
            chain.append(following[chain[-1]][0])
        streams.append(_Stream([parts[i] for i in chain]))
    return streams


def _name(s: Semantics, streams: list[_Stream]) -> None:
    """Prefixes: none for a single stream; ``encoder.`` and ``decoder.`` where one attends to the other's end."""
    for stream in streams:
        stream.blocks = list(_grouped(stream.parts))
    if len(streams) < 2:
        return
    main = max(range(len(streams)), key=lambda i: (_attends(streams[i]), streams[i].parts[-1].residual.position))
    feeding = [i for i in range(len(streams)) if i != main and _feeds(s, streams[i], streams[main])]
    for i, stream in enumerate(streams):
        if i == main:
            stream.prefix = "decoder." if len(feeding) == 1 and _attends(stream) else ""
        else:
            stream.prefix = "encoder." if feeding == [i] else f"towers.{i}."


def _attends(stream: _Stream) -> bool:
    return any(part.cross_attention is not None for part in stream.parts)


def _feeds(s: Semantics, stream: _Stream, main: _Stream) -> bool:
    """Whether ``main`` is computed from the end of ``stream``: its keys by cross-attention, or its start."""
    crossing = next((part.cross_attention for part in main.parts if part.cross_attention is not None), None)
    source = main.parts[0].unit.source
    target = crossing.key if crossing is not None else source
    end = s.root(stream.parts[-1].unit.output)
    bound, todo, seen = s.position(end), [target] if target is not None else [], set()
    while todo:
        value = s.root(todo.pop())
        if value == end:
            return True
        position = s.position(value)
        if position > bound and position not in seen:
            seen.add(position)
            todo += [operand for operand in s.nodes[position].operands if operand is not None and s.is_data(operand)]
    return False


# --- blocks -------------------------------------------------------------------------------------------------------------


def _grouped(parts: Sequence[_Part]) -> Iterator[list[_Part]]:
    block: list[_Part] = []
    for part in parts:
        if block and _ORDER[part.unit.kind] <= _ORDER[block[-1].unit.kind]:
            yield block
            block = []
        block.append(part)
    if block:
        yield block


def _blocks(flow: Flow, stream: _Stream) -> Iterator[Block]:
    made: list[Block] = []
    layout = _post_of(flow, stream)
    for index, parts in enumerate(stream.blocks):
        following = stream.blocks[index + 1][0] if index + 1 < len(stream.blocks) else None
        post = flow.after(parts[-1].unit.output, layout)
        if following is not None and "projection" not in following.passed and following.unit.source is not None:
            post = following.unit.source
        made.append(_block(flow.s, index, stream.prefix, parts, post))
    projected = [bool(parts[0].passed & {"projection"}) for parts in stream.blocks]
    if any(part.unit.kind == "conv" for part in stream.parts) or any(projected[1:]):
        yield from _staged(stream, made, projected)
    else:
        yield from made


def _post_of(flow: Flow, stream: _Stream) -> str:
    """``_Stream.post``; a stream of one unit is post-norm when nothing normalises its branch and a norm reads its sum alone."""
    if stream.post or len(stream.parts) > 1:
        return stream.post
    residual = stream.parts[0].residual
    normed = any(residual.has(flow.s.position(output)) for output in flow.norms)
    return "" if normed else "norm"


def _block(s: Semantics, index: int, prefix: str, parts: Sequence[_Part], post: Value) -> Block:
    sources = [unflattened(s, part.unit.source) for part in parts if part.unit.source is not None]
    return Block(
        index=index, prefix=prefix, units=tuple(part.unit for part in parts), resid_pre=sources[0],
        resid_mid=sources[1] if len(parts) > 1 else None, resid_post=unflattened(s, post),
        attention=next((part.attention for part in parts if part.attention is not None), None),
        cross_attention=next((part.cross_attention for part in parts if part.cross_attention is not None), None),
        feed_forward=next((part.feed_forward for part in parts if part.feed_forward is not None), None),
        moe=next((part.moe for part in parts if part.moe is not None), None),
    )  # fmt: skip


def unflattened(s: Semantics, value: Value) -> Value:
    """The stream with batch and sequence axes apart, where a model lays its tokens in rows around a feed-forward (OPT)."""
    value = s.root(value)
    if value.shape is None or len(value.shape) != 2:
        return value
    prim = s.prim(value)
    before = prim.operands[0] if prim is not None and prim.op == "reshape" else None
    if isinstance(before, Value) and before.type.rank == 3 and s.only_reader(before) is not None:
        return s.root(before)
    read = s.only_reader(value)
    if read is not None and read.prim is not None and read.prim.op == "reshape" and read.prim.output.type.rank == 3:
        return read.prim.output
    return value


def _staged(stream: _Stream, made: list[Block], projected: list[bool]) -> Iterator[Block]:
    """``stages.{i}.blocks.{j}``: a stage ends where the number of channels or the resolution changes."""
    stage, first, before = 0, 0, None
    for index, block in enumerate(made):
        size = _extent(block.resid_post)
        if before is not None and (size != before or projected[index]):
            stage, first = stage + 1, index
        before = size
        yield replace(block, index=index - first, prefix=f"{stream.prefix}stages.{stage}.")


def _extent(value: Value) -> tuple[object, ...]:
    """Channels and resolution; symbolic sizes count only by being symbolic."""
    shape = value.shape or ()
    return tuple(size if isinstance(size, int) else "?" for size in shape[1:])
