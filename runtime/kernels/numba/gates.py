"""Which inputs a gate keeps: thresholds, the k largest, a listed set (the ops gate, topk_gate, index_gate)."""

from __future__ import annotations

import numpy as np
from numba import njit

from actgraph.runtime.kernels.numba.frame import address, element_type, rank, size
from actgraph.runtime.kernels.numba.memory import OPTIONS, f32s, i32s, i64s
from actgraph.runtime.kernels.numba.operands import token_index

#: The places of ``keep`` among its choices.
NONE, ABOVE, NOT_BELOW, TOP_K, LISTED = range(5)
_I32 = 6
_SIGNLESS, _INFINITY = np.int32(0x7FFFFFFF), np.int32(0x7F800000)


@njit(**OPTIONS)
def drop_below(x, y, count, keep, threshold, thresholds, many):
    """``x`` [count] to ``y`` with +0.0 for what a threshold drops.

    thresholds: where they are, 0 for none; ``many``: one for each channel. NaN is kept.
    """
    x, y = f32s(x), f32s(y)
    t = np.float32(threshold)
    if thresholds != 0 and not many:
        t = f32s(thresholds)[0]
    if keep == ABOVE:
        if many:
            each = f32s(thresholds)
            for i in range(count):
                y[i] = np.float32(0) if abs(x[i]) <= each[i] else x[i]
        else:
            for i in range(count):
                y[i] = np.float32(0) if abs(x[i]) <= t else x[i]
    elif many:
        each = f32s(thresholds)
        for i in range(count):
            y[i] = np.float32(0) if x[i] < each[i] else x[i]
    else:
        for i in range(count):
            y[i] = np.float32(0) if x[i] < t else x[i]


@njit(**OPTIONS)
def _magnitude(bits):
    """The order of a float's magnitude as an integer; NaN ranks with infinity."""
    return min(bits & _SIGNLESS, _INFINITY)


@njit(**OPTIONS)
def keep_largest(x, y, count, k, counts):
    """``x`` [count] to ``y`` with +0.0 for all but the ``k`` largest magnitudes; of equal ones the first are kept.

    counts: memory for 256 32-bit integers.
    """
    bits, x, y, counts = i32s(x), f32s(x), f32s(y), i32s(counts)
    if k >= count:
        for i in range(count):
            y[i] = x[i]
        return
    found, left = np.int32(0), k  # the bits of the k-th largest, byte by byte; how many of these bits are still to find
    for shift in (24, 16, 8, 0):
        for i in range(256):
            counts[i] = 0
        for i in range(count):
            size_ = _magnitude(bits[i])
            if shift == 24 or (size_ >> (shift + 8)) == (found >> (shift + 8)):
                counts[(size_ >> shift) & 255] += 1
        byte = 255
        while byte > 0 and counts[byte] < left:
            left -= counts[byte]
            byte -= 1
        found |= np.int32(byte) << np.int32(shift)
    for i in range(count):
        size_ = _magnitude(bits[i])
        kept = size_ > found
        if size_ == found and left > 0:
            kept = True
            left -= 1
        y[i] = x[i] if kept else np.float32(0)


@njit(**OPTIONS)
def keep_listed(x, y, count, frame, indices, token, tensor):
    """``x`` [count] to ``y`` with +0.0 for the channels that are not listed. Returns whether the list is sound."""
    x, y = f32s(x), f32s(y)
    for i in range(count):
        y[i] = np.float32(0)
    length = size(frame, indices, -1)
    row = token_index(frame, indices, rank(frame, indices) - 1, 1, tensor, rank(frame, tensor) - 1, token)
    start, short = row * length, element_type(frame, indices) == _I32
    for j in range(length):
        index = np.int64(i32s(address(frame, indices))[start + j]) if short else i64s(address(frame, indices))[start + j]
        if index >= count:
            return False
        if index >= 0:
            y[index] = x[index]
    return True
