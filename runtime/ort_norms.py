"""RMS norms that are written out in elementary operators as onnxruntime's one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from actgraph.graph.evaluate import evaluate
from actgraph.graph.graph import Value
from actgraph.graph.views import Norm
from actgraph.ops.dtypes import DType
from actgraph.runtime.ort_native import CONTRIB, Writer


def fuse_norms(write: Writer, norms: Sequence[Norm]) -> None:
    """Replace every RMS norm over the last axis in float32, together with the addition to the residual stream before it."""
    for norm in norms:
        x, weight, maker = norm.input, norm.weight, norm.output.producer
        if norm.kind != "rms_norm" or norm.bias is not None or norm.output.type != x.type or maker is None or x.shape is None:
            continue
        if not norm.over_last_axis:
            continue
        width = x.shape[-1]
        if x.dtype is not DType.F32 or not isinstance(width, int) or (weight is not None and weight.shape != (width,)):
            continue
        scale = _scale(write, weight, norm.weight_offset, width)
        add = _addition(write, x)
        if add is not None:
            operands = [write.now(operand) for operand in add.inputs if operand is not None]
            made = write.node(
                "SkipSimplifiedLayerNormalization", [*operands, scale], add, outputs=4, domain=CONTRIB, epsilon=norm.eps
            )
            write.replace(add.outputs[0], made[3])
        else:
            source = write.now(x.key)
            made = write.node(
                "SimplifiedLayerNormalization", [source, scale], maker.key, axis=-1, epsilon=norm.eps, stash_type=1
            )
        write.replace(norm.output.key, made[0])


def _addition(write: Writer, x: Value) -> ir.Node | None:
    """The addition of two streams [batch, seq, width] that makes ``x``, unless it is part of another norm already."""
    maker: ir.Node | None = x.key.producer()
    if maker is None or maker.op_type != "Add" or maker.domain or write.now(x.key) is not x.key or x.shape is None:
        return None
    operands = x.producer.operands if x.producer is not None else ()
    same = all(operand is not None and operand.type == x.type and not operand.is_parameter for operand in operands)
    return maker if len(x.shape) == 3 and len(operands) == 2 and same else None


def _scale(write: Writer, weight: Value | None, offset: float, width: int) -> ir.Value:
    if weight is None:
        return write.table(f"fused.ones_{width}", np.ones(width, np.float32))
    if weight.is_parameter and not offset:
        native: ir.Value = weight.key
        return native
    data = evaluate(weight.graph, weight).astype(np.float32) + np.float32(offset)
    return write.table(f"fused.{weight.name}", data)
