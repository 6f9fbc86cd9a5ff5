"""Triton kernels on a machine without CUDA: through Triton's interpreter, with what they read of a tensor on record.

``triton.jit`` decides between compiler and interpreter when it decorates. The kernels are therefore imported here with
``TRITON_INTERPRET`` set, and the variable is as it was afterwards: nothing else in the process is interpreted. Where there is a
CUDA device, they are compiled and the same tests run on it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed (it comes with the extra `dev` on Linux)")

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")

with pytest.MonkeyPatch.context() as patch:
    if not CUDA:
        patch.setenv("TRITON_INTERPRET", "1")
    from actgraph.runtime.kernels.triton import (  # noqa: F401
        common,
        feed_forward,
        feed_forward_kernels,
        linear,
        linear_kernels,
        plan,
        steering,
        steering_kernels,
    )


@contextlib.contextmanager
def library() -> Iterator[None]:
    """Triton's own library of device functions (``tl.sum`` ...) interpreted, though it may have been imported long before."""
    if CUDA:
        yield
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import mangle_type

    mangle_type(1)  # imports, at the first call, what does not import when the library is interpreted
    made: dict[int, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        for module in (tl, tl.core, tl.standard, tl.math):
            for name, value in list(vars(module).items()):
                if isinstance(value, triton.JITFunction):
                    patch.setattr(module, name, made.setdefault(id(value), InterpretedFunction(value.fn)))
        yield


@contextlib.contextmanager
def reads(tensor: torch.Tensor) -> Iterator[np.ndarray[Any, Any]]:
    """How often kernels read each element of a contiguous ``tensor``: an array of its shape that fills up."""
    from triton.runtime.interpreter import InterpreterBuilder

    counts = np.zeros(tensor.shape, np.int64)
    start, size = tensor.data_ptr(), tensor.element_size()
    load = InterpreterBuilder.create_masked_load

    def record(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].astype(np.int64)
        places = (addresses - start) // size
        np.add.at(counts.reshape(-1), places[(places >= 0) & (places < counts.size)], 1)
        return load(self, pointers, mask, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_masked_load", record)
        yield counts
