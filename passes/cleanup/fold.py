"""Constant folding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from actgraph.errors import UnsupportedError
from actgraph.graph import Graph, Node, Value
from actgraph.graph.evaluate import evaluate_node
from actgraph.graph.graph import Array
from actgraph.pipeline.base import Pass, PassContext, PassResult

#: Ops whose result stands for a packed weight: folding them would undo the packing.
_KEEP = frozenset({"actgraph.dequantize", "onnx.DequantizeLinear", "onnx.QuantizeLinear"})


class FoldConstants(Pass):
    """Evaluate nodes that depend on constants alone, where the result is small or no larger than the constants it frees."""

    name: ClassVar[str] = "fold"
    family: ClassVar[str] = "cleanup"
    preserves: ClassVar[frozenset[str]] = frozenset({"values"})
    repeatable: ClassVar[bool] = True
    may_do_nothing: ClassVar[bool] = True

    limit: int = Field(default=1024, ge=1, description="Largest result in elements that may grow the model.")
    weights: bool = Field(default=True, description="Fold what is larger as well where it frees as much (a transposed weight).")

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        result = PassResult()
        known: dict[Value, Array] = {}
        with context.edit(graph) as editor:
            nodes = list(graph.nodes())
            for node in nodes:
                prim = node.prim
                if prim is None or prim.op == "random" or node.op in _KEEP or not node.outputs:
                    continue
                present = [operand for operand in node.operands if operand is not None]
                if not all(operand.is_parameter or operand in known for operand in present):
                    continue
                size = _elements(node.outputs[0])
                if size is None or size > max(self.limit, _freed(node, present) if self.weights else 0):
                    continue
                arrays = [None if o is None else known[o] if o in known else graph.read(o) for o in node.operands]
                try:
                    outputs = evaluate_node(graph, node, arrays)
                except (UnsupportedError, RuntimeError, ValueError, TypeError, NotImplementedError) as error:
                    result.messages.append(f"kept {node.name}: {str(error).splitlines()[0]}")
                    continue
                known.update(zip(node.outputs, outputs, strict=False))
            for value, array in known.items():
                if all(use.node is not None and all(o in known for o in use.node.outputs) for use in value.uses):
                    continue  # only folded nodes read it
                constant = editor.add_parameter(f"{value.name}_folded", array, buffer=True)
                editor.redirect(value, constant)
                result.counts["folded"] += 1
            if editor.touched:
                editor.erase_dead()
        return result


def _freed(node: Node, operands: Sequence[Value]) -> int:
    """The elements of the operands that nothing but ``node`` reads."""
    return sum(_elements(operand) or 0 for operand in operands if all(use.node == node for use in operand.uses))


def _elements(value: Value) -> int | None:
    count = 1
    for size in value.shape if value.shape is not None else (None,):
        if not isinstance(size, int):
            return None
        count *= size
    return count
