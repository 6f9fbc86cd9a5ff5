"""Edits of routers: which experts a token may get, which it must get, and what weight they have.

*Selection* edits act on the scores that experts are chosen by, before groups of experts are chosen, and never on what weights
are made of: these are the router's own scores of whatever was chosen. *Weight* edits act on the finished weights, behind all
normalisation and scaling, and keep each token's total.

Source: *Mixture of Tunable Experts: Behavior Modification of DeepSeek-R1 at Inference Time*, 2025.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from actgraph.graph import Editor, Graph, Value
from actgraph.graph.context import token_dims
from actgraph.graph.graph import Array, Role
from actgraph.graph.recognize.router import Groups, Router
from actgraph.graph.views import Linear
from actgraph.ops.dtypes import DType
from actgraph.ops.shapes import canonical_dim


@dataclass(frozen=True)
class TokenMask:
    """A clause at a router: 1 for the tokens that it names, ``[*tokens]`` as the router has them, and ``[*tokens, 1]``."""

    tokens: Value
    column: Value


def token_mask(editor: Editor, graph: Graph, mask: Value, like: Value) -> TokenMask | str:
    """``mask`` (broadcastable to [batch, seq]) laid along the tokens of ``like``, ``[tokens, n]`` or ``[batch, seq, n]``.

    Returns the reason where ``like`` has other axes.
    """
    dims, shape = token_dims(graph), like.shape
    if dims is None or shape is None or len(dims) != 2:
        return "a clause is about tokens, and the graph has no batch and sequence dimensions"
    if shape[:-1] not in (dims, (_product(dims),)):
        return f"a clause is about tokens, and {like.type} has other axes"
    marker = next((v for v in graph.inputs() if _counts_tokens(graph, v, dims)), None)
    if marker is None:
        return "a clause is about tokens, and the graph takes no token ids"
    # a context value may be [1, 1]: adding zeros of [batch, seq] gives every token a number of its own
    number = editor.insert("cast", [marker], {"to": DType.F32}).output
    zeros = editor.insert("mul", [number, np.asarray(0, np.float32)]).output
    full = editor.insert("add", [mask, zeros]).output
    if len(shape) == 2:
        full = editor.insert("reshape", [full], {"shape": (-1,)}, name="where").output
        return TokenMask(full, editor.insert("reshape", [full], {"shape": (-1, 1)}).output)
    return TokenMask(full, editor.insert("reshape", [full], {"shape": (*dims, 1)}, name="where").output)


def _product(dims: tuple[int | str | None, ...]) -> int | str | None:
    batch, seq = dims
    if isinstance(batch, int) and isinstance(seq, int):
        return batch * seq
    return canonical_dim(f"({batch})*({seq})")


def _counts_tokens(graph: Graph, value: Value, dims: tuple[int | str | None, ...]) -> bool:
    """Whether an input that is always given has one integer per token."""
    required = graph.role(value.name) is Role.USER and graph.default(value.name) is None
    return required and value.shape == dims and value.dtype is not None and not value.dtype.is_float


# --- selection ----------------------------------------------------------------------------------------------------------------


def extremes(router: Router) -> tuple[float, float]:
    """``(forced, suppressed)``: the selection scores of experts that are always and never chosen.

    Large and finite. One forced expert outweighs the suppressed ones that may stand beside it in the sum of its group's best,
    and no such sum overflows.
    """
    dtype = router.selection.dtype or DType.F32
    largest = 65504.0 if dtype is DType.F16 else float(np.finfo(np.float32).max)
    summed = router.groups.summed if router.groups is not None else 1
    return largest / (4 * summed), -largest / (16 * summed * summed)


def set_selection(editor: Editor, router: Router, scores: Mapping[int, float], mask: TokenMask | None, fold: bool) -> str:
    """Give experts fixed selection scores, for all tokens or those of ``mask``; returns the rule that was used."""
    if fold and mask is None and router.bias is not None:
        bias = _read_bias(editor.graph, router)
        for expert, score in scores.items():
            bias[expert] = score
        _write_bias(editor, router, bias)
        return "folded"
    dtype = (router.selection.dtype or DType.F32).numpy
    table, mine = np.zeros(router.experts, dtype), np.zeros(router.experts, np.bool_)
    for expert, score in scores.items():
        table[expert], mine[expert] = score, True
    condition: Value | Array = mine
    if mask is not None:
        of_token = editor.insert("mul", [mask.column, mine.astype(np.float32)]).output
        condition = editor.insert("cast", [of_token], {"to": DType.BOOL}).output
    edited = editor.insert("where", [condition, table, router.selection], name="router_choice").output
    _choose_by(editor, router, edited)
    return "selection"


def add_to_selection(editor: Editor, router: Router, bias: Value | Array, mask: TokenMask | None, fold: bool) -> str:
    """Add ``bias`` ([experts]) to the selection scores; returns the rule that was used."""
    if fold and mask is None and router.bias is not None and not isinstance(bias, Value):
        _write_bias(editor, router, _read_bias(editor.graph, router) + bias.astype(np.float64))
        return "folded"
    dtype = router.selection.dtype or DType.F32
    added = _as(editor, bias, dtype)
    operands = [router.selection, added, None, mask.tokens if mask is not None else None]
    edited = editor.insert("actgraph.shift", operands, name="router_bias").output
    _choose_by(editor, router, edited)
    return "selection"


def _choose_by(editor: Editor, router: Router, edited: Value) -> None:
    """Let experts be chosen by ``edited``, and weights be made of the scores that the router has for them."""
    editor.redirect(router.selection, edited, router.choosing)
    if router.values is not None:
        scores = editor.insert("actgraph.take_along", [router.scores, router.chosen]).output
        editor.redirect(router.values, scores)


def _read_bias(graph: Graph, router: Router) -> Array:
    assert router.bias is not None and router.bias.node is not None
    stored = router.bias.node.operands[router.bias.index]
    assert stored is not None
    return graph.read(stored).astype(np.float64)


def _write_bias(editor: Editor, router: Router, bias: Array) -> None:
    assert router.bias is not None and router.bias.node is not None
    stored = router.bias.node.operands[router.bias.index]
    assert stored is not None and stored.dtype is not None
    editor.set_parameter(stored, bias.astype(stored.dtype.numpy), uses=[router.bias])


def _as(editor: Editor, bias: Value | Array, dtype: DType) -> Value | Array:
    if not isinstance(bias, Value):
        return bias.astype(dtype.numpy)
    return bias if bias.dtype is dtype else editor.insert("cast", [bias], {"to": dtype}).output


# --- logits and weights -------------------------------------------------------------------------------------------------------


def add_to_logits(
    editor: Editor, router: Router, linear: Linear, logits: Value, bias: Value | Array, mask: TokenMask | None, fold: bool
) -> str:
    """Add ``bias`` ([experts]) to the router's logits, so that choice and weights change; returns the rule that was used."""
    if fold and mask is None and not isinstance(bias, Value) and logits == linear.output:
        old = linear.read_bias()
        dtype = (logits.dtype or DType.F32).numpy
        linear.write_bias(editor, (bias if old is None else old.astype(np.float64) + bias).astype(dtype))
        return "folded"
    added = _as(editor, bias, logits.dtype or DType.F32)
    operands = [logits, added, None, mask.tokens if mask is not None else None]
    shifted = editor.insert("actgraph.shift", operands, after=logits.producer, name="router_bias").output
    editor.redirect(logits, shifted)
    return "logits"


def reweight(
    editor: Editor, router: Router, experts: Collection[int], factor: float, offset: float | None, mask: TokenMask | None
) -> None:
    """Multiply the weights of ``experts`` by ``factor``, add ``offset``, and restore each token's total."""
    dtype = (router.gates.dtype or DType.F32).numpy
    scale, added = np.ones(router.experts, dtype), np.zeros(router.experts, dtype)
    for expert in experts:
        scale[expert], added[expert] = factor, offset or 0.0
    offsets = added if offset is not None else None
    operands: list[Value | Array | None] = [router.gates, router.chosen, scale, offsets, mask.tokens if mask else None]
    edited = editor.insert("actgraph.reweight_experts", operands, name="reweight_experts").output
    editor.redirect(router.gates, edited)


# --- what a router can do -----------------------------------------------------------------------------------------------------


def too_many_suppressed(router: Router, experts: Collection[int]) -> str:
    """Why ``experts`` cannot all be kept from being chosen before the top-k; empty when they can."""
    left = router.experts - len(set(experts))
    if left < router.k:
        return f"{left} of {router.experts} experts are left, and each token gets {router.k}"
    groups = router.groups
    if groups is None:
        return ""
    open_to = [n for n in _left_by_group(groups, experts) if n >= min(groups.summed, groups.size)]
    if len(open_to) < groups.kept:
        return f"{len(open_to)} groups have {groups.summed} experts left, and each token chooses {groups.kept} groups"
    fewest = sum(sorted(open_to)[: groups.kept])
    if fewest < router.k:
        return f"the {groups.kept} groups of a token may have {fewest} experts left, and it gets {router.k}"
    return ""


def closed_groups(router: Router, experts: Collection[int]) -> list[int]:
    """Groups that are never chosen once ``experts`` are suppressed, though some of their experts are left."""
    groups = router.groups
    if groups is None:
        return []
    return [g for g, n in enumerate(_left_by_group(groups, experts)) if 0 < n < min(groups.summed, groups.size)]


def fixed_before(graph: Graph, router: Router) -> dict[int, bool]:
    """The experts that former edits fixed for all tokens: true for forced ones, false for suppressed ones."""
    high, low = extremes(router)
    found: dict[int, bool] = {}

    def take(scores: Array, mine: Array) -> None:
        for expert in np.flatnonzero(mine & ((scores > high / 2) | (scores < low / 2))):
            found.setdefault(int(expert), bool(scores[expert] > 0))  # the last edit counts, and is met first

    value: Value = router.selection
    while value.producer is not None and (prim := value.producer.prim) is not None and prim.op == "where":
        condition, table, before = prim.operands
        if not isinstance(table, Value) or not table.is_parameter or not isinstance(before, Value):
            break
        if isinstance(condition, Value) and condition.is_parameter:  # not of a clause: those are about some tokens
            take(graph.read(table).astype(np.float64), graph.read(condition))
        value = before
    if router.bias is not None:
        take(_read_bias(graph, router), np.ones(router.experts, np.bool_))
    elif value.producer is not None and (prim := value.producer.prim) is not None and prim.op == "add":
        stored = next((o for o in prim.operands if isinstance(o, Value) and o.is_parameter), None)
        if stored is not None and stored.shape == (router.experts,):
            take(graph.read(stored).astype(np.float64), np.ones(router.experts, np.bool_))
    return found


def _left_by_group(groups: Groups, experts: Collection[int]) -> list[int]:
    gone = [expert // groups.size for expert in set(experts)]
    return [groups.size - gone.count(group) for group in range(groups.count)]


def too_many_forced(router: Router, experts: Collection[int]) -> str:
    """Why ``experts`` cannot all be forced into every token's set; empty when they can."""
    count = len(set(experts))
    if count > router.k:
        return f"{count} experts cannot be among the {router.k} of a token"
    if router.groups is not None:
        groups = {expert // router.groups.size for expert in experts}
        if len(groups) > router.groups.kept:
            return f"they are in {len(groups)} groups, and each token chooses {router.groups.kept}"
    return ""
