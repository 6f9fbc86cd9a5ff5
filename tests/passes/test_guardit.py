"""Gated redirection: clusters of what is to be forgotten, and the shift that keeps norms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import actgraph as ag
from actgraph.calibrate.document_rows import collect_rows
from actgraph.errors import InputError, OptionError, PassError
from actgraph.graph import Graph
from actgraph.graph.graph import Array
from actgraph.graph.program import Program
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


def chosen_by_hand(given: Array, vectors: Array, mode: str, threshold: float, retain_threshold: float | None) -> Array | None:
    """``s`` of one request, as the authors' code selects it; ``None``: the gate is closed."""
    sims, retain = given[: len(vectors)], float(given[-1])
    if retain_threshold is not None and retain > retain_threshold:
        return None
    first = int(sims.argmax())
    if mode == "best":
        return vectors[first] if sims[first] > threshold else None
    if mode == "ratio":
        return vectors[first] if sims[first] / max(retain, 1e-6) > threshold else None
    weights = np.maximum(sims, 0) if mode == "soft" else np.where(sims > threshold, sims if mode == "weighted" else 1.0, 0)
    return weights @ vectors / weights.sum() if weights.sum() > 1e-9 else None


def redirected(h: Array, s: Array, alpha: float) -> Array:
    u = h - alpha * s
    return np.asarray(u * np.linalg.norm(h, axis=-1, keepdims=True) / np.linalg.norm(u, axis=-1, keepdims=True))


@pytest.fixture(scope="module")
def three(stories: Graph) -> ForgetClusters:
    """Three clusters of made-up embeddings and vectors."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(3, 64))
    return ForgetClusters("blocks.1.resid_post", np.eye(4)[:3], vectors, np.zeros(0), 0.4, retain_centroid=np.eye(4)[3])


MODES = [
    ("best", None, None), ("best", -1.5, None), ("soft", None, None), ("soft", None, 0.5), ("ratio", None, None),
    ("ratio", 1.5, 0.5), ("threshold", None, 0.5), ("weighted", 0.2, 0.3),
]  # fmt: skip


@pytest.mark.parametrize("dialect", ["fx", "onnx"])
@pytest.mark.parametrize(("mode", "threshold", "veto"), MODES)
def test_every_mode_is_the_authors_selection(
    stories: Graph, three: ForgetClusters, mode: str, threshold: float | None, veto: float | None, dialect: str, tmp_path: Path
) -> None:
    """Ties, vetoes, nothing similar, negative and infinite similarities, one request a row."""
    given = np.array(
        [
            [0.5, 0.7, 0.6, 0.1], [0.7, 0.7, 0.2, 0.6], [0.1, 0.3, 0.3, 0.25], [-0.2, -0.1, -0.3, 0.1], [0.1, 0.2, 0.9, 0.45],
            [0.6, 0.1, 0.6, -0.3], [-2, -2, -2, -2], [0.1, -np.inf, 0.5, 0.0], [0.5, 0.7, 0.7, 0.8], [0.7, 0.7, 0.7, 0.4],
        ],
        np.float32,
    )  # fmt: skip
    retain = mode == "ratio" or veto is not None
    options = "".join(f" {name}={v}" for name, v in (("threshold", threshold), ("retain_threshold", veto)) if v is not None)
    file = three.save(tmp_path / "three.safetensors")
    made = ag.run(stories, f"guardit{{clusters={file} alpha=0.6 mode={mode}{options}}}, tap{{site={three.site}}}").graph
    made = made if dialect == "fx" else ag.load(made.save(tmp_path / "made.onnx"))
    before = ag.run(stories, f"tap{{site={three.site}}}", parity="none").graph
    inputs = ag.sample_inputs(stories, batch=len(given), seq=4)
    h = before.run(inputs)[three.site]
    got = made.run({**inputs, "guardit.similarity": given if retain else given[:, :3]})[three.site]
    limit = threshold if threshold is not None else 1.0 if mode == "ratio" else 0.4
    found = [chosen_by_hand(row.astype(float), three.vectors, mode, limit, veto) for row in given]
    assert 1 < sum(s is None for s in found) < len(given) or threshold == -1.5
    for row, s in enumerate(found):
        if s is not None:
            np.testing.assert_allclose(got[row], redirected(h[row], s, 0.6), atol=2e-4)
            assert np.abs(got[row] - h[row]).max() > 0.05
        elif dialect == "fx":
            assert np.array_equal(got[row], h[row])
        else:
            np.testing.assert_allclose(got[row], h[row], atol=1e-5)
    if dialect == "fx":
        assert np.array_equal(made.run(inputs)["logits"], before.run(inputs)["logits"]), "nobody gives the input"
        with pytest.raises(InputError, match="similarity"):
            made.run({**inputs, "guardit.similarity": given[:, :3] if retain else given})


def test_the_retain_centroid(stories: Graph, clusters: ForgetClusters, file: Path) -> None:
    """The unit mean of the retain embeddings; one more column of similarities, that the file's reader can do without."""
    unit = embed(REST) / np.linalg.norm(embed(REST), axis=1, keepdims=True)
    centroid = clusters.retain_centroid
    assert centroid is not None
    np.testing.assert_allclose(centroid, unit.mean(0) / np.linalg.norm(unit.mean(0)))
    asked = clusters.similarity(embed(REST), retain=True)
    assert asked.shape == (len(REST), 3) and np.array_equal(asked[:, :2], clusters.similarity(embed(REST)))
    np.testing.assert_allclose(asked[:, 2], unit @ centroid, rtol=1e-5)
    assert clusters.similarity(embed(REST), best=True, retain=True).shape == (len(REST), 3)
    with pytest.raises(InputError, match="no retain centroid"):
        replace(clusters, retain_centroid=None).similarity(embed(REST), retain=True)


@pytest.mark.parametrize("mode", ["best", "soft", "ratio", "veto"])
@pytest.mark.parametrize("dialect", ["fx", "onnx"])
def test_modes_of_the_gate_inside_the_graph(
    stories: Graph, inside: ForgetClusters, mode: str, dialect: str, tmp_path: Path
) -> None:
    """Each token as by hand, with the mean of the prompt up to it."""
    file = inside.save(tmp_path / "inside.safetensors")
    before = ag.run(stories, f"tap{{site={inside.site}}}", parity="none").graph
    inputs = ag.sample_inputs(stories, batch=3, seq=8)
    h = before.run(inputs)[inside.site].astype(float)
    means = h.cumsum(1) / np.arange(1, 9)[None, :, None]
    assert inside.retain_centroid is not None
    rows = np.concatenate([inside.centroids, inside.retain_centroid[None]])
    scores = (means / np.linalg.norm(means, axis=-1, keepdims=True)) @ rows.T
    deciding = {"best": scores[..., :2].max(-1), "ratio": scores[..., :2].max(-1) / np.maximum(scores[..., 2], 1e-6)}
    ordered = np.sort(deciding.get(mode, scores[..., 2]).ravel())
    gap = int(np.diff(ordered[6:-6]).argmax()) + 6
    split = float(ordered[gap : gap + 2].mean())  # some are above it, and nobody is near it
    step, limit, veto = {
        "best": (f"mode=best threshold={split}", split, None), "soft": ("mode=soft", 0.0, None),
        "ratio": (f"mode=ratio threshold={split}", split, None),
        "veto": (f"mode=threshold threshold=-1.5 retain_threshold={split}", -1.5, split),
    }[mode]  # fmt: skip
    made = ag.run(stories, f"guardit{{clusters={file} alpha=0.6 {step}}}, tap{{site={inside.site}}}").graph
    made = made if dialect == "fx" else ag.load(made.save(tmp_path / "made.onnx"))
    got = made.run({**inputs, "prompt_lengths": np.array([8, 8, 8])})[inside.site]
    closed = 0
    for row, token in np.ndindex(*h.shape[:2]):
        s = chosen_by_hand(scores[row, token], inside.vectors, "threshold" if mode == "veto" else mode, limit, veto)
        closed += s is None
        expected = h[row, token] if s is None else redirected(h[row, token], s, 0.6)
        np.testing.assert_allclose(got[row, token], expected, atol=3e-4)
        if s is None and dialect == "fx":
            assert np.array_equal(got[row, token], before.run(inputs)[inside.site][row, token])
    assert closed == 0 if mode == "soft" else 3 < closed < 21


def test_a_file_without_a_retain_centroid(stories: Graph, inside: ForgetClusters, tmp_path: Path) -> None:
    file = replace(inside, retain_centroid=None).save(tmp_path / "old.safetensors")
    ag.run(stories, f"guardit{{clusters={file}}}", reproducer=False)
    with pytest.raises(InputError, match="has no 'retain_centroid'"):
        ag.run(stories, f"guardit{{clusters={file} mode=ratio}}", reproducer=False)


@pytest.fixture(scope="module")
def inside(stories: Graph) -> ForgetClusters:
    """Clusters of activations, with a gate inside the graph."""
    made = forget_clusters(stories, DOGS + CARS, REST, clusters=2, progress=False)
    assert made.gate == "activation" and made.centroids.shape == made.vectors.shape == (2, 64)
    return made


@pytest.fixture(scope="module")
def distant(stories: Graph) -> ForgetClusters:
    """Clusters of activations that are compared by distance."""
    made = forget_clusters(stories, DOGS + CARS, REST, clusters=2, measure="euclidean", progress=False)
    assert made.measure == "euclidean" and made.threshold < 0
    return made


def similarity_by_hand(mean: Array, made: ForgetClusters) -> Array:
    if made.measure == "euclidean":
        return np.array([-np.linalg.norm(mean - centroid) for centroid in made.centroids])
    return np.asarray(made.centroids @ (mean / np.linalg.norm(mean)))


def by_hand(h: Array, counted: Array, made: ForgetClusters, threshold: float, alpha: float, best: bool = False) -> Array:
    """The method on activations ``h [batch, seq, width]``; counted: the tokens of prompts, bool."""
    got = h.astype(float).copy()
    for row, token in np.ndindex(*h.shape[:2]):
        seen = h[row, : token + 1][counted[row, : token + 1]].astype(float)
        if not len(seen):
            continue
        similarity = similarity_by_hand(seen.mean(0), made)
        active = (similarity > threshold) & ((similarity == similarity.max()) | (not best))
        if active.any():
            u = got[row, token] - alpha * made.vectors[active].mean(0)
            got[row, token] = u * np.linalg.norm(got[row, token]) / np.linalg.norm(u)
    return got


@pytest.mark.parametrize("dialect", ["fx", "onnx"])
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("clusters", ["inside", "distant", "distant-best"])
def test_the_gate_inside_the_graph(
    stories: Graph, clusters: str, dialect: str, padding: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Prompts up to each token open it, padding and generated tokens left out; closed tokens stay as they are."""
    inside: ForgetClusters = request.getfixturevalue(clusters.removesuffix("-best"))
    mode = "best" if clusters.endswith("best") else "threshold"
    file = inside.save(tmp_path / "inside.safetensors")
    before = ag.run(stories, f"tap{{site={inside.site}}}", parity="none").graph
    real = np.array([[n < length for n in range(8)] for length in (8, 5, 6)])
    real = real[:, ::-1] if padding == "left" else real
    positions = np.maximum(real.cumsum(1) - 1, 0)
    ids = ag.sample_inputs(stories, batch=3, seq=8)["input_ids"]
    lengths = np.array([5, 5, 2])
    inputs = {"input_ids": ids, "attention_mask": real.astype(np.int64), "position_ids": positions}
    h = before.run(inputs)[inside.site]
    counted = real & (positions < lengths[:, None])
    scores = []
    for row, token in np.ndindex(*ids.shape):
        seen = h[row, : token + 1][counted[row, : token + 1]]
        scores += [*similarity_by_hand(seen.mean(0), inside)] if len(seen) else []
    near = np.sort(scores)[len(scores) // 3 : -len(scores) // 3]
    gap = int(np.diff(near).argmax())
    threshold = float(near[gap : gap + 2].mean())  # open for some, closed for others, and nobody near it
    step = f"guardit{{clusters={file} alpha=0.6 threshold={threshold} mode={mode}}}"
    made = ag.run(stories, f"{step}, tap{{site={inside.site}}}").graph
    made = made if dialect == "fx" else ag.load(made.save(tmp_path / "made.onnx"))
    got = made.run({**inputs, "prompt_lengths": lengths})[inside.site]
    expected = by_hand(h, counted, inside, threshold, 0.6, mode == "best")
    np.testing.assert_allclose(got[real], expected[real], atol=2e-4)
    moved = np.abs(expected - h).max(-1)[real] > 0.01
    assert 3 < moved.sum() < moved.size - 3
    if dialect == "fx":
        assert np.array_equal(got[real][~moved], h[real][~moved])
    after = real & ~counted
    for row in range(3):  # what is generated has the gate of the last token of its prompt
        told = after[row] | (counted[row] & (positions[row] == lengths[row] - 1))
        assert len(set((np.abs(expected - h).max(-1)[row][told] > 0.01).tolist())) == 1


@pytest.mark.parametrize("order", ["before", "after", "program", "static", "distant"])
def test_the_gate_inside_the_graph_behind_a_cache(
    stories: Graph, inside: ForgetClusters, distant: ForgetClusters, order: str, tmp_path: Path
) -> None:
    """The sum over the prompt is a slot: single tokens, chunks of prompts and all at once give the same."""
    made = distant if order == "distant" else inside
    file = made.save(tmp_path / "inside.safetensors")
    step = f"guardit{{clusters={file} alpha=0.8 threshold={0.6 if made is inside else -5.6}}}"
    passes = {
        "before": f"{step}, kv_cache{{graphs=combined}}", "after": f"kv_cache{{graphs=combined}}, {step}",
        "program": f"{step}, kv_cache", "distant": f"{step}, kv_cache",
        "static": f"{step}, kv_cache{{form=static max_length=32}}",
    }[order]  # fmt: skip
    cached = ag.run(stories, passes, reproducer=False).rewritten
    whole = ag.run(stories, step).graph
    ids = ag.sample_inputs(stories, batch=1, seq=9)["input_ids"]

    def feed(model: Graph | Program, chunk: int) -> Array:
        session = ag.compile(model, lowering="explicit", chunk=chunk).session(1)
        pieces = [ids[:, :6], ids[:, 6:7], ids[:, 7:8], ids[:, 8:9]]
        return np.stack([np.asarray(session.feed(piece)["logits"][:, -1]) for piece in pieces])

    expected, plain = feed(whole, 512), feed(stories, 512)
    assert np.abs(expected - plain).max() > 0.1
    for chunk in (512, 2):
        np.testing.assert_allclose(feed(cached, chunk), expected, atol=3e-4)
    texts = [ag.generate(model, "The dog ran to", max_new_tokens=12) for model in (cached, whole, stories)]
    assert texts[0] == texts[1] != texts[2]


def test_a_gate_on_what_comes_later_is_refused(stories: Graph, inside: ForgetClusters, tmp_path: Path) -> None:
    file = inside.save(tmp_path / "inside.safetensors")
    with pytest.raises(PassError, match=r"the gate reads blocks\.1\.resid_post, which depends on it"):
        ag.run(stories, f"guardit{{clusters={file} site=blocks.0.resid_post}}", reproducer=False)
    later = ag.run(stories, f"guardit{{clusters={file} threshold=0.6 site=[blocks.1.resid_post,blocks.3.resid_post]}}").graph
    assert sum(node.op == "actgraph.running_sum" for node in later.nodes()) == 1, "one gate for all sites"


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
    for wrong in ({"direction": "diference"}, {"threshold": "balancd"}):
        with pytest.raises(OptionError, match="is not known"):
            forget_clusters(stories, DOGS, REST, embed, **wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"embeddings are \[texts, size\]"):
        forget_clusters(stories, DOGS, REST, lambda texts: np.ones(3), progress=False)
    with pytest.raises(InputError, match="there are 4 texts and 3 embeddings"):
        forget_clusters(stories, DOGS, REST, lambda texts: np.ones((3 if len(texts) == 4 else 5, 2)), progress=False)
    with pytest.raises(InputError, match="embeddings are of size 3"):
        made = forget_clusters(stories, DOGS, REST, embed, clusters=1, progress=False)
        made.similarity(np.ones((2, 3)))
    with pytest.raises(InputError, match="nothing to forget"):
        forget_clusters(stories, [], REST, embed)
    with pytest.raises(InputError, match="embedding is zero"):
        forget_clusters(stories, DOGS, REST, lambda texts: np.zeros((len(texts), 3)), progress=False)
    with pytest.raises(PassError, match="clusters have 64 channels"):
        ag.run(stories, f"guardit{{clusters={file} site=blocks.0.mlp.hidden}}")


def test_distances_are_no_weights(stories: Graph, distant: ForgetClusters, tmp_path: Path) -> None:
    file = distant.save(tmp_path / "distant.safetensors")
    for mode in ("weighted", "soft", "ratio"):
        with pytest.raises(OptionError, match="minus a distance is no weight"):
            ag.run(stories, f"guardit{{clusters={file} mode={mode}}}", reproducer=False)
    with pytest.raises(OptionError, match="leave embed or measure out"):
        forget_clusters(stories, DOGS, REST, lambda texts: np.ones((len(texts), 2)), measure="euclidean")
    with pytest.raises(OptionError, match="'far' is not known"):
        forget_clusters(stories, DOGS, REST, measure="far")  # type: ignore[arg-type]


def test_clusters_of_activations_have_no_similarity_to_tell(inside: ForgetClusters, distant: ForgetClusters) -> None:
    for made in (inside, distant):
        with pytest.raises(InputError, match="which the graph compares itself"):
            made.similarity(np.ones((1, 64)))


def test_distances_tell_the_clusters_apart(stories: Graph, distant: ForgetClusters) -> None:
    """Centroids are means of pooled activations as they are, and the threshold is between the texts of both sets."""
    rows = collect_rows(stories, [distant.site], DOGS + CARS, position="mean", progress=False)[distant.site].astype(float)
    for k in range(2):
        np.testing.assert_allclose(distant.centroids[k], rows[distant.labels == k].mean(0), rtol=1e-5, atol=1e-6)
    nearest = np.max([similarity_by_hand(row, distant) for row in rows], axis=1)
    assert (nearest > distant.threshold).mean() > 0.5
