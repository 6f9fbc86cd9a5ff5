"""Types of ONNX values: what is declared must be what onnxruntime computes, on files of stock torch.onnx.export."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import sympy

import actgraph  # noqa: F401  # installs the engines
from actgraph.graph.executor import executor_for
from actgraph.graph.onnx import OnnxGraph
from actgraph.graph.onnx_dims import reshape_shape, slice_size
from actgraph.ops.dtypes import DType
from actgraph.ops.shapes import TensorType
from tests import zoo
from tests.graph import onnx_models as models


def differences(graph: OnnxGraph, feed: dict[str, np.ndarray]) -> list[str]:
    """Values whose declared type is not that of the computed array."""
    values = [output for node in graph.nodes() for output in node.outputs]
    computed = executor_for(graph).open(graph, values)(feed)
    sizes = {
        size: actual for value in graph.inputs() for size, actual in zip(value.shape or (), feed[value.name].shape, strict=True)
        if isinstance(size, str)
    }  # fmt: skip
    found = []
    for value in values:
        array, kind = computed[value.name], value.type
        declared = [_size(size, sizes) for size in kind.shape] if kind.shape is not None else None
        fits = declared is None or (
            len(declared) == array.ndim and all(d is None or d == s for d, s in zip(declared, array.shape, strict=True))
        )
        if not fits or (kind.dtype is not None and kind.dtype.numpy != array.dtype):
            found.append(f"{value} is {array.dtype}{array.shape}")
    return found


def _size(size, sizes) -> int | None:
    return size if size is None or isinstance(size, int) else int(sympy.sympify(size).subs(sizes))


def unknown(graph: OnnxGraph) -> list[str]:
    values = [output for node in graph.nodes() for output in node.outputs]
    return [v.name for v in values if v.dtype is None or v.shape is None or None in v.shape]


@pytest.mark.parametrize("declared", [True, False], ids=["declared", "stripped"])
@pytest.mark.parametrize("name", zoo.STOCK)
def test_types_of_stock_exports_are_complete_and_true(name, declared):
    proto = onnx.load(zoo.stock_onnx(name))
    if not declared:
        del proto.graph.value_info[:]
    graph = OnnxGraph(ir.from_proto(proto), name)
    assert unknown(graph) == []
    for batch, length in ((2, 8), (3, 5)) if declared else ((3, 5),):
        assert differences(graph, zoo.inputs(name, batch, length)) == []


def infer(text: str, **initializers) -> dict[str, str]:
    graph = models.graph(f'<ir_version: 9, opset_import: ["": 18]> {text}', **initializers)
    return {output.name: str(output.type) for node in graph.nodes() for output in node.outputs}


def test_symbolic_shape_computations():
    found = infer(
        """g (float[batch, seq, 8] x) => (y) <int64[1] zero = {0}, int64[1] one = {1}, int64[1] minus = {-1}, int64 two = {2},
             int64[1] eight = {8}, int64[1] four = {4}, int64 zeroth = {0}, int64 oneth = {1}>
        {
          s = Shape(x)
          b = Gather(s, zero)
          l = Slice(s, one, four)
          doubled = Mul(b, eight)
          target = Concat(doubled, minus)
          flat = Reshape(x, target)
          tail = Shape <start = 1> (x)
          wide = Expand(b, tail)
          filled = ConstantOfShape(s)
          n = Gather(s, oneth)
          r = Range(zeroth, n, oneth)
          cut = Slice(x, one, eight, one)
          joined = Concat <axis = 1> (x, cut)
          f = Flatten <axis = 2> (x)
          size = Size(x)
          y = Identity(x)
        }"""
    )
    assert found["flat"] == "f32[8*batch, seq]"
    assert found["l"] == "i64[2]"
    assert found["wide"] == "i64[seq, 8]"
    assert found["filled"] == "f32[batch, seq, 8]"
    assert found["r"] == "i64[seq]"
    assert found["cut"] == "f32[batch, ?, 8]", "min(seq, 8) - 1 is no plain size"
    assert found["joined"] == "f32[batch, ?, 8]"
    assert found["f"] == "f32[batch*seq, 8]"


def test_expand_idiom_of_old_torch_exports():
    """``where(shape == -1, ones, shape)`` is how torch.onnx wrote expand(-1, ...)."""
    found = infer(
        """g (float[batch, 1, 8] x, float[batch, seq] like) => (y)
        <int64[1] one = {1}, int64[1] minus = {-1}, int64[1] eight = {8}, int64[1] three = {3}>
        {
          s = Shape(like)
          shape = Concat <axis = 0> (minus, seq, eight)
          seq = Gather(s, one)
          ones = ConstantOfShape <value = int64[1] {1}> (three)
          is = Equal(shape, minus)
          target = Where(is, ones, shape)
          y = Expand(x, target)
        }"""
    )
    assert found["y"] == "f32[batch, seq, 8]"


def test_contrib_ops_and_unknown_ones():
    graph = models.graph(
        """<ir_version: 9, opset_import: ["": 18, "com.microsoft": 1, "x": 1]>
        g (float[n, 4] x) => (z)
        { a = com.microsoft.Gelu(x)  b = com.microsoft.FusedMatMul <transB = 1> (a, w)  c = x.What(b)  z = Relu(c) }""",
        w=models.weights(6, 4),
    )
    assert [str(node.output.type) for node in graph.nodes()] == ["f32[n, 4]", "f32[n, 6]", "?", "?"]


def test_sizes_that_exporters_use_for_unknown():
    graph = models.graph("""<ir_version: 9, opset_import: ["": 18]> g (float[n, 4, k] x) => (y) { y = Relu(x) }""")
    x = graph.value("x").key
    x.shape = ir.Shape([-1, 4, "?"])
    assert graph.value("x").shape == (None, 4, None)


def test_declared_types_win_at_load_and_unknown_parts_are_filled():
    graph = models.graph(
        """<ir_version: 9, opset_import: ["": 18]> g (float[n, 4] x) => (float[rows, 4] y)
        <float[m, 4] h> { h = Relu(x)  y = Neg(h) }"""
    )
    assert str(graph.value("h").type) == "f32[m, 4]" and str(graph.value("y").type) == "f32[rows, 4]"
    with graph.edit() as editor:
        node = editor.insert("neg", [graph.value("h")])
    assert str(node.output.type) == "f32[m, 4]"


def test_models_of_any_size_are_never_serialized(monkeypatch):
    graph = models.mlp()
    monkeypatch.setattr(ir.serde, "serialize_model", pytest.fail)
    monkeypatch.setattr(ir, "to_proto", pytest.fail)
    with graph.edit() as editor:
        node = editor.insert("actgraph.shift", [graph.value("h"), np.ones(4, np.float32)])
        editor.redirect(graph.value("h"), node.output)
        editor.retype([node])
        editor.erase_dead()
    graph.verify()
    graph.clone().verify()


@pytest.mark.parametrize(
    ("size", "start", "end", "step", "expected"),
    [
        (8, 0, 4, 1, 4), (8, -3, 2**62, 1, 3), (8, 0, 100, 3, 3), (8, -1, -(2**63), -1, 8), (8, 6, 1, -2, 3), (8, 5, 2, 1, 0),
        ("seq", 0, 2**62, 1, "seq"), ("seq", 1, 2**62, 1, "seq - 1"), ("seq", 0, -1, 1, "seq - 1"), ("seq", -2, 2**62, 1, 2),
        ("seq", 0, "seq", 1, "seq"), ("seq", 0, 4, 1, None), ("seq", 0, 2**62, 2, None), (512, 0, "seq", 1, "seq"),
        ("a", 0, "b", 1, None), (None, 0, 4, 1, None), (512, "past", "past + seq", 1, None), ("seq", -1, -(2**63), -1, "seq"),
    ],
)  # fmt: skip
def test_slice_sizes(size, start, end, step, expected):
    assert slice_size(size, start, end, step) == expected


def test_reshape_sizes():
    assert reshape_shape(("b", "s", 8), (0, 0, 2, -1), False) == ("b", "s", 2, 4)
    assert reshape_shape(("b", "s", 8), (-1, 8), False) == ("b*s", 8)
    assert reshape_shape(("b", "s", 8), (-1, 3), False) == (None, 3)
    assert reshape_shape(("b", 0), (0, 4), True) == (0, 4)
    assert reshape_shape(None, (2, -1), False) == (2, None)


def test_native_types_round_trip():
    from actgraph.graph.onnx_native import native_type, set_native_type

    value = ir.Value(name="v")
    kinds = [(DType.BF16, ("n", 4, None)), (None, None), (DType.BOOL, ()), (DType.I4, None)]
    for kind in (TensorType(*each) for each in kinds):
        set_native_type(value, kind)
        assert native_type(value) == kind
