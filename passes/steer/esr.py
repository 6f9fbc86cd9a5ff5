"""Endogenous steering resistance (ESR): which latents notice that a model was steered off its topic, and how strongly to steer.

Source: Endogenous Resistance to Activation Steering in Language Models (2026), and its authors' code for what the paper leaves
open. Off-topic detectors are latents of a sparse autoencoder that fire on no answer to its own prompt and on most answers to
another prompt; the paper ablates them (``sae_steer{mode=ablate}``) and compares with as many random latents. The strength of a
steering is found by probabilistic bisection (Waeber, Frazier, Henderson: Bisection Search with Noisy Responses, 2013).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from actgraph.calibrate.documents import per_document
from actgraph.errors import InputError
from actgraph.formats.sae import SparseAutoencoder, sae_site
from actgraph.graph import Graph
from actgraph.graph.graph import Array

#: Below this a latent does not fire.
ZERO = 1e-8
_TINY = 1e-300
_TOKENS = 64  # tokens encoded at a time: bounds the memory of wide autoencoders


def latent_activations(
    graph: Graph,
    corpus: Any,
    sae: SparseAutoencoder,
    *,
    site: str = "",
    other_site: bool = False,
    other_model: bool = False,
    batch_size: int = 8,
    max_length: int | None = None,
    progress: bool = True,
) -> Array:
    """The largest value of each latent over all tokens of each document, ``[documents, latents]`` float32.

    corpus: documents (texts, chats, arrays), special tokens included as the tokenizer puts them. sae: the whole autoencoder or
    some of its latents (of a top-k one, the whole). site, other_site, other_model: see ``actgraph.formats.sae.sae_site``.
    """

    def largest(tokens: Array) -> Array:
        parts = [sae.encode(tokens[at : at + _TOKENS]).max(0) for at in range(0, len(tokens), _TOKENS)]
        return np.asarray(np.max(parts, axis=0))

    place = sae_site(graph, sae, site, other_site=other_site, other_model=other_model)
    return per_document(graph, place.name, corpus, largest, batch_size=batch_size, max_length=max_length, progress=progress)


@dataclass(frozen=True)
class OffTopicLatent:
    """One latent: in which share of the documents it fires (0 to 1), and its mean maximum over documents."""

    latent: int
    off_topic_share: float
    on_topic_share: float
    off_topic_mean: float
    on_topic_mean: float


@dataclass(frozen=True)
class OffTopicLatents:
    """The off-topic detectors, best first: by the share of off-topic documents, then by mean, then by index.

    documents: how many on-topic and off-topic ones were compared; candidates: how many latents. ``latents`` goes into
    ``sae_steer{mode=ablate latents=...}``.
    """

    rows: tuple[OffTopicLatent, ...]
    documents: tuple[int, int]
    candidates: int
    share: float

    @property
    def latents(self) -> tuple[int, ...]:
        """The indices, best first."""
        return tuple(row.latent for row in self.rows)

    def __str__(self) -> str:
        """A table."""
        on, off = self.documents
        head = (
            f"{len(self.rows)} of {self.candidates} latents fire on none of {on} on-topic and on at least {self.share:.0%} of "
        )
        lines = [head + f"{off} off-topic documents", f"{'latent':>8}  {'off-topic':>9}  {'on-topic':>8}  {'mean':>8}"]
        lines += [
            f"{row.latent:>8}  {row.off_topic_share:>9.1%}  {row.on_topic_share:>8.1%}  {row.off_topic_mean:>8.3f}"
            for row in self.rows
        ]
        return "\n".join(lines)


def off_topic_latents(
    on_topic: Array, off_topic: Array, *, share: float = 0.8, zero: float = ZERO, indices: Sequence[int] | None = None
) -> OffTopicLatents:
    """Latents below ``zero`` in **all** on-topic documents and at least ``zero`` in ``share`` or more of the off-topic ones.

    on_topic, off_topic: ``[documents, latents]``, maxima over tokens (``latent_activations``). indices: the latents' indices;
    default: 0, 1, 2 ... Raises InputError for arrays that do not go together and a share that is not in (0, 1].
    """
    on, off = np.asarray(on_topic), np.asarray(off_topic)
    if on.ndim != 2 or off.ndim != 2 or on.shape[1] != off.shape[1] or not len(on) or not len(off):
        raise InputError(f"on-topic latents are {list(on.shape)} and off-topic ones {list(off.shape)}", "[documents, latents]")
    if not 0 < share <= 1:
        raise InputError(f"share is {share}", "it is a part of the off-topic documents, such as 0.8")
    names = list(range(on.shape[1])) if indices is None else list(indices)
    if len(names) != on.shape[1]:
        raise InputError(f"{len(names)} indices for {on.shape[1]} latents")
    fires_on, fires_off = (on >= zero).mean(0), (off >= zero).mean(0)
    means_on, means_off = on.mean(0, dtype=np.float64), off.mean(0, dtype=np.float64)
    found = [
        OffTopicLatent(names[i], float(fires_off[i]), float(fires_on[i]), float(means_off[i]), float(means_on[i]))
        for i in np.flatnonzero((on < zero).all(0) & (fires_off >= share))
    ]
    found.sort(key=lambda row: (-row.off_topic_share, -row.off_topic_mean, row.latent))
    return OffTopicLatents(tuple(found), (len(on), len(off)), on.shape[1], share)


def find_off_topic_latents(
    graph: Graph,
    sae: SparseAutoencoder,
    prompts: Sequence[str],
    responses: Sequence[str],
    *,
    site: str = "",
    chat: bool = False,
    separator: str = " ",
    share: float = 0.8,
    zero: float = ZERO,
    seed: int = 0,
    other_site: bool = False,
    other_model: bool = False,
    batch_size: int = 8,
    progress: bool = True,
) -> OffTopicLatents:
    """The off-topic detectors of a model: each prompt with its own answer against each with another prompt's.

    responses: the unsteered model's answers, one for each prompt. chat: as messages of the tokenizer's chat template (as in the
    paper); else as text, ``prompt + separator + response``. seed: of the derangement that pairs prompts with other answers.
    """
    if len(prompts) != len(responses):
        raise InputError(f"there are {len(prompts)} prompts and {len(responses)} responses", "one answer for each prompt")
    order = derangement(len(prompts), seed)

    def document(prompt: str, response: str) -> Any:
        if not chat:
            return f"{prompt}{separator}{response}"
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]

    pairs = (
        [document(prompt, response) for prompt, response in zip(prompts, responses, strict=True)],
        [document(prompt, responses[other]) for prompt, other in zip(prompts, order, strict=True)],
    )
    on, off = (
        latent_activations(
            graph,
            documents,
            sae,
            site=site,
            other_site=other_site,
            other_model=other_model,
            batch_size=batch_size,
            progress=progress,
        )
        for documents in pairs
    )
    return off_topic_latents(on, off, share=share, zero=zero, indices=sae.indices)


def derangement(count: int, seed: int = 0) -> tuple[int, ...]:
    """A permutation of ``range(count)`` that leaves nothing in its place, all of them equally likely. It takes two or more."""
    if count < 2:
        raise InputError(f"{count} documents cannot change places", "give at least two prompts")
    for attempt in range(1000):  # one in e permutations is a derangement
        order = np.random.Generator(np.random.Philox(key=seed, counter=attempt)).permutation(count)
        if not (order == np.arange(count)).any():
            return tuple(int(place) for place in order)
    raise InputError(f"no derangement was found with seed {seed}", "use another seed")


def random_latents(count: int, size: int, *, exclude: Sequence[int] = (), seed: int = 0) -> tuple[int, ...]:
    """``count`` latents of ``size``, none of ``exclude``, ascending: the control that an ablation is compared with."""
    left = np.setdiff1d(np.arange(size), np.asarray(list(exclude), np.int64))
    if not 0 < count <= len(left):
        raise InputError(f"{count} of {len(left)} latents cannot be drawn", "draw fewer")
    return tuple(int(i) for i in np.sort(np.random.Generator(np.random.Philox(key=seed)).choice(left, count, replace=False)))


# --- how strongly to steer --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StrengthTrial:
    """One trial: the strength that was tried, the score that it got, how sure that was of its side, and the median after it."""

    strength: float
    score: float
    certainty: float
    median: float


@dataclass(frozen=True)
class StrengthSearch:
    """Where the score crosses the target, as far as the trials tell: the median of the posterior, and its middle 80 %."""

    strength: float
    low: float
    high: float
    target: float
    trials: tuple[StrengthTrial, ...]

    def __str__(self) -> str:
        """A table."""
        lines = [f"score {self.target:g} at strength {self.strength:.4g} ({self.low:.4g} to {self.high:.4g})"]
        lines += [f"{'strength':>9}  {'score':>6}  {'certainty':>9}"]
        lines += [f"{t.strength:>9.4g}  {t.score:>6.3f}  {t.certainty:>9.2f}" for t in self.trials]
        return "\n".join(lines)


def find_strength(
    score: Callable[[float], float],
    *,
    target: float = 0.3,
    low: float = 0.0,
    high: float = 5.0,
    prior_mean: float = 1.0,
    prior_std: float = 0.25,
    trials: int = 20,
    weight: float = 5.0,
    points: int = 10_000,
) -> StrengthSearch:
    """The strength at which a noisy score in [0, 1] that falls with the strength crosses ``target``.

    score: steers with a strength and returns the judge's score (0.3 is 30 of 100). prior_mean, prior_std: of a normal prior on
    [low, high]. Each trial samples at the posterior's median. A score ``s`` makes the chance that the true one is at least the
    target that of ``Beta(1/2 + weight s, 1/2 + weight (1 - s))``, which multiplies the grid on either side.

    The authors' code takes the side from the score and stops where its chance is then below one half (a score just below a low
    target); here the chance itself decides, which is the same rule wherever theirs runs.
    """
    if not (low < high and 0 < target < 1 and trials > 0 and points > 2 and prior_std > 0 and weight > 0):
        raise InputError("find_strength needs low < high, 0 < target < 1, and positive trials, points, prior_std and weight")
    grid = np.linspace(low, high, points)
    density = -0.5 * ((grid - prior_mean) / prior_std) ** 2  # logarithms, up to a constant
    made: list[StrengthTrial] = []
    for _ in range(trials):
        at = _quantile(density, 0.5)
        got = float(score(float(grid[at])))
        if not 0 <= got <= 1:
            raise InputError(f"a score is {got}", "scores are between 0 and 1")
        above = 1 - beta_cdf(target, 0.5 + weight * got, 0.5 + weight * (1 - got))
        above = min(max(above, 1e-12), 1 - 1e-12)
        right, left = math.log(above), math.log(1 - above)  # at or above the target: the crossing is at a larger strength
        density[:at] += left
        density[at] += (left + right) / 2
        density[at + 1 :] += right
        density -= density.max()
        made.append(StrengthTrial(float(grid[at]), got, max(above, 1 - above), float(grid[_quantile(density, 0.5)])))
    middle, first, last = (float(grid[_quantile(density, q)]) for q in (0.5, 0.1, 0.9))
    return StrengthSearch(middle, first, last, target, tuple(made))


def _quantile(density: Array, q: float) -> int:
    """The first grid point at which the cumulated density reaches ``q``."""
    mass = np.cumsum(np.exp(density - density.max()))
    return min(int(np.searchsorted(mass, q * mass[-1])), len(mass) - 1)


def beta_cdf(x: float, a: float, b: float) -> float:
    """The cumulated Beta distribution, by its continued fraction (Lentz's method), within 1e-12."""
    if not 0 < x < 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - beta_cdf(1 - x, b, a)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)) / a
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1))  # not 0: x is at most (a + 1) / (a + b + 2)
    fraction = d
    for m in range(1, 500):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d, c = 1 / ((1 + term * d) or _TINY), (1 + term / c) or _TINY
            fraction *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return front * fraction
