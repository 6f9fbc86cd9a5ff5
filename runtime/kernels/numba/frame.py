"""The frame: everything about one call of a kernel, in an array of 64-bit words (native/kernel.h says the same in C).

    0             address of scratch memory
    1             how many parts the parallel stages have
    4 + 12 i      tensor i, inputs before outputs: address (0: absent), ONNX element type, rank, 8 sizes, room (see ``room``)
    4 + 12 T + j  attribute j, in the order of the op: an integer, the bits of a double, or a string's place among its choices

The functions of a kernel take ``(frame, part, nparts)``, all ``intp``, and return 0 or the number of an error of their op.
Each stage sees the same frame; parallel stages are called once for each part, by any thread, at the same time.
"""

from __future__ import annotations

from numba import njit

from actgraph.runtime.kernels.numba.memory import OPTIONS, f64s, i64s
from actgraph.runtime.native.library import HEAD, RANK, ROOM, TENSOR


@njit(**OPTIONS)
def scratch(frame):
    """Where the scratch memory is, aligned to 64 bytes."""
    return i64s(frame)[0]


@njit(**OPTIONS)
def parts(frame):
    """How many parts the parallel stages of this call have."""
    return i64s(frame)[1]


@njit(**OPTIONS)
def address(frame, tensor):
    """Where tensor ``tensor`` begins; 0 when it is absent."""
    return i64s(frame)[HEAD + TENSOR * tensor]


@njit(**OPTIONS)
def element_type(frame, tensor):
    """The ONNX number of its element type."""
    return i64s(frame)[HEAD + TENSOR * tensor + 1]


@njit(**OPTIONS)
def rank(frame, tensor):
    return i64s(frame)[HEAD + TENSOR * tensor + 2]


@njit(**OPTIONS)
def size(frame, tensor, axis):
    """The size of an axis, counted from the end where it is negative."""
    words = i64s(frame)
    base = HEAD + TENSOR * tensor
    return words[base + 3 + axis] if axis >= 0 else words[base + 3 + words[base + 2] + axis]


@njit(**OPTIONS)
def room(frame, tensor):
    """How many rows (of the last axis) lie between neighbours on the third axis from the end: those that the tensor has, or
    more where it is the front of a larger buffer. Kernels that read such fronts use this; all others get whole tensors."""
    more = i64s(frame)[HEAD + TENSOR * tensor + ROOM]
    return more if more > 0 else size(frame, tensor, -2)


@njit(**OPTIONS)
def elements(frame, tensor):
    """How many elements it has."""
    count = 1
    for axis in range(rank(frame, tensor)):
        count *= size(frame, tensor, axis)
    return count


@njit(**OPTIONS)
def rows(frame, tensor):
    """The product of all sizes but the last."""
    count = 1
    for axis in range(rank(frame, tensor) - 1):
        count *= size(frame, tensor, axis)
    return count


@njit(**OPTIONS)
def set_shape_like(frame, tensor, other):
    """Give an output the shape of another tensor."""
    words = i64s(frame)
    to, source = HEAD + TENSOR * tensor, HEAD + TENSOR * other
    for word in range(2, 3 + RANK):
        words[to + word] = words[source + word]


@njit(**OPTIONS)
def set_size(frame, tensor, axis, value):
    words = i64s(frame)
    base = HEAD + TENSOR * tensor
    words[base + 3 + (axis if axis >= 0 else words[base + 2] + axis)] = value


@njit(**OPTIONS)
def integer(frame, tensors, attribute):
    """An attribute of an op of ``tensors`` inputs and outputs: an integer, or a string's place among its choices."""
    return i64s(frame)[HEAD + TENSOR * tensors + attribute]


@njit(**OPTIONS)
def number(frame, tensors, attribute):
    """An attribute that is a float."""
    return f64s(frame)[HEAD + TENSOR * tensors + attribute]


@njit(**OPTIONS)
def share(total, unit, part, nparts):
    """The ``(start, stop)`` of a part of ``total`` things, cut at multiples of ``unit``."""
    units = (total + unit - 1) // unit
    start, stop = units * part // nparts * unit, units * (part + 1) // nparts * unit
    return min(start, total), min(stop, total)
