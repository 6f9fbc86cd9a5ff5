"""The nonlinearities of ``feed_forward``, over rows of floats."""

from __future__ import annotations

import numpy as np
from numba import njit

from actgraph.runtime.kernels.numba.functions import erf, exp, tanh
from actgraph.runtime.kernels.numba.memory import OPTIONS, f32s

#: The places of ``activation`` among its choices.
SILU, GELU, GELU_TANH, RELU, RELU2 = range(5)
_F = np.float32
_ONE, _HALF, _ZERO = _F(1), _F(0.5), _F(0)
_ROOT_HALF, _ROOT_2_PI, _CUBIC = _F(0.7071067811865476), _F(0.7978845608028654), _F(0.044715)


@njit(**OPTIONS)
def activate(address, start, stop, activation):
    """``activation`` of the floats ``start`` to ``stop``, in place. NaN stays NaN."""
    h = f32s(address)
    if activation == SILU:
        for i in range(start, stop):
            h[i] = h[i] / (_ONE + exp(-h[i]))
    elif activation == GELU:
        for i in range(start, stop):
            h[i] = h[i] * _HALF * (_ONE + erf(h[i] * _ROOT_HALF))
    elif activation == GELU_TANH:
        for i in range(start, stop):
            v = h[i]
            h[i] = v * _HALF * (_ONE + tanh((v + v * v * v * _CUBIC) * _ROOT_2_PI))
    elif activation == RELU:
        for i in range(start, stop):
            h[i] = _ZERO if h[i] <= _ZERO else h[i]
    else:
        for i in range(start, stop):
            v = _ZERO if h[i] <= _ZERO else h[i]
            h[i] = v * v
