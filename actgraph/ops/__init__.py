"""The dialect that actgraph owns: one file per op family, one registry."""

from __future__ import annotations

import functools
import importlib

from actgraph.ops.dtypes import DType
from actgraph.ops.registry import OpDef, all_ops, get_op
from actgraph.ops.shapes import Dim, Shape, TensorType

__all__ = ["DType", "Dim", "OpDef", "Shape", "TensorType", "all_ops", "get_op"]

#: The files that define ops. An op family is found by the name of its file.
FAMILIES = (
    "steering", "subspace", "latent", "gating", "sparsity", "threshold_gate", "clipping", "quantization", "fake_quantization",
    "linear", "grouped_linear", "feed_forward", "norms", "rotary", "attention", "experts", "router", "positions", "recent",
    "cache", "running_sum",
)  # fmt: skip


@functools.cache
def load_all() -> None:
    """Import every op family, which registers its ops."""
    for family in FAMILIES:
        importlib.import_module(f"actgraph.ops.{family}")
