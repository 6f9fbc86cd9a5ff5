"""What recorded steps do between kernels of ops: arithmetic, conversions, copying and looking up rows.

Each is one function over a frame of its own: words from 4 on, in the order that the function's text gives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

from actgraph.runtime.kernels.numba import simd
from actgraph.runtime.kernels.numba.activations import activate
from actgraph.runtime.kernels.numba.cached import load_f16
from actgraph.runtime.kernels.numba.functions import exp, sine_cosine, tanh
from actgraph.runtime.kernels.numba.memory import OPTIONS, f32s, i16s, i64s, sqrt, u8s
from actgraph.runtime.kernels.numba.weights import F16, f16_bits, float_at

_ONE = np.float32(1)


# --- rows ---------------------------------------------------------------------------------------------------------------------


@njit(**OPTIONS)
def copy_rows(frame, part, nparts):
    """[source, target, rows, bytes of a row, bytes from row to row of the source, of the target; and around these:
    how often, bytes from one to the next of the source, of the target]"""
    words = i64s(frame)
    length = words[7]
    for block in range(words[10]):
        for row in range(words[6]):
            source = u8s(words[4] + block * words[11] + row * words[8])
            target = u8s(words[5] + block * words[12] + row * words[9])
            for place in range(length):
                target[place] = source[place]
    return 0


@njit(**OPTIONS)
def look_up(frame, part, nparts):
    """[table, 64-bit places, target, how many, bytes of a row, rows of the table]; 1 where there is no such row"""
    words = i64s(frame)
    places, length = i64s(words[5]), words[8]
    for row in range(words[7]):
        if places[row] < 0 or places[row] >= words[9]:
            return 1
        source, target = u8s(words[4] + places[row] * length), u8s(words[6] + row * length)
        for place in range(length):
            target[place] = source[place]
    return 0


# --- arithmetic ---------------------------------------------------------------------------------------------------------------


def _of_pairs(function: Any, view: Any) -> Any:
    """[a, b, result, rows, numbers in a row, of a: from row to row, from number to number (0 or 1); of b: the same]"""

    @njit(**OPTIONS)
    def pairs(frame, part, nparts):
        words = i64s(frame)
        y, length = view(words[6]), words[8]
        a, b = view(words[4]), view(words[5])
        for row in range(words[7]):
            to, p, q = row * length, row * words[9], row * words[11]
            if words[10] != 0 and words[12] != 0:
                for i in range(length):
                    y[to + i] = function(a[p + i], b[q + i])
            elif words[10] != 0:
                for i in range(length):
                    y[to + i] = function(a[p + i], b[q])
            else:
                for i in range(length):
                    y[to + i] = function(a[p], b[q + i * words[12]])
        return 0

    return pairs


def _of_each(function: Any) -> Any:
    """[x, result, rows, floats in a row, from row to row of x]"""

    @njit(**OPTIONS)
    def each(frame, part, nparts):
        words = i64s(frame)
        x, y, length = f32s(words[4]), f32s(words[5]), words[7]
        for row in range(words[6]):
            to, at = row * length, row * words[8]
            for i in range(length):
                y[to + i] = function(x[at + i])
        return 0

    return each


@njit(**OPTIONS)
def _sum(a, b):
    return a + b


@njit(**OPTIONS)
def _difference(a, b):
    return a - b


@njit(**OPTIONS)
def _product(a, b):
    return a * b


@njit(**OPTIONS)
def _quotient(a, b):
    return a / b


@njit(**OPTIONS)
def _larger(a, b):
    return a if a >= b or a != a else b


@njit(**OPTIONS)
def _smaller(a, b):
    return a if a <= b or a != a else b


@njit(**OPTIONS)
def _negative(x):
    return -x


@njit(**OPTIONS)
def _square(x):
    return x * x


@njit(**OPTIONS)
def _cube(x):
    return x * x * x


@njit(**OPTIONS)
def _inverse_root(x):
    return _ONE / sqrt(x)


@njit(**OPTIONS)
def _sine(x):
    return sine_cosine(x)[0]


@njit(**OPTIONS)
def _cosine(x):
    return sine_cosine(x)[1]


@njit(**OPTIONS)
def _sigmoid(x):
    return _ONE / (_ONE + exp(-x))


@njit(**OPTIONS)
def activation(frame, part, nparts):
    """[x, result, how many floats, which (a place among the choices of ``activations``)]"""
    words = i64s(frame)
    x, y = f32s(words[4]), f32s(words[5])
    for i in range(words[6]):
        y[i] = x[i]
    activate(words[5], 0, words[6], words[7])
    return 0


@njit(**OPTIONS)
def sum_rows(frame, part, nparts):
    """[x, result, rows, floats in a row]: the sum of each row"""
    words = i64s(frame)
    x, y, length = f32s(words[4]), f32s(words[5]), words[7]
    for row in range(words[6]):
        total = np.float32(0)
        for i in range(length):
            total += x[row * length + i]
        y[row] = total
    return 0


# --- conversions: [source, target, how many] ----------------------------------------------------------------------------------


@njit(**OPTIONS)
def i64_to_f32(frame, part, nparts):
    words = i64s(frame)
    x, y = i64s(words[4]), f32s(words[5])
    for i in range(words[6]):
        y[i] = np.float32(x[i])
    return 0


@njit(**OPTIONS)
def i64_to_bool(frame, part, nparts):
    words = i64s(frame)
    x, y = i64s(words[4]), u8s(words[5])
    for i in range(words[6]):
        y[i] = np.uint8(x[i] != 0)
    return 0


@njit(**OPTIONS)
def f32_to_bool(frame, part, nparts):
    words = i64s(frame)
    x, y = f32s(words[4]), u8s(words[5])
    for i in range(words[6]):
        y[i] = np.uint8(x[i] != 0)
    return 0


@njit(**OPTIONS)
def bool_to_f32(frame, part, nparts):
    words = i64s(frame)
    x, y = u8s(words[4]), f32s(words[5])
    for i in range(words[6]):
        y[i] = np.float32(x[i])
    return 0


@njit(**OPTIONS)
def f32_to_f16(frame, part, nparts):
    words = i64s(frame)
    x, y = f32s(words[4]), i16s(words[5])
    for i in range(words[6]):
        y[i] = f16_bits(x[i])
    return 0


@njit(**OPTIONS)
def f16_to_f32(frame, part, nparts):
    words = i64s(frame)
    x, y, whole = words[4], words[5], words[6] // 16 * 16
    for i in range(0, whole, 16):
        simd.store(y + 4 * i, load_f16(x + 2 * i))
    for i in range(whole, words[6]):
        f32s(y)[i] = float_at(x, F16, i)
    return 0


PLAIN: dict[str, Callable[..., Any]] = {
    "copy_rows": copy_rows, "look_up": look_up, "activation": activation,
    "add": _of_pairs(_sum, f32s), "subtract": _of_pairs(_difference, f32s), "multiply": _of_pairs(_product, f32s),
    "divide": _of_pairs(_quotient, f32s), "larger": _of_pairs(_larger, f32s), "smaller": _of_pairs(_smaller, f32s),
    "add_i64": _of_pairs(_sum, i64s), "subtract_i64": _of_pairs(_difference, i64s),
    "negate": _of_each(_negative), "square": _of_each(_square), "cube": _of_each(_cube), "sine": _of_each(_sine),
    "cosine": _of_each(_cosine), "tanh": _of_each(tanh), "exp": _of_each(exp), "sigmoid": _of_each(_sigmoid),
    "inverse_root": _of_each(_inverse_root),
    "sum_rows": sum_rows, "f32_to_bool": f32_to_bool, "bool_to_f32": bool_to_f32,
    "i64_to_f32": i64_to_f32, "i64_to_bool": i64_to_bool, "f32_to_f16": f32_to_f16, "f16_to_f32": f16_to_f32,
}  # fmt: skip
