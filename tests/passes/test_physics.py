"""Spatial patterns added at a fraction of the activation: convolutions, token grids, and layouts with time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import actgraph as ag
from actgraph.errors import InputError, PassError
from actgraph.formats.artifacts import load_artifact
from actgraph.graph import Graph
from actgraph.graph.graph import Array
from actgraph.passes.steer.physics import KIND, Adaptation, Delta, adapted, delta

ADAPTATIONS: tuple[Adaptation, ...] = ("drop", "pad", "interpolate", "none")


class Field(torch.nn.Module):
    """A predictor of fields: two convolutions."""

    def __init__(self, rank: int = 2) -> None:
        super().__init__()
        torch.manual_seed(1)
        kind = torch.nn.Conv2d if rank == 2 else torch.nn.Conv3d
        self.first, self.second = kind(2, 6, 3, padding=1), kind(6, 2, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def graph(rank: int = 2, space: tuple[str | None, ...] = (None, None)) -> Graph:
    sizes = (8, 10) if rank == 2 else (4, 6, 5)
    return ag.trace(Field(rank).eval(), (torch.randn(2, 2, *sizes),), dynamic={"x": ("batch", None, *space)}, name="field")


def steered(model: Graph, path: Path, **options: object) -> Graph:
    more = " ".join(f"{key}={value}" for key, value in options.items())
    return ag.run(model, f"physics_steer{{delta={path} site=activation.0 {more}}}, tap{{site=activation.0}}").graph


def norms(h: Array) -> Array:
    return np.sqrt((h.astype(float) ** 2).sum(tuple(range(1, h.ndim))))


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("dialect", ["fx", "onnx"])
def test_the_shift_is_a_fraction_of_the_activation(rank: int, dialect: str, tmp_path: Path) -> None:
    model = graph(rank, (None,) * rank)
    x = np.random.default_rng(0).normal(size=(3, 2, *((8, 10) if rank == 2 else (4, 6, 5)))).astype(np.float32)
    h = ag.run(model, "tap{site=activation.0}", parity="none").graph.run({"x": x})["activation.0"]
    pattern = np.random.default_rng(1).normal(size=h.shape[1:])
    path = Delta("activation.0", pattern).save(tmp_path / "d.safetensors")
    results = {}
    for alpha in (0.4, -0.4):
        made = steered(model, path, alpha=alpha, adapt="none")
        made = made if dialect == "fx" else ag.load(made.save(tmp_path / "m.onnx"))
        results[alpha] = made.run({"x": x})["activation.0"]
        np.testing.assert_allclose(norms(results[alpha] - h) / norms(h), abs(alpha), rtol=1e-5)
    np.testing.assert_allclose((results[0.4] + results[-0.4]) / 2, h, atol=1e-5)
    unit = pattern / np.linalg.norm(pattern)
    np.testing.assert_allclose(results[0.4], h + 0.4 * norms(h).reshape(-1, *[1] * (h.ndim - 1)) * unit, atol=1e-5)


def test_ways_to_adapt(tmp_path: Path) -> None:
    pattern = np.random.default_rng(0).normal(size=(3, 4, 6))
    for how in ADAPTATIONS:
        assert np.array_equal(adapted(pattern, (3, 4, 6), how), pattern), "sizes match"
    cut = adapted(pattern, (3, 2, 3), "none")
    assert np.array_equal(cut, pattern[:, 1:3, 1:4])
    assert (
        np.array_equal(adapted(pattern, (3, 5, 8), "pad")[:, :4, :6], pattern)
        and not adapted(pattern, (3, 5, 8), "pad")[:, 4:].any()
    )
    np.testing.assert_allclose(adapted(pattern, (3, 5, 8), "drop")[:, 2, 5], pattern.mean((1, 2)))
    wanted = torch.nn.functional.interpolate(torch.tensor(pattern)[None], (5, 8), mode="bilinear", align_corners=False)[
        0
    ].numpy()
    np.testing.assert_allclose(adapted(pattern, (3, 5, 8), "interpolate"), wanted, atol=1e-12)
    constant = np.broadcast_to(np.arange(3.0)[:, None, None], (3, 4, 6))
    np.testing.assert_allclose(adapted(constant, (3, 5, 8), "drop"), adapted(constant, (3, 5, 8), "interpolate"))
    with pytest.raises(InputError, match=r"pattern is \[3, 4, 6\] and activations are \[2, 4, 6\]"):
        adapted(pattern, (2, 4, 6), "drop")


@pytest.mark.parametrize("dialect", ["fx", "onnx"])
@pytest.mark.parametrize("space", [(None, None), ("height", "width"), (None, "width")])
@pytest.mark.parametrize("size", [(1, 1), (8, 1)])
def test_a_pattern_that_is_broadcast_is_as_strong(
    dialect: str, space: tuple[str | None, ...], size: tuple[int, int], tmp_path: Path
) -> None:
    """The norm of the pattern is that of what is added, and not of what is stored."""
    model = graph(2, space)
    path = Delta("activation.0", np.random.default_rng(1).normal(size=(6, *size))).save(tmp_path / "d.safetensors")
    if size[0] != 1 and space[0] is not None:
        with pytest.raises(PassError, match=r"not fixed .* adapt=none needs them: say adapt=drop"):
            steered(model, path, alpha=0.3, adapt="none")
        return
    made = steered(model, path, alpha=0.3, adapt="none")
    made = made if dialect == "fx" else ag.load(made.save(tmp_path / "m.onnx"))
    x = np.random.default_rng(0).normal(size=(3, 2, 8, 10)).astype(np.float32)
    h = ag.run(model, "tap{site=activation.0}", parity="none").graph.run({"x": x})["activation.0"]
    shift = made.run({"x": x})["activation.0"] - h
    np.testing.assert_allclose(norms(shift) / norms(h), 0.3, rtol=1e-5)
    pattern = np.broadcast_to(load_artifact(path, KIND, "").array("pattern"), h.shape[1:])
    unit = pattern / np.linalg.norm(pattern)
    np.testing.assert_allclose(shift, 0.3 * norms(h).reshape(-1, 1, 1, 1) * unit, atol=1e-5)


@pytest.mark.parametrize("dialect", ["fx", "onnx"])
def test_dynamic_space_takes_the_mean_pattern(dialect: str, tmp_path: Path) -> None:
    model = graph(2, ("height", "width"))
    pattern = np.random.default_rng(1).normal(size=(6, 8, 10))
    path = Delta("activation.0", pattern).save(tmp_path / "d.safetensors")
    made = steered(model, path, alpha=0.5)
    made = made if dialect == "fx" else ag.load(made.save(tmp_path / "m.onnx"))
    v = pattern.mean((1, 2))
    for size in ((8, 10), (5, 7)):
        x = np.random.default_rng(0).normal(size=(2, 2, *size)).astype(np.float32)
        h = ag.run(model, "tap{site=activation.0}", parity="none").graph.run({"x": x})["activation.0"]
        got = made.run({"x": x})["activation.0"]
        np.testing.assert_allclose(norms(got - h) / norms(h), 0.5, rtol=1e-5)
        shift = (got - h).mean((2, 3))
        cosines = (shift @ v) / np.linalg.norm(shift, axis=1) / np.linalg.norm(v)
        np.testing.assert_allclose(cosines, 1, atol=1e-4)
    with pytest.raises(PassError, match="not fixed"):
        steered(model, path, alpha=0.5, adapt="pad")


def test_the_pattern_between_two_regimes(tmp_path: Path) -> None:
    """Each simulation standardised by itself, then averaged; steering towards a regime makes the field more like it."""
    model = graph()
    rng = np.random.default_rng(0)
    waves = np.sin(np.linspace(0, 2 * np.pi, 10))[None, None, None] * np.ones((1, 2, 8, 1))
    feature = [{"x": (waves * rng.uniform(0.5, 2) + rng.normal(0, 0.05, (2, 2, 8, 10))).astype(np.float32)} for _ in range(3)]
    control = [{"x": rng.normal(0, 0.5, (2, 2, 8, 10)).astype(np.float32)} for _ in range(3)]
    found = delta(model, feature, control, site="activation.0")
    tapped = ag.run(model, "tap{site=activation.0}", parity="none").graph

    def by_hand(regime: list[dict[str, Array]]) -> Array:
        means = []
        for inputs in regime:
            h = tapped.run(inputs)["activation.0"].astype(float)
            means.append(np.mean([(one - one.mean()) / one.std(ddof=1) for one in h], axis=0))
        return np.asarray(np.mean(means, axis=0))

    np.testing.assert_allclose(found.pattern, by_hand(feature) - by_hand(control), atol=1e-6)
    path = found.save(tmp_path / "d.safetensors")
    plain = tapped.run(control[0])["activation.0"]
    toward, away = (steered(model, path, alpha=a).run(control[0])["activation.0"] for a in (0.5, -0.5))
    scores = [float((h * found.pattern).sum()) for h in (away, plain, toward)]
    assert scores == sorted(scores) and scores[0] < scores[2]
    off = ag.run(model, f"physics_steer{{delta={path} alpha=0}}").graph.run(control[0])["output"]
    assert np.array_equal(off, model.run(control[0])["output"])
    with pytest.raises(InputError, match=r"the same at activation.0"):
        delta(model, control, control, site="activation.0")


def test_bad_input(tmp_path: Path) -> None:
    path = Delta("activation.0", np.ones((4, 8, 10))).save(tmp_path / "d.safetensors")
    with pytest.raises(PassError, match="pattern has 4 channels"):
        steered(graph(), path)
    odd = Delta("activation.0", np.ones((6, 2, 10))).save(tmp_path / "odd.safetensors")
    with pytest.raises(PassError, match=r"at activation.0 the pattern is \[6, 2, 10\] and is not broadcast to \[6, 8, 10\]"):
        steered(graph(), odd, adapt="none")
    flat = Delta("activation.0", np.ones((6, 1, 1))).save(tmp_path / "flat.safetensors")
    with pytest.raises(PassError, match="adapt=pad needs them"):
        steered(graph(2, ("height", "width")), flat, adapt="pad")
    with pytest.raises(InputError, match="no simulations"):
        delta(graph(), [], [{"x": np.zeros((1, 2, 8, 10), np.float32)}], site="activation.0")
