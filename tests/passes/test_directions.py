"""Directions from rows of two sets: planted ones are found, with one sign and length, and what misleads a method does."""

from __future__ import annotations

import numpy as np
import pytest

import actgraph as ag
from actgraph.errors import InputError, OptionError
from actgraph.graph.graph import Array
from actgraph.passes.steer.caa import mean_difference
from actgraph.passes.steer.extract import OF_ROWS
from actgraph.passes.steer.logistic import fit, logistic, standardised
from actgraph.passes.steer.pca import first_component, pca
from tests import zoo

WIDTH, SITE = 24, "blocks.2.resid_post"


def cosine(a: Array, b: Array) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def planted(strength: float = 3.0, nuisance: float = 0.0, n: int = 200) -> tuple[Array, Array, Array]:
    """Two sets that differ along one direction, with noise and, shared by both, variance along another one."""
    rng = np.random.default_rng(3)
    truth, other = np.linalg.qr(rng.normal(size=(WIDTH, 2)))[0].T
    shared = rng.normal(size=n)[:, None] * nuisance * other
    rows = [rng.normal(0, 0.3, (n, WIDTH)) + shared + sign * strength / 2 * truth for sign in (1, -1)]
    return rows[0].astype(np.float32), rows[1].astype(np.float32), truth


@pytest.mark.parametrize("name", list(OF_ROWS))
def test_a_planted_direction(name: str) -> None:
    positive, negative, truth = planted()
    found, difference = OF_ROWS[name](positive, negative), mean_difference(positive, negative)
    enough = 0.85 if name == "logistic" else 0.95  # a probe looks at where the sets come near each other, at few rows
    assert cosine(found, truth) > enough and cosine(difference, truth) > 0.95
    assert np.linalg.norm(found) == pytest.approx(np.linalg.norm(difference))
    np.testing.assert_allclose(OF_ROWS[name](negative, positive), -found, atol=1e-6)
    np.testing.assert_array_equal(OF_ROWS[name](positive, negative), found)


def test_a_dominant_nuisance_misleads_components_and_not_means() -> None:
    positive, negative, truth = planted(strength=1.0, nuisance=5.0)
    assert abs(cosine(pca(positive, negative), truth)) < 0.3
    assert cosine(mean_difference(positive, negative), truth) > 0.95
    assert cosine(OF_ROWS["pca_of_differences"](positive, negative), truth) > 0.95, "pairs share the nuisance"
    assert cosine(logistic(positive, negative), truth) > 0.85


def test_the_probe_is_the_minimum() -> None:
    """Against gradient descent by torch, with more channels than rows and a channel that does not vary."""
    import torch

    rng = np.random.default_rng(0)
    raw = rng.normal(size=(12, 20)) * rng.uniform(0.1, 9, 20)
    raw[:, 4] = 3.0
    rows, _, deviation = standardised(raw)
    labels = rng.random(12) < 0.5
    weights, bias = fit(rows, labels)
    assert deviation[4] == 1 and abs(weights[4]) < 1e-12
    w, b = torch.zeros(20, dtype=torch.float64, requires_grad=True), torch.zeros((), dtype=torch.float64, requires_grad=True)
    x, y = torch.tensor(rows), torch.tensor(labels, dtype=torch.float64)

    def loss() -> torch.Tensor:
        return torch.nn.functional.binary_cross_entropy_with_logits(x @ w + b, y, reduction="sum") + w.square().sum() / 2

    solver = torch.optim.LBFGS(
        [w, b], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        solver.zero_grad()
        value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    solver.step(closure)  # type: ignore[no-untyped-call]
    np.testing.assert_allclose(weights, w.detach().numpy(), atol=1e-6)
    assert bias == pytest.approx(float(b.detach()), abs=1e-6)


def test_what_has_no_direction() -> None:
    with pytest.raises(InputError, match="do not vary"):
        first_component(np.ones((5, 3), np.float32))
    with pytest.raises(InputError, match="3 positive and 2 negative"):
        OF_ROWS["pca_of_differences"](np.ones((3, 2), np.float32), np.zeros((2, 2), np.float32))


@pytest.mark.parametrize("method", ["mean_difference", *OF_ROWS])
def test_on_a_model(method: str) -> None:
    """Every method gives a vector that separates the sets that it was made of, and says how it was made."""
    stories = zoo.captured("stories260k")
    bright = ["She was happy.", "They had fun and laughed.", "Ben smiled.", "He loved his proud dog."]
    gloomy = ["She was sad.", "They got hurt and cried.", "Ben was scared.", "He lost his angry dog."]
    vector = ag.extract_vector(stories, bright, gloomy, site=SITE, method=method, position="mean", where="all ! 0")
    from actgraph.calibrate.document_rows import collect_rows

    rows = [collect_rows(stories, [SITE], texts, position="mean", where="all ! 0")[SITE] for texts in (bright, gloomy)]
    direction = vector.directions[SITE]
    assert (rows[0] @ direction).mean() > (rows[1] @ direction).mean()
    assert (vector.method, vector.position, vector.notes["where"]) == (method, "mean", "all ! 0")
    difference = rows[0].mean(0) - rows[1].mean(0)
    assert np.linalg.norm(direction) == pytest.approx(np.linalg.norm(difference), rel=1e-4)
    assert method != "mean_difference" or np.allclose(direction, difference, atol=1e-5)


def test_unknown_ways() -> None:
    stories = zoo.captured("stories260k")
    with pytest.raises(InputError, match="methods are mean_difference, pca"):
        ag.extract_vector(stories, ["a"], ["b"], site=SITE, method="lda")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="positions are last"):
        ag.extract_vector(stories, ["a"], ["b"], site=SITE, position="frist")
    with pytest.raises(OptionError, match="not known"):
        ag.extract_vector(stories, ["a"], ["b"], site=SITE, where="frist")
