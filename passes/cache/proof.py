"""What a cache takes for granted, shown on the graph at hand: no token looks ahead, rows are apart, and nothing is lost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from actgraph.errors import PassError
from actgraph.graph import Graph
from actgraph.graph.context import logits_output
from actgraph.graph.executor import Runner, executor_for
from actgraph.graph.graph import Array
from actgraph.graph.parity import sample_inputs
from actgraph.graph.slots import advance, slots_of, with_initial_slots

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


def reproduces(before: Graph, after: Graph, limit: int | None = None, rings: Sequence[int] = ()) -> float:
    """Run ``after`` in chunks and token by token against ``before`` on the whole. Raises PassError; returns the error.

    limit: the number of tokens that ``after`` can take. rings: the sizes of its rings, which are gone around as well.
    """
    worst = 0.0
    for whole, pieces in _trials(before, after, limit, rings):
        error = float(np.abs(pieces - whole).max()) / (float(np.abs(whole).max()) or 1.0)
        if not error <= TOLERANCE:
            raise PassError(
                f"kv_cache: with a cache the logits of {after.name} move by {error:.2g} relative{_culprit(before)}",
                "something besides its attentions looks at other tokens",
            )
        worst = max(worst, error)
    return worst


@dataclass(frozen=True)
class Loss:
    """What a cache of lower precision costs, over the tokens of the proof.

    relative: the largest error of a logit over the largest logit. divergence: the mean Kullback-Leibler divergence of the
    distribution of the next token from that without a cache, in nats. agreement: how often the likeliest token is the same.
    """

    relative: float
    divergence: float
    agreement: float

    def __str__(self) -> str:
        return (
            f"logits move by {self.relative:.2g} relative, KL divergence {self.divergence:.2g} nats, "
            f"same likeliest token {self.agreement:.1%}"
        )


def measure(before: Graph, after: Graph, limit: int | None = None, rings: Sequence[int] = ()) -> Loss:
    """How far the logits of ``after`` are from those of ``before``. Raises PassError where they are no numbers."""
    relative, divergences, same = 0.0, [], []
    for whole, pieces in _trials(before, after, limit, rings):
        if not np.isfinite(pieces).all():
            raise PassError(
                f"kv_cache: keys or values of {after.name} do not fit into what they are stored in",
                "use storage=same, or storage=int8 in place of float16",
            )
        relative = max(relative, float(np.abs(pieces - whole).max()) / (float(np.abs(whole).max()) or 1.0))
        expected, found = (_log_softmax(logits) for logits in (whole, pieces))
        divergences.append((np.exp(expected) * (expected - found)).sum(axis=-1))
        same.append(whole.argmax(axis=-1) == pieces.argmax(axis=-1))
    return Loss(relative, float(np.concatenate(divergences).mean()), float(np.concatenate(same).mean()))


def _log_softmax(logits: Array) -> Array:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def _trials(before: Graph, after: Graph, limit: int | None, rings: Sequence[int]) -> Iterator[tuple[Array, Array]]:
    """Logits [tokens, vocabulary] of real tokens: without a cache, and with it, for some lengths, paddings and chunks."""
    name = logits_output(before)
    padded = any(value.name == "attention_mask" for value in before.inputs())
    old = executor_for(before).open(before, optimize=False)
    new = executor_for(after).open(after, optimize=False)
    for length, divisions in _divisions(limit, rings):
        for padding in ("none", "left") if padded else ("none",):
            inputs = sample_inputs(before, batch=2, seq=length, padding=padding)
            whole = old(inputs)[name]
            valid = np.asarray(inputs.get("attention_mask", np.ones((2, length)))).astype(bool)
            for steps in divisions:
                yield whole[valid], in_steps(after, new, inputs, steps)[valid]


def _divisions(limit: int | None, rings: Sequence[int]) -> Iterator[tuple[int, list[tuple[int, ...]]]]:
    length = min(_LENGTH, limit or _LENGTH)
    yield length, [(length,), (length // 2, length - length // 2), (1,) * length]
    for size in sorted(set(rings)):
        length = size + 7 if limit is None else min(size + 7, limit)  # over the end of the ring, by a chunk and by tokens
        if length > size:
            yield length, [(length - length // 2, length // 2), (size - 1, *(1,) * (length - size + 1))]


def in_steps(graph: Graph, run: Runner, inputs: Mapping[str, Array], steps: Sequence[int]) -> Array:
    """The logits [batch, length, vocabulary] of ``inputs`` fed in steps of so many tokens, with the state fed back."""
    slots, label = list(slots_of(graph).values()), logits_output(graph)
    state: dict[str, Array] = {}
    parts: list[Array] = []
    done = 0
    for count in steps:
        results = run(with_initial_slots(graph, {**feed(graph, inputs, done, done + count), **state}))
        state = advance(slots, results)
        parts.append(results[label])
        done += count
    return np.concatenate(parts, axis=1)


def feed(graph: Graph, inputs: Mapping[str, Array], start: int, stop: int) -> dict[str, Array]:
    """What a call takes, beside its state, for the tokens ``start`` to ``stop`` of ``inputs`` (those of the whole sequence)."""
    declared = {value.name for value in graph.inputs()}
    own = {key: array for key, array in inputs.items() if key in declared and key != "attention_mask"}
    result = {key: array[:, start:stop] for key, array in own.items()}
    if "attention_mask" in declared:
        result["attention_mask"] = inputs["attention_mask"][:, :stop]
    if "cache_position" in declared:
        result["cache_position"] = np.asarray([start], np.int64)
    return result


def _culprit(graph: Graph) -> str:
    found = [node.name for node in graph.nodes() if node.prim is not None and node.prim.op in _MIXES]
    return f" ({', '.join(found[:3])} may be the reason)" if found else ""
