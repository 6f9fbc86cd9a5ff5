"""Numba kernels for torch tensors on the CPU: behind the ops of ``torch.ops.actgraph``, and as plain functions of sessions.

``register_torch_kernels`` gives the ops an implementation for CPU tensors that runs the kernel where there is one and else the
reference: eager code, ``torch.compile`` (which sees one opaque op) and autograd (whose formula differentiates the reference)
all reach it through torch's dispatcher. Sessions go without the dispatcher: a ``KernelCall`` holds the frame of one node.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from actgraph.ops.dtypes import DType
from actgraph.ops.registry import DOMAIN, OpDef, get_op
from actgraph.ops.torch_library import check_once, fresh, operand_types, register_all
from actgraph.runtime.kernels import calls
from actgraph.runtime.kernels.numba.kernel import OpKernels
from actgraph.runtime.kernels.registry import all_kernels
from actgraph.runtime.native.library import HEAD, TENSOR, Function, Variant, available, library


@dataclass
class _Frame:
    """A frame for operands of certain types and ranks. Addresses are written at each call, sizes when they change."""

    variant: Variant
    shape_of: Callable[[int, int, int], int]
    words: np.ndarray[Any, Any]
    address: int
    result: int  # where the result is described
    dtype: torch.dtype
    sizes: list[torch.Size | None]  # of the operands, as the frame has them
    shape: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self.reference = ctypes.byref(self.variant)


class _Frames(threading.local):
    """The frames of each thread."""

    def __init__(self) -> None:
        self.found: dict[tuple[tuple[torch.dtype, int] | None, ...], _Frame | None] = {}


class KernelCall:
    """Calls of one op with certain attributes. Thread-safe: each thread has its own frames."""

    def __init__(self, kernels: OpKernels, attributes: Mapping[str, Any]) -> None:
        self._kernels, self._definition = kernels, kernels.definition
        self._attributes = self._definition.complete(attributes)
        self._own = _Frames()
        self._run = library().ag_run
        self._compute: Callable[..., Any] = self._definition.eager or self._definition.reference

    def __call__(self, *operands: torch.Tensor | None) -> Any:
        """The result, by the kernel, or by the reference where there is none for these types and shapes."""
        key = tuple([None if t is None else (t.dtype, t.dim()) for t in operands])
        try:
            frame = self._own.found[key]
        except KeyError:
            frame = self._own.found[key] = self._frame(operands)
        if frame is None:
            return self._compute(*operands, **self._attributes)
        words, kept, changed = frame.words, operands, False
        for place, tensor in enumerate(operands):
            if tensor is None:
                continue
            if not tensor.is_contiguous():
                kept = (*kept, tensor := tensor.contiguous())  # lives until the call is over
            at = HEAD + TENSOR * place
            words[at] = tensor.data_ptr() or 1
            if tensor.shape != frame.sizes[place]:
                words[at + 3 : at + 3 + tensor.dim()] = frame.sizes[place] = tensor.shape
                changed = True
        if changed:
            self._reshape(frame)
        result = torch.empty(frame.shape, dtype=frame.dtype)
        words[frame.result] = result.data_ptr() or 1
        error = self._run(frame.reference, frame.address, torch.get_num_threads())
        if error:
            calls.check(self._kernels, error)
        return result

    @property
    def op(self) -> str:
        return self._definition.name

    def check(self, error: int) -> None:
        """Raise InputError for an error number."""
        calls.check(self._kernels, error)

    def bind(self, operands: Sequence[torch.Tensor | None]) -> tuple[Variant, np.ndarray[Any, Any], torch.Tensor] | None:
        """The kernel's variant, a frame that reads ``operands`` where they are, and the result that it will write.

        Nothing has run. ``None`` where there is no kernel for these types. Raises InputError for shapes that it refuses.
        """
        frame = self._frame(operands)
        if frame is None:
            return None
        for place, tensor in enumerate(operands):
            if tensor is not None:
                calls.describe(frame.words, place, tensor.data_ptr(), DType.of(tensor.dtype).onnx, tensor.shape)
        self._reshape(frame)
        result = torch.empty(frame.shape, dtype=frame.dtype)
        frame.words[frame.result] = result.data_ptr() or 1
        return frame.variant, frame.words, result

    def _reshape(self, frame: _Frame) -> None:
        """The shape of the result for the sizes that stand in the frame. Raises InputError."""
        error = frame.shape_of(frame.address, 0, 1)
        if error:
            frame.sizes = [None] * len(frame.sizes)
            calls.check(self._kernels, error)
        base = frame.result + 3
        frame.shape = tuple(frame.words[base : base + int(frame.words[base - 1])].tolist())

    def _frame(self, operands: Sequence[torch.Tensor | None]) -> _Frame | None:
        kernel = None
        if all(t is None or t.device.type == "cpu" for t in operands):
            kernel = self._kernels.find(operand_types(operands), self._attributes)
        if kernel is None:
            return None
        variant, made = calls.variant_of(self._kernels, kernel), self._kernels.result
        words = calls.frame_of(self._kernels, (), dict(self._attributes))
        for place, tensor in enumerate(operands):
            if tensor is not None:
                calls.describe(words, place, 0, DType.of(tensor.dtype).onnx, tensor.shape)
        count = len(self._definition.inputs)
        calls.describe(words, count, 0, made.onnx, ())
        return _Frame(
            variant, Function(variant.shape), words, words.ctypes.data, HEAD + TENSOR * count, made.torch,
            [None] * len(operands),
        )  # fmt: skip


def kernel_call(op: OpDef, attributes: Mapping[str, Any]) -> KernelCall | None:
    """What calls the kernels of ``op``, or ``None`` where it has none."""
    kernels = all_kernels().get(op.name) if len(op.outputs) == 1 else None
    return KernelCall(kernels, attributes) if kernels is not None else None


@functools.cache
def register_torch_kernels() -> torch.library.Library | None:
    """Put the kernels behind the ops of ``torch.ops.actgraph`` for CPU tensors. ``None`` where the library was not built."""
    if not available():
        return None
    register_all()
    made = torch.library.Library(DOMAIN, "IMPL")  # type: ignore[no-untyped-call]
    for name in all_kernels():
        if len(get_op(name).outputs) == 1:
            made.impl(name, functools.partial(_dispatched, name), "CPU")  # type: ignore[no-untyped-call]
    return made


def _dispatched(name: str, *operands: Any, **attributes: Any) -> Any:
    op = get_op(name)
    check_once(op, operands, attributes)
    given = tuple((key, tuple(value) if isinstance(value, list) else value) for key, value in attributes.items())
    return fresh(_call_of(name, given)(*operands), operands)


@functools.lru_cache(maxsize=1024)
def _call_of(name: str, attributes: tuple[tuple[str, Any], ...]) -> KernelCall:
    return KernelCall(all_kernels()[name], dict(attributes))
