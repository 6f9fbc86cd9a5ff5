"""Numeric comparison: what counts as equal, and that a difference is found, measured and located."""

from __future__ import annotations

import json

import numpy as np
import pytest

import actgraph as ag
from actgraph.errors import InputError, ParityError
from actgraph.formats.onnx_export import to_onnx
from actgraph.graph.graph import Role
from actgraph.graph.parity import compare, difference, sample_inputs, vocabulary
from tests import zoo
from tests.graph import onnx_models


def test_difference_measures_relative_to_the_scale_of_the_reference() -> None:
    left = np.array([[1.0, -4.0], [2.0, 0.0]], np.float32)
    right = left.copy()
    right[1, 1] = 0.1
    found = difference("x", left, right)
    assert found.max_abs == pytest.approx(0.1) and found.max_rel == pytest.approx(0.1 / 4)
    assert found.worst == (0, 1, 1) and found.left == 0.0 and found.right == pytest.approx(0.1)
    assert found.within(0.03, 0) and found.within(0, 0.11) and not found.within(0.02, 0.05)


def test_nan_and_infinity_must_be_in_the_same_places() -> None:
    left = np.array([np.nan, np.inf, 1.0])
    assert difference("x", left, left.copy()).within(0, 0)
    for place, value in ((0, 0.0), (1, -np.inf), (2, np.nan)):
        right = left.copy()
        right[place] = value
        found = difference("x", left, right)
        assert found.mismatched == 1 and not found.within(np.inf, np.inf)


def test_shapes_dtypes_and_zeros() -> None:
    assert "shapes" in difference("x", np.zeros(2), np.zeros(3)).problem
    assert "types f64 and f32" in difference("x", np.zeros(2), np.zeros(2, np.float32)).problem
    assert difference("x", np.zeros(2), np.full(2, 1e-9)).max_rel == np.inf
    assert difference("x", np.zeros((0, 2)), np.zeros((0, 2))).within(0, 0)


def test_nan_everywhere_is_no_agreement() -> None:
    nan = np.full(3, np.nan)
    found = difference("x", nan, nan)
    assert (found.elements, found.compared) == (3, 0) and not found.within(np.inf, np.inf)
    assert "all NaN on both sides" in str(found)
    assert difference("x", np.full(3, np.inf), np.full(3, np.inf)).within(0, 0)
    assert not difference("x", np.array([1 + 1j]), np.array([1 - 1j])).within(0.1, 0)


def test_comparing_nothing_fails_and_says_so() -> None:
    graph = zoo.captured("mlp")
    (name,) = zoo.inputs("mlp")
    array = zoo.inputs("mlp")[name]
    for inputs, why in (({name: np.full_like(array, np.nan)}, "all NaN"), ({name: array[:0]}, "no elements")):
        report = compare(graph, graph.clone(), [inputs], rtol=1.0)
        assert not report.ok and why in report.problem and why in str(report) and report.to_dict()["problem"] == report.problem
        with pytest.raises(ParityError, match=f"nothing (was )?compared.*{why}"):
            report.check()
        assert compare(graph, graph.clone(), [inputs, {name: array}], rtol=0).ok  # some input gives numbers
    left, right = graph.clone(), graph.clone()
    for side, tapped in ((left, "a"), (right, "b")):
        with side.edit("test") as editor:
            editor.add_output(side.site("linear.1").value, tapped, role=Role.TAP)
            for output, _ in list(side.outputs()):
                if output != tapped:
                    editor.remove_output(output)
    report = compare(left, right, [{name: array}], rtol=1.0)
    assert not report.ok and report.problem == "nothing was compared: they have no output in common"


def test_compare_across_dialects_and_at_values() -> None:
    torch_graph = zoo.captured("llama")
    onnx_graph = to_onnx(torch_graph)
    site = "blocks.1.mlp.hidden"
    pairs = {site: (torch_graph.site(site).value, onnx_graph.site(site).value)}
    inputs = [sample_inputs(torch_graph, 2, 5), sample_inputs(torch_graph, 1, 1, seed=3)]
    report = compare(torch_graph, onnx_graph, inputs, rtol=1e-4, values=pairs).check()
    assert report.ok and report.inputs == 2 and [d.name for d in report.values] == [site]
    assert report.outputs[0].same_argmax == 1.0
    assert 0 < report.max_rel < 1e-4
    assert json.loads(json.dumps(report.to_dict()))["ok"] is True
    assert "agree on 2 inputs" in str(report)


@pytest.mark.parametrize(("site", "factor"), [("blocks.0.resid_post", 1.01), ("blocks.1.attn.out", -1.0)])
def test_a_wrong_scale_sign_or_place_is_found(site: str, factor: float) -> None:
    """The comparison has power: changes of one percent at one site fail a check of 1e-4."""
    left, right = zoo.captured("llama"), zoo.exported("llama")
    with right.edit("test") as editor:
        editor.insert_at(right.site(site), "mul", [np.float32(factor)])
    report = compare(left, right, [sample_inputs(left)], rtol=1e-4)
    assert not report.ok and report.max_rel > 1e-3
    with pytest.raises(ParityError, match="logits"):
        report.check()
    assert report.worst is not None and report.worst.name == "logits"


def test_missing_outputs_fail_and_taps_do_not() -> None:
    left, right = zoo.captured("mlp"), zoo.captured("mlp")
    with right.edit("test") as editor:
        editor.add_output(right.site("linear.1").value, "tapped", role=Role.TAP)
    inputs = [zoo.inputs("mlp")]
    assert compare(left, right, inputs, rtol=0).ok
    with right.edit("test") as editor:
        editor.add_output(right.site("linear.2").value, "more")
    report = compare(left, right, inputs, rtol=0)
    assert report.missing == ("more",) and not report.ok
    with pytest.raises(ParityError, match="more"):
        report.check()
    with pytest.raises(InputError):
        compare(left, right, [], rtol=0)


@pytest.mark.parametrize("name", zoo.NAMES)
def test_sample_inputs_run_and_are_deterministic(name: str) -> None:
    graph = zoo.captured(name)
    for batch, seq, padding in ((1, 1, "none"), (3, 9, "left"), (2, 4, "right")):
        inputs = sample_inputs(graph, batch, seq, seed=5, padding=padding)
        again = sample_inputs(graph, batch, seq, seed=5, padding=padding)
        assert all(np.array_equal(inputs[key], again[key]) for key in inputs)
        results = graph.run(inputs)
        assert all(np.isfinite(array).all() for array in results.values())
        for value in graph.inputs():
            assert inputs[value.name].dtype == value.dtype.numpy
    other = sample_inputs(graph, 3, 9, seed=6)
    assert any(not np.array_equal(other[key], sample_inputs(graph, 3, 9, seed=5)[key]) for key in other)


def test_sample_inputs_pad_and_count_positions() -> None:
    graph = zoo.captured("llama")
    inputs = sample_inputs(graph, 2, 6, padding="left")
    assert inputs["attention_mask"].tolist() == [[1] * 6, [0, 0, 1, 1, 1, 1]]
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 2, 3]]
    assert inputs["input_ids"].max() < zoo.VOCAB
    assert len(np.unique(sample_inputs(graph, 8, 64)["input_ids"])) > zoo.VOCAB // 2
    with pytest.raises(InputError, match="padding"):
        sample_inputs(graph, padding="middle")


def test_models_that_take_different_inputs() -> None:
    left, right = (
        onnx_models.graph(f'<ir_version: 9, opset_import: ["": 18]> g (float[2] {x}) => (float[2] y) {{ y = Relu({x}) }}', x)
        for x in ("a", "b")
    )
    with pytest.raises(InputError, match=r"b needs 'b', and the inputs are a \(a takes a; b takes b\)"):
        compare(left, right, [{"a": np.zeros(2, np.float32)}], rtol=1e-5)


IDS = """<ir_version: 9, opset_import: ["": 18]>
    g (int64[batch, seq] input_ids) => (float[n, 4] y)
    { flat = Reshape(input_ids, shape)  same = Identity(flat)  ids = Cast<to: int = 6>(same)  %s }"""


def test_the_vocabulary_is_found_behind_reshapes_and_casts() -> None:
    graph = onnx_models.graph(IDS % "y = Gather(table, ids)", shape=np.array([-1]), table=onnx_models.weights(50, 4))
    assert vocabulary(graph, graph.inputs()[0]) == 50
    drawn = sample_inputs(graph, batch=8, seq=64)["input_ids"]
    assert drawn.min() == 0 and drawn.max() == 49
    assert "unknown" not in ag.run(graph, "dce").report.parity


def test_the_smallest_table_bounds_the_ids() -> None:
    two = "a = Gather(table, ids)  b = Gather(small, ids)  y = Add(a, b)"
    tables = {"table": onnx_models.weights(50, 4), "small": onnx_models.weights(7, 4)}
    graph = onnx_models.graph(IDS % two, shape=np.array([-1]), **tables)
    assert vocabulary(graph, graph.inputs()[0]) == 7


def test_an_unknown_vocabulary_is_said() -> None:
    graph = onnx_models.graph(IDS % "f = Cast<to: int = 1>(ids)  u = Unsqueeze(f, axis)  y = Expand(u, to)",
                              shape=np.array([-1]), axis=np.array([1]), to=np.array([1, 4]))  # fmt: skip
    assert vocabulary(graph, graph.inputs()[0]) is None
    assert set(np.unique(sample_inputs(graph)["input_ids"])) == {0, 1}
    parity = ag.run(graph, "dce").report.parity
    assert "only ids 0 and 1 in input_ids, whose vocabulary is unknown" in parity
    given = ag.run(graph, "dce", inputs={"input_ids": np.arange(6).reshape(2, 3)}).report.parity
    assert "unknown" not in given
    graph.companions.config["vocab_size"] = 30
    assert vocabulary(graph, graph.inputs()[0]) == 30
    assert "unknown" not in ag.run(graph, "dce").report.parity
