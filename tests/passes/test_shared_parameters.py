"""Parameters with several readers: an edit for some of them leaves the others as they were."""

from __future__ import annotations

import numpy as np
import torch

import actgraph as ag
from actgraph.graph import Graph
from tests.passes.conftest import apply, relative

X = {"x": np.random.default_rng(1).normal(0, 1, (3, 6)).astype(np.float32)}


class TwoUnits(torch.nn.Module):
    """Two residual feed-forwards with weights of their own and one bias for both."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = torch.nn.ModuleList(torch.nn.Linear(6, 10) for _ in range(2))
        self.down = torch.nn.ModuleList(torch.nn.Linear(10, 6) for _ in range(2))
        self.up[1].bias = self.up[0].bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(torch.relu(up(x)))
        return x


class Recurrent(torch.nn.Module):
    """One feed-forward applied twice; its up projection is also read outside of it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = torch.nn.Linear(6, 10), torch.nn.Linear(10, 6)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = x
        for _ in range(2):
            y = y + self.down(torch.relu(self.up(y)))
        return y, torch.cos(self.up(x))


def traced(model: torch.nn.Module, dialect: str) -> Graph:
    graph = ag.trace(model.eval(), (torch.randn(3, 6),), dynamic={"x": ("batch", None)})
    if dialect == "fx":
        return graph
    from actgraph.formats.onnx_export import to_onnx

    return to_onnx(graph)


def widths(graph: Graph) -> list[int]:
    return [f.down.in_features for f in graph.views.feed_forwards()]


def test_pruning_one_feed_forward_leaves_the_bias_of_the_other(dialect: str) -> None:
    graph = traced(TwoUnits(), dialect)
    step = "prune{ratio=0.4 importance=magnitude site='linear.1:in'%s}"
    removed, masked = apply(graph, step % ""), apply(graph, step % " mode=mask")
    assert widths(removed) == [6, 10]
    (got,), (expected,) = removed.run(X).values(), masked.run(X).values()
    assert relative(expected, got) < 1e-6
    assert relative(*graph.run(X).values(), got) > 1e-3


def test_pruning_both_cuts_a_shared_bias_by_the_neurons_of_each(dialect: str) -> None:
    graph = traced(TwoUnits(), dialect)
    step = "prune{ratio=0.4 importance=magnitude%s}"
    removed, masked = apply(graph, step % ""), apply(graph, step % " mode=mask")
    assert widths(removed) == [6, 6]
    (got,), (expected,) = removed.run(X).values(), masked.run(X).values()
    assert relative(expected, got) < 1e-6


def test_pruning_shared_layers_leaves_other_uses_of_their_weights(dialect: str) -> None:
    graph = traced(Recurrent(), dialect)
    step = "prune{ratio=0.4 importance=magnitude%s}"
    removed, masked = apply(graph, step % ""), apply(graph, step % " mode=mask")
    assert widths(removed) == [6, 6]
    (got, beside), (expected, beside_masked), (_, before) = (list(g.run(X).values()) for g in (removed, masked, graph))
    assert relative(expected, got) < 1e-6
    assert np.array_equal(beside, beside_masked) and np.array_equal(beside, before), "all ten rows are still there"


def test_merging_a_vector_leaves_other_readers_of_the_stored_one(tiny: Graph) -> None:
    """Two shifts that read one stored vector, as deduplication leaves them: steering again at one site is for that site."""
    vector = np.linspace(-1, 1, 8).astype(np.float32)
    sites = ("embed", "blocks.0.resid_post")
    with tiny.edit("steer") as editor:
        stored = editor.add_parameter("vector", vector)
        for name in sites:
            editor.insert_at(tiny.site(name), "actgraph.shift", [stored])
    steered = apply(tiny, f"steer{{vector={[float(v) for v in vector]} site=blocks.0.resid_post}}")
    shifts = [node for node in steered.nodes() if node.op == "actgraph.shift"]
    first, second = (steered.read(node.operands[1]) for node in shifts if node.operands[1] is not None)
    assert np.array_equal(first, vector) and np.allclose(second, 2 * vector)
