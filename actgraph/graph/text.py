"""Canonical text: one deterministic printer for both dialects, and the content hash built on it.

Golden tests, ``diff``, IR dumps and content hashes use this text, so a line depends on its own node only: columns are padded
to a fixed width and never aligned with each other, attributes are sorted, and values have their native names. Constants of
one element and short integer lists appear in place, everything else that is stored appears in a table with shape and hash.
"""

from __future__ import annotations

import contextlib
import enum
import hashlib
import json
import re
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from actgraph.errors import ActgraphError
from actgraph.graph.graph import Array, Graph, Node, Role, Value
from actgraph.graph.slots import slots_of
from actgraph.ops.dtypes import DType
from actgraph.ops.registry import DOMAIN

_PLAIN = re.compile(r"[\w.\-/:$]+")
_WIDTH = 80  # column of the type
_INLINE_INTEGERS = 8  # integer lists up to this length are printed in place
_CHUNK = 1 << 24


def print_graph(graph: Graph, sites: bool = True, provenance: bool = True) -> str:
    """The canonical text of ``graph``.

    sites: print the role site of each value (``@blocks.2.mlp.hidden``). provenance: print which pass made each node and
    the passes that ran.
    """
    return "\n".join(_lines(graph, graph.name, sites=sites, provenance=provenance)) + "\n"


def content_hash(graph: Graph) -> str:
    """sha256 over the canonical text (provenance included, the graph's name and notes not) and all weights, 16 hex digits."""
    text = "\n".join(_lines(graph, "", sites=True, provenance=True))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _lines(graph: Graph, name: str, *, sites: bool, provenance: bool) -> Iterator[str]:
    inputs = ", ".join(_signature(graph, v.name, v) + _default(graph, v.name) for v in graph.inputs())
    outputs = ", ".join(_signature(graph, label, v) for label, v in graph.outputs())
    yield f"graph {name}({inputs})" if name else f"graph({inputs})"
    yield f"    -> ({outputs}) {{"
    table = graph.site_table if sites else None
    for node in graph.nodes():
        yield _node_line(node, table.role_name_of if table is not None else None, provenance)
    yield f"  return {', '.join(value_text(v) for _, v in graph.outputs())}"
    yield "}"
    inner = [node for node in graph.subgraph_nodes() if not node.name.startswith(f"{DOMAIN}::")]
    signatures = graph.function_signatures()
    if inner or signatures:  # bodies of If, Loop and foreign functions; those of our own ops follow from the registry
        yield "bodies {"
        yield from (f"  {signature}" for signature in signatures)
        yield from (_node_line(node, None, provenance) for node in inner)
        yield "}"
    yield from _slots(graph)
    stored = sorted((p for p in graph.parameters() if p.uses and not _is_inline(p)), key=lambda p: p.name)
    if stored:
        yield "parameters {"
        for parameter in stored:
            others = [alias for alias in graph.aliases(parameter) if alias != parameter.name]
            also = f"  also {', '.join(sorted(others))}" if others else ""
            yield f"  {_reference(parameter.name)} : {parameter.type}  #{data_hash(parameter)[:12]}{also}"
        yield "}"
    if provenance and graph.history:
        yield "history {"
        yield from (f"  {record.text or record.name}" for record in graph.history)
        yield "}"


def _slots(graph: Graph) -> Iterator[str]:
    """What types and names of inputs and outputs alone do not say about the state."""
    if not any(graph.role(value.name) is Role.SLOT for value in graph.inputs()):
        return
    yield "slots {"
    try:
        yield from (f"  {slot}  {_reference(slot.input)} -> {slot.output}" for slot in slots_of(graph).values())
    except ActgraphError as error:  # broken graphs are printed as well
        yield f"  ? {error.message}"
    yield "}"


def _signature(graph: Graph, label: str, value: Value) -> str:
    role = graph.role(label)
    return f"{label}: {value.type}" + (f" <{role.value}>" if role is not Role.USER else "")


def _default(graph: Graph, name: str) -> str:
    array = graph.default(name)
    return f" = {attribute_text(array)}" if array is not None else ""


def _node_line(node: Node, role_name_of: Any, provenance: bool) -> str:
    outputs = node.outputs
    left = ", ".join(_reference(v.name) for v in outputs)
    right = f"{node.op}({', '.join(_operand(v) for v in node.operands)})"
    attributes = node.attributes
    if attributes:
        right += f" {{{', '.join(f'{key} = {attribute_text(attributes[key])}' for key in sorted(attributes))}}}"
    line = f"  {left} = {right}" if outputs else f"  {right}"
    if outputs:
        line = f"{line.ljust(_WIDTH)} : {', '.join(str(v.type) for v in outputs)}"
    if role_name_of is not None:
        names = [name for name in map(role_name_of, outputs) if name]
        if names:
            line += f"  @{' @'.join(names)}"
    if provenance and node.origin.created_by:
        line += f"  by {node.origin.created_by}"
    return line


def _operand(value: Value | None) -> str:
    return "none" if value is None else value_text(value)


def value_text(value: Value) -> str:
    """``%name``, or the data itself for a small constant."""
    return _constant(value.graph.read(value)) if value.is_parameter and _is_inline(value) else _reference(value.name)


def _reference(name: str) -> str:
    return f"%{name}" if _PLAIN.fullmatch(name) else f"%{json.dumps(name)}"


def _is_inline(parameter: Value) -> bool:
    dtype, shape = parameter.type
    if dtype is None or shape is None or not all(isinstance(size, int) for size in shape):
        return False
    count = int(np.prod([int(size) for size in shape if size is not None], dtype=np.int64)) if shape else 1
    if len(shape) == 0 or shape == (1,):
        return True
    return len(shape) == 1 and (dtype.is_integer or dtype is DType.BOOL) and count <= _INLINE_INTEGERS


def _constant(array: Array) -> str:
    """Text from which dtype, shape and every bit can be told: f32, i64 and bool by their look, others by a suffix."""
    dtype = DType.of(array.dtype) if array.dtype != object else DType.STRING
    items = [attribute_text(item) for item in np.ravel(array).tolist()]
    if dtype not in (DType.F32, DType.I64, DType.BOOL, DType.STRING):
        items = [f"{item}:{dtype.value}" for item in items] or [f":{dtype.value}"]
    elif dtype is DType.F32:
        items = [attribute_text(float(str(np.float32(item)))) for item in np.ravel(array)]
    return items[0] if array.ndim == 0 else f"[{', '.join(items)}]"


def attribute_text(value: Any) -> str:
    """One attribute value, deterministic: floats by ``repr``, strings quoted, arrays as type and hash unless small."""
    if isinstance(value, np.ndarray):
        if value.size <= _INLINE_INTEGERS:
            return f"{DType.of(value.dtype).value}{attribute_text(value.tolist())}"
        return f"{DType.of(value.dtype).value}{list(value.shape)} #{array_hash(value)[:12]}"
    if isinstance(value, np.generic):
        return attribute_text(value.item())
    if isinstance(value, DType):
        return value.value
    if isinstance(value, enum.Enum):
        return attribute_text(value.value)
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, bytes):
        return f"bytes[{len(value)}] #{hashlib.sha256(value).hexdigest()[:12]}" if len(value) > 32 else f"bytes {value.hex()}"
    if isinstance(value, Value):
        return value_text(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} = {attribute_text(value[key])}" for key in sorted(value)) + "}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(attribute_text, value))}]"
    return repr(value) if isinstance(value, (int, float, complex)) else str(value)


# --- hashes of stored data --------------------------------------------------------------------------------------------

#: id of the object that holds the data -> (weak reference to it, its version, digest)
_DIGESTS: dict[int, tuple[weakref.ref[Any], object, str]] = {}


def data_hash(parameter: Value) -> str:
    """sha256 over dtype, shape and bytes of a parameter. Computed once as long as the stored data is the same object."""
    holder, version = parameter.graph.stored(parameter)
    known = _DIGESTS.get(id(holder))
    if known is not None and known[0]() is holder and known[1] == version:
        return known[2]
    digest = array_hash(parameter.graph.read(parameter))
    key = id(holder)
    with contextlib.suppress(TypeError):  # a holder that takes no weak references is hashed again next time
        _DIGESTS[key] = (weakref.ref(holder, lambda _: _DIGESTS.pop(key, None)), version, digest)
    return digest


def array_hash(array: Array) -> str:
    """sha256 of an array, reading its memory in place."""
    result = hashlib.sha256(f"{array.dtype.name}{list(array.shape)}".encode())
    if array.dtype == object:
        result.update(repr(array.tolist()).encode())
    elif array.flags.c_contiguous:
        raw = array.reshape(-1).view(np.uint8)
        for start in range(0, raw.size, _CHUNK):
            result.update(raw[start : start + _CHUNK].data)
    else:  # a transposed or strided view: copied one row at a time
        for row in array:
            result.update(np.ascontiguousarray(row).reshape(-1).view(np.uint8).data)
    return result.hexdigest()
