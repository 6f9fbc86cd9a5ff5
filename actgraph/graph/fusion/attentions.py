"""Attention over keys and values that are stored in fewer bits, as ``actgraph.attention`` that reads them as they are stored.

Caches of ``kv_cache{storage=int8}`` and ``float16`` are dequantized or cast in front of their attention. With this they never
are: the op takes codes and their scales, or half precision, and a kernel widens what it reads.
"""

from __future__ import annotations

from actgraph.graph.fusion.rewriter import Rewriter
from actgraph.graph.graph import Node, Use, Value
from actgraph.graph.recognize.materialise import PATTERN
from actgraph.ops.dtypes import COMPUTE_FLOATS, DType
from actgraph.ops.registry import DOMAIN, get_op
from actgraph.ops.shapes import TensorType

QUERY, KEY, VALUE, MASK, KEY_SCALE, VALUE_SCALE = range(6)
#: What reads how many tokens there are, and no number of them.
_MEASURES = (f"{DOMAIN}.length", f"{DOMAIN}.positions")


def fuse_attentions(rewriter: Rewriter) -> None:
    """Let every chosen attention read its keys and values where they are stored."""
    for node in rewriter.graph.nodes():
        if node.op == f"{DOMAIN}.attention" and rewriter.chosen([node.output], [Use(node, KEY), Use(node, VALUE)]):
            _fuse(rewriter, node)


def _fuse(rewriter: Rewriter, node: Node) -> None:
    query, key, value, mask, *scales = (*node.operands, *[None] * 6)[:6]
    if query is None or key is None or value is None or query.dtype not in COMPUTE_FLOATS:
        return
    found = [None if scale is not None else _stored(x, query.dtype) for x, scale in zip((key, value), scales, strict=True)]
    if found == [None, None]:
        return
    (key, key_scale), (value, value_scale) = (
        new or old for new, old in zip(found, zip((key, value), scales, strict=True), strict=True)
    )
    editor = rewriter.editor
    operands = [query, key, value, mask, key_scale, value_scale]
    made = editor.insert(node.op, operands, node.attributes, before=node, like=node)
    for place in (QUERY, MASK):
        editor.move_edges(Use(node, place), Use(made, place))
    for place, new in zip((KEY, VALUE), found, strict=True):
        widened = node.operands[place]
        assert widened is not None
        if new is None:
            editor.move_edges(Use(node, place), Use(made, place))
            continue
        editor.forget_edge(Use(node, place), editor.by)  # the widened copy exists no more
        editor.redirect(widened, new[0], [use for use in widened.uses if use.node is not None and use.node.op in _MEASURES])
    heads, keys = ((*x.shape,) if x.shape is not None else (None,) * 4 for x in (query, key))
    editor.make_virtual(node, PATTERN, made, TensorType(query.dtype, (*heads[:3], keys[2])))
    editor.redirect(node.output, made.output)
    rewriter.done("attention")


def _stored(x: Value, compute: DType) -> tuple[Value, Value | None] | None:
    """What ``x`` is widened from and the scales of that; ``None`` where it is not widened, or not for each row alone."""
    node = x.producer
    prim = node.prim if node is not None else None
    if node is None or x.shape is None or len(x.shape) != 4:
        return None
    if node.op == f"{DOMAIN}.dequantize":
        codes, scale, zero = (*node.operands, None)[:3]
        given = get_op("dequantize").complete(node.attributes)
        if codes is None or codes.dtype is not DType.I8 or scale is None or zero is not None or scale.shape is None:
            return None
        rows = given["axis"] in (-1, 3) and given["block_size"] == x.shape[3] and scale.shape[-1] == 1
        return (codes, scale) if rows and len(scale.shape) == 4 else None
    source = prim.operands[0] if prim is not None and prim.op == "cast" else None
    if isinstance(source, Value) and source.dtype in (DType.F16, DType.BF16) and source.dtype.bits < compute.bits:
        return source, None
    return None
