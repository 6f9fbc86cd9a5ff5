"""ATen calls in the shared vocabulary (see ``prims``).

One rule per op, looked up by the op's name without its overload. A rule reads the bound arguments of the call and returns
the vocabulary name, the operands and the attributes, or ``None`` for a call that the vocabulary cannot express
(``add`` with ``alpha``, floor division ...).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from actgraph.graph.fx_args import bind, signature
from actgraph.graph.fx_types import array_of
from actgraph.graph.graph import Node, Value
from actgraph.graph.prims import Prim, Scalar, as_scalar, is_single
from actgraph.ops.dtypes import DType

if TYPE_CHECKING:
    from actgraph.graph.fx import FxGraph

Operand = Value | Scalar | None
Reading = tuple[str, Sequence[Any], Mapping[str, Any]]  # name, operands (fx nodes, numbers or None), attributes
_END = 2**63 - 1


def describe(graph: FxGraph, node: Node) -> Prim | None:
    """The call in the shared vocabulary; ``None`` where the vocabulary has no name for it."""
    native: fx.Node = node.key
    target = native.target
    if not isinstance(target, torch._ops.OpOverload):
        return None
    domain, _, op = target._schema.name.partition("::")
    rule = _RULES.get(op)
    if rule is None or (domain == "actgraph" and op not in _OURS):
        return None
    call = _Call(graph, native)
    reading = rule(call)
    if reading is None:
        return None
    name, operands, attributes = reading
    keep = name in _TENSORS_ONLY
    values = tuple(call.operand(operand, keep_single=keep) for operand in operands)
    return Prim(name, values, attributes, node.outputs, node)


#: The ops of our own dialect that the vocabulary has names for: ``actgraph::clip`` is not ``aten::clip``.
_OURS = frozenset({"grouped_linear", "dequantize", "attention"})
#: Ops whose one-element parameters stay values: they are weights, not numbers.
_TENSORS_ONLY = frozenset({
    "linear", "matmul", "conv", "conv_transpose", "layer_norm", "rms_norm", "batch_norm", "group_norm", "gather", "index",
    "grouped_matmul", "sdpa", "reshape", "transpose", "cast", "identity", "expand", "concat", "dequantize",
})  # fmt: skip


class _Call:
    """The bound arguments of one call, with what rules need to know of them."""

    def __init__(self, graph: FxGraph, native: fx.Node) -> None:
        self.graph = graph
        self.native = native
        self.bound = bind(native)

    def __getitem__(self, name: str) -> Any:
        """The argument of that name, its schema's default where it was not given."""
        if name in self.bound:
            return self.bound[name]
        for argument in signature(self.native.target) or ():
            if argument.name == name:
                return argument.default
        return None

    @property
    def first(self) -> Any:
        """The first argument, whatever its name."""
        return next(iter(self.bound.values()), None)

    @property
    def arguments(self) -> list[Any]:
        """Every argument in schema order, defaults included."""
        return [self[argument.name] for argument in signature(self.native.target) or ()]

    def shape(self, native: Any) -> tuple[Any, ...] | None:
        return self.graph.value_type(self.graph._value(native)).shape if isinstance(native, fx.Node) else None

    def rank(self, native: Any) -> int:
        shape = self.shape(native)
        return len(shape) if shape is not None else 0

    def axis(self, native: Any, axis: int) -> int:
        """``axis`` of a value, not negative."""
        return axis + self.rank(native) if axis < 0 else axis

    def axes(self, native: Any, axes: Any) -> tuple[int, ...]:
        """Axes of a reduction, not negative, in order; all of them when none are named."""
        rank = self.rank(native)
        if axes is None or axes == []:
            return tuple(range(rank))
        return tuple(sorted(self.axis(native, axis) for axis in (axes if isinstance(axes, (list, tuple)) else [axes])))

    @property
    def output_shape(self) -> tuple[Any, ...] | None:
        return self.shape(self.native)

    def unchanged(self) -> bool:
        """Whether the result has the type of the first operand."""
        if not isinstance(self.first, fx.Node):
            return False
        before, after = (self.graph.value_type(self.graph._value(n)) for n in (self.first, self.native))
        return before == after and after.shape is not None and None not in after.shape

    def operand(self, native: Any, *, keep_single: bool) -> Operand:
        if not isinstance(native, fx.Node):
            return native if native is None or isinstance(native, (bool, int, float)) else None
        value = self.graph._value(native)
        if native.op == "get_attr" and not keep_single and is_single(self.graph.value_type(value).shape):
            tensor = self.graph.tensor(value)
            if tensor.device.type != "meta":
                return as_scalar(array_of(tensor))
        return value


Rule = Callable[[_Call], Reading | None]


def _same(name: str, count: int = 1) -> Rule:
    """The first ``count`` arguments are the operands; there are no attributes."""
    return lambda c: (name, c.arguments[:count], {})


def _scaled(name: str) -> Rule:
    """``add`` and ``sub``, whose ``alpha`` the vocabulary lacks."""
    return lambda c: (name, c.arguments[:2], {}) if c["alpha"] in (None, 1) else None


def _div(c: _Call) -> Reading | None:
    return ("div", [c["self"], c["other"]], {}) if c["rounding_mode"] is None else None


def _identity_or(name: str, attributes: Callable[[_Call], Mapping[str, Any]] = lambda c: {}) -> Rule:
    return lambda c: ("identity", [c.first], {}) if c.unchanged() else (name, [c.first], attributes(c))


def _reshape(c: _Call) -> Reading:
    return ("identity", [c.first], {}) if c.unchanged() else ("reshape", [c.first], {"shape": c.output_shape})


def _cast(c: _Call) -> Reading:
    if c.unchanged():
        return "identity", [c.first], {}
    return "cast", [c.first], {"to": c.graph.value_type(c.graph._value(c.native)).dtype}


def _dropout(c: _Call) -> Reading | None:
    return None if c["train"] and c["p"] else ("identity", [c.first], {})


def _clamp(c: _Call) -> Reading:
    return "clip", [c["self"], c["min"], c["max"]], {}


def _permute(c: _Call, perm: Sequence[int]) -> Reading:
    perm = tuple(p % max(len(perm), 1) for p in perm)
    return ("transpose", [c.first], {"perm": perm}) if perm != tuple(range(len(perm))) else ("identity", [c.first], {})


def _swap(c: _Call) -> Reading:
    perm = list(range(c.rank(c["self"])))
    if len(perm) < 2:
        return "identity", [c["self"]], {}
    i, j = (c.axis(c["self"], c[name]) for name in (("dim0", "dim1") if "dim0" in c.bound else ("axis0", "axis1")))
    perm[i], perm[j] = perm[j], perm[i]
    return _permute(c, perm)


def _last_two(c: _Call) -> Reading:
    perm = list(range(c.rank(c.first)))
    return _permute(c, [*perm[:-2], perm[-1], perm[-2]] if len(perm) > 1 else perm)


def _reduce(name: str) -> Rule:
    return lambda c: (name, [c["self"]], {"axes": c.axes(c["self"], c["dim"]), "keepdims": bool(c["keepdim"])})


def _reduce_pair(name: str, pair: str) -> Rule:
    """``max`` and ``min``: of two tensors, along an axis, or of everything."""

    def rule(c: _Call) -> Reading | None:
        if "other" in c.bound:
            return pair, [c["self"], c["other"]], {}
        return _reduce(name)(c)

    return rule


def _variance(c: _Call) -> Reading | None:
    correction = c["correction"] if "correction" in c.bound else (1 if c["unbiased"] in (None, True) else 0)
    attributes = {"axes": c.axes(c["self"], c["dim"]), "keepdims": bool(c["keepdim"]), "correction": correction}
    return "var", [c["self"]], attributes


def _along(name: str, *extra: str) -> Rule:
    return lambda c: (name, [c.first], {"axis": c.axis(c.first, c["dim"]), **{key: c[key] for key in extra}})


def _number(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def _slice(c: _Call) -> Reading:
    if c.unchanged():
        return "identity", [c["self"]], {}
    start = 0 if c["start"] is None else c["start"]
    end = _END if c["end"] is None else c["end"]
    attributes = {"axis": c.axis(c["self"], c["dim"]), "start": _number(start), "end": _number(end), "step": c["step"]}
    return "slice", [c["self"]], attributes


def _narrow(c: _Call) -> Reading:
    start, length = _number(c["start"]), _number(c["length"])
    end = start + length if start is not None and length is not None else None
    return "slice", [c["self"]], {"axis": c.axis(c["self"], c["dim"]), "start": start, "end": end, "step": 1}


def _select(c: _Call) -> Reading:
    return "gather", [c["self"], c["index"]], {"axis": c.axis(c["self"], c["dim"])}


def _concat(name: str) -> Rule:
    def rule(c: _Call) -> Reading:
        parts = list(c["tensors"])
        extra = 1 if name == "stack" else 0
        axis = c["dim"] if c["dim"] >= 0 else c["dim"] + c.rank(parts[0]) + extra
        return name, parts, {"axis": axis}

    return rule


def _index(c: _Call) -> Reading:
    return "index", [c["self"], *c["indices"]], {}


def _repeat_interleave(c: _Call) -> Reading | None:
    return ("repeat", [c["self"]], {}) if isinstance(c["self"], fx.Node) and "repeats" in c.bound else None


def _linear(c: _Call) -> Reading:
    return "linear", [c["input"], c["weight"], c["bias"]], {"out_axis": 0}


def _addmm(c: _Call) -> Reading | None:
    if c["beta"] != 1 or c["alpha"] != 1:
        return None
    return "linear", [c["mat1"], c["mat2"], c["self"]], {"out_axis": 1}


def _convolution(c: _Call) -> Reading:
    name = c.native.target._schema.name  # type: ignore[union-attr]
    transposed = bool(c["transposed"]) or "transpose" in name
    attributes = {
        "stride": c["stride"], "padding": c["padding"], "dilation": c["dilation"],
        "groups": c["groups"],
    }  # fmt: skip
    return "conv_transpose" if transposed else "conv", [c["input"], c["weight"], c["bias"]], attributes


def _sdpa(c: _Call) -> Reading | None:
    if c["dropout_p"]:
        return None
    scale = c["scale"]
    if scale is None:
        width = (c.shape(c["query"]) or (None,))[-1]
        scale = 1 / math.sqrt(width) if isinstance(width, int) else None
    attributes = {"scale": scale, "is_causal": bool(c["is_causal"]), "enable_gqa": bool(c["enable_gqa"])}
    return "sdpa", [c["query"], c["key"], c["value"], c["attn_mask"]], attributes


def _attention(c: _Call) -> Reading:
    attributes = {"scale": c["scale"], "is_causal": False, "enable_gqa": True, "softcap": c["softcap"]}
    return "sdpa", [c["query"], c["key"], c["value"], c["mask"]], attributes


def _trailing_axes(c: _Call, x: Any, shape: Any) -> tuple[int, ...]:
    rank = c.rank(x)
    return tuple(range(rank - len(shape), rank))


def _layer_norm(c: _Call) -> Reading:
    axes = _trailing_axes(c, c["input"], c["normalized_shape"])
    return "layer_norm", [c["input"], c["weight"], c["bias"]], {"eps": float(c["eps"]), "axes": axes}


def _rms_norm(c: _Call) -> Reading:
    eps = c["eps"]
    if eps is None:
        dtype = c.graph.value_type(c.graph._value(c["input"])).dtype
        eps = torch.finfo((dtype or DType.F32).torch).eps
    axes = _trailing_axes(c, c["input"], c["normalized_shape"])
    return "rms_norm", [c["input"], c["weight"]], {"eps": float(eps), "axes": axes}


def _batch_norm(c: _Call) -> Reading | None:
    if c["training"] and "no_training" not in c.native.target._schema.name:  # type: ignore[union-attr]
        return None
    eps = float(c["eps"])
    return "batch_norm", [c["input"], c["weight"], c["bias"], c["running_mean"], c["running_var"]], {"eps": eps}


def _group_norm(c: _Call) -> Reading:
    groups = c["num_groups"] if "num_groups" in c.bound else c["group"]
    return "group_norm", [c["input"], c["weight"], c["bias"]], {"groups": groups, "eps": float(c["eps"])}


def _softmax(name: str) -> Rule:
    def rule(c: _Call) -> Reading:
        return name, [c["self"]], {"axis": c.axis(c["self"], c["dim"])}

    return rule


def _grouped(c: _Call) -> Reading:
    x, weights, offsets = c.arguments[:3]
    return "grouped_matmul", [x, weights, offsets], {}


def _leaky(c: _Call) -> Reading:
    return "leaky_relu", [c["self"]], {"alpha": c["negative_slope"]}


def _softplus(c: _Call) -> Reading | None:
    return ("softplus", [c["self"]], {}) if c["beta"] == 1 else None


def _elu(c: _Call) -> Reading | None:
    return ("elu", [c["self"]], {"alpha": c["alpha"]}) if c["scale"] == 1 and c["input_scale"] == 1 else None


def _masked_fill(c: _Call) -> Reading:
    return "where", [c["mask"], c["value"], c["self"]], {}


def _reversed(name: str) -> Rule:
    return lambda c: (name, [c["other"], c["self"]], {}) if c["alpha"] in (None, 1) else None


def _source(name: str) -> Rule:
    return lambda c: (name, [], {})


def _full(value: float | None = None, argument: str = "fill_value") -> Rule:
    """A constant tensor; ``argument`` names the number where the op itself does not say it."""

    def rule(c: _Call) -> Reading:
        number = value if value is not None else c[argument]
        return "full", [], {"value": number if isinstance(number, (bool, int, float)) else None}

    return rule


def _size(c: _Call) -> Reading:
    return "shape_of", [c["self"]], {}


_RULES: dict[str, Rule] = {
    **dict.fromkeys(("clone", "contiguous", "alias", "detach", "lift_fresh_copy", "positive"), _same("identity")),
    **dict.fromkeys(("dropout", "feature_dropout", "alpha_dropout"), _dropout),
    **dict.fromkeys(("_to_copy", "to", "type_as", "to_dtype", "float", "half"), _cast),
    "add": _scaled("add"), "sub": _scaled("sub"), "subtract": _scaled("sub"), "rsub": _reversed("sub"),
    "mul": _same("mul", 2), "multiply": _same("mul", 2), "div": _div, "true_divide": _same("div", 2), "divide": _div,
    "pow": _same("pow", 2), "square": lambda c: ("pow", [c["self"], 2], {}),
    "where": _same("where", 3), "masked_fill": _masked_fill, "minimum": _same("min", 2), "maximum": _same("max", 2),
    **dict.fromkeys(("clamp", "clip", "clamp_min", "clamp_max"), _clamp),
    "hardtanh": lambda c: ("clip", [c["self"], c["min_val"], c["max_val"]], {}),
    "relu6": lambda c: ("clip", [c["self"], 0.0, 6.0], {}),
    **dict.fromkeys(("logical_not", "bitwise_not"), _same("not")),
    **dict.fromkeys(("logical_and", "bitwise_and", "__and__"), _same("and", 2)),
    **dict.fromkeys(("logical_or", "bitwise_or", "__or__"), _same("or", 2)),
    **{name: _same(name, 2) for name in ("eq", "ne", "lt", "le", "gt", "ge")},
    **{name: _same(name) for name in (
        "neg", "abs", "sqrt", "rsqrt", "reciprocal", "exp", "log", "erf", "cos", "sin", "floor", "isnan", "relu", "silu",
        "sigmoid", "tanh", "hardswish", "hardsigmoid", "mish",
    )},
    "gelu": lambda c: ("gelu", [c["self"]], {"approximate": c["approximate"]}),
    "softplus": _softplus, "leaky_relu": _leaky, "elu": _elu,
    "prelu": _same("prelu", 2), "_prelu_kernel": _same("prelu", 2),
    "softmax": _softmax("softmax"), "_softmax": _softmax("softmax"), "_safe_softmax": _softmax("softmax"),
    "log_softmax": _softmax("log_softmax"), "_log_softmax": _softmax("log_softmax"),
    "mean": _reduce("mean"), "sum": _reduce("sum"), "amax": _reduce("amax"), "amin": _reduce("amin"), "var": _variance,
    "max": _reduce_pair("amax", "max"), "min": _reduce_pair("amin", "min"),
    "argmax": _reduce("argmax"),
    "cumsum": _along("cumsum"), "topk": _along("topk", "k"),
    **dict.fromkeys(
        ("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "_reshape_alias",
         "view_copy", "squeeze_copy", "unsqueeze_copy"), _reshape),
    "transpose": _swap, "swapaxes": _swap, "permute": lambda c: _permute(c, c["dims"]), "t": _last_two, "mT": _last_two,
    "adjoint": _last_two,
    **dict.fromkeys(("expand", "expand_as", "broadcast_to", "expand_copy"), _identity_or("expand")),
    "slice": _slice, "narrow": _narrow, "select": _select,
    **dict.fromkeys(
        ("split", "split_with_sizes", "chunk", "split_copy", "split_with_sizes_copy", "unsafe_split", "unsafe_chunk"),
        _along("split")),
    "unbind": _along("unbind"),
    "cat": _concat("concat"), "stack": _concat("stack"),
    "constant_pad_nd": _same("pad"), "pad": _same("pad"), "roll": _same("roll"), "flip": _same("flip"),
    "repeat": _same("repeat"), "tile": _same("repeat"), "repeat_interleave": _repeat_interleave,
    "tril": _same("trilu"), "triu": _same("trilu"),
    "embedding": lambda c: ("gather", [c["weight"], c["indices"]], {"axis": 0}),
    "index_select": lambda c: ("gather", [c["self"], c["index"]], {"axis": c.axis(c["self"], c["dim"])}),
    "index": _index, "gather": lambda c: ("gather_elements", [c["self"], c["index"]], {"axis": c.axis(c["self"], c["dim"])}),
    "index_put": lambda c: ("scatter", [c["self"], *c["indices"], c["values"]], {}),
    **dict.fromkeys(("scatter", "scatter_add", "index_add", "index_copy", "scatter_reduce"),
                    lambda c: ("scatter", [a for a in c.arguments if isinstance(a, fx.Node)], {})),
    "one_hot": _same("one_hot"),
    "matmul": _same("matmul", 2), "mm": _same("matmul", 2), "bmm": _same("matmul", 2), "mv": _same("matmul", 2),
    "linear": _linear, "addmm": _addmm,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
                    _convolution),
    "scaled_dot_product_attention": _sdpa, "attention": _attention,
    "_grouped_mm": _grouped, "grouped_mm": _grouped, "grouped_mm_fallback": _grouped, "grouped_linear": _grouped,
    "layer_norm": _layer_norm, "native_layer_norm": _layer_norm, "rms_norm": _rms_norm, "_fused_rms_norm": _rms_norm,
    **dict.fromkeys(("batch_norm", "_native_batch_norm_legit_no_training", "native_batch_norm"), _batch_norm),
    "group_norm": _group_norm, "native_group_norm": _group_norm,
    **dict.fromkeys(("max_pool1d", "max_pool2d", "max_pool3d", "max_pool2d_with_indices", "adaptive_max_pool2d"),
                    _same("max_pool")),
    **dict.fromkeys(("avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
                     "_adaptive_avg_pool2d"), _same("avg_pool")),
    **dict.fromkeys(("upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d"), _same("resize")),
    "sym_size": _size, "sym_numel": _size,
    "arange": _source("arange"),
    **dict.fromkeys(("full", "full_like", "new_full"), _full()), "scalar_tensor": _full(argument="s"),
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros"), _full(0)),
    **dict.fromkeys(("ones", "ones_like", "new_ones"), _full(1)),
    **dict.fromkeys(("empty", "empty_like", "new_empty"), lambda c: ("full", [], {"value": None})),
    **dict.fromkeys(("rand", "randn", "rand_like", "randn_like", "randint", "bernoulli", "normal"), _source("random")),
    "dequantize": _same("dequantize", 3),
}  # fmt: skip
