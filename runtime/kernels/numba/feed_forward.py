"""The op ``feed_forward``: up (and gate) rows, activation, threshold, and the down rows of neurons that are not dropped.

Its three products are those of ``linear``, whose functions take frames: three of them lie at the head of scratch memory. x is
prepared once. A part of the first parallel stage has a range of the neurons: their gates, the activation, then the up rows
(under ``sparse = "act"`` of the neurons that the gate keeps: the others are never read). Then the neurons that are not 0 are
listed, and a part of the second parallel stage adds up a range of their down rows.

Measured on one thread of a loaded AVX-512 machine, cold weights of 768 x 2048 x 768: as long as the three linears;
with 39 % of the neurons kept by "act" 0.64 of the dense time in float32 (0.59 of the weights are read).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from actgraph.ops.dtypes import DType
from actgraph.ops.shapes import TensorType
from actgraph.runtime.kernels.numba import gates, linear, linear_gathered
from actgraph.runtime.kernels.numba.activations import activate
from actgraph.runtime.kernels.numba.frame import (
    address,
    element_type,
    elements,
    integer,
    number,
    parts,
    rank,
    rows,
    scratch,
    set_shape_like,
    set_size,
    share,
    size,
)
from actgraph.runtime.kernels.numba.kernel import NumbaKernel, OpKernels, Stage
from actgraph.runtime.kernels.numba.linear import CODES, FLOATS, code_products, float_products, preparation
from actgraph.runtime.kernels.numba.linear_gathered import choose, code_main, finish, float_main
from actgraph.runtime.kernels.numba.memory import OPTIONS, f32s, i64s, u8s
from actgraph.runtime.kernels.numba.weights import BF16, F8E4M3, F8E5M2, F16, F32, I8, PACKED_U4, U8
from actgraph.runtime.native.library import HEAD, TENSOR, words

X, UP, DOWN, GATE, UP_SCALE, DOWN_SCALE, GATE_SCALE, UP_BIAS, DOWN_BIAS, GATE_BIAS, THRESHOLDS, Y = range(12)
ACTIVATION, BLOCK, PACKED, SPARSE, KEEP, THRESHOLD = range(6)
NO_GATE, ON_ACT, ON_HIDDEN = range(3)
TENSORS = 12
#: Bytes of a frame of ``linear``, and of the four of them (gate, up, down, and the constant 8) that begin the scratch memory.
FRAME = (words(linear.TENSORS, 6) * 8 + 63) // 64 * 64
HEADS = 3 * FRAME + 64


@njit(**OPTIONS)
def _inputs(frame):
    return size(frame, X, -1)


@njit(**OPTIONS)
def _neurons(frame):
    return size(frame, UP, 0)


@njit(**OPTIONS)
def _unfit(frame, scale, one, groups):
    """Whether a scale has another size than 1, one per output, or one per group."""
    if address(frame, scale) == 0 or elements(frame, scale) == 1:
        return False
    return elements(frame, scale) != (groups if integer(frame, TENSORS, BLOCK) > 0 else one)


@njit(**OPTIONS)
def _wrong_bias(frame, bias, count):
    return address(frame, bias) != 0 and elements(frame, bias) != count


@njit(**OPTIONS)
def _readable(kind):
    """Whether ``linear.plain_sum`` reads weights of this element type."""
    return kind in (F32, F16, BF16, F8E4M3, F8E5M2, I8, U8)


@njit(**OPTIONS)
def _alike(frame):
    """Whether gate and up are stored alike, so that they meet x in one form."""
    if element_type(frame, GATE) != element_type(frame, UP):
        return False
    if (address(frame, GATE_SCALE) == 0) != (address(frame, UP_SCALE) == 0):
        return False
    return address(frame, UP_SCALE) == 0 or elements(frame, GATE_SCALE) == elements(frame, UP_SCALE)


@njit(**OPTIONS)
def shape(frame, part, nparts):
    half = 2 if integer(frame, TENSORS, PACKED) != 0 else 1
    if rank(frame, X) < 1 or rank(frame, UP) != 2 or rank(frame, DOWN) != 2:
        return 1
    inputs, neurons, outputs = _inputs(frame), _neurons(frame), size(frame, DOWN, 1) * half
    if size(frame, UP, 1) * half != inputs or size(frame, DOWN, 0) != neurons:
        return 1
    if address(frame, GATE) != 0:
        if rank(frame, GATE) != 2 or size(frame, GATE, 0) != neurons or size(frame, GATE, 1) * half != inputs:
            return 1
        if not _readable(element_type(frame, GATE)):
            return 4
    if integer(frame, TENSORS, BLOCK) < 0:
        return 2
    block = max(integer(frame, TENSORS, BLOCK), 1)
    up_groups, down_groups = neurons * ((inputs + block - 1) // block), outputs * ((neurons + block - 1) // block)
    if _unfit(frame, UP_SCALE, neurons, up_groups) or _unfit(frame, DOWN_SCALE, outputs, down_groups):
        return 2
    if address(frame, GATE) != 0 and _unfit(frame, GATE_SCALE, neurons, up_groups):
        return 2
    if _wrong_bias(frame, UP_BIAS, neurons) or _wrong_bias(frame, GATE_BIAS, neurons) or _wrong_bias(frame, DOWN_BIAS, outputs):
        return 3
    if address(frame, THRESHOLDS) != 0 and elements(frame, THRESHOLDS) != 1 and elements(frame, THRESHOLDS) != neurons:
        return 3
    set_shape_like(frame, Y, X)
    set_size(frame, Y, -1, outputs)
    return 0


# --- scratch: [3 frames, an 8][act, later hidden: F floats a token][up: F floats a token][chosen][of gate and up][of down] --


@njit(**OPTIONS)
def _buffer(frame):
    return (rows(frame, X) * _neurons(frame) * 4 + 63) // 64 * 64


@njit(**OPTIONS)
def _linear_at(frame):
    """The scratch memory of the gate and up products."""
    return scratch(frame) + HEADS + 2 * _buffer(frame) + (_neurons(frame) * 8 + 63) // 64 * 64


@njit(**OPTIONS)
def scratch_bytes(frame, part, nparts):
    tokens, inputs, neurons = rows(frame, X), _inputs(frame), _neurons(frame)
    own = HEADS + 2 * _buffer(frame) + neurons * 8 + 64
    return (
        own + linear.out_in_bytes(tokens, inputs, 0) + 64
        + linear_gathered.in_out_bytes(tokens, neurons, size(frame, Y, -1), parts(frame))
    )  # fmt: skip


@njit(**OPTIONS)
def _put(to, place, frame, tensor):
    """Tensor ``tensor`` of this frame as tensor ``place`` of the frame at ``to``."""
    target, source = i64s(to), i64s(frame)
    for word in range(TENSOR):
        target[HEAD + TENSOR * place + word] = source[HEAD + TENSOR * tensor + word]


@njit(**OPTIONS)
def _put_rows(to, place, values, tokens, channels):
    """Floats [tokens, channels] as tensor ``place`` of the frame at ``to``."""
    target, at = i64s(to), HEAD + TENSOR * place
    target[at], target[at + 1], target[at + 2], target[at + 3], target[at + 4] = values, F32, 2, tokens, channels


@njit(**OPTIONS)
def _fill(to, frame, layout, weight, scale, bias, memory):
    """A frame of ``linear`` at ``to``, but for x and y."""
    target = i64s(to)
    for word in range(FRAME // 8):
        target[word] = 0
    target[0], target[1] = memory, parts(frame)
    _put(to, linear.WEIGHT, frame, weight)
    _put(to, linear.BIAS, frame, bias)
    attributes = HEAD + TENSOR * linear.TENSORS
    target[attributes + linear.LAYOUT] = layout
    if address(frame, scale) != 0:
        _put(to, linear.SCALE, frame, scale)
        target[attributes + linear.BLOCK] = integer(frame, TENSORS, BLOCK)
        target[attributes + linear.PACKED] = integer(frame, TENSORS, PACKED)
        if integer(frame, TENSORS, PACKED) == PACKED_U4:
            eight = HEAD + TENSOR * linear.ZERO
            target[eight], target[eight + 1] = scratch(frame) + 3 * FRAME, U8
            u8s(scratch(frame) + 3 * FRAME)[0] = np.uint8(8)


@njit(**OPTIONS)
def _gate_frame(frame):
    return scratch(frame)


@njit(**OPTIONS)
def _up_frame(frame):
    return scratch(frame) + FRAME


@njit(**OPTIONS)
def _down_frame(frame):
    return scratch(frame) + 2 * FRAME


@njit(**OPTIONS)
def _act_at(frame, token):
    return scratch(frame) + HEADS + token * _neurons(frame) * 4


@njit(**OPTIONS)
def _up_at(frame, token):
    return _act_at(frame, token) + _buffer(frame)


def _prepare(inner: Any) -> Any:
    @njit(**OPTIONS)
    def prepare(frame, part, nparts):
        tokens, neurons, memory = rows(frame, X), _neurons(frame), _linear_at(frame)
        gate, up, down = _gate_frame(frame), _up_frame(frame), _down_frame(frame)
        gated = address(frame, GATE) != 0
        _fill(up, frame, 0, UP, UP_SCALE, UP_BIAS, memory)
        _put(up, linear.X, frame, X)
        _put_rows(up, linear.Y, _up_at(frame, 0) if gated else _act_at(frame, 0), tokens, neurons)
        if gated:
            _fill(gate, frame, 0, GATE, GATE_SCALE, GATE_BIAS, memory)
            _put(gate, linear.X, frame, X)
            _put_rows(gate, linear.Y, _act_at(frame, 0), tokens, neurons)
        behind = (memory + linear.out_in_bytes(tokens, _inputs(frame), 0) + 63) // 64 * 64
        _fill(down, frame, 1, DOWN, DOWN_SCALE, DOWN_BIAS, behind)
        _put_rows(down, linear.X, _act_at(frame, 0), tokens, neurons)
        _put(down, linear.Y, frame, Y)
        return inner(up, 0, 1)

    return prepare


@njit(**OPTIONS)
def _drop(frame, h, start, stop):
    """Neurons ``start`` to ``stop`` of a row become 0 where the threshold drops them."""
    thresholds = address(frame, THRESHOLDS)
    many = thresholds != 0 and elements(frame, THRESHOLDS) > 1
    keep = gates.ABOVE if integer(frame, TENSORS, KEEP) == 0 else gates.NOT_BELOW
    own = thresholds + 4 * start if many else thresholds
    gates.drop_below(h + 4 * start, h + 4 * start, stop - start, keep, number(frame, TENSORS, THRESHOLD), own, many)


@njit(**OPTIONS)
def _other_gates(frame, gate, start, stop):
    """The gates ``start`` to ``stop`` of all tokens, of a weight that is stored in another way than up: value by value."""
    at, kind = linear.read_once(gate), element_type(frame, GATE)
    packed = integer(frame, TENSORS, PACKED)
    for n in range(start, stop):
        for token in range(rows(frame, X)):
            linear.write(at, token, n, linear.plain_sum(gate, kind, packed, token, n))


def _neurons_stage(products: Any) -> Any:
    everything, some = linear.over_all(products), linear.over_chosen(products)

    @njit(**OPTIONS)
    def dense(linear_frame, start, stop):
        everything(linear_frame, linear.read_once(linear_frame), start, stop)

    @njit(**OPTIONS)
    def hidden(frame, part, nparts):
        tokens, sparse, activation = rows(frame, X), integer(frame, TENSORS, SPARSE), integer(frame, TENSORS, ACTIVATION)
        gated, up = address(frame, GATE) != 0, _up_frame(frame)
        start, stop = share(_neurons(frame), 4, part, nparts)
        if gated and not _alike(frame):
            _other_gates(frame, _gate_frame(frame), start, stop)
        else:
            dense(_gate_frame(frame) if gated else up, start, stop)
        for token in range(tokens):
            activate(_act_at(frame, token), start, stop, activation)
            if sparse == ON_ACT or (sparse != NO_GATE and not gated):
                _drop(frame, _act_at(frame, token), start, stop)
        if not gated:
            return 0
        if sparse != ON_ACT:
            dense(up, start, stop)
        places = _linear_at(frame) - (_neurons(frame) * 8 + 63) // 64 * 64
        chosen = i64s(places)
        at = linear.read_once(up)
        for token in range(tokens):
            act, value = f32s(_act_at(frame, token)), f32s(_up_at(frame, token))
            if sparse == ON_ACT:
                count = start
                for n in range(start, stop):
                    chosen[count] = n
                    count += act[n] != np.float32(0)
                some(up, at, token, places, start, count)
                for i in range(start, count):
                    act[chosen[i]] *= value[chosen[i]]
            else:
                for n in range(start, stop):
                    act[n] *= value[n]
                if sparse == ON_HIDDEN:
                    _drop(frame, _act_at(frame, token), start, stop)
        return 0

    return hidden


def _on_down(inner: Any) -> Any:
    """A stage of the product with ``down_weight``."""

    @njit(**OPTIONS)
    def stage(frame, part, nparts):
        return inner(_down_frame(frame), part, nparts)

    return stage


def _claims(types: Any, attributes: dict[str, Any]) -> bool:
    """Whether gate and up are stored alike: other gates go value by value, for which engines have something faster."""
    up, gate, up_scale, gate_scale = types[UP], types[GATE], types[UP_SCALE], types[GATE_SCALE]
    if gate is None:
        return True
    alike: bool = gate.dtype is up.dtype and (up_scale is None) == (gate_scale is None)
    if up_scale is None or gate_scale is None or up_scale.shape is None or gate_scale.shape is None:
        return alike
    return alike and _count(up_scale) == _count(gate_scale)


def _count(kind: TensorType) -> Any:
    """The sizes that tell how many scales there are."""
    return [d for d in kind.shape or () if d != 1]


FEED_FORWARD = OpKernels(
    op="feed_forward",
    key_operands=(UP, DOWN),
    key_attributes=("packed",),
    errors=(
        "the weights do not fit x or each other",
        "a scale has another size than its weight asks for",
        "a bias or the thresholds have another size than the weights ask for",
        "gate_weight has an element type that no kernel reads",
    ),
    operands=(DType.F32, None, None, None, *[DType.F32] * 7),
    as_they_are=(GATE,),
    claims=_claims,
)

_FIRST: dict[tuple[DType, str], tuple[Stage, Stage]] = {}
_SECOND: dict[tuple[DType, str], tuple[Stage, Stage]] = {}
_CHOOSE = Stage("feed_forward_choose", _on_down(choose))
_FLOAT_X = Stage("feed_forward_prepare_float", _prepare(preparation(F32, 0)))
for _dtype, _kind, _load, _width in FLOATS:
    _FIRST[_dtype, ""] = (
        _FLOAT_X,
        Stage(f"feed_forward_neurons_{_dtype}", _neurons_stage(float_products(_load, _kind, _width)), parallel=True),
    )
    _SECOND[_dtype, ""] = (
        _CHOOSE,
        Stage(f"feed_forward_down_{_dtype}", _on_down(float_main(_load, _kind, _width)), parallel=True),
    )
for _dtype, _kind, _packed, _name in CODES:
    if _dtype is DType.U8 and not _name:
        continue  # codes of a byte are signed
    _label = _name or _dtype
    _FIRST[_dtype, _name] = (
        Stage(f"feed_forward_prepare_{_label}", _prepare(preparation(_kind, _packed))),
        Stage(f"feed_forward_neurons_{_label}", _neurons_stage(code_products(_kind, _packed)), parallel=True),
    )
    _SECOND[_dtype, _name] = _CHOOSE, Stage(f"feed_forward_down_{_label}", _on_down(code_main(_kind, _packed)), parallel=True)

for (_up, _packing), _first in _FIRST.items():
    for (_down, _other), _second in _SECOND.items():
        if _packing == _other:
            FEED_FORWARD.kernels.append(
                NumbaKernel(
                    types=(_up, _down),
                    attributes=(_packing,),
                    shape=Stage("feed_forward_shape", shape),
                    scratch=Stage("feed_forward_scratch", scratch_bytes),
                    stages=(*_first, *_second, Stage("feed_forward_finish", _on_down(finish))),
                )
            )
