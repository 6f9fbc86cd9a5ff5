"""Which ops have kernels for processors, and which kernel a node of a graph gets."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from actgraph.ops.dtypes import DType
from actgraph.runtime.kernels.numba.kernel import NumbaKernel, OpKernels


@functools.cache
def all_kernels() -> Mapping[str, OpKernels]:
    """The kernels of each op that has some, by the name of the op."""
    from actgraph.runtime.kernels.numba import linear_gathered  # noqa: F401  # it adds to those of linear
    from actgraph.runtime.kernels.numba.linear import LINEAR

    return {kernels.op: kernels for kernels in (LINEAR,)}


def kernel_for(op: str, types: Sequence[DType | None], attributes: dict[str, Any]) -> tuple[OpKernels, NumbaKernel] | None:
    """The kernel for a call of ``op`` with operands of these element types (``None``: absent) and complete attributes."""
    kernels = all_kernels().get(op)
    kernel = kernels.find(types, attributes) if kernels is not None else None
    return (kernels, kernel) if kernels is not None and kernel is not None else None
