"""The ONNX dialect: bodies of control flow, and functions."""

from __future__ import annotations

import numpy as np
import pytest

from actgraph.errors import UnsupportedError
from actgraph.graph.graph import Use
from actgraph.ops.dtypes import DType
from actgraph.ops.shapes import TensorType
from tests.graph import onnx_models as models


def test_captured_values_are_operands():
    graph = models.branches()
    node = graph.value("y").producer
    assert [v.name for v in node.operands] == ["flag", "h", "k"]
    assert graph.value("h").uses == (Use(node, 1),)
    assert [n.name for n in graph.subgraph_nodes()] == ["y/then_branch/u", "y/then_branch/t", "y/else_branch/e"]
    assert graph.value("y/then_branch/u").producer.op == "onnx.Add"


@pytest.mark.parametrize("flag", [True, False])
def test_redirect_reaches_into_bodies(flag):
    graph = models.branches()
    with graph.edit("p") as editor:
        node = editor.insert("mul", [graph.value("h"), 2.0])
        editor.redirect(graph.value("h"), node.output)
    graph.verify()
    inputs = {**models.feed(graph), "flag": np.array(flag)}
    h, k = np.maximum(inputs["x"], 0) * 2, -inputs["x"]
    np.testing.assert_allclose(graph.run(inputs)["y"], (h + k) * h if flag else h - k, rtol=1e-6)


def test_edits_inside_a_body():
    graph = models.branches()
    inner = graph.value("y/then_branch/u")
    with graph.edit("p") as editor:
        node = editor.insert("actgraph.shift", [inner, np.ones(4, np.float32)])
        editor.redirect(inner, node.output)
    assert node in graph.subgraph_nodes() and node not in graph.nodes()
    graph.verify()
    inputs = {**models.feed(graph), "flag": np.array(True)}
    h, k = np.maximum(inputs["x"], 0), -inputs["x"]
    np.testing.assert_allclose(graph.run(inputs)["y"], (h + k + 1) * h, rtol=1e-6)
    with pytest.raises(UnsupportedError, match="inside a body"), graph.edit() as editor:
        editor.add_output(inner, "tap")
    with pytest.raises(UnsupportedError, match="inside the body"), graph.edit() as editor:
        editor.insert("add", [inner, graph.value("x")], after=graph.value("h").producer)
    with pytest.raises(UnsupportedError), graph.edit() as editor:
        editor.redirect(graph.value("h"), inner)


def test_bodies_count_in_the_hash():
    changed = models.branches()
    changed.value("y/then_branch/u").producer.key.op_type = "Sub"
    assert changed.content_hash() != models.branches().content_hash()


def test_functions_are_typed_through_and_not_edited():
    graph = models.function_call()
    assert graph.value("a").type == TensorType(DType.F32, ("n", 4)), "through the function's body"
    assert graph.value("z").type == TensorType(None, None), "nobody knows unknown.Mystery"
    inner = next(node for node in graph.subgraph_nodes() if node.op == "onnx.Mul")
    assert inner.name.startswith("local::Affine/")
    with pytest.raises(UnsupportedError, match="function"), graph.edit() as editor:
        editor.insert("neg", [inner.output])
