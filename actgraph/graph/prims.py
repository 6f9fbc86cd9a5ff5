"""The vocabulary in which both dialects describe their nodes to the recognisers.

A dialect maps each native node that it can to a ``Prim``: an operation name of the list below with operands in a fixed
order. ``aten.mul.Tensor`` and ONNX ``Mul`` are both ``mul``; ``aten.linear`` is ``linear`` while an ONNX file spells it
``matmul`` and ``add``, which ``recognize`` reads as one linear. Constants of one element appear as Python numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from actgraph.graph.graph import Array, Node, Value
    from actgraph.ops.shapes import Shape

Scalar = float | int | bool

#: Operand order and attributes of every name. Names marked * may be inserted by ``Editor.insert`` in both dialects.
VOCABULARY: dict[str, str] = {
    # values pass through unchanged (the recognisers look through these)
    "identity": "(x): clone, contiguous, detach, dropout at inference, alias, no-op slice *",
    "cast": "(x) {to: DType} *",
    # elementwise
    "add": "(a, b) *", "sub": "(a, b) *", "mul": "(a, b) *", "div": "(a, b) *", "pow": "(a, b)", "neg": "(x)",
    "abs": "(x)", "sqrt": "(x)", "rsqrt": "(x)", "reciprocal": "(x)", "exp": "(x)", "log": "(x)", "erf": "(x)", "cos": "(x) *",
    "sin": "(x) *", "floor": "(x)", "where": "(condition, a, b) *", "min": "(a, b)", "max": "(a, b)",
    "clip": "(x, lo|None, hi|None) *",
    "isnan": "(x)", "not": "(x)", "and": "(a, b)", "or": "(a, b)", "eq": "(a, b)", "ne": "(a, b)", "lt": "(a, b)",
    "le": "(a, b)", "gt": "(a, b)", "ge": "(a, b)",
    # activations
    "relu": "(x) *", "gelu": "(x) {approximate: 'none'|'tanh'}", "silu": "(x)", "sigmoid": "(x) *", "tanh": "(x)",
    "softplus": "(x)", "leaky_relu": "(x) {alpha}", "elu": "(x) {alpha}", "hardswish": "(x)", "hardsigmoid": "(x)",
    "mish": "(x)",
    "prelu": "(x, slope)", "softmax": "(x) {axis}", "log_softmax": "(x) {axis}",
    # reductions
    "mean": "(x) {axes, keepdims}", "sum": "(x) {axes, keepdims} *", "amax": "(x) {axes, keepdims}",
    "amin": "(x) {axes, keepdims}",
    "var": "(x) {axes, keepdims, correction}", "cumsum": "(x) {axis}", "topk": "(x) {k, axis} -> values, indices",
    "argmax": "(x) {axis}",
    # shape
    "reshape": "(x) {shape: output shape}: view, flatten, squeeze, unsqueeze *", "transpose": "(x) {perm} *",
    "expand": "(x)", "slice": "(x) {axis, start, end, step} *", "split": "(x) {axis} -> pieces",
    "unbind": "(x) {axis} -> pieces without the axis", "concat": "(x, ...) {axis} *",
    "pad": "(x)", "roll": "(x)", "flip": "(x)", "repeat": "(x)", "trilu": "(x)", "stack": "(x, ...) {axis}",
    # indexing
    "gather": "(table, indices) {axis}: embedding, index_select, Gather (* rows, axis 0)", "index": "(x, indices...)",
    "gather_elements": "(x, indices) {axis}",
    "scatter": "(x, indices, updates)", "one_hot": "(indices)",
    # contractions
    "matmul": "(a, b) *", "linear": "(x, weight, bias|None) {out_axis: axis of weight that is the output}",
    "conv": "(x, weight, bias|None) {stride, padding, dilation, groups}", "conv_transpose": "(x, weight, bias|None)",
    "sdpa": "(q, k, v, mask|None) {scale, is_causal, enable_gqa, softcap}", "grouped_matmul": "(x, weights, offsets)",
    # quantized weights and products (files of other tools)
    "quantize": "(x, scale, zero_point|None)", "dequantize": "(x, scale, zero_point|None)",
    "dynamic_quantize": "(x) -> q, scale, zero_point",
    "matmul_integer": "(a, b, a_zero_point|None, b_zero_point|None)",
    # normalisation
    "layer_norm": "(x, weight|None, bias|None) {eps, axes}", "rms_norm": "(x, weight|None) {eps, axes}",
    "batch_norm": "(x, weight, bias, mean, var) {eps}", "group_norm": "(x, weight, bias) {groups, eps}",
    # pooling
    "max_pool": "(x)", "avg_pool": "(x)", "resize": "(x)",
    # sources
    "shape_of": "(x): sizes read off a tensor", "arange": "()", "full": "() {value: number|None}: zeros, ones, full, new_*",
    "random": "()",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Prim:
    """One node in the shared vocabulary."""

    op: str
    operands: tuple[Value | Scalar | None, ...]
    attributes: Mapping[str, Any]
    outputs: tuple[Value, ...]
    node: Node

    @property
    def output(self) -> Value:
        return self.outputs[0]


def is_single(shape: Shape | None) -> bool:
    """Whether a shape is that of exactly one element."""
    return shape is not None and all(size == 1 for size in shape)


def as_scalar(array: Array) -> Scalar:
    """The one element of ``array`` as a Python number.

    Floats become the shortest decimal that rounds to the stored number, so that a constant that one dialect stores as
    float32 equals the double that the other one holds (``1e-05``, not ``9.999999747378752e-06``).
    """
    item = array.reshape(-1)[0]
    if array.dtype.kind in "biu":
        return bool(item) if array.dtype.kind == "b" else int(item)
    return float(str(np.float32(item))) if array.dtype.itemsize <= 4 else float(item)
