"""Rank-1 edits of weights: the formula, merged and beside the weight, and which linear a name means."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import actgraph as ag
from actgraph.errors import InputError, PassError
from actgraph.graph import Graph
from actgraph.passes.steer.weight_edits import RankOneEdit, RankOneEdits, load_edits
from tests.passes.conftest import TINY_IDS, TinyBlock, apply, as_dialect, relative, run
from tests.passes.test_shared_parameters import Recurrent

RNG = np.random.default_rng(31)
U, K = RNG.normal(0, 1, 8).astype(np.float32), RNG.normal(0, 1, 12).astype(np.float32)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return RankOneEdits({"blocks.0.mlp.hidden": RankOneEdit(U, K)}).save(tmp_path / "edits.safetensors")


def reference(scale: float = 1.0) -> np.ndarray:
    model = TinyBlock().eval()
    with torch.no_grad():
        model.down.weight += scale * torch.from_numpy(np.outer(U, K))
        return model(torch.from_numpy(TINY_IDS)).numpy()


@pytest.mark.parametrize("mode", ["merge", "side_branch"])
@pytest.mark.parametrize("scale", [1.0, -0.3])
def test_equals_the_edited_model(tiny: Graph, file: Path, mode: str, scale: float) -> None:
    edited = apply(tiny, f"rank_one{{edits={file} mode={mode} scale={scale}}}")
    assert relative(reference(scale), run(edited)) < 1e-5
    assert relative(run(tiny), run(edited)) > 1e-2 < relative(reference(-scale), run(edited))
    added = [node.op.rsplit(".", 1)[-1] for node in edited.nodes()[len(tiny.nodes()) :]]
    assert len(edited.nodes()) - len(tiny.nodes()) == (2 if mode == "side_branch" else 0), added


@pytest.mark.parametrize("name", ["linear.2", "blocks.0.mlp.out", "down", "linear.2:in", "down:in", "blocks.0.mlp.hidden"])
def test_a_linear_by_its_output_or_input(tiny: Graph, tmp_path: Path, name: str) -> None:
    path = RankOneEdits({name: RankOneEdit(U, K)}).save(tmp_path / "edits.safetensors")
    assert relative(reference(), run(apply(tiny, f"rank_one{{edits={path}}}"))) < 1e-5


def test_edits_add_up_in_any_mode(tiny: Graph, file: Path) -> None:
    step = f"rank_one{{edits={file} mode=%s scale=%s}}"
    mixed = apply(tiny, ", ".join(step % each for each in (("side_branch", 0.5), ("merge", 1.0), ("side_branch", -0.25))))
    assert relative(reference(1.25), run(mixed)) < 1e-5
    back = apply(tiny, f"{step % ('merge', 1.0)}, {step % ('merge', -1.0)}")
    assert relative(run(tiny), run(back)) < 1e-5


def test_behind_a_gate(tiny: Graph, file: Path) -> None:
    """Both forms read what the linear reads, gated by another pass at the value or at the edge."""
    for site in ("blocks.0.mlp.hidden", "linear.2:in"):
        gate = f"sparsify{{method=teal threshold=0.4 site={site!r}}}"
        merged, beside = (apply(tiny, f"{gate}, rank_one{{edits={file} mode={mode}}}") for mode in ("merge", "side_branch"))
        assert relative(run(merged), run(beside)) < 1e-5
        assert relative(reference(), run(merged)) > 1e-3


def test_a_shared_weight_is_edited_for_one_reader(dialect: str, tmp_path: Path) -> None:
    graph = as_dialect(ag.trace(Recurrent().eval(), (torch.randn(3, 6),), dynamic={"x": ("batch", None)}), dialect)
    write, read = RNG.normal(0, 1, 6).astype(np.float32), RNG.normal(0, 1, 10).astype(np.float32)
    downs = [f.down for f in graph.views.feed_forwards()]
    name = graph.site_table.names_of(downs[0].output)[0]
    path = RankOneEdits({name: RankOneEdit(write, read)}).save(tmp_path / "edits.safetensors")
    out = ag.run(graph, f"rank_one{{edits={path}}}")
    weights = [f.down.read_weight() for f in out.graph.views.feed_forwards()]
    assert np.allclose(weights[0] - weights[1], np.outer(write, read), atol=1e-5)
    assert np.array_equal(weights[1], downs[1].read_weight())
    assert any("untied" in message for message in out.report["rank_one"].messages)


def test_what_rounding_loses_is_said(tiny: Graph, file: Path, tmp_path: Path) -> None:
    row = ag.run(tiny, f"rank_one{{edits={file}}}").report["rank_one"].details[0]
    assert row["rounding"] < 1e-6 and row["update"] == pytest.approx(np.linalg.norm(U) * np.linalg.norm(K), rel=1e-5)
    small = f"rank_one{{edits={file} scale=0.01}}"
    bf16 = ag.run(tiny, f"cast{{dtype=bf16}}, {small}").report["rank_one"].details[0]
    assert 1e-2 < bf16["rounding"] < 1 and bf16["of weight"] < 0.1


def test_some_tokens(tiny: Graph, file: Path) -> None:
    graph = apply(tiny, f"rank_one{{edits={file} mode=side_branch where='2:'}}")
    edited = run(graph, {"ids": TINY_IDS, "positions": np.tile(np.arange(4), (2, 1))})
    assert np.array_equal(edited[:, :2], run(tiny)[:, :2])
    assert relative(reference()[:, 2:], edited[:, 2:]) < 1e-5


def test_bad_input(tiny: Graph, tmp_path: Path) -> None:
    def refused(name: str, write: np.ndarray = U, read: np.ndarray = K) -> str:
        path = RankOneEdits({name: RankOneEdit(write, read)}).save(tmp_path / "edits.safetensors")
        with pytest.raises(PassError) as error:
            apply(tiny, f"rank_one{{edits={path}}}")
        return str(error.value)

    assert "is the input of 2 linears" in refused("blocks.0.mlp.norm")
    assert "is no linear's input or output" in refused("blocks.0.mlp.act")
    assert "the edit of blocks.0.mlp.hidden is [8, 8], and its weight is [8, 12]" in refused("blocks.0.mlp.hidden", read=U)
    path = RankOneEdits({"blocks.0.mlp.hidden": RankOneEdit(U, K)}).save(tmp_path / "edits.safetensors")
    with pytest.raises(PassError, match=r"no edit at what is selected \(it has blocks\.0\.mlp\.hidden\)"):
        apply(tiny, f"rank_one{{edits={path} site=linear.0}}")
    nan = RankOneEdits({"blocks.0.mlp.hidden": RankOneEdit(U * np.nan, K)}).save(tmp_path / "nan.safetensors")
    with pytest.raises(InputError, match="NaN"):
        load_edits(nan)
    with pytest.raises(InputError, match="there is no file"):
        apply(tiny, "rank_one{edits=missing.safetensors}")
    with pytest.raises(PassError, match="not finite"):
        apply(tiny, f"cast{{dtype=f16}}, rank_one{{edits={path} scale=100000.0}}")
