"""ONNX nodes in the shared vocabulary (see ``prims``), at any opset from 7 on.

One rule per op type. Newer opsets pass as inputs what older ones had as attributes (axes, sizes, bounds): rules look at
both. Contrib ops of onnxruntime (domain ``com.microsoft``) are read where they mean one vocabulary op.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from actgraph.graph.graph import Array, Node, Value
from actgraph.graph.prims import Prim, Scalar, as_scalar, is_single
from actgraph.ops.dtypes import DType

if TYPE_CHECKING:
    from actgraph.graph.onnx import OnnxGraph

Operand = Value | Scalar | None
Reading = tuple[str, Sequence[Operand], Mapping[str, Any]]
_DOMAINS = ("onnx.", "com.microsoft.", "actgraph.")
_SMALL = 64  # constants up to this many elements are read as axes, sizes and bounds


def describe(graph: OnnxGraph, node: Node) -> Prim | None:
    """The node in the shared vocabulary; ``None`` where the vocabulary has no name for it."""
    op = node.op
    for domain in _DOMAINS:
        if op.startswith(domain):
            rule = (_CONTRIB if domain == "com.microsoft." else _RULES).get(op[len(domain) :])
            break
    else:
        return None
    if domain == "actgraph." and op[len(domain) :] not in _OURS:
        return None
    if rule is None:
        return None
    call = _Call(graph, node)
    reading = rule(call)
    if reading is None:
        return None
    name, operands, attributes = reading
    keep = name in _TENSORS_ONLY
    values = tuple(operands if keep else (call.number(operand) for operand in operands))
    return Prim(name, values, attributes, node.outputs, node)


#: The ops of our own dialect that the vocabulary has names for.
_OURS = frozenset({"grouped_linear", "dequantize", "attention"})
#: Ops whose one-element parameters stay values: they are weights, not numbers.
_TENSORS_ONLY = frozenset({
    "linear", "matmul", "conv", "conv_transpose", "layer_norm", "rms_norm", "batch_norm", "group_norm",
    "grouped_matmul", "sdpa", "reshape", "transpose", "cast", "identity", "expand", "concat", "dequantize", "quantize",
    "matmul_integer", "dynamic_quantize",
})  # fmt: skip


class _Call:
    """One node, with what rules need to know of its inputs."""

    def __init__(self, graph: OnnxGraph, node: Node) -> None:
        self.graph = graph
        self.node = node
        self.operands = node.operands

    @functools.cached_property
    def attributes(self) -> dict[str, Any]:
        return self.node.attributes

    def __getitem__(self, index: int) -> Value | None:
        return self.operands[index] if index < len(self.operands) else None

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute; a float without the rounding of its file."""
        value = self.attributes.get(name, default)
        return as_scalar(np.asarray(value, np.float32)) if isinstance(value, float) else value

    @property
    def opset(self) -> int:
        """The version of the standard operators that the file asks for."""
        return int(self.graph.model.opset_imports.get("", 0) or 1000)

    def constant(self, index: int) -> Array | None:
        """The data of a small stored operand."""
        value = self[index]
        if value is None:
            return None
        shape = value.shape
        if shape is not None and any(not isinstance(d, int) for d in shape):
            return None
        if shape is not None and math.prod(d for d in shape if isinstance(d, int)) > _SMALL:
            return None
        if value.is_parameter:
            return self.graph.read(value)
        maker = value.producer
        if maker is not None and maker.op == "onnx.Constant":
            return _constant_data(maker.attributes)
        return None

    def integers(self, index: int, attribute: str) -> tuple[int, ...] | None:
        """Integers from an attribute (older opsets) or a stored operand (newer ones); ``None`` when absent or computed."""
        if attribute in self.attributes:
            value = self.attributes[attribute]
            return tuple(value) if isinstance(value, (tuple, list)) else (int(value),)
        array = self.constant(index)
        return None if array is None else tuple(int(v) for v in array.reshape(-1))

    def number(self, operand: Operand) -> Operand:
        """A stored operand of one element as a number; anything else as it is."""
        if not isinstance(operand, Value):
            return operand
        if operand.is_parameter:
            return as_scalar(self.graph.read(operand)) if is_single(operand.shape) else operand
        maker = operand.producer
        if maker is not None and maker.op == "onnx.Constant":
            data = _constant_data(maker.attributes)
            if data is not None and data.size == 1:
                return as_scalar(data)
        return operand

    def rank(self, index: int = 0) -> int | None:
        value = self[index]
        return value.type.rank if value is not None else None

    def axis(self, axis: int, rank: int | None = None) -> int:
        """``axis``, not negative where the rank of the first operand is known."""
        rank = self.rank() if rank is None else rank
        return axis + rank if axis < 0 and rank is not None else axis

    def unchanged(self) -> bool:
        """Whether the result has the type of the first operand."""
        if self[0] is None:
            return False
        before, after = self[0].type, self.node.output.type
        return before == after and after.shape is not None and None not in after.shape


_CONSTANT_KINDS = {
    "value": None, "value_float": np.float32, "value_int": np.int64, "value_floats": np.float32, "value_ints": np.int64,
}  # fmt: skip


def _constant_data(attributes: Mapping[str, Any]) -> Array | None:
    for name, dtype in _CONSTANT_KINDS.items():
        if name in attributes:
            return np.asarray(attributes[name], dtype) if dtype is not None else np.asarray(attributes[name])
    return None


Rule = Callable[[_Call], Reading | None]


def _same(name: str, count: int = 1) -> Rule:
    return lambda c: (name, [c[i] for i in range(count)], {})


def _pairwise(name: str) -> Rule:
    """Variadic ops of two operands (Sum, Min, Max); one operand is the identity, more are not in the vocabulary."""

    def rule(c: _Call) -> Reading | None:
        if len(c.operands) == 1:
            return "identity", [c[0]], {}
        return (name, [c[0], c[1]], {}) if len(c.operands) == 2 else None

    return rule


def _dropout(c: _Call) -> Reading | None:
    training = c.constant(2)
    return None if training is not None and bool(training) else ("identity", [c[0]], {})


def _cast(c: _Call) -> Reading | None:
    if c.unchanged():
        return "identity", [c[0]], {}
    dtype = c.node.output.dtype
    if dtype is None:
        try:
            dtype = DType.of(int(c.get("to")))
        except (KeyError, TypeError, ValueError):
            return None
    return "cast", [c[0]], {"to": dtype}


def _clip(c: _Call) -> Reading:
    return "clip", [c[0], c.get("min", c[1]), c.get("max", c[2])], {}


def _reshape(c: _Call) -> Reading:
    return ("identity", [c[0]], {}) if c.unchanged() else ("reshape", [c[0]], {"shape": c.node.output.shape})


def _transpose(c: _Call) -> Reading | None:
    perm = c.get("perm")
    if perm is None:
        rank = c.rank()
        if rank is None:
            return None
        perm = range(rank - 1, -1, -1)
    perm = tuple(perm)
    return ("transpose", [c[0]], {"perm": perm}) if perm != tuple(range(len(perm))) else ("identity", [c[0]], {})


def _expand(c: _Call) -> Reading:
    return ("identity" if c.unchanged() else "expand"), [c[0]], {}


def _slice(c: _Call) -> Reading:
    if c.unchanged():
        return "identity", [c[0]], {}
    starts, ends = c.integers(1, "starts"), c.integers(2, "ends")
    axes, steps = c.integers(3, "axes"), c.integers(4, "steps")
    computed = c[3] is not None and axes is None
    count = len(axes or starts or ends or (0,))
    axes = axes if axes is not None else tuple(range(count))
    if computed or count != 1:
        return "slice", [c[0]], {"axis": None, "start": None, "end": None, "step": None}
    attributes = {
        "axis": c.axis(axes[0]),
        "start": starts[0] if starts is not None else None,
        "end": ends[0] if ends is not None else None,
        "step": steps[0] if steps is not None else 1,
    }
    return "slice", [c[0]], attributes


def _split(c: _Call) -> Reading:
    return "split", [c[0]], {"axis": c.axis(c.get("axis", 0))}


def _concat(c: _Call) -> Reading:
    return "concat", list(c.operands), {"axis": c.axis(c.get("axis", 1))}


def _reduce(name: str) -> Rule:
    def rule(c: _Call) -> Reading | None:
        axes = c.integers(1, "axes")
        rank = c.rank()
        if axes is None and c[1] is not None:
            return None
        if axes is None or (not axes and not c.get("noop_with_empty_axes", 0)):
            axes = tuple(range(rank)) if rank is not None else ()
        axes = tuple(sorted(c.axis(axis) for axis in axes))
        return name, [c[0]], {"axes": axes, "keepdims": bool(c.get("keepdims", 1))}

    return rule


def _argmax(c: _Call) -> Reading:
    return "argmax", [c[0]], {"axes": (c.axis(c.get("axis", 0)),), "keepdims": bool(c.get("keepdims", 1))}


def _softmax(name: str) -> Rule:
    def rule(c: _Call) -> Reading | None:
        rank = c.rank()
        axis = c.get("axis")
        if c.opset >= 13:
            return name, [c[0]], {"axis": c.axis(-1 if axis is None else axis)}
        axis = c.axis(1 if axis is None else axis)
        # before opset 13 everything from the axis on was one distribution: the same for the last axis only
        return (name, [c[0]], {"axis": axis}) if rank is not None and axis == rank - 1 else None

    return rule


def _gather(c: _Call) -> Reading:
    return "gather", [c[0], c[1]], {"axis": c.axis(c.get("axis", 0))}


def _topk(c: _Call) -> Reading | None:
    k = c.integers(1, "k")
    return ("topk", [c[0]], {"k": k[0] if k else None, "axis": c.axis(c.get("axis", -1))}) if c.get("largest", 1) else None


def _cumsum(c: _Call) -> Reading:
    axis = c.constant(1)
    return "cumsum", [c[0]], {"axis": c.axis(int(axis.reshape(-1)[0])) if axis is not None else None}


def _gemm(c: _Call) -> Reading | None:
    if c.get("transA", 0) or c.get("alpha", 1.0) != 1.0 or (c[2] is not None and c.get("beta", 1.0) != 1.0):
        return None
    return "linear", [c[0], c[1], c[2]], {"out_axis": 0 if c.get("transB", 0) else 1}


def _fused_matmul(c: _Call) -> Reading | None:
    transposes = any(c.get(name, 0) for name in ("transA", "transB", "transBatchA", "transBatchB"))
    return ("matmul", [c[0], c[1]], {}) if c.get("alpha", 1.0) == 1.0 and not transposes else None


def _conv(name: str) -> Rule:
    def rule(c: _Call) -> Reading:
        attributes = {
            "stride": c.get("strides"), "padding": c.get("pads"), "dilation": c.get("dilations"), "groups": c.get("group", 1),
        }  # fmt: skip
        return name, [c[0], c[1], c[2]], attributes

    return rule


def _layer_norm(c: _Call) -> Reading:
    return "layer_norm", [c[0], c[1], c[2]], {"eps": c.get("epsilon", 1e-5), "axes": _from_axis(c)}


def _rms_norm(c: _Call) -> Reading:
    return "rms_norm", [c[0], c[1]], {"eps": c.get("epsilon", 1e-5), "axes": _from_axis(c)}


def _from_axis(c: _Call) -> tuple[int, ...]:
    rank = c.rank()
    first = c.axis(c.get("axis", -1))
    return tuple(range(first, rank)) if rank is not None else (first,)


def _skip_norm(name: str) -> Rule:
    """A norm fused with the residual add before it: readable where the sum is an output too."""

    def rule(c: _Call) -> Reading | None:
        outputs = c.node.key.outputs  # the native ones: absent outputs keep their places there
        if len(outputs) < 4 or not outputs[3].name:
            return None
        total = Value(c.graph, outputs[3])
        eps, rank = c.get("epsilon", 1e-12), c.rank()
        axes = (rank - 1,) if rank is not None else (-1,)
        operands = [total, c[2]] if name == "rms_norm" else [total, c[2], c[3]]
        return name, operands, {"eps": eps, "axes": axes}

    return rule


def _batch_norm(c: _Call) -> Reading | None:
    if c.get("training_mode", 0):
        return None
    return "batch_norm", [c[0], c[1], c[2], c[3], c[4]], {"eps": c.get("epsilon", 1e-5)}


def _group_norm(c: _Call) -> Reading:
    return "group_norm", [c[0], c[1], c[2]], {"groups": c.get("num_groups"), "eps": c.get("epsilon", 1e-5)}


def _attention(c: _Call) -> Reading | None:
    """The standard Attention without a cache, on tensors of rank 4 (rank 3 hides the heads inside)."""
    if c[0] is None or c.rank() != 4 or any(c[i] is not None for i in (4, 5)) or c.get("softcap", 0.0):
        return None
    width = (c[0].shape or (None,))[-1]
    scale = c.get("scale") or (1 / math.sqrt(width) if isinstance(width, int) else None)
    attributes = {"scale": scale, "is_causal": bool(c.get("is_causal", 0)), "enable_gqa": True}
    return "sdpa", [c[0], c[1], c[2], c[3]], attributes


def _our_attention(c: _Call) -> Reading:
    attributes = {"scale": c.get("scale"), "is_causal": False, "enable_gqa": True, "softcap": c.get("softcap", 0.0)}
    return "sdpa", [c[0], c[1], c[2], c[3]], attributes


def _multi_head(kv_heads: str, *, mask: int, refused: tuple[int, ...]) -> Rule:
    """onnxruntime's fused attention on ``[batch, seq, heads * head]``, without bias, cache or rotation inside."""

    def rule(c: _Call) -> Reading | None:
        if c[0] is None or c[1] is None or c[2] is None or c.rank() != 3 or any(c[i] is not None for i in refused):
            return None
        if c.get("do_rotary", 0) or c.get("softcap", 0.0):
            return None
        heads = c.get("num_heads")
        width = (c[0].shape or (None,))[-1]
        scale = c.get("scale") or (math.sqrt(heads / width) if isinstance(width, int) else None)
        causal = bool(c.get("unidirectional", 0)) or kv_heads == "kv_num_heads"
        attributes = {
            "scale": scale, "is_causal": causal, "enable_gqa": True, "heads": heads, "kv_heads": c.get(kv_heads, heads),
        }  # fmt: skip
        return "sdpa", [c[0], c[1], c[2], c[mask]], attributes

    return rule


def _leaky(c: _Call) -> Reading:
    return "leaky_relu", [c[0]], {"alpha": c.get("alpha", 0.01)}


def _elu(c: _Call) -> Reading:
    return "elu", [c[0]], {"alpha": c.get("alpha", 1.0)}


def _hard_sigmoid(c: _Call) -> Reading | None:
    standard = abs(c.get("alpha", 0.2) - 1 / 6) < 1e-6 and c.get("beta", 0.5) == 0.5
    return ("hardsigmoid", [c[0]], {}) if standard else None


def _gelu(c: _Call) -> Reading:
    return "gelu", [c[0]], {"approximate": c.get("approximate", "none")}


def _fast_gelu(c: _Call) -> Reading | None:
    return ("gelu", [c[0]], {"approximate": "tanh"}) if c[1] is None else None


def _index(c: _Call) -> Reading | None:
    return ("index", [c[0], c[1]], {}) if not c.get("batch_dims", 0) else None


def _scatter(c: _Call) -> Reading:
    return "scatter", list(c.operands), {}


def _repeat(c: _Call) -> Reading:
    return "repeat", [c[0]], {}


def _full(c: _Call) -> Reading:
    value = c.get("value")
    return "full", [], {"value": 0 if value is None else as_scalar(np.asarray(value))}


def _grouped(c: _Call) -> Reading:
    return "grouped_matmul", [c[0], c[1], c[2]], {}


_RULES: dict[str, Rule] = {
    "Identity": _same("identity"), "Dropout": _dropout, "Cast": _cast, "CastLike": _cast,
    **{name: _same(name.lower(), 2) for name in ("Add", "Sub", "Mul", "Div", "Pow", "And", "Or")},
    "Equal": _same("eq", 2), "Less": _same("lt", 2), "LessOrEqual": _same("le", 2), "Greater": _same("gt", 2),
    "GreaterOrEqual": _same("ge", 2), "Not": _same("not"), "IsNaN": _same("isnan"), "Where": _same("where", 3),
    "Sum": _pairwise("add"), "Min": _pairwise("min"), "Max": _pairwise("max"), "Clip": _clip,
    **{name: _same(name.lower()) for name in (
        "Neg", "Abs", "Sqrt", "Reciprocal", "Exp", "Log", "Erf", "Cos", "Sin", "Floor", "Relu", "Sigmoid", "Tanh", "Softplus",
        "Mish",
    )},
    "Gelu": _gelu, "LeakyRelu": _leaky, "Elu": _elu, "HardSwish": _same("hardswish"), "HardSigmoid": _hard_sigmoid,
    "PRelu": _same("prelu", 2), "Softmax": _softmax("softmax"), "LogSoftmax": _softmax("log_softmax"),
    "Swish": lambda c: ("silu", [c[0]], {}) if c.get("alpha", 1.0) == 1.0 else None,
    "ReduceMean": _reduce("mean"), "ReduceSum": _reduce("sum"), "ReduceMax": _reduce("amax"), "ReduceMin": _reduce("amin"),
    "ArgMax": _argmax, "CumSum": _cumsum, "TopK": _topk,
    "Reshape": _reshape, "Flatten": _reshape, "Squeeze": _reshape, "Unsqueeze": _reshape, "Transpose": _transpose,
    "Expand": _expand, "Slice": _slice, "Split": _split, "Concat": _concat, "Pad": _same("pad"), "Tile": _repeat,
    "Trilu": _same("trilu"), "Gather": _gather, "GatherND": _index,
    "GatherElements": lambda c: ("gather_elements", [c[0], c[1]], {"axis": c.axis(c.get("axis", 0))}),
    "Scatter": _scatter, "ScatterElements": _scatter, "ScatterND": _scatter, "OneHot": _same("one_hot"),
    "MatMul": _same("matmul", 2), "Gemm": _gemm, "Conv": _conv("conv"), "ConvTranspose": _conv("conv_transpose"),
    "Attention": _attention, "attention": _our_attention, "grouped_linear": _grouped,
    "LayerNormalization": _layer_norm, "RMSNormalization": _rms_norm, "SimplifiedLayerNormalization": _rms_norm,
    "BatchNormalization": _batch_norm, "GroupNormalization": _group_norm,
    "MaxPool": _same("max_pool"), "GlobalMaxPool": _same("max_pool"), "AveragePool": _same("avg_pool"),
    "GlobalAveragePool": _same("avg_pool"), "Resize": _same("resize"), "Upsample": _same("resize"),
    "QuantizeLinear": _same("quantize", 3), "DequantizeLinear": _same("dequantize", 3), "dequantize": _same("dequantize", 3),
    "DynamicQuantizeLinear": _same("dynamic_quantize"), "MatMulInteger": _same("matmul_integer", 4),
    "Shape": _same("shape_of"), "Size": _same("shape_of"), "Range": lambda c: ("arange", [], {}),
    "ConstantOfShape": _full,
    **dict.fromkeys(("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli"),
                    lambda c: ("random", [], {})),
}  # fmt: skip

_CONTRIB: dict[str, Rule] = {
    "Gelu": _gelu, "FastGelu": _fast_gelu, "FusedMatMul": _fused_matmul,
    "SimplifiedLayerNormalization": _rms_norm, "LayerNormalization": _layer_norm, "RMSNormalization": _rms_norm,
    "SkipLayerNormalization": _skip_norm("layer_norm"), "SkipSimplifiedLayerNormalization": _skip_norm("rms_norm"),
    "MultiHeadAttention": _multi_head("num_heads", mask=5, refused=(3, 4, 6, 7)),
    "GroupQueryAttention": _multi_head("kv_num_heads", mask=10, refused=(3, 4)),
    "QuantizeLinear": _same("quantize", 3), "DequantizeLinear": _same("dequantize", 3),
}  # fmt: skip
