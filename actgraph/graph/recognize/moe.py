"""Mixtures of experts: a router, and experts as grouped products or as batched products with gathered weights.

An *expert product* multiplies rows by the weights of each row's own expert: one grouped matmul over rows sorted by expert,
or a batched matmul whose weights were gathered by expert index. Two of them with an activation between are the experts.
"""

from __future__ import annotations

from actgraph.graph.graph import Value
from actgraph.graph.recognize.experts import ExpertProduct, expert_products, looked_up
from actgraph.graph.recognize.linear import by_output
from actgraph.graph.recognize.semantic import Semantics
from actgraph.graph.views import Linear, MixtureOfExperts

_REACH = 24
#: What stands between the products of an expert: an activation, however it is spelled, a gate, and the halves of a fused one.
_BETWEEN = frozenset({
    "reshape", "split", "slice", "clip", "add", "sub", "mul", "div", "pow", "neg", "erf", "tanh", "exp", "relu", "gelu",
    "silu", "sigmoid", "softplus", "hardswish", "mish", "where", "min", "max",
})  # fmt: skip


def mixtures(semantics: Semantics, linears: list[Linear]) -> list[MixtureOfExperts]:
    """All mixtures of experts, in the order of their outputs."""
    products = expert_products(semantics)
    by_value = {semantics.root(p.output): p for p in products}
    outputs = by_output(semantics, linears)
    found = []
    for product in products:
        if _feeds(semantics, product, by_value):
            mixture = _mixture(semantics, product, outputs)
            if mixture is not None:
                found.append(mixture)
    return sorted(found, key=lambda m: semantics.position(m.output))


def _feeds(s: Semantics, product: ExpertProduct, by_value: dict[Value, ExpertProduct]) -> bool:
    """Whether the rows of a product come from another expert product through an activation: it is a down projection."""
    stack = [product.rows]
    seen: set[Value] = set()
    while stack and len(seen) < _REACH:
        value = s.root(s.edited(stack.pop()), casts=True)
        if value in seen:
            continue
        seen.add(value)
        if value in by_value and by_value[value] is not product:
            return True
        prim = s.prim(value)
        if prim is not None and prim.op in _BETWEEN:
            stack += [operand for operand in prim.operands if isinstance(operand, Value) and s.is_data(operand)]
    return False


def _mixture(s: Semantics, down: ExpertProduct, outputs: dict[Value, Linear]) -> MixtureOfExperts | None:
    output, gates = _mixed(s, down.output)
    router = _router(s, gates if gates is not None else down.index, outputs)
    if router is None:
        return None
    return MixtureOfExperts(
        router=router, router_logits=router.output, gates=gates, hidden=down.rows, expert_index=_expert_index(s, down),
        output=output, experts=down.experts,
    )  # fmt: skip


def _mixed(s: Semantics, rows: Value) -> tuple[Value, Value | None]:
    """Follow the experts' rows to the sum over each token's experts; ``(output, gates)``."""
    current, gates, summed = rows, None, False
    for _ in range(_REACH):
        read = s.only_reader(current, casts=True)
        prim = read.prim if read is not None else None
        if read is None or prim is None:
            break
        if prim.op == "mul" and not summed:
            other = prim.operands[1] if prim.operands[0] == read.value else prim.operands[0]
            if not isinstance(other, Value):
                break
            gates = gates if gates is not None else _gates(s, other)
        elif prim.op in ("sum", "scatter"):
            if prim.op == "scatter" and prim.operands[-1] != read.value and summed:
                break
            summed = True
        elif prim.op == "add" and not summed:
            if not any(looked_up(s, operand) is not None for operand in prim.operands):
                break
        elif prim.op not in ("reshape", "transpose") and (summed or prim.op not in ("index", "gather")):
            break
        current = prim.output
    return current, gates


def _gates(s: Semantics, value: Value) -> Value:
    """The mixing weights as the router gives them, before they are laid along the rows."""
    value = s.root(value, casts=True)
    for _ in range(8):
        prim = s.prim(value)
        source = prim.operands[0] if prim is not None and prim.operands else None
        if prim is None or prim.op not in ("reshape", "index", "gather", "transpose") or not isinstance(source, Value):
            break
        value = s.root(source, casts=True)
    return value


def _router(s: Semantics, value: Value, outputs: dict[Value, Linear]) -> Linear | None:
    """The linear whose scores choose and weigh the experts."""
    stack = [value]
    seen: set[Value] = set()
    while stack and len(seen) < 4 * _REACH:
        value = s.root(stack.pop(0), casts=True)
        if value in seen:
            continue
        seen.add(value)
        if value in outputs:
            return outputs[value]
        position = s.position(value)
        if position >= 0:
            stack += [o for o in s.nodes[position].operands if o is not None and s.is_data(o)]
    return None


def _expert_index(s: Semantics, down: ExpertProduct) -> Value | None:
    """The expert of each row: the gather's index, or what the group ends were counted from."""
    rows = down.rows.shape[0] if down.rows.shape else None
    stack = [down.index]
    seen: set[Value] = set()
    while stack and len(seen) < _REACH:
        value = s.root(stack.pop(0), casts=True)
        if value in seen:
            continue
        seen.add(value)
        if value.shape == (rows,) and value.dtype is not None and value.dtype.is_integer:
            return value
        position = s.position(value)
        if position >= 0:
            stack += [o for o in s.nodes[position].operands if o is not None and s.is_data(o)]
    return None
