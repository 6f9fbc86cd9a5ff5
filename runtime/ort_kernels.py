"""Kernels for nodes of an ONNX graph, as custom operators of onnxruntime.

Which node gets a kernel is decided here, before onnxruntime sees the graph: nodes without one are replaced by their bodies.
"""

from __future__ import annotations

import ctypes
import threading
from typing import TYPE_CHECKING, Any

from actgraph.errors import UnsupportedError
from actgraph.formats.onnx_finish import drop_unused_functions, inline_calls
from actgraph.graph.onnx import OnnxGraph
from actgraph.runtime.claims import Claims, find_kernels
from actgraph.runtime.kernels.calls import variant_of
from actgraph.runtime.kernels.numba.kernel import NumbaKernel, OpKernels
from actgraph.runtime.native.library import library, path
from actgraph.runtime.native.tables import as_structure, table_of

if TYPE_CHECKING:
    import onnxruntime as ort


def claim(graph: OnnxGraph) -> Claims:
    """Register kernels for the nodes of ``graph`` that have one, and put the bodies of all others into their place."""
    claims, found = find_kernels(graph)
    for kernels, kernel in dict.fromkeys(found.values()):
        register(kernels, kernel)
    kept = {node.key for node in found}
    inline_calls(graph, lambda node: node not in kept)
    drop_unused_functions(graph)
    return claims


def register_library(options: ort.SessionOptions) -> None:
    """Let sessions with these options use the registered kernels. Raises UnsupportedError where there is no library."""
    library()
    options.register_custom_ops_library(str(path()))


_KNOWN: dict[str, Any] = {}  # what the library points to lives as long as the process
_ADDING = threading.Lock()


def register(kernels: OpKernels, kernel: NumbaKernel) -> None:
    """Make a kernel known to the library."""
    name = kernels.definition.onnx_name.encode()
    with _ADDING:  # the library points to the structure that it got first: no other may take its place in _KNOWN
        if kernels.op not in _KNOWN:
            op, kept = as_structure(table_of(kernels))
            if library().ag_add_op(ctypes.byref(op)):
                raise UnsupportedError("the kernels' library has no room for more ops")
            _KNOWN[kernels.op] = (op, kept)
    if library().ag_add_variant(name, ctypes.byref(variant_of(kernels, kernel))):
        raise UnsupportedError(f"the kernels' library has no room for more kernels of {kernels.op}")
