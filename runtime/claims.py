"""Which nodes of a graph have kernels, and why others have none."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from actgraph.graph.graph import Graph, Node
from actgraph.ops.dtypes import DType
from actgraph.ops.registry import DOMAIN, get_op
from actgraph.ops.shapes import TensorType
from actgraph.runtime.kernels.numba.kernel import NumbaKernel, OpKernels
from actgraph.runtime.kernels.registry import kernel_for

#: Ops that compute positions, sizes and masks.
_SMALL = frozenset({"length", "positions", "ring_positions", "position_mask", "valid_positions", "recent"})
#: Ops that store new tokens in slots.
_STORING = frozenset({"cache_append", "cache_write"})
#: Tokens of a query up to which the attention kernel, which reads keys once for each, is the faster one.
_FEW_TOKENS = 4


def left(op: str, types: Sequence[TensorType | None]) -> str:
    """Why the engine is to run a node itself, empty where it is not."""
    if op in _SMALL:
        return f"{op} reads no more than sizes and positions"
    if op in _STORING:
        return f"{op} copies into a slot, which the engine does as fast"
    if op == "attention" and types[0] is not None and types[0].shape is not None:
        tokens = types[0].shape[2]
        if not isinstance(tokens, int) or tokens > _FEW_TOKENS:
            return f"attention of {tokens} tokens is a product of matrices"
    return ""


@dataclass
class Claims:
    """What became of the actgraph nodes of a graph.

    claimed: the kernel of each node that has one, by the node's name. unclaimed: why a node has none. left: nodes
    that the engine is to run itself, and why.
    """

    claimed: dict[str, str] = field(default_factory=dict)
    unclaimed: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def only(self, names: Iterable[str]) -> Claims:
        """Those of the nodes ``names``: what is executed in the end."""
        kept = set(names)
        every = (self.claimed, self.unclaimed, self.left)
        return Claims(*({name: text for name, text in found.items() if name in kept} for found in every))


def _made(node: Node) -> str:
    """What a node makes, where kernels do not make it."""
    kinds = {str(value.type) for value in node.outputs if value.dtype is not None and value.dtype is not DType.F32}
    return f" that makes {', '.join(sorted(kinds))}" if kinds else ""


def find_kernels(graph: Graph) -> tuple[Claims, dict[Node, tuple[OpKernels, NumbaKernel]]]:
    """The kernel for each actgraph node of ``graph`` that has one."""
    claims, found = Claims(), {}
    for node in graph.nodes():
        op = node.op.removeprefix(f"{DOMAIN}.")
        if op == node.op:
            continue
        types = [None if operand is None else operand.type for operand in node.operands]
        chosen = kernel_for(op, types, dict(get_op(op).complete(node.attributes)))
        reason = left(op, types)
        if reason:
            claims.left[node.name] = reason
        elif chosen is None:
            given = ", ".join("-" if t is None else str(t) for t in types)
            claims.unclaimed[node.name] = f"{op} has no kernel for {given}{_made(node)}"
        else:
            found[node] = chosen
            claims.claimed[node.name] = chosen[1].stages[-1].name
    return claims, found
