"""Inlined ops of ours are read as what they are, not as parts of the model's own activations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import actgraph as ag
from actgraph.graph import Graph
from tests.graph import onnx_models


class Unit(torch.nn.Module):
    def __init__(self, act: torch.nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.act, self.down = torch.nn.Linear(4, 8), act, torch.nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.act(self.up(x)))


def read(graph: Graph) -> list[tuple[str, str, list[str]]]:
    return [(a.function, a.output.name, [node.name for node in a.nodes]) for a in graph.views.activations()]


@pytest.mark.parametrize(
    ("act", "step"),
    [
        (torch.nn.ReLU(), "clip{site=activation.0 max=6}"),
        (torch.nn.ReLU(), "clip{site=activation.0 min=-1 max=100}"),
        (torch.nn.GELU(), "clip{site=activation.0 min=0 max=6}"),
        (torch.nn.SiLU(), "clip{site=activation.0 min=0}"),
        (torch.nn.SiLU(), "clip{site='activation.0:in' min=-100}"),
        (torch.nn.Hardsigmoid(), "sparsify{threshold=0 site='linear.1:in'}"),
    ],
)
def test_an_inlined_op_is_no_part_of_an_activation(act: torch.nn.Module, step: str, tmp_path: Path) -> None:
    plain = ag.trace(Unit(act).eval(), (torch.randn(2, 4),), dynamic={"x": ("batch", None)})
    edited = ag.run(plain, step).graph
    kept, inlined = (ag.load(edited.save(tmp_path / f"{name}.onnx", inline=how)) for name, how in (("k", None), ("i", "all")))
    assert not any(node.op.startswith("actgraph.") for node in inlined.nodes())
    assert read(inlined) == read(kept) == read(ag.load(plain.save(tmp_path / "plain.onnx")))
    x = {"x": np.random.default_rng(0).normal(0, 9, (5, 4)).astype(np.float32)}
    assert np.allclose(kept.run(x)["output"], inlined.run(x)["output"], rtol=1e-6)
    again = ag.load(inlined.save(tmp_path / "again.onnx"))
    assert read(again) == read(kept), "also after the next file"


def test_a_model_may_spell_its_own_activation_so() -> None:
    """The same nodes in a file of someone else are its ReLU6."""
    graph = onnx_models.graph(
        """<ir_version: 9, opset_import: ["": 18]>
        g (float[n, 4] x) => (float[n, 4] y) { h = MatMul(x, w)  a = Relu(h)  b = Min(a, six)  y = MatMul(b, w) }""",
        six=np.float32(6),
        w=onnx_models.weights(4, 4),
    )
    assert [(a.function, a.output.name) for a in graph.views.activations()] == [("relu6", "b")]
