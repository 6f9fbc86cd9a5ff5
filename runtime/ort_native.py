"""Writing native nodes into a private ONNX graph that is about to be opened and never edited again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from actgraph.graph.graph import Array, Value
from actgraph.graph.onnx_native import as_attribute
from actgraph.ops.dtypes import DType

#: The domain of onnxruntime's own operators.
CONTRIB = "com.microsoft"
_BY_HEAD = (0, 2, 1, 3)


class Writer:
    """Adds nodes, inputs and weights to ``graph``, and lets readers read something else."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self._count = 0
        self._tables: dict[str, ir.Value] = {}
        self._now: dict[ir.Value, ir.Value] = {}

    def input(self, name: str, dtype: DType, shape: Sequence[int | None]) -> ir.Value:
        value = ir.Value(name=name, type=ir.TensorType(ir.DataType(dtype.onnx)), shape=ir.Shape(list(shape)))
        self.graph.inputs.append(value)
        self._tables[name] = value
        return value

    def existing(self, name: str) -> ir.Value:
        """The input or table of this name."""
        return self._tables[name]

    def table(self, name: str, data: Array) -> ir.Value:
        """The weight ``name``, made when it is first asked for."""
        if name not in self._tables:
            tensor = ir.Tensor(np.ascontiguousarray(data), name=name)
            value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(data.shape), const_value=tensor)
            self.graph.initializers[name] = value
            self._tables[name] = value
        return self._tables[name]

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        before: ir.Node,
        *,
        outputs: int = 1,
        domain: str = "",
        **attributes: Any,
    ) -> list[ir.Value]:
        """Insert a node; returns its outputs."""
        self._count += 1
        name = f"fused.{op_type}_{self._count}"
        made = [ir.Value(name=f"{name}.{index}") for index in range(outputs)]
        native = [as_attribute(key, value) for key, value in attributes.items()]
        node = ir.Node(domain, op_type, list(inputs), native, outputs=made, name=name)
        self.graph.insert_before(before, node)
        return made

    def replace(self, old: ir.Value, new: ir.Value) -> None:
        """Let every reader of ``old`` read ``new``, outputs of the graph included."""
        self._now[old] = new
        new.meta["stands_for"] = old.meta.get("stands_for", old.name)  # whose sites are the new one's
        new.type, new.shape = new.type or old.type, new.shape or old.shape
        for user, index in list(old.uses()):
            user.replace_input_with(index, new)
        for index, output in enumerate(self.graph.outputs):
            if output is old:
                self.graph.outputs[index] = new

    def now(self, value: ir.Value) -> ir.Value:
        """What stands for ``value`` after the replacements so far."""
        while value in self._now:
            value = self._now[value]
        return value

    def finish(self, model: ir.Model) -> None:
        """Remove what nothing reads any more, and declare the operator sets."""
        model.opset_imports.setdefault(CONTRIB, 1)
        outputs = set(self.graph.outputs)
        for node in reversed(list(self.graph)):
            if not any(value.uses() or value in outputs for value in node.outputs):
                self.graph.remove(node, safe=True)
        for value in [value for value in self.graph.inputs if not value.uses() and value not in outputs]:
            self.graph.inputs.remove(value)
        for name, value in list(self.graph.initializers.items()):
            if not value.uses() and value not in outputs and value not in self.graph.inputs:
                del self.graph.initializers[name]

    # --- heads ------------------------------------------------------------------------------------------------------------

    def by_head(self, flat: ir.Value, heads: int, head: int, old: ir.Value, before: ir.Node) -> ir.Value:
        """``flat`` [batch, seq, heads * head] as [batch, heads, seq, head], like ``old``; nothing makes that flat again."""
        for user, _ in list(old.uses()):
            if _permutes(user):
                for reader, index in list(user.outputs[0].uses()):
                    if reader.op_type == "Reshape" and index == 0 and _flattens(reader, heads * head):
                        self.replace(reader.outputs[0], flat)
        shape = self.table(f"fused.by_head_{heads}_{head}", np.array([0, 0, heads, head], np.int64))
        split = self.node("Reshape", [flat, shape], before)[0]
        return self.node("Transpose", [split], before, perm=_BY_HEAD)[0]


def flat_heads(write: Writer, value: Value, before: ir.Node) -> ir.Value:
    """``value`` [batch, heads, seq, head] as [batch, seq, heads * head]: what it was before it was split, where it was."""
    assert value.shape is not None
    heads, head = value.shape[1], value.shape[3]
    assert isinstance(heads, int) and isinstance(head, int)
    native: ir.Value = value.key
    maker = native.producer()
    if maker is not None and _permutes(maker):
        source = maker.inputs[0]
        assert source is not None
        split = source.producer()
        if split is not None and split.op_type == "Reshape" and split.inputs[0] is not None:
            whole = split.inputs[0]
            if whole.shape is not None and len(whole.shape) == 3 and whole.shape[2] == heads * head:
                return whole
    else:
        source = write.node("Transpose", [native], before, perm=_BY_HEAD)[0]
    shape = write.table(f"fused.flat_{heads * head}", np.array([0, 0, heads * head], np.int64))
    return write.node("Reshape", [source, shape], before)[0]


def _permutes(node: ir.Node) -> bool:
    perm = node.attributes.get("perm")
    return node.op_type == "Transpose" and perm is not None and tuple(perm.as_ints()) == _BY_HEAD


def _flattens(node: ir.Node, width: int) -> bool:
    shape = node.outputs[0].shape
    return shape is not None and len(shape) == 3 and shape[2] == width
