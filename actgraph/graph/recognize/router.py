"""Routers of mixtures of experts: by which scores the experts of a token are chosen, and what their weights are made of.

All conventions in use are one shape: *logits* become *scores* (softmax, sigmoid, or nothing), a *selection* (the scores, or
these and a stored bias) chooses ``k`` experts through a top-k, behind a choice of groups of experts in some models, and the
chosen scores become the *gates* (normalised, scaled, or put through a softmax of their own).
"""

from __future__ import annotations

from dataclasses import dataclass

from actgraph.graph.graph import Node, Use, Value
from actgraph.graph.prims import Prim
from actgraph.graph.recognize.semantic import Operand, Semantics
from actgraph.graph.views import MixtureOfExperts

_REACH = 48
_TAKE = "actgraph.take_along"


@dataclass(frozen=True)
class Groups:
    """Experts are chosen among those of the best groups: ``kept`` of ``count`` groups of ``size`` experts, in order.

    summed: a group's score is the sum of that many of its best experts.
    """

    count: int
    size: int
    kept: int
    summed: int


@dataclass(frozen=True)
class Router:
    """The router of one mixture of experts, as the graph has it now.

    experts, k: how many there are, and how many each token gets.
    logits, scores, selection: ``[..., experts]``: what the linear layer gives, what weights are made of, what the choice is
    made by (groups included).
    choosing: the reads of ``selection`` that lead to the choice. chosen: the experts, ``[..., k]`` integers.
    values: the top-k's own values where the weights are made of them; ``None`` where these are gathered from ``scores``.
    gates: the weights that experts' outputs are mixed by, ``[..., k]``, in the order of ``chosen``.
    bias: the read of the stored ``[experts]`` that is added to the scores for the choice alone, where there is one.
    normalised: whether the weights of a token are divided by their sum (or are a softmax of the chosen scores).
    """

    experts: int
    k: int
    logits: Value
    scores: Value
    selection: Value
    choosing: tuple[Use, ...]
    chosen: Value
    values: Value | None
    gates: Value
    bias: Use | None
    groups: Groups | None
    normalised: bool


def read_router(s: Semantics, mixture: MixtureOfExperts) -> Router | str:
    """The router of ``mixture``, or the reason why it cannot be read."""
    experts = mixture.router.out_features
    if mixture.gates is None:
        return "the weights of its experts were not found"
    taken = _taken(s, mixture.gates)
    if taken is None:
        return "its experts are not chosen by a top-k"
    topk, gathered, normalised = taken
    k, operand = topk.attributes.get("k"), topk.operands[0]
    if not isinstance(k, int) or not isinstance(operand, Value) or len(topk.outputs) != 2:
        return "the number of experts that a token gets is not fixed"
    if operand.shape is None or operand.shape[-1] != experts or topk.attributes["axis"] != len(operand.shape) - 1:
        return f"its top-k is over {operand.type}, and not over the {experts} experts"
    chosen = topk.outputs[1]
    if mixture.gates.shape != chosen.shape:
        return f"its weights {mixture.gates.type} are not in the order of the chosen experts {chosen.type}"
    selection, groups = _selection(s, topk, experts)
    if isinstance(groups, str):
        return groups
    choosing = _choosing(s, selection, topk.node)
    if not choosing:
        return "what its experts are chosen by was not found"
    scores = gathered if gathered is not None else selection
    values = topk.outputs[0] if gathered is None else None
    return Router(
        experts=experts, k=k, logits=mixture.router_logits, scores=scores, selection=selection, choosing=choosing,
        chosen=chosen, values=values, gates=mixture.gates, bias=_bias(s, selection, gathered, experts), groups=groups,
        normalised=normalised,
    )  # fmt: skip


def _taken(s: Semantics, gates: Value) -> tuple[Prim, Value | None, bool] | None:
    """The top-k that the weights come from, the table they are gathered from (``None``: its own values), and ``normalised``."""
    stack, seen, normalised = [gates], set[Value](), False
    found: tuple[Prim, Value | None] | None = None
    while stack and len(seen) < _REACH:
        value = s.root(stack.pop(0), casts=True)
        position = s.position(value)
        if value in seen or position < 0:
            continue
        seen.add(value)
        node, prim = s.nodes[position], s.prims[position]
        if prim is not None and prim.op == "topk":
            found = found or ((prim, None) if value == prim.outputs[0] else None)
            continue
        table, index = _lookup(node, prim)
        chooser = s.source(index, casts=True)
        if table is not None and chooser is not None and chooser.op == "topk":
            found = found or (chooser, table)
            continue
        if prim is not None and (prim.op == "softmax" or (prim.op == "div" and _by_sum(s, prim))):
            normalised = True
        stack += [o for o in node.operands if o is not None and s.is_data(o)]
    return None if found is None else (*found, normalised)


def _lookup(node: Node, prim: Prim | None) -> tuple[Value | None, Operand]:
    """``(table, index)`` of a node that takes the scores of the chosen experts."""
    if node.op == _TAKE:
        return node.operands[0], node.operands[1]
    if prim is not None and prim.op == "gather_elements" and isinstance(prim.operands[0], Value):
        return prim.operands[0], prim.operands[1]
    return None, None


def _by_sum(s: Semantics, division: Prim) -> bool:
    """Whether what a division divides by is a sum over the last axis, up to a small number that is added."""
    below = s.source(division.operands[1], casts=True)
    for _ in range(3):
        if below is None or below.op not in ("add", "clip", "max"):
            break
        below = s.source(next((o for o in below.operands if isinstance(o, Value)), None), casts=True)
    return below is not None and below.op == "sum"


def _selection(s: Semantics, topk: Prim, experts: int) -> tuple[Value, Groups | str | None]:
    """What experts are chosen by, before the experts of other groups are masked out."""
    value = topk.operands[0]
    assert isinstance(value, Value)
    prim = s.source(value)
    if prim is None or prim.op != "where":
        return value, None
    condition, *branches = prim.operands
    kept = [o for o in branches if isinstance(o, Value) and s.is_data(o)]
    choosers = _topks_above(s, condition)
    if not choosers or len(kept) != 1:
        return value, None  # not a mask of groups: an edit of the selection itself
    return s.root(kept[0]), _groups(s, choosers, experts)


def _topks_above(s: Semantics, operand: Operand) -> list[Prim]:
    """The reductions (top-k, maximum) that a mask is computed from, nearest first."""
    stack, seen, found = [operand], set[Value](), list[Prim]()
    while stack and len(seen) < _REACH:
        item = stack.pop(0)
        if not isinstance(item, Value):
            continue
        value = s.root(item, casts=True)
        position = s.position(value)
        if value in seen or position < 0:
            continue
        seen.add(value)
        prim = s.prims[position]
        if prim is not None and prim.op in ("topk", "amax") and prim not in found:
            found.append(prim)
        if prim is None or prim.op != "amax":
            stack += [o for o in s.nodes[position].operands if o is not None and s.is_data(o)]
    return found


def _groups(s: Semantics, choosers: list[Prim], experts: int) -> Groups | str:
    """The groups that a chain of reductions means: the top-k of groups, whose scores are sums of the best of each."""
    outer = choosers[0]
    scores = outer.operands[0]
    count = scores.shape[-1] if isinstance(scores, Value) and scores.shape is not None else None
    kept = outer.attributes.get("k")
    if outer.op != "topk" or not isinstance(count, int) or not isinstance(kept, int) or experts % count:
        return "its experts are masked by something other than a choice of groups"
    inner = next((p for p in choosers[1:] if _last(p) == experts // count), None)
    summed = 1 if inner is not None and inner.op == "amax" else inner.attributes.get("k") if inner is not None else None
    if not isinstance(summed, int):
        return "the scores of its groups are not sums of the best experts of each"
    return Groups(count, experts // count, kept, summed)


def _last(prim: Prim) -> object:
    operand = prim.operands[0]
    return operand.shape[-1] if isinstance(operand, Value) and operand.shape else None


def _choosing(s: Semantics, selection: Value, topk: Node) -> tuple[Use, ...]:
    """The uses of ``selection`` that ``topk`` depends on."""
    last = s.place(topk)
    above, stack = {topk}, [topk]
    first = s.position(selection)
    while stack:
        for operand in stack.pop().operands:
            producer = operand.producer if operand is not None and operand != selection else None
            if producer is not None and producer not in above and first < s.place(producer) < last:
                above.add(producer)
                stack.append(producer)
    return tuple(use for use in selection.uses if use.node in above)


def _bias(s: Semantics, selection: Value, scores: Value | None, experts: int) -> Use | None:
    """The read of a stored ``[experts]`` that is added to ``scores`` to make ``selection``, and is part of nothing else."""
    node = selection.producer
    prim = node.prim if node is not None else None
    if node is None or prim is None or prim.op != "add" or not any(s.same(o, scores, casts=True) for o in prim.operands):
        return None
    for index, operand in enumerate(node.operands):
        if operand is not None and operand.is_parameter and operand.shape == (experts,):
            return Use(node, index)
    return None
