"""Random sequences of edits that change nothing: the verifier stays green and the numbers stay the same."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import actgraph  # noqa: F401  # installs the engines
from actgraph.graph.graph import Kind, Value
from actgraph.graph.onnx import OnnxGraph
from actgraph.ops.dtypes import DType
from actgraph.ops.shapes import TensorType
from tests.graph import onnx_models as models

MAKERS = {
    "mlp": models.mlp, "branches": models.branches, "loop": models.loop, "chain": lambda: models.chain(5),
    "old": lambda: models.old(9), "old mlp": lambda: models.mlp(8),
}  # fmt: skip


class _Abort(Exception):
    pass


def values(graph: OnnxGraph) -> list[Value]:
    """Float values that an edit may take, those in bodies included."""
    nodes = [*graph.nodes(), *(node for node in graph.subgraph_nodes() if "::" not in node.name)]
    return [output for node in nodes for output in node.outputs if output.dtype is DType.F32 and output.kind is Kind.RESULT]


def pass_through(graph: OnnxGraph, editor, value: Value, draw) -> None:
    """Insert something that is the identity for some or all readers."""
    op, operands = draw(st.sampled_from([
        ("identity", []), ("mul", [1.0]), ("add", [0.0]), ("clip", [None, 1e30]), ("reshape", None), ("transpose", None),
        ("actgraph.shift", "zeros"), ("actgraph.clip", []), ("actgraph.gate", []),
    ]))  # fmt: skip
    shape = value.shape
    uses = list(value.uses)
    if op in ("reshape", "transpose", "actgraph.shift") and (shape is None or None in shape or not shape):
        op, operands = "identity", []
    attributes = {}
    if op == "reshape":
        operands, attributes = [], {"shape": shape}
    if op == "transpose":
        operands, attributes = [], {"perm": tuple(range(len(shape)))}
    if op == "actgraph.gate":
        attributes = {"threshold": 0.0}
    if operands == "zeros":
        operands = [np.zeros(1, np.float32)]
    node = editor.insert(op, [value, *operands], attributes, after=value.producer)
    chosen = uses if draw(st.booleans()) else [use for use in uses if draw(st.booleans())]
    editor.redirect(value, node.output, chosen)


def untie(graph: OnnxGraph, editor, value: Value, draw) -> None:
    """Store a parameter again for some of its readers."""
    parameters = [p for p in graph.parameters() if p.uses]
    if parameters:
        parameter = draw(st.sampled_from(parameters))
        uses = [use for use in parameter.uses if draw(st.booleans())]
        editor.set_parameter(parameter, graph.read(parameter).copy(), uses=uses or None)


def duplicate(graph: OnnxGraph, editor, value: Value, draw) -> None:
    """Let a copy of the producer serve the readers instead."""
    node = value.producer
    if node is None or node not in graph.nodes() or node.op in ("onnx.If", "onnx.Loop"):
        return
    made = editor.copy_region([node], {})
    if value in made:
        editor.redirect(value, made[value])


def erase(graph: OnnxGraph, editor, value: Value, draw) -> None:
    editor.erase_dead()


def tap(graph: OnnxGraph, editor, value: Value, draw) -> None:
    """Add and remove an output."""
    if value in {output for node in graph.nodes() for output in node.outputs}:
        editor.add_output(value, "a tap")
        editor.remove_output("a tap")


def optional_input(graph: OnnxGraph, editor, value: Value, draw) -> None:
    if value not in {output for node in graph.nodes() for output in node.outputs}:
        return
    name = f"extra{len(graph.inputs())}"
    zero = editor.add_input(name, TensorType(DType.F32, (1,)), default=np.zeros(1, np.float32))
    node = editor.insert("add", [value, zero], after=value.producer)
    editor.redirect(value, node.output)


def retype(graph: OnnxGraph, editor, value: Value, draw) -> None:
    editor.retype(list(graph.nodes())[:2])


EDITS = [pass_through, pass_through, pass_through, untie, duplicate, erase, tap, optional_input, retype]


@pytest.mark.parametrize("name", MAKERS)
@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_edits_that_change_nothing(name, data):
    graph = MAKERS[name]()
    inputs = models.feed(graph)
    expected = graph.run(inputs)
    draw = data.draw
    for _ in range(draw(st.integers(1, 4))):
        text, abort = graph.text(), draw(st.booleans()) and draw(st.booleans())
        try:
            with graph.edit("random") as editor:
                for _ in range(draw(st.integers(1, 4))):
                    edit = draw(st.sampled_from(EDITS))
                    edit(graph, editor, draw(st.sampled_from(values(graph))), draw)
                    graph.verify()
                if abort:
                    raise _Abort
        except _Abort:
            assert graph.text() == text
        graph.verify()
    result = graph.run(inputs)
    assert result.keys() == expected.keys()
    for key in expected:
        np.testing.assert_array_equal(result[key], expected[key])
    twin = graph.clone()
    twin.verify()
    assert twin.content_hash() == graph.content_hash()


def test_the_property_has_power():
    """An edit that does change something is seen by the same comparison."""
    graph = models.mlp()
    inputs = models.feed(graph)
    expected = graph.run(inputs)
    with graph.edit("random") as editor:
        node = editor.insert("mul", [graph.value("h"), 1.01])
        editor.redirect(graph.value("h"), node.output)
    assert np.abs(graph.run(inputs)["y"] - expected["y"]).max() > 1e-3
