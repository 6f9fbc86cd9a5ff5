"""ONNX bodies: an op of the registry written in standard ONNX ops.

A body is built for one opset and one *specialisation* (structural attributes, operand dtypes and ranks, which optional
operands are there), because ONNX functions cannot branch on any of these. Each specialisation is one ``overload`` of the
function ``actgraph::<Name>`` (IR version >= 10). Attributes that do not change the structure (thresholds, scales) stay
attribute references, so one function serves all their values.

``body_function`` gives the function; ``expand`` gives the same nodes with the attributes filled in, for inlining.

Number formats: a body computes in float32 where the operand is float16 or bfloat16 (and in the operand's own type
otherwise) and rounds once at the end, as the torch references do. Engines that lack half-precision kernels then agree
with those that have them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from actgraph.errors import UnsupportedError
from actgraph.ops.dtypes import DType
from actgraph.ops.registry import DOMAIN, OPSET_VERSION, Attributes, AttributeValue, OpDef
from actgraph.ops.shapes import Shape, TensorType

#: The highest opset whose operator set the bodies were written against.
MAX_OPSET = 23
#: Opsets that model-local functions with overloads need.
MIN_IR_VERSION = 10

Number = int | float | bool
#: The opset in which Cast learned an element type.
SINCE = {DType.F8E4M3: 19, DType.F8E5M2: 19, DType.I4: 21, DType.U4: 21}
_COMPARISONS = {"Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "IsNaN", "IsInf"}


@dataclass(frozen=True, eq=False)
class BodyValue:
    """A value inside a body: the native value with what is known of it. Python operators build nodes."""

    builder: BodyBuilder = field(repr=False)
    value: ir.Value
    dtype: DType
    rank: int | None
    shape: Shape | None = None  # known for operands only

    def __add__(self, other: BodyValue | Number) -> BodyValue:
        return self.builder.op("Add", self, other)

    def __sub__(self, other: BodyValue | Number) -> BodyValue:
        return self.builder.op("Sub", self, other)

    def __mul__(self, other: BodyValue | Number) -> BodyValue:
        return self.builder.op("Mul", self, other)

    def __truediv__(self, other: BodyValue | Number) -> BodyValue:
        return self.builder.op("Div", self, other)

    def __lt__(self, other: BodyValue | Number) -> BodyValue:
        return self.builder.op("Less", self, other)

    def __le__(self, other: BodyValue | Number) -> BodyValue:
        return self.builder.op("LessOrEqual", self, other)

    def __gt__(self, other: BodyValue | Number) -> BodyValue:
        return self.builder.op("Greater", self, other)

    def __ge__(self, other: BodyValue | Number) -> BodyValue:
        return self.builder.op("GreaterOrEqual", self, other)

    def equal(self, other: BodyValue | Number) -> BodyValue:
        return self.builder.op("Equal", self, other)


class BodyBuilder:
    """Builds the nodes of one body.

    opset: the opset whose ops may be used.
    literal: with values, attribute references become constants of these values (for inlining).
    """

    def __init__(self, op: OpDef, opset: int, *, literal: Mapping[str, AttributeValue] | None = None, prefix: str = "") -> None:
        self.definition = op
        self.opset = opset
        self.nodes: list[ir.Node] = []
        self.notes: list[str] = []  # further specialisations, part of the overload
        self._literal = literal
        self._prefix = prefix
        self._constants: dict[tuple[str, tuple[int, ...], bytes], BodyValue] = {}

    # --- nodes --------------------------------------------------------------------------------------------------------

    def op(
        self,
        op_type: str,
        *inputs: BodyValue | Number | None,
        dtype: DType | None = None,
        rank: int | None = None,
        attributes: Mapping[str, Any] | None = None,
    ) -> BodyValue:
        """Emit one standard node with one output. Numbers become constants of the first tensor's dtype.

        dtype, rank: of the output; by default the first tensor's dtype (bool for comparisons) and the largest rank.
        """
        return self.multi(op_type, *inputs, dtypes=[dtype], ranks=[rank], attributes=attributes)[0]

    def multi(
        self,
        op_type: str,
        *inputs: BodyValue | Number | None,
        dtypes: Sequence[DType | None],
        ranks: Sequence[int | None],
        attributes: Mapping[str, Any] | None = None,
    ) -> list[BodyValue]:
        """Emit one standard node with ``len(dtypes)`` outputs."""
        tensors = [i for i in inputs if isinstance(i, BodyValue)]
        first = tensors[1] if op_type == "Where" else tensors[0]
        operands = [i if isinstance(i, BodyValue) or i is None else self.const(i, first.dtype) for i in inputs]
        known = [t.rank for t in operands if t is not None]
        widest = None if any(r is None for r in known) else max(r for r in known if r is not None)
        node = ir.Node(
            "",
            op_type,
            [o.value if o is not None else None for o in operands],
            [_attribute(name, value) for name, value in (attributes or {}).items()],
            num_outputs=len(dtypes),
            name=f"{self._prefix}{op_type}_{len(self.nodes)}",
        )
        results = []
        for index, (dtype, rank) in enumerate(zip(dtypes, ranks, strict=True)):
            dtype = dtype or (DType.BOOL if op_type in _COMPARISONS else first.dtype)
            out = node.outputs[index]
            out.name = f"{self._prefix}{op_type.lower()}_{len(self.nodes)}" + (f"_{index}" if index else "")
            out.type = ir.TensorType(ir.DataType(dtype.onnx))
            results.append(BodyValue(self, out, dtype, widest if rank is None else rank))
        self.nodes.append(node)
        return results

    def const(self, value: Any, dtype: DType) -> BodyValue:
        """A constant of ``dtype``; equal constants are shared."""
        with np.errstate(over="ignore"):
            array = np.asarray(value).astype(dtype.numpy)
        key = (dtype.value, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self._constant({"value": ir.Tensor(array, dtype=ir.DataType(dtype.onnx))}, dtype, array.ndim)
        return self._constants[key]

    def ints(self, values: Sequence[int]) -> BodyValue:
        """A 1-D int64 constant, as axes and shapes want it."""
        return self.const(np.asarray(list(values), np.int64), DType.I64)

    def attribute(self, name: str, dtype: DType) -> BodyValue:
        """The attribute ``name`` of the call as a tensor of ``dtype`` (rank 0, or 1 for lists)."""
        declared = next(a for a in self.definition.attributes if a.name == name)
        if declared.structural:
            raise ValueError(f"attribute {name} of {self.definition.qualified_name} is structural: use its value")
        listed = declared.kind in ("ints", "floats")
        stored = DType.F32 if declared.kind in ("float", "floats") else DType.I64
        if self._literal is not None:
            # through the stored type, so that an inlined body computes what a kept one does
            return self.const(np.asarray(self._literal[name], stored.numpy), dtype)
        field_name = "value_" + declared.kind.replace("bool", "int")
        kind = {"int": "INT", "bool": "INT", "float": "FLOAT", "ints": "INTS", "floats": "FLOATS"}[declared.kind]
        reference = ir.RefAttr(field_name, name, ir.AttributeType[kind])
        return self.cast(self._constant_node(reference, stored, 1 if listed else 0), dtype)

    def _constant(self, attributes: Mapping[str, Any], dtype: DType, rank: int) -> BodyValue:
        ((name, value),) = attributes.items()
        return self._constant_node(_attribute(name, value), dtype, rank)

    def _constant_node(self, attribute: ir.Attr, dtype: DType, rank: int) -> BodyValue:
        node = ir.Node("", "Constant", [], [attribute], name=f"{self._prefix}Constant_{len(self.nodes)}")
        out = node.outputs[0]
        out.name = f"{self._prefix}constant_{len(self.nodes)}"
        out.type = ir.TensorType(ir.DataType(dtype.onnx))
        self.nodes.append(node)
        return BodyValue(self, out, dtype, rank)

    # --- what bodies need often -----------------------------------------------------------------------------------------

    def cast(self, x: BodyValue, dtype: DType) -> BodyValue:
        """``x`` as ``dtype``; ``x`` itself where it is that already. Raises UnsupportedError for types newer than the opset."""
        for kind in (dtype, x.dtype):
            if self.opset < SINCE.get(kind, 0):
                raise UnsupportedError(
                    f"opset {self.opset} has no {kind}", f"it needs opset {SINCE[kind]}: lift the model to that"
                )
        return x if x.dtype is dtype else self.op("Cast", x, dtype=dtype, attributes={"to": dtype.onnx})

    def up(self, x: BodyValue) -> BodyValue:
        """``x`` in the type that arithmetic is done in: float64 for float64, else float32."""
        return self.cast(x, compute_dtype(x.dtype))

    def where(self, condition: BodyValue, yes: BodyValue | Number, no: BodyValue | Number) -> BodyValue:
        """``yes`` where the condition holds, else ``no``.

        The sign of a selected zero is not safe: onnxruntime's CPU kernel merges the branches by "the first if it is not
        zero, else the second", in an order that depends on the shapes. -0.0 survives in ``no`` where ``yes`` is a scalar.
        """
        if not isinstance(yes, BodyValue):
            like = no if isinstance(no, BodyValue) else None
            if like is None:
                raise ValueError("where needs one tensor among its branches")
            yes = self.const(yes, like.dtype)
        if not isinstance(no, BodyValue):
            no = self.const(no, yes.dtype)
        return self.op("Where", condition, yes, no, dtype=yes.dtype)

    def reduce(self, op_type: str, x: BodyValue, axes: Sequence[int] | None, keepdims: bool = True) -> BodyValue:
        """``ReduceSum``, ``ReduceMax`` ... over ``axes`` (``None``: all), in the spelling of the opset."""
        rank = x.rank
        if not keepdims and rank is not None:
            rank -= len(axes) if axes is not None else rank
        as_input = self.opset >= (13 if op_type == "ReduceSum" else 18)
        attributes: dict[str, Any] = {"keepdims": int(keepdims)}
        inputs: list[BodyValue | Number | None] = [x]
        if axes is not None and as_input:
            inputs.append(self.ints(axes))
        elif axes is not None:
            attributes["axes"] = list(axes)
        return self.op(op_type, *inputs, dtype=x.dtype, rank=rank, attributes=attributes)

    def unsqueeze(self, x: BodyValue, axes: Sequence[int]) -> BodyValue:
        """Insert axes of size 1; ``axes`` count in the result."""
        return self.op("Unsqueeze", x, self.ints(axes), rank=None if x.rank is None else x.rank + len(axes)) if axes else x

    def reshape(self, x: BodyValue, shape: BodyValue | Sequence[int], rank: int, *, allowzero: bool = False) -> BodyValue:
        target = shape if isinstance(shape, BodyValue) else self.ints(shape)
        return self.op("Reshape", x, target, rank=rank, attributes={"allowzero": 1} if allowzero and self.opset >= 14 else {})

    def transpose(self, x: BodyValue, perm: Sequence[int]) -> BodyValue:
        return x if list(perm) == list(range(len(perm))) else self.op("Transpose", x, attributes={"perm": list(perm)})

    def size(self, x: BodyValue, axis: int) -> BodyValue:
        """The size of one axis, int64 of shape [1]."""
        return self.op("Gather", self.shape(x), self.ints([axis]), rank=1)

    def shape(self, x: BodyValue) -> BodyValue:
        return self.op("Shape", x, dtype=DType.I64, rank=1)

    def concat(self, parts: Sequence[BodyValue], axis: int = 0) -> BodyValue:
        return self.op("Concat", *parts, attributes={"axis": axis})

    def slice(self, x: BodyValue, start: BodyValue, end: BodyValue, axis: int) -> BodyValue:
        return self.op("Slice", x, start, end, self.ints([axis]), rank=x.rank)

    def fill(self, shape: BodyValue, value: Number, dtype: DType, rank: int | None) -> BodyValue:
        """A tensor of ``shape`` full of ``value``."""
        content = ir.Tensor(np.asarray([value], dtype.numpy), dtype=ir.DataType(dtype.onnx))
        return self.op("ConstantOfShape", shape, dtype=dtype, rank=rank, attributes={"value": content})

    def rank_of(self, x: BodyValue) -> int:
        """The rank of ``x``. Raises UnsupportedError where it is not known."""
        if x.rank is None:
            raise UnsupportedError(
                f"the body of {self.definition.qualified_name} needs the rank of its operands", "give the value a shape first"
            )
        return x.rank

    def specialise(self, note: str) -> None:
        """Say that the body depends on something beyond attributes, dtypes and ranks; it becomes part of the overload."""
        self.notes.append(note)


def compute_dtype(dtype: DType) -> DType:
    """The type in which ops compute on operands of ``dtype``."""
    return DType.F64 if dtype is DType.F64 else DType.F32


def _attribute(name: str, value: Any) -> ir.Attr:
    if isinstance(value, ir.Attr):
        return value
    if isinstance(value, ir.Tensor):
        return ir.AttrTensor(name, value)
    if isinstance(value, (bool, int)):
        return ir.AttrInt64(name, int(value))
    if isinstance(value, float):
        return ir.AttrFloat32(name, value)
    if isinstance(value, str):
        return ir.AttrString(name, value)
    values = list(value)
    if any(isinstance(v, float) for v in values):
        return ir.AttrFloat32s(name, [float(v) for v in values])
    return ir.AttrInt64s(name, [int(v) for v in values])


def onnx_attributes(op: OpDef, attributes: Mapping[str, Any]) -> list[ir.Attr]:
    """The attributes of an ONNX node of ``op``: all of them, defaults written out, in the order of definition."""
    return [_typed_attribute(op, name, value) for name, value in op.complete(attributes).items()]


def _typed_attribute(op: OpDef, name: str, value: AttributeValue) -> ir.Attr:
    kind = next(a.kind for a in op.attributes if a.name == name)
    if kind == "ints":
        return ir.AttrInt64s(name, list(value))  # type: ignore[arg-type]
    if kind == "floats":
        return ir.AttrFloat32s(name, list(value))  # type: ignore[arg-type]
    return _attribute(name, value)


def _checked_opset(op: OpDef, opset: int) -> int:
    if opset < op.min_opset:
        raise UnsupportedError(
            f"{op.qualified_name} has no body at opset {opset}", f"it needs opset {op.min_opset}: lift the model to that"
        )
    return opset


def _operand(builder: BodyBuilder, name: str, value: ir.Value, kind: TensorType) -> BodyValue:
    if kind.dtype is None:
        raise UnsupportedError(
            f"operand {name!r} of {builder.definition.qualified_name} has no known element type",
            "run shape inference on the model first",
        )
    return BodyValue(builder, value, kind.dtype, kind.rank, kind.shape)


def overload_name(
    op: OpDef, attributes: Attributes, operand_types: Sequence[TensorType | None], notes: Sequence[str] = ()
) -> str:
    """The name of a specialisation: dtype and rank of each operand, then the structural attributes that are not default."""
    parts = [
        "none" if t is None else f"{t.dtype.value if t.dtype else 'any'}r{'x' if t.rank is None else t.rank}"
        for t in operand_types
    ]
    for attribute in op.attributes:
        value = attributes[attribute.name]
        if attribute.structural and value != attribute.default:
            text = "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
            parts.append(f"{attribute.name}_{text}")
    text = "_".join([*parts, *notes]).replace(">=", "ge").replace(">", "gt").replace("-", "m")
    return re.sub(r"\W", "_", text)


def _padded(op: OpDef, operand_types: Sequence[TensorType | None]) -> list[TensorType | None]:
    if op.inputs and op.inputs[-1].variadic:
        return list(operand_types)
    return [*operand_types, *[None] * (len(op.inputs) - len(operand_types))]


def _operand_names(op: OpDef, count: int) -> list[str]:
    names = [operand.name for operand in op.inputs]
    if op.inputs and op.inputs[-1].variadic:
        names[-1:] = [f"{names[-1]}_{i}" for i in range(count - len(names) + 1)]
    return names


def body_function(
    op: OpDef, attributes: Mapping[str, Any], operand_types: Sequence[TensorType | None], opset: int
) -> ir.Function:
    """The ONNX function of one specialisation of ``op``.

    Its inputs are all operands of the op (absent ones stay unused: a call passes ``""``), its attributes are all
    attributes of the op with their values here as defaults. Raises UnsupportedError for an opset that is too old or for
    operands whose dtype is unknown, VerifyError for operands that do not fit.
    """
    complete = op.complete(attributes)
    types = _padded(op, operand_types)
    op.result_types(types, complete)
    builder = BodyBuilder(op, _checked_opset(op, opset))
    inputs = [ir.Value(name=name) for name in _operand_names(op, len(types))]
    for value, kind in zip(inputs, types, strict=True):
        if kind is not None and kind.dtype is not None:
            value.type = ir.TensorType(ir.DataType(kind.dtype.onnx))
    operands = [
        None if kind is None else _operand(builder, value.name or "", value, kind)
        for value, kind in zip(inputs, types, strict=True)
    ]
    results = op.body(builder, operands, complete)
    outputs = _named_outputs(op, builder, results, inputs)
    graph = ir.Graph(inputs, outputs, nodes=_live(builder.nodes, outputs), opset_imports={"": opset}, name=op.onnx_name)
    return ir.Function(
        DOMAIN,
        op.onnx_name,
        overload_name(op, complete, types, builder.notes),
        graph=graph,
        attributes=[_typed_attribute(op, name, value) for name, value in complete.items()],
    )


def _named_outputs(op: OpDef, builder: BodyBuilder, results: Sequence[BodyValue], inputs: Sequence[ir.Value]) -> list[ir.Value]:
    outputs: list[ir.Value] = []
    for name, result in zip(op.outputs, results, strict=True):
        if any(result.value is v for v in [*inputs, *outputs]):  # a function may not return its input
            result = builder.op("Identity", result)
        result.value.name = name if name not in {v.name for v in inputs} else f"{name}_out"
        outputs.append(result.value)
    return outputs


def _live(nodes: Sequence[ir.Node], outputs: Sequence[ir.Value]) -> list[ir.Node]:
    """``nodes`` without those that nothing reads."""
    needed = {id(v) for v in outputs}
    kept = []
    for node in reversed(nodes):
        if any(id(v) in needed for v in node.outputs):
            kept.append(node)
            needed.update(id(v) for v in node.inputs if v is not None)
        else:
            for index in range(len(node.inputs)):
                node.replace_input_with(index, None)
    return kept[::-1]


def expand(
    op: OpDef,
    attributes: Mapping[str, Any],
    operands: Sequence[ir.Value | None],
    operand_types: Sequence[TensorType | None],
    opset: int,
    *,
    prefix: str = "",
) -> tuple[list[ir.Node], list[ir.Value]]:
    """The body as plain nodes that read ``operands``, attributes filled in, and its output values.

    The nodes belong to no graph yet and are in topological order. ``prefix`` goes before every node and value name.
    """
    complete = op.complete(attributes)
    types = _padded(op, operand_types)
    values = [*operands, *[None] * (len(types) - len(operands))]
    builder = BodyBuilder(op, _checked_opset(op, opset), literal=complete, prefix=prefix)
    wrapped = [
        None if value is None or kind is None else _operand(builder, name, value, kind)
        for name, value, kind in zip(_operand_names(op, len(types)), values, types, strict=True)
    ]
    results = list(op.body(builder, wrapped, complete))
    present = [v for v in values if v is not None]
    results = [builder.op("Identity", r) if any(r.value is v for v in present) else r for r in results]
    outputs = [r.value for r in results]
    return _live(builder.nodes, outputs), outputs


def function_opsets(opset: int) -> dict[str, int]:
    """The opset imports of a model that calls our functions."""
    return {"": opset, DOMAIN: OPSET_VERSION}
