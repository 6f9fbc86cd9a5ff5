"""Models of single ops for tests of the onnxruntime plugin, and sessions on them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

from actgraph.graph.graph import Array
from actgraph.ops.dtypes import DType
from actgraph.ops.registry import OpDef, get_op
from actgraph.ops.shapes import TensorType
from actgraph.runtime.kernels.registry import all_kernels
from actgraph.runtime.native.library import available
from actgraph.runtime.ort_kernels import register, register_library
from tests.conformance.harness import build

needs_library = pytest.mark.skipif(not available(), reason="the kernels' library was not built")
needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="there is no C compiler")

X, WEIGHT, SCALE, ZERO, BIAS, THRESHOLDS, INDICES, KEPT = range(8)
#: Next to int8 weights, kernels take activations at 16 bits: of the largest result of one product.
INT8_TOLERANCE = 5e-5


def with_kernels(*names: str) -> None:
    """Give the package's library the kernels of ``linear`` that have a stage of one of these names."""
    kernels = all_kernels()["linear"]
    found = [kernel for kernel in kernels.kernels if any(stage.name in names for stage in kernel.stages)]
    assert len(found) == len(names)
    for kernel in found:
        register(kernels, kernel)


def call_model(op: OpDef, attributes: Mapping[str, Any], types: Sequence[TensorType | None]) -> onnx.ModelProto:
    """One call of an op, its function in the file, absent operands at the end left out as in files that actgraph writes."""
    model = build(op, op.complete(dict(attributes)), types, 21)
    for node in model.graph.node:
        while node.domain == "actgraph" and not node.input[-1]:
            node.input.pop()
    return model


def linear_model(operands: Mapping[int, Array], constant: tuple[int, ...] = (), **attributes: Any) -> onnx.ModelProto:
    """One call of ``linear``, its function in the file. Inputs are called in_0, in_1 ..., sizes are open.

    constant: the operands that are weights of the file.
    """
    op = get_op("linear")
    types = [TensorType(DType.of(operands[i].dtype), operands[i].shape) if i in operands else None for i in range(KEPT + 1)]
    model = build(op, op.complete(attributes), types, 21)
    for place in constant:
        value = next(v for v in model.graph.input if v.name == f"in_{place}")
        model.graph.input.remove(value)
        model.graph.initializer.append(numpy_helper.from_array(operands[place], value.name))
    return model


def names(operands: Mapping[int, Array], constant: tuple[int, ...] = ()) -> dict[str, Array]:
    return {f"in_{i}": array for i, array in operands.items() if i not in constant}


def session(model: onnx.ModelProto | Path, library: Path | str | None = "package", threads: int = 1) -> ort.InferenceSession:
    """library: a plugin, the package's own, or None for bodies."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if library == "package":
        register_library(options)
    elif library is not None:
        options.register_custom_ops_library(str(library))
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def close(got: Array, want: Array, tolerance: float) -> None:
    """Within ``tolerance`` of the largest result, which is not 0."""
    wide, expected = got.astype(np.float64), want.astype(np.float64)
    assert got.dtype == want.dtype and np.abs(expected).max() > 0
    np.testing.assert_allclose(wide, expected, rtol=0, atol=tolerance * np.abs(expected).max())
