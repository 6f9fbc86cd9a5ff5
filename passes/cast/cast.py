"""Changing the float type that a model computes in."""

from __future__ import annotations

from collections import Counter
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from actgraph.errors import PassError
from actgraph.graph import Editor, Graph, Node, Use, Value
from actgraph.graph.graph import Array
from actgraph.ops.dtypes import DType
from actgraph.passes.cast.fills import becomes_infinite, clamp_numbers, clamped, is_mask, limit
from actgraph.passes.cast.scales import QUANTIZERS, dequantize_to, is_scale
from actgraph.pipeline.base import Pass, PassContext, PassResult


class Cast(Pass):
    """Store weights and compute in ``dtype``; float inputs and outputs keep their types at the border.

    Casts that the model makes itself (norms in float32) stay, and what only leads to a sine or cosine (the angles of rotary
    positions, which half precision could not tell apart) is computed as before; where that leaves an op with operands of two
    float types, the wider ones are cast to ``dtype``. Numbers that fill masks (-3.4e38 where a key is not allowed) are brought
    into the range of ``dtype``; other weights beyond it are an error, not infinities. Nodes of an ONNX graph whose operator
    does not take ``dtype`` (``Cos`` has no bfloat16 below opset 22) stay in float32, between casts.
    Scales and zero points of quantized weights and activations keep their type, for half precision would underflow; what they
    dequantize comes out in ``dtype``.
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
        angles = _angles(graph) if target in (DType.F16, DType.BF16) else frozenset[Node]()
        with context.edit(graph) as editor:
            for parameter in graph.parameters():
                if parameter.dtype in _CASTABLE and parameter.dtype is not target:
                    uses = [use for use in parameter.uses if not is_scale(use) and use.node not in angles]
                    if uses or not parameter.uses:
                        editor.set_parameter(parameter, _converted(graph, parameter, target), uses=uses)
                        result.counts["parameters cast"] += 1
            replaced, inserted = dequantize_to(editor, graph, target)
            result.counts += Counter({"dequantizers cast": replaced, "casts inserted": inserted})
            if not result.counts:
                raise PassError(f"cast: every float parameter is {target} already", "drop the pass")
            if numbers := clamp_numbers(editor, graph, target):
                result.counts["mask fills clamped"] = numbers
            for value in graph.inputs():
                if value.dtype in _CASTABLE and value.dtype is not target and value.uses:
                    node = editor.insert("cast", [value], {"to": target}, name=f"{value.name}_{target}")
                    editor.redirect(value, node.output, [use for use in value.uses if use.node != node])
                    result.counts["inputs cast"] += 1
            for node in list(graph.nodes()):
                if node not in angles:
                    self._unify(editor, node, target, result)
                operands, results = _refused(graph, node)
                for index in operands:
                    self._insert(editor, node, index, DType.F32, result)
                editor.retype([node], propagate=False)
                for index in results:
                    value = node.outputs[index]
                    made = editor.insert("cast", [value], {"to": target}, after=node)
                    editor.redirect(value, made.output, [use for use in value.uses if use.node != made])
                    result.counts["casts inserted"] += 1
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
        if len(kinds) < 2 or node.op in QUANTIZERS:
            return
        if node.op == "onnx.QuantizeLinear":  # it takes numbers of the type of their scale
            scale = node.operands[1]
            assert scale is not None and scale.dtype is not None
            target = scale.dtype
        for index, operand in floats:
            if operand.dtype is not target:
                self._insert(editor, node, index, target, result)

    def _insert(self, editor: Editor, node: Node, index: int, dtype: DType, result: PassResult) -> None:
        """Cast one operand of ``node``."""
        operand = node.operands[index]
        assert operand is not None
        made = editor.insert("cast", [operand], {"to": dtype}, before=node)
        editor.redirect(operand, made.output, [Use(node, index)])
        result.counts["casts inserted"] += 1


#: How far outputs may move, relative, when one side computes in this type and the other in a better one.
_SIZES = {DType.F16: 0.1, DType.BF16: 0.5, DType.F32: 1e-3, DType.F64: 1e-3}
_CASTABLE = frozenset(_SIZES)


def _angles(graph: Graph) -> frozenset[Node]:
    """Sines and cosines, and the nodes whose results go nowhere else."""
    found: set[Node] = set()
    for node in reversed(graph.nodes()):
        prim = node.prim
        uses = [use for output in node.outputs for use in output.uses]
        if (prim is not None and prim.op in ("cos", "sin")) or (uses and all(use.node in found for use in uses)):
            found.add(node)
    return frozenset(found)


def _converted(graph: Graph, parameter: Value, target: DType) -> Array:
    data = graph.read(parameter)
    beyond = becomes_infinite(data, target)
    if beyond.any() and not is_mask(parameter, data, beyond):
        largest = np.abs(data.astype(np.float64)[beyond]).max()
        wider = next((dtype for dtype in (DType.BF16, DType.F32) if largest <= limit(dtype)), DType.F64)
        raise PassError(f"cast: {parameter.name} holds {largest:.3g}, beyond the range of {target}", f"use {wider}")
    return clamped(data, target)


def _refused(graph: Graph, node: Node) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The operands of ``node`` whose type its ONNX schema excludes, and the outputs that have the same type then."""
    if graph.dialect != "onnx" or (node.prim is not None and node.prim.op == "cast"):
        return (), ()
    from actgraph.graph.onnx import OnnxGraph
    from actgraph.graph.onnx_schema import refused

    assert isinstance(graph, OnnxGraph)
    native = node.key
    dtypes = tuple(operand.dtype if operand is not None else None for operand in node.operands)
    return refused(native.op_type, native.domain, graph.opset, dtypes, len(node.outputs))
