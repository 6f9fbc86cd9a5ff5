"""The plain onnxruntime engine."""

from __future__ import annotations

import concurrent.futures

import numpy as np
import onnxruntime as ort
import pytest

import actgraph  # noqa: F401  # installs the engines
from actgraph.errors import UnsupportedError
from actgraph.formats import onnx_file
from actgraph.graph import Use
from actgraph.graph.executor import executor_for
from actgraph.graph.onnx import OnnxGraph
from actgraph.ops.dtypes import DType
from actgraph.runtime.ort_engine import OrtExecutor
from tests.graph import onnx_models as models


def test_extra_values_come_under_their_names():
    graph = models.mlp()
    inputs = models.feed(graph)
    result = OrtExecutor().open(graph, [graph.value("h"), graph.value("a"), graph.value("y")])(inputs)
    np.testing.assert_allclose(result["h"], inputs["x"] @ models.weights(4, 4), rtol=1e-5, atol=1e-6)
    assert set(result) == {"y", "h", "a"}
    assert [name for name, _ in graph.outputs()] == ["y"], "the graph itself is unchanged"


def test_a_value_wins_over_an_output_of_its_name():
    graph = models.mlp()
    with graph.edit("p") as editor:
        node = editor.insert("mul", [graph.value("y"), 3.0])
        editor.redirect(graph.value("y"), node.output)
    inputs = models.feed(graph)
    run = executor_for(graph)
    outputs = run.open(graph)(inputs)
    both = run.open(graph, [graph.value("y"), node.output])(inputs)
    np.testing.assert_array_equal(both["y"] * 3, outputs["y"])
    np.testing.assert_array_equal(both[node.output.name], outputs["y"])


def test_inputs_and_parameters_as_extra_values():
    graph = models.mlp()
    inputs = models.feed(graph)
    result = executor_for(graph).open(graph, [graph.value("x"), graph.value("w")])(inputs)
    np.testing.assert_array_equal(result["x"], inputs["x"])
    np.testing.assert_array_equal(result["w"], models.weights(4, 4))


def test_what_onnxruntime_lacks_is_one_clear_line():
    with pytest.raises(UnsupportedError, match="onnxruntime cannot run function_call") as caught:
        executor_for(models.function_call()).open(models.function_call())
    assert "\n" not in str(caught.value)


_NAMES = {
    DType.F16: "float16", DType.BF16: "bfloat16", DType.F64: "double", DType.F8E4M3: "float8e4m3fn", DType.F8E5M2: "float8e5m2",
    DType.I4: "int4", DType.U4: "uint4",
}  # fmt: skip


@pytest.mark.parametrize("kind", _NAMES)
@pytest.mark.parametrize("width", [3, 4])
def test_element_types(kind: DType, width: int):
    """In and out through OrtValues where numpy has no such type; 4-bit integers are packed, also an odd number of them."""
    graph = models.graph(
        f"""<ir_version: 10, opset_import: ["": 21]> g ({_NAMES[kind]}[n, {width}] x)
        => ({_NAMES[kind]}[n, {width}] y, float[n, {width}] wide)
        {{ wide = Cast <to = 1> (x)  y = Cast <to = {kind.onnx}> (wide) }}"""
    )
    low, high = {DType.I4: (-8, 7), DType.U4: (0, 15)}.get(kind, (-2, 2))
    x = np.linspace(low, high, 3 * width).reshape(3, width).astype(kind.numpy)
    for given in (x, x[:1], x[:, ::-1]):
        result = graph.run({"x": given})
        assert result["y"].dtype == kind.numpy and result["y"].shape == given.shape
        np.testing.assert_array_equal(result["y"].astype(np.float32), given.astype(np.float32))
        np.testing.assert_array_equal(result["wide"], given.astype(np.float32))
    assert graph.run({"x": x[:0]})["y"].shape == (0, width)


def test_an_intermediate_value_of_a_type_that_numpy_lacks():
    graph = models.graph(
        f"""<ir_version: 10, opset_import: ["": 21]> g (float[n, 3] x) => (float[n, 3] y)
        {{ q = Cast <to = {DType.I4.onnx}> (x)  y = Cast <to = 1> (q) }}"""
    )
    x = np.array([[-8, 7, 1]], np.float32)
    result = executor_for(graph).open(graph, [graph.value("q")])({"x": x})
    assert result["q"].dtype == DType.I4.numpy
    np.testing.assert_array_equal(result["q"].astype(np.float32), x)


def test_an_element_type_that_we_do_not_know_is_one_clear_line():
    graph = models.graph(
        """<ir_version: 10, opset_import: ["": 21]> g (float[n, 3] x) => (float8e4m3fnuz[n, 3] y) { y = Cast <to = 18> (x) }"""
    )
    with pytest.raises(UnsupportedError, match="FLOAT8E4M3FNUZ cannot be returned") as caught:
        graph.run({"x": np.ones((1, 3), np.float32)})
    assert "\n" not in str(caught.value)


def quantized(activations: bool) -> OnnxGraph:
    """A linear layer of int8 weights, with or without quantized activations (per token, as ``quantize`` makes them)."""
    rng = np.random.default_rng(0)
    graph = models.graph(
        """<ir_version: 10, opset_import: ["": 21]> g (float[n, 256] x) => (float[n, 256] y)
        { w = DequantizeLinear <axis = 1> (packed, scale)  y = MatMul(x, w) }""",
        packed=rng.integers(-127, 128, (256, 256)).astype(np.int8), scale=(rng.random(256) * 0.01 + 0.001).astype(np.float32),
    )  # fmt: skip
    if activations:
        attributes = {"dtype": "i8", "source": "dynamic", "granularity": "token", "symmetric": True}
        with graph.edit() as editor:
            x = graph.value("x")
            product = graph.value("y").producer
            made = editor.insert("actgraph.fake_quant", [x, None, None], attributes, before=product)
            editor.redirect(x, made.output, [Use(product, 0)])
    return graph


@pytest.mark.parametrize("activations", [False, True])
def test_int8_weights_are_multiplied_exactly(activations: bool):
    """onnxruntime's own default quantizes activations behind our back, quantized ones once more; our sessions do not."""
    graph = quantized(activations)
    x = np.random.default_rng(1).standard_normal((7, 256)).astype(np.float32)
    weight = graph.read(graph.value("packed")).astype(np.float64) * graph.read(graph.value("scale"))
    step = np.abs(x).max(axis=1, keepdims=True) / np.float32(127)
    exact = (np.round(x / step) * step if activations else x) @ weight

    def error(result) -> float:
        return float(np.abs(result - exact).max() / np.abs(exact).max())

    assert error(graph.run({"x": x})["y"]) < 1e-5
    default = ort.InferenceSession(onnx_file.serialize(graph.clone()), providers=["CPUExecutionProvider"])
    assert error(default.run(None, {"x": x})[0]) > 1e-4, "the option is still needed"


def test_large_models_run_from_a_temporary_file(monkeypatch):
    graph = models.mlp()
    expected = graph.run(models.feed(graph))
    monkeypatch.setattr(onnx_file, "SINGLE_FILE_BYTES", 10)
    np.testing.assert_array_equal(graph.run(models.feed(graph))["y"], expected["y"])


def test_large_weights_are_shared_with_the_session():
    width = 300
    graph = models.graph(
        f"""<ir_version: 9, opset_import: ["": 18]> g (float[n, {width}] x) => (float[n, {width}] y)
        {{ h = MatMul(x, w)  t = Transpose(wt)  y = MatMul(h, t) }}""",
        w=models.weights(width, width), wt=models.weights(width, width, seed=1),
    )  # fmt: skip
    data, shared = onnx_file.serialize_shared(graph.clone())
    assert len(data) < 3000 and set(shared) == {"w", "wt"} and shared["w"] is graph.read(graph.value("w"))
    with graph.edit() as editor:  # an array in another order is copied
        editor.set_parameter(graph.value("w"), np.asfortranarray(models.weights(width, width)))
    assert set(onnx_file.serialize_shared(graph.clone())[1]) == {"wt"}
    run = executor_for(graph).open(graph)
    inputs = models.feed(graph)
    expected = inputs["x"] @ models.weights(width, width) @ models.weights(width, width, seed=1).T
    with graph.edit() as editor:  # the runner keeps what it was opened with
        editor.set_parameter(graph.value("wt"), np.zeros((width, width), np.float32))
    del shared
    np.testing.assert_allclose(run(inputs)["y"], expected, rtol=1e-4, atol=1e-4)
    assert not graph.run(inputs)["y"].any()


def test_runners_are_thread_safe():
    graph = models.mlp()
    run = executor_for(graph).open(graph)
    feeds = [models.feed(graph, seed=seed) for seed in range(16)]
    expected = [run(feed)["y"] for feed in feeds]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for result, want in zip(pool.map(run, feeds), expected, strict=True):
            np.testing.assert_array_equal(result["y"], want)


def test_control_flow_and_functions_run():
    for make in (models.branches, models.loop):
        graph = make()
        with graph.edit("p") as editor:
            value = graph.outputs()[0][1]
            node = editor.insert("actgraph.shift", [value, np.ones(4, np.float32)])
            editor.redirect(value, node.output)
        before, after = make().run(models.feed(graph)), graph.run(models.feed(graph))
        np.testing.assert_allclose(after["y"], before["y"] + 1, rtol=1e-6)
