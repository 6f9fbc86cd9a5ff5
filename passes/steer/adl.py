"""What finetuning left in activations: the mean difference of two models at the first tokens of any text.

Source: Narrow Finetuning Leaves Clearly Readable Traces in Activation Differences (Activation Difference Lens, ADL, 2025).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from actgraph.calibrate.batches import batches
from actgraph.calibrate.corpora import Corpus
from actgraph.calibrate.documents import per_document
from actgraph.calibrate.encode import Signature, samples, token_ids
from actgraph.calibrate.engine import collect
from actgraph.calibrate.perplexity import _total
from actgraph.calibrate.progress import progress_bar
from actgraph.calibrate.statistics import Request, Statistics
from actgraph.errors import InputError
from actgraph.formats.vectors import SteeringVector, model_fingerprint
from actgraph.graph import Graph
from actgraph.graph.context import logits_output
from actgraph.graph.executor import executor_for
from actgraph.graph.parity import sample_inputs

Array = np.ndarray[Any, Any]

_OUTLIERS = 5  # tokens at the beginning of a text whose norms are far from those of the rest
#: The scales of the patchscope: 0.5 to 2 by tenths, then fewer.
SCALES = (*(n / 10 for n in range(5, 21)), 3.0, 4.0, 5.0, 10.0, *(float(n) for n in range(20, 201, 20)))
#: Prompts at whose last token a model repeats what it reads there.
IDENTITY_PROMPTS = (
    "cat -> cat\n7 -> 7\nblue -> blue\n?",
    "tree -> tree\n35 -> 35\nwalk -> walk\n?",
    "home -> home\n128 -> 128\nsoft -> soft\n?",
)


@dataclass(frozen=True)
class ActivationDifference:
    """``delta_j``, the mean over texts of ``h_finetuned - h_base`` at position j, at one site.

    delta: ``[positions, width]`` float64. base, finetuned: the means that it is the difference of. norm: the mean L2 norm of
    the finetuned model's tokens, the first five of each text left out. documents: how many texts.
    """

    site: str
    delta: Array
    base: Array
    finetuned: Array
    norm: float
    documents: int
    model: str = ""

    @property
    def differs(self) -> bool:
        """Whether there is any difference at all."""
        return bool(self.delta.any())

    def steering_vector(self, position: int) -> SteeringVector:
        """``norm * delta_j / |delta_j|``, for the finetuned model. Raises InputError where the models do not differ there."""
        direction = self.unit(position)
        return SteeringVector({self.site: (self.norm * direction).astype(np.float32)}, self.model, "adl", f"{position}")

    def unit(self, position: int) -> Array:
        """``delta_j / |delta_j|``, float64. Raises InputError where the models do not differ there."""
        if not 0 <= position < len(self.delta):
            raise InputError(f"there is no position {position}", f"positions are 0 to {len(self.delta) - 1}")
        size = np.linalg.norm(self.delta[position])
        if size == 0:
            raise InputError(f"the models do not differ at position {position} of {self.site}", "compare models that differ")
        return np.asarray(self.delta[position] / size)

    def table(self) -> list[dict[str, Any]]:
        """One row a position: the norm of the difference, absolute and as a fraction of the tokens' norm."""
        sizes = np.linalg.norm(self.delta, axis=1)
        return [{"position": j, "norm": float(size), "relative": float(size / self.norm)} for j, size in enumerate(sizes)]


def activation_difference(
    base: Graph,
    finetuned: Graph,
    corpus: Any = None,
    *,
    site: str = "",
    positions: int = 5,
    batch_size: int = 8,
    max_length: int | None = None,
    progress: bool = True,
) -> ActivationDifference:
    """Compare two models of one architecture on texts that neither was finetuned on.

    site: default: the residual stream behind the block at half the depth. positions: how many of the first tokens are told
    apart. Both are read in one streaming pass each; sums are float64. Raises InputError where the site is of another width
    in one model, or no text has that many tokens.
    """
    name = site or f"blocks.{len(finetuned.views.blocks()) // 2}.resid_post"
    texts = Corpus.of(corpus)
    where = f":{positions}"
    mean = Request(name, "mean", axis=-1, positions=True, where=where)
    norm = Request(name, "norm", axis=-1, where=f"{_OUTLIERS}:")
    options: dict[str, Any] = {"batch_size": batch_size, "max_length": max_length, "progress": progress}
    found: list[Statistics] = [collect(base, [mean], texts, **options), collect(finetuned, [mean, norm], texts, **options)]
    means = [each.array(mean) for each in found]
    if means[0].shape != means[1].shape:
        raise InputError(
            f"{name} is {means[0].shape[1]} wide in one model and {means[1].shape[1]} in the other", "compare alike"
        )
    if len(means[0]) < positions:
        raise InputError(f"the texts have {len(means[0])} tokens at most, not {positions}", "ask for fewer positions")
    return ActivationDifference(
        name,
        means[1] - means[0],
        means[0],
        means[1],
        float(found[1].array(norm)),
        found[1].documents,
        model_fingerprint(finetuned),
    )


def logit_lens(graph: Graph, rows: Array, top: int = 100) -> list[list[tuple[int, float]]]:
    """The most likely tokens where vectors ``rows [n, width]`` are read as the last residual stream: (token id, probability).

    ``softmax(W_U norm(row))`` by the graph's own final norm and unembedding, which are run with the row in place of what the
    final norm reads.
    """
    lens = graph.clone()
    blocks = lens.views.blocks()
    with lens.edit("logit lens") as editor:
        site = lens.site(f"blocks.{len(blocks) - 1}.resid_post")
        value = editor.site_value(site)
        assert value.dtype is not None
        given = editor.add_input("lens", value.type)
        editor.redirect(value, given)
        editor.erase_dead()
    inputs = _filled(lens, len(rows))
    logits = executor_for(lens).open(lens)({**inputs, "lens": rows[:, None, :].astype(value.dtype.numpy)})["logits"][:, -1]
    chance = _softmax(logits)
    order = np.argsort(-chance, axis=1, kind="stable")[:, :top]
    return [[(int(token), float(chance[row, token])) for token in tokens] for row, tokens in enumerate(order)]


def _filled(graph: Graph, rows: int) -> dict[str, Array]:
    """Inputs of one token for each row, for those that a graph goes on taking."""
    return {name: array for name, array in sample_inputs(graph, batch=rows, seq=1).items() if name != "lens"}


def _softmax(logits: Array) -> Array:
    wide = logits.astype(np.float64)
    chance = np.exp(wide - wide.max(-1, keepdims=True))
    return np.asarray(chance / chance.sum(-1, keepdims=True))


class _Halves:
    """A graph cut at a site: what it computes up to there, and its logits from a value there on."""

    def __init__(self, graph: Graph, site: str) -> None:
        head, tail = graph.clone(), graph.clone()
        with head.edit("adl") as editor:
            value = editor.site_value(head.site(site))
        self._at, self._head = value.name, executor_for(head).open(head, [value])
        with tail.edit("adl") as editor:
            place = tail.site(site)
            value = editor.site_value(place)
            assert value.dtype is not None
            self._entry, self._dtype = editor.add_input("adl.site", value.type).name, value.dtype.numpy
            editor.redirect(value, tail.value(self._entry), place.uses(tail))
            editor.erase_dead()
        self._tail, self._output = executor_for(tail).open(tail), logits_output(graph)
        self._taken = {each.name for each in graph.inputs()}

    def value(self, inputs: dict[str, Array]) -> Array:
        """What the graph computes at the site."""
        return self._head(self._known(inputs))[self._at]

    def logits(self, inputs: dict[str, Array], value: Array) -> Array:
        """The logits ``[batch, seq, vocabulary]`` where readers of the site see ``value``."""
        logits = self._tail({**self._known(inputs), self._entry: value.astype(self._dtype)})[self._output]
        if logits.shape[:2] != value.shape[:2]:
            raise InputError(f"the logits are {list(logits.shape)}, not for each token", "use a model without last_logits")
        return logits

    def _known(self, inputs: dict[str, Array]) -> dict[str, Array]:
        return {name: array for name, array in inputs.items() if name in self._taken}


@dataclass(frozen=True)
class ScaleReadout:
    """What one scale reads: tokens that are among the most likely after every prompt, as (token id, mean probability), the
    most likely first, their texts, and the grade (``None``: not graded).
    """

    scale: float
    tokens: tuple[tuple[int, float], ...]
    texts: tuple[str, ...]
    grade: float | None = None


@dataclass(frozen=True)
class Patchscope:
    """What a model says that a difference is, scale by scale."""

    site: str
    position: int
    readouts: tuple[ScaleReadout, ...]

    @property
    def best(self) -> ScaleReadout:
        """The scale with the highest grade, the first of equal ones. Raises InputError where none is graded."""
        graded = [readout for readout in self.readouts if readout.grade is not None]
        if not graded:
            raise InputError("no scale has a grade", "give a grader, and more tokens of each prompt (top) if none is common")
        return max(graded, key=lambda readout: readout.grade or 0.0)

    def table(self, most: int = 10) -> list[dict[str, Any]]:
        """One row a scale: how many tokens prompts have in common, the first of them, and the grade."""
        return [
            {"scale": each.scale, "common": len(each.tokens), "tokens": list(each.texts[:most]), "grade": each.grade}
            for each in self.readouts
        ]


def patchscope(
    graph: Graph,
    found: ActivationDifference,
    position: int,
    prompts: Sequence[str] = IDENTITY_PROMPTS,
    *,
    scales: Sequence[float] = SCALES,
    top: int = 100,
    grade: Callable[[Sequence[str]], float] | None = None,
    batch_size: int = 16,
) -> Patchscope:
    """Let a model say what a difference is: the activation of each prompt's last token, at the site, is replaced by
    ``scale * norm * delta_j / |delta_j|``, and the next token read.

    top: of each prompt that many of the most likely tokens; those of all prompts are kept, with their mean probability. grade:
    the texts of a scale's tokens, the most likely first -> a number, the larger the better (how well they go together, say by a
    language model); scales without a common token are not graded. Raises InputError where the models do not differ there.
    """
    vector = found.norm * found.unit(position)
    halves, tokenizer = _Halves(graph, found.site), graph.companions.tokenizer
    kept: list[set[int]] = []
    total: Array | None = None
    for prompt in prompts:
        ids = np.asarray([token_ids(graph, prompt)], np.int64)
        place = np.arange(ids.shape[1])[None]
        one = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": place}
        value = halves.value(one)
        chances = []
        for start in range(0, len(scales), batch_size):
            part = np.asarray(scales[start : start + batch_size], np.float64)
            inputs = {name: np.repeat(array, len(part), 0) for name, array in one.items()}
            replaced = np.repeat(value.astype(np.float64), len(part), 0)
            replaced[:, -1] = part[:, None] * vector
            chances.append(_softmax(halves.logits(inputs, replaced)[:, -1]))
        chance = np.concatenate(chances)
        likely = [set(row.tolist()) for row in np.argsort(-chance, axis=1, kind="stable")[:, :top]]
        kept = [old & new for old, new in zip(kept, likely, strict=True)] if total is not None else likely
        total = chance if total is None else total + chance
    if total is None:
        raise InputError("there is no prompt", "give one or more")
    mean, readouts = total / len(prompts), []
    for row, scale in enumerate(scales):
        common = sorted(kept[row], key=lambda token: (-mean[row, token], token))
        texts = tuple(tokenizer.decode([token]) for token in common) if tokenizer is not None else ()
        note = None if grade is None or not common else float(grade(texts))
        readouts.append(ScaleReadout(scale, tuple((token, float(mean[row, token])) for token in common), texts, note))
    return Patchscope(found.site, position, tuple(readouts))


@dataclass(frozen=True)
class CausalEffect:
    """How the finetuned model's loss changes where the part of activations along a direction is set to another value.

    loss: the mean loss of a token without an edit, in nats. difference: its rise by the edit along ``delta_j``. random,
    activations: the rise for each baseline direction. A positive rise says that the direction carries what the model needs
    there (as on texts like those of the finetuning), a negative one that it does harm. tokens: how many are predicted.
    """

    site: str
    position: int
    target: str
    loss: float
    difference: float
    random: Array
    activations: Array
    tokens: int

    def exceeded(self, baseline: Array) -> float:
        """The share of a baseline's directions whose edit changes the loss less."""
        return float((np.abs(baseline) < abs(self.difference)).mean()) if len(baseline) else float("nan")

    def table(self) -> list[dict[str, Any]]:
        """One row for the difference and one for each baseline: the mean rise of the loss, the least and the largest one, and
        which share of the baseline the difference exceeds.
        """
        rows: list[dict[str, Any]] = []
        for name, rises in (
            ("difference", np.array([self.difference])),
            ("random", self.random),
            ("activations", self.activations),
        ):
            if not len(rises):
                continue
            rows.append({"direction": name, "count": len(rises), "rise": float(rises.mean())})
            rows[-1] |= {"least": float(rises.min()), "largest": float(rises.max())}
            rows[-1] |= {"exceeded": None if name == "difference" else self.exceeded(rises)}
        return rows


def causal_check(
    base: Graph,
    finetuned: Graph,
    found: ActivationDifference,
    corpus: Any,
    position: int,
    *,
    target: Literal["base", "zero"] = "base",
    directions: int = 64,
    seed: int = 0,
    batch_size: int = 8,
    max_length: int | None = None,
    progress: bool = True,
) -> CausalEffect:
    """Edit the finetuned model at every token along the unit difference d, ``h' = h + (t - h . d) d``, and compare its loss.

    target: ``t`` is the base model's projection at that token, or 0 (d is projected out). directions: how many random
    directions (normal), and how many differences of two random tokens' activations (of different texts, under the base model,
    without the first five tokens where a text has more), are edited in the same way. The site is read once for each batch, and
    every edit runs the blocks behind it. Raises InputError where the models do not differ at that position, where no token is
    predicted, and for a corpus of one text with ``directions``.
    """
    opened = Corpus.of(corpus)
    options: dict[str, Any] = {"batch_size": batch_size, "max_length": max_length, "progress": progress}
    drawn = np.random.default_rng([seed, 2]).normal(size=(directions, found.delta.shape[1]))
    pairs = _activation_pairs(base, found.site, opened, directions, seed, options) if directions else drawn
    edits = np.concatenate([found.unit(position)[None], drawn, pairs])
    edits /= np.linalg.norm(edits, axis=1, keepdims=True)
    halves = _Halves(finetuned, found.site)
    other = _Halves(base, found.site) if target == "base" else None
    signature = Signature.of(finetuned).causal()
    limit = min((n for n in (signature.fixed_length(), max_length) if n is not None), default=None)
    totals, tokens = np.zeros(1 + len(edits)), 0
    with progress_bar("causal check", len(opened), progress) as advance:
        source = samples(finetuned, opened, limit=limit, pack=False)
        for batch in batches(signature, source, batch_size=batch_size):
            ids = batch.inputs["input_ids"]
            mask = batch.masks[(signature.by_name()["input_ids"].shape or (None,))[-1]]
            lengths = [int(mask[row].sum()) for row in range(batch.rows)]
            value = halves.value(batch.inputs).astype(np.float64)
            goal = np.zeros_like(value) if other is None else other.value(batch.inputs).astype(np.float64)
            for number, d in enumerate([None, *edits]):
                edited = value if d is None else value + ((goal - value) @ d)[..., None] * d
                logits = halves.logits(batch.inputs, edited)
                totals[number] -= sum(
                    _total(logits[row, : length - 1], ids[row, 1:length]) for row, length in enumerate(lengths)
                )
            tokens += sum(max(0, length - 1) for length in lengths)
            advance(batch.rows)
    if not tokens:
        raise InputError("no token is predicted: every document has a single token", "use longer documents")
    losses = totals / tokens
    rises = losses[1:] - losses[0]
    return CausalEffect(
        found.site,
        position,
        target,
        float(losses[0]),
        float(rises[0]),
        rises[1 : 1 + directions],
        rises[1 + directions :],
        tokens,
    )


def _activation_pairs(graph: Graph, site: str, corpus: Corpus, count: int, seed: int, options: dict[str, Any]) -> Array:
    """Differences of the activations of two random tokens of different texts, ``[count, width]`` float64."""

    def some(rows: Array) -> Array:
        first = min(_OUTLIERS, len(rows) - 1)
        return rows[np.random.default_rng([seed, len(rows)]).integers(first, len(rows), 8)]

    pool = per_document(graph, site, corpus, some, **options).astype(np.float64)
    if len(pool) < 2:
        raise InputError("differences of activations need two texts", "use a larger corpus, or directions=0")
    random, found = np.random.default_rng([seed, 1]), np.zeros((0, pool.shape[-1]))
    least = np.linalg.norm(pool, axis=-1).mean()
    for _ in range(100):
        a = random.integers(0, len(pool), count)
        b = (a + random.integers(1, len(pool), count)) % len(pool)
        places = random.integers(0, pool.shape[1], (2, count))
        rows = pool[a, places[0]] - pool[b, places[1]]
        differ = np.linalg.norm(rows, axis=1) > 1e-5 * least  # by more than rounding
        found = np.concatenate([found, rows[differ]])[:count]
        if len(found) == count:
            return found
    raise InputError(f"the texts have the same activations at {site}", "use texts that differ")


def strongest_coherent(
    coherence: Callable[[Sequence[float]], Sequence[float]],
    *,
    highest: float = 100.0,
    least: float = 0.75,
    decisions: int = 12,
    ahead: int = 3,
) -> float:
    """The largest strength in ``[0, highest]`` whose coherence is at least ``least``, by bisection.

    coherence: strengths -> the share of coherent texts at each. Each round asks for the ``2**ahead - 1`` midpoints that the
    next ``ahead`` decisions may need at once, so that they can run as one batch; the result is that of one decision at a time.
    """
    low, high, made = 0.0, highest, 0
    while made < decisions:
        depth = min(ahead, decisions - made)
        asked = _midpoints(low, high, depth)
        known = dict(zip(asked, coherence(asked), strict=True))
        for _ in range(depth):
            middle = (low + high) / 2
            if known[middle] >= least:
                low = middle
            else:
                high = middle
        made += depth
    return low


def _midpoints(low: float, high: float, depth: int) -> list[float]:
    if depth == 0:
        return []
    middle = (low + high) / 2
    return [*_midpoints(low, middle, depth - 1), middle, *_midpoints(middle, high, depth - 1)]
