"""Safety subspaces: overlaps against their definition and against chance, projections of updates, and the pass over models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import actgraph as ag
from actgraph.calibrate.corpora import Corpus
from actgraph.errors import InputError, OptionError, PassError, SiteError
from actgraph.graph import Graph
from actgraph.graph.graph import Array
from actgraph.passes.steer.parameters import stored_parameters
from actgraph.passes.steer.safety_project import cosine, project_models, project_update
from actgraph.passes.steer.safety_subspaces import activation_overlap, weight_overlap
from actgraph.passes.steer.subspaces import energies_of, energies_of_gram, mode_overlap, random_basis, random_overlap
from actgraph.passes.steer.weight_edits import weight_project
from tests import zoo
from tests.passes.conftest import apply, in_dialect, relative, run

RNG = np.random.default_rng(23)


def shaped(m: int, n: int, decay: float = 0.8) -> Array:
    """A random matrix whose singular values fall by ``decay``."""
    left, right = (np.linalg.qr(RNG.standard_normal((size, min(m, n))))[0] for size in (m, n))
    return (left * decay ** np.arange(min(m, n))) @ right.T


# --- bases and overlaps -------------------------------------------------------------------------------------------------


def test_the_energy_basis_is_the_smallest_that_carries_the_share() -> None:
    matrix = shaped(12, 30)
    found = energies_of(matrix)
    total = np.square(matrix).sum()
    for share in (0.01, 0.3, 0.6, 0.9, 0.999, 1.0):
        basis = found.basis(share)
        held = [np.square(found.vectors[:, :k].T @ matrix).sum() / total for k in range(13)]
        k = basis.shape[1]
        assert held[k] >= share - 1e-9 and (k == 0 or held[k - 1] < share), "no smaller one does"
        assert np.allclose(basis.T @ basis, np.eye(k), atol=1e-12)


@pytest.mark.parametrize(("d", "n"), [(12, 40), (12, 7)])
def test_the_gram_basis_is_the_singular_one(d: int, n: int) -> None:
    matrix = shaped(d, n)
    direct, streamed = energies_of(matrix), energies_of_gram(matrix @ matrix.T)
    for share in (0.1, 0.5, 0.9, 0.99):
        a, b = direct.basis(share), streamed.basis(share)
        assert np.allclose(a, b, atol=1e-6), "signs are fixed, so the vectors themselves agree"
        assert mode_overlap(a, b) == pytest.approx(1.0, abs=1e-9)
    assert np.allclose(direct.energies, streamed.energies[: len(direct.energies)], rtol=1e-9)


def test_overlaps_of_known_subspaces() -> None:
    basis = energies_of(shaped(10, 20)).basis(0.9)
    assert mode_overlap(basis, basis) == pytest.approx(1.0)
    assert mode_overlap(basis, basis[:, :2]) == pytest.approx(1.0), "one holds the other"
    corner = np.eye(10)
    assert mode_overlap(corner[:, :3], corner[:, 3:8]) == 0.0, "orthogonal supports"
    assert mode_overlap(corner[:, :4], corner[:, 2:6]) == pytest.approx(0.5)
    tilted = np.linalg.qr(RNG.standard_normal((10, 4)))[0]
    angles = np.linalg.svd(corner[:, :4].T @ tilted, compute_uv=False)
    assert mode_overlap(corner[:, :4], tilted) == pytest.approx(np.square(angles).mean()), "mean cos^2 of the principal angles"


@pytest.mark.parametrize(("a", "b", "d"), [(3, 3, 16), (2, 7, 20), (10, 4, 12)])
def test_random_subspaces_overlap_as_the_baseline_says(a: int, b: int, d: int) -> None:
    rng = np.random.default_rng(1)
    found = [mode_overlap(random_basis(rng, d, a), random_basis(rng, d, b)) for _ in range(400)]
    error = np.std(found) / np.sqrt(len(found))
    assert abs(np.mean(found) - random_overlap(a, b, d)) < 3 * error


# --- projections --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "n"), [(12, 20), (20, 12)])
@pytest.mark.parametrize("fraction", [0.01, 0.25, 0.75])
def test_same_and_orth_add_up_and_projection_is_idempotent(m: int, n: int, fraction: float) -> None:
    u, v = RNG.standard_normal((m, n)), shaped(m, n)
    same, orth, opp = (project_update("w", u, v, fraction=fraction, mode=mode) for mode in ("same", "orth", "opp"))
    assert np.allclose(same.kept + orth.kept, u, atol=1e-12) and np.allclose(opp.kept, -same.kept, atol=1e-15)
    again = project_update("w", same.kept, v, fraction=fraction, mode="same")
    assert np.allclose(again.kept, same.kept, atol=1e-12)
    assert same.rank == max(1, round(fraction * min(m, n)))
    left = np.linalg.svd(v)[0][:, : same.rank]
    assert np.allclose(same.kept, left @ left.T @ u, atol=1e-12), "the paper's formula"
    assert abs(np.sum(same.kept * orth.kept)) < 1e-9 and orth.kept.any()


def test_energy_kept_is_monotone_and_whole_at_full_rank() -> None:
    u, v = RNG.standard_normal((12, 20)), shaped(12, 20)
    kept = [project_update("w", u, v, fraction=f, mode="same").energy for f in (0.01, 0.25, 0.5, 0.75, 0.99, 1.0)]
    assert kept == sorted(kept) and kept[0] < 0.5 and kept[-1] == pytest.approx(1.0)


def test_diagnostics_have_the_right_denominators() -> None:
    u, v = RNG.standard_normal((12, 20)), shaped(12, 20)
    found = project_update("w", u, v, fraction=0.3, mode="orth")
    part = np.linalg.norm(found.part) / np.linalg.norm(u)
    assert found.energy == pytest.approx(part**2) and found.cos_update == pytest.approx(part), "cos of U and P is |P| / |U|"
    assert found.cos_alignment == pytest.approx(np.sum(u * v) / (np.linalg.norm(u) * np.linalg.norm(v)))
    assert found.removed == pytest.approx(found.energy)
    assert project_update("w", v, v, fraction=0.3, mode="same").cos_alignment == pytest.approx(1.0)
    assert project_update("w", -v, v, fraction=0.3, mode="same").cos_alignment == pytest.approx(-1.0), "a negative product, too"
    assert cosine(np.zeros(3), np.ones(3)) == 0.0


def test_vectors_are_projected_on_the_alignment() -> None:
    u, v = RNG.standard_normal(9), RNG.standard_normal(9)
    found = project_update("norm", u, v, fraction=0.5, mode="same")
    assert np.allclose(found.kept, (u @ v) / (v @ v) * v) and found.rank == 1
    assert not project_update("norm", u, np.zeros(9), fraction=0.5, mode="same").kept.any()
    assert np.array_equal(project_update("norm", u, np.zeros(9), fraction=0.5, mode="orth").kept, u)


def test_controls_are_random_and_repeatable() -> None:
    u, v = RNG.standard_normal((30, 40)), shaped(30, 40)
    plain = project_update("w", u, v, fraction=0.2, mode="same")
    for control in ("random_subspace", "random_vectors"):
        one, two = (project_update("w", u, v, fraction=0.2, mode="same", control=control) for _ in range(2))
        other = project_update("w", u, v, fraction=0.2, mode="same", control=control, seed=1)
        assert one.rank == plain.rank and np.array_equal(one.kept, two.kept)
        assert relative(one.kept, plain.kept) > 0.1 < relative(one.kept, other.kept)
    many = [project_update("w", v, v, fraction=0.2, mode="same", control="random_subspace", seed=s).energy for s in range(40)]
    assert np.mean(many) == pytest.approx(6 / 30, abs=0.05), "a random subspace holds rank / dimensions of the energy"
    assert project_update("w", v, v, fraction=0.2, mode="same").energy > 0.9


def test_bad_projections() -> None:
    with pytest.raises(InputError, match="not orthonormal"):
        weight_project(np.ones((3, 2)), np.ones((3, 2)), "same")
    with pytest.raises(InputError, match="does not fit"):
        weight_project(np.ones((3, 2)), np.eye(4)[:, :1], "same")
    with pytest.raises(OptionError, match="one of same, orth, opp"):
        weight_project(np.ones((3, 2)), np.eye(3)[:, :1], "half")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="NaN"):
        project_update("w", np.full((2, 2), np.nan), np.eye(2), fraction=0.5, mode="same")
    with pytest.raises(InputError, match="at most 1"):
        energies_of(np.eye(3)).basis(1.5)


# --- activations --------------------------------------------------------------------------------------------------------


def texts() -> list[str]:
    return list(dict.fromkeys(str(text)[:90] for text in Corpus.of()))


def test_activations_of_a_corpus(stories: Graph) -> None:
    """Against the definition: last-token activations stacked, decomposed and compared, for one site."""
    a, b = texts()[:9], texts()[9:]
    report = activation_overlap(stories, a, b, site="blocks.*.resid_post", energies=(0.5, 0.9, 0.99), progress=False)
    assert report.documents == (9, 8) and len(report.rows) == 5 * 3
    tapped, bases = apply(stories, "tap{site=blocks.2.resid_post}"), []
    for documents in (a, b):
        columns = []
        for text in documents:
            ids = np.asarray([stories.companions.tokenizer.encode(text).ids])
            inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(ids.shape[1])[None]}
            columns.append(tapped.run(inputs)["blocks.2.resid_post"][0, -1])
        bases.append(energies_of(np.stack(columns, axis=1)))
    for share in (0.5, 0.9, 0.99):
        row = report.at("blocks.2.resid_post", share)
        expected = mode_overlap(*(each.basis(share) for each in bases))
        assert row.overlap == pytest.approx(expected, abs=1e-4)
        assert (row.k_a, row.k_b) == tuple(each.rank(share) for each in bases) and row.size == 64
        assert row.random == max(row.k_a, row.k_b) / 64
    table = str(report)
    assert "blocks.2.resid_post" in table and "overlap" in table and "9 and 8 documents" in table


def test_default_sites_are_deep(stories: Graph) -> None:
    report = activation_overlap(stories, texts()[:4], texts()[:4], energies=(0.9,), progress=False)
    assert [row.place for row in report.rows] == ["blocks.3.resid_post"], "4 of 5 blocks is 80 % of the depth"
    assert report.rows[0].overlap == pytest.approx(1.0), "a corpus against itself"
    with pytest.raises(SiteError, match="no fixed width"):
        activation_overlap(stories, texts()[:2], texts()[:2], site="blocks.1.attn.pattern", progress=False)
    with pytest.raises(InputError, match="empty"):
        activation_overlap(stories, [], texts()[:2], progress=False)


# --- weights ------------------------------------------------------------------------------------------------------------


def changed(graph: Graph, seed: int, *, rank: int = 0, scale: float = 0.05) -> Graph:
    """The model with random numbers added to every parameter; matrices by updates of that rank (0: full)."""
    rng = np.random.default_rng(seed)
    graph = graph.clone()
    with graph.edit("train") as editor:
        for parameter in stored_parameters(graph):
            parts = []
            for part in parameter.parts():
                delta = rng.standard_normal(part.shape)
                if rank and part.ndim == 2:
                    delta = rng.standard_normal((part.shape[0], rank)) @ rng.standard_normal((rank, part.shape[1]))
                parts.append(part + scale * delta)
            parameter.write(editor, parts)
    return graph


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_parameters_are_read_and_written_as_output_by_input(name: str, dialect: str) -> None:
    graph = in_dialect(name, dialect)
    found = {p.name: p for p in stored_parameters(graph)}
    for linear in graph.views.linears():
        (matrix,) = found[linear.weight.name].parts()
        assert matrix.shape == (linear.out_features, linear.in_features)
        assert np.array_equal(matrix, linear.read_weight())
    stacks = [p for p in found.values() if p.experts]
    assert len(stacks) == (4 if name == "mixtral" else 0) and all(len(p.parts()) == 4 for p in stacks)
    before = graph.content_hash()
    with graph.edit("same") as editor:
        for parameter in found.values():
            parameter.write(editor, parameter.parts())
    assert graph.content_hash() == before, "what is read is what is written"


def test_overlap_of_weight_updates(dialect: str) -> None:
    base = in_dialect("gpt2", dialect)
    a, b = changed(base, 1, rank=3), changed(base, 2, rank=3)
    same = weight_overlap(base, a, a, energies=(0.999,))
    assert all(row.overlap == pytest.approx(1.0, abs=1e-6) for row in same.rows)
    rows = weight_overlap(base, a, b, energies=(0.999,)).rows
    matrices = [part for p in stored_parameters(base) for part in p.parts() if part.ndim == 2]
    assert len(rows) == len(matrices) and all(row.k_a == row.k_b == 3 for row in rows)
    assert np.mean([row.overlap for row in rows]) == pytest.approx(np.mean([row.random for row in rows]), abs=0.03)
    blocks = weight_overlap(base, a, b, per="block", energies=(0.999,)).rows
    assert any(row.place == "transformer.h.1 (32 inputs)" and row.size == 96 + 32 + 128 for row in blocks)
    untouched = weight_overlap(base, a, base, energies=(0.5,))
    assert not untouched.rows and len(untouched.unchanged) == len(matrices)


def test_models_of_other_shapes(stories: Graph) -> None:
    with pytest.raises(InputError, match="not of one topology: only"):
        weight_overlap(stories, zoo.captured("gpt2"), stories)


# --- the pass -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def trio(dialect: str, tmp_path: Path) -> tuple[Graph, Path, Path, dict[str, Array]]:
    """A fine-tuned model, the files of what it came from, and its inputs."""
    suffix = "pt2" if dialect == "fx" else "onnx"
    base = in_dialect("gpt2", dialect)
    aligned = changed(base, 3, rank=4)
    paths = [graph.save(tmp_path / f"{name}.{suffix}") for name, graph in (("base", base), ("aligned", aligned))]
    return changed(aligned, 4), paths[1], paths[0], zoo.inputs("gpt2")


def test_the_pass_is_the_formula(trio: tuple[Graph, Path, Path, dict[str, Array]]) -> None:
    tuned, aligned, base, inputs = trio
    step = f"safety_project{{aligned={aligned} base={base} fraction=0.125 mode=%s}}"
    outputs = {mode: ag.run(tuned, step % mode) for mode in ("same", "orth", "opp")}
    tables = [{p.name: p for p in stored_parameters(ag.load(path))} for path in (aligned, base)]
    updates = {mode: {p.name: p.parts() for p in stored_parameters(out.graph)} for mode, out in outputs.items()}
    for parameter in stored_parameters(tuned):
        (w,), (a,), (b,) = parameter.parts(), *(table[parameter.name].parts() for table in tables)
        left = np.linalg.svd(a - b, full_matrices=False)[0][:, :4] if w.ndim == 2 else (a - b)[:, None] / np.linalg.norm(a - b)
        part = left @ (left.T @ (w - a))
        for mode, expected in (("same", a + part), ("orth", w - part), ("opp", a - part)):
            assert np.abs(updates[mode][parameter.name][0] - expected).max() < 1e-6
    assert relative(run(tuned, inputs), run(outputs["orth"].graph, inputs)) > 1e-3
    assert relative(run(outputs["same"].graph, inputs), run(outputs["opp"].graph, inputs)) > 1e-3
    row = outputs["orth"].report["safety_project"]
    assert row.counts["projected"] == len(row.details) and {"weight", "rank", "energy", "removed"} <= set(row.details[0])
    assert any("of the update's energy is in the subspace" in message for message in row.messages)


def test_everything_and_nothing(trio: tuple[Graph, Path, Path, dict[str, Array]]) -> None:
    """Projected on all directions, ``same`` keeps square updates; a model that was not tuned is an error."""
    tuned, aligned, base, _ = trio
    found = {
        p.name: each
        for p, (each, *_), _ in project_models(tuned, ag.load(aligned), changed(tuned, 9), fraction=1.0, mode="same")
    }
    for name, each in found.items():
        if each.part.ndim == 2 and each.part.shape[0] <= each.part.shape[1]:
            assert each.energy == pytest.approx(1.0), name
    with pytest.raises(PassError, match="has the weights of"):
        ag.run(ag.load(aligned), f"safety_project{{aligned={aligned} base={base}}}")
    with pytest.raises(InputError, match="there is no file"):
        ag.run(tuned, f"safety_project{{aligned=missing.onnx base={base}}}")
    controlled = [
        ag.run(tuned, f"safety_project{{aligned={aligned} base={base} control=random_subspace}}", seed=seed).graph
        for seed in (0, 0, 1)
    ]
    assert controlled[0].content_hash() == controlled[1].content_hash() != controlled[2].content_hash()
