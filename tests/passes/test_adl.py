"""Differences between two models: planted biases, steering vectors, readouts and the search for a strength."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import actgraph as ag
from actgraph.errors import InputError
from actgraph.graph import Graph
from actgraph.graph.graph import Array
from actgraph.graph.hooks import run_with_hooks
from actgraph.passes.steer.adl import (
    IDENTITY_PROMPTS,
    SCALES,
    ActivationDifference,
    activation_difference,
    causal_check,
    logit_lens,
    patchscope,
    strongest_coherent,
)
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


def planted(graph: Graph, size: float = 3.0) -> tuple[Graph, ActivationDifference]:
    """The model with a constant added at a site, and the difference that this makes."""
    bias = np.random.default_rng(0).normal(size=64)
    vector = "[" + ", ".join(str(float(b)) for b in size * bias) + "]"
    finetuned = ag.run(graph, f"steer{{vector={vector} site={SITE} fold=false}}").graph
    return finetuned, activation_difference(graph, finetuned, TEXTS, site=SITE, progress=False)


@pytest.mark.parametrize("dialect", ["fx", "onnx"])
def test_the_patchscope_is_a_hook_at_the_last_token(stories: Graph, dialect: str, tmp_path: Path) -> None:
    finetuned, found = planted(stories)
    finetuned = finetuned if dialect == "fx" else ag.load(finetuned.save(tmp_path / "finetuned.onnx"))
    scales = (0.5, 1.0, 4.0)
    read = patchscope(finetuned, found, 1, scales=scales, top=40, batch_size=2)
    assert [each.scale for each in read.readouts] == list(scales) and len(read.table()) == 3
    tokenizer = stories.companions.tokenizer
    assert tokenizer is not None
    for number, scale in enumerate(scales):
        chances = []
        for prompt in IDENTITY_PROMPTS:
            ids = np.asarray([tokenizer.encode(prompt).ids])
            inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(ids.shape[1])[None]}

            def replaced(h: Array, at: float = scale) -> Array:
                h = h.copy()
                h[:, -1] = at * found.steering_vector(1).directions[SITE]
                return h

            logits = run_with_hooks(finetuned, inputs, {SITE: replaced})["logits"][0, -1].astype(float)
            chances.append(np.exp(logits) / np.exp(logits).sum())
        common = set.intersection(*(set(np.argsort(-row)[:40].tolist()) for row in chances))
        readout = read.readouts[number]
        assert {token for token, _ in readout.tokens} == common and common
        means = np.mean(chances, 0)
        np.testing.assert_allclose([p for _, p in readout.tokens], np.sort(means[list(common)])[::-1], rtol=1e-3)
        assert list(readout.texts) == [tokenizer.decode([token]) for token, _ in readout.tokens]


def test_scales_are_graded_by_the_caller(stories: Graph) -> None:
    finetuned, found = planted(stories)
    assert SCALES[:2] == (0.5, 0.6) and SCALES[15:] == (2, 3, 4, 5, 10, 20, 40, 60, 80, 100, 120, 140, 160, 180, 200)
    asked: list[Sequence[str]] = []

    def grade(texts: Sequence[str]) -> float:
        asked.append(texts)
        return -abs(len(asked) - 3.0)

    read = patchscope(finetuned, found, 0, ["a -> a\n?", "b -> b\n?"], top=100, grade=grade)
    assert len(asked) == len(SCALES) == len(read.readouts) and read.best == read.readouts[2]
    assert tuple(asked[2]) == read.best.texts and read.table()[2]["grade"] == 0
    none = patchscope(finetuned, found, 0, ["a -> a\n?"], scales=[1.0], top=0, grade=grade)
    assert none.readouts[0].tokens == () and none.readouts[0].grade is None
    with pytest.raises(InputError, match="no scale has a grade"):
        _ = none.best
    with pytest.raises(InputError, match="no prompt"):
        patchscope(finetuned, found, 0, [])
    with pytest.raises(InputError, match="do not differ"):
        patchscope(stories, activation_difference(stories, stories, TEXTS, progress=False), 0)


@pytest.mark.parametrize("dialect", ["fx", "onnx"])
def test_the_base_models_projection_undoes_a_planted_bias(stories: Graph, dialect: str, tmp_path: Path) -> None:
    """With the difference set to the base model's, the loss is the base model's; with 0, that of an ablation."""
    finetuned, found = planted(stories)
    graphs = [g if dialect == "fx" else ag.load(g.save(tmp_path / f"{n}.onnx")) for n, g in enumerate((stories, finetuned))]
    effects = {
        target: causal_check(*graphs, found, TEXTS, 1, target=target, directions=6, progress=False, batch_size=3)  # type: ignore[arg-type]
        for target in ("base", "zero")
    }
    direction = "[" + ", ".join(str(float(d)) for d in found.unit(1)) + "]"
    ablated = ag.run(finetuned, f"ablate{{direction={direction} site={SITE} fold=false}}").graph

    def loss(graph: Graph) -> float:
        found = ag.log_likelihoods(graph, TEXTS, progress=False)
        return -float(found.totals.sum()) / found.tokens

    for target, same in (("base", stories), ("zero", ablated)):
        effect = effects[target]
        assert effect.loss == pytest.approx(loss(finetuned), abs=1e-5)
        assert effect.loss + effect.difference == pytest.approx(loss(same), abs=1e-4)
        assert effect.random.shape == effect.activations.shape == (6,) and effect.tokens > 30
        assert np.abs(effect.random).min() > 0 and np.isfinite(effect.activations).all()
    effect = effects["base"]
    assert effect.difference < -0.1 and effect.exceeded(effect.random) == 1, "a bias at random does harm, and others do not"
    rows = effect.table()
    assert [row["direction"] for row in rows] == ["difference", "random", "activations"] and rows[1]["exceeded"] == 1
    assert rows[2]["least"] <= rows[2]["rise"] <= rows[2]["largest"]


def test_causal_checks_are_the_same_for_any_batch(stories: Graph) -> None:
    finetuned, found = planted(stories)
    one, four = (
        causal_check(stories, finetuned, found, TEXTS, 2, directions=3, seed=1, batch_size=size, progress=False)
        for size in (1, 4)
    )
    assert one.difference == pytest.approx(four.difference, abs=1e-5)
    np.testing.assert_allclose(one.random, four.random, atol=1e-5)
    np.testing.assert_allclose(one.activations, four.activations, atol=1e-5)
    other = causal_check(stories, finetuned, found, TEXTS, 2, directions=3, seed=2, progress=False)
    assert np.abs(other.random - four.random).max() > 1e-5
    alone = causal_check(stories, finetuned, found, TEXTS[:1], 2, directions=0, progress=False)
    assert len(alone.random) == len(alone.activations) == 0 and len(alone.table()) == 1
    with pytest.raises(InputError, match="two texts"):
        causal_check(stories, finetuned, found, TEXTS[:1], 2, directions=2, progress=False)
    with pytest.raises(InputError, match="same activations"):
        causal_check(stories, finetuned, found, ["a", "a"], 2, directions=2, progress=False)


@pytest.mark.parametrize("limit", [0.0, 17.3, 61.04, 100.0])
def test_asking_ahead_is_plain_bisection(limit: float) -> None:
    rounds = []

    def grade(strengths: Sequence[float]) -> list[float]:
        rounds.append(len(strengths))
        return [1.0 if strength <= limit else 0.0 for strength in strengths]

    found = strongest_coherent(grade)
    assert found == strongest_coherent(lambda s: grade(s), ahead=1) and abs(found - min(limit, 100)) < 100 / 2**11
    assert rounds[:4] == [7, 7, 7, 7] and rounds[4:] == [1] * 12
