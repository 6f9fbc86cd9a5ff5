"""Inserting nodes: registry ops with their function bodies, and the names of the shared vocabulary as standard ops."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from actgraph.errors import OptionError, UnsupportedError
from actgraph.graph.onnx_native import native_type, plain_attributes, registered, registry_attributes
from actgraph.ops.body import SINCE
from actgraph.ops.dtypes import DType
from actgraph.ops.registry import DOMAIN, OPSET_VERSION, REQUIRED, OpDef, get_op
from actgraph.ops.shapes import Dim, TensorType

if TYPE_CHECKING:
    from actgraph.graph.onnx import OnnxGraph
    from actgraph.graph.onnx_edit import Operands, Place
    from actgraph.graph.provenance import Origin


# --- registry ops -----------------------------------------------------------------------------------------------------


def insert_registered(
    place: Place, op: str, operands: Operands, attributes: Mapping[str, Any], name: str, origin: Origin
) -> ir.Node:
    from actgraph.graph.onnx_edit import infer_new
    from actgraph.graph.onnx_opset import ensure_opset

    graph = place.graph
    definition = get_op(op)
    native = registry_attributes(definition, attributes)
    types = [SINCE.get(kind, 0) for kind in (native_type(value).dtype for value in operands if value is not None) if kind]
    ensure_opset(graph, max([definition.min_opset, *types]), definition.qualified_name)
    for spec, value in zip(definition.inputs, operands, strict=False):
        leader = next((v for s, v in zip(definition.inputs, operands, strict=False) if s.name == spec.same_as), None)
        if leader is not None and value is not None:
            align(graph, native_type(leader).dtype, [value])
    variadic = bool(definition.inputs) and definition.inputs[-1].variadic
    if len(operands) > len(definition.inputs) and not variadic:
        raise UnsupportedError(f"{op} takes {len(definition.inputs)} operands, not {len(operands)}")
    inputs = list(operands)
    while inputs and inputs[-1] is None:
        inputs.pop()
    names = _output_names(graph, name, len(definition.outputs))
    node = ir.Node(
        DOMAIN, definition.onnx_name, inputs, native, outputs=[ir.Value(name=each) for each in names],
        name=graph.unique_node_name(name),
    )  # fmt: skip
    graph.model.opset_imports.setdefault(DOMAIN, OPSET_VERSION)
    infer_new(graph, node)
    attach_body(graph, node)
    return place.put(node, origin)


@functools.lru_cache(maxsize=256)
def _body(name: str, structural: tuple[tuple[str, Any], ...], types: tuple[TensorType | None, ...], opset: int) -> ir.Function:
    """The body of one specialisation. It is never changed, so models share it."""
    from actgraph.ops.body import body_function

    definition = get_op(name)
    # calls give all attributes; the others are set to fixed values, so that a body does not depend on who asked first
    attributes = {a.name: a.default if a.default is not REQUIRED else _ZEROS[a.kind] for a in definition.attributes}
    return body_function(definition, attributes | dict(structural), types, opset)


_ZEROS: dict[str, Any] = {"int": 0, "float": 0.0, "bool": False, "str": "", "ints": (), "floats": ()}


def attach_body(graph: OnnxGraph, node: ir.Node) -> None:
    """Make the model hold the function body of an actgraph node, and the node name its overload."""
    function = body_of(graph, node)
    if function is None:
        return  # an op of another version of actgraph: the body that came with the file stays
    model = graph.model
    node.overload = function.overload
    if function.identifier() not in model.functions:
        model.functions[function.identifier()] = function
        model.ir_version = max(model.ir_version, 10 if function.overload else 8)
        graph._owners = None
    for domain, version in function.opset_imports.items():
        model.opset_imports.setdefault(domain, version)


def body_of(graph: OnnxGraph, node: ir.Node) -> ir.Function | None:
    """The function body that fits an actgraph node as it is; ``None`` for an op that the registry does not have."""
    definition = registered(node.op_type)
    if definition is None:
        return None
    given = plain_attributes(node)
    structural = tuple((a.name, given[a.name]) for a in definition.attributes if a.structural)
    return _body(definition.name, structural, tuple(operand_types(definition, node)), graph.opset)


def operand_types(definition: OpDef, node: ir.Node) -> list[TensorType | None]:
    """Types of all operands of the schema; ``None`` for absent ones."""
    types = [native_type(value) if value is not None else None for value in node.inputs]
    return types + [None] * (len(definition.inputs) - len(types))


def align(graph: OnnxGraph, dtype: DType | None, operands: Operands) -> None:
    """Give constants among ``operands`` that nothing reads yet (numbers a pass wrote) the element type ``dtype``.

    ONNX does not promote: ``Add(f16, f64)`` is an error where torch would compute. Numbers become any kind of number, but
    floats never ints: that is left for the type rule to refuse.
    """
    from actgraph.graph.onnx_edit import constant_array, set_parameter

    if dtype is None or not (dtype.is_float or dtype.is_integer):
        return
    for value in operands:
        old = native_type(value).dtype if value is not None and is_fresh(graph, value) else None
        data = constant_array(value)
        if value is None or data is None or old is None or old == dtype:
            continue
        if (old.is_float and dtype.is_float) or old.is_integer:
            set_parameter(graph, value, data.astype(dtype.numpy))


def is_fresh(graph: OnnxGraph, value: ir.Value) -> bool:
    """Whether ``value`` is a constant that nothing reads yet."""
    return value.is_initializer() and not value.uses() and not value.is_graph_output() and value.name not in graph.optional


def _output_names(graph: OnnxGraph, name: str, count: int) -> list[str]:
    names = [name] if count == 1 else [f"{name}_{index}" for index in range(count)]
    return [graph.unique_value_name(each) for each in names]


# --- the shared vocabulary --------------------------------------------------------------------------------------------


class _Writer:
    """Writes standard nodes at one place under one name and origin. Only the last node gets the name itself."""

    def __init__(self, place: Place, name: str, origin: Origin) -> None:
        self.place = place
        self.graph = place.graph
        self.name = name
        self.origin = origin
        self.steps = 0

    def node(self, op_type: str, inputs: Operands, last: bool = False, **attributes: Any) -> ir.Node:
        from actgraph.graph.onnx_edit import DEFAULT_OPSET, infer_new
        from actgraph.graph.onnx_native import as_attribute

        self.graph.model.opset_imports.setdefault("", DEFAULT_OPSET)
        name = self.name if last else f"{self.name}.{op_type.lower()}_{self.steps}"
        self.steps += 1
        node = ir.Node(
            "", op_type, inputs, [as_attribute(key, value) for key, value in attributes.items()],
            outputs=[ir.Value(name=self.graph.unique_value_name(name))], name=self.graph.unique_node_name(name),
        )  # fmt: skip
        infer_new(self.graph, node)
        return self.place.put(node, self.origin)

    def constant(self, data: Any, dtype: Any = np.int64) -> ir.Value:
        from actgraph.graph.onnx_edit import add_parameter

        return add_parameter(self.graph, f"{self.name}.const_{self.steps}", np.array(data, dtype))


_Rule = Callable[[_Writer, Sequence[ir.Value | None], dict[str, Any]], ir.Node]


def insert_vocabulary(
    place: Place, op: str, operands: Operands, attributes: Mapping[str, Any], name: str, origin: Origin
) -> ir.Node:
    rule = _RULES.get(op)
    if rule is None:
        raise UnsupportedError(f"{op!r} cannot be inserted into an ONNX graph", f"insertable ops are {', '.join(_RULES)}")
    if op in _PROMOTING:
        values = operands[1:] if op == "where" else operands
        leader = next((v for v in values if v is not None and not is_fresh(place.graph, v)), None)
        align(place.graph, native_type(leader).dtype if leader is not None else None, values)
    rest = dict(attributes)
    node = rule(_Writer(place, name, origin), operands, rest)
    if rest:
        raise OptionError(f"{op} has no attribute {next(iter(rest))!r}")
    return node


def _plain(op_type: str) -> _Rule:
    def rule(write: _Writer, operands: Operands, attributes: dict[str, Any]) -> ir.Node:
        return write.node(op_type, operands, last=True)

    return rule


def _cast(write: _Writer, operands: Operands, attributes: dict[str, Any]) -> ir.Node:
    return write.node("Cast", operands, last=True, to=DType.of(attributes.pop("to")))


def _clip(write: _Writer, operands: Operands, attributes: dict[str, Any]) -> ir.Node:
    x, low, high = (*operands, None, None)[:3]
    if write.graph.opset >= 11:
        return write.node("Clip", _trim([x, low, high]), last=True)
    last = "Min" if high is not None else "Max"
    if low is None and high is None:
        return write.node("Identity", [x], last=True)
    if low is not None:
        x = write.node("Max", [x, low], last=last == "Max").outputs[0]
        if high is None:
            producer = x.producer()
            assert producer is not None
            return producer
    return write.node("Min", [x, high], last=True)


def _where(write: _Writer, operands: Operands, attributes: dict[str, Any]) -> ir.Node:
    if write.graph.opset < 9:
        from actgraph.graph.onnx_opset import ensure_opset

        ensure_opset(write.graph, 9, "where")
    return write.node("Where", operands, last=True)


def _transpose(write: _Writer, operands: Operands, attributes: dict[str, Any]) -> ir.Node:
    return write.node("Transpose", operands, last=True, perm=tuple(int(axis) for axis in attributes.pop("perm")))


def _concat(write: _Writer, operands: Operands, attributes: dict[str, Any]) -> ir.Node:
    return write.node("Concat", operands, last=True, axis=int(attributes.pop("axis")))


def _gather(write: _Writer, operands: Operands, attributes: dict[str, Any]) -> ir.Node:
    return write.node("Gather", operands, last=True, axis=int(attributes.pop("axis", 0)))


def _softmax(write: _Writer, operands: Operands, attributes: dict[str, Any]) -> ir.Node:
    return write.node("Softmax", operands, last=True, axis=int(attributes.pop("axis", -1)))


def _slice(write: _Writer, operands: Operands, attributes: dict[str, Any]) -> ir.Node:
    axis, start = int(attributes.pop("axis")), int(attributes.pop("start", 0))
    end, step = int(attributes.pop("end", np.iinfo(np.int64).max)), int(attributes.pop("step", 1))
    if write.graph.opset < 10:
        if step != 1:
            raise UnsupportedError("opset below 10 has no strided slice", "raise the opset of the model")
        return write.node("Slice", operands, last=True, axes=(axis,), starts=(start,), ends=(end,))
    bounds = [write.constant([number]) for number in (start, end, axis, step)]
    return write.node("Slice", [*operands, *bounds], last=True)


def _reduction(op_type: str, axes_are_input_from: int) -> _Rule:
    def rule(write: _Writer, operands: Operands, attributes: dict[str, Any]) -> ir.Node:
        axes = tuple(int(axis) for axis in attributes.pop("axes"))
        keepdims = int(attributes.pop("keepdims", True))
        if write.graph.opset >= axes_are_input_from:
            return write.node(op_type, [*operands, write.constant(axes)], last=True, keepdims=keepdims)
        return write.node(op_type, operands, last=True, axes=axes, keepdims=keepdims)

    return rule


def _reshape(write: _Writer, operands: Operands, attributes: dict[str, Any]) -> ir.Node:
    target: list[Dim] = list(attributes.pop("shape"))
    x = operands[0]
    assert x is not None
    source = native_type(x).shape
    return write.node("Reshape", [x, _target_shape(write, x, source, target)], last=True)


def _target_shape(write: _Writer, x: ir.Value, source: tuple[Dim, ...] | None, target: list[Dim]) -> ir.Value:
    """The shape operand of a Reshape to symbolic sizes: 0 copies, one size is -1, the others are read off ``x``."""
    plain: list[int | None] = []
    for axis, size in enumerate(target):
        same = source is not None and axis < len(source) and source[axis] == size
        plain.append(size if isinstance(size, int) and size != 0 else 0 if same and isinstance(size, str) else None)
    open_axes = [axis for axis, size in enumerate(plain) if size is None]
    if 0 in target:
        raise UnsupportedError("cannot reshape to an empty axis")
    if not open_axes:
        return write.constant([size for size in plain if size is not None])
    # one open size can be -1; prefer one that no axis of x has
    elsewhere = [axis for axis in open_axes if source is None or target[axis] not in source]
    if len(elsewhere) > 1 or (len(elsewhere) == 1 and -1 in plain):
        sizes = ", ".join(str(target[axis]) for axis in elsewhere)
        raise UnsupportedError(f"cannot reshape: sizes {sizes} are not sizes of the operand", "at most one size may be new")
    free = elsewhere[0] if elsewhere else (open_axes[-1] if -1 not in plain else None)
    if free is not None:
        plain[free] = -1
    if None not in plain:
        return write.constant([size for size in plain if size is not None])
    assert source is not None
    shape = write.node("Shape", [x]).outputs[0]
    pieces: list[ir.Value] = []
    for axis, size in enumerate(plain):
        if size is not None:
            pieces.append(write.constant([size]))
        else:
            index = write.constant([source.index(target[axis])])
            pieces.append(write.node("Gather", [shape, index], axis=0).outputs[0])
    return write.node("Concat", pieces, axis=0).outputs[0]


#: Ops whose operands share one element type.
_PROMOTING = frozenset({"add", "sub", "mul", "div", "pow", "min", "max", "clip", "where", "matmul", "concat"})


def _trim(operands: list[ir.Value | None]) -> list[ir.Value | None]:
    while operands and operands[-1] is None:
        operands.pop()
    return operands


_RULES: dict[str, _Rule] = {
    "identity": _plain("Identity"), "cast": _cast, "add": _plain("Add"), "sub": _plain("Sub"), "mul": _plain("Mul"),
    "div": _plain("Div"), "where": _where, "clip": _clip, "reshape": _reshape, "transpose": _transpose,
    "matmul": _plain("MatMul"), "pow": _plain("Pow"), "neg": _plain("Neg"), "abs": _plain("Abs"), "sqrt": _plain("Sqrt"),
    "reciprocal": _plain("Reciprocal"), "exp": _plain("Exp"), "log": _plain("Log"), "erf": _plain("Erf"),
    "cos": _plain("Cos"), "sin": _plain("Sin"),
    "relu": _plain("Relu"), "sigmoid": _plain("Sigmoid"), "tanh": _plain("Tanh"), "min": _plain("Min"), "max": _plain("Max"),
    "softmax": _softmax, "concat": _concat, "gather": _gather, "slice": _slice,
    "mean": _reduction("ReduceMean", 18), "sum": _reduction("ReduceSum", 13),
    "amax": _reduction("ReduceMax", 18), "amin": _reduction("ReduceMin", 18),
}  # fmt: skip
