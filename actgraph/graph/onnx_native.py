"""Between native onnx_ir objects and the types that the rest of the compiler speaks."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from actgraph.ops.dtypes import DType
from actgraph.ops.registry import DOMAIN, Attribute, OpDef, single
from actgraph.ops.shapes import UNKNOWN, Dim, Shape, TensorType, canonical_dim

#: Domains whose nodes are known to be free of side effects.
PURE_DOMAINS = frozenset({"", "ai.onnx.ml", "ai.onnx.preview", "com.microsoft", "com.ms.internal.nhwc", DOMAIN})


def native_dtype(dtype: ir.DataType | None) -> DType | None:
    """The DType of an onnx_ir type, ``None`` for what DType lacks (float4, UNDEFINED)."""
    try:
        return DType.of(int(dtype)) if dtype is not None else None
    except KeyError:
        return None


def loosened(shape: ir.Shape, default: np.ndarray[Any, Any]) -> ir.Shape:
    """The declared shape of an optional input: sizes are unknown where ``default`` has 1 and what is given may have more.

    Were they named, onnxruntime would take what is computed from the default to be as large as all that is named so, and
    write it where there is no room.
    """
    if len(shape) != default.ndim:
        return shape
    return ir.Shape([None if given == 1 and size != 1 else size for size, given in zip(shape, default.shape, strict=True)])


def is_state(value: ir.Value) -> bool:
    """Whether an input is state across calls, which hosts always give: its default is what it begins with."""
    return str(value.name).startswith("state_in.")


def loosen_results(graph: ir.Graph) -> None:
    """Forget the names of dimensions of all that is computed from optional inputs alone, and of these where they are 1."""
    loose: set[ir.Value] = set()
    for value in graph.inputs:
        if value.const_value is not None and value.shape is not None and not is_state(value):
            value.shape = loosened(value.shape, value.const_value.numpy())
            loose.add(value)
    fixed = set(graph.initializers.values()) - loose
    for node in graph if loose else ():
        sources = {value for value in node.inputs if value is not None}
        if sources <= fixed:
            fixed.update(node.outputs)
        elif sources <= loose | fixed:
            loose.update(node.outputs)
            for made in node.outputs:
                if made.shape is not None:
                    made.shape = ir.Shape([size if isinstance(size, int) else None for size in made.shape])


def native_shape(shape: ir.Shape | None) -> Shape | None:
    if shape is None:
        return None
    return tuple(_dim(dim) if isinstance(dim, int) else _named(dim.value) for dim in shape)


def _dim(size: int) -> Dim:
    return size if size >= 0 else None  # some exporters write -1 for "any size"


def _named(name: str | None) -> Dim:
    return canonical_dim(name) if name and name != "?" else None


def native_type(value: ir.Value) -> TensorType:
    """What the value declares of itself. Sequences, optionals and sparse tensors count as unknown."""
    kind = value.type
    if kind is None:
        return TensorType(None, native_shape(value.shape))
    if not isinstance(kind, ir.TensorType):
        return UNKNOWN
    return TensorType(native_dtype(kind.dtype), native_shape(value.shape))


def set_native_type(value: ir.Value, kind: TensorType) -> None:
    """Declare ``kind``; what it does not know is cleared. A new Shape is made, for recorded states share the old one."""
    value.type = ir.TensorType(ir.DataType(kind.dtype.onnx)) if kind.dtype is not None else None
    value.shape = ir.Shape(kind.shape) if kind.shape is not None else None


def tensor_of(array: np.ndarray[Any, Any], name: str | None = None) -> ir.TensorProtocol:
    """A native tensor over ``array``, which is not copied."""
    array = np.asarray(array)
    if array.dtype == object or array.dtype.kind in "SU":
        data = [item if isinstance(item, bytes) else str(item).encode() for item in array.ravel().tolist()]
        return ir.StringTensor(data, shape=ir.Shape(array.shape), name=name)
    return ir.Tensor(array, dtype=ir.DataType(DType.of(array.dtype).onnx), name=name)


def array_of(tensor: ir.TensorProtocol) -> np.ndarray[Any, Any]:
    """The data of a native tensor, without a copy where the container allows it."""
    if isinstance(tensor, ir.StringTensor):
        return tensor.numpy().astype(object)
    return tensor.numpy()


def op_name(domain: str, op_type: str) -> str:
    """``onnx.MatMul``, ``com.microsoft.Gelu``, ``actgraph.shift``: the op as canonical text spells it."""
    if domain == "":
        return f"onnx.{op_type}"
    if domain == DOMAIN:
        op = registered(op_type)
        return op.qualified_name if op is not None else f"{DOMAIN}.{op_type}"
    return f"{domain}.{op_type}"


def registered(op_type: str) -> OpDef | None:
    """The registry op whose ONNX name is ``op_type``."""
    return _by_onnx_name().get(op_type)


def _by_onnx_name() -> Mapping[str, OpDef]:
    from actgraph.ops.registry import _OPS, all_ops

    if len(_CACHE) != len(_OPS) or not _OPS:  # ops may be registered by third parties at any time
        _CACHE.clear()
        _CACHE.update({op.onnx_name: op for op in all_ops()})
    return _CACHE


_CACHE: dict[str, OpDef] = {}


# --- attributes -------------------------------------------------------------------------------------------------------


def plain_attributes(node: ir.Node) -> dict[str, Any]:
    """The attributes of a node as plain Python values: lists are tuples, tensors are arrays, graphs a size and hash.

    Floats are the shortest decimal that means the stored float32, so that they print the same before and after a file.
    """
    op = registered(node.op_type) if node.domain == DOMAIN else None
    if op is not None:
        return {a.name: _registry_value(a, node.attributes.get(a.name)) for a in op.attributes}
    return {name: _plain(attribute) for name, attribute in node.attributes.items()}


def _plain(attribute: ir.Attr) -> Any:
    kind, value = attribute.type, attribute.value
    if attribute.is_ref():
        return f"@{attribute.ref_attr_name}"
    if kind == ir.AttributeType.FLOAT:
        return single(value)
    if kind == ir.AttributeType.FLOATS:
        return tuple(single(item) for item in value)
    if kind == ir.AttributeType.TENSOR:
        return array_of(value)
    if kind == ir.AttributeType.TENSORS:
        return tuple(array_of(item) for item in value)
    if kind == ir.AttributeType.GRAPH:
        return body_text(value)
    if kind == ir.AttributeType.GRAPHS:
        return tuple(body_text(item) for item in value)
    if kind in (ir.AttributeType.TYPE_PROTO, ir.AttributeType.TYPE_PROTOS):
        return str(value)
    return value


def body_text(body: ir.Graph) -> str:
    """A body as one word of canonical text: its size, and a hash of everything in it."""
    digest = hashlib.sha256()
    digest.update(repr([[v.name for v in values] for values in (body.inputs, body.outputs)]).encode())
    for name, value in body.initializers.items():
        digest.update(f"{name} {native_type(value)}".encode())
        digest.update(value.const_value.tobytes() if value.const_value is not None else b"")
    for node in body:
        operands = [v.name if v is not None else None for v in node.inputs]
        digest.update(f"{[v.name for v in node.outputs]} {node.domain} {node.op_type} {node.overload} {operands}".encode())
        for name, value in sorted(plain_attributes(node).items()):
            digest.update(f"{name} {value.tolist() if isinstance(value, np.ndarray) else value!r}".encode())
    return f"{len(body)} nodes #{digest.hexdigest()[:12]}"


def signature_text(function: ir.Function) -> str:
    """What a function takes and gives, in order, with the defaults of its attributes and the opsets that its nodes mean."""
    inputs, outputs = (", ".join(str(value.name) for value in values) for values in (function.inputs, function.outputs))
    defaults = [
        f"{name} = {_plain(attribute)!r}"
        for name, attribute in sorted(function.attributes.items())
        if attribute.value is not None
    ]
    opsets = [f"{domain or 'onnx'} {version}" for domain, version in sorted(function.opset_imports.items())]
    return f"{function.domain}::{function.name}({inputs}) {{{', '.join([*defaults, *opsets])}}} -> ({outputs})"


def _registry_value(declared: Attribute, stored: ir.Attr | None) -> Any:
    if stored is None:
        return declared.default
    value = _plain(stored)
    if declared.kind == "bool":
        return bool(value)
    return tuple(value) if declared.kind in ("ints", "floats") else value


def registry_attributes(op: OpDef, attributes: Mapping[str, Any]) -> list[ir.Attr]:
    """``attributes`` checked and completed by the op's defaults, as native attributes. Raises OptionError."""
    complete = op.complete(attributes)
    return [_native_attribute(declared, complete[declared.name]) for declared in op.attributes]


def _native_attribute(declared: Attribute, value: Any) -> ir.Attr:
    match declared.kind:
        case "int" | "bool":
            return ir.AttrInt64(declared.name, int(value))
        case "float":
            return ir.AttrFloat32(declared.name, value)
        case "str":
            return ir.AttrString(declared.name, value)
        case "ints":
            return ir.AttrInt64s(declared.name, value)
        case _:
            return ir.AttrFloat32s(declared.name, value)


def as_attribute(name: str, value: Any) -> ir.Attr:
    """A native attribute of a plain value (int, float, str, bytes, array, tuple of those)."""
    if isinstance(value, np.ndarray):
        return ir.AttrTensor(name, tensor_of(value))
    if isinstance(value, DType):
        return ir.AttrInt64(name, value.onnx)
    if isinstance(value, bool):
        return ir.AttrInt64(name, int(value))
    if isinstance(value, (tuple, list)) and not value:
        return ir.AttrInt64s(name, ())
    return ir.convenience.convert_attribute(name, value)
