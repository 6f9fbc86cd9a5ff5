"""RMS norms that are written out in elementary operators as onnxruntime's one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from actgraph.graph.evaluate import evaluate
from actgraph.graph.graph import Value
from actgraph.graph.views import Norm
from actgraph.ops.dtypes import DType
from actgraph.runtime.ort_native import Writer


def fuse_norms(write: Writer, norms: Sequence[Norm]) -> None:
    """Replace every RMS norm over the last axis in float32 (``SimplifiedLayerNormalization``)."""
    for norm in norms:
        x, weight, output = norm.input, norm.weight, norm.output
        if (
            norm.kind != "rms_norm"
            or x.dtype is not DType.F32
            or output.type != x.type
            or x.shape is None
            or norm.bias is not None
        ):
            continue
        width, maker = x.shape[-1], output.producer
        if (
            not isinstance(width, int)
            or maker is None
            or output.type != x.type
            or (weight is not None and weight.shape != (width,))
        ):
            continue
        scale = _scale(write, weight, norm.weight_offset, width)
        made = write.node("SimplifiedLayerNormalization", [x.key, scale], maker.key, axis=-1, epsilon=norm.eps, stash_type=1)
        write.replace(output.key, made[0])


def _scale(write: Writer, weight: Value | None, offset: float, width: int) -> ir.Value:
    if weight is None:
        return write.table(f"fused.ones_{width}", np.ones(width, np.float32))
    if weight.is_parameter and not offset:
        native: ir.Value = weight.key
        return native
    data = evaluate(weight.graph, weight).astype(np.float32) + np.float32(offset)
    return write.table(f"fused.{weight.name}", data)
