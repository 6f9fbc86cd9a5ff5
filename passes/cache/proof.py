"""What a cache takes for granted, shown on the graph at hand: no token looks ahead, rows are apart, and nothing is lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from actgraph.errors import PassError
from actgraph.graph import Graph
from actgraph.graph.context import logits_output
from actgraph.graph.executor import Runner, executor_for
from actgraph.graph.graph import Array
from actgraph.graph.parity import sample_inputs
from actgraph.graph.slots import slots_of, with_initial_slots

#: Relative to the largest logit: what rounding in another order may move.
TOLERANCE = 1e-4
_LENGTH = 12
#: What looks along the sequence outside of an attention, by the name of the shared vocabulary.
_MIXES = ("conv", "cumsum", "roll", "flip", "pad")


def refuse_what_looks_ahead(graph: Graph) -> list[str]:
    """Perturb a token and a row, and see what moves. Raises PassError when it is what must not; returns what was seen."""
    name = logits_output(graph)
    run = executor_for(graph).open(graph, optimize=False)
    inputs = sample_inputs(graph, batch=2, seq=_LENGTH)
    base = run(inputs)[name]
    size = float(np.abs(base).max()) or 1.0
    place = _LENGTH // 2
    changed = {**inputs, "input_ids": inputs["input_ids"].copy()}
    changed["input_ids"][0, place] = (changed["input_ids"][0, place] + 1) % max(int(inputs["input_ids"].max()), 2)
    moved = np.abs(run(changed)[name] - base).max(axis=-1) / size
    if moved[0, :place].max() > TOLERANCE:
        raise PassError(
            f"kv_cache: tokens of {graph.name} see later ones", "only decoders that never look ahead can have a cache"
        )
    if moved[1].max() > TOLERANCE:
        raise PassError(f"kv_cache: the rows of a batch of {graph.name} influence each other", "a cache keeps rows apart")
    if moved[0, place:].max() == 0:
        raise PassError(f"kv_cache: the logits of {graph.name} do not depend on its tokens", "check the graph")
    return [f"causal: a change of token {place} moved no earlier logit by more than {moved[0, :place].max():.1e}"]


def reproduces(before: Graph, after: Graph, limit: int | None = None) -> float:
    """Run ``after`` in chunks and token by token against ``before`` on the whole. Raises PassError; returns the error.

    limit: the number of tokens that ``after`` can take.
    """
    name, length = logits_output(before), min(_LENGTH, limit or _LENGTH)
    padded = any(value.name == "attention_mask" for value in before.inputs())
    worst = 0.0
    old = executor_for(before).open(before, optimize=False)
    new = executor_for(after).open(after, optimize=False)
    for padding in ("none", "left") if padded else ("none",):
        inputs = sample_inputs(before, batch=2, seq=length, padding=padding)
        whole = old(inputs)[name]
        valid = np.asarray(inputs.get("attention_mask", np.ones((2, length)))).astype(bool)
        size = float(np.abs(whole[valid]).max()) or 1.0
        for steps in ((length,), (length // 2, length - length // 2), (1,) * length):
            pieces = in_steps(after, new, inputs, steps)
            error = float(np.abs(pieces - whole)[valid].max()) / size
            if not error <= TOLERANCE:
                raise PassError(
                    f"kv_cache: with a cache the logits of {after.name} move by {error:.2g} relative{_culprit(before)}",
                    "something besides its attentions looks at other tokens",
                )
            worst = max(worst, error)
    return worst


def in_steps(graph: Graph, run: Runner, inputs: Mapping[str, Array], steps: Sequence[int]) -> Array:
    """The logits [batch, length, vocabulary] of ``inputs`` fed in steps of so many tokens, with the state fed back."""
    slots, label = list(slots_of(graph).values()), logits_output(graph)
    declared = {value.name for value in graph.inputs()}
    state: dict[str, Array] = {}
    parts: list[Array] = []
    done = 0
    for count in steps:
        own = {key: array for key, array in inputs.items() if key in declared and key != "attention_mask"}
        feed = {key: array[:, done : done + count] for key, array in own.items()}
        if "attention_mask" in declared:
            feed["attention_mask"] = inputs["attention_mask"][:, : done + count]
        if "cache_position" in declared:
            feed["cache_position"] = np.asarray([done], np.int64)
        results = run(with_initial_slots(graph, {**feed, **state}))
        state = {slot.input: results[slot.output] for slot in slots}
        parts.append(results[label])
        done += count
    return np.concatenate(parts, axis=1)


def _culprit(graph: Graph) -> str:
    found = [node.name for node in graph.nodes() if node.prim is not None and node.prim.op in _MIXES]
    return f" ({', '.join(found[:3])} may be the reason)" if found else ""
