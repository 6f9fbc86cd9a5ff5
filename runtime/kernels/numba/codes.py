"""Activations as pairs of bytes, so that integer instructions multiply them by integer weights.

A row h is ``step * (256 high + low)`` with ``high`` and ``low`` in -128..127 and ``step = max|h| / 32639``: 16 bits, which next
to weights of 8 or 4 bits is as good as float32 (an error of at most 2^-16 of the largest activation for each). Both bytes go
through instructions for unsigned times signed bytes with the weights as the unsigned ones.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from actgraph.runtime.kernels.numba.functions import round_even
from actgraph.runtime.kernels.numba.memory import OPTIONS, bits_as_f32, f32s, i8s, i32s

STEPS = 32639  # 127 * 256 + 127
LEAST = np.float32(1.1754944e-38)  # the smallest normal number: its inverse is finite


@njit(**OPTIONS)
def step_of(h, count):
    """The step for a row: positive, 0 for a row of zeros, or NaN where a value is not finite."""
    bits, largest = i32s(h), np.int32(0)
    for i in range(count):  # sizes of floats are in the order of their bits, as which vectors compare them
        largest = max(largest, bits[i] & np.int32(0x7FFFFFFF))
    if largest >= np.int32(0x7F800000):
        return np.float32(np.nan)
    return max(bits_as_f32(largest) / np.float32(STEPS), LEAST) if largest != 0 else np.float32(0)


@njit(**OPTIONS)
def code(value, inverse):
    """A value in steps, as an integer."""
    return np.int32(round_even(value * inverse))


@njit(**OPTIONS)
def low_byte(value):
    return ((value + np.int32(128)) & np.int32(255)) - np.int32(128)


@njit(**OPTIONS)
def inverse_of(step):
    return np.float32(1) / step if step > np.float32(0) else np.float32(0)


@njit(**OPTIONS)
def write_planes(h, count, padded, step, high, low):
    """``h`` [count] as ``high`` and ``low`` [padded]. Returns the sum of the codes."""
    h, high, low = f32s(h), i8s(high), i8s(low)
    inverse, total = inverse_of(step), np.int64(0)
    for i in range(count):
        value = code(h[i], inverse)
        rest = low_byte(value)
        low[i] = np.int8(rest)
        high[i] = np.int8((value - rest) >> np.int32(8))
        total += np.int64(value)
    for i in range(count, padded):
        low[i] = high[i] = np.int8(0)
    return total


#: What a chunk of 64 bytes of weights meets: for weights of a byte 64 activations, of half a byte 128.
BYTE_CHUNK, HALF_CHUNK = 3 * 64, 5 * 64


@njit(**OPTIONS)
def write_byte_chunks(h, count, step, zero, chunks):
    """``h`` [count] in chunks of 64: [64 high][64 low][16 times -zero * (the sum of 4 codes)]."""
    h = f32s(h)
    inverse = inverse_of(step)
    for chunk in range((count + 63) // 64):
        bytes_, sums = i8s(chunks + chunk * BYTE_CHUNK), i32s(chunks + chunk * BYTE_CHUNK + 128)
        for lane in range(16):
            total = np.int32(0)
            for place in range(4 * lane, 4 * lane + 4):
                i = 64 * chunk + place
                value = code(h[i], inverse) if i < count else np.int32(0)
                rest = low_byte(value)
                bytes_[place] = np.int8((value - rest) >> np.int32(8))
                bytes_[64 + place] = np.int8(rest)
                total += value
            sums[lane] = -np.int32(zero) * total


@njit(**OPTIONS)
def write_half_chunks(h, count, step, zero, chunks):
    """``h`` [count] in chunks of 128: [64 high of even places][64 high of odd][64 low of even][64 low of odd][16 sums].

    A byte of weights holds an even place in its lower half and the odd one after it in its upper half; a lane of 4 bytes is 8
    places. The sums are -zero times those of 8 codes.
    """
    h = f32s(h)
    inverse = inverse_of(step)
    for chunk in range((count + 127) // 128):
        bytes_, sums = i8s(chunks + chunk * HALF_CHUNK), i32s(chunks + chunk * HALF_CHUNK + 256)
        for lane in range(16):
            total = np.int32(0)
            for place in range(8 * lane, 8 * lane + 8):
                i = 128 * chunk + place
                value = code(h[i], inverse) if i < count else np.int32(0)
                rest = low_byte(value)
                to = 64 * (place & 1) + place // 2
                bytes_[to] = np.int8((value - rest) >> np.int32(8))
                bytes_[128 + to] = np.int8(rest)
                total += value
            sums[lane] = -np.int32(zero) * total
