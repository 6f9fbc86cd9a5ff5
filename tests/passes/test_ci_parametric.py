"""Several directions with strengths of their own: planted factors, sums, and strengths given at run time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import actgraph as ag
from actgraph.errors import InputError, PassError
from actgraph.formats.artifacts import Artifact
from actgraph.graph import Graph
from actgraph.graph.graph import Array
from actgraph.passes.steer.ci_parametric import (
    KIND,
    FactorDirections,
    factor_directions,
    independence,
    probe_accuracy,
    varying_direction,
)
from tests import zoo

WIDTH, SITES = 64, ("blocks.1.resid_post", "blocks.3.resid_post")


@pytest.fixture(scope="module")
def stories() -> Graph:
    return zoo.captured("stories260k")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    arrays = {site: np.linalg.qr(rng.normal(size=(WIDTH, 3)))[0].T.astype(np.float32) for site in SITES}
    return Artifact(KIND, arrays, {"factors": ["type", "recipient", "principle"]}).save(tmp_path / "factors.safetensors")


def groups() -> tuple[list[Array], Array]:
    """Stimuli of three factors, each varying along a direction of its own."""
    rng = np.random.default_rng(2)
    truth = np.linalg.qr(rng.normal(size=(20, 3)))[0].T
    return [rng.normal(0, 0.2, (60, 20)) + rng.normal(2, 3, (60, 1)) * v for v in truth], truth


def test_planted_factors_are_found_and_independent() -> None:
    rows, truth = groups()
    found = np.stack([varying_direction(each) for each in rows])
    assert (np.abs((found * truth).sum(1)) > 0.95).all()
    assert all(each.mean(0) @ v > 0 for each, v in zip(rows, found, strict=True)), "on the side of the mean"
    result = independence(rows, permutations=100)
    assert result.mean < 0.3 and result.p < 0.05 and result.cosines.shape == (3, 3)
    same = independence([rows[0][:30], rows[0][30:]], permutations=50)
    assert same.mean > 0.9 and same.p > 0.05


def test_probes() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 20)
    rows = rng.normal(size=(60, 6)) + np.eye(6)[labels] * 6
    assert probe_accuracy(rows, labels) > 0.95 and probe_accuracy(rows, labels) == probe_accuracy(rows, labels)
    assert probe_accuracy(rng.normal(size=(600, 2)), np.arange(600) % 3) < 0.5


def test_directions_of_a_model(stories: Graph, tmp_path: Path) -> None:
    stimuli = {
        "animal": {"dog": ["The dog ran.", "A dog sat."], "cat": ["The cat ran.", "A cat sat."]},
        "place": {
            "park": ["He went to the park.", "It was in the park."],
            "sea": ["He went to the sea.", "It was in the sea."],
        },
    }
    found = factor_directions(stories, stimuli, best=2, progress=False)
    assert found.factors == ("animal", "place") and len(found.chosen) == 2 and len(found.table()) == 5
    best = sorted((float(scores.mean()) for scores in found.accuracy.values()), reverse=True)[:2]
    assert sorted(float(found.accuracy[site].mean()) for site in found.chosen) == sorted(best)
    np.testing.assert_allclose([np.linalg.norm(found.directions[site], axis=1) for site in found.chosen], 1)
    made = ag.run(stories, f"ci_parametric{{factors={found.save(tmp_path / 'f.safetensors')} alpha=[1.0, 0.5]}}")
    assert made.report[0].counts == {"folded": 2}


@pytest.mark.parametrize("dialect", ["fx", "onnx"])
@pytest.mark.parametrize("norm", ["none", "restore"])
def test_strengths_at_run_time_are_constants(stories: Graph, file: Path, dialect: str, norm: str, tmp_path: Path) -> None:
    given = ag.run(stories, f"ci_parametric{{factors={file} alpha=input norm={norm}}}").graph
    fixed = ag.run(stories, f"ci_parametric{{factors={file} alpha=[3.0, -2.0, 0.5] norm={norm}}}").graph
    given = given if dialect == "fx" else ag.load(given.save(tmp_path / "given.onnx"))
    inputs = ag.sample_inputs(stories, batch=2, seq=5)
    plain, edited = stories.run(inputs)["logits"], fixed.run(inputs)["logits"]
    assert np.abs(plain - edited).max() > 0.01
    alpha = np.array([[0, 0, 0], [3.0, -2.0, 0.5]], np.float32)
    mixed = given.run({**inputs, "ci_parametric.alpha": alpha})["logits"]
    np.testing.assert_allclose(mixed[1], edited[1], atol=2e-5)
    np.testing.assert_allclose(mixed[0], plain[0], atol=2e-5)
    if dialect == "fx":
        assert np.array_equal(mixed[0], plain[0]) and np.array_equal(given.run(inputs)["logits"], plain)


def test_factors_add_up_and_norms_stay(stories: Graph, file: Path) -> None:
    inputs = ag.sample_inputs(stories, batch=1, seq=6)
    both = ag.run(stories, f"ci_parametric{{factors={file} alpha=[3.0, -2.0, 0.0]}}").graph
    text = "ci_parametric{{factors={0} alpha=[{1}, {2}, 0.0]}}"
    one_by_one = ag.run(stories, f"{text.format(file, 3.0, 0.0)}, {text.format(file, 0.0, -2.0)}").graph
    np.testing.assert_allclose(one_by_one.run(inputs)["logits"], both.run(inputs)["logits"], atol=1e-5)
    tap = f"tap{{site={SITES[0]}}}"
    kept = ag.run(stories, f"ci_parametric{{factors={file} alpha=[3.0, -2.0, 1.0] norm=restore}}, {tap}").graph
    h = ag.run(stories, tap, parity="none").graph.run(inputs)[SITES[0]]
    got = kept.run(inputs)[SITES[0]]
    np.testing.assert_allclose(np.linalg.norm(got, axis=-1), np.linalg.norm(h, axis=-1), rtol=1e-5)
    assert np.abs(got - h).max() > 0.1


def test_bad_input(stories: Graph, file: Path) -> None:
    with pytest.raises(PassError, match=r"there are 2 strengths.*type, recipient, principle"):
        ag.run(stories, f"ci_parametric{{factors={file} alpha=[1.0, 2.0]}}")
    with pytest.raises(InputError, match="at least two values"):
        factor_directions(stories, {"one": {"only": ["A dog."]}})
    with pytest.raises(PassError, match=r"no directions for blocks.0.resid_post"):
        ag.run(stories, f"ci_parametric{{factors={file} alpha=[1.0, 2.0, 3.0] site=blocks.0.resid_post}}")
    made = FactorDirections(("a",), {"s": np.ones((1, 2))}, {"s": np.ones(1), "t": np.full(1, 2.0)}, ("s",))
    assert made.weights("s") == 1 and made.weights("s", by_accuracy=True) == 0.5
