"""Our own translations of ATen ops, where torch's would lose something.

torch's translations are used for everything else. The rules here keep shapes static where the graph knows them (``Reshape``
with copied sizes instead of shape arithmetic), keep parameters as they are stored (``linear`` transposes in the graph, so
names, ties and memory stay), and keep the meaning of attention for rows without an allowed key.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from actgraph.errors import UnsupportedError
from actgraph.formats.onnx_export_types import dims_of
from actgraph.graph.onnx_native import tensor_of
from actgraph.ops.dtypes import DType
from actgraph.ops.registry import DOMAIN

if TYPE_CHECKING:
    from actgraph.formats.onnx_export_translate import Translator

aten = torch.ops.aten
Rule = Callable[["Translator", fx.Node, dict[str, Any]], Any]
RULES: dict[Any, Rule] = {}
#: Rules that also hold for complex numbers, which are pairs along one more axis at the end.
COMPLEX_RULES: dict[Any, Rule] = {}


def rule(*targets: Any, complex_too: bool = False) -> Callable[[Rule], Rule]:
    """Register a rule. It gets the bound arguments with nodes replaced by ONNX values, and returns values or None (decline)."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(targets, function))
        if complex_too:
            COMPLEX_RULES.update(dict.fromkeys(targets, function))
        return function

    return register


def _rank(node: fx.Node) -> int:
    """The rank of the first operand."""
    return len(node.args[0].meta["val"].shape)  # type: ignore[union-attr]


# --- values that pass through -------------------------------------------------------------------------------------------


@rule(
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.alias.default,
    aten.lift_fresh_copy.default,
    complex_too=True,
)
def identity(t: Translator, node: fx.Node, a: dict[str, Any]) -> Any:
    return a["self"]


@rule(aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default)
def dropout(t: Translator, node: fx.Node, a: dict[str, Any]) -> Any:
    if a.get("train") and a.get("p"):
        raise UnsupportedError(f"{node.name} drops values at random", "capture the model in eval mode")
    return a["input"]


@rule(aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout, torch.ops.prims.convert_element_type.default)
def convert(t: Translator, node: fx.Node, a: dict[str, Any]) -> Any:
    value: ir.Value = a["self"] if "self" in a else a["a"]
    kind = t.type_of(node)
    if kind.dtype is None or value.dtype is None:
        return None
    return t.emit.cast(value, kind.dtype)


# --- shapes -------------------------------------------------------------------------------------------------------------


@rule(aten.sym_size.int)
def sym_size(t: Translator, node: fx.Node, a: dict[str, Any]) -> Any:
    return t.scalar(t.size(a["self"], a["dim"]))


@rule(
    aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.flatten.using_ints, aten.squeeze.default,
    aten.squeeze.dim, aten.squeeze.dims, aten.unflatten.int, aten._reshape_alias.default, aten.view_copy.default,
    complex_too=True,
)  # fmt: skip
def reshape(t: Translator, node: fx.Node, a: dict[str, Any]) -> Any:
    value, target = a["self"], t.type_of(node).shape
    source = dims_of(value)
    if source is None or target is None or value.type is None:
        return None
    if tuple(source) == target:
        return value
    shape = t.reshape_target(source, target)
    if shape is not None:
        return t.emit.op("Reshape", value, t.emit.ints(shape))
    sizes = a.get("size", a.get("shape"))
    if not isinstance(sizes, (list, tuple)) or len(sizes) != len(target):
        return None
    parts = [size if isinstance(target[i], str) else target[i] for i, size in enumerate(sizes)]
    return t.emit.op("Reshape", value, t.vector(parts), allowzero=1 if 0 in parts else None)


@rule(aten.unsqueeze.default, complex_too=True)
def unsqueeze(t: Translator, node: fx.Node, a: dict[str, Any]) -> Any:
    rank = _rank(node) + 1
    return t.emit.op("Unsqueeze", a["self"], t.emit.ints([a["dim"] % rank]))


@rule(aten.transpose.int, aten.permute.default, aten.t.default, aten.numpy_T.default, complex_too=True)
def transpose(t: Translator, node: fx.Node, a: dict[str, Any]) -> Any:
    rank = _rank(node)
    order = list(range(rank))
    if "dims" in a:
        order = [axis % rank for axis in a["dims"]]
    elif "dim0" in a and rank:
        first, second = a["dim0"] % rank, a["dim1"] % rank
        order[first], order[second] = second, first
    elif "dim0" not in a:
        order.reverse()
    pairs = [rank] if node.meta["val"].is_complex() else []
    return t.emit.op("Transpose", a["self"], perm=order + pairs)


@rule(aten.expand.default, complex_too=True)
def expand(t: Translator, node: fx.Node, a: dict[str, Any]) -> Any:
    value, target = a["self"], t.type_of(node).shape
    source = dims_of(value)
    if source is None or target is None:
        return None
    if tuple(source) == target:
        return value
    padded = [1] * (len(target) - len(source)) + source
    parts: list[Any] = []
    for have, want, size in zip(padded, target, [*a["size"], 2], strict=False):
        if have == want:
            parts.append(1)  # Expand broadcasts: 1 keeps the size
        else:
            parts.append(want if isinstance(want, int) else size)
    return t.emit.op("Expand", value, t.vector(parts))


@rule(aten.slice.Tensor, complex_too=True)
def slice_(t: Translator, node: fx.Node, a: dict[str, Any]) -> Any:
    value = a["self"]
    source, target = dims_of(value), t.type_of(node).shape
    axis, start, end, step = a.get("dim", 0), a.get("start"), a.get("end"), a.get("step", 1)
    whole = step == 1 and start in (None, 0) and (end is None or (isinstance(end, int) and end >= 2**62))
    if whole or (source is not None and tuple(source) == target and start in (None, 0) and step == 1):
        return value
    rank = _rank(node)
    bounds = [t.vector([0 if start is None else start]), t.vector([2**63 - 1 if end is None else end])]
    return t.emit.op("Slice", value, *bounds, t.emit.ints([axis % rank]), None if step == 1 else t.vector([step]))


@rule(aten.select.int, complex_too=True)
def select(t: Translator, node: fx.Node, a: dict[str, Any]) -> Any:
    index = a["index"]
    position = t.emit.constant(index, DType.I64) if isinstance(index, int) else index
    return t.emit.op("Gather", a["self"], position, axis=a["dim"] % _rank(node))


@rule(aten.index.Tensor, aten.index_select.default)
def index(t: Translator, node: fx.Node, a: dict[str, Any]) -> Any:
    """One tensor of positions along one axis is a ``Gather``; masks and several tensors are left to torch's translation."""
    if "indices" not in a:
        return t.emit.op("Gather", a["self"], a["index"], axis=a["dim"])
    given = [(axis, indices) for axis, indices in enumerate(a["indices"]) if indices is not None]
    if len(given) != 1 or given[0][1].dtype not in (ir.DataType.INT64, ir.DataType.INT32):
        return None
    (axis, indices) = given[0]
    return t.emit.op("Gather", a["self"], indices, axis=axis)


@rule(aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.split.sizes, complex_too=True)
def split(t: Translator, node: fx.Node, a: dict[str, Any]) -> Any:
    axis = a.get("dim", 0) % _rank(node)
    sizes = [t.size_of(item, axis) for item in node.meta["val"]]
    known = [size for size in sizes if isinstance(size, int)]
    if len(known) < len(sizes):
        return None
    if len(sizes) == 1:
        return [a["self"]]
    return t.emit.ops("Split", a["self"], t.emit.ints(known), outputs=len(sizes), axis=axis)


@rule(aten.unbind.int)
def unbind(t: Translator, node: fx.Node, a: dict[str, Any]) -> Any:
    axis, count = a.get("dim", 0), len(node.meta["val"])
    axes = t.emit.ints([axis % _rank(node)])
    pieces: Sequence[ir.Value] = [a["self"]]
    if count > 1:
        pieces = t.emit.ops("Split", a["self"], outputs=count, axis=axis, num_outputs=count)
    return [t.emit.op("Squeeze", piece, axes) for piece in pieces]


# --- contractions -------------------------------------------------------------------------------------------------------


@rule(aten.linear.default)
def linear(t: Translator, node: fx.Node, a: dict[str, Any]) -> Any:
    """``MatMul`` with the weight transposed in the graph; ``Gemm`` where the input is a matrix.

    The weight stays stored as ``[out, in]`` under its own name (a tied one once); engines transpose constants at load. A
    quantized one that has no other reader is stored as ``[in, out]``, for engines fuse a dequantization with the ``MatMul``
    that it feeds, and with nothing else.
    """
    x, weight, bias = a["input"], a["weight"], a.get("bias")
    if _store_transposed(node.args[1], weight):
        product = t.emit.op("MatMul", x, weight)
        return product if bias is None else t.emit.op("Add", product, bias)
    if _rank(node) == 2 and bias is not None:
        return t.emit.op("Gemm", x, weight, bias, transB=1)
    product = t.emit.op("MatMul", x, t.emit.op("Transpose", weight, perm=[1, 0]))
    return product if bias is None else t.emit.op("Add", product, bias)


def _store_transposed(source: Any, weight: ir.Value) -> bool:
    """Turn the dequantized ``weight`` and the codes that it is made of into ``[in, out]``, where nothing else reads either."""
    call = weight.producer()
    if call is None or (call.domain, call.op_type) != (DOMAIN, "Dequantize"):
        return False
    if len(source.users) != 1 or len(source.args[0].users) != 1:
        return False
    codes, attributes = call.inputs[0], call.attributes
    if codes is None or codes.const_value is None or len(codes.uses()) != 1 or dims_of(codes) is None:
        return False
    if any(attributes[name].value for name in ("block_size", "packed") if name in attributes) or len(dims_of(codes) or ()) != 2:
        return False
    codes.const_value = tensor_of(np.ascontiguousarray(codes.const_value.numpy().T), codes.name)
    for value in (codes, weight):
        value.shape = ir.Shape((dims_of(value) or [])[::-1])
    axis = attributes["axis"].value if "axis" in attributes else 0
    attributes["axis"] = ir.AttrInt64("axis", 1 - axis % 2)
    return True


@rule(aten.scaled_dot_product_attention.default)
def attention(t: Translator, node: fx.Node, a: dict[str, Any]) -> Any:
    """``softmax(scale * q @ k.T + mask) @ v``, where a row without an allowed key gives zeros, as in torch."""
    query, key, value, mask = a["query"], a["key"], a["value"], a.get("attn_mask")
    if a.get("dropout_p"):
        raise UnsupportedError(f"{node.name} drops attention at random", "capture the model in eval mode")
    q_val, k_val = node.args[0].meta["val"], node.args[1].meta["val"]  # type: ignore[union-attr]
    rank, width = q_val.dim(), q_val.shape[-1]
    if not isinstance(width, int) or query.dtype is None:
        return None
    dtype = DType.of(query.dtype)
    scale = 1.0 / math.sqrt(width) if a.get("scale") is None else a["scale"]
    if a.get("enable_gqa") and q_val.shape[-3] != k_val.shape[-3]:
        heads, kv_heads = int(q_val.shape[-3]), int(k_val.shape[-3])
        key = _repeat_heads(t, key, heads, kv_heads, width)
        value = _repeat_heads(t, value, heads, kv_heads, int(node.args[2].meta["val"].shape[-1]))  # type: ignore[union-attr]
    swap = [*range(rank - 2), rank - 1, rank - 2]
    scaled = query if scale == 1 else t.emit.op("Mul", query, t.emit.constant(scale, dtype))
    scores = t.emit.op("MatMul", scaled, t.emit.op("Transpose", key, perm=swap))
    bias = _attention_bias(t, node, a, mask, dtype)
    if bias is not None:
        scores = t.emit.op("Add", scores, bias)
    pattern = t.emit.op("Softmax", scores, axis=-1)
    if mask is not None:
        # Softmax of a row of -inf is NaN; torch gives zeros. Row-wise, so the whole pattern is not scanned for NaN.
        lowest = t.emit.constant(-np.inf, dtype)
        highest = t.emit.op("ReduceMax", bias, t.emit.ints([-1]), keepdims=1)
        empty = t.emit.op("Equal", highest, lowest)
        pattern = t.emit.op("Where", empty, t.emit.constant(0, dtype), pattern)
    t.inner[node, "attention_pattern"] = pattern
    return t.emit.op("MatMul", pattern, value)


def _attention_bias(t: Translator, node: fx.Node, a: dict[str, Any], mask: ir.Value | None, dtype: DType) -> ir.Value | None:
    """The mask as what is added to the scores: 0 where a key is allowed, ``-inf`` where not."""
    allowed, bias = None, None
    if mask is not None:
        if mask.dtype is not None and DType.of(mask.dtype) is DType.BOOL:
            allowed = mask
        else:
            bias = t.emit.cast(mask, dtype)
    if a.get("is_causal"):
        sizes = t.vector([t.size(t.values[node.args[0]], -2), t.size(t.values[node.args[1]], -2)])  # type: ignore[index]
        triangle = t.emit.op("Trilu", t.emit.op("Expand", t.emit.constant(1.0, DType.F32), sizes), upper=0)
        causal = t.emit.cast(triangle, DType.BOOL)
        allowed = causal if allowed is None else t.emit.op("And", allowed, causal)
    if allowed is not None:
        zeros, lowest = t.emit.constant(0, dtype), t.emit.constant(-np.inf, dtype)
        masked = t.emit.op("Where", allowed, zeros, lowest)
        bias = masked if bias is None else t.emit.op("Add", bias, masked)
    return bias


def _repeat_heads(t: Translator, value: ir.Value, heads: int, kv_heads: int, width: int) -> ir.Value:
    """Each key/value head repeated for its group of query heads: ``[b, kv, s, d]`` to ``[b, heads, s, d]``."""
    groups = heads // kv_heads
    wide = t.emit.op("Unsqueeze", value, t.emit.ints([2]))
    wide = t.emit.op("Expand", wide, t.emit.ints([1, 1, groups, 1, 1]))
    return t.emit.op("Reshape", wide, t.vector([0, heads, -1, width]))


@rule(aten._grouped_mm.default, "transformers::grouped_mm_fallback")
def grouped_matmul(t: Translator, node: fx.Node, a: dict[str, Any]) -> Any:
    """Rows of many experts, each times the weight of its expert: our ``grouped_linear``, which has the weights as stored."""
    x, weight, offsets, bias = a.get("input", a.get("self")), node.args[1], a.get("offs"), a.get("bias")
    assert isinstance(weight, fx.Node) and isinstance(x, ir.Value)
    if offsets is None or len(x.shape or ()) != 2 or weight.meta["val"].dim() != 3 or a.get("out_dtype") is not None:
        return None
    swapped = weight.target is aten.transpose.int and {int(str(axis)) % 3 for axis in weight.args[1:3]} == {1, 2}
    source = weight.args[0] if swapped else weight
    assert isinstance(source, fx.Node)
    weights = t.values[source]
    if not swapped:
        weights = t.emit.op("Transpose", weights, perm=[0, 2, 1])
    return t.emit.op("GroupedLinear", x, weights, offsets, bias, domain=DOMAIN)


# --- sizes as numbers ---------------------------------------------------------------------------------------------------


@rule(operator.floordiv)
def floordiv(t: Translator, node: fx.Node, a: dict[str, Any]) -> Any:
    """Sizes are not negative, so the truncating integer division of ONNX is a floor."""
    left, right = (t.number(a[key]) for key in ("arg0", "arg1"))
    return t.emit.op("Div", left, right)
