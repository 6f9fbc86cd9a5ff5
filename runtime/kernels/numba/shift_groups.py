"""Norms of ``shift`` over other axes than the channels: elements that share their norms are a group, and are met one by one.

No path for speed: methods take norms over the channels, which ``steering`` does.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from actgraph.runtime.kernels.numba.frame import address, elements, integer, number, rank, share, size
from actgraph.runtime.kernels.numba.memory import OPTIONS, f32s, sqrt
from actgraph.runtime.kernels.numba.operands import channel_start, channel_step, inner_of, place_of, token_number

TENSORS, SCALE, NORM, AXES, AXIS = 5, 0, 1, 2, 3
_RESTORE, _RELATIVE = 1, 2
_ONE, _ZERO, _TINY = np.float32(1), np.float32(0), np.float32(1e-8)


@njit(**OPTIONS)
def norm_places(frame):
    """The axes of the norms, bit p for axis p from the front; 0: the channel axis alone. -1 where x has no such axis.

    In the frame a list of axes is a set: bit k for axis -k, bit 16 + k for axis k (see ``OpKernels.word``).
    """
    axes, given, found = rank(frame, 0), integer(frame, TENSORS, AXES), 0
    for bit in range(32):
        if (given >> bit) & 1:
            place = bit - 16 if bit >= 16 else axes - bit
            if place < 0 or place >= axes:
                return -1
            found |= 1 << place
    return 0 if found == 1 << place_of(frame, 0, integer(frame, TENSORS, AXIS)) else found


@njit(**OPTIONS)
def _is_shared(frame, axis, place):
    """Whether the vector has the same numbers all along an axis of x."""
    axes, back = rank(frame, 1), rank(frame, 0) - place
    if axes <= 1:
        return place != axis or elements(frame, 1) == 1
    return back > axes or size(frame, 1, -back) == 1


@njit(**OPTIONS)
def _offset(frame, places, index, wanted):
    """Where member ``index`` over the axes that are in ``places`` (that are not, where ``wanted`` is 0) lies, in elements."""
    left, stride, found = index, 1, 0
    for back in range(rank(frame, 0)):
        place = rank(frame, 0) - 1 - back
        length = size(frame, 0, place)
        if (places >> place) & 1 == wanted:
            found += left % length * stride
            left //= length
        stride *= length
    return found


@njit(**OPTIONS)
def _counts(frame, axis, places, index):
    """Whether member ``index`` of a group stands for its number of the vector: the first of those that share it does."""
    left = index
    for back in range(rank(frame, 0)):
        place = rank(frame, 0) - 1 - back
        if (places >> place) & 1:
            if left % size(frame, 0, place) != 0 and _is_shared(frame, axis, place):
                return False
            left //= size(frame, 0, place)
    return True


@njit(**OPTIONS)
def _members(frame, places):
    count = 1
    for place in range(rank(frame, 0)):
        if (places >> place) & 1:
            count *= size(frame, 0, place)
    return count


@njit(**OPTIONS)
def _at_least(value):
    return _TINY if value < _TINY else value


@njit(**OPTIONS)
def shift_groups(frame, places, part, nparts):
    """``shift`` with norms over the axes ``places``; a part has some of the groups."""
    axis, norm = place_of(frame, 0, integer(frame, TENSORS, AXIS)), integer(frame, TENSORS, NORM)
    scale, channels, inner = np.float32(number(frame, TENSORS, SCALE)), size(frame, 0, axis), inner_of(frame, 0, axis)
    x, v, y, step = f32s(address(frame, 0)), f32s(address(frame, 1)), f32s(address(frame, 4)), channel_step(frame, 1, 0, axis)
    members = _members(frame, places)
    first, last = share(elements(frame, 0) // members if members > 0 else 0, 1, part, nparts)
    for group in range(first, last):
        start, before, added, after = _offset(frame, places, group, 0), _ZERO, _ZERO, _ZERO
        for member in range(members):
            at = start + _offset(frame, places, member, 1)
            before += x[at] * x[at]
            if norm == _RELATIVE and _counts(frame, axis, places, member):
                token = at // (channels * inner) * inner + at % inner
                number_ = v[channel_start(frame, 1, 0, axis, token) + at // inner % channels * step]
                added += number_ * number_
        ratio = sqrt(before) / _at_least(sqrt(added)) if norm == _RELATIVE else _ONE
        for member in range(members):
            at = start + _offset(frame, places, member, 1)
            token = at // (channels * inner) * inner + at % inner
            c = token_number(frame, 3, 0, axis, token) * (token_number(frame, 2, 0, axis, token) * scale)
            y[at] = x[at]
            if c != _ZERO:
                y[at] = x[at] + c * (ratio * v[channel_start(frame, 1, 0, axis, token) + at // inner % channels * step])
            after += y[at] * y[at]
        if norm == _RESTORE:
            ratio = sqrt(before) / _at_least(sqrt(after))
            for member in range(members):
                at = start + _offset(frame, places, member, 1)
                token = at // (channels * inner) * inner + at % inner
                c = token_number(frame, 3, 0, axis, token) * (token_number(frame, 2, 0, axis, token) * scale)
                if c != _ZERO:
                    y[at] *= ratio
    return 0
