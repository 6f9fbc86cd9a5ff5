"""The ONNX dialect: reading, what only its verifier sees, and the cost of a model."""

from __future__ import annotations

import json

import numpy as np
import onnx_ir as ir
import pytest

from actgraph.errors import VerifyError
from actgraph.graph.graph import Kind, Use
from actgraph.graph.onnx import OnnxGraph
from actgraph.ops.dtypes import DType
from actgraph.ops.shapes import TensorType
from tests.graph import onnx_models as models
from tests.graph.onnx_models import ALL

# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", ALL)
def test_every_model_is_valid_and_has_origins(make):
    graph = make()
    graph.verify()
    assert all(node.origin.sources == (node.name,) for node in graph.nodes())
    assert graph.clone().text() == graph.text()


def test_values_and_uses():
    graph = models.mlp()
    x, w, y = graph.value("x"), graph.value("w"), graph.value("y")
    assert (x.kind, w.kind, y.kind) == (Kind.INPUT, Kind.PARAMETER, Kind.RESULT)
    assert [(use.node.name, use.index) for use in w.uses] == [("h", 1), ("o", 1)]
    assert [(use.node.name, use.index) for use in x.uses] == [("h", 0), ("y", 0)]
    assert y.uses == (Use(None, 0),)
    assert [node.op for node in graph.nodes()] == ["onnx.MatMul", "onnx.Add", "onnx.Relu", "onnx.MatMul", "onnx.Add"]
    assert {p.name for p in graph.parameters()} == {"w", "bias"}
    np.testing.assert_array_equal(graph.read(w), models.weights(4, 4))
    assert graph.read(w) is graph.read(w)
    with pytest.raises(KeyError):
        graph.value("nothing")


def test_types_are_inferred_with_symbolic_sizes():
    graph = models.mlp()
    assert graph.value("h").type == TensorType(DType.F32, ("batch", "seq", 4))
    assert all(output.type == graph.value("h").type for node in graph.nodes() for output in node.outputs)


def test_constant_nodes_are_parameters():
    graph = models.graph(
        """<ir_version: 9, opset_import: ["": 18]>
        g (float[n] x) => (float[n] y, float c)
        { c = Constant <value_float = 0.5> ()  i = Constant <value_ints = [1, 2]> ()  y = Mul(x, c) }"""
    )
    assert [node.op for node in graph.nodes()] == ["onnx.Mul"]
    assert graph.read(graph.value("c")) == np.float32(0.5)
    assert graph.read(graph.value("i")).tolist() == [1, 2]
    graph.verify()
    out = graph.run({"x": np.ones(2, np.float32)})
    assert out["y"].tolist() == [0.5, 0.5] and out["c"] == np.float32(0.5)


def test_unnamed_and_repeated_node_names_become_unique_and_stable():
    text = """<ir_version: 9, opset_import: ["": 18]> g (float[n] x) => (float[n] y) { a = Relu(x) b = Neg(a) y = Abs(b) }"""
    proto = models.parse(text)
    proto.graph.node[0].name = proto.graph.node[1].name = "twice"
    first, second = (OnnxGraph(ir.from_proto(proto)) for _ in range(2))
    assert [node.name for node in first.nodes()] == ["twice", "twice_1", "y"] == [node.name for node in second.nodes()]


def test_unsorted_graphs_are_sorted_and_cycles_refused():
    proto = models.parse("""<ir_version: 9, opset_import: ["": 18]>
        g (float[n] x) => (float[n] y) { a = Relu(x) b = Neg(a) y = Abs(b) }""")
    nodes = list(proto.graph.node)
    del proto.graph.node[:]
    proto.graph.node.extend(reversed(nodes))
    graph = OnnxGraph(ir.from_proto(proto))
    graph.verify()
    assert [node.output.name for node in graph.nodes()] == ["a", "b", "y"]
    proto.graph.node[2].input[0] = "b"  # a = Relu(b)
    from actgraph.errors import InputError

    with pytest.raises(InputError, match="cycle"):
        OnnxGraph(ir.from_proto(proto))


def test_optional_inputs_and_weights_in_the_inputs():
    text = """<ir_version: {version}, opset_import: ["": 18]>
        g (float[n, 4] x, float[4, 4] w, float[1] offset) => (float[n, 4] y)
        {{ h = MatMul(x, {weight})  y = Add(h, offset) }}"""
    listed = models.graph(text.format(version=3, weight="w"), w=models.weights(4, 4), offset=np.ones(1, np.float32))
    assert [v.name for v in listed.inputs()] == ["x"], "IR 3 lists all weights as inputs"
    assert {p.name for p in listed.parameters()} == {"w", "offset"}
    proto = models.parse(text.format(version=9, weight="k"), k=models.weights(4, 4), offset=np.ones(1, np.float32))
    del proto.graph.input[1]
    free = OnnxGraph(ir.from_proto(proto))
    assert [v.name for v in free.inputs()] == ["x", "offset"] and {p.name for p in free.parameters()} == {"k"}
    assert free.default("offset") == np.float32(1)
    x = np.ones((2, 4), np.float32)
    given = free.run({"x": x, "offset": np.array([3], np.float32)})
    np.testing.assert_allclose(given["y"] - free.run({"x": x})["y"], 2, rtol=1e-6)


def test_scope_of_torch_exports():
    graph = models.mlp()
    node = graph.nodes()[0].key
    node.metadata_props.clear()
    node.metadata_props["pkg.torch.onnx.name_scopes"] = "['', 'model', 'model.layers.0', 'linear']"
    fresh = OnnxGraph(graph.model)
    assert fresh.nodes()[0].origin.scope == "model.layers.0"


# --- the verifier -----------------------------------------------------------------------------------------------------


def test_structural_problems_are_found():
    def broken(change) -> str:
        graph = models.mlp()
        with graph.edit("p") as editor:
            node = editor.insert("actgraph.shift", [graph.value("h"), np.ones(4, np.float32)])
            editor.redirect(graph.value("h"), node.output)
        graph.verify()
        change(graph, node.key)
        problems = "; ".join(graph.structural_problems())
        assert problems
        with pytest.raises(VerifyError):
            graph.verify()
        return problems

    def clear(graph, node):
        node.metadata_props.clear()

    def unimported(graph, node):
        del graph.model.opset_imports["actgraph"]

    def bodiless(graph, node):
        graph.model.functions.clear()

    def misnamed(graph, node):
        node.outputs[0].name = "bias"

    def unordered(graph, node):
        graph.model.graph.insert_before(graph.model.graph[0], node)

    def unchecked(graph, node):
        node.attributes["scale"] = ir.AttrString("scale", "much")

    assert "provenance" in broken(clear)
    assert "opset import" in broken(unimported)
    assert "no body" in broken(bodiless)
    assert "two values" in broken(misnamed)
    assert "not defined before" in broken(unordered)
    assert "scale" in broken(unchecked)


# --- speed ------------------------------------------------------------------------------------------------------------


def test_work_grows_linearly_in_nodes():
    """Counts calls, not seconds: twice the nodes may cost little more than twice the calls."""
    import cProfile

    def calls(length: int) -> int:
        profile = cProfile.Profile()
        profile.enable()
        graph = models.chain(length)
        graph._sites = None
        with graph.edit("p") as editor:
            for node in graph.nodes():
                new = editor.insert("identity", [node.output])
                editor.redirect(node.output, new.output)
            editor.erase_dead()
        graph.verify()
        graph.clone().model  # noqa: B018
        profile.disable()
        return sum(entry.callcount for entry in profile.getstats())

    calls(50)
    small, large = calls(200), calls(400)
    assert large < 2.3 * small


def test_metadata_is_plain_json():
    graph = models.mlp()
    json.dumps({node.name: node.origin.to_dict() for node in graph.nodes()})


@pytest.mark.parametrize("make", ALL)
def test_a_fresh_clone_answers_every_question_first(make):
    """A clone is built when it is first looked at, whatever the look is."""
    graph = make()
    questions = {
        "inputs": lambda g: [v.name for v in g.inputs()],
        "outputs": lambda g: [name for name, _ in g.outputs()],
        "parameters": lambda g: [v.name for v in g.parameters()],
        "nodes": lambda g: [n.name for n in g.nodes()],
        "subgraph nodes": lambda g: [n.name for n in g.subgraph_nodes()],
        "values": lambda g: list(g.values_by_name),
        "owners": lambda g: [path for _, path in g.owners.values()],
        "names": lambda g: sorted(g.node_names),
        "opset": lambda g: g.opset,
        "sites": lambda g: [site.name for site in g.sites()],
        "text": lambda g: g.text(),
        "clone": lambda g: g.clone().text(),
        "problems": lambda g: list(g.structural_problems()),
    }
    for name, ask in questions.items():
        assert ask(graph.clone()) == ask(graph), name


def test_parameters_and_operands_may_not_fit_between_two_edits():
    graph = models.graph(
        """<ir_version: 9, opset_import: ["": 18]>
        g (float[n, 4] x) => (float[n, 4] y) { h = MatMul(x, up)  y = MatMul(h, down) }""",
        up=models.weights(4, 6), down=models.weights(6, 4),
    )  # fmt: skip
    with graph.edit("steer") as editor:
        node = editor.insert("actgraph.shift", [graph.value("h"), np.ones(6, np.float32)])
        editor.redirect(graph.value("h"), node.output)
    with graph.edit("prune") as editor:
        editor.set_parameter(node.operands[1], np.ones(3, np.float32))
        editor.set_parameter(graph.value("up"), models.weights(4, 3))
        editor.set_parameter(graph.value("down"), models.weights(3, 4))
        editor.retype([graph.value("h").producer])
    graph.verify()
    assert node.output.shape == ("n", 3)
    graph.run(models.feed(graph))
