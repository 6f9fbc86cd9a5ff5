"""Small ONNX models for the tests of the ONNX dialect, written with onnx's own helpers."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper, numpy_helper, parser

from actgraph.graph.onnx import OnnxGraph

Array = np.ndarray[Any, Any]


def weights(*shape: int, seed: int = 0) -> Array:
    """Seeded weights that keep activations near 1."""
    return (np.random.default_rng(seed).standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)


def parse(text: str, **initializers: Array) -> onnx.ModelProto:
    """A model in ONNX's text form, with arrays as further initializers."""
    proto = parser.parse_model(text)
    for name, array in initializers.items():
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    return proto


def graph(text: str, name: str = "model", **initializers: Array) -> OnnxGraph:
    return OnnxGraph(ir.from_proto(parse(text, **initializers)), name)


def mlp(opset: int = 18) -> OnnxGraph:
    """Two linear layers with a residual; ``w`` is shared by both."""
    return graph(
        f"""<ir_version: 9, opset_import: ["": {opset}]>
        g (float[batch, seq, 4] x) => (float[batch, seq, 4] y)
        {{ h = MatMul(x, w)  b = Add(h, bias)  a = Relu(b)  o = MatMul(a, w)  y = Add(x, o) }}""",
        "mlp", w=weights(4, 4), bias=weights(4, seed=1),
    )  # fmt: skip


def branches() -> OnnxGraph:
    """If whose branches read ``h`` and ``k`` from outside."""
    return graph(
        """<ir_version: 9, opset_import: ["": 18]>
        g (float[n, 4] x, bool flag) => (float[n, 4] y)
        {
          h = Relu(x)
          k = Neg(x)
          y = If (flag) <
            then_branch = yes () => (float[n, 4] t) { u = Add(h, k)  t = Mul(u, h) },
            else_branch = no () => (float[n, 4] e) { e = Sub(h, k) }
          >
        }""",
        "branches",
    )


def loop() -> OnnxGraph:
    """Doubles ``x`` three times and collects the steps."""
    return graph(
        """<ir_version: 9, opset_import: ["": 18]>
        g (float[n, 4] x) => (float[n, 4] y, float[steps, n, 4] all)
        <int64 count = {3}, bool go = {1}>
        {
          y, all = Loop (count, go, x) <body = b (int64 i, bool c, float[n, 4] v) => (bool c2, float[n, 4] w, float[n, 4] s)
            { c2 = Identity(c)  w = Add(v, v)  s = Identity(w) }>
        }""",
        "loop",
    )


def function_call() -> OnnxGraph:
    """A call of a model function of a foreign domain, and a node of a domain that nobody knows."""
    return graph(
        """<ir_version: 9, opset_import: ["": 18, "local": 1, "unknown": 2]>
        g (float[n, 4] x) => (float[n, 4] y, z)
        { a = local.Affine <scale = 3.0> (x)  y = Relu(a)  z = unknown.Mystery <k = 2> (a) }
        <opset_import: ["": 18], domain: "local">
        Affine <scale> (v) => (w) { s = Constant <value_float: float = @scale> ()  w = Mul(v, s) }""",
        "function_call",
    )


def old(opset: int) -> OnnxGraph:
    """Ops whose attributes became inputs: at ``opset`` 9 they are attributes."""
    return graph(
        f"""<ir_version: 4, opset_import: ["": {opset}]>
        g (float[n, 2, 4] x) => (float[n, 4] y)
        {{
          s = ReduceSum <axes = [1], keepdims = 0> (x)
          u = Unsqueeze <axes = [1]> (s)
          c = Clip <min = -1.0, max = 1.0> (u)
          p = Pad <pads = [0, 0, 1, 0, 0, 1], mode = "constant"> (c)
          l = Slice <axes = [2], starts = [1], ends = [5]> (p)
          q = Squeeze <axes = [1]> (l)
          y = Softmax <axis = 1> (q)
        }}""",
        f"old{opset}",
    )


def feed(graph: OnnxGraph, seed: int = 0, **sizes: int) -> dict[str, Array]:
    """Random inputs; symbolic sizes are 3 unless given."""
    rng = np.random.default_rng(seed)
    result: dict[str, Array] = {}
    for value in graph.inputs():
        assert value.shape is not None and value.dtype is not None
        shape = [size if isinstance(size, int) else sizes.get(str(size), 3) for size in value.shape]
        data = rng.standard_normal(shape)
        result[value.name] = np.asarray(data > 0 if not value.dtype.is_float else data).astype(value.dtype.numpy)
    return result


def chain(length: int, width: int = 4) -> OnnxGraph:
    """``length`` elementwise nodes in a row."""
    nodes = [helper.make_node(("Relu", "Neg", "Abs")[i % 3], [f"v{i}"], [f"v{i + 1}"], name=f"n{i}") for i in range(length)]
    inputs = [helper.make_tensor_value_info("v0", onnx.TensorProto.FLOAT, ["n", width])]
    outputs = [helper.make_tensor_value_info(f"v{length}", onnx.TensorProto.FLOAT, None)]
    proto = helper.make_model(helper.make_graph(nodes, "chain", inputs, outputs), opset_imports=[helper.make_opsetid("", 18)])
    proto.ir_version = 9
    return OnnxGraph(ir.from_proto(proto), "chain")


#: One of each kind, to be called.
ALL = [mlp, branches, loop, function_call, lambda: old(9), lambda: chain(6)]


def same(left: OnnxGraph, right: OnnxGraph) -> bool:
    """Whether two graphs compute the same numbers on random inputs."""
    inputs = feed(left)
    mine, theirs = left.run(inputs), right.run(inputs)
    return mine.keys() == theirs.keys() and all(np.array_equal(mine[k], theirs[k], equal_nan=True) for k in mine)
