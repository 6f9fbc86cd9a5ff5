"""What is done to an ONNX model when it becomes a graph: constants are initializers, every node has a name and an origin.

Nothing here changes what the model computes, and foreign metadata stays.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from actgraph.errors import InputError
from actgraph.graph.onnx_native import array_of, tensor_of
from actgraph.graph.onnx_state import graph_attributes
from actgraph.graph.provenance import FIELDS, KEY, Origin

#: Tensors that make a new array at each look; a view of torch's memory or one decoded array replaces them.
_COPYING = (ir.serde.TensorProtoTensor, ir.tensor_adapters.TorchTensor)
_SCOPES = "pkg.torch.onnx.name_scopes"


def normalize(model: ir.Model) -> None:
    """Bring ``model`` into the form that the dialect relies on. Raises InputError on a cycle and on undefined values."""
    graph = model.graph
    if "ai.onnx" in graph.opset_imports:
        version = graph.opset_imports.pop("ai.onnx")
        graph.opset_imports.setdefault("", version)
    _check_defined(graph, set())
    if not _is_sorted(graph, set()):
        try:
            graph.sort()
        except ValueError as error:
            raise InputError(f"the ONNX graph {graph.name!r} has a cycle") from error
    lift_constants(graph)
    for value in graph.initializers.values():
        if isinstance(value.const_value, _COPYING):
            value.const_value = tensor_of(array_of(value.const_value), value.name)
    taken: set[str] = set()
    for node in all_nodes(graph):
        drop_absent_outputs(node)
        if not node.name or node.name in taken:
            stem = node.name or next((v.name for v in node.outputs if v.name), None) or f"{node.op_type}"
            node.name = unique(stem, taken)
        taken.add(node.name)
    for node in all_nodes(graph):
        if f"{KEY}.sources" not in node.metadata_props and f"{KEY}.pass" not in node.metadata_props:
            write_origin(node, Origin((source_name(node.name or ""),), torch_scope(node)))


def all_nodes(graph: ir.Graph) -> Iterator[ir.Node]:
    """The nodes of ``graph`` and of the bodies inside it, outer before inner, in order."""
    for node in graph:
        yield node
        for _, bodies in graph_attributes(node):
            for body in bodies:
                yield from all_nodes(body)


def unique(stem: str, taken: set[str]) -> str:
    """``stem``, or ``stem_1``, ``stem_2`` ... when it is taken."""
    name, number = stem, 0
    while name in taken:
        number += 1
        name = f"{stem}_{number}"
    return name


def source_name(name: str) -> str:
    """``name`` as it can stand in a list separated by spaces."""
    return "_".join(name.split()) or "unnamed"


def torch_scope(node: ir.Node) -> str:
    """The module path that torch's exporter recorded: the entry before the last of its nested scopes."""
    try:
        scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
    except (ValueError, SyntaxError):
        return ""
    return str(scopes[-2]) if isinstance(scopes, list) and len(scopes) > 1 else ""


def read_origin(node: ir.Node) -> Origin:
    props = node.metadata_props
    return Origin.from_dict({field: props.get(f"{KEY}.{field}", "") for field in FIELDS})


def write_origin(node: ir.Node, origin: Origin) -> None:
    for field in FIELDS:
        node.metadata_props.pop(f"{KEY}.{field}", None)
    node.metadata_props.update({f"{KEY}.{field}": text for field, text in origin.to_dict().items()})


def drop_absent_outputs(node: ir.Node) -> None:
    """Forget trailing optional outputs that the file leaves out (they have no name)."""
    present = len(node.outputs)
    while present > 0 and not node.outputs[present - 1].name and not node.outputs[present - 1].uses():
        present -= 1
    if present != len(node.outputs):
        node.resize_outputs(present)


# --- constants --------------------------------------------------------------------------------------------------------


def lift_constants(graph: ir.Graph) -> None:
    """Turn the Constant nodes of the outermost graph into initializers under the names of their outputs."""
    constants = [node for node in graph if node.op_type == "Constant" and node.domain == "" and len(node.outputs) == 1]
    for node in constants:
        tensor = constant_tensor(node)
        if tensor is None:
            continue
        old = node.outputs[0]
        new = ir.Value(
            name=old.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor,
            metadata_props=dict(old.metadata_props) or None,
        )  # fmt: skip
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        graph.remove(node)
        graph.register_initializer(new)


def constant_tensor(node: ir.Node) -> ir.TensorProtocol | None:
    """The tensor of a Constant node; ``None`` for sparse ones."""
    for name, attribute in node.attributes.items():
        if attribute.is_ref():
            return None
        match name:
            case "value":
                return attribute.as_tensor()
            case "value_float":
                return tensor_of(np.array(attribute.as_float(), np.float32))
            case "value_floats":
                return tensor_of(np.array(attribute.as_floats(), np.float32))
            case "value_int":
                return tensor_of(np.array(attribute.as_int(), np.int64))
            case "value_ints":
                return tensor_of(np.array(attribute.as_ints(), np.int64))
            case "value_string":
                return tensor_of(np.array(attribute.value, object))
            case "value_strings":
                return tensor_of(np.array(attribute.value, object))
    return None


def _check_defined(graph: ir.Graph, outside: set[ir.Value]) -> None:
    """Raise InputError when something reads a value that nothing defines."""
    known = outside | set(graph.inputs) | set(graph.initializers.values())
    known.update(value for node in graph for value in node.outputs)
    for node in graph:
        for value in node.inputs:
            if value is not None and value not in known:
                reader = node.name or node.op_type
                raise InputError(f"node {reader!r} reads {value.name!r}, which nothing in the ONNX graph defines")
        for _, bodies in graph_attributes(node):
            for body in bodies:
                _check_defined(body, known)
    for value in graph.outputs:
        if value not in known:
            raise InputError(f"output {value.name!r} is not defined in the ONNX graph")


def _is_sorted(graph: ir.Graph, outside: set[ir.Value]) -> bool:
    known = outside | set(graph.inputs) | set(graph.initializers.values())
    for node in graph:
        for value in node.inputs:
            if value is not None and value.producer() is not None and value not in known:
                return False
        for _, bodies in graph_attributes(node):
            if not all(_is_sorted(body, known) for body in bodies):
                return False
        known.update(node.outputs)
    return True
