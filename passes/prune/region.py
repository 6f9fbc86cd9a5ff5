"""The values between the projections of a feed-forward that carry its neurons, and what else lies along them."""

from __future__ import annotations

from dataclasses import dataclass, field

from actgraph.graph import Graph, Node, Use, Value
from actgraph.graph.views import FeedForward
from actgraph.ops import get_op
from actgraph.ops.registry import DOMAIN, Trait

#: Vocabulary ops that treat the neurons of the last axis one by one.
_POINTWISE = frozenset({
    "identity", "cast", "add", "sub", "mul", "div", "neg", "abs", "sqrt", "rsqrt", "reciprocal", "exp", "log", "erf", "where",
    "min", "max", "clip", "isnan", "not", "and", "or", "eq", "ne", "lt", "le", "gt", "ge", "relu", "gelu", "silu", "sigmoid",
    "tanh", "softplus", "leaky_relu", "elu", "hardswish", "hardsigmoid", "mish", "pow",
})  # fmt: skip


@dataclass
class Region:
    """companions: stored operands of width ``neurons`` that are cut with them. refusal: why the region cannot be cut."""

    nodes: list[Node] = field(default_factory=list)
    companions: list[tuple[Value, Use]] = field(default_factory=list)
    refusal: str = ""


def neuron_region(graph: Graph, feed_forward: FeedForward, starts: list[Value], neurons: int) -> Region:
    """Everything from ``starts`` (outputs of gate and up) to the down projection."""
    region = Region()
    ends = set(feed_forward.down.nodes)
    seen: set[Node] = set()
    stack = list(starts)
    while stack:
        value = stack.pop()
        for use in value.uses:
            node = use.node
            if node is None:
                region.refusal = f"{value.name} is a graph output"
                return region
            if node in ends or node in seen:
                continue
            if not _pointwise(node):
                region.refusal = f"{node.op} reads {value.name}"
                return region
            seen.add(node)
            region.nodes.append(node)
            for index, operand in enumerate(node.operands):
                if operand is not None and operand.is_parameter and (operand.shape or (1,))[-1] == neurons:
                    region.companions.append((operand, Use(node, index)))
            stack.extend(node.outputs)
    return region


def _pointwise(node: Node) -> bool:
    if node.op.startswith(f"{DOMAIN}."):
        if node.op == f"{DOMAIN}.shift":
            return bool(node.attributes.get("norm", "none") == "none")
        if node.op == f"{DOMAIN}.fake_quant":  # a dynamic scale is taken over all neurons together
            settings = get_op(node.op).complete(node.attributes)
            return settings["source"] == "static" and settings["granularity"] in ("tensor", "axis")
        return Trait.ELEMENTWISE in get_op(node.op).traits
    prim = node.prim
    return prim is not None and prim.op in _POINTWISE
