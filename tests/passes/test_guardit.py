"""Gated redirection: clusters of what is to be forgotten, and the shift that keeps norms."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import actgraph as ag
from actgraph.errors import InputError, PassError
from actgraph.graph import Graph
from actgraph.graph.graph import Array
from actgraph.passes.steer.clusters import best_clusters, k_means, silhouette
from actgraph.passes.steer.guardit import ForgetClusters, balanced_threshold, default_site, forget_clusters
from tests import zoo

DOGS = ["The dog ran to the park.", "A big dog barked.", "His dog was happy.", "The little dog ate food."]
CARS = ["The car was red.", "A fast car drove away.", "Her car made a noise.", "The toy car broke."]
REST = ["Lily saw the sun.", "Mom made a cake.", "They sang a song.", "It was a cold night.", "The bird flew up."]


def embed(texts: Sequence[str]) -> Array:
    """A toy encoder: which words a text has, and a little of its length."""
    words = ["dog", "car", "sun", "cake", "song", "night", "bird"]
    return np.array([[*(word in text for word in words), len(text) / 400] for text in texts], float)


@pytest.fixture(scope="module")
def stories() -> Graph:
    return zoo.captured("stories260k")


@pytest.fixture(scope="module")
def clusters(stories: Graph) -> ForgetClusters:
    return forget_clusters(stories, DOGS + CARS, REST, embed, progress=False)


@pytest.fixture
def file(clusters: ForgetClusters, tmp_path: Path) -> Path:
    return clusters.save(tmp_path / "clusters.safetensors")


def test_clusters_and_their_vectors(stories: Graph, clusters: ForgetClusters) -> None:
    from actgraph.calibrate.document_rows import collect_rows

    assert clusters.labels.tolist() == [0] * 4 + [1] * 4 and clusters.site == default_site(stories) == "blocks.1.resid_post"
    forget, retain = (
        collect_rows(stories, [clusters.site], texts, position="mean")[clusters.site].astype(float)
        for texts in (DOGS + CARS, REST)
    )
    mean = retain.mean(0)
    for k, rows in enumerate((forget[:4], forget[4:])):
        s = clusters.vectors[k]
        expected = rows.mean(0) - (rows.mean(0) @ mean) / (mean @ mean) * mean
        np.testing.assert_allclose(s / np.linalg.norm(s), expected / np.linalg.norm(expected), atol=1e-5)
        assert abs(s @ mean) < 1e-4 * np.linalg.norm(s) * np.linalg.norm(mean)
        length = (np.linalg.norm(forget, axis=1).mean() + np.linalg.norm(retain, axis=1).mean()) / 2
        assert np.linalg.norm(s) == pytest.approx(length, rel=1e-5)
    scores = [clusters.similarity(embed(texts)).max(1) for texts in (DOGS + CARS, REST)]
    assert (scores[0] > clusters.threshold).all() and not (scores[1] > clusters.threshold).any()


def test_thresholds_and_clustering() -> None:
    assert balanced_threshold(np.array([0.8, 0.9]), np.array([0.1, 0.3])) == pytest.approx(0.3, abs=0.01)
    rng = np.random.default_rng(0)
    rows = np.concatenate([rng.normal(centre, 0.1, (20, 3)) for centre in (0, 4, 9)])
    labels = best_clusters(rows)
    assert labels.tolist() == np.repeat([0, 1, 2], 20).tolist() and silhouette(rows, labels) > 0.9
    assert np.array_equal(k_means(rows, 3, seed=4), k_means(rows, 3, seed=4))
    assert best_clusters(np.ones((4, 2))).tolist() == [0] * 4, "rows that are all alike are one cluster"


@pytest.mark.parametrize("dialect", ["fx", "onnx"])
@pytest.mark.parametrize("mode", ["threshold", "weighted"])
def test_requests_in_one_batch(
    stories: Graph, clusters: ForgetClusters, file: Path, dialect: str, mode: str, tmp_path: Path
) -> None:
    """Each row as by hand: norms stay, the direction is that of h - alpha s; closed rows stay bit for bit."""
    made = ag.run(stories, f"guardit{{clusters={file} alpha=0.6 mode={mode}}}, tap{{site={clusters.site}}}").graph
    made = made if dialect == "fx" else ag.load(made.save(tmp_path / "made.onnx"))
    before = ag.run(stories, f"tap{{site={clusters.site}}}", parity="none").graph
    inputs = ag.sample_inputs(stories, batch=4, seq=5)
    t = clusters.threshold
    similarity = np.array([[t - 0.1, t], [t + 0.2, 0], [0, t + 0.1], [t + 0.1, t + 0.2]], np.float32)
    h = before.run(inputs)[clusters.site]
    got = made.run({**inputs, "guardit.similarity": similarity})[clusters.site]
    if dialect == "fx":
        assert np.array_equal(got[0], h[0])
        assert np.array_equal(made.run(inputs)["logits"], before.run(inputs)["logits"]), "nobody gives the input"
    np.testing.assert_allclose(got[0], h[0], atol=1e-5)
    a, b = clusters.vectors
    both = (a + b) / 2 if mode == "threshold" else ((t + 0.1) * a + (t + 0.2) * b) / (2 * t + 0.3)
    for row, s in ((1, a), (2, b), (3, both)):
        u = h[row] - 0.6 * s
        np.testing.assert_allclose(
            got[row], u * np.linalg.norm(h[row], axis=-1, keepdims=True) / np.linalg.norm(u, axis=-1, keepdims=True), atol=2e-4
        )
        np.testing.assert_allclose(np.linalg.norm(got[row], axis=-1), np.linalg.norm(h[row], axis=-1), rtol=1e-5)
        alone = {name: array[row : row + 1] for name, array in inputs.items()}
        single = made.run({**alone, "guardit.similarity": similarity[row : row + 1]})[clusters.site]
        np.testing.assert_allclose(single[0], got[row], atol=1e-5)
    assert np.abs(got[1] - h[1]).max() > 0.1


def test_the_most_similar_cluster_alone(clusters: ForgetClusters) -> None:
    both = np.array([[1.0, 0.9, 0, 0, 0, 0, 0, 0.0]])
    assert (clusters.similarity(both) > clusters.threshold).sum() == 2
    assert (clusters.similarity(both, best=True) > clusters.threshold).tolist() == [[True, False]]


def test_decisions_do_not_depend_on_weights(stories: Graph, clusters: ForgetClusters, file: Path) -> None:
    """Quantized weights: the gate is told from outside, norms are kept, and closed rows are the quantized model's own."""
    made = ag.run(stories, f"quantize{{weights=int8}}, guardit{{clusters={file}}}, tap{{site={clusters.site}}}").graph
    plain = ag.run(stories, f"quantize{{weights=int8}}, tap{{site={clusters.site}}}").graph
    inputs = ag.sample_inputs(stories, batch=2, seq=4)
    similarity = np.array([[0.0, 0.0], [1.0, 0.0]], np.float32)
    got, h = made.run({**inputs, "guardit.similarity": similarity})[clusters.site], plain.run(inputs)[clusters.site]
    assert np.array_equal(got[0], h[0]) and np.abs(got[1] - h[1]).max() > 0.1
    np.testing.assert_allclose(np.linalg.norm(got, axis=-1), np.linalg.norm(h, axis=-1), rtol=1e-5)


def test_bad_input(stories: Graph, file: Path) -> None:
    with pytest.raises(InputError, match="nothing to forget"):
        forget_clusters(stories, [], REST, embed)
    with pytest.raises(InputError, match="embedding is zero"):
        forget_clusters(stories, DOGS, REST, lambda texts: np.zeros((len(texts), 3)), progress=False)
    with pytest.raises(PassError, match="clusters have 64 channels"):
        ag.run(stories, f"guardit{{clusters={file} site=blocks.0.mlp.hidden}}")
