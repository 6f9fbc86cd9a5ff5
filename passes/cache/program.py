"""One graph for any number of new tokens as a program of two: prefill for prompts, decode for one token at a time.

Decode is the combined graph with its sequence fixed to 1, without what that makes needless: masks that hide nothing from the
last token, and what is constant then. Source: the split is standard practice in serving (*Splitwise*, 2023; *Sarathi*, 2023).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from actgraph.errors import ActgraphError, PassError
from actgraph.graph import Editor, Graph, Node, Use, Value
from actgraph.graph.context import context_length, logits_output, token_dims
from actgraph.graph.executor import Runner, executor_for
from actgraph.graph.graph import Array
from actgraph.graph.parity import sample_inputs
from actgraph.graph.program import Driver, Program
from actgraph.graph.slots import UPDATES, advance, slots_of, with_initial_slots
from actgraph.graph.specialise import specialise
from actgraph.ops.dtypes import DType
from actgraph.ops.shapes import dim_add
from actgraph.passes.cache import proof, ring
from actgraph.passes.cleanup.fold import FoldConstants
from actgraph.passes.cleanup.identity import RemoveIdentities
from actgraph.pipeline.base import PassContext

PREFILL, DECODE = "prefill", "decode"
#: Where the ops of an attention read the mask.
_MASKS = {"actgraph.attention": 3, "actgraph.attention_pattern": 2}
#: What may stand between the head and the logits: numbers that depend on one token each (softcaps, scales, casts).
_POINTWISE = frozenset({"identity", "cast", "add", "sub", "mul", "div", "tanh", "clip"})


def split(combined: Graph, *, last_logits: bool = False, options: str = "") -> tuple[Program, float]:
    """The program of ``combined`` (what ``kv_cache`` made), and by how much it differs, relative to the largest logit.

    last_logits: prefill gives the logits of the last position only, [batch, 1, vocabulary]. options: the text of the pass, for
    provenance. Raises PassError where the head is not at the end, or where the program does not give what ``combined`` does.
    """
    prefill = combined.clone()
    if last_logits:
        with prefill.edit("kv_cache", options) as editor:
            keep_last_logits(editor)
    program = Program(
        {PREFILL: prefill, DECODE: for_one_token(combined, options)}, Driver.prefill_then_decode(PREFILL, DECODE), combined.name
    )
    return program, _difference(program, combined)


def for_one_token(combined: Graph, options: str = "") -> Graph:
    """The graph that computes one new token of each row."""
    dims = token_dims(combined)
    assert dims is not None and isinstance(dims[1], str)
    graph = specialise(combined, {dims[1]: 1})
    with graph.edit("kv_cache", options) as editor:
        for node in [node for node in graph.nodes() if node.op == "actgraph.position_mask"]:
            _simplify_mask(editor, node)
        if any(slot.update == "ring" for slot in slots_of(graph).values()):
            ring.attend_after_write(editor)
        editor.erase_dead()
    # weights stay as they are: prefill has the same ones
    for cleanup in (FoldConstants(limit=64, weights=False), RemoveIdentities()):
        cleanup.run(graph, PassContext(name="kv_cache", text=options))
    return graph


def _simplify_mask(editor: Editor, node: Node) -> None:
    """The last token sees every key of a cache that grows: its mask is the padding alone, or none."""
    queries, keys, valid = (*node.operands, None)[:3]
    if node.attributes.get("window") or node.attributes.get("chunk") or not _is_last(queries, keys):
        return
    assert keys is not None and keys.shape is not None
    if valid is None:
        for use in node.output.uses:
            if use.node is not None and _MASKS.get(use.node.op) == use.index:
                editor.forget_edge(Use(use.node, use.index), "kv_cache")
                editor.set_operand(use.node, use.index, None)
        return
    if valid.shape is None or valid.shape[1] != keys.shape[0]:
        return
    batch, length = valid.shape
    seen = valid if valid.dtype is DType.BOOL else editor.insert("cast", [valid], {"to": DType.BOOL}, like=node).output
    mask = editor.insert("reshape", [seen], {"shape": [batch, 1, 1, length]}, name="padding_mask", like=node)
    editor.redirect(node.output, mask.output)


def _is_last(queries: Value | None, keys: Value | None) -> bool:
    """Whether the one query stands at the position of the last key: it counts on from a length, keys from 0 to one more."""
    query, key = _positions(queries), _positions(keys)
    if query is None or key is None or (len(key.operands) > 1 and key.operands[1] is not None):
        return False
    start = query.operands[1] if len(query.operands) > 1 else None
    length = start.producer if start is not None else None
    if length is None or length.op != "actgraph.length":
        return False
    past = length.operands[0]
    assert queries is not None and keys is not None and past is not None
    if queries.shape != (1,) or keys.shape is None or past.shape is None:
        return False
    return keys.shape[0] is not None and keys.shape[0] == dim_add(past.shape[length.attributes["axis"]], 1)


def _positions(value: Value | None) -> Node | None:
    node = value.producer if value is not None else None
    return node if node is not None and node.op == "actgraph.positions" else None


# --- the head -----------------------------------------------------------------------------------------------------------------


def keep_last_logits(editor: Editor) -> None:
    """Compute the logits of the last position only: the head reads [batch, 1, hidden]. Raises PassError with the reason."""
    graph = editor.graph
    label = logits_output(graph)
    logits = dict(graph.outputs())[label]
    head = {linear.output: linear for linear in graph.views.linears()}
    value, passed = logits, 0
    while value not in head:
        if len(value.uses) != 1:
            raise PassError(
                f"last_logits: {value.name}, from which the logits are computed, is read elsewhere as well", _NO_LAST
            )
        value = _pointwise_source(graph, value)
        passed += 1
    if len(value.uses) != 1:
        raise PassError(f"last_logits: the output of the head, {value.name}, is read elsewhere as well", _NO_LAST)
    use = head[value].input
    assert use.node is not None
    hidden = use.node.operands[use.index]
    dims = token_dims(graph)
    if hidden is None or hidden.shape is None or len(hidden.shape) != 3 or hidden.shape[:2] != dims or logits.shape is None:
        raise PassError(f"last_logits: the head of {graph.name} does not read [batch, seq, hidden]", _NO_LAST)
    batch, _, vocabulary = logits.shape
    last = editor.insert("slice", [hidden], {"axis": 1, "start": -1}, name="last_position", like=use.node)
    editor.redirect(hidden, last.output, [use])
    try:
        editor.retype([use.node])
    except ActgraphError as error:
        raise PassError(
            f"last_logits: the head of {graph.name} does not take one position: {error.message}", _NO_LAST
        ) from error
    found = dict(graph.outputs())[label].shape
    if found != (batch, 1, vocabulary):
        raise PassError(f"last_logits: the logits of one position would be {list(found or ())}", _NO_LAST)


_NO_LAST = "leave last_logits out"


def _pointwise_source(graph: Graph, value: Value) -> Value:
    """What ``value`` is computed from, token by token. Raises PassError where it is something else."""
    node = value.producer
    prim = node.prim if node is not None else None
    what = f"{node.name} ({node.op})" if node is not None else value.name
    if prim is None or prim.op not in _POINTWISE:
        raise PassError(f"last_logits: the logits of {graph.name} come from {what}, not from a linear head", _NO_LAST)
    sources = [operand for operand in prim.operands if isinstance(operand, Value) and not operand.is_parameter]
    if len(sources) != 1 or sources[0].shape != value.shape:
        raise PassError(f"last_logits: {what}, behind the head of {graph.name}, is not pointwise", _NO_LAST)
    return sources[0]


# --- proof --------------------------------------------------------------------------------------------------------------------

_LENGTH = 9
#: How far numbers may move by rounding, relative: what is stored in fewer bits may take another one of its values.
_ROUNDING = {DType.F16: 2e-3, DType.BF16: 2e-2, DType.I8: 1e-2, DType.U8: 1e-2}


def _difference(program: Program, combined: Graph) -> float:
    """Run ``program`` against ``combined`` on a prompt in two chunks and some tokens, and compare logits and state.

    Raises PassError where they differ by more than rounding; returns the largest relative difference of logits.
    """
    runners = {name: executor_for(graph).open(graph, optimize=False) for name, graph in program.graphs.items()}
    whole = executor_for(combined).open(combined, optimize=False)
    slots = slots_of(combined).values()
    tolerance = max((_ROUNDING.get(slot.dtype, proof.TOLERANCE) for slot in slots), default=proof.TOLERANCE)
    worst, length = 0.0, _trial_length(combined)
    padded = any(value.name == "attention_mask" for value in combined.inputs())
    for padding in ("none", "left") if padded else ("none",):
        inputs = sample_inputs(combined, batch=2, seq=length, padding=padding)
        valid = np.asarray(inputs.get("attention_mask", np.ones((2, length), np.int64))).astype(bool)
        ours: dict[str, Array] = {}
        theirs: dict[str, Array] = {}
        done = 0
        for name, count in _steps(length):
            end = done + count
            found, ours = _step(program.graphs[name], runners[name], inputs, done, end, ours)
            expected, theirs = _step(combined, whole, inputs, done, end, theirs)
            last = found.shape[1]
            rows = valid[:, end - last : end]
            moved = _relative(found[rows], expected[:, -last:][rows])
            stored = [_relative(ours[slot.input], theirs[slot.input]) for slot in slots if slot.dtype.is_float]
            if not max(moved, *stored) <= tolerance:
                raise PassError(
                    f"kv_cache: the {name} graph moves by {max(moved, *stored):.2g} relative from the combined one",
                    "graphs=combined gives that one; please report it",
                )
            worst, done = max(worst, moved), end
    return worst


def _trial_length(graph: Graph) -> int:
    """Tokens of the trial: around each ring, and no more than the cache or the model takes."""
    slots = [slot for slot in slots_of(graph).values() if slot.update != "replace"]
    places = {update: [n for s in slots if s.update == update and isinstance(n := s.shape[2], int)] for update in UPDATES}
    limits = [*places["scatter"], *(limit for limit in (context_length(graph),) if limit is not None)]
    return min([max([_LENGTH, *(size + 5 for size in places["ring"])]), *limits])


def _steps(length: int) -> list[tuple[str, int]]:
    """A prompt in two chunks, and single tokens."""
    tokens = max(1, length // 3)
    first = (length - tokens + 1) // 2
    chunks = [count for count in (first, length - tokens - first) if count]
    return [*((PREFILL, count) for count in chunks), *((DECODE, 1) for _ in range(tokens))]


def _step(
    graph: Graph, run: Runner, inputs: Mapping[str, Array], start: int, stop: int, state: Mapping[str, Array]
) -> tuple[Array, dict[str, Array]]:
    results = run(with_initial_slots(graph, {**proof.feed(graph, inputs, start, stop), **state}))
    return results[logits_output(graph)], advance(slots_of(graph).values(), results)


def _relative(found: Array, expected: Array) -> float:
    """The largest difference over the largest magnitude; infinite where the shapes differ."""
    if found.shape != expected.shape:
        return float("inf")
    left, right = found.astype(np.float64), expected.astype(np.float64)
    return float(np.abs(left - right).max(initial=0.0) / (np.abs(right).max(initial=0.0) or 1.0))
