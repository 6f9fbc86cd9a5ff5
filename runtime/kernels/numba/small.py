"""Operations that do a little for each element: the smaller ones stay on one thread."""

from __future__ import annotations

from typing import Any

from numba import njit

from actgraph.runtime.kernels.numba.frame import elements
from actgraph.runtime.kernels.numba.kernel import Function, NumbaKernel, Stage
from actgraph.runtime.kernels.numba.memory import OPTIONS, i64s

#: Elements of the first operand that are worth another thread.
_WORTH = 16384


@njit(**OPTIONS)
def fewer_parts(frame, part, nparts):
    """A scratch function of operations that need no scratch memory: small ones get fewer parts, down to one.

    Handing one token's norm to a second thread was measured to cost as much as the norm (0.5
    microseconds). A caller that runs all parts anyway is right, too: parts beyond the work are empty.
    """
    words = i64s(frame)
    words[1] = max(1, min(words[1], elements(frame, 0) // _WORTH))
    return 64


def small_kernel(name: str, shape: Function, run: Function, attributes: tuple[Any, ...] = ()) -> NumbaKernel:
    """A kernel of one parallel stage that needs no scratch memory. attributes: as in ``NumbaKernel``."""
    stages = (Stage(name, run, parallel=True),)
    return NumbaKernel((), attributes, Stage(f"{name}_shape", shape), stages, Stage("fewer_parts", fewer_parts))
