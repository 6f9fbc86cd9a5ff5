"""Pruning: removed equals masked, planted dead neurons go first, companions are cut alike."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import actgraph as ag
from actgraph.errors import PassError
from actgraph.graph import Graph
from actgraph.passes.prune.importance import keep_indices, neuron_importance
from tests import zoo
from tests.passes.conftest import apply, relative, run


def widths(graph: Graph) -> list[int]:
    return [f.down.in_features for f in graph.views.feed_forwards()]


@pytest.mark.parametrize("importance", ["activation", "wanda", "magnitude"])
def test_removed_equals_masked(stories: Graph, importance: str) -> None:
    removed = apply(stories, f"prune{{ratio=0.3 importance={importance}}}")
    masked = apply(stories, f"prune{{ratio=0.3 importance={importance} mode=mask}}")
    assert widths(removed) == [120] * 5
    assert relative(run(masked), run(removed)) < 1e-5
    assert relative(run(stories), run(removed)) > 1e-3
    removed.verify()


@pytest.mark.parametrize("importance", ["activation", "magnitude"])
def test_a_fused_gate_and_up_is_split(dialect: str, importance: str) -> None:
    """Phi-3 has one projection for gate and up: what is left of each half is a product of its own."""
    graph = zoo.captured("phi3") if dialect == "fx" else ag.load(zoo.stock_onnx("phi3"))
    ids = np.random.default_rng(0).integers(3, 90, (4, 8))
    positions = np.broadcast_to(np.arange(8), ids.shape).copy()
    corpus = [{"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": positions}]
    assert all(f.fused_gate_up for f in graph.views.feed_forwards())
    removed, masked = (
        apply(graph, f"prune{{ratio=0.5 importance={importance} mode={mode}}}", corpus=corpus) for mode in ("remove", "mask")
    )
    assert widths(removed) == [24, 24] and not any(f.fused_gate_up for f in removed.views.feed_forwards())
    for f in removed.views.feed_forwards():
        assert f.hidden.shape is not None and f.hidden.shape[-1] == 24
    removed.verify()
    inputs = zoo.inputs("phi3")
    assert relative(run(masked, inputs), run(removed, inputs)) < 1e-5
    assert relative(run(graph, inputs), run(removed, inputs)) > 1e-3


def test_activation_importance_beats_magnitude(stories: Graph) -> None:
    """What the calibration is for: less damage than weights alone, on the text that it was calibrated on."""
    from actgraph.calibrate.perplexity import perplexity

    by = {k: perplexity(apply(stories, f"prune{{ratio=0.4 importance={k}}}")) for k in ("activation", "magnitude")}
    assert by["activation"] < by["magnitude"]


def test_dead_neurons_go_first_and_the_output_stays(tiny: Graph) -> None:
    dead = [1, 4, 7]
    linears = {linear.out_features: linear for linear in tiny.views.linears()}
    feed_forward = tiny.views.feed_forwards()[0]
    weight = feed_forward.up.read_weight().copy()
    weight[dead] = 0
    with tiny.edit("test") as editor:
        feed_forward.up.write_weight(editor, weight)
    assert linears
    pruned = apply(tiny, "prune{ratio=0.25}", corpus=[{"ids": np.arange(16).reshape(4, 4)}])
    assert widths(pruned) == [9]
    assert relative(run(tiny), run(pruned)) < 1e-6


def test_importance_against_loops() -> None:
    rng = np.random.default_rng(0)
    down, square = rng.normal(0, 1, (5, 7)), rng.uniform(0, 2, 7)
    expected = [np.sqrt(square[j]) * np.sqrt(sum(down[i, j] ** 2 for i in range(5))) for j in range(7)]
    assert np.allclose(neuron_importance("activation", down, square), expected)
    wanda = [np.sqrt(square[j]) * sum(abs(down[i, j]) for i in range(5)) / 5 for j in range(7)]
    assert np.allclose(neuron_importance("wanda", down, square), wanda)


def test_keep_indices() -> None:
    assert keep_indices(np.array([3.0, 1.0, 2.0, 2.0]), 0.5, 1).tolist() == [0, 2], "ties go to the lower index"
    assert keep_indices(np.arange(100.0), 0.5, 32).size == 64
    assert keep_indices(np.arange(10.0), 0.99, 4).size == 4


def test_companions_are_cut_with_the_neurons(stories: Graph) -> None:
    """A steering vector and a per-channel clip on the hidden activation are cut by the same indices."""
    vector = "[" + ", ".join(["0.25"] * 172) + "]"
    edits = f"steer{{vector={vector} site=blocks.1.mlp.hidden}}, clip{{site=blocks.2.mlp.hidden percentile=99 per=channel}}"
    removed = apply(stories, f"{edits}, prune{{ratio=0.5 importance=magnitude}}")
    masked = apply(stories, f"{edits}, prune{{ratio=0.5 importance=magnitude mode=mask}}")
    assert widths(removed) == [86] * 5
    assert relative(run(masked), run(removed)) < 1e-5


def test_shared_layers_are_pruned_together() -> None:
    class Shared(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.up, self.down = torch.nn.Linear(6, 10), torch.nn.Linear(10, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(2):
                x = x + self.down(torch.relu(self.up(x)))
            return x

    graph = ag.trace(Shared().eval(), (torch.randn(3, 6),), dynamic={"x": ("batch", None)})
    corpus = [{"x": np.random.default_rng(0).normal(0, 1, (8, 6)).astype(np.float32)}]
    pruned = apply(graph, "prune{ratio=0.4}", corpus=corpus)
    assert widths(pruned) == [6, 6]
    assert sum(p.shape == (6, 6) for p in pruned.parameters()) == 2, "the weights are still shared"
    masked = apply(graph, "prune{ratio=0.4 mode=mask}", corpus=corpus)
    x = {"x": np.random.default_rng(1).normal(0, 1, (3, 6)).astype(np.float32)}
    assert relative(run(masked, x), run(pruned, x)) < 1e-5


def test_declines_with_the_reason(stories: Graph) -> None:
    with pytest.raises(PassError, match="prune before quantizing"):
        apply(stories, "quantize{weights=int8}, prune{ratio=0.3 importance=magnitude}")
    with pytest.raises(PassError, match="graph output"):
        apply(stories, "tap{site='blocks.*.mlp.hidden'}, prune{ratio=0.3 importance=magnitude}")


def test_golden(tiny: Graph, dialect: str, golden) -> None:  # type: ignore[no-untyped-def]
    pruned = apply(tiny, "prune{ratio=0.5 importance=magnitude}")
    golden(f"passes/prune.{dialect}", pruned.text())
    assert relative(run(apply(tiny, "prune{ratio=0.5 importance=magnitude mode=mask}")), run(pruned)) < 1e-6
    assert relative(run(tiny), run(pruned)) > 1e-3
