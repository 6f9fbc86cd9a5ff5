"""Role sites: the parts of transformers and other residual nets under the names that papers use.

What each name means is fixed in docs/sites.md. A part that a model lacks has no site: nothing here guesses.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator

from actgraph.graph.anchors import value_anchor, virtual_anchor
from actgraph.graph.graph import Kind, Node, Role, Value
from actgraph.graph.recognize.blocks import Flow, unflattened
from actgraph.graph.recognize.materialise import PATTERN, expert_recipe
from actgraph.graph.recognize.naming import ROLE, Named, at_value
from actgraph.graph.recognize.semantic import Semantics
from actgraph.graph.views import Attention, Block, FeedForward, Linear, MixtureOfExperts, Unit, Views
from actgraph.ops.shapes import TensorType

_STEPS = 12  # plumbing between a projection and the slice of it that an attention uses
_PLUMBING = frozenset({"identity", "cast", "reshape", "transpose", "slice", "split", "unbind"})


def role_sites(views: Views) -> Iterator[Named]:
    """All role sites of the graph that ``views`` reads."""
    found = views.blocks()
    finder = _Finder(views)
    for block in found:
        yield from finder.block(block)
    streams: dict[str, list[Block]] = {}
    for block in found:
        streams.setdefault(block.prefix.partition("stages.")[0], []).append(block)
    for prefix, stream in streams.items():
        yield from at_value(f"{prefix}embed", finder.embedding(stream[0].resid_pre), ROLE)
        yield from at_value(f"{prefix}final_norm", finder.final_norm(stream[-1].resid_post), ROLE)
    if found:
        yield from at_value("logits", finder.logits(found), ROLE)


class _Finder:
    """Looks the parts up around a block."""

    def __init__(self, views: Views) -> None:
        self.graph = views.graph
        self.s: Semantics = views.semantics
        self.flow = Flow(views)
        self.linears = list(self.flow.linears.values())  # in the order of their outputs
        self.places = [self.s.position(linear.output) for linear in self.linears]
        self.linear_ends = {root: place for place, root in enumerate(self.flow.linears)}

    # --- blocks -----------------------------------------------------------------------------------------------------------

    def block(self, block: Block) -> Iterator[Named]:
        """The sites of one block."""
        stem = f"{block.prefix}blocks.{block.index}"
        yield from at_value(f"{stem}.resid_pre", block.resid_pre, ROLE)
        yield from at_value(f"{stem}.resid_mid", block.resid_mid, ROLE)
        if len(block.units) > 2:
            crossed = block.units[2].source
            yield from at_value(f"{stem}.resid_mid_cross", unflattened(self.s, crossed) if crossed is not None else None, ROLE)
        yield from at_value(f"{stem}.resid_post", block.resid_post, ROLE)
        for unit in block.units:
            yield from self._unit(stem, block, unit)

    def _unit(self, stem: str, block: Block, unit: Unit) -> Iterator[Named]:
        attention = {"attn": block.attention, "parallel": block.attention, "cross_attn": block.cross_attention}.get(unit.kind)
        if attention is not None:
            name = f"{stem}.cross_attn" if unit.kind == "cross_attn" else f"{stem}.attn"
            yield from self._attention(name, unit, attention)
            yield from at_value(f"{name}.out", self._addend(unit, _end(attention)), ROLE)
        if unit.kind in ("mlp", "moe", "parallel"):
            if block.feed_forward is not None and block.moe is None:
                yield from self._feed_forward(f"{stem}.mlp", unit, block.feed_forward)
                yield from at_value(f"{stem}.mlp.out", self._addend(unit, block.feed_forward.down.output), ROLE)
            elif block.moe is not None:
                yield from self._mixture(stem, unit, block.moe)
                yield from at_value(f"{stem}.mlp.out", self._addend(unit, block.moe.output), ROLE)
        elif unit.kind == "mixer":
            yield from self._mixer(f"{stem}.mixer", unit)
        elif unit.kind == "conv":
            yield from at_value(f"{stem}.conv.out", unit.branch, ROLE)

    def _attention(self, name: str, unit: Unit, attention: Attention) -> Iterator[Named]:
        projection = self._projection(attention.q)
        yield from at_value(f"{name}.norm", self._normed(unit, projection), ROLE)
        for part, value in (("q", attention.q), ("k", attention.k), ("v", attention.v)):
            yield from at_value(f"{name}.{part}", value, ROLE)
        if attention.pattern is not None:
            yield Named(f"{name}.pattern", value_anchor(attention.pattern), ROLE, at=attention.output)
        else:
            yield from _virtual_pattern(f"{name}.pattern", self.s, attention)
        if attention.out_projection is not None:
            yield from at_value(f"{name}.head_out", _input(attention.out_projection), ROLE)

    def _feed_forward(self, name: str, unit: Unit, feed_forward: FeedForward) -> Iterator[Named]:
        yield from at_value(f"{name}.norm", self._normed(unit, feed_forward.up), ROLE)
        if feed_forward.fused_gate_up:
            yield from at_value(f"{name}.gate", feed_forward.pre_act, ROLE)
            yield from at_value(f"{name}.up", feed_forward.up_value, ROLE)
        else:
            yield from at_value(f"{name}.gate", feed_forward.gate.output if feed_forward.gate else None, ROLE)
            yield from at_value(f"{name}.up", feed_forward.up.output, ROLE)
        yield from at_value(f"{name}.pre_act", feed_forward.pre_act, ROLE)
        yield from at_value(f"{name}.act", feed_forward.act, ROLE)
        yield from at_value(f"{name}.hidden", feed_forward.hidden, ROLE)

    def _mixture(self, stem: str, unit: Unit, moe: MixtureOfExperts) -> Iterator[Named]:
        yield from at_value(f"{stem}.mlp.norm", self._normed(unit, moe.router), ROLE)
        yield from at_value(f"{stem}.moe.router_logits", moe.router_logits, ROLE)
        yield from at_value(f"{stem}.moe.gates", moe.gates, ROLE)
        yield from at_value(f"{stem}.moe.experts.hidden", moe.hidden, ROLE)
        if moe.hidden is not None and moe.expert_index is not None and moe.hidden.producer is not None:
            for expert in range(moe.experts):
                recipe = expert_recipe(expert, moe.hidden, moe.expert_index)
                anchor = virtual_anchor(moe.hidden.producer, recipe, moe.hidden.type)
                yield Named(f"{stem}.moe.experts.{expert}.hidden", anchor, ROLE)

    def _mixer(self, name: str, unit: Unit) -> Iterator[Named]:
        """The first linear that reads the stream, and the last one before the sum."""
        end = self._linear_before(unit.branch)
        start = self._first_linear(unit)
        yield from at_value(f"{name}.norm", self._normed(unit, start), ROLE)
        yield from at_value(f"{name}.in", start.output if start is not None else None, ROLE)
        yield from at_value(f"{name}.hidden", _input(end) if end is not None else None, ROLE)
        yield from at_value(f"{name}.out", unit.branch, ROLE)

    # --- around a projection ------------------------------------------------------------------------------------------------

    def _projection(self, value: Value | None) -> Linear | None:
        """The linear that a value is the output of, or a piece of."""
        for _ in range(_STEPS):
            if value is None:
                return None
            root = self.s.root(self.s.edited(value))
            if root in self.flow.linears:
                return self.flow.linears[root]
            prim = self.s.prim(root)
            if prim is None or prim.op not in _PLUMBING or not isinstance(prim.operands[0], Value):
                return None
            value = prim.operands[0]
        return None

    def _normed(self, unit: Unit, linear: Linear | None) -> Value | None:
        """What a linear reads, if that is a norm of the stream that the unit branches off."""
        if linear is None or unit.source is None:
            return None
        value: Value = _input(linear)
        for _ in range(_STEPS):
            value = self.s.root(self.s.edited(value))
            norm = self.flow.norms.get(value)
            if norm is not None:
                stream = {self.s.root(unit.source): 0}
                inside = self.s.position(norm.output) > self.s.position(unit.source)
                found = self.flow.before(norm.input, stream) if inside else None
                return norm.output if found is not None and not found[1] else None
            before = self._unmasked(value)
            if before is None:
                return None
            value = before
        return None

    def _unmasked(self, value: Value) -> Value | None:
        """The value before a reshape, a cast or a multiplication by one number per token (a mixer's padding mask)."""
        prim = self.s.prim(value)
        if prim is None or prim.op not in ("reshape", "cast", "mul"):
            return None
        operands = [o for o in prim.operands if isinstance(o, Value)]
        if prim.op == "mul":
            operands = [o for o in operands if o.shape is not None and o.shape[-1:] != (1,)]
        return operands[0] if len(operands) == 1 else None

    def _addend(self, unit: Unit, value: Value) -> Value | None:
        """The term of the unit's sum that ``value`` (the end of an attention or feed-forward) goes into."""
        terms = [term for branch in unit.branches for term in self._terms(branch)]
        if len(terms) == 1:
            return terms[0]
        ends = {self.s.root(value): 0}
        for term in terms:
            found = self.flow.before(term, ends)
            if found is not None and not found[1] - {"norm"}:
                return term
        return None

    def _terms(self, value: Value) -> list[Value]:
        """The terms of a sum of several branches; a linear with its bias is one term."""
        root = self.s.root(value)
        prim = self.s.prim(root)
        if root in self.flow.linears or root in self.flow.norms or prim is None or prim.op != "add":
            return [value]
        terms = [operand for operand in prim.operands if isinstance(operand, Value)]
        if len(terms) != 2 or not all(self.s.is_data(term) for term in terms):
            return [value]
        return [inner for term in terms for inner in self._terms(term)]

    def _linear_before(self, value: Value) -> Linear | None:
        """The linear that a unit's branch ends with, norms and plumbing looked through."""
        found = self.flow.before(value, self.linear_ends)
        return self.linears[found[0]] if found is not None else None

    def _first_linear(self, unit: Unit) -> Linear | None:
        """The first linear after the stream, by what it reads: the stream itself or its norm."""
        if unit.source is None:
            return None
        place = bisect_right(self.places, self.s.position(unit.source))
        if place == len(self.places) or self.places[place] > self.s.position(unit.output):
            return None
        linear = self.linears[place]
        return linear if self.s.same(_input(linear), unit.source) or self._normed(unit, linear) is not None else None

    # --- ends of a stream -----------------------------------------------------------------------------------------------------

    def embedding(self, stream: Value) -> Value | None:
        """Token or patch embeddings before positions are added, scaled where the model scales them."""
        lookups: list[tuple[int, Value]] = []
        patches: list[Value] = []
        seen: set[int] = set()
        todo = [stream]
        while todo:
            value = todo.pop()
            position = self.s.position(value)
            if position < 0 or position in seen:
                continue
            seen.add(position)
            prim = self.s.prims[position]
            if prim is not None and prim.op == "gather" and self._is_token_lookup(prim.operands):
                table = prim.operands[0]
                assert isinstance(table, Value)
                rows = table.shape[0] if table.shape else 0
                lookups.append((-rows if isinstance(rows, int) else 0, value))
            elif prim is not None and prim.op == "conv" and isinstance(prim.operands[0], Value):
                patches.append(value) if self._from_input(prim.operands[0]) is not None else todo.append(prim.operands[0])
            else:
                todo += [o for o in self.s.nodes[position].operands if o is not None and self.s.is_data(o)]
        if lookups:
            best = min(lookups, key=lambda pair: (pair[0], self.s.position(pair[1])))[1]
            return self._onwards(best, stream, frozenset({"mul", "cast"}))
        if len(patches) == 1 and stream.type.rank == 3:
            return self._onwards(patches[0], stream, frozenset({"reshape", "transpose", "cast"}))
        return None

    def _is_token_lookup(self, operands: tuple[object, ...]) -> bool:
        table, indices = operands[0], operands[1]
        if not isinstance(table, Value) or not self.s.is_constant(table) or not isinstance(indices, Value):
            return False
        source = self._from_input(indices)
        return source is not None and self.graph.role(source.name) is not Role.CONTEXT

    def _from_input(self, value: Value) -> Value | None:
        """The graph input that a value is, casts and reshapes looked through."""
        for _ in range(_STEPS):
            value = self.s.root(value, casts=True)
            if value.kind is Kind.INPUT:
                return value
            prim = self.s.prim(value)
            if prim is None or prim.op not in _PLUMBING or not isinstance(prim.operands[0], Value):
                return None
            value = prim.operands[0]
        return None

    def _onwards(self, value: Value, stop: Value, ops: frozenset[str]) -> Value:
        """``value`` after the following ops of these kinds (multiplications by a number only), not beyond ``stop``."""
        for _ in range(_STEPS):
            read = self.s.only_reader(value)
            prim = read.prim if read is not None else None
            if self.s.same(value, stop) or prim is None or prim.op not in ops:
                break
            if prim.op == "mul" and not any(isinstance(o, (int, float)) for o in prim.operands):
                break
            value = prim.output
        return value

    def final_norm(self, stream: Value) -> Value | None:
        """The norm that reads the end of a stream."""
        ends = {self.s.root(stream): 0}
        for norm in self.flow.norms.values():
            if norm.kind in ("layer_norm", "rms_norm") and self.s.position(norm.output) > self.s.position(stream):
                found = self.flow.before(norm.input, ends)
                if found is not None and not found[1]:
                    return norm.output
        return None

    def logits(self, blocks: list[Block]) -> Value | None:
        """The first output, if it is a linear of what comes after the last block, perhaps scaled or soft-capped."""
        outputs = [value for _, value in self.graph.outputs() if value.dtype is None or value.dtype.is_float]
        if not outputs:
            return None
        last = max(self.s.position(block.units[-1].output) for block in blocks)
        value: Value = outputs[0]
        for _ in range(_STEPS):
            value = self.s.root(self.s.edited(value))
            if value in self.flow.linears:
                return outputs[0] if self.s.position(value) > last else None
            prim = self.s.prim(value)
            if prim is None or not prim.operands:
                return None
            numbers = [o for o in prim.operands if isinstance(o, (int, float))]
            values = [o for o in prim.operands if isinstance(o, Value)]
            scaled = prim.op in ("mul", "div") and numbers
            capped = prim.op == "tanh" and self._scaled_after(prim.output)
            if len(values) != 1 or not (scaled or capped or prim.op in ("cast", "reshape", "identity")):
                return None
            value = values[0]
        return None

    def _scaled_after(self, value: Value) -> bool:
        read = self.s.only_reader(value, casts=True)
        return read is not None and read.prim is not None and read.prim.op == "mul"


def _input(linear: Linear) -> Value:
    node, index = linear.input
    value = node.operands[index] if node is not None else None
    assert value is not None
    return value


def _end(attention: Attention) -> Value:
    return attention.out_projection.output if attention.out_projection is not None else attention.output


def fused_node(s: Semantics, attention: Attention) -> Node | None:
    """The fused operator of an attention whose pattern can be materialised."""
    for node in attention.nodes:
        prim = s.prims[s.position(node.output)]
        if prim is not None and prim.op == "sdpa" and all(isinstance(o, Value) and o.type.rank == 4 for o in prim.operands[:3]):
            return node
    return None


def _virtual_pattern(name: str, s: Semantics, attention: Attention) -> Iterator[Named]:
    node = fused_node(s, attention)
    query, key = attention.query.shape, attention.key.shape
    if node is None or query is None or key is None:
        return
    kind = TensorType(attention.query.dtype, (query[0], query[1], query[2], key[2]))
    yield Named(name, virtual_anchor(node, PATTERN, kind), ROLE)
