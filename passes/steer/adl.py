"""What finetuning left in activations: the mean difference of two models at the first tokens of any text.

Source: Narrow Finetuning Leaves Clearly Readable Traces in Activation Differences (Activation Difference Lens, ADL, 2025).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from actgraph.calibrate.corpora import Corpus
from actgraph.calibrate.engine import collect
from actgraph.calibrate.statistics import Request, Statistics
from actgraph.errors import InputError
from actgraph.formats.vectors import SteeringVector, model_fingerprint
from actgraph.graph import Graph
from actgraph.graph.executor import executor_for
from actgraph.graph.parity import sample_inputs

Array = np.ndarray[Any, Any]

_OUTLIERS = 5  # tokens at the beginning of a text whose norms are far from those of the rest


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
        direction = self._unit(position)
        return SteeringVector({self.site: (self.norm * direction).astype(np.float32)}, self.model, "adl", f"{position}")

    def _unit(self, position: int) -> Array:
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
    wide = logits.astype(np.float64)
    chance = np.exp(wide - wide.max(1, keepdims=True))
    chance /= chance.sum(1, keepdims=True)
    order = np.argsort(-chance, axis=1, kind="stable")[:, :top]
    return [[(int(token), float(chance[row, token])) for token in tokens] for row, tokens in enumerate(order)]


def _filled(graph: Graph, rows: int) -> dict[str, Array]:
    """Inputs of one token for each row, for those that a graph goes on taking."""
    return {name: array for name, array in sample_inputs(graph, batch=rows, seq=1).items() if name != "lens"}


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
