"""ESR's analyses: maxima of latents, the choice of off-topic detectors, and the search for a strength."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

import actgraph as ag
from actgraph.errors import InputError
from actgraph.formats.sae import SparseAutoencoder
from actgraph.formats.saelens import load_sae
from actgraph.passes.steer.esr import (
    beta_cdf,
    derangement,
    find_off_topic_latents,
    find_strength,
    latent_activations,
    off_topic_latents,
    random_latents,
)
from tests import zoo
from tests.saes import random_sae, write_sae

PROMPTS = ["Lily went to the park.", "Tim had a dog.", "It was a sunny day.", "The cat was sad.", "Once there was a big bear."]
ANSWERS = ["She played on the swing.", "The dog ran fast.", "They saw the sun.", "She cried a lot.", "The bear was very happy."]


def stream(text: str) -> np.ndarray:
    graph = zoo.captured("stories260k")
    ids = np.array([graph.companions.tokenizer.encode(text).ids], np.int64)
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(ids.shape[1])[None]}
    return ag.run(graph, "tap{site=blocks.2.resid_post}").graph.run(inputs)["blocks.2.resid_post"][0]


def sae_with(tmp_path: Path) -> SparseAutoencoder:
    """One whose latents fire rarely: on some answers and not on others."""
    reference = random_sae("jumprelu", scale=0.6)
    reference.tensors["b_enc"] -= 2.0
    return load_sae(write_sae(tmp_path, reference))


def test_latents_of_documents(tmp_path: Path) -> None:
    """The maxima over a document's own tokens, of the whole SAE and of some latents, also of a top-k one."""
    graph = zoo.captured("stories260k")
    whole = load_sae(write_sae(tmp_path / "all", random_sae("topk", scale=0.6, k=6)))
    got = latent_activations(graph, PROMPTS, whole, batch_size=3, progress=False)
    want = np.stack([whole.encode(stream(text)).max(0) for text in PROMPTS])
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)
    assert got.shape == (5, 96) and 0.02 < (got > 0).mean() < 0.98
    sae = sae_with(tmp_path / "some")
    part = latent_activations(graph, PROMPTS, sae.chosen([7, 3]), batch_size=2, progress=False)
    np.testing.assert_allclose(part, latent_activations(graph, PROMPTS, sae, progress=False)[:, [7, 3]], rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="was trained at"):
        latent_activations(graph, PROMPTS, sae, site="blocks.1.resid_post", progress=False)


def test_detectors_are_silent_on_topic_and_loud_off_topic() -> None:
    """The rule and the order of the paper's code, on planted latents."""
    on, off = np.zeros((10, 6)), np.zeros((10, 6))
    off[:8, 0] = 0.5  # in 8 of 10: just enough
    off[:7, 1] = 9.0  # in too few
    off[:, 2], on[3, 2] = 1.0, 0.1  # fires on topic, once
    off[:, 3] = 0.2
    off[:, 4] = 0.3  # as often as 3, and more strongly
    off[:, 5], on[:, 5] = 2e-8, 0.9e-8  # the limit is 1e-8
    table = off_topic_latents(on, off)
    assert table.latents == (4, 3, 5, 0)
    assert [round(row.off_topic_share, 2) for row in table.rows] == [1.0, 1.0, 1.0, 0.8]
    assert table.rows[0].off_topic_mean == pytest.approx(0.3) and table.rows[0].on_topic_share == 0
    assert "4 of 6 latents fire on none of 10 on-topic" in str(table) and len(str(table).splitlines()) == 6
    assert off_topic_latents(on, off, share=0.7).latents == (4, 3, 5, 0, 1)
    assert off_topic_latents(on, off, indices=[60, 50, 40, 30, 20, 10]).latents == (20, 30, 10, 60)
    assert off_topic_latents(off, on).latents == ()
    for wrong in ((on, off[:, :5]), (on[:0], off), (on[0], off)):
        with pytest.raises(InputError, match=r"\[documents, latents\]"):
            off_topic_latents(*wrong)
    with pytest.raises(InputError, match="share is 0"):
        off_topic_latents(on, off, share=0)


def test_detectors_of_a_model(tmp_path: Path) -> None:
    """Found in one go: what the rule gives for pairs that are put together and run by hand."""
    graph, sae = zoo.captured("stories260k"), sae_with(tmp_path)
    found = find_off_topic_latents(graph, sae, PROMPTS, ANSWERS, share=0.2, seed=3, batch_size=2, progress=False)
    order = derangement(5, 3)
    on = np.stack([sae.encode(stream(f"{p} {a}")).max(0) for p, a in zip(PROMPTS, ANSWERS, strict=True)])
    off = np.stack([sae.encode(stream(f"{p} {ANSWERS[o]}")).max(0) for p, o in zip(PROMPTS, order, strict=True)])
    want = off_topic_latents(on, off, share=0.2)
    assert found.latents == want.latents and len(found.latents) > 0
    assert found.latents != find_off_topic_latents(graph, sae, PROMPTS, ANSWERS, share=0.2, seed=5, progress=False).latents
    ablated = ag.run(graph, f"sae_steer{{sae={str(tmp_path)!r} mode=ablate latents={list(found.latents)}}}")
    again = latent_activations(
        ablated.graph, [f"{p} {ANSWERS[o]}" for p, o in zip(PROMPTS, order, strict=True)], sae, progress=False
    )
    assert again[:, list(found.latents)].sum() < off[:, list(found.latents)].sum(), "they are weaker where they were ablated"
    with pytest.raises(InputError, match="5 prompts and 4 responses"):
        find_off_topic_latents(graph, sae, PROMPTS, ANSWERS[:4], progress=False)
    with pytest.raises(InputError, match="has no chat template"):
        find_off_topic_latents(graph, sae, PROMPTS, ANSWERS, chat=True, progress=False)


def test_derangements_and_controls() -> None:
    seen = {derangement(4, seed) for seed in range(200)}
    assert len(seen) == 9, "all derangements of four"
    assert all(place != index for order in seen for index, place in enumerate(order))
    assert derangement(50, 7) == derangement(50, 7) != derangement(50, 8)
    with pytest.raises(InputError, match="at least two"):
        derangement(1)
    drawn = random_latents(26, 64, exclude=[3, 5], seed=1)
    assert len(set(drawn)) == 26 and not {3, 5} & set(drawn) and drawn == random_latents(26, 64, exclude=[3, 5], seed=1)
    with pytest.raises(InputError, match="3 of 2 latents"):
        random_latents(3, 4, exclude=[0, 1])


@pytest.mark.parametrize("true", [0.7, 1.0, 1.3])
@pytest.mark.parametrize("seed", range(5))
def test_bisection_finds_a_known_threshold(true: float, seed: int) -> None:
    """ESR's acceptance (e): within 5 % in 20 noisy trials of a falling score that is 0.3 at the threshold."""
    rng = np.random.default_rng(seed)

    def judge(strength: float) -> float:
        return float(np.clip(0.6 / (1 + math.exp(6 * (strength / true - 1))) + rng.normal(0, 0.08), 0, 1))

    found = find_strength(judge)
    assert abs(found.strength - true) < 0.05 * true
    assert len(found.trials) == 20 and found.low < found.strength < found.high
    assert found.trials[0].strength == pytest.approx(1.0, abs=1e-3), "the first trial is at the prior's median"


def test_bisection_needs_a_falling_score_and_good_numbers() -> None:
    rising = find_strength(lambda s: min(1.0, 0.3 * s), target=0.3)
    assert abs(rising.strength - 1.0) > 0.1, "a rising score drives the search away from its crossing"
    just_below = find_strength(lambda s: 0.29, target=0.3, trials=3)  # where the authors' code stops with an error
    assert all(trial.certainty >= 0.5 for trial in just_below.trials)
    assert "strength" in str(just_below)
    with pytest.raises(InputError, match="a score is 30"):
        find_strength(lambda s: 30.0)
    with pytest.raises(InputError, match="low < high"):
        find_strength(lambda s: 0.3, low=2, high=1)


def test_beta_is_the_integral_of_its_density() -> None:
    for a, b in ((0.5, 5.5), (2.0, 4.0), (3.0, 3.0), (5.5, 0.5), (1.0, 1.0)):
        t = (np.arange(400_000) + 0.5) / 400_000
        density = t ** (a - 1) * (1 - t) ** (b - 1)
        cumulated = np.cumsum(density) / density.sum()
        for x in (0.05, 0.3, 0.5, 0.8, 0.95):
            assert beta_cdf(x, a, b) == pytest.approx(np.interp(x, t + 0.5 / 400_000, cumulated), abs=2e-3)
        assert beta_cdf(0, a, b) == 0 and beta_cdf(1, a, b) == 1
    assert beta_cdf(0.37, 1, 1) == pytest.approx(0.37, abs=1e-12)
    assert beta_cdf(0.5, 2.3, 2.3) == pytest.approx(0.5, abs=1e-12)
    assert beta_cdf(0.2, 2, 1) == pytest.approx(0.04, abs=1e-12)
