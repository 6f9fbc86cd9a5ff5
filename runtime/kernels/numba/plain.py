"""What recorded steps do between kernels of ops: copying rows, looking rows up, and arithmetic of equal shapes.

Each is one function over a frame of its own: words from 4 on, in the order that the function's text gives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit

from actgraph.runtime.kernels.numba.activations import activate
from actgraph.runtime.kernels.numba.memory import OPTIONS, f32s, i64s, u8s


@njit(**OPTIONS)
def copy_rows(frame, part, nparts):
    """[source, target, rows, bytes of a row, bytes from row to row of the source, of the target]"""
    words = i64s(frame)
    length = words[7]
    for row in range(words[6]):
        source, target = u8s(words[4] + row * words[8]), u8s(words[5] + row * words[9])
        for place in range(length):
            target[place] = source[place]
    return 0


@njit(**OPTIONS)
def look_up(frame, part, nparts):
    """[table, 64-bit places, target, how many, bytes of a row]"""
    words = i64s(frame)
    places, length = i64s(words[5]), words[8]
    for row in range(words[7]):
        source, target = u8s(words[4] + places[row] * length), u8s(words[6] + row * length)
        for place in range(length):
            target[place] = source[place]
    return 0


@njit(**OPTIONS)
def add(frame, part, nparts):
    """[a, b, result, how many floats]"""
    words = i64s(frame)
    a, b, y = f32s(words[4]), f32s(words[5]), f32s(words[6])
    for i in range(words[7]):
        y[i] = a[i] + b[i]
    return 0


@njit(**OPTIONS)
def subtract(frame, part, nparts):
    """[a, b, result, how many floats]"""
    words = i64s(frame)
    a, b, y = f32s(words[4]), f32s(words[5]), f32s(words[6])
    for i in range(words[7]):
        y[i] = a[i] - b[i]
    return 0


@njit(**OPTIONS)
def multiply(frame, part, nparts):
    """[a, b, result, how many floats]"""
    words = i64s(frame)
    a, b, y = f32s(words[4]), f32s(words[5]), f32s(words[6])
    for i in range(words[7]):
        y[i] = a[i] * b[i]
    return 0


@njit(**OPTIONS)
def activation(frame, part, nparts):
    """[x, result, how many floats, which (a place among the choices of ``activations``)]"""
    words = i64s(frame)
    x, y = f32s(words[4]), f32s(words[5])
    for i in range(words[6]):
        y[i] = x[i]
    activate(words[5], 0, words[6], words[7])
    return 0


PLAIN: dict[str, Callable[..., Any]] = {
    function.__name__: function for function in (copy_rows, look_up, add, subtract, multiply, activation)
}
