"""Graphs in the ops that have kernels, for sessions."""

from __future__ import annotations

import math
from typing import TypeVar

from actgraph.graph.fusion import Chooser, fuse
from actgraph.graph.graph import Graph
from actgraph.ops.dtypes import DType

#: Elements from which on it matters how a weight is read.
_LARGE = 1 << 16

AnyGraph = TypeVar("AnyGraph", bound=Graph)


def with_kernel_ops(
    graph: AnyGraph,
    *,
    norms: bool = False,
    dense: bool = True,
    small: bool = False,
    gates: bool = True,
    few: bool | None = None,
) -> AnyGraph:
    """A copy of ``graph`` in the ops that have kernels.

    In a graph of single tokens these are all large linears (gated ones of the same x are one), and attentions over caches of 8
    or 16 bits. In others linears that are neither gated nor quantized stay the engine's, whose product of many tokens is
    faster. norms: norms and rotary embeddings too, for engines that have none. dense: large linears of single tokens at all.
    small: small ones as well, for engines that call kernels at next to no cost. gates: gates go into linears, whose kernels
    then skip what each token drops; not in graphs for prompts alone, whose tokens drop nearly nothing together (256 tokens
    took 2 to 4 times as long). few: whether its calls have few tokens; by default, whether it is a graph of single tokens.
    """
    twin: AnyGraph = graph.clone()  # type: ignore[assignment]
    tokens = next((value for value in graph.inputs() if value.name == "input_ids"), None)
    single = tokens is not None and tokens.shape is not None and tokens.shape[-1] == 1 if few is None else few
    whole = single and dense and gates
    fuse(twin, norms=norms, rotary=norms, feed_forwards=False, attentions=single, gates=gates, siblings=whole)
    if single and dense:
        fuse(twin, dense=True, norms=False, rotary=False, feed_forwards=False, chosen=_of_kernels(twin, 0 if small else _LARGE))
    return twin


def _of_kernels(graph: Graph, least: int) -> Chooser:
    """Linears of float32 activations whose weight has at least so many elements."""
    sizes = {
        linear.output: math.prod(size if isinstance(size, int) else 1 for size in linear.weight.shape or ())
        for linear in graph.views.linears()
        if linear.output.dtype is DType.F32
    }
    return lambda values, edges: any(sizes.get(value, -1) >= least for value in values)
