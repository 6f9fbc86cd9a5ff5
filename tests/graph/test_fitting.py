"""Operands that do not fit together after an edit are found by the verifier, in both dialects, and the node is named."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import actgraph as ag
from actgraph.errors import VerifyError
from actgraph.formats.onnx_export import to_onnx
from actgraph.graph import Graph
from tests.graph import onnx_models


class Net(torch.nn.Module):
    """A scaled linear, a product of two values and a sum with a stored row."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(4, 6)
        self.inner = torch.nn.Parameter(torch.randn(6, 5))
        self.scale = torch.nn.Parameter(torch.randn(6))
        self.row = torch.nn.Parameter(torch.randn(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.linear(x) * self.scale) @ self.inner + self.row


@pytest.fixture(params=["fx", "onnx"])
def net(request: pytest.FixtureRequest) -> Graph:
    graph = ag.trace(Net().eval(), (torch.randn(3, 4),), dynamic={"x": ("batch", None)})
    return graph if request.param == "fx" else to_onnx(graph)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ((6,), (5,), "do not broadcast"),
        ((5,), (6,), "do not broadcast"),
        ((6, 5), (7, 5), r"inner sizes of .* differ, 6 and 7"),
    ],
)
def test_a_parameter_that_no_longer_fits(net: Graph, old: tuple[int, ...], new: tuple[int, ...], message: str) -> None:
    net.verify()
    (stored,) = (p for p in net.parameters() if p.shape == old and "bias" not in p.name)
    (reader,) = (use.node for use in stored.uses)
    with net.edit("test") as editor:
        editor.set_parameter(stored, np.zeros(new, np.float32))
    assert reader is not None
    with pytest.raises(VerifyError, match=message) as error:
        net.verify()
    assert f"{reader.name}: " in error.value.message and f"%{stored.name} is f32[" in error.value.message
    assert "\n" not in error.value.message


@pytest.mark.parametrize("size", [5, 7])
def test_the_weight_and_bias_of_a_linear(size: int) -> None:
    graph = ag.trace(Net().eval(), (torch.randn(3, 4),), dynamic={"x": ("batch", None)})
    (linear,) = (node for node in graph.nodes() if node.op == "aten.linear")
    weight, bias = linear.operands[1:]
    assert weight is not None and bias is not None
    for stored, shape, message in ((weight, (6, size), "inner sizes"), (bias, (size,), "the bias of aten.linear does not fit")):
        changed = graph.clone()
        with changed.edit("test") as editor:
            editor.set_parameter(changed.value(stored.name), np.zeros(shape, np.float32))
        with pytest.raises(VerifyError, match=message):
            changed.verify()


def test_values_that_were_rewired() -> None:
    graph = onnx_models.graph(
        """<ir_version: 9, opset_import: ["": 18]>
        g (float[b, 2, 3, 4] x, float[1, 2, 4, 3] y, float[1, 5, 4, 3] other) => (float[b, 2, 3, 3] z, float[1, 5, 4, 3] o)
        { z = MatMul(x, y)  o = Neg(other) }"""
    )
    graph.verify()
    with graph.edit("test") as editor:
        editor.set_operand(graph.nodes()[0], 1, graph.value("other"))
    with pytest.raises(VerifyError, match=r"the batches of onnx.MatMul do not broadcast: %x is f32\[b, 2, 3, 4\], %other is"):
        graph.verify()


@pytest.mark.parametrize(("left", "right"), [("4", "n"), ("1", "4"), ("n", "m"), ("4", "4"), ("n, 1", "4"), ("", "4")])
def test_sizes_that_may_fit_are_left_alone(left: str, right: str) -> None:
    graph = onnx_models.graph(
        f"""<ir_version: 9, opset_import: ["": 18]>
        g (float[{left}] x, float[{right}] y) => (float z) {{ a = Add(x, y)  z = ReduceMax <keepdims = 0> (a) }}"""
    )
    graph.verify()


def test_broadcasting_by_attribute_of_old_models() -> None:
    onnx_models.graph(
        """<ir_version: 3, opset_import: ["": 6]>
        g (float[n, 3, 4, 4] x, float[3] y) => (float[n, 3, 4, 4] z) { z = Add <broadcast = 1, axis = 1> (x, y) }"""
    ).verify()
