"""Types of ONNX values: element types and symbolic shapes, node by node.

Registry ops use their own rule; nodes that compute with shapes (Reshape, Expand, Slice ...) use symbolic rules fed by
``ShapeValues``; everything else goes through onnx's own per-node inference. Nothing is ever serialized but the node at
hand, so a model of any size is typed in one linear walk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence

import onnx
import onnx_ir as ir

from actgraph.errors import ActgraphError
from actgraph.graph.onnx_dims import ShapeValues, Sizes, product, reshape_shape, slice_size
from actgraph.graph.onnx_native import native_dtype, native_type, plain_attributes, registered, set_native_type
from actgraph.graph.onnx_state import graph_attributes
from actgraph.ops.dtypes import DType
from actgraph.ops.registry import DOMAIN
from actgraph.ops.shapes import UNKNOWN, Dim, Shape, TensorType, broadcast, dim_add, dim_mul

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
            present += [None] * (len(op.inputs) - len(present))
            return op.infer(present, plain_attributes(node))
        if node.domain == "" and node.op_type in _RULES:
            special = _RULES[node.op_type](self, node, operands)
            if special is not None:
                return special
        function = self.functions.get((node.domain, node.op_type, node.overload))
        if function is not None:
            return self._through(function, node, operands)
        if node.op_type in _CONTRIB and (node.domain == "com.microsoft" or node.op_type.startswith("Simplified")):
            return _CONTRIB[node.op_type](self, node, operands)  # onnxruntime writes SimplifiedLayerNormalization in domain ""
        return self._by_schema(node, operands)

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

    def _walk_body(self, body: ir.Graph) -> Types:
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


# --- rules that know symbolic sizes -------------------------------------------------------------------------------------

_Rule = Callable[[Inference, ir.Node, Types], Types | None]


def _unknown_of_rank(self: Inference, value: ir.Value | None) -> Shape | None:
    """A shape of unknown sizes, as many as the int tensor ``value`` has elements."""
    shape = self.type_of(value).shape
    return (None,) * shape[0] if shape is not None and len(shape) == 1 and isinstance(shape[0], int) else None


def _reshape(self: Inference, node: ir.Node, operands: Types) -> Types | None:
    if len(node.inputs) < 2:
        target: Sizes | None = tuple(node.attributes["shape"].as_ints())
    else:
        target = self.shapes.of(node.inputs[1])
    if target is None:
        return [TensorType(operands[0].dtype, _unknown_of_rank(self, node.inputs[1]))]
    allow_zero = self.attribute(node, "allowzero")
    return [TensorType(operands[0].dtype, reshape_shape(operands[0].shape, target, bool(allow_zero and allow_zero.value)))]


def _expand(self: Inference, node: ir.Node, operands: Types) -> Types | None:
    target = self.shapes.of(node.inputs[1])
    if target is None:
        return [TensorType(operands[0].dtype, None)]
    return [TensorType(operands[0].dtype, broadcast([operands[0].shape, target]))]


def _constant_of_shape(self: Inference, node: ir.Node, operands: Types) -> Types | None:
    fill_value = self.attribute(node, "value")
    dtype = native_dtype(fill_value.as_tensor().dtype) if fill_value is not None else DType.F32
    target = self.shapes.of(node.inputs[0])
    return [TensorType(dtype, target if target is not None else _unknown_of_rank(self, node.inputs[0]))]


def _range(self: Inference, node: ir.Node, operands: Types) -> Types | None:
    start, limit, delta = (self.shapes.of(value) for value in node.inputs)
    size: Dim = None
    if start is not None and limit is not None and delta is not None:
        if delta[0] == 1 and start[0] == 0:
            size = limit[0]
        elif all(isinstance(part[0], int) for part in (start, limit, delta)) and delta[0]:
            size = len(range(start[0], limit[0], delta[0]))  # type: ignore[arg-type]
    return [TensorType(operands[0].dtype, (size,))]


def _slice(self: Inference, node: ir.Node, operands: Types) -> Types | None:
    shape = operands[0].shape
    if shape is None:
        return [operands[0]]
    if len(node.inputs) < 3:
        starts, ends = (self.attribute(node, name) for name in ("starts", "ends"))
        axes_attribute = self.attribute(node, "axes")
        if starts is None or ends is None:
            return None
        begin: Sizes | None = starts.as_ints()
        end: Sizes | None = ends.as_ints()
        axes: Sequence[int] | None = axes_attribute.as_ints() if axes_attribute else None
        steps: Sequence[int] | None = None
    else:
        begin, end = self.shapes.of(node.inputs[1]), self.shapes.of(node.inputs[2])
        axes = self.shapes.ints(node.inputs[3]) if len(node.inputs) > 3 else None
        steps = self.shapes.ints(node.inputs[4]) if len(node.inputs) > 4 else None
        if len(node.inputs) > 3 and node.inputs[3] is not None and axes is None:
            return [TensorType(operands[0].dtype, (None,) * len(shape))]
        if len(node.inputs) > 4 and node.inputs[4] is not None and steps is None:
            begin = None
    result = list(shape)
    for place, axis in enumerate(axes if axes is not None else range(len(begin or end or shape))):
        low = begin[place] if begin is not None else None
        high = end[place] if end is not None else None
        result[axis] = slice_size(shape[axis], low, high, steps[place] if steps else 1)
    return [TensorType(operands[0].dtype, tuple(result))]


def _concat(self: Inference, node: ir.Node, operands: Types) -> Types | None:
    shapes = [kind.shape for kind in operands]
    dtype = next((kind.dtype for kind in operands if kind.dtype is not None), None)
    known = [shape for shape in shapes if shape is not None]
    if not known:
        return [TensorType(dtype, None)]
    axis_attribute = self.attribute(node, "axis")
    axis = axis_attribute.as_int() if axis_attribute is not None else 1
    result: list[Dim] = [None] * len(known[0])
    for shape in known:
        if len(shape) != len(result):
            raise ValueError(f"cannot concatenate ranks {len(result)} and {len(shape)}")
        for place, size in enumerate(shape):
            old = result[place]
            if isinstance(old, int) and isinstance(size, int) and old != size and place != axis % len(result):
                raise ValueError(f"cannot concatenate {known} along axis {axis}")
            result[place] = size if old is None or isinstance(size, int) else old
    total: Dim = 0
    for maybe in shapes:
        total = dim_add(total, maybe[axis] if maybe is not None else None)
    result[axis] = total
    return [TensorType(dtype, tuple(result))]


def _flatten(self: Inference, node: ir.Node, operands: Types) -> Types | None:
    shape = operands[0].shape
    if shape is None:
        return [TensorType(operands[0].dtype, (None, None))]
    attribute = self.attribute(node, "axis")
    axis = attribute.as_int() if attribute is not None else 1
    axis = axis + len(shape) if axis < 0 else axis
    return [TensorType(operands[0].dtype, (product(shape[:axis]), product(shape[axis:])))]


def _tile(self: Inference, node: ir.Node, operands: Types) -> Types | None:
    shape, repeats = operands[0].shape, self.shapes.of(node.inputs[1])
    if shape is None or repeats is None:
        return [TensorType(operands[0].dtype, (None,) * len(shape) if shape is not None else None)]
    return [TensorType(operands[0].dtype, tuple(dim_mul(s, r) for s, r in zip(shape, repeats, strict=True)))]


def _pad(self: Inference, node: ir.Node, operands: Types) -> Types | None:
    shape = operands[0].shape
    attribute = self.attribute(node, "pads")
    pads: Sizes | None = attribute.as_ints() if attribute is not None else None
    if attribute is None and len(node.inputs) > 1:
        pads = self.shapes.of(node.inputs[1])
    if shape is None or pads is None:
        return [TensorType(operands[0].dtype, (None,) * len(shape) if shape is not None else None)]
    axes: Sequence[int] = range(len(shape))
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        given = self.shapes.ints(node.inputs[3])
        if given is None:
            return [TensorType(operands[0].dtype, (None,) * len(shape))]
        axes = given
    result = list(shape)
    half = len(pads) // 2
    for place, axis in enumerate(axes):
        result[axis] = dim_add(result[axis], dim_add(pads[place], pads[place + half]))
    return [TensorType(operands[0].dtype, tuple(result))]


def _if(self: Inference, node: ir.Node, operands: Types) -> Types | None:
    branches = [self._walk_body(body) for _, graphs in graph_attributes(node) for body in graphs]
    return [_common(list(kinds)) for kinds in zip(*branches, strict=False)]


def _loop(self: Inference, node: ir.Node, operands: Types) -> Types | None:
    body = node.attributes["body"].as_graph()
    carried = operands[2:]
    for value, kind in zip(body.inputs[2:], carried, strict=False):
        if value.type is None:
            set_native_type(value, TensorType(kind.dtype, (None,) * len(kind.shape) if kind.shape is not None else None))
    inner = self._walk_body(body)[1:]
    result = [_common([before, after]) for before, after in zip(carried, inner, strict=False)]
    for kind in inner[len(carried) :]:
        result.append(TensorType(kind.dtype, (None, *kind.shape) if kind.shape is not None else None))
    return result


def _scan(self: Inference, node: ir.Node, operands: Types) -> Types | None:
    self._walk_body(node.attributes["body"].as_graph())
    return None


def _common(kinds: Types) -> TensorType:
    """What is true of every one of ``kinds``."""
    first = kinds[0]
    dtype = first.dtype if all(kind.dtype == first.dtype for kind in kinds) else None
    shapes = [kind.shape for kind in kinds]
    if any(shape is None or len(shape) != len(shapes[0] or ()) for shape in shapes):
        return TensorType(dtype, None)
    known = [shape for shape in shapes if shape is not None]
    return TensorType(dtype, tuple(sizes[0] if len(set(sizes)) == 1 else None for sizes in zip(*known, strict=True)))


_RULES: dict[str, _Rule] = {
    "Reshape": _reshape, "Expand": _expand, "ConstantOfShape": _constant_of_shape, "Range": _range, "Slice": _slice,
    "Concat": _concat, "Flatten": _flatten, "Tile": _tile, "Pad": _pad, "If": _if, "Loop": _loop, "Scan": _scan,
}  # fmt: skip


# --- onnxruntime's contributed ops, which onnx has no schema for ----------------------------------------------------------


def _like_first(self: Inference, node: ir.Node, operands: Types) -> Types:
    return [operands[0]]


def _fused_matmul(self: Inference, node: ir.Node, operands: Types) -> Types:
    left, right = operands[0].shape, operands[1].shape
    flags = [bool((a := self.attribute(node, name)) and a.value) for name in ("transA", "transB")]
    if left is None or right is None or len(left) < 2 or len(right) < 2:
        return [TensorType(operands[0].dtype, None)]
    batch = broadcast([left[:-2], right[:-2]])
    rows, columns = left[-1 if flags[0] else -2], right[-2 if flags[1] else -1]
    return [TensorType(operands[0].dtype, (*batch, rows, columns) if batch is not None else None)]


def _matmul_nbits(self: Inference, node: ir.Node, operands: Types) -> Types:
    shape = operands[0].shape
    return [TensorType(operands[0].dtype, (*shape[:-1], node.attributes["N"].as_int()) if shape is not None else None)]


_CONTRIB: dict[str, Callable[[Inference, ir.Node, Types], Types]] = {
    **dict.fromkeys(
        ("Gelu", "FastGelu", "BiasGelu", "QuickGelu", "RotaryEmbedding", "SkipLayerNormalization",
         "SkipSimplifiedLayerNormalization", "LayerNormalization", "SimplifiedLayerNormalization", "BiasAdd"),
        _like_first,
    ),
    "FusedMatMul": _fused_matmul, "MatMulNBits": _matmul_nbits,
}  # fmt: skip
