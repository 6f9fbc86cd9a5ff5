"""Products of rows with the weights of each row's own expert, in the three forms that graphs have them.

*Grouped*: one grouped matmul over rows sorted by expert. *Batched*: a batched matmul whose weights were gathered by expert
index. *Split*: rows cut at the ends of each expert's group, multiplied piece by piece and put together again, which is how
a grouped matmul is written in standard ONNX ops.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from actgraph.graph.graph import Node, Value
from actgraph.graph.prims import Prim
from actgraph.graph.recognize.semantic import Operand, Semantics


@dataclass(frozen=True)
class ExpertProduct:
    """One product. rows: its input, ``[rows, in]``; index: expert indices or group sizes; output: ``[rows, out]``.

    weights: the stack of the experts' matrices, ``[experts, ., .]``: a constant. parts: the matmuls of the split form, which
    are not linears of their own.
    """

    rows: Value
    index: Value
    output: Value
    experts: int
    weights: Value
    parts: tuple[Node, ...] = ()


def expert_products(semantics: Semantics) -> list[ExpertProduct]:
    """All expert products, in the order of their outputs."""
    found = [p for prim in semantics.prims if prim is not None and (p := _product(semantics, prim)) is not None]
    return sorted(found, key=lambda product: semantics.position(product.output))


def expert_parts(semantics: Semantics) -> set[Node]:
    """The matmuls that multiply by the weights of one expert of a stack."""
    split = (_split(semantics, prim) for prim in semantics.prims if prim is not None and prim.op == "concat")
    return {node for product in split if product is not None for node in product.parts}


def looked_up(s: Semantics, operand: Operand) -> Prim | None:
    """What takes an operand from a stored table, as biases of the rows' experts are."""
    prim = s.source(operand, casts=True)
    found = prim is not None and prim.op in ("index", "gather") and s.is_constant_operand(prim.operands[0])
    return prim if found else None


def _product(s: Semantics, prim: Prim) -> ExpertProduct | None:
    if prim.op == "grouped_matmul":
        return _grouped(s, prim)
    if prim.op == "matmul":
        return _batched(s, prim)
    return _split(s, prim) if prim.op == "concat" else None


def _grouped(s: Semantics, prim: Prim) -> ExpertProduct | None:
    x, weights, index = prim.operands[:3]
    if not (isinstance(x, Value) and isinstance(weights, Value) and isinstance(index, Value) and s.is_constant(weights)):
        return None
    experts = weights.shape[0] if weights.shape is not None and len(weights.shape) == 3 else None
    return ExpertProduct(s.root(x), index, prim.output, experts, weights) if isinstance(experts, int) else None


def _batched(s: Semantics, prim: Prim) -> ExpertProduct | None:
    for weights, x in (prim.operands[:2], prim.operands[1::-1]):
        gathered = _gathered(s, weights)
        if gathered is not None and isinstance(x, Value):
            index, experts, stack = gathered
            return ExpertProduct(_flat(s, x), index, _squeezed(s, prim.output), experts, stack)
    return None


def _gathered(s: Semantics, operand: Operand) -> tuple[Value, int, Value] | None:
    """``(index, experts, weights)`` of weights ``[experts, ., .]`` gathered by expert index."""
    prim = _untransposed(s, operand)
    if prim is None or prim.op not in ("index", "gather") or prim.attributes.get("axis", 0) != 0:
        return None
    source = prim.operands[0]
    index = prim.operands[1] if len(prim.operands) == 2 else None
    if not isinstance(source, Value) or not s.is_constant(source) or not isinstance(index, Value) or s.is_constant(index):
        return None
    if source.shape is None or len(source.shape) != 3:
        return None
    experts = source.shape[0]
    return (_flat(s, index), experts, source) if isinstance(experts, int) else None


def _untransposed(s: Semantics, operand: Operand) -> Prim | None:
    """What makes an operand, transposes looked through."""
    prim = s.source(operand, casts=True)
    for _ in range(4):
        if prim is None or prim.op != "transpose":
            break
        prim = s.source(prim.operands[0], casts=True)
    return prim


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
    """The product's result without the axis of one."""
    read = s.only_reader(output)
    if read is None or read.prim is None or read.prim.op != "reshape":
        return output
    shape, result = output.shape, read.prim.output
    return result if shape is not None and result.shape == tuple(d for d in shape if d != 1) else output


def _split(s: Semantics, prim: Prim) -> ExpertProduct | None:
    """Pieces of a split, each times its own slice of one stack, put together in order (a last piece may belong to none)."""
    parts = list(_parts(s, prim))
    if len(parts) < 2 or len(prim.operands) - len(parts) > 1 or prim.attributes["axis"] != 0:
        return None
    first, (_, split, stack, _) = parts[0], parts[0]
    experts = stack.shape[0] if stack.shape is not None and len(stack.shape) == 3 else None
    same = all(p[1] is split and p[2] == stack and p[3] == number for number, p in enumerate(parts))
    rows, sizes = split.operands[0], split.node.operands[1:2]
    if not same or experts != len(parts) or not isinstance(rows, Value) or not sizes or sizes[0] is None or not first:
        return None
    output, read = prim.output, s.only_reader(prim.output)
    if read is not None and read.prim is not None and read.prim.op == "reshape" and read.prim.output.type.rank == 2:
        output = read.prim.output
    return ExpertProduct(s.root(rows, casts=True), sizes[0], output, len(parts), stack, tuple(p[0].node for p in parts))


def _parts(s: Semantics, prim: Prim) -> Iterator[tuple[Prim, Prim, Value, int]]:
    """``(matmul, split, stack, expert)`` of each leading operand of a concatenation."""
    for operand in prim.operands:
        product = s.source(operand, casts=True)
        if product is not None and product.op == "add":  # an expert's bias
            product = next((p for o in product.operands if (p := s.source(o)) is not None and p.op == "matmul"), None)
        if product is None or product.op != "matmul":
            return
        piece, slice_ = s.source(product.operands[0], casts=True), _untransposed(s, product.operands[1])
        if piece is None or piece.op != "split" or slice_ is None or slice_.op != "gather":
            return
        stack, expert = slice_.operands[:2]
        if not isinstance(stack, Value) or not isinstance(expert, int):
            return
        yield product, piece, s.root(stack, casts=True), expert
