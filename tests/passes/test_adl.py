"""Differences between two models: planted biases, steering vectors, readouts and the search for a strength."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

import actgraph as ag
from actgraph.errors import InputError
from actgraph.graph import Graph
from actgraph.passes.steer.adl import activation_difference, logit_lens, strongest_coherent
from tests import zoo

SITE = "blocks.2.resid_post"
TEXTS = [
    "Once upon a time there was a dog.",
    "Lily went to the big park.",
    "The sun was hot, and they played.",
    "Tom had a red ball.",
]


@pytest.fixture(scope="module")
def stories() -> Graph:
    return zoo.captured("stories260k")


def test_a_planted_bias_is_the_difference(stories: Graph) -> None:
    bias = np.random.default_rng(0).normal(size=64)
    vector = "[" + ", ".join(str(float(b)) for b in bias) + "]"
    finetuned = ag.run(stories, f"steer{{vector={vector} site={SITE}}}").graph
    found = activation_difference(stories, finetuned, TEXTS, site=SITE, progress=False)
    assert found.differs and found.delta.shape == (5, 64) and found.documents == len(TEXTS)
    np.testing.assert_allclose(found.delta, np.broadcast_to(bias, (5, 64)), atol=1e-5)
    one = activation_difference(stories, finetuned, TEXTS, site=SITE, batch_size=1, progress=False)
    np.testing.assert_allclose(one.delta, found.delta, atol=1e-6)
    steering = found.steering_vector(1)
    assert np.linalg.norm(steering.directions[SITE]) == pytest.approx(found.norm, rel=1e-5)
    assert [row["position"] for row in found.table()] == list(range(5))
    # the norm leaves out the first five tokens of each text
    tapped = ag.run(finetuned, f"tap{{site={SITE}}}", parity="none").graph
    tokenizer, sizes = stories.companions.tokenizer, []
    assert tokenizer is not None
    for text in TEXTS:
        ids = np.asarray([tokenizer.encode(text).ids])
        inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(ids.shape[1])[None]}
        sizes += np.linalg.norm(tapped.run(inputs)[SITE][0, 5:], axis=-1).tolist()
    assert found.norm == pytest.approx(np.mean(sizes), rel=1e-5)


def test_equal_models_do_not_differ(stories: Graph) -> None:
    found = activation_difference(stories, stories.clone(), TEXTS, progress=False)
    assert not found.differs and found.site == "blocks.2.resid_post"
    with pytest.raises(InputError, match="do not differ at position 0"):
        found.steering_vector(0)
    with pytest.raises(InputError, match="positions are 0 to 4"):
        found.steering_vector(9)
    with pytest.raises(InputError, match="tokens at most"):
        activation_difference(stories, stories, ["a"], positions=30, progress=False)


def test_the_logit_lens_is_the_models_own_head(stories: Graph) -> None:
    """The last residual stream of a text, read through the lens, gives the model's own probabilities."""
    last = "blocks.4.resid_post"
    inputs = ag.sample_inputs(stories, batch=1, seq=6)
    out = ag.run(stories, f"tap{{site={last}}}", parity="none").graph.run(inputs)
    read = logit_lens(stories, out[last][0, -2:], top=3)
    logits = out["logits"][0, -2:].astype(float)
    chance = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    for row in range(2):
        assert [token for token, _ in read[row]] == np.argsort(-chance[row])[:3].tolist()
        np.testing.assert_allclose([p for _, p in read[row]], np.sort(chance[row])[::-1][:3], rtol=1e-4)


@pytest.mark.parametrize("limit", [0.0, 17.3, 61.04, 100.0])
def test_asking_ahead_is_plain_bisection(limit: float) -> None:
    rounds = []

    def grade(strengths: Sequence[float]) -> list[float]:
        rounds.append(len(strengths))
        return [1.0 if strength <= limit else 0.0 for strength in strengths]

    found = strongest_coherent(grade)
    assert found == strongest_coherent(lambda s: grade(s), ahead=1) and abs(found - min(limit, 100)) < 100 / 2**11
    assert rounds[:4] == [7, 7, 7, 7] and rounds[4:] == [1] * 12
