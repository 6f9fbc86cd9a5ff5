"""The robustness bench: scores of layers, attacks, and what steering keeps of its effect."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from actgraph.errors import InputError
from actgraph.graph import Graph
from actgraph.graph.graph import Array
from actgraph.passes.steer.robustness import (
    AnswerScore,
    Attack,
    bench,
    bootstrap_layers,
    character_edits,
    correlation_ratio,
    deep_word_bug,
    directions,
    layer_scores,
    match_score,
    most_important_words,
    neighbours,
    select_layers,
    word_swaps,
)
from tests import zoo

WIDTH = 16


def planted(noise: dict[str, float], n: int = 60) -> tuple[dict[str, Array], dict[str, Array], Array]:
    rng = np.random.default_rng(1)
    truth = rng.normal(size=WIDTH)
    truth /= np.linalg.norm(truth)
    sets = [{site: rng.normal(0, size, (n, WIDTH)) + sign * truth for site, size in noise.items()} for sign in (1, -1)]
    return sets[0], sets[1], truth


def test_scores_of_layers() -> None:
    positive, negative, truth = planted({"a": 2.0, "b": 0.2, "c": 0.8})
    scores = layer_scores(positive, negative)
    assert all(-1 <= s.consistency <= 1 and 0 <= s.discriminability <= 1 for s in scores)
    assert select_layers(scores, 3) == ["b", "c", "a"] and select_layers(scores, 1, weight=1.0) == ["b"]
    shares = bootstrap_layers(positive, negative, draws=20)
    assert shares["b"] == 1 and sum(shares.values()) == pytest.approx(1)
    found = directions(positive, negative)["b"]
    assert found @ truth / np.linalg.norm(found) > 0.95
    with pytest.raises(InputError, match="give pairs"):
        layer_scores(positive, {site: rows[:5] for site, rows in negative.items()})
    with pytest.raises(InputError, match="methods are"):
        directions(positive, negative, "lda")


def test_discriminability_is_that_of_the_scatter_matrices() -> None:
    """``v' Sb v / v' St v`` with the matrices built, for a direction that is not the best one."""
    rng = np.random.default_rng(0)
    a, b, v = rng.normal(0.5, 1, (40, WIDTH)), rng.normal(0, 2, (40, WIDTH)), rng.normal(size=WIDTH)
    both = np.concatenate([a, b])
    total = (both - both.mean(0)).T @ (both - both.mean(0))
    between = sum(len(x) * np.outer(x.mean(0) - both.mean(0), x.mean(0) - both.mean(0)) for x in (a, b))
    assert correlation_ratio(a @ v, b @ v) == pytest.approx((v @ between @ v) / (v @ total @ v), abs=1e-9)
    assert correlation_ratio(np.ones(3), np.ones(3)) == 0


def test_layers_are_chosen_alike_in_any_units_and_noise_along_the_direction_counts() -> None:
    positive, negative, truth = planted({"a": 0.5, "b": 0.3})
    units = np.random.default_rng(2).uniform(0.01, 100, WIDTH)
    scaled = layer_scores({s: x * units for s, x in positive.items()}, {s: x * units for s, x in negative.items()})
    for one, other in zip(layer_scores(positive, negative), scaled, strict=True):
        assert (one.consistency, one.discriminability) == pytest.approx((other.consistency, other.discriminability))
    rng = np.random.default_rng(3)
    along = {s: x + rng.normal(0, 3, (len(x), 1)) * truth for s, x in positive.items()}
    across = np.eye(WIDTH)[0] - truth[0] * truth
    aside = {s: x + rng.normal(0, 3, (len(x), 1)) * across for s, x in positive.items()}
    plain, worse, same = (layer_scores(p, negative)[1].discriminability for p in (positive, along, aside))
    assert worse < plain - 0.2 and same > worse + 0.1


def words_score(text: str) -> float:
    """A score that lives off two words."""
    return 0.6 * ("happy" in text) + 0.3 * ("dog" in text) + 0.1


def test_attacks_lower_the_score() -> None:
    text = "the happy dog ran"
    assert most_important_words(text, words_score)[:2] == [1, 2]
    bugged = deep_word_bug(budget=2)(text, words_score)
    assert (
        words_score(bugged) == pytest.approx(0.1)
        and sum(a != b for a, b in zip(bugged.split(), text.split(), strict=True)) == 2
    )
    assert words_score(deep_word_bug(budget=1)(text, words_score)) == pytest.approx(0.4)
    near = neighbours(["happy", "glad", "sad", "dog"], np.array([[1, 0], [0.9, 0.1], [-1, 0], [0, 1]]), count=2)
    assert near("happy") == ["glad", "dog"] and near("cat") == []
    assert word_swaps(near)(text, words_score).split()[1] == "glad"
    assert word_swaps(lambda word: [])(text, words_score) == text
    assert {"hpapy", "hppy", "haappy", "hsppy"} <= set(character_edits("happy")) and character_edits("it") == []


def test_attacks_stop_at_their_goal() -> None:
    """As few words as are needed, at most as many as the budget allows, and none where the score is low already."""
    text = "the happy dog ran"

    def attacked(attack: Attack) -> tuple[int, float, int]:
        asked = []

        def score(each: str) -> float:
            asked.append(each)
            return words_score(each)

        made = attack(text, score)
        return sum(a != b for a, b in zip(made.split(), text.split(), strict=True)), words_score(made), len(asked)

    swaps = [
        lambda goal, budget=4: deep_word_bug(budget, goal),
        lambda goal, budget=4: word_swaps(lambda _: ["x"], budget, goal),
    ]
    for make in swaps:
        assert attacked(make(0.5))[:2] == (1, pytest.approx(0.4)) and attacked(make(0.3))[:2] == (2, pytest.approx(0.1))
        assert attacked(make(0.3, 1))[:2] == (1, pytest.approx(0.4)), "the budget is a limit"
        assert attacked(make(1.5)) == (0, pytest.approx(1.0), 1), "nothing is left to do"
        assert attacked(make(0.5))[2] < attacked(make(0.0))[2] and attacked(make(0.0))[1] == pytest.approx(0.1)


def test_the_success_rate_of_attacks() -> None:
    """Inputs that are below the goal when clean are no success of an attack."""
    scores = {"a": 0.9, "b": 0.8, "c": 0.2, "a!": 0.1, "b!": 0.3, "c!": 0.0}
    told = bench(
        ["a", "b", "c"], lambda text, site, vector: scores[text], {"m": {"s": np.ones(1)}},
        {"shout": lambda text, _: text + "!"},
    )  # fmt: skip
    assert told[0].success("s") == told[0].table()[0]["success"] == 0.5
    assert replace(told[0], goal=0.31).success("s") == 1 and np.isnan(replace(told[0], goal=0.95).success("s"))


def test_the_bench_on_a_model() -> None:
    """Steering towards an answer, attacks on the steered score, all in one table."""
    stories: Graph = zoo.captured("stories260k")
    tokenizer = stories.companions.tokenizer
    assert tokenizer is not None
    sites = ["blocks.1.resid_post", "blocks.3.resid_post"]
    match, other = (tokenizer.encode(word, add_special_tokens=False).ids[-1] for word in ("happy.", "happy,"))
    assert match != other
    score = AnswerScore(stories, sites, match, other)
    texts = ["Lily was very", "The little dog was so"]
    inputs = np.asarray([tokenizer.encode(texts[0]).ids])
    plain = stories.run(
        {"input_ids": inputs, "attention_mask": np.ones_like(inputs), "position_ids": np.arange(inputs.shape[1])[None]}
    )
    assert score(texts[0], "", None) == pytest.approx(match_score(plain["logits"][0, -1], match, other), abs=1e-6)
    rng = np.random.default_rng(0)
    vectors = {"random": {site: rng.normal(0, 2, 64).astype(np.float32) for site in sites}}
    swaps = word_swaps(lambda word: ["cat", "not"], budget=1)
    results = bench(texts, score, vectors, {"none": lambda text, _: text, "swaps": swaps})
    untouched, attacked = results
    for site in sites:
        assert untouched.confidence(site) == pytest.approx(untouched.steered[site].mean())
        assert attacked.confidence(site) <= untouched.confidence(site)
        clean = untouched.directional(site)
        assert np.isnan(clean) or clean == 1
    assert untouched.layer_shift == 0 and len(untouched.table()) == 2
    assert abs(untouched.steerability(sites[0])) > 1e-4, "steering moves the score"
