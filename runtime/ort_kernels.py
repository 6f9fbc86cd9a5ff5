"""Kernels for nodes of an ONNX graph, as custom operators of onnxruntime.

Which node gets a kernel is decided here, before onnxruntime sees the graph: nodes without one are replaced by their bodies.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from actgraph.errors import UnsupportedError
from actgraph.formats.onnx_finish import drop_unused_functions, inline_calls
from actgraph.graph.fusion import fuse
from actgraph.graph.onnx import OnnxGraph
from actgraph.ops.dtypes import DType
from actgraph.ops.registry import DOMAIN, REQUIRED
from actgraph.runtime.kernels.calls import variant_of
from actgraph.runtime.kernels.numba.kernel import NumbaKernel, OpKernels
from actgraph.runtime.kernels.registry import kernel_for
from actgraph.runtime.native.library import Attribute, Op, library, path

if TYPE_CHECKING:
    import onnxruntime as ort


@dataclass
class Claims:
    """What became of the actgraph nodes of a graph.

    claimed: the kernel of each node, by the node's name. unclaimed: why a node has none.
    """

    claimed: dict[str, str] = field(default_factory=dict)
    unclaimed: dict[str, str] = field(default_factory=dict)


def claim(graph: OnnxGraph) -> Claims:
    """Register kernels for the nodes of ``graph`` that have one, and put the bodies of all others into their place."""
    claims, found = Claims(), {}
    for node in graph.nodes():
        if not node.op.startswith(f"{DOMAIN}."):
            continue
        op = node.op.removeprefix(f"{DOMAIN}.")
        types: Sequence[DType | None] = [None if operand is None else operand.dtype for operand in node.operands]
        chosen = kernel_for(op, types, dict(node.attributes))
        if chosen is None:
            claims.unclaimed[node.name] = f"{op} has no kernel for {', '.join('-' if t is None else t for t in types)}"
        else:
            found[node.key] = chosen
            claims.claimed[node.name] = chosen[1].stages[-1].name
    for kernels, kernel in dict.fromkeys(found.values()):
        register(kernels, kernel)
    inline_calls(graph, lambda node: node not in found)
    drop_unused_functions(graph)
    return claims


def with_kernel_ops(graph: OnnxGraph) -> OnnxGraph:
    """A copy of ``graph`` in the ops that have kernels.

    In a graph of single tokens these are all linears. In others linears that are neither gated nor quantized stay onnxruntime's,
    whose product of many tokens is faster.
    """
    twin = graph.clone()
    tokens = next((value for value in graph.inputs() if value.name == "input_ids"), None)
    single = tokens is not None and tokens.shape is not None and tokens.shape[-1] == 1
    fuse(twin, dense=single, norms=False, rotary=False, feed_forwards=False)
    return twin


def register_library(options: ort.SessionOptions) -> None:
    """Let sessions with these options use the kernels that are registered. Raises UnsupportedError where there is no library."""
    library()
    options.register_custom_ops_library(str(path()))


_KNOWN: dict[str, Any] = {}  # what the library points to lives as long as the process


def register(kernels: OpKernels, kernel: NumbaKernel) -> None:
    """Make a kernel known to the library."""
    name = kernels.definition.onnx_name.encode()
    if kernels.op not in _KNOWN:
        op, kept = _described(kernels)
        if library().ag_add_op(ctypes.byref(op)):
            raise UnsupportedError("the kernels' library has no room for more ops")
        _KNOWN[kernels.op] = (op, kept)
    if library().ag_add_variant(name, ctypes.byref(variant_of(kernels, kernel))):
        raise UnsupportedError(f"the kernels' library has no room for more kernels of {kernels.op}")


def _described(kernels: OpKernels) -> tuple[Op, list[Any]]:
    definition = kernels.definition
    op, kept = Op(), []
    op.name = definition.onnx_name.encode()
    op.inputs, op.outputs, op.attributes = len(definition.inputs), len(definition.outputs), len(definition.attributes)
    for place, operand in enumerate(definition.inputs):
        kind = kernels.operands[place]
        op.input_type[place] = 0 if kind is None else kind.onnx
        op.optional[place] = int(operand.optional)
    for place in range(len(definition.outputs)):
        op.output_type[place] = kernels.result.onnx
    op.key_inputs, op.key_attributes = len(kernels.key_operands), len(kernels.key_attributes)
    op.key_input[: op.key_inputs] = kernels.key_operands
    names = [attribute.name for attribute in definition.attributes]
    op.key_attribute[: op.key_attributes] = [names.index(name) for name in kernels.key_attributes]
    attributes = (Attribute * max(len(names), 1))()
    for place, attribute in enumerate(definition.attributes):
        attributes[place].name = attribute.name.encode()
        attributes[place].kind = {"float": 1, "str": 2}.get(attribute.kind, 0)
        if attribute.default is not REQUIRED:
            value = attribute.default
            word = np.float64(value).view(np.int64) if attribute.kind == "float" else kernels.word(attribute.name, value)
            attributes[place].fallback = int(word)
        attributes[place].choices = "|".join(attribute.choices).encode()
    errors = (ctypes.c_char_p * max(len(kernels.errors), 1))(*(text.encode() for text in kernels.errors))
    op.attribute, op.error, op.errors = attributes, errors, len(kernels.errors)
    kept += [attributes, errors]
    return op, kept


def calls_of(model: ir.Model) -> int:
    """How many nodes of a model are of our domain."""
    return sum(node.domain == DOMAIN for node in model.graph)
