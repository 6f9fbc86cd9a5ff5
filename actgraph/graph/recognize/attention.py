"""Attention: one fused operator, or products, scale, mask and softmax written out.

``query``, ``key`` and ``value`` are what the attention itself reads. From there the projections are found by walking back
over everything (rotary embeddings, norms, head expansion) to linear layers: ``q`` is the first value on that way through
which all of the query flows and none of key and value. For separate projections that is the linear's output; for a fused
one, its slice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from actgraph.graph.graph import Node, Value
from actgraph.graph.prims import Prim
from actgraph.graph.recognize.linear import by_output
from actgraph.graph.recognize.projections import out_projection, projections
from actgraph.graph.recognize.semantic import Operand, Semantics
from actgraph.graph.views import Attention, Linear
from actgraph.ops.registry import DOMAIN

#: Numbers this far below zero mean "not allowed" in an additive mask.
_FORBIDDEN = -1e4


@dataclass
class _Core:
    """The attention proper."""

    nodes: list[Node]
    query: Value
    key: Value
    value: Value
    mask: Value | None
    scale: float
    is_causal: bool
    output: Value
    pattern: Value | None = None
    softcap: float | None = None
    mask_excludes: bool = False
    biases: tuple[Value, ...] = ()
    heads: int | None = None
    kv_heads: int | None = None
    key_by_token: bool = False  # the key is [batch, seq, heads, head]: its transposes were merged


def attentions(semantics: Semantics, linears: list[Linear]) -> list[Attention]:
    """All attentions, in the order of the nodes that produce their outputs."""
    outputs = by_output(semantics, linears)
    inputs = {(linear.input.node, linear.input.index): linear for linear in linears}
    found = []
    for node, prim in zip(semantics.nodes, semantics.prims, strict=True):
        if node.op == f"{DOMAIN}.attention_pattern":
            core = _taken_apart(semantics, node)
        elif prim is not None and prim.op in ("sdpa", "softmax"):
            core = _fused(semantics, prim) if prim.op == "sdpa" else _written_out(semantics, prim)
        else:
            continue
        attention = _complete(semantics, core, outputs, inputs) if core is not None else None
        if attention is not None:
            found.append(attention)
    return sorted(found, key=lambda attention: semantics.position(attention.output))


# --- the core -----------------------------------------------------------------------------------------------------------


def _fused(s: Semantics, prim: Prim) -> _Core | None:
    query, key, value, mask = (prim.operands[i] if i < len(prim.operands) else None for i in range(4))
    scale = prim.attributes["scale"]
    if not (isinstance(query, Value) and isinstance(key, Value) and isinstance(value, Value)) or scale is None:
        return None
    nodes = [prim.node]
    query, query_scale = _unscaled(s, query, nodes)
    key, key_scale = _unscaled(s, key, nodes)
    core = _Core(
        nodes, query, key, value, None, tidy(scale * query_scale * key_scale), prim.attributes["is_causal"], prim.output,
        heads=prim.attributes.get("heads"), kv_heads=prim.attributes.get("kv_heads"),
        softcap=prim.attributes.get("softcap") or None,
    )  # fmt: skip
    if isinstance(mask, Value):
        _set_mask(s, core, mask)
    return core


def _taken_apart(s: Semantics, node: Node) -> _Core | None:
    """An attention whose pattern a pass has materialised (``actgraph.attention_pattern``)."""
    query, key, mask = (*node.operands, None)[:3]
    assert query is not None and key is not None
    nodes, current = [node], node.output
    for _ in range(8):
        step: Value | None = None
        for read in s.readers(current):
            mixed = read.node.op == f"{DOMAIN}.attention_mix" or (read.prim is not None and read.prim.op == "matmul")
            value = read.node.operands[1] if mixed and len(read.node.operands) > 1 else None
            if value is not None and value != read.value:
                nodes.append(read.node)
                scale, causal = tidy(node.attributes["scale"]), bool(node.attributes.get("is_causal", False))
                core = _Core(nodes, query, key, value, None, scale, causal, read.node.output, pattern=current)
                if mask is not None:
                    _set_mask(s, core, mask)
                return core
            step = s.edits(read) or step
        if step is None:
            return None
        current = step
    return None


def _unscaled(s: Semantics, value: Value, nodes: list[Node]) -> tuple[Value, float]:
    """The value before multiplications by numbers right before the product, and their product."""
    scale = 1.0
    while True:
        value = s.root(value)
        factor = _factor(s.prim(value), s)
        if factor is None:
            return value, scale
        position = s.position(value)
        nodes.append(s.nodes[position])
        value, scale = factor[0], scale * factor[1]


def _factor(prim: Prim | None, s: Semantics) -> tuple[Value, float] | None:
    """``(x, c)`` of a node that computes ``c * x``."""
    if prim is None or prim.op not in ("mul", "div"):
        return None
    a, b = prim.operands
    if isinstance(a, Value) and (number := _number(s, b)) is not None:
        return (a, number if prim.op == "mul" else 1 / number) if number else None
    if prim.op == "mul" and isinstance(b, Value) and (number := _number(s, a)) is not None:
        return b, number
    return None


def _number(s: Semantics, operand: Operand) -> float | None:
    """A factor that is a number, or is computed from fixed sizes (old exporters write ``sqrt(head_dim)`` so)."""
    number = s.number(operand)
    if number is not None:
        return float(number)
    return _static(s, operand, 12) if isinstance(operand, Value) and operand in s.shape_only else None


def _static(s: Semantics, operand: Operand, steps: int) -> float | None:
    """The number that a chain of casts, roots and divisions makes of one fixed size; ``None`` for any other value."""
    if not isinstance(operand, Value):
        return float(operand) if isinstance(operand, (int, float)) else None
    prim = s.prim(operand)
    if prim is None or steps == 0 or not prim.operands:
        return None
    if prim.op in ("identity", "cast", "reshape", "sqrt", "reciprocal"):
        number = _static(s, prim.operands[0], steps - 1)
        if number is None:
            return None
        return math.sqrt(number) if prim.op == "sqrt" else 1 / number if prim.op == "reciprocal" else number
    if prim.op in ("mul", "div", "pow"):
        left, right = (_static(s, o, steps - 1) for o in prim.operands[:2])
        if left is None or right is None:
            return None
        return left * right if prim.op == "mul" else left / right if prim.op == "div" else float(left**right)
    if prim.op in ("gather", "slice"):
        sizes = s.prim(prim.operands[0])
        source = sizes.operands[0] if sizes is not None and sizes.op == "shape_of" else None
        index = prim.operands[1] if prim.op == "gather" else prim.attributes["start"]
        shape = source.shape if isinstance(source, Value) else None
        if shape is None or not isinstance(index, int) or not -len(shape) <= index < len(shape):
            return None
        size = shape[index]
        return float(size) if isinstance(size, int) else None
    return None


def tidy(scale: float) -> float:
    """``scale`` without the rounding of the file it came from: ``1/sqrt(n)`` where it is one, else six digits."""
    if scale > 0:
        n = round(1 / scale**2)
        if n > 0 and abs(scale * math.sqrt(n) - 1) < 1e-6:
            return float(n**-0.5)
    return float(f"{scale:.6g}")


def _written_out(s: Semantics, softmax: Prim) -> _Core | None:
    """The attention whose distribution ``softmax`` computes."""
    x = softmax.operands[0]
    rank = softmax.output.type.rank
    if not isinstance(x, Value) or (rank is not None and softmax.attributes["axis"] not in (rank - 1, -1)):
        return None
    after = _product_of_pattern(s, softmax)
    before = _scores(s, x)
    if after is None or before is None:
        return None
    pattern, value, output, nodes = after
    core = before
    core.nodes += [softmax.node, *nodes]
    core.pattern, core.value, core.output = pattern, value, output
    return core


def _product_of_pattern(s: Semantics, softmax: Prim) -> tuple[Value, Value, Value, list[Node]] | None:
    """``(pattern, value, output, nodes)``: the guard against rows without a key, and the product with the values."""
    pattern, nodes = softmax.output, []
    current = pattern
    for _ in range(6):
        reads = list(s.readers(current, casts=True))
        guards = [r for r in reads if r.prim is not None and r.prim.op == "isnan"]
        rest = [r for r in reads if r not in guards]
        if not rest or len({r.position for r in rest}) > 1 or rest[0].prim is None:
            return None
        read, prim = rest[0], rest[0].prim
        zeroed = prim.op == "where" and s.number(prim.operands[1]) == 0
        if zeroed and s.same(prim.operands[2], current, casts=True):
            nodes += [*(guard.node for guard in guards[:1]), prim.node]
            pattern = current = prim.output
        elif prim.op == "reshape" or s.edits(read) is not None:
            nodes.append(prim.node)
            current = prim.output
        elif prim.op == "matmul" and prim.operands[0] == read.value:
            value = prim.operands[1]
            if not isinstance(value, Value):
                return None
            return pattern, _with_heads(s, value), _split_heads(s, prim.output), [*nodes, prim.node]
        else:
            return None
    return None


def _with_heads(s: Semantics, value: Value) -> Value:
    """``[batch, heads, seq, head]`` where it was merged to ``[batch * heads, seq, head]`` for the product."""
    prim = s.source(value)
    source = prim.operands[0] if prim is not None and prim.op == "reshape" and value.type.rank == 3 else None
    return source if isinstance(source, Value) and source.type.rank == 4 else value


def _split_heads(s: Semantics, output: Value) -> Value:
    read = s.only_reader(output) if output.type.rank == 3 else None
    if read is None or read.prim is None or read.prim.op != "reshape" or read.prim.output.type.rank != 4:
        return output
    return read.prim.output


def _scores(s: Semantics, x: Value) -> _Core | None:
    """Walk back from the softmax to the product of query and key, collecting scale, mask and soft-capping."""
    scale, softcap, nodes = 1.0, None, []
    masks: list[tuple[Value, bool]] = []
    current: Operand = x
    for _ in range(16):
        if not isinstance(current, Value):
            return None
        current = s.edited(current)
        prim = s.prim(current)
        if prim is None:
            return None
        nodes.append(prim.node)
        factor = _factor(prim, s)
        if factor is not None:
            current, scale = factor[0], scale * factor[1]
        elif prim.op in ("cast", "reshape"):
            current = prim.operands[0]
        elif prim.op == "tanh" and softcap is None:
            softcap, current = scale, prim.operands[0]
        elif prim.op == "add":
            sides = [o for o in prim.operands if isinstance(o, Value)]
            scored = [side for side in sides if _leads_to_product(s, side)]
            if len(sides) != 2 or len(scored) != 1:
                return None
            current = scored[0]
            masks.append((sides[1] if scored[0] is sides[0] else sides[0], False))
        elif prim.op == "where" and isinstance(prim.operands[0], Value):
            _, a, b = prim.operands
            if _forbids(s, b):
                current = a
                masks.append((prim.operands[0], False))
            elif _forbids(s, a):
                current = b
                masks.append((prim.operands[0], True))
            else:
                return None
        elif prim.op == "matmul":
            return _product(s, prim, scale, softcap, masks, nodes)
        else:
            return None
    return None


def _leads_to_product(s: Semantics, value: Value) -> bool:
    """Whether a term of the scores is the product of query and key (and not a mask or position bias)."""
    current: Operand = value
    for _ in range(12):
        if not isinstance(current, Value):
            return False
        current = s.edited(current)
        prim = s.prim(current)
        if prim is None:
            return False
        if prim.op == "matmul":
            a, b = prim.operands[:2]
            return isinstance(a, Value) and isinstance(b, Value) and s.is_data(a) and s.is_data(b)
        factor = _factor(prim, s)
        if factor is not None:
            current = factor[0]
        elif prim.op in ("cast", "reshape", "tanh"):
            current = prim.operands[0]
        elif prim.op == "add":
            return any(isinstance(o, Value) and _leads_to_product(s, o) for o in prim.operands)
        elif prim.op == "where":
            current = prim.operands[1] if isinstance(prim.operands[1], Value) else prim.operands[2]
        else:
            return False
    return False


def _product(
    s: Semantics, prim: Prim, scale: float, softcap: float | None, masks: list[tuple[Value, bool]], nodes: list[Node]
) -> _Core | None:
    left, right = prim.operands[:2]
    if not isinstance(left, Value) or not isinstance(right, Value) or not s.is_data(left) or not s.is_data(right):
        return None
    query, query_scale = _unscaled(s, left, nodes)
    right, right_scale = _unscaled(s, right, nodes)
    key, by_token = _transposed_key(s, right, nodes)
    if key is None:
        return None
    key, key_scale = _unscaled(s, key, nodes)
    total = tidy(scale * query_scale * right_scale * key_scale)
    query = _with_heads(s, query)
    core = _Core(nodes, query, key, key, None, total, False, prim.output, softcap=softcap, key_by_token=by_token)
    if len(masks) > 1:
        others = [m for m in masks if not _is_causal_mask(s, m[0])]
        core.is_causal, masks = len(others) < len(masks), others
        # Of several terms the outermost is the mask; the others must be numbers, such as a bias by relative position.
        if any(excludes or value.dtype is None or not value.dtype.is_float for value, excludes in masks[1:]):
            return None
        core.biases = tuple(value for value, _ in masks[1:])
    if masks:
        core.mask_excludes = masks[0][1]
        _set_mask(s, core, masks[0][0])
    return core


def _transposed_key(s: Semantics, value: Value, nodes: list[Node]) -> tuple[Value | None, bool]:
    """The key of a transposed one, ``[batch, heads, seq, head]``; the flag tells ``[batch, seq, heads, head]``.

    Stock export transposes through three axes: reshape, transpose, reshape.
    """
    prim = s.prim(s.root(value))
    outer = prim
    if prim is not None and prim.op == "reshape":
        nodes.append(prim.node)
        prim = s.source(prim.operands[0])
    if prim is None or prim.op != "transpose" or not isinstance(prim.operands[0], Value):
        return None, False
    nodes.append(prim.node)
    perm, source = tuple(prim.attributes["perm"]), prim.operands[0]
    rank = len(perm)
    if perm == (*range(rank - 2), rank - 1, rank - 2):
        if rank == 3:
            merged = s.source(source)
            inner = merged.operands[0] if merged is not None and merged.op == "reshape" else None
            if isinstance(inner, Value) and inner.type.rank == 4:
                assert merged is not None
                nodes.append(merged.node)
                return inner, False
        return source, False
    return (source, True) if perm == (0, 2, 3, 1) and outer is prim else (None, False)


def _set_mask(s: Semantics, core: _Core, mask: Value) -> None:
    """Record the mask as the attention means it: a boolean one where the file turned it into numbers."""
    mask = _unexpanded(s, mask)
    prim = s.prim(mask)
    if prim is not None and prim.op == "where" and isinstance(prim.operands[0], Value):
        _, a, b = prim.operands
        if s.number(a) == 0 and _forbids(s, b):
            mask = _unexpanded(s, prim.operands[0])
        elif s.number(b) == 0 and _forbids(s, a):
            mask, core.mask_excludes = _unexpanded(s, prim.operands[0]), True
    if core.mask_excludes:
        inverted = s.prim(mask)
        if inverted is not None and inverted.op == "not" and isinstance(inverted.operands[0], Value):
            mask, core.mask_excludes = s.root(inverted.operands[0]), False
    if _is_causal_mask(s, mask):
        core.is_causal = True
    else:
        core.mask = mask


def _forbids(s: Semantics, operand: Operand) -> bool:
    """Whether a score of that number keeps a key out."""
    number = s.number(operand)
    return number is not None and number <= _FORBIDDEN


def _unexpanded(s: Semantics, mask: Value) -> Value:
    """The mask before it was repeated over batch or heads."""
    mask = s.root(mask)
    prim = s.prim(mask)
    if prim is not None and prim.op == "expand" and isinstance(prim.operands[0], Value):
        source = prim.operands[0]
        if source.type.rank == mask.type.rank:
            return _unexpanded(s, source)
    return mask


def _is_causal_mask(s: Semantics, mask: Value) -> bool:
    """Whether the mask is a triangle made from sizes alone."""
    if s.is_data(mask):
        return False
    current: Operand = mask
    for _ in range(8):
        prim = s.source(current, casts=True)
        if prim is None:
            return False
        if prim.op == "trilu":
            return True
        values = [o for o in prim.operands if isinstance(o, Value)]
        if prim.op not in ("eq", "not", "where", "expand", "reshape", "ne") or not values:
            return False
        current = values[0]
    return False


# --- heads and projections --------------------------------------------------------------------------------------------------


def _complete(
    s: Semantics, core: _Core, outputs: dict[Value, Linear], inputs: dict[tuple[Node | None, int], Linear]
) -> Attention | None:
    heads, head_dim = _heads(core.query, core.heads)
    if heads is None or head_dim is None:
        return None
    kv_heads = core.kv_heads or _kv_heads(s, core)
    q, k, v = projections(s, (core.query, core.key, core.value), outputs)
    return Attention(
        nodes=tuple(sorted(dict.fromkeys(core.nodes), key=lambda node: s.position(node.output))),
        query=core.query, key=core.key, value=core.value, mask=core.mask, scale=core.scale, is_causal=core.is_causal,
        heads=heads, kv_heads=kv_heads if kv_heads is not None else heads, head_dim=head_dim, q=q, k=k, v=v,
        pattern=core.pattern, output=core.output, out_projection=out_projection(s, core.output, inputs),
        softcap=core.softcap, mask_excludes=core.mask_excludes, key_by_token=core.key_by_token,
        biases=core.biases,
    )  # fmt: skip


def _heads(query: Value, known: int | None) -> tuple[int | None, int | None]:
    shape = query.shape
    if shape is None or not isinstance(shape[-1], int):
        return None, None
    if known is not None:
        return known, shape[-1] // known
    if len(shape) == 4:
        heads = shape[1]
        return (heads, shape[-1]) if isinstance(heads, int) else (None, None)
    return (1, shape[-1]) if len(shape) == 3 else (None, None)


def _kv_heads(s: Semantics, core: _Core) -> int | None:
    """Heads of the key before they were repeated for the query's groups."""
    value = s.root(core.key)
    axis = 2 if core.key_by_token else 1
    for _ in range(6):
        prim = s.prim(value)
        source = prim.operands[0] if prim is not None and prim.operands else None
        if prim is None or not isinstance(source, Value) or prim.op not in ("reshape", "expand", "repeat", "cast", "identity"):
            break
        if prim.op in ("expand", "repeat") and source.shape is not None and len(source.shape) >= 4:
            heads = source.shape[axis]
            return heads if isinstance(heads, int) else None
        value = s.root(source)
    shape = core.key.shape
    if shape is None or len(shape) != 4:
        return None
    heads = shape[axis]
    return heads if isinstance(heads, int) else None
