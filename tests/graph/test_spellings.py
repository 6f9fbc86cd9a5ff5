"""Every spelling of a layer is recognised: activations, norms and attention written out, linears stored otherwise."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

import actgraph as ag
from actgraph.graph import Graph
from actgraph.graph.graph import Value
from actgraph.graph.onnx import OnnxGraph
from tests import zoo
from tests.graph import onnx_models
from tests.graph.readings import Numbers

Array = np.ndarray[Any, Any]


# --- activations in every spelling ------------------------------------------------------------------------------------


class Pointwise(nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.up, self.down, self.function = nn.Linear(6, 10), nn.Linear(10, 6), function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down(self.function(self.up(x)))
        return out


S2 = math.sqrt(2)
SPELLINGS: list[tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = [
    ("gelu", nn.functional.gelu),
    ("gelu", lambda x: 0.5 * x * (1 + torch.erf(x / S2))),
    ("gelu", lambda x: x * (0.5 * (torch.erf(x * 0.7071067811865476) + 1))),
    ("gelu", lambda x: x * (1 + torch.erf(x / S2)) / 2),
    ("gelu", lambda x: (0.5 * (1 + torch.erf(x / S2))) * x),
    ("gelu_tanh", lambda x: nn.functional.gelu(x, approximate="tanh")),
    ("gelu_tanh", lambda x: 0.5 * x * (1 + torch.tanh(0.7978845608 * (x + 0.044715 * x**3)))),
    ("gelu_tanh", lambda x: x * 0.5 * (1 + torch.tanh(0.7978845608 * x * (1 + 0.044715 * x * x)))),
    ("silu", nn.functional.silu),
    ("silu", lambda x: x * torch.sigmoid(x)),
    ("silu", lambda x: x / (1 + torch.exp(-x))),
    ("quick_gelu", lambda x: x * torch.sigmoid(1.702 * x)),
    ("relu", torch.relu),
    ("relu", lambda x: torch.clamp(x, min=0)),
    ("relu", lambda x: torch.where(x > 0, x, 0.0)),
    ("relu2", lambda x: torch.relu(x) ** 2),
    ("relu2", lambda x: torch.relu(x) * torch.relu(x)),
    ("relu6", nn.functional.relu6),
    ("hardswish", nn.functional.hardswish),
    ("hardswish", lambda x: x * nn.functional.relu6(x + 3) / 6),
    ("mish", nn.functional.mish),
    ("mish", lambda x: x * torch.tanh(nn.functional.softplus(x))),
    ("softplus", nn.functional.softplus),
    ("leaky_relu", nn.functional.leaky_relu),
    ("elu", nn.functional.elu),
    ("tanh", torch.tanh),
    ("sigmoid", torch.sigmoid),
]


def test_activations_are_found_in_every_spelling() -> None:
    model = nn.Sequential(*(Pointwise(function) for _, function in SPELLINGS)).eval()
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    expected = [name for name, _ in SPELLINGS]
    graph = ag.trace(model, (x,), dynamic={"input": ("batch", None)})
    assert [a.function for a in graph.views.activations()] == expected
    assert [f.activation.function for f in graph.views.feed_forwards()][::2] != []
    assert {input_kind(graph, a.input) for a in graph.views.activations()} == {"linear"}
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()):
        program = torch.onnx.export(model, (x,), dynamic_shapes={"input": {0: "batch"}}, dynamo=True, verbose=False)
    assert program is not None
    file = OnnxGraph(ir.from_proto(zoo.strip_metadata(program.model_proto)), "stock")
    assert [a.function for a in file.views.activations()] == expected
    assert [str(a.output.type) for a in file.views.activations()] == [str(a.output.type) for a in graph.views.activations()]


def input_kind(graph: Graph, value: Value) -> str:
    return "linear" if value in {linear.output for linear in graph.views.linears()} else "other"


def test_soft_caps_are_not_activations() -> None:
    class Capped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 30.0 * torch.tanh(self.head(x) / 30.0)

    assert ag.trace(Capped().eval(), (torch.randn(2, 4),)).views.activations() == []


# --- norms in every spelling ------------------------------------------------------------------------------------------


def _rms(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)


class Normalised(nn.Module):
    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.linspace(0.5, 2, 6)), nn.Parameter(torch.linspace(-1, 1, 6))
        self.function, self.mix = function, nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.mix(self.function(x, self.weight, self.bias))
        return out


NORM_SPELLINGS: list[tuple[str, Callable[..., torch.Tensor]]] = [
    ("rms_norm", lambda x, w, b: w * _rms(x)),
    ("rms_norm", lambda x, w, b: _rms(x) * (1.0 + w)),
    ("rms_norm", lambda x, w, b: _rms(x)),
    ("rms_norm", lambda x, w, b: x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5) * w),
    ("rms_norm", lambda x, w, b: w * (x * (1 / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-5)))),
    ("rms_norm", lambda x, w, b: w * (x * (x.pow(2).mean(-1, keepdim=True) + 1e-5).pow(-0.5))),
    ("rms_norm", lambda x, w, b: (_rms(x.double()) * w.double()).float()),
    ("rms_norm", lambda x, w, b: nn.functional.rms_norm(x, (6,), w, 1e-5)),
    ("layer_norm", lambda x, w, b: nn.functional.layer_norm(x, (6,), w, b, 1e-5)),
    ("layer_norm", lambda x, w, b: w * _rms(x - x.mean(-1, keepdim=True)) + b),
    (
        "layer_norm",
        lambda x, w, b: (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True, correction=0) + 1e-5) * w + b,
    ),
]


def test_norms_are_found_in_every_spelling() -> None:
    model = nn.Sequential(*(Normalised(function) for _, function in NORM_SPELLINGS)).eval()
    x = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0))
    graph = ag.trace(model, (x,))
    norms = graph.views.norms()
    assert [norm.kind for norm in norms] == [name for name, _ in NORM_SPELLINGS]
    assert [norm.weight_offset for norm in norms] == [0, 1, *[0] * 9]
    assert [norm.weight is None for norm in norms] == [False, False, True, *[False] * 8]
    assert {norm.eps for norm in norms} == {1e-5}
    assert [norm.input.name for norm in norms[1:]] == [linear.output.name for linear in graph.views.linears()[:-1]]
    assert max(Numbers(graph, {graph.inputs()[0].name: x.numpy()}).check().values()) < 5e-6


# --- attention in other spellings -------------------------------------------------------------------------------------


class Written(nn.Module):
    """Attention over 4 heads with one fused projection, written out."""

    def __init__(self, scores: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], merged: bool = False) -> None:
        super().__init__()
        self.qkv, self.out, self.scores, self.merged = nn.Linear(16, 48), nn.Linear(16, 16), scores, merged

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        q, k, v = (part.transpose(1, 2) for part in self.qkv(x).view(batch, length, 3, 4, 4).unbind(2))
        if self.merged:
            q, k, v = (part.reshape(batch * 4, length, 4) for part in (q, k, v))
        y = (self.scores(q, k).softmax(-1) @ v).reshape(batch, 4, length, 4)
        out: torch.Tensor = self.out(y.transpose(1, 2).reshape(batch, length, 16))
        return out


def _causal(s: torch.Tensor) -> torch.Tensor:
    return s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool).triu(1), float("-inf"))


def _bias(s: torch.Tensor) -> torch.Tensor:
    return torch.linspace(-1, 1, s.shape[-1] ** 2).view(1, 1, s.shape[-1], s.shape[-1])


SCORES: list[tuple[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor], bool]] = [
    ("plain", lambda q, k: q @ k.transpose(-1, -2) * 0.5, False),
    ("scaled before", lambda q, k: (q * 0.5) @ k.transpose(-1, -2), False),
    ("scaled twice", lambda q, k: (q * 0.5**0.5) @ (k * 0.5**0.5).transpose(-1, -2), False),
    ("divided", lambda q, k: (q @ k.transpose(-1, -2)) / 2.0, False),
    ("soft-capped", lambda q, k: 5.0 * torch.tanh(q @ k.transpose(-1, -2) * 0.5 / 5.0), False),
    ("causal", lambda q, k: _causal(q @ k.transpose(-1, -2) / 2.0), False),
    ("biased", lambda q, k: q @ k.transpose(-1, -2) / 2.0 + _bias(q @ k.transpose(-1, -2)), False),
    ("biased and causal", lambda q, k: _causal(q @ k.transpose(-1, -2) / 2.0 + _bias(q @ k.transpose(-1, -2))), False),
    ("merged heads", lambda q, k: torch.bmm(q, k.transpose(1, 2)) / 2.0, True),
]


@pytest.mark.parametrize(("name", "scores", "merged"), SCORES, ids=[name for name, _, _ in SCORES])
def test_attention_is_found_in_every_spelling(name: str, scores: Callable[..., torch.Tensor], merged: bool) -> None:
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    graph = ag.trace(Written(scores, merged).eval(), (x,), dynamic={"x": ("batch", None, None)})
    (a,) = graph.views.attentions()
    assert (a.heads, a.kv_heads, a.head_dim, a.scale) == (4, 4, 4, 0.5)
    assert a.softcap == (5.0 if name == "soft-capped" else None)
    assert a.out_projection is not None and a.out_projection.output == graph.views.linears()[1].output
    assert [str(value.type) for value in (a.q, a.k, a.v) if value is not None] == ["f32[batch, 5, 4, 4]"] * 3
    assert len({a.q, a.k, a.v}) == 3
    assert max(Numbers(graph, {graph.inputs()[0].name: x.numpy()}).check().values()) < 5e-6


def test_a_softmax_that_is_no_attention_is_left_alone() -> None:
    class Pool(nn.Module):
        """Attention pooling: scores come from a linear, not from a product of activations."""

        def __init__(self) -> None:
            super().__init__()
            self.score = nn.Linear(8, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.score(x).transpose(1, 2).softmax(-1) @ x

    assert ag.trace(Pool().eval(), (torch.randn(2, 5, 8),)).views.attentions() == []


# --- linears that are not stored as linears ---------------------------------------------------------------------------


def dynamic_quantized() -> tuple[OnnxGraph, Array]:
    """A linear as onnxruntime's dynamic quantization writes it, and the weight that it stands for."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((6, 4)).astype(np.float32)  # [out, in]
    scale = float(np.abs(weight).max() / 127)
    packed = np.clip(np.round(weight.T / scale), -127, 127).astype(np.int8)
    graph = onnx_models.graph(
        """<ir_version: 8, opset_import: ["": 13]>
        g (float[batch, seq, 4] x) => (float[batch, seq, 6] y) {
          q, s, z = DynamicQuantizeLinear(x)
          p = MatMulInteger(q, w, z, wz)
          f = Cast <to = 1> (p)
          ss = Mul(s, ws)
          m = Mul(f, ss)
          y = Add(m, b)
        }""",
        w=packed, wz=np.asarray(0, np.int8), ws=np.asarray(scale, np.float32), b=np.ones(6, np.float32),
    )  # fmt: skip
    return graph, weight


def test_quantized_products_are_linears() -> None:
    graph, weight = dynamic_quantized()
    (linear,) = graph.views.linears()
    assert (linear.in_features, linear.out_features, linear.output.name) == (4, 6, "y")
    assert linear.input.node is not None and linear.input.node.op == "onnx.DynamicQuantizeLinear"
    assert np.allclose(linear.read_weight(), weight, atol=0.02)
    assert np.array_equal(linear.read_bias(), np.ones(6))  # type: ignore[arg-type]


@pytest.mark.parametrize("transposed", [False, True])
def test_weights_behind_dequantize_are_linears(transposed: bool) -> None:
    codes = np.random.default_rng(0).integers(-127, 128, (6, 4) if transposed else (4, 6), dtype=np.int8)
    scale = np.linspace(0.01, 0.02, 6, dtype=np.float32)
    axis = 0 if transposed else 1
    turn = "t = Transpose <perm = [1, 0]> (d)  y = MatMul(x, t)" if transposed else "y = MatMul(x, d)"
    graph = onnx_models.graph(
        f"""<ir_version: 8, opset_import: ["": 13]>
        g (float[batch, seq, 4] x) => (float[batch, seq, 6] y) {{ d = DequantizeLinear <axis = {axis}> (w, s)  {turn} }}""",
        w=codes, s=scale,
    )  # fmt: skip
    (linear,) = graph.views.linears()
    assert linear.weight.name == "d" and linear.out_axis == axis
    expected = codes * scale[:, None] if transposed else (codes * scale).T
    assert np.allclose(linear.read_weight(), expected)
    with graph.edit("test") as editor:
        linear.write_weight(editor, expected * 2)
        editor.erase_dead()
    assert any("computed weight" in message for message in editor.messages)
    (linear,) = graph.views.linears()
    assert linear.weight.is_parameter and np.allclose(linear.read_weight(), expected * 2)
    x = np.random.default_rng(1).standard_normal((2, 3, 4)).astype(np.float32)
    assert np.allclose(graph.run({"x": x})["y"], x @ expected.T * 2, atol=1e-5)


def test_quantized_activations_are_looked_through() -> None:
    w = np.eye(4, dtype=np.float32)
    graph = onnx_models.graph(
        """<ir_version: 8, opset_import: ["": 13]>
        g (float[n, 4] x) => (float[n, 4] y) {
          u = MatMul(x, w)  r = Relu(u)  q = QuantizeLinear(r, s, z)  d = DequantizeLinear(q, s, z)  y = MatMul(d, v)
        }""",
        w=w, v=2 * w, s=np.asarray(0.1, np.float32), z=np.asarray(0, np.uint8),
    )  # fmt: skip
    (f,) = graph.views.feed_forwards()
    assert (f.up.output.name, f.act.name, f.hidden.name, f.down.output.name) == ("u", "r", "d", "y")


def test_lifted_graphs_show_their_linears() -> None:
    """A joint graph of AOTAutograd takes its parameters as inputs: the forward linears are read all the same."""
    from torch._functorch.aot_autograd import aot_export_module

    from actgraph.graph.fx import FxGraph

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            return (self.net(x).square().sum(),)

    gm, signature = aot_export_module(Loss(), (torch.randn(3, 4),), trace_joint=True, output_loss_index=0)
    graph = FxGraph.from_joint(gm, signature)
    sizes = [(linear.in_features, linear.out_features) for linear in graph.views.linears()]
    assert sizes[:2] == [(4, 6), (6, 2)]
    assert [a.function for a in graph.views.activations()][:1] == ["relu"]


def test_products_of_other_ranks_are_not_linears() -> None:
    graph = onnx_models.graph(
        """<ir_version: 8, opset_import: ["": 13]>
        g (float[2, 3, 4] x) => (float[2, 3] y, float[2, 3, 5] z) { y = MatMul(x, v)  z = MatMul(x, m) }""",
        v=np.ones(4, np.float32), m=np.ones((2, 4, 5), np.float32),
    )  # fmt: skip
    assert graph.views.linears() == []


def test_a_shared_transpose_is_untied() -> None:
    """Two products read one transpose of one matrix: writing one leaves the other alone."""
    w = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32)
    graph = onnx_models.graph(
        """<ir_version: 8, opset_import: ["": 13]>
        g (float[n, 4] x) => (float[n, 4] y, float[n, 4] z) { t = Transpose(w)  y = MatMul(x, t)  z = MatMul(y, t) }""",
        w=w,
    )
    first, second = graph.views.linears()
    with graph.edit("test") as editor:
        first.write_weight(editor, 2 * w)
    first, second = graph.views.linears()
    assert np.array_equal(first.read_weight(), 2 * w) and np.array_equal(second.read_weight(), w)


def test_a_shared_bias_is_untied_and_may_change_its_width() -> None:
    """Exporters store equal biases once."""
    w = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32)
    graph = onnx_models.graph(
        """<ir_version: 8, opset_import: ["": 13]>
        g (float[n, 4] x) => (float[n, 4] z) { u = MatMul(x, w)  y = Add(u, b)  v = MatMul(y, w2)  z = Add(b, v) }""",
        w=w, w2=2 * w, b=np.ones(4, np.float32),
    )  # fmt: skip
    first, second = graph.views.linears()
    assert first.bias == second.bias
    with graph.edit("test") as editor:
        first.write_weight(editor, first.read_weight()[:3])
        first.write_bias(editor, np.zeros(3, np.float32))
        second.write_weight(editor, second.read_weight()[:, :3])
        editor.retype(first.nodes)
    first, second = graph.views.linears()
    assert (first.out_features, second.in_features) == (3, 3)
    assert np.array_equal(first.read_bias(), np.zeros(3)) and np.array_equal(second.read_bias(), np.ones(4))  # type: ignore[arg-type]
    x = np.random.default_rng(1).standard_normal((2, 4)).astype(np.float32)
    assert np.allclose(graph.run({"x": x})["z"], x @ w[:, :3] @ (2 * w)[:3] + 1, atol=1e-5)


def test_a_bias_of_one_feature_is_a_bias() -> None:
    graph = onnx_models.graph(
        """<ir_version: 8, opset_import: ["": 13]>
        g (float[batch, seq, 4] x) => (float[batch, seq, 1] y) { m = MatMul(x, w)  y = Add(m, b) }""",
        w=np.ones((4, 1), np.float32), b=np.asarray([0.5], np.float32),
    )  # fmt: skip
    (linear,) = graph.views.linears()
    assert linear.output.name == "y" and linear.read_bias() == [0.5]


def test_fused_operators_of_onnxruntime_are_read() -> None:
    """MultiHeadAttention, SkipLayerNormalization with its sum, and FastGelu."""
    width = 8
    nodes = [
        *(helper.make_node("MatMul", ["x", f"w{c}"], [c]) for c in "qkv"),
        helper.make_node("MultiHeadAttention", ["q", "k", "v"], ["a"], domain="com.microsoft", num_heads=2),
        helper.make_node("MatMul", ["a", "wo"], ["o"]),
        helper.make_node(
            "SkipLayerNormalization", ["o", "x", "g", "b"], ["n", "", "", "sum"], domain="com.microsoft", epsilon=1e-5
        ),
        helper.make_node("MatMul", ["n", "wu"], ["u"]),
        helper.make_node("FastGelu", ["u"], ["h"], domain="com.microsoft"),
        helper.make_node("MatMul", ["h", "wd"], ["d"]),
        helper.make_node("Add", ["d", "sum"], ["y"]),
    ]
    rng = np.random.default_rng(0)
    stored = {f"w{c}": rng.standard_normal((width, width)).astype(np.float32) / 3 for c in "qkvoud"}
    stored |= {"g": np.linspace(0.5, 2, width, dtype=np.float32), "b": np.ones(width, np.float32)}
    shape = ["batch", "seq", width]
    graph_proto = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(array, name) for name, array in stored.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    graph = OnnxGraph(ir.from_proto(helper.make_model(graph_proto, opset_imports=opsets, ir_version=9)), "fused")
    views = graph.views
    assert len(views.linears()) == 6
    (attention,) = views.attentions()
    assert (attention.heads, attention.head_dim, attention.scale) == (2, 4, 0.5)
    assert [v.name for v in (attention.q, attention.k, attention.v) if v is not None] == ["q", "k", "v"]
    assert attention.out_projection is not None and attention.out_projection.output.name == "o"
    (norm,) = views.norms()
    assert (norm.kind, norm.input.name, norm.output.name, norm.eps) == ("layer_norm", "sum", "n", 1e-5)
    (f,) = views.feed_forwards()
    assert (f.activation.function, f.down.output.name) == ("gelu_tanh", "d")
    x = rng.standard_normal((2, 3, width)).astype(np.float32)
    numbers = Numbers(graph, {"x": x})
    assert numbers.error(norm.output, numbers.norm(norm)) < 1e-5
