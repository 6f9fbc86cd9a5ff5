"""The ONNX dialect: every primitive edit, rollback and clones."""

from __future__ import annotations

import numpy as np
import pytest

from actgraph.errors import OptionError, PassError, UnsupportedError
from actgraph.graph.graph import Kind, Role
from actgraph.ops.dtypes import DType
from actgraph.ops.shapes import TensorType
from tests.graph import onnx_models as models
from tests.graph.onnx_models import ALL, same


def test_insert_registry_op_with_body():
    graph = models.mlp()
    before = graph.run(models.feed(graph))
    with graph.edit("steer", "steer{scale=2}") as editor:
        node = editor.insert("actgraph.shift", [graph.value("h"), np.ones(4, np.float32)], {"scale": 2.0})
        editor.redirect(graph.value("h"), node.output)
    graph.verify()
    assert node.op == "actgraph.shift" and node.attributes["scale"] == 2.0
    assert node.origin.created_by == "steer" and node.origin.options == "steer{scale=2}" and node.origin.sources == ("h",)
    assert node.output.type == graph.value("h").type
    assert graph.model.opset_imports["actgraph"] == 1 and graph.model.ir_version >= 10
    assert [key[:2] for key in graph.functions] == [("actgraph", "Shift")]
    reference = models.mlp()
    with reference.edit() as editor:
        add = editor.insert("add", [reference.value("h"), np.full(4, 2.0)])
        editor.redirect(reference.value("h"), add.output)
    np.testing.assert_array_equal(graph.run(models.feed(graph))["y"], reference.run(models.feed(graph))["y"])
    assert np.abs(graph.run(models.feed(graph))["y"] - before["y"]).max() > 0.1


def test_attributes_are_checked():
    graph = models.mlp()
    with pytest.raises(OptionError, match="no attribute"), graph.edit() as editor:
        editor.insert("actgraph.shift", [graph.value("h"), np.ones(4, np.float32)], {"wrong": 1})
    with pytest.raises(OptionError, match="no attribute"), graph.edit() as editor:
        editor.insert("transpose", [graph.value("h")], {"perm": (0, 2, 1), "axis": 1})
    with pytest.raises(UnsupportedError, match="cannot be inserted"), graph.edit() as editor:
        editor.insert("sdpa", [graph.value("h")])
    assert graph.text() == models.mlp().text()


@pytest.mark.parametrize(
    ("op", "operands", "attributes", "expected"),
    [
        ("identity", [], {}, lambda x: x),
        ("cos", [], {}, np.cos),
        ("sin", [], {}, np.sin),
        ("add", [1.5], {}, lambda x: x + 1.5),
        ("sub", [np.arange(4)], {}, lambda x: x - np.arange(4)),
        ("mul", [2], {}, lambda x: x * 2),
        ("div", [2.0], {}, lambda x: x / 2),
        ("clip", [-0.5, 0.5], {}, lambda x: np.clip(x, -0.5, 0.5)),
        ("clip", [None, 0.25], {}, lambda x: np.minimum(x, 0.25)),
        ("clip", [0.0, None], {}, lambda x: np.maximum(x, 0)),
        ("cast", [], {"to": DType.F64}, lambda x: x.astype(np.float64)),
        ("transpose", [], {"perm": (2, 0, 1)}, lambda x: x.transpose(2, 0, 1)),
        ("reshape", [], {"shape": ("batch", "seq", 2, 2)}, lambda x: x.reshape(*x.shape[:2], 2, 2)),
        ("reshape", [], {"shape": ("seq*batch", 4)}, lambda x: x.reshape(-1, 4)),
        ("reshape", [], {"shape": (2, "seq", 2, "batch")}, lambda x: x.reshape(2, x.shape[1], 2, x.shape[0])),
        ("matmul", [models.weights(4, 5)], {}, lambda x: x @ models.weights(4, 5)),
        ("slice", [], {"axis": 2, "start": 1, "end": 3}, lambda x: x[..., 1:3]),
        ("concat", [], {"axis": 0}, lambda x: x),
        ("relu", [], {}, lambda x: np.maximum(x, 0)),
        ("sigmoid", [], {}, lambda x: 1 / (1 + np.exp(-x))),
        ("mean", [], {"axes": (-1,), "keepdims": True}, lambda x: x.mean(-1, keepdims=True)),
        ("sum", [], {"axes": (1,), "keepdims": False}, lambda x: x.sum(1)),
    ],
)
@pytest.mark.parametrize("opset", [9, 13, 18])
def test_vocabulary(opset, op, operands, attributes, expected):
    graph = models.mlp(opset)
    with graph.edit("test") as editor:
        node = editor.insert(op, [graph.value("x"), *operands], dict(attributes))
        editor.add_output(node.output, "probe")
    graph.verify()
    assert graph.opset == opset
    inputs = models.feed(graph, batch=3, seq=5)
    result = graph.run(inputs)["probe"]
    np.testing.assert_allclose(result, expected(inputs["x"]), rtol=1e-6)
    kind = node.output.type
    assert kind.dtype is DType.of(result.dtype) and kind.shape is not None and len(kind.shape) == result.ndim
    sizes = {"batch": 3, "seq": 5, "batch*seq": 15}
    assert [size if isinstance(size, int) else sizes.get(size, size) for size in kind.shape] == list(result.shape)


def test_where_and_bool_operands():
    graph = models.mlp()
    with graph.edit() as editor:
        node = editor.insert("where", [np.array([True, False, True, False]), graph.value("h"), 0.0])
        editor.redirect(graph.value("h"), node.output)
    graph.verify()
    assert node.output.type == graph.value("h").type


def test_operands_that_do_not_fit_are_refused_and_rolled_back():
    graph = models.mlp()
    with pytest.raises(UnsupportedError, match="cannot insert"), graph.edit() as editor:
        editor.insert("matmul", [graph.value("h"), models.weights(3, 3)])
    assert graph.text() == models.mlp().text()
    graph.verify()
    assert not [use for use in graph.value("h").uses if use.node is not None and use.node.op == "onnx.MatMul"]


def test_models_without_standard_ops_take_them():
    graph = models.graph("""<ir_version: 9, opset_import: ["x": 1]> g (float[n, 4] x) => (float[n, 4] y) { y = x.What(x) }""")
    with graph.edit("p") as editor:
        node = editor.insert("add", [graph.value("x"), 1.0])
        shift = editor.insert("actgraph.shift", [node.output, np.ones(4, np.float32)])
        editor.redirect(graph.value("y"), shift.output)
        editor.set_operand(graph.value("y").producer, 0, shift.output)
    graph.verify()
    assert graph.opset == 18


def test_place_of_insertion():
    graph = models.mlp()
    h, a = graph.value("h"), graph.value("a")
    with graph.edit() as editor:
        editor.insert("neg", [h], name="late", after=a.producer)
        editor.insert("neg", [graph.value("x")], name="first")
        editor.insert("neg", [h], name="early", before=a.producer)
        assert [n.name for n in graph.nodes()] == ["first", "h", "b", "early", "a", "late", "o", "y"]
        with pytest.raises(UnsupportedError, match="computed after"):
            editor.insert("neg", [a], before=h.producer)
    graph.verify()


def test_redirect_of_outputs_keeps_public_names():
    graph = models.mlp()
    with graph.edit("test") as editor:
        node = editor.insert("mul", [graph.value("y"), 3.0])
        editor.redirect(graph.value("y"), node.output)
        editor.add_output(graph.value("y"), "before", role=Role.TAP)
    graph.verify()
    assert [(name, value.name) for name, value in graph.outputs()] == [("y", "mul.0"), ("before", "y")]
    assert graph.role("before") is Role.TAP and graph.role("y") is Role.USER
    result = graph.run(models.feed(graph))
    assert list(result) == ["y", "before"]
    np.testing.assert_array_equal(result["y"], result["before"] * 3)
    with graph.edit() as editor:
        editor.remove_output("before")
    assert list(graph.run(models.feed(graph))) == ["y"]


def test_a_value_may_be_output_twice_and_inputs_and_parameters_too():
    graph = models.mlp()
    with graph.edit() as editor:
        editor.add_output(graph.value("y"), "again")
        editor.add_output(graph.value("x"), "passed")
        editor.add_output(graph.value("bias"), "stored")
        with pytest.raises(PassError, match="exists already"):
            editor.add_output(graph.value("h"), "again")
        with pytest.raises(UnsupportedError, match="input named"):
            editor.add_output(graph.value("h"), "x")
    graph.verify()
    inputs = models.feed(graph)
    result = graph.run(inputs)
    np.testing.assert_array_equal(result["y"], result["again"])
    np.testing.assert_array_equal(result["passed"], inputs["x"])
    np.testing.assert_array_equal(result["stored"], models.weights(4, seed=1))


def test_parameters_are_replaced_for_all_or_some_uses():
    graph = models.mlp()
    w = graph.value("w")
    with graph.edit() as editor:
        changed = editor.set_parameter(w, models.weights(4, 4, seed=5), uses=[w.uses[1]])
    assert changed != w and "untied w for o" in editor.messages[0]
    np.testing.assert_array_equal(graph.read(w), models.weights(4, 4))
    with graph.edit() as editor:
        assert editor.set_parameter(w, models.weights(4, 4, seed=6)) == w
    graph.verify()
    np.testing.assert_array_equal(graph.read(w), models.weights(4, 4, seed=6))


def test_retype_follows_a_changed_shape_downstream():
    graph = models.graph(
        """<ir_version: 9, opset_import: ["": 18]>
        g (float[n, 4] x) => (float[n, 4] y) <int64[1] last = {-1}>
        { h = MatMul(x, up)  a = Relu(h)  s = Shape(a)  l = Gather(s, last)  z = ConstantOfShape(l)  m = Mul(a, z)
          y = MatMul(m, down) }""",
        up=models.weights(4, 6), down=models.weights(6, 4),
    )  # fmt: skip
    assert graph.value("z").shape == (6,)
    with graph.edit("prune") as editor:
        editor.set_parameter(graph.value("up"), models.weights(4, 5))
        editor.set_parameter(graph.value("down"), models.weights(5, 4))
        editor.retype([graph.value("h").producer])
    graph.verify()
    assert [graph.value(name).shape for name in "hamyz"] == [("n", 5), ("n", 5), ("n", 5), ("n", 4), (5,)]
    with pytest.raises(UnsupportedError, match="does not fit"), graph.edit() as editor:
        editor.set_parameter(graph.value("up"), models.weights(4, 7))
        editor.retype([graph.value("h").producer])
    assert graph.value("h").shape == ("n", 5)


def test_retype_gives_registry_ops_the_body_of_their_new_types():
    graph = models.mlp()
    with graph.edit() as editor:
        node = editor.insert("actgraph.shift", [graph.value("h"), np.ones(4, np.float32)])
        editor.redirect(graph.value("h"), node.output)
    before = node.key.overload
    with graph.edit() as editor:
        cast = editor.insert("cast", [graph.value("h")], {"to": DType.F64})
        vector = editor.insert("cast", [node.operands[1]], {"to": DType.F64})
        editor.set_operand(node, 0, cast.output)
        editor.set_operand(node, 1, vector.output)
        editor.retype([node], propagate=False)
        back = editor.insert("cast", [node.output], {"to": DType.F32})
        editor.redirect(node.output, back.output)
    assert node.output.dtype is DType.F64 and node.key.overload != before
    graph.verify()
    graph.run(models.feed(graph))


def test_erase_dead_is_transitive_and_keeps_unknown_ops():
    graph = models.function_call()
    with graph.edit("dce") as editor:
        editor.remove_output("y")
        assert editor.erase_dead() == 1
        assert [node.op for node in graph.nodes()] == ["local.Affine", "unknown.Mystery"]
        editor.remove_output("z")
        editor.add_output(graph.value("x"), "y")
        assert editor.erase_dead() == 0, "nobody knows whether unknown.Mystery has side effects"
    graph = models.mlp()
    with graph.edit("dce") as editor:
        editor.remove_output("y")
        editor.add_output(graph.value("b"), "b_out")
        editor.erase_dead()
    graph.verify()
    assert [node.name for node in graph.nodes()] == ["h", "b"]
    assert {p.name for p in graph.parameters()} == {"w", "bias"}


def test_added_inputs_may_be_optional():
    graph = models.mlp()
    with graph.edit("context") as editor:
        scale = editor.add_input("scale", TensorType(DType.F32, (1,)), role=Role.CONTEXT, default=np.ones(1, np.float32))
        node = editor.insert("mul", [graph.value("h"), scale])
        editor.redirect(graph.value("h"), node.output)
        with pytest.raises(UnsupportedError, match="exists already"):
            editor.add_input("bias", TensorType(DType.F32, (1,)))
    graph.verify()
    assert graph.role("scale") is Role.CONTEXT and scale.kind is Kind.INPUT
    inputs = models.feed(models.mlp())
    np.testing.assert_array_equal(graph.run(inputs)["y"], models.mlp().run(inputs)["y"])
    assert np.abs(graph.run({**inputs, "scale": np.array([3], np.float32)})["y"] - graph.run(inputs)["y"]).max() > 0.1


def test_copy_region():
    graph = models.mlp()
    with graph.edit("copy") as editor:
        region = [graph.value(name).producer for name in ("h", "b", "a")]
        doubled = editor.insert("mul", [graph.value("x"), 2.0])
        made = editor.copy_region(region, {graph.value("x"): doubled.output})
        editor.add_output(made[graph.value("a")], "copied")
    graph.verify()
    inputs = models.feed(graph)
    expected = np.maximum(inputs["x"] * 2 @ models.weights(4, 4) + models.weights(4, seed=1), 0)
    np.testing.assert_allclose(graph.run(inputs)["copied"], expected, rtol=1e-5)
    assert made[graph.value("a")].producer.origin.created_by == "copy"


def test_edits_never_make_a_cycle_and_reorder_when_they_must():
    graph = models.mlp()
    with pytest.raises(UnsupportedError, match="cycle"), graph.edit() as editor:
        editor.set_operand(graph.value("h").producer, 0, graph.value("o"))
    graph.verify()
    assert graph.text() == models.mlp().text()
    with graph.edit() as editor:
        late = editor.insert("neg", [graph.value("x")], after=graph.value("o").producer, name="late")
        editor.set_operand(graph.value("h").producer, 0, late.output)
    graph.verify()
    order = [node.name for node in graph.nodes()]
    assert order.index("late") < order.index("h")


# --- transactions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", ALL)
def test_rollback_restores_everything_and_handles_survive(make):
    graph = make()
    twin, text = graph.clone(), graph.text()
    nodes, values = graph.nodes(), [output for node in graph.nodes() for output in node.outputs]
    state = graph.model.ir_version, dict(graph.model.opset_imports), list(graph.functions)
    with pytest.raises(ZeroDivisionError), graph.edit("test") as editor:
        value = next(v for v in values if v.dtype is DType.F32)
        moved = editor.insert("actgraph.shift", [value, np.ones(1, np.float32)])
        editor.redirect(value, moved.output)
        editor.add_input("extra", TensorType(DType.F32, (1,)), default=np.zeros(1, np.float32))
        editor.remove_output(graph.outputs()[-1][0])
        editor.add_output(moved.output, "tap", role=Role.TAP)
        editor.erase_dead()
        graph.notes.append("lost")
        raise ZeroDivisionError
    graph.verify()
    assert graph.text() == text == twin.text()
    assert (graph.model.ir_version, dict(graph.model.opset_imports), list(graph.functions)) == state
    assert graph.nodes() == nodes and graph.notes == []
    assert [graph.value(value.name) for value in values] == values
    if make is not models.function_call:
        assert same(graph, make())
    with graph.edit("again") as editor:  # the restored graph is as editable as it was
        editor.add_output(values[0], "tap")
    graph.verify()


def test_clones_are_independent_both_ways():
    graph = models.mlp()
    early, text = graph.clone(), graph.text()
    with graph.edit("p") as editor:
        editor.set_parameter(graph.value("w"), models.weights(4, 4, seed=9))
        editor.insert("neg", [graph.value("h")])
    assert early.text() == text, "a clone that was not looked at yet is as the graph was"
    late = graph.clone()
    with late.edit("q") as editor:
        node = editor.insert("mul", [late.value("h"), 2.0])
        editor.redirect(late.value("h"), node.output)
    late.verify()
    graph.verify()
    assert "mul.0" not in graph.text() and "mul.0" in late.text()
    assert graph.read(graph.value("bias")) is late.read(late.value("bias")), "tensors are shared"


def test_restore_takes_any_clone():
    graph, other = models.mlp(), models.mlp()
    with other.edit("p") as editor:
        editor.add_output(other.value("h"), "h_out")
    graph._restore(other.clone().clone())
    graph.verify()
    assert graph.text() == other.text()
    with graph.edit("q") as editor:
        editor.remove_output("h_out")
    assert "h_out" in other.text()
