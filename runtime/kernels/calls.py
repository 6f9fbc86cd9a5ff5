"""Calling numba kernels from Python, with the thread pool of the C library."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from actgraph.errors import InputError
from actgraph.graph.graph import Array
from actgraph.ops.dtypes import DType
from actgraph.ops.shapes import TensorType
from actgraph.runtime.kernels.numba.kernel import NumbaKernel, OpKernels, Stage
from actgraph.runtime.kernels.numba.objects import loaded
from actgraph.runtime.native.library import HEAD, RANK, TENSOR, Variant, library, words
from actgraph.runtime.native.tables import key_of


@functools.cache
def variant_of(kernels: Any, kernel: NumbaKernel) -> Variant:
    """A kernel compiled and loaded, as the C library takes it. ``kernels``: its ``OpKernels``."""
    made = Variant()
    keys = key_of(kernels, kernel)
    made.key[: len(keys)] = keys
    made.shape = _address(kernel.shape)
    made.scratch = _address(kernel.scratch) if kernel.scratch is not None else None
    made.stages = len(kernel.stages)
    for place, stage in enumerate(kernel.stages):
        made.stage[place], made.parallel[place] = _address(stage), int(stage.parallel)
    return made


def _address(stage: Stage) -> int:
    return loaded(stage.name, stage.function)


def frame_of(kernels: OpKernels, operands: Sequence[Array | None], attributes: dict[str, Any]) -> Array:
    """A frame with the inputs and attributes of a call. The arrays must be contiguous, and outlive it."""
    op = kernels.definition
    count = len(op.inputs) + len(op.outputs)
    frame = np.zeros(words(count, len(op.attributes)), np.int64)
    for place, operand in enumerate(operands):
        if operand is not None:
            describe(frame, place, operand.ctypes.data, DType.of(operand.dtype).onnx, operand.shape)
    for place, attribute in enumerate(op.attributes):
        value = attributes[attribute.name]
        word = HEAD + TENSOR * count + place
        frame[word] = np.float64(value).view(np.int64) if attribute.kind == "float" else kernels.word(attribute.name, value)
    return frame


def describe(frame: Array, tensor: int, address: int, kind: int, shape: Sequence[int]) -> None:
    """Write a tensor into a frame."""
    base = HEAD + TENSOR * tensor
    if len(shape) > RANK:
        raise InputError(f"a kernel takes at most {RANK} axes, not {len(shape)}")
    frame[base : base + 3] = (address or 1, kind, len(shape))
    frame[base + 3 : base + 3 + len(shape)] = shape


def call(kernels: OpKernels, operands: Sequence[Array | None], attributes: dict[str, Any], threads: int = 1) -> Array:
    """Run the kernel of an op on arrays. Raises InputError for inputs that it refuses, or that have no kernel."""
    op = kernels.definition
    arrays = [None if operand is None else np.asarray(operand, order="C") for operand in operands]
    arrays = [*arrays, *[None] * (len(op.inputs) - len(arrays))]
    complete = op.complete(attributes)
    types = [None if array is None else TensorType(DType.of(array.dtype), array.shape) for array in arrays]
    kernel = kernels.find(types, complete)
    if kernel is None:
        raise InputError(f"{op.qualified_name} has no kernel for {', '.join(map(str, types))}")
    variant, frame = variant_of(kernels, kernel), frame_of(kernels, arrays, complete)
    check(kernels, _function(variant.shape)(frame.ctypes.data, 0, 1))
    base = HEAD + TENSOR * len(op.inputs)
    result = np.empty(frame[base + 3 : base + 3 + int(frame[base + 2])], kernels.result.numpy)
    describe(frame, len(op.inputs), result.ctypes.data, kernels.result.onnx, result.shape)
    check(kernels, library().ag_run(ctypes.byref(variant), frame.ctypes.data, threads))
    return result


def _function(address: int) -> Any:
    return ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)(address)


def check(kernels: OpKernels, error: int) -> None:
    """Raise InputError for an error number."""
    if error:
        text = kernels.errors[error - 1] if 0 < error <= len(kernels.errors) else "there is no memory"
        raise InputError(f"{kernels.definition.qualified_name}: {text}")
