"""The plane of two sets of activations: directions, the choice of one, the second axis, the layer mask, files, bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import actgraph as ag
from actgraph.errors import InputError
from actgraph.formats.artifacts import Artifact
from actgraph.graph import Graph
from actgraph.graph.graph import Array
from actgraph.passes.steer.plane import KIND, SteeringPlane, extract_plane, load_plane, plane_basis, steering_plane
from tests.passes.conftest import run
from tests.passes.planes import NORMS, last_tokens

WIDTH = 24
Sets = tuple[dict[str, Array], dict[str, Array]]


def planted(straddling: tuple[str, ...], samples: tuple[int, int] = (40, 30), seed: int = 0) -> tuple[Sets, Array]:
    """Two Gaussian classes, a planted direction apart; their means lie on both sides of zero at the named sites only."""
    rng = np.random.default_rng(seed)
    direction = rng.normal(size=WIDTH)
    direction /= np.linalg.norm(direction)
    sets: Sets = ({}, {})
    for place, name in enumerate(NORMS):
        centre = 0.0 if name in straddling else 4.0  # elsewhere both classes lie on one side
        own = rng.normal(size=WIDTH) * 0.3  # each site's direction is a bit its own
        for side, count, rows in zip((1.0, -1.0), samples, sets, strict=True):
            mean = (centre + side) * direction + side * own * (0.2 + 0.05 * place)
            rows[name] = (mean + rng.normal(size=(count, WIDTH)) * 0.3).astype(np.float32)
    return sets, direction


@pytest.mark.parametrize("method", ["selective", "angular"])
def test_planted_data_selects_exactly_its_blocks(method: Any) -> None:
    """(d) of the paper's card."""
    straddling = tuple(name for name in NORMS if name[7] in "23")
    (positive, negative), direction = planted(straddling)
    plane = steering_plane(positive, negative, method=method)
    assert plane.selected == straddling
    assert float(plane.basis[:, 0] @ direction) > 0.7, "from the negative to the positive set"
    np.testing.assert_allclose(plane.basis.T @ plane.basis, np.eye(2), atol=1e-6)
    flipped = steering_plane(negative, positive, method=method)
    assert flipped.selected == straddling
    np.testing.assert_allclose(flipped.basis[:, 0], -plane.basis[:, 0], atol=1e-6)


def test_a_block_with_one_norm_that_does_not_straddle_is_dropped() -> None:
    straddling = ("blocks.1.mlp.norm", "blocks.2.attn.norm", "blocks.2.mlp.norm", "blocks.4.attn.norm")
    (positive, negative), _ = planted(straddling)
    assert steering_plane(positive, negative).selected == straddling[1:3]
    assert steering_plane(positive, negative, keep="sites").selected == straddling
    renamed = tuple({f"model.layers.{n[7:]}": rows for n, rows in each.items()} for each in (positive, negative))
    assert len(steering_plane(*renamed).selected) == 2, "blocks are known by Hugging Face's names, too"
    flat = tuple({n.replace(".", "_"): rows for n, rows in each.items()} for each in (positive, negative))
    assert len(steering_plane(*flat).selected) == 4, "outside blocks each site is for itself"


@pytest.mark.parametrize("method", ["selective", "angular"])
def test_equals_the_formulas(method: str) -> None:
    """Directions, mean cosines, the first axis and the second one, written out."""
    (positive, negative), _ = planted(NORMS[:4], seed=3)
    plane = steering_plane(positive, negative, method=method)  # type: ignore[arg-type]
    directions, longest = [], []
    for name in NORMS:
        means = []
        for rows in (positive[name].astype(np.float64), negative[name].astype(np.float64)):
            if method == "angular":
                rows = rows / np.linalg.norm(rows, axis=1)[:, None]
            mean = rows.mean(0)
            means.append(mean / np.linalg.norm(mean) if method == "angular" else mean)
        directions.append(means[0] - means[1])
        longest.append(np.linalg.norm(directions[-1]))
    d = np.array(directions)
    unit = d / np.linalg.norm(d, axis=1)[:, None]
    cosines = (unit @ unit.T).mean(1)
    best = int(cosines.argmax())
    assert plane.source == NORMS[best]
    np.testing.assert_allclose([site.cosine for site in plane.sites], cosines, atol=1e-12)
    np.testing.assert_allclose([site.norm for site in plane.sites], longest, rtol=1e-12)
    np.testing.assert_allclose(plane.basis[:, 0], unit[best], atol=1e-7)
    stack = unit if method == "selective" else d
    _, vectors = np.linalg.eigh(np.cov(stack.T, bias=True))
    p = vectors[:, -1]
    p = p * np.sign(p[np.abs(p).argmax()])
    second = p - (p @ unit[best]) * unit[best]
    np.testing.assert_allclose(plane.basis[:, 1], second / np.linalg.norm(second), atol=1e-6)
    rows = positive[NORMS[1]].astype(np.float64)
    cosine = np.mean(rows @ unit[best] / np.linalg.norm(rows, axis=1))
    np.testing.assert_allclose(plane.sites[1].positive, cosine, atol=1e-9)
    longest_first = steering_plane(positive, negative, method=method, choose="norm")  # type: ignore[arg-type]
    assert longest_first.source == NORMS[int(np.argmax(longest))]


def test_ties_take_the_first_site() -> None:
    (positive, negative), _ = planted(NORMS)
    pair = [each["blocks.1.mlp.norm"] for each in (positive, negative)]
    other = [each["blocks.2.mlp.norm"] for each in (positive, negative)]
    order = ("blocks.3.attn.norm", "blocks.0.attn.norm", "blocks.7.attn.norm", "blocks.5.attn.norm")
    sets = [{name: (pair if i in (1, 2) else other)[side] for i, name in enumerate(order)} for side in (0, 1)]
    for choose in ("similarity", "norm"):
        plane = steering_plane(*sets, choose=choose)  # type: ignore[arg-type]
        assert plane.source in order[:2]
    reverse = [dict(reversed(rows.items())) for rows in sets]
    assert steering_plane(*sets).source == order[0] and steering_plane(*reverse).source == order[3]
    assert [site.name for site in steering_plane(*sets).sites] == list(order)


def test_a_site_where_all_samples_are_the_same() -> None:
    """With a chat template all prompts end in one token, and the first norm sees nothing else: no direction, not selected."""
    (positive, negative), _ = planted(NORMS)
    for rounding in (0.0, 1e-8):
        noise = rounding * np.random.default_rng(1).normal(size=(40, WIDTH))
        for rows in (positive, negative):
            rows["blocks.0.attn.norm"] = (np.ones((len(rows[NORMS[1]]), WIDTH)) + noise[: len(rows[NORMS[1]])]).astype(
                np.float32
            )
        plane = steering_plane(positive, negative)
        assert plane.sites[0].norm == 0 and plane.sites[0].cosine == 0 and not plane.sites[0].straddles
        assert plane.selected == NORMS[2:], "its block is not"
        rest = [{name: rows[name] for name in NORMS[1:]} for rows in (positive, negative)]
        np.testing.assert_allclose(steering_plane(*rest).basis, plane.basis, atol=1e-7)


def test_samples_of_zeros_and_scales_do_not_matter() -> None:
    """Angular: samples count by their directions, and one of zeros by none."""
    (positive, negative), _ = planted(NORMS)
    scaled = {name: rows * np.linspace(0.1, 9, len(rows), dtype=np.float32)[:, None] for name, rows in positive.items()}
    np.testing.assert_allclose(
        steering_plane(scaled, negative, method="angular").basis, steering_plane(positive, negative, method="angular").basis,
        atol=1e-6,
    )  # fmt: skip
    zero = {name: np.vstack([rows, np.zeros((1, WIDTH), np.float32)]) for name, rows in positive.items()}
    assert np.isfinite(steering_plane(zero, negative, method="angular").basis).all()


def test_files(tmp_path: Path) -> None:
    (positive, negative), _ = planted(NORMS[:4])
    plane = steering_plane(positive, negative, model="f32[4,4]:00")
    again = load_plane(plane.save(tmp_path / "a.safetensors"))
    assert again.sites == plane.sites and np.array_equal(again.basis, plane.basis)
    assert (again.source, again.method, again.model) == (plane.source, "selective", "f32[4,4]:00")
    twice = load_plane(plane.save(tmp_path / "b.safetensors")).save(tmp_path / "c.safetensors")
    assert twice.read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    rows = plane.table()
    assert [row["name"] for row in rows if row["selected"]] == list(NORMS[:4]) and sum(row["source"] for row in rows) == 1


def test_files_that_are_none(tmp_path: Path) -> None:
    basis = plane_basis(np.arange(1.0, 7), np.ones(6))
    cases: list[tuple[Artifact, str]] = [
        (Artifact("kif_signature", {"basis": basis}), "no steering_plane file but kif_signature"),
        (Artifact(KIND, {"a": basis}), "has no 'basis'"), (Artifact(KIND, {"basis": basis[0]}), "1 axes, not 2"),
        (Artifact(KIND, {"basis": basis * 2}), "not orthonormal"), (Artifact(KIND, {"basis": basis * np.nan}), "NaN"),
        (Artifact(KIND, {"basis": basis.T}), r"is \[width, 2\]"),
        (Artifact(KIND, {"basis": basis}, {"sites": [{}]}), "damaged"),
    ]  # fmt: skip
    for number, (artifact, message) in enumerate(cases):
        with pytest.raises(InputError, match=message) as caught:
            load_plane(artifact.save(tmp_path / f"{number}.safetensors"))
        assert caught.value.hint
    bare = load_plane(SteeringPlane(basis).save(tmp_path / "bare.safetensors"))
    assert bare.sites == () and np.array_equal(bare.basis, basis)


def test_bad_samples() -> None:
    (positive, negative), _ = planted(NORMS)

    def changed(name: str, rows: Array) -> dict[str, Array]:
        return {**positive, name: rows}

    first = NORMS[0]
    cases: list[tuple[Any, Any, str]] = [
        ({}, {}, "same sites"), ({first: positive[first]}, negative, "same sites"),
        (changed(first, positive[first][0]), negative, "not .samples, width."),
        (changed(first, positive[first][:0]), negative, "not .samples, width."),
        (changed(first, positive[first] * np.nan), negative, "NaN or infinite"),
        (changed(first, positive[first][:, :5]), negative, "different widths"),
        (negative, negative, "same mean at every site"),
        ({first: positive[first]}, {first: negative[first]}, "span no plane"),
        (dict.fromkeys(NORMS, positive[first]), dict.fromkeys(NORMS, negative[first]), "span no plane"),
    ]  # fmt: skip
    for above, below, message in cases:
        with pytest.raises(InputError, match=message):
            steering_plane(above, below)
    with pytest.raises(InputError, match="parallel"):
        plane_basis(np.arange(5.0), 2 * np.arange(5.0))
    with pytest.raises(InputError, match="zero"):
        plane_basis(np.zeros(5), np.ones(5))
    with pytest.raises(InputError, match="span no plane"):
        plane_basis(np.ones(5), np.ones(6))
    with pytest.raises(InputError, match=r"\[width, 2\]"):
        SteeringPlane(np.ones((5, 3), np.float32))


CITY = ["Lily went to the big city", "They live in a house in the city", "The car drove through the city"]
FOREST = ["Tom liked the dark forest", "There was a tree in the forest", "The bird sang in the forest", "A fox in the forest"]


def test_from_a_model_to_a_steered_one(stories: Graph, tmp_path: Path) -> None:
    plane = extract_plane(stories, CITY, FOREST, progress=False)
    assert [site.name for site in plane.sites] == list(NORMS) and plane.basis.shape == (64, 2)
    rows = [last_tokens(stories, NORMS, texts) for texts in (CITY, FOREST)]
    np.testing.assert_allclose(steering_plane(*rows).basis, plane.basis, atol=1e-4)
    assert plane.sites[0].norm > 0 and plane.model.startswith("f32[512,64]:")
    alike = extract_plane(stories, CITY, FOREST, site=["model.layers.*.input_layernorm", "blocks.*.mlp.norm"], progress=False)
    assert {s.name for s in alike.sites} == set(NORMS) and np.array_equal(alike.basis, plane.basis)
    file = plane.save(tmp_path / "plane.safetensors")
    steered = ag.run(stories, f"selective_steer{{plane={str(file)!r} angle=150 layers=all}}").graph
    assert np.abs(run(steered) - run(stories)).max() > 1e-2
