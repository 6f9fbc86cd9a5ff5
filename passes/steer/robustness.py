"""How well steering survives: extraction methods, layers and attacks side by side.

Sources: Adversarial Robustness of Activation Steering in Large Language Models (2026) and LayerNavigator, the layer selector
that it stresses. Discriminability is the correlation ratio of projections, which needs no scatter matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from actgraph.calibrate.encode import token_ids
from actgraph.errors import InputError
from actgraph.graph import Graph
from actgraph.graph.context import logits_output
from actgraph.graph.executor import executor_for
from actgraph.passes.steer.caa import mean_difference
from actgraph.passes.steer.extract import OF_ROWS
from actgraph.passes.steer.steer import Steer
from actgraph.pipeline.manager import PassManager

Array = np.ndarray[Any, Any]
#: A text -> the same attacked, to make a score (the text -> number given) small.
Attack = Callable[[str, Callable[[str], float]], str]
#: The steered score below which an attack has succeeded, and stops.
GOAL = 0.3


def directions(
    positive: Mapping[str, Array], negative: Mapping[str, Array], method: str = "mean_difference"
) -> dict[str, Array]:
    """The direction ``[width]`` of each site by a method of ``extract_vector``, all as long as the difference of means."""
    made = mean_difference if method == "mean_difference" else OF_ROWS.get(method)
    if made is None:
        raise InputError(f"there is no extraction {method!r}", f"methods are mean_difference, {', '.join(OF_ROWS)}")
    return {site: made(positive[site], negative[site]) for site in positive}


@dataclass(frozen=True)
class LayerScore:
    """How good a site is for steering: consistency in [-1, 1], discriminability in [0, 1]."""

    site: str
    consistency: float
    discriminability: float


def layer_scores(
    positive: Mapping[str, Array], negative: Mapping[str, Array], method: str = "mean_difference"
) -> list[LayerScore]:
    """The scores of each site, from the rows of pairs ``[n, width]``, in standardised channels.

    consistency: the mean cosine of the pairs' differences with the direction. discriminability: between-class over total
    scatter along it. Raises InputError where the sets are no pairs.
    """
    found = []
    for site in positive:
        if len(positive[site]) != len(negative[site]):
            raise InputError(f"there are {len(positive[site])} positive and {len(negative[site])} negative texts", "give pairs")
        both = np.concatenate([positive[site], negative[site]]).astype(np.float64)
        deviation = both.std(0)
        standard = (both - both.mean(0)) / np.where(deviation == 0, 1.0, deviation)
        a, b = np.split(standard, 2)
        v = directions({site: a}, {site: b}, method)[site]
        difference = a - b
        sizes = np.linalg.norm(difference, axis=1) * np.linalg.norm(v)
        cosines = (difference @ v) / np.where(sizes == 0, 1.0, sizes)
        found.append(LayerScore(site, float(cosines.mean()), correlation_ratio(a @ v, b @ v)))
    return found


def correlation_ratio(a: Array, b: Array) -> float:
    """Between-class over total scatter of two sets of numbers; 0 where nothing varies."""
    both = np.concatenate([a, b])
    total = float(((both - both.mean()) ** 2).sum())
    between = sum(len(part) * float(part.mean() - both.mean()) ** 2 for part in (a, b))
    return between / total if total > 0 else 0.0


def select_layers(scores: Sequence[LayerScore], count: int, *, weight: float = 0.5) -> list[str]:
    """The ``count`` best sites, best first, by ``weight * discriminability + (1 - weight) * consistency`` (ties: the first)."""
    order = sorted(scores, key=lambda s: -(weight * s.discriminability + (1 - weight) * s.consistency))
    return [score.site for score in order[:count]]


def bootstrap_layers(
    positive: Mapping[str, Array],
    negative: Mapping[str, Array],
    *,
    draws: int = 100,
    seed: int = 0,
    method: str = "mean_difference",
) -> dict[str, float]:
    """How often each site is the best one when the pairs are drawn again."""
    random = np.random.default_rng(seed)
    count = len(next(iter(positive.values())))
    wins = dict.fromkeys(positive, 0)
    for _ in range(draws):
        rows = random.integers(0, count, count)
        again = layer_scores({s: x[rows] for s, x in positive.items()}, {s: x[rows] for s, x in negative.items()}, method)
        wins[select_layers(again, 1)[0]] += 1
    return {site: wins[site] / draws for site in positive}


def match_score(logits: Array, match: int, other: int) -> float:
    """``P(match) / (P(match) + P(other))`` of two answer tokens, from the logits ``[vocabulary]`` at the answer's place."""
    return float(1 / (1 + np.exp(-np.clip(float(logits[match]) - float(logits[other]), -700, 700))))


class AnswerScore:
    """The match score of texts under a model: ``score(text, site, vector)`` as ``bench`` takes it.

    One graph serves all sites and vectors, which are given with each call (``steer{vector=input where=prompt[-1] |
    generated}``: the last token of the prompt is steered). match, other: the two answers' token ids.
    """

    def __init__(self, graph: Graph, sites: Sequence[str], match: int, other: int) -> None:
        self.graph, self.match, self.other = graph, match, other
        step = Steer(vector="input", site=tuple(sites), where="prompt[-1] | generated")
        self._steered = PassManager([step], parity="none").run(graph).rewritten
        if not isinstance(self._steered, Graph):
            raise InputError(f"{graph.name} is a program of several graphs", "give one graph")
        self._runner = executor_for(self._steered).open(self._steered)
        self._output = logits_output(graph)

    def __call__(self, text: str, site: str, vector: Array | None) -> float:
        ids = np.asarray([token_ids(self.graph, text)], np.int64)
        count = ids.shape[1]
        known = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(count)[None]}
        taken = {value.name for value in self._steered.inputs()}  # type: ignore[union-attr]
        inputs = {name: array for name, array in known.items() if name in taken} | {"prompt_lengths": np.array([count])}
        if vector is not None:
            inputs[f"steer.vector.{site}"] = np.asarray(vector, np.float32)[None]
        return match_score(self._runner(inputs)[self._output][0, -1], self.match, self.other)


# --- attacks ------------------------------------------------------------------------------------------------------------------


def most_important_words(text: str, score: Callable[[str], float]) -> list[int]:
    """Places of words, the one whose loss lowers the score most first (ties: the first in the text)."""
    words = text.split(" ")
    loss = [score(text) - score(" ".join(words[:i] + words[i + 1 :])) for i in range(len(words))]
    return sorted(range(len(words)), key=lambda i: -loss[i])


def deep_word_bug(budget: int = 4, goal: float = GOAL) -> Attack:
    """Character edits of the most important words (DeepWordBug): swap two, leave one out, double one, or a neighbour on the
    keyboard.

    budget: how many words may change at most. Of the edits of a word the one that lowers the score most is taken, if it lowers
    it. goal: the attack stops as soon as the score is below, and leaves a text alone whose score is (0: it never stops early).
    """
    return _greedy(character_edits, budget, goal)


def _greedy(edits: Callable[[str], Sequence[str]], budget: int, goal: float) -> Attack:
    """The best of ``edits(word)`` for one word after the other, the most important first."""

    def attack(text: str, score: Callable[[str], float]) -> str:
        words, now = text.split(" "), score(text)
        for place in most_important_words(text, score)[:budget] if now >= goal else ():
            tried = [(score(" ".join([*words[:place], each, *words[place + 1 :]])), each) for each in edits(words[place])]
            if tried and min(tried, key=lambda pair: pair[0])[0] < now:
                now, words[place] = min(tried, key=lambda pair: pair[0])
            if now < goal:
                break
        return " ".join(words)

    return attack


_KEYBOARD = ("qwertyuiop", "asdfghjkl", "zxcvbnm")


def character_edits(word: str) -> list[str]:
    """One edit of a word at every place but its first letter, in order; none for words of less than three letters."""
    edits = []
    for i in range(1, len(word)) if len(word) > 2 else ():
        if i + 1 < len(word):
            edits.append(word[:i] + word[i + 1] + word[i] + word[i + 2 :])
        edits += [word[:i] + word[i + 1 :], word[:i] + word[i] + word[i:]]
        row = next((keys for keys in _KEYBOARD if word[i].lower() in keys), "")
        at = row.find(word[i].lower())
        edits += [word[:i] + row[n] + word[i + 1 :] for n in (at - 1, at + 1) if row and 0 <= n < len(row)]
    return [each for each in dict.fromkeys(edits) if each != word]


def word_swaps(candidates: Callable[[str], Sequence[str]], budget: int = 4, goal: float = GOAL) -> Attack:
    """Swaps of the most important words for ``candidates(word)``: TextFooler with synonyms, greedy swaps with embeddings'
    neighbours. budget, goal: as ``deep_word_bug`` has them.
    """
    return _greedy(candidates, budget, goal)


def neighbours(words: Sequence[str], embeddings: Array, count: int = 8) -> Callable[[str], list[str]]:
    """The ``count`` nearest words by cosine for each of ``words``, whose embeddings are ``[n, e]``; none for others."""
    sizes = np.linalg.norm(embeddings, axis=1, keepdims=True)
    unit = embeddings / np.where(sizes == 0, 1.0, sizes)
    place = {word: i for i, word in enumerate(words)}

    def near(word: str) -> list[str]:
        if word not in place:
            return []
        order = np.argsort(-(unit @ unit[place[word]]), kind="stable")
        return [words[i] for i in order if i != place[word]][:count]

    return near


# --- the bench ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Robustness:
    """Of one method and attack. Scores are arrays over inputs, by site: without steering, steered, and steered on attacked
    inputs.

    Steering raises the score of a match; an attack lowers it, and succeeds where it is below ``goal`` afterwards.
    """

    method: str
    attack: str
    plain: Array
    steered: Mapping[str, Array]
    attacked_plain: Mapping[str, Array]
    attacked: Mapping[str, Array]
    goal: float = GOAL

    def steerability(self, site: str) -> float:
        """The mean rise of the score by steering, on clean inputs."""
        return float((self.steered[site] - self.plain).mean())

    def directional(self, site: str) -> float:
        """The share of inputs that steering moves the right way when clean and still moves so when attacked; NaN: none when
        clean.
        """
        clean = self.steered[site] > self.plain
        still = self.attacked[site] > self.attacked_plain[site]
        return float(still[clean].mean()) if clean.any() else float("nan")

    def confidence(self, site: str) -> float:
        """The mean score of steered, attacked inputs."""
        return float(self.attacked[site].mean())

    def success(self, site: str) -> float:
        """The share of inputs whose steered score an attack brings below the goal, of those that are not below it when clean;
        NaN: none of these.
        """
        open_ = self.steered[site] >= self.goal
        return float((self.attacked[site] < self.goal)[open_].mean()) if open_.any() else float("nan")

    @property
    def layer_shift(self) -> int:
        """How many places the best site (by the steered score) moves under attack."""
        sites = list(self.steered)
        clean = int(np.argmax([self.steered[site].mean() for site in sites]))
        return abs(clean - int(np.argmax([self.attacked[site].mean() for site in sites])))

    def table(self) -> list[dict[str, Any]]:
        """One row a site."""
        return [
            {
                "method": self.method, "attack": self.attack, "site": site, "steerability": self.steerability(site),
                "directional": self.directional(site), "confidence": self.confidence(site), "success": self.success(site),
                "layer_shift": self.layer_shift,
            }
            for site in self.steered
        ]  # fmt: skip


def bench(
    texts: Sequence[str],
    score: Callable[[str, str, Array | None], float],
    vectors: Mapping[str, Mapping[str, Array]],
    attacks: Mapping[str, Attack],
    *,
    goal: float = GOAL,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Robustness]:
    """Every method against every attack, at every site.

    score: ``(text, site, vector)`` -> the match score of a text, steered at ``site`` by the vector (``None``: not steered).
    vectors: method -> site -> ``[width]``. An attack sees the steered score, which it makes small. goal: an attack has
    succeeded below it (give the attacks the same one). progress: told how many texts are done.
    """
    plain = np.array([score(text, "", None) for text in texts])
    results, done = [], 0
    for method, by_site in vectors.items():
        steered = {site: np.array([score(text, site, vector) for text in texts]) for site, vector in by_site.items()}
        for name, attack in attacks.items():
            attacked_plain: dict[str, Array] = {}
            attacked: dict[str, Array] = {}
            for site, vector in by_site.items():
                changed = [attack(text, lambda each, at=site, v=vector: score(each, at, v)) for text in texts]  # type: ignore[misc]
                attacked_plain[site] = np.array([score(text, "", None) for text in changed])
                attacked[site] = np.array([score(text, site, vector) for text in changed])
                done += len(texts)
                progress(done)
            results.append(Robustness(method, name, plain, steered, attacked_plain, attacked, goal))
    return results
