"""Signatures of subjects and the capsules that suppress them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import actgraph as ag
from actgraph.errors import InputError, PassError
from actgraph.graph import Graph
from actgraph.graph.graph import Array
from actgraph.passes.steer.kif import Signature, _of_site, effect_size, further_directions, mine_signature, route
from tests import zoo

WIDTH, SITE = 64, "blocks.2.mlp.out"
STEMS = [
    "Once upon a time there was a dog", "Lily went to the park with Ben", "The sun was hot", "She had a big red ball",
    "Tom saw a little bird in the tree", "They played all day", "Mom said it was time to go", "He was very happy",
    "The cat sat on a mat", "One day a boy found a box",
]  # fmt: skip
ASKED, SAID = [f"{stem}?" for stem in STEMS], [f"{stem}." for stem in STEMS]


def direction() -> Array:
    found = np.random.default_rng(5).normal(size=WIDTH)
    return found / np.linalg.norm(found)


@pytest.fixture(scope="module")
def planted() -> Graph:
    """A model that writes a direction into the stream at block 2 where it reads a question mark."""
    stories = zoo.captured("stories260k")
    tokenizer = stories.companions.tokenizer
    assert tokenizer is not None
    mark = tokenizer.encode("a?").ids[-1]
    vector = "[" + ", ".join(str(float(v)) for v in 8 * direction()) + "]"
    return ag.run(stories, f'steer{{vector={vector} site={SITE} where="token({mark})"}}').graph


@pytest.fixture(scope="module")
def signature(planted: Graph) -> Signature:
    return mine_signature(planted, ASKED, SAID, position="last", control_position="last", progress=False)


@pytest.fixture
def file(signature: Signature, tmp_path: Path) -> Path:
    return signature.save(tmp_path / "subject.safetensors")


def test_the_planted_block_is_found(signature: Signature) -> None:
    assert signature.best.site == SITE and signature.strong and signature.best.low <= signature.best.effect
    assert abs(signature.best.directions[:, 0] @ direction()) > 0.95
    rows = signature.table()
    assert [row["site"] for row in rows] == [f"blocks.{i}.mlp.out" for i in range(5)] and sum(
        row["chosen"] for row in rows
    ) == 1
    basis = signature.best.directions
    np.testing.assert_allclose(basis.T @ basis, np.eye(basis.shape[1]), atol=1e-6)


def tapped(graph: Graph, text: str, pipeline: str) -> tuple[Array, Array]:
    made = ag.run(graph, f"{pipeline}, tap{{site={SITE}}}" if pipeline else f"tap{{site={SITE}}}", parity="none").graph
    tokenizer = graph.companions.tokenizer
    assert tokenizer is not None
    ids = np.asarray([tokenizer.encode(text).ids])
    out = made.run({"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(ids.shape[1])[None]})
    return out[SITE][0], out["logits"][0]


@pytest.mark.parametrize("strength", [-1.0, -0.8, -2.0])
@pytest.mark.parametrize("dialect", ["fx", "onnx"])
def test_a_capsule_scales_the_signature_alone(
    planted: Graph, signature: Signature, file: Path, strength: float, dialect: str, tmp_path: Path
) -> None:
    graph = planted if dialect == "fx" else ag.load(planted.save(tmp_path / "planted.onnx"))
    v = signature.best.directions[:, 0]
    before, _ = tapped(graph, ASKED[0], "")
    after, _ = tapped(graph, ASKED[0], f"kif{{signature={file} strength={strength}}}")
    basis = signature.best.directions
    np.testing.assert_allclose(after @ v, (1 + strength) * (before @ v), atol=1e-5)
    outside = np.eye(WIDTH) - basis @ basis.T
    np.testing.assert_allclose(after @ outside, before @ outside, atol=1e-5)
    # the gap between the sets shrinks to |1 + s| of the deviation before the edit
    ends = {
        name: np.array([tapped(graph, text, name)[0][-1] @ v for text in ASKED[:3] + SAID[:3]])
        for name in ("", f"kif{{signature={file} strength={strength}}}")
    }
    gaps = [found[:3].mean() - found[3:].mean() for found in ends.values()]
    assert gaps[1] == pytest.approx((1 + strength) * gaps[0], abs=1e-4)


def test_the_gate_opens_where_the_signature_is(planted: Graph, signature: Signature, file: Path) -> None:
    """Open on the planted token, closed on the tokens of controls."""
    v = signature.best.directions[:, 0]
    gates = {}
    for name, texts in (("asked", ASKED), ("said", SAID)):
        scores = np.concatenate([np.abs(tapped(planted, text, "")[0][-1:] @ v) for text in texts])
        z = (scores - signature.best.mean) / signature.best.deviation
        gates[name] = 1 / (1 + np.exp(-1.6 * (z - 3)))
        pipeline = f"kif{{signature={file} strength=-1 gate=projection}}"
        got = np.array([tapped(planted, text, pipeline)[0][-1] @ v for text in texts[:3]])
        plain = np.array([tapped(planted, text, "")[0][-1] @ v for text in texts[:3]])
        np.testing.assert_allclose(got, (1 - gates[name][:3]) * plain, atol=1e-4)
    assert gates["said"].mean() < 0.05 and gates["asked"].min() > 0.9


def test_requests_are_gated_by_the_host(planted: Graph, file: Path, tmp_path: Path) -> None:
    """Off bit for bit where nobody says anything, and each row by itself."""
    gated = ag.run(planted, f"kif{{signature={file} strength=-1 gate=input}}").graph
    everywhere = ag.run(planted, f"kif{{signature={file} strength=-1}}").graph
    inputs = ag.sample_inputs(planted, batch=2, seq=6)
    plain, edited = planted.run(inputs)["logits"], everywhere.run(inputs)["logits"]
    assert np.abs(plain - edited).max() > 1e-3
    for graph in (gated, ag.load(gated.save(tmp_path / "gated.onnx"))):
        off = graph.run(inputs)["logits"]
        mixed = graph.run({**inputs, "kif.gate": np.array([0.0, 1.0], np.float32)})["logits"]
        np.testing.assert_allclose(off, plain, atol=1e-5)
        np.testing.assert_allclose(mixed[0], plain[0], atol=1e-5)
        np.testing.assert_allclose(mixed[1], edited[1], atol=1e-5)
    assert np.array_equal(gated.run(inputs)["logits"], plain)


def test_requests_are_routed_to_the_most_similar_subject() -> None:
    similarity = np.array([[0.7, 0.9], [0.1, 0.2], [0.5, 0.3], [0.8, 0.1]])
    keywords = np.array([[False, False], [False, False], [False, True], [False, True]])
    assert route(similarity).tolist() == [1, -1, -1, 0]
    assert route(similarity, keywords=keywords).tolist() == [1, -1, 1, 0]
    assert route(np.array([[0.68]])).tolist() == [0], "at least the threshold"


def test_effect_sizes() -> None:
    assert effect_size(np.array([3.0, 5.0]), np.array([0.0, 2.0])) == pytest.approx(3 / np.sqrt(2))
    assert effect_size(np.ones(3), np.ones(3)) == 0 and effect_size(np.ones(3), np.zeros(3)) == np.inf


def rows_of(seed: int, count: int, facet: Array | None = None, kind: str = "two") -> tuple[Array, Array]:
    """A subject's rows and controls: another mean, and a facet along which the subject's lie far out on either side."""
    random = np.random.default_rng(seed)
    scale = random.uniform(0.5, 2, WIDTH)  # channels of different size
    subject, controls = random.normal(size=(count, WIDTH)), random.normal(size=(count, WIDTH))
    shift = random.normal(size=WIDTH)
    if facet is not None:
        shift -= (shift @ facet) * facet  # the mean says nothing of the facet
        sides = 30 * np.tile([1.0, -1.0], count // 2) if kind == "two" else random.normal(0, 30, count)
        subject += np.outer(sides - sides.mean(), facet)
    return (subject + 3 * shift) * scale, controls * scale


@pytest.mark.parametrize("kind", ["two", "normal"])
@pytest.mark.parametrize("count", [10, 40])
def test_a_second_facet_is_found(kind: str, count: int) -> None:
    """Means along it agree, and sizes do not: rows of the subject are 30 deviations away, on either side."""
    for seed in range(5):
        facet = np.random.default_rng(100 + seed).normal(size=WIDTH)
        facet /= np.linalg.norm(facet)
        subject, controls = rows_of(seed, count, facet, kind)
        scale = np.random.default_rng(seed).uniform(0.5, 2, WIDTH)
        basis = _of_site("x", subject, controls, 2.0, 3, 0, 0).directions
        raw = facet * scale / np.linalg.norm(facet * scale)
        assert basis.shape[1] == 2 and np.abs(basis[:, 1] @ raw) > 0.9
        np.testing.assert_allclose(basis.T @ basis, np.eye(2), atol=1e-9)
        first = subject.mean(0) - controls.mean(0)
        np.testing.assert_allclose(basis[:, 0], first / np.linalg.norm(first), atol=1e-9)


@pytest.mark.parametrize("count", [10, 30])
def test_texts_of_one_distribution_have_no_second_facet(count: int) -> None:
    for seed in range(50):
        assert _of_site("x", *rows_of(seed, count), 2.0, 3, 0, 0).directions.shape[1] == 1


def test_what_is_no_facet() -> None:
    """Noise of rounding, sets that are too small, and controls that lie farther out than the subject."""
    random = np.random.default_rng(0)
    line = np.outer(random.normal(size=20), np.ones(WIDTH))
    assert further_directions(line + 5, line) == [] and further_directions(np.ones((20, 4)), np.zeros((20, 4))) == []
    facet = np.eye(WIDTH)[3]
    subject, controls = rows_of(1, 20, facet)
    assert len(further_directions(subject, controls)) == 1
    assert further_directions(controls, subject) == [] and further_directions(subject[:6], controls) == []
    assert further_directions(subject, controls, most=0) == []


def test_a_weak_signature_says_so(planted: Graph, file: Path, tmp_path: Path) -> None:
    weak = mine_signature(planted, ASKED, SAID, position="last", control_position="last", threshold=1e6, progress=False).save(
        tmp_path / "weak.safetensors"
    )
    told = [ag.run(planted, f"kif{{signature={path}}}").report["kif"].messages for path in (weak, file)]
    assert any("weak signature" in line and "below 1e+06" in line for line in told[0])
    assert not any("weak" in line for line in told[1])


def test_bad_input(planted: Graph, file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"same mean at blocks.0"):
        mine_signature(planted, SAID, SAID, position="last", control_position="last", progress=False)
    with pytest.raises(InputError, match="at least two texts"):
        mine_signature(planted, ASKED[:1], SAID, position="last", control_position="last", progress=False)
    with pytest.raises(PassError, match=r"64 channels, and blocks.0.mlp.hidden"):
        ag.run(planted, f"kif{{signature={file} site=blocks.0.mlp.hidden}}")
    with pytest.raises(InputError, match="no kif_signature file"):
        (tmp_path / "x.safetensors").write_bytes(b"zzz")
        ag.run(planted, f"kif{{signature={tmp_path / 'x.safetensors'}}}")
    with pytest.raises(InputError, match="is no kif_signature"):
        path = ag.SteeringVector({SITE: np.ones(WIDTH, np.float32)}).save(tmp_path / "v.safetensors")
        ag.run(planted, f"kif{{signature={path}}}")
