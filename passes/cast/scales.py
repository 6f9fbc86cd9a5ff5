"""Scales of quantized weights and activations, which a cast leaves in the type in which they were chosen.

A scale is absmax / 127: half precision would underflow for weights that half precision itself holds well.
"""

from __future__ import annotations

from actgraph.graph import Editor, Graph, Node, Use, Value
from actgraph.ops.dtypes import DType

#: Ops that take numbers of one float type and a scale of another; ONNX's own ones give or take the type of the scale.
QUANTIZERS = frozenset({"actgraph.dequantize", "actgraph.quantize", "actgraph.fake_quant"})
_NATIVE = frozenset({"onnx.QuantizeLinear", "onnx.DequantizeLinear"})
_FLOATS = frozenset({DType.F16, DType.BF16, DType.F32, DType.F64})


def is_scale(use: Use) -> bool:
    """Whether a parameter is read as a scale or zero point of codes."""
    if use.node is None:
        return False
    if use.node.op in QUANTIZERS | _NATIVE:
        return use.index > 0
    return scaled_rows(use.node) is not None


def scaled_rows(node: Node) -> Node | None:
    """The product of looked up codes with their scales, if ``node`` looks up the scales (a table packed by ``quantize``)."""
    prim = node.prim
    if prim is None or prim.op != "gather" or node.output.dtype not in _FLOATS or len(node.output.uses) != 1:
        return None
    product = node.output.uses[0].node
    if product is None or product.prim is None or product.prim.op != "mul":
        return None
    other = next((o for o in product.prim.operands if isinstance(o, Value) and o != node.output), None)
    cast = other.producer.prim if other is not None and other.producer is not None else None
    codes = cast.operands[0] if cast is not None and cast.op == "cast" else None
    rows = codes.producer.prim if isinstance(codes, Value) and codes.producer is not None else None
    return product if rows is not None and rows.op == "gather" and rows.output.dtype is DType.I8 else None


def dequantize_to(editor: Editor, graph: Graph, target: DType) -> tuple[int, int]:
    """Make what is dequantized come out in ``target``; how many dequantizers were replaced and how many casts inserted."""
    replaced = inserted = 0
    for node in list(graph.nodes()):
        if node.op == "actgraph.dequantize" and node.output.dtype is not target:
            attributes = {**node.attributes, "dtype": str(target)}
            made = editor.insert("actgraph.dequantize", node.operands, attributes, before=node, like=node)
            editor.redirect(node.output, made.output)
            replaced += 1
        product = scaled_rows(node)
        if product is not None and product.output.dtype is not target:
            made = editor.insert("cast", [product.output], {"to": target}, after=product)
            editor.redirect(product.output, made.output)
            inserted += 1
    if replaced:
        editor.erase_dead()
    return replaced, inserted
