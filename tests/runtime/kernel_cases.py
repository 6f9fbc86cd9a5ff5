"""Running numba kernels in tests: in plain calls, and as custom operators of onnxruntime."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime as ort

from actgraph.graph.graph import Array
from actgraph.ops.dtypes import DType
from actgraph.ops.registry import OpDef
from actgraph.runtime.kernels.registry import all_kernels, kernel_for
from actgraph.runtime.native.library import library
from actgraph.runtime.ort_kernels import register, register_library
from tests.conformance.harness import Case, feeds, from_torch, to_torch, types_of
from tests.runtime.plugin_models import call_model

THREADS = (1, 2, 3)


def float32_cases(names: Sequence[str]) -> list[Case]:
    """Every sample of the ops whose activations may be float32."""
    made = []
    for name in names:
        op = all_kernels()[name].definition
        for index, sample in enumerate(op.samples):
            kinds = sample.dtypes or tuple(op.inputs[0].dtypes)
            made += [Case(op, index, kind) for kind in sorted(kinds) if kind is DType.F32 or kind.is_integer]
    return made


def claimed(case: Case) -> bool:
    return kernel_for(case.op.name, types_of(case.operands()), case.attributes) is not None


def reference(op: OpDef, operands: Sequence[Array | None], attributes: dict[str, Any]) -> Array:
    """What the op's own definition gives, as numpy has it."""
    result = op.reference(*(to_torch(a) for a in operands), **attributes)
    assert not isinstance(result, tuple)
    return from_torch(result)


@functools.lru_cache(maxsize=256)
def _session(model: bytes) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 2
    register_library(options)
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run_as_operator(op: OpDef, operands: Sequence[Array | None], attributes: dict[str, Any], threads: int) -> list[Array]:
    """A model of this one call in onnxruntime, the op's function in the file; the kernel must be what ran."""
    chosen = kernel_for(op.name, types_of(operands), op.complete(attributes))
    assert chosen is not None
    register(*chosen)
    session = _session(call_model(op, attributes, types_of(operands)).SerializeToString())
    library().ag_set_parts(threads)
    try:
        before = library().ag_runs()
        results: list[Array] = session.run(None, feeds(operands))
        assert library().ag_runs() == before + 1
    finally:
        library().ag_set_parts(0)
    return results


def agree(got: Array, want: Array, tolerance: float, size: float | None = None) -> None:
    """NaN and infinities in the same places; the rest within ``tolerance`` of ``size`` (the largest result)."""
    assert got.shape == want.shape
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    finite = np.isfinite(want)
    np.testing.assert_array_equal(np.where(finite, 0, got), np.where(finite, 0, want))
    if finite.any():
        largest = np.abs(want[finite]).max() if size is None else size
        np.testing.assert_allclose(got[finite], want[finite], rtol=0, atol=tolerance * max(largest, 1e-30))
