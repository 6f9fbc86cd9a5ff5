"""Linear layers: ``aten.linear``, ``addmm``, ``Gemm``, ``MatMul`` and ``Add``, with packed weights and reshapes around."""

from __future__ import annotations

from dataclasses import dataclass

from actgraph.graph.graph import Node, Use, Value
from actgraph.graph.prims import Prim
from actgraph.graph.recognize.experts import expert_parts
from actgraph.graph.recognize.semantic import Operand, Read, Semantics
from actgraph.graph.views import Linear
from actgraph.ops.shapes import Shape


@dataclass(frozen=True)
class Stored:
    """A matrix operand traced back to what is stored: ``value``, its output axis there, and the nodes in between."""

    value: Value
    out_axis: int
    path: tuple[Node, ...]


def linears(semantics: Semantics) -> list[Linear]:
    """All linear layers, in the order of the nodes that produce their outputs."""
    parts = expert_parts(semantics)
    prims = [prim for prim in semantics.prims if prim is not None and prim.node not in parts]
    found = [linear for prim in prims for linear in _linear(semantics, prim)]
    return sorted(found, key=lambda linear: semantics.position(linear.output))


def _linear(s: Semantics, prim: Prim) -> list[Linear]:
    if prim.op == "matmul_integer":
        return _integer_linear(s, prim)
    if prim.op not in ("linear", "matmul"):
        return []
    x, weight = prim.operands[0], prim.operands[1]
    if not isinstance(x, Value) or not isinstance(weight, Value) or x.is_parameter or not s.is_constant(weight):
        return []
    if weight.shape is None or len(weight.shape) != 2 or s.is_constant(x):
        return []
    stored = stored_matrix(s, weight, prim.attributes.get("out_axis", 1))
    bias = prim.operands[2] if prim.op == "linear" else None
    if isinstance(bias, Value) and not (s.is_constant(bias) and _is_vector(bias.shape, _size(weight, prim))):
        return []
    return _complete(s, prim, x, stored, bias if isinstance(bias, Value) else None, _size(weight, prim))


def _size(weight: Value, prim: Prim) -> int | None:
    """Output features, from the shape of the matrix operand."""
    assert weight.shape is not None
    size = weight.shape[prim.attributes.get("out_axis", 1)]
    return size if isinstance(size, int) else None


def stored_matrix(s: Semantics, weight: Value, out_axis: int) -> Stored:
    """Look through transposes, casts and reshapes that keep the matrix, back to the parameter or what dequantizes it."""
    path: list[Node] = []
    while True:
        prim = s.prim(weight)
        source = prim.operands[0] if prim is not None and prim.operands else None
        if prim is None or not isinstance(source, Value) or not s.is_constant(source):
            break
        if prim.op == "transpose" and prim.attributes["perm"] == (1, 0):
            out_axis = 1 - out_axis
        elif not (prim.op in ("identity", "cast") or (prim.op == "reshape" and source.shape == weight.shape)):
            break
        path.append(prim.node)
        weight = source
    return Stored(weight, out_axis, tuple(reversed(path)))


def _complete(s: Semantics, prim: Prim, x: Value, stored: Stored, bias: Value | None, out: int | None) -> list[Linear]:
    """The linear around the product ``prim``: a bias added after it, and rows flattened before and restored after."""
    shape = stored.value.shape
    if out is None or shape is None or len(shape) != 2:
        return []
    width = shape[1 - stored.out_axis]
    if not isinstance(width, int):
        return []
    nodes = [*stored.path, prim.node]
    output = prim.output
    flat = flattened_from(s, x)
    for _ in range(2):
        read = s.only_reader(output)
        added = _added_bias(s, read, output, out) if bias is None and read is not None else None
        if added is not None and read is not None:
            bias, output = added, read.node.output
        elif read is not None and flat is not None and _restores_rows(read, out):
            output, flat = read.node.output, None
        else:
            continue
        nodes.append(read.node)
    edge, before = _input_edge(s, prim, x, stored, restored=prim.output.type.rank != output.type.rank)
    return [
        Linear(
            nodes=(*before, *nodes), input=edge, output=output, weight=stored.value, out_axis=stored.out_axis, bias=bias,
            in_features=width, out_features=out, matrix=Use(prim.node, _weight_index(prim)),
        )
    ]  # fmt: skip


def _weight_index(prim: Prim) -> int:
    weight = prim.operands[1]
    return next(i for i, operand in enumerate(prim.node.operands) if operand == weight)


def _input_edge(s: Semantics, prim: Prim, x: Value, stored: Stored, *, restored: bool) -> tuple[Use, tuple[Node, ...]]:
    """The operand that reads the input: the one that flattens rows where these are restored after the product.

    A flattening that others read too, or that merges features as well, is not part of the linear.
    """
    edge = Use(prim.node, s.operand_index(prim.node, x, skip=stored.value))
    before: list[Node] = []
    while restored:
        flatten = s.prim(x)
        source = flatten.operands[0] if flatten is not None and flatten.operands else None
        if flatten is None or flatten.op not in ("reshape", "identity") or not isinstance(source, Value):
            break
        if s.only_reader(x) is None or not _same_width(source.shape, x.shape):
            break
        x = source
        before.insert(0, flatten.node)
        if flatten.op == "reshape":
            edge = Use(flatten.node, s.operand_index(flatten.node, x))
            return edge, tuple(before)
    return Use(prim.node, edge.index), ()


def flattened_from(s: Semantics, x: Value) -> Value | None:
    """The value of rank 3 or more whose rows the matrix ``x`` holds."""
    if x.shape is None or len(x.shape) != 2:
        return None
    maker = s.source(x)
    source = maker.operands[0] if maker is not None and maker.op == "reshape" else None
    return source if isinstance(source, Value) and source.shape is not None and len(source.shape) > 2 else None


def _same_width(left: Shape | None, right: Shape | None) -> bool:
    return bool(left) and bool(right) and left[-1] == right[-1]  # type: ignore[index]


def _restores_rows(read: Read, out: int) -> bool:
    """Whether a reader gives the rows of a product their batch and sequence axes back."""
    if read.prim is None or read.prim.op != "reshape":
        return False
    shape = read.node.output.shape
    return shape is not None and len(shape) > 2 and shape[-1] == out


def _added_bias(s: Semantics, read: Read, output: Value, out: int) -> Value | None:
    if read.prim is None or read.prim.op != "add" or read.node.output.shape != output.shape:
        return None
    for operand in read.node.operands:
        if operand is not None and operand != read.value and s.is_constant(operand) and _is_vector(operand.shape, out):
            return operand
    return None


def _is_vector(shape: Shape | None, size: int | None) -> bool:
    """Whether a constant of that shape adds one number to each of ``size`` features."""
    return bool(shape) and size is not None and shape[-1] == size and all(d == 1 for d in shape[:-1])  # type: ignore[index]


def _integer_linear(s: Semantics, prim: Prim) -> list[Linear]:
    """onnxruntime's dynamic quantization: quantize rows, multiply integers, cast, scale, add the bias."""
    quantized, weight = prim.operands[0], prim.operands[1]
    maker = s.source(quantized)
    if maker is None or maker.op != "dynamic_quantize" or not isinstance(weight, Value) or not s.is_constant(weight):
        return []
    x = maker.operands[0]
    if not isinstance(x, Value) or weight.shape is None or len(weight.shape) != 2:
        return []
    read = s.only_reader(prim.output)
    if read is None or read.prim is None or read.prim.op != "cast":
        return []
    scaled = s.only_reader(read.node.output)
    if scaled is None or scaled.prim is None or scaled.prim.op != "mul":
        return []
    width, out = weight.shape
    if not isinstance(width, int) or not isinstance(out, int):
        return []
    nodes = [maker.node, prim.node, read.node, scaled.node]
    output, bias = scaled.node.output, None
    added = s.only_reader(output)
    if added is not None:
        bias = _added_bias(s, added, output, out)
        if bias is not None:
            nodes.append(added.node)
            output = added.node.output
    edge = Use(maker.node, s.operand_index(maker.node, x))
    integer = (_weight_scale(s, scaled), _zero_point(prim))
    return [Linear(tuple(nodes), edge, output, weight, 1, bias, width, out, integer=integer)]


def _weight_scale(s: Semantics, scaled: Read) -> Value | None:
    """The constant factor of ``input scale * weight scale``."""
    assert scaled.prim is not None
    for operand in scaled.prim.operands:
        product = s.source(operand) if operand != scaled.value else None
        if product is not None and product.op == "mul":
            return next((o for o in product.node.operands if o is not None and s.is_constant(o)), None)
    return None


def _zero_point(prim: Prim) -> Value | None:
    return as_value(prim.operands[3]) if len(prim.operands) > 3 else None


def by_output(semantics: Semantics, found: list[Linear]) -> dict[Value, Linear]:
    """Linears by output value, with plumbing looked through."""
    return {semantics.root(linear.output): linear for linear in found}


def by_input(semantics: Semantics, found: list[Linear]) -> dict[tuple[Node | None, int], Linear]:
    """Linears by input edge."""
    return {(linear.input.node, linear.input.index): linear for linear in found}


def input_of(linear: Linear) -> Value:
    """The value that the linear reads."""
    node, index = linear.input
    assert node is not None
    value = node.operands[index]
    assert value is not None
    return value


def as_value(operand: Operand) -> Value | None:
    return operand if isinstance(operand, Value) else None
