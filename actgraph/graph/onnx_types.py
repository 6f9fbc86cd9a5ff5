"""Types of ONNX values: element types and symbolic shapes, node by node.

Registry ops use their own rule; nodes that compute with shapes (Reshape, Expand, Slice ...) use symbolic rules fed by
``ShapeValues``; everything else goes through onnx's own per-node inference. Nothing is ever serialized but the node at
hand, so a model of any size is typed in one linear walk.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence

import onnx
import onnx_ir as ir

from actgraph.errors import ActgraphError
from actgraph.graph import onnx_rules
from actgraph.graph.onnx_dims import ShapeValues, Sizes
from actgraph.graph.onnx_native import native_type, plain_attributes, registered, set_native_type
from actgraph.graph.onnx_state import graph_attributes
from actgraph.ops.dtypes import DType
from actgraph.ops.registry import DOMAIN
from actgraph.ops.shapes import UNKNOWN, TensorType

Types = list[TensorType]


class TypeConflict(Exception):
    """The operands of a node do not fit together."""


class Inference:
    """Infers types in one model. Results inside function bodies are kept apart, for a body is shared by its calls."""

    def __init__(
        self,
        opsets: Mapping[str, int],
        ir_version: int,
        functions: Mapping[ir.OperatorIdentifier, ir.Function],
        *,
        local: dict[ir.Value, TensorType] | None = None,
        bindings: Mapping[ir.Value, Sizes | None] | None = None,
        call: ir.Node | None = None,
        defaults: Mapping[str, ir.Attr] | None = None,
    ) -> None:
        self.opsets = opsets
        self.ir_version = ir_version
        self.functions = functions
        self._local = local
        self._call = call
        self._defaults = defaults or {}
        self.shapes = ShapeValues(self.type_of, bindings, self.attribute)

    def type_of(self, value: ir.Value | None) -> TensorType:
        if value is None:
            return UNKNOWN
        if self._local is not None:
            return self._local.get(value, UNKNOWN)
        return native_type(value)

    def attribute(self, node: ir.Node, name: str) -> ir.Attr | None:
        """An attribute with references into the calling node resolved."""
        found = node.attributes.get(name)
        if found is None or not found.is_ref():
            return found
        assert found.ref_attr_name is not None
        given = self._call.attributes.get(found.ref_attr_name) if self._call is not None else None
        return given if given is not None else self._defaults.get(found.ref_attr_name)

    def infer(self, node: ir.Node) -> Types:
        """Types of the outputs of ``node``, from those of its operands. Raises TypeConflict."""
        operands = [self.type_of(value) for value in node.inputs]
        try:
            result = self._infer(node, operands)
        except ActgraphError as error:
            raise TypeConflict(str(error)) from error
        except (ValueError, TypeError, IndexError, AttributeError) as error:
            raise TypeConflict(f"{node.op_type} {node.name!r}: {error}") from error
        return (result + [UNKNOWN] * len(node.outputs))[: len(node.outputs)]

    def _infer(self, node: ir.Node, operands: Types) -> Types:
        if node.domain == DOMAIN:
            op = registered(node.op_type)
            if op is None:
                return []
            present = [kind if value is not None else None for kind, value in zip(operands, node.inputs, strict=True)]
            return op.result_types(present, plain_attributes(node))
        special = onnx_rules.standard(self, node, operands)
        if special is not None:
            return special
        function = self.functions.get((node.domain, node.op_type, node.overload))
        if function is not None:
            return self._through(function, node, operands)
        contributed = onnx_rules.contributed(self, node, operands)
        return contributed if contributed is not None else self._by_schema(node, operands)

    # --- onnx's own inference -------------------------------------------------------------------------------------------

    def _by_schema(self, node: ir.Node, operands: Types) -> Types:
        version = self.opsets.get(node.domain)
        schema = _schema(node.op_type, version, node.domain) if version is not None else None
        if schema is None or not schema.has_type_and_shape_inference_function:
            return []
        if any(kind.dtype is None for kind, value in zip(operands, node.inputs, strict=True) if value is not None):
            return []
        proto = onnx.NodeProto(op_type=node.op_type, domain=node.domain)
        types: dict[str, onnx.TypeProto] = {}
        data: dict[str, onnx.TensorProto] = {}
        for index, (value, kind) in enumerate(zip(node.inputs, operands, strict=True)):
            name = f"i{index}" if value is not None else ""
            proto.input.append(name)
            if value is None:
                continue
            types[name] = _type_proto(kind)
            if kind.dtype in (DType.I64, DType.I32) and (known := self.shapes.ints(value)) is not None:
                data[name] = _int_tensor(known, kind)
        proto.output.extend(f"o{index}" for index in range(len(node.outputs)))
        for name in node.attributes:
            attribute = self.attribute(node, name)
            if attribute is not None and attribute.type not in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
                item = ir.serde.serialize_attribute(attribute)
                item.name = name
                proto.attribute.append(item)
        try:
            found = onnx.shape_inference.infer_node_outputs(
                schema, proto, types, data, opset_imports=_imports(tuple(self.opsets.items())), ir_version=self.ir_version
            )
        except (onnx.shape_inference.InferenceError, RuntimeError, onnx.checker.ValidationError) as error:
            raise TypeConflict(f"{node.op_type} {node.name!r}: {str(error).strip().splitlines()[-1]}") from error
        return [_from_proto(found.get(f"o{index}")) for index in range(len(node.outputs))]

    # --- bodies ---------------------------------------------------------------------------------------------------------

    def _through(self, function: ir.Function, node: ir.Node, operands: Types) -> Types:
        local: dict[ir.Value, TensorType] = {}
        bindings: dict[ir.Value, Sizes | None] = {}
        for parameter, value, kind in zip(function.inputs, node.inputs, operands, strict=False):
            local[parameter] = kind
            bindings[parameter] = self.shapes.of(value)
        defaults = {name: attribute for name, attribute in function.attributes.items() if attribute.value is not None}
        inner = Inference(
            function.opset_imports, self.ir_version, self.functions,
            local=local, bindings=bindings, call=node, defaults=defaults,
        )  # fmt: skip
        for step in function:
            local.update(zip(step.outputs, inner.infer(step), strict=True))
        return [local.get(value, UNKNOWN) for value in function.outputs]

    def walk_body(self, body: ir.Graph) -> Types:
        for step in body:
            if self._local is None:
                complete_node(self, step)
            else:
                self._local.update(zip(step.outputs, self.infer(step), strict=True))
        return [self.type_of(value) for value in body.outputs]


# --- writing types back -----------------------------------------------------------------------------------------------


def complete(inference: Inference, nodes: Iterable[ir.Node]) -> None:
    """Fill in what ``nodes`` (in topological order) do not declare; what is declared stays."""
    for node in nodes:
        complete_node(inference, node)


def complete_node(inference: Inference, node: ir.Node) -> None:
    bodies = [body for _, graphs in graph_attributes(node) for body in graphs]
    if not bodies and all(_is_complete(native_type(value)) for value in node.outputs):
        return
    try:
        found = inference.infer(node)
    except TypeConflict:
        return  # a file may hold nodes that no rule understands; their types stay unknown
    for value, kind in zip(node.outputs, found, strict=True):
        if value.type is None or isinstance(value.type, ir.TensorType):
            declared = native_type(value)
            merged = fill(declared, kind)
            if merged != declared:
                set_native_type(value, merged)


def renew(inference: Inference, node: ir.Node) -> bool:
    """Infer the types of ``node`` again because its operands changed. Returns whether any output changed."""
    changed = False
    for value, kind in zip(node.outputs, inference.infer(node), strict=True):
        old = native_type(value)
        new = _supersede(old, kind)
        if new != old:
            set_native_type(value, new)
            changed = True
    return changed


def fill(declared: TensorType, found: TensorType) -> TensorType:
    """``declared`` with its unknown parts taken from ``found``."""
    if declared.shape is None or found.shape is None or len(declared.shape) != len(found.shape):
        shape = declared.shape if declared.shape is not None else found.shape
    else:
        shape = tuple(new if old is None else old for old, new in zip(declared.shape, found.shape, strict=True))
    return TensorType(declared.dtype if declared.dtype is not None else found.dtype, shape)


def _supersede(old: TensorType, new: TensorType) -> TensorType:
    # A symbolic size that inference cannot see (a length that depends on data) was declared by the exporter and is kept;
    # an int that inference cannot confirm may have been changed by the edit, and is not.
    if new.shape is None:
        return TensorType(new.dtype if new.dtype is not None else old.dtype, None)
    shape = new.shape
    if old.shape is not None and len(old.shape) == len(new.shape):
        pairs = zip(old.shape, new.shape, strict=True)
        shape = tuple(o if n is None and isinstance(o, str) else n for o, n in pairs)
    return TensorType(new.dtype if new.dtype is not None else old.dtype, shape)


def _is_complete(kind: TensorType) -> bool:
    return kind.dtype is not None and kind.shape is not None and None not in kind.shape


# --- protobuf ---------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def _schema(op_type: str, version: int, domain: str) -> onnx.defs.OpSchema | None:
    try:
        return onnx.defs.get_schema(op_type, version, domain)
    except onnx.defs.SchemaError:
        return None


@functools.lru_cache(maxsize=64)
def _imports(opsets: tuple[tuple[str, int], ...]) -> list[onnx.OperatorSetIdProto]:
    return [onnx.helper.make_opsetid(domain, version) for domain, version in opsets]


@functools.lru_cache(maxsize=4096)
def _type_proto(kind: TensorType) -> onnx.TypeProto:
    assert kind.dtype is not None
    return onnx.helper.make_tensor_type_proto(kind.dtype.onnx, kind.shape)


def _from_proto(proto: onnx.TypeProto | None) -> TensorType:
    if proto is None or not proto.HasField("tensor_type"):
        return UNKNOWN
    return native_type(ir.serde.deserialize_value_info_proto(onnx.ValueInfoProto(type=proto), None))


def _int_tensor(data: Sequence[int], kind: TensorType) -> onnx.TensorProto:
    assert kind.dtype is not None
    dims = [len(data)] if kind.shape is None or len(kind.shape) == 1 else []
    return onnx.helper.make_tensor("", kind.dtype.onnx, dims if len(data) != 1 or kind.shape != () else [], data)
