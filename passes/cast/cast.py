"""Changing the float type that a model computes in."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from actgraph.errors import PassError
from actgraph.graph import Editor, Graph, Node, Use, Value
from actgraph.graph.graph import Array
from actgraph.ops.dtypes import DType
from actgraph.pipeline.base import Pass, PassContext, PassResult


class Cast(Pass):
    """Store weights and compute in ``dtype``; float inputs and outputs keep their types at the border.

    Casts that the model makes itself (norms and rotary angles in float32) stay; where that leaves an op with operands of two
    float types, the wider ones are cast to ``dtype``. Weights beyond the range of float16 are an error, not infinities.
    """

    name: ClassVar[str] = "cast"
    family: ClassVar[str] = "cast"

    dtype: Literal["f16", "bf16", "f32", "f64"] = Field(description="The float type to compute in.")

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        target = DType(self.dtype)
        floats = {parameter.dtype for parameter in graph.parameters() if parameter.dtype in _CASTABLE}
        size = max(_SIZES[dtype] for dtype in {target, *floats} if dtype is not None)
        result = PassResult(expected_change=f"numbers are rounded to {target}", expected_size=size)
        declared = {name: value.dtype for name, value in graph.outputs()}
        with context.edit(graph) as editor:
            for parameter in graph.parameters():
                if parameter.dtype in _CASTABLE and parameter.dtype is not target:
                    editor.set_parameter(parameter, _converted(graph, parameter, target))
                    result.counts["parameters cast"] += 1
            if not result.counts:
                raise PassError(f"cast: every float parameter is {target} already", "drop the pass")
            for value in graph.inputs():
                if value.dtype in _CASTABLE and value.dtype is not target and value.uses:
                    node = editor.insert("cast", [value], {"to": target}, name=f"{value.name}_{target}")
                    editor.redirect(value, node.output, [use for use in value.uses if use.node != node])
                    result.counts["inputs cast"] += 1
            for node in list(graph.nodes()):
                self._unify(editor, node, target, result)
                editor.retype([node], propagate=False)
            for index, (name, value) in enumerate(graph.outputs()):
                if value.dtype is not declared[name] and value.dtype in _CASTABLE:
                    node = editor.insert("cast", [value], {"to": declared[name]}, name=f"{name}_{declared[name]}")
                    editor.redirect(value, node.output, [Use(None, index)])
                    result.counts["outputs cast"] += 1
        return result

    def _unify(self, editor: Editor, node: Node, target: DType, result: PassResult) -> None:
        """Cast the operands of ``node`` that are floats of another type than ``target``, if it has some of both."""
        prim = node.prim
        if prim is not None and prim.op == "cast":
            return
        floats = [(i, o) for i, o in enumerate(node.operands) if o is not None and o.dtype in _CASTABLE]
        kinds = {operand.dtype for _, operand in floats}
        if len(kinds) < 2 or (node.op.startswith("actgraph.") and node.op.endswith("quantize")):
            return
        for index, operand in floats:
            if operand.dtype is target:
                continue
            made = editor.insert("cast", [operand], {"to": target}, before=node)
            editor.redirect(operand, made.output, [Use(node, index)])
            result.counts["casts inserted"] += 1


#: How far outputs may move, relative, when one side computes in this type and the other in a better one.
_SIZES = {DType.F16: 0.1, DType.BF16: 0.5, DType.F32: 1e-3, DType.F64: 1e-3}
_CASTABLE = frozenset(_SIZES)


def _converted(graph: Graph, parameter: Value, target: DType) -> Array:
    data = graph.read(parameter)
    with np.errstate(over="ignore"):
        converted = data.astype(target.numpy)
    if not np.isfinite(converted.astype(np.float64)).all() and np.isfinite(data.astype(np.float64)).all():
        finite = np.abs(data.astype(np.float64)).max()
        raise PassError(f"cast: {parameter.name} holds {finite:.3g}, beyond the range of {target}", "use bf16")
    return np.asarray(converted)
