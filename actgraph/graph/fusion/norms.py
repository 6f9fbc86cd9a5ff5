"""RMS and layer norms, whole or written out, as ``actgraph.rms_norm`` and ``actgraph.layer_norm``."""

from __future__ import annotations

from typing import Any

from actgraph.graph.fusion.rewriter import Rewriter, private
from actgraph.graph.graph import Use, Value
from actgraph.graph.views import Norm
from actgraph.ops.dtypes import COMPUTE_FLOATS
from actgraph.ops.registry import DOMAIN


def fuse_norms(rewriter: Rewriter) -> None:
    """Fuse every chosen norm over the last axis."""
    for norm in rewriter.graph.views.norms():
        edges = [use for use in norm.input.uses if use.node in norm.nodes]
        if norm.kind not in ("rms_norm", "layer_norm") or not rewriter.chosen([norm.output], edges):
            continue
        if norm.output.producer is None or norm.nodes[-1].op.startswith(f"{DOMAIN}."):
            continue
        reason = _refusal(norm)
        if reason:
            rewriter.decline(norm.output, reason)
        else:
            _fuse(rewriter, norm, edges)


def _refusal(norm: Norm) -> str:
    x = norm.input
    if x.shape is None or x.dtype not in COMPUTE_FLOATS or norm.output.type != x.type:
        return f"it takes {x.type} and gives {norm.output.type}"
    if not norm.over_last_axis:
        return "it is over other axes than the last"
    for name, value in (("weight", norm.weight), ("bias", norm.bias)):
        if value is not None and not _is_vector(value, x):
            return f"its {name} is {value.type}"
    return "" if private(norm.nodes, norm.output) else "a value inside it is read by others"


def _is_vector(value: Value, x: Value) -> bool:
    shape = value.shape
    return bool(shape) and x.shape is not None and shape[-1] == x.shape[-1] and all(d == 1 for d in shape[:-1])  # type: ignore[index]


def _fuse(rewriter: Rewriter, norm: Norm, edges: list[Use]) -> None:
    attributes: dict[str, Any] = {"eps": norm.eps}
    operands = [norm.input, rewriter.vector(norm.weight)]
    if norm.kind == "layer_norm":
        operands.append(rewriter.vector(norm.bias))
    else:
        attributes["offset"] = norm.weight_offset
    made = rewriter.editor.insert(f"{DOMAIN}.{norm.kind}", operands, attributes, like=norm.output.producer)
    for edge in edges:
        rewriter.editor.move_edges(edge, Use(made, 0))
    rewriter.editor.redirect(norm.output, made.output)
    rewriter.done(norm.kind)
