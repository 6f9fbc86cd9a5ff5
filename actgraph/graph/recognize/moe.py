"""Mixtures of experts: a router, and experts as grouped products or as batched products with gathered weights.

An *expert product* multiplies rows by the weights of each row's own expert: one grouped matmul over rows sorted by expert,
or a batched matmul whose weights were gathered by expert index. Two of them with an activation between are the experts.
"""

from __future__ import annotations

from dataclasses import dataclass

from actgraph.graph.graph import Value
from actgraph.graph.prims import Prim
from actgraph.graph.recognize.linear import by_output
from actgraph.graph.recognize.semantic import Operand, Semantics
from actgraph.graph.views import Linear, MixtureOfExperts

_REACH = 24
#: What stands between the products of an expert: an activation, however it is spelled, a gate, and the halves of a fused one.
_BETWEEN = frozenset({
    "reshape", "split", "slice", "clip", "add", "sub", "mul", "div", "pow", "neg", "erf", "tanh", "exp", "relu", "gelu",
    "silu", "sigmoid",
    "softplus", "hardswish", "mish", "where", "min", "max",
})  # fmt: skip


@dataclass(frozen=True)
class _Product:
    """One expert product. rows: its input, ``[rows, in]``; index: expert indices or group ends; output: ``[rows, out]``."""

    prim: Prim
    rows: Value
    index: Value
    output: Value
    experts: int


def mixtures(semantics: Semantics, linears: list[Linear]) -> list[MixtureOfExperts]:
    """All mixtures of experts, in the order of their outputs."""
    products = [p for prim in semantics.prims if prim is not None and (p := _product(semantics, prim)) is not None]
    by_value = {semantics.root(p.output): p for p in products}
    outputs = by_output(semantics, linears)
    found = []
    for product in products:
        if _feeds(semantics, product, by_value):
            mixture = _mixture(semantics, product, outputs)
            if mixture is not None:
                found.append(mixture)
    return sorted(found, key=lambda m: semantics.position(m.output))


def _product(s: Semantics, prim: Prim) -> _Product | None:
    if prim.op == "grouped_matmul":
        x, weights, index = prim.operands[:3]
        if not (isinstance(x, Value) and isinstance(weights, Value) and isinstance(index, Value) and s.is_constant(weights)):
            return None
        experts = weights.shape[0] if weights.shape is not None and len(weights.shape) == 3 else None
        return _Product(prim, s.root(x), index, prim.output, experts) if isinstance(experts, int) else None
    if prim.op != "matmul":
        return None
    for weights, x in (prim.operands[:2], prim.operands[1::-1]):
        gathered = _gathered(s, weights)
        if gathered is not None and isinstance(x, Value):
            index, experts = gathered
            return _Product(prim, _flat(s, x), index, _squeezed(s, prim.output), experts)
    return None


def _gathered(s: Semantics, operand: Operand) -> tuple[Value, int] | None:
    """``(index, experts)`` of weights ``[experts, ., .]`` gathered by expert index."""
    current = operand
    for _ in range(6):
        prim = s.source(current, casts=True)
        if prim is None or not prim.operands:
            return None
        source = prim.operands[0]
        if prim.op == "transpose":
            current = source
            continue
        if prim.op not in ("index", "gather") or prim.attributes.get("axis", 0) != 0 or not isinstance(source, Value):
            return None
        index = prim.operands[1] if len(prim.operands) == 2 else None
        shape = source.shape
        if not s.is_constant(source) or not isinstance(index, Value) or s.is_constant(index):
            return None
        if shape is None or len(shape) != 3:
            return None
        return (_flat(s, index), shape[0]) if isinstance(shape[0], int) else None
    return None


def _flat(s: Semantics, value: Value) -> Value:
    """The value without the axis of one that a batched product or a gather needs."""
    value = s.root(value)
    prim = s.prim(value)
    source = prim.operands[0] if prim is not None and prim.op == "reshape" else None
    if not isinstance(source, Value) or source.shape is None or value.shape is None:
        return value
    dropped = tuple(d for d in value.shape if d != 1) == source.shape and len(source.shape) < len(value.shape)
    return s.root(source) if dropped else value


def _squeezed(s: Semantics, output: Value) -> Value:
    read = s.only_reader(output)
    if read is None or read.prim is None or read.prim.op != "reshape":
        return output
    shape = output.shape
    result = read.prim.output
    return result if shape is not None and result.shape == tuple(d for d in shape if d != 1) else output


def _feeds(s: Semantics, product: _Product, by_value: dict[Value, _Product]) -> bool:
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


def _mixture(s: Semantics, down: _Product, outputs: dict[Value, Linear]) -> MixtureOfExperts | None:
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
            if not any(_is_looked_up(s, operand) for operand in prim.operands):
                break
        elif prim.op not in ("reshape", "transpose") and (summed or prim.op not in ("index", "gather")):
            break
        current = prim.output
    return current, gates


def _is_looked_up(s: Semantics, operand: Operand) -> bool:
    """Whether an operand is taken from a stored table, as the biases of the rows' experts are."""
    prim = s.source(operand, casts=True)
    return prim is not None and prim.op in ("index", "gather") and s.is_constant_operand(prim.operands[0])


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


def _expert_index(s: Semantics, down: _Product) -> Value | None:
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
