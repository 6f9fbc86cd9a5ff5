"""The op ``linear`` for weights stored by outputs ([N, K], layout "out_in"): see ``dot``. For "in_out" see ``linear_gathered``.

Integer weights meet activations of 16 bits (see ``codes``), accumulated in integers; everything else is float32. Rows of x that
hold NaN or infinity, and codes whose groups fit no instruction, take a plain loop in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import njit

from actgraph.ops.dtypes import DType
from actgraph.ops.shapes import TensorType
from actgraph.runtime.kernels.numba import dot, gates, simd
from actgraph.runtime.kernels.numba.codes import (
    BYTE_CHUNK,
    step_of,
    write_byte_chunks,
    write_half_chunks,
    write_planes,
)
from actgraph.runtime.kernels.numba.dot_loose import dot_loose
from actgraph.runtime.kernels.numba.frame import (
    address,
    element_type,
    elements,
    integer,
    number,
    rank,
    rows,
    scratch,
    set_shape_like,
    set_size,
    share,
    size,
)
from actgraph.runtime.kernels.numba.kernel import NumbaKernel, OpKernels, Stage
from actgraph.runtime.kernels.numba.memory import OPTIONS, f32s, i64s, u8s
from actgraph.runtime.kernels.numba.operands import unfit_tokens
from actgraph.runtime.kernels.numba.weights import (
    BF16,
    F8E4M3,
    F8E5M2,
    F16,
    F32,
    I8,
    I32,
    PACKED_I4,
    PACKED_U4,
    U8,
    code_at,
    float_at,
)

X, WEIGHT, SCALE, ZERO, BIAS, THRESHOLDS, INDICES, KEPT, Y = range(9)
LAYOUT, BLOCK, PACKED, KEEP, THRESHOLD, TOP = range(6)
TENSORS = 9
_I64 = 7
#: How codes are scaled: once for each output; in groups that instructions can follow, where rows fill chunks and have one zero
#: point; the same for other rows (see ``dot_loose``); or in another way.
CHANNEL, GROUPS, OTHER, LOOSE = range(4)
#: The memory of a token beside its values: its step, the sum of its codes, how many outputs it has, their form, where they are.
TOKEN = 64

ERRORS = (
    "the last axis of x is not the input axis of weight",
    "an index is beyond the channels of x",
    "a scale, zero point, bias, threshold or mask has another size than weight and x ask for",
    "the gate has no k, or no indices that fit the tokens of x",
)


@njit(**OPTIONS)
def inputs_of(frame):
    return size(frame, X, -1)


@njit(**OPTIONS)
def outputs_of(frame):
    return size(frame, Y, -1)


@njit(**OPTIONS)
def _unfit_set(frame):
    """Whether a gate by a set of channels lacks its k, or indices that broadcast to the tokens of x."""
    keep, axes, kind = integer(frame, TENSORS, KEEP), rank(frame, INDICES), element_type(frame, INDICES)
    if keep == gates.TOP_K:
        return integer(frame, TENSORS, TOP) < 1
    if keep != gates.LISTED:
        return False
    if address(frame, INDICES) == 0 or axes < 1 or (kind != I32 and kind != _I64):
        return True
    return unfit_tokens(frame, INDICES, axes - 1, 1, X, rank(frame, X) - 1)


@njit(**OPTIONS)
def shape(frame, part, nparts):
    packed = 2 if integer(frame, TENSORS, PACKED) != 0 else 1
    by_output = integer(frame, TENSORS, LAYOUT) == 0
    outputs = size(frame, WEIGHT, 0) if by_output else size(frame, WEIGHT, 1) * packed
    inputs = size(frame, WEIGHT, 1) * packed if by_output else size(frame, WEIGHT, 0)
    if rank(frame, X) < 1 or rank(frame, WEIGHT) != 2 or size(frame, X, -1) != inputs:
        return 1
    set_shape_like(frame, Y, X)
    set_size(frame, Y, -1, outputs)
    if _unfit_set(frame):
        return 4
    block = integer(frame, TENSORS, BLOCK)
    if block < 0:
        return 3
    scales = outputs * ((inputs + block - 1) // block) if block > 0 else outputs
    for tensor in (SCALE, ZERO):
        if address(frame, tensor) != 0 and elements(frame, tensor) != scales and elements(frame, tensor) != 1:
            return 3
    if address(frame, BIAS) != 0 and elements(frame, BIAS) != outputs:
        return 3
    if address(frame, THRESHOLDS) != 0 and elements(frame, THRESHOLDS) != inputs and elements(frame, THRESHOLDS) != 1:
        return 3
    if address(frame, KEPT) != 0 and elements(frame, KEPT) != rows(frame, X) * outputs:
        return 3
    return 0


@njit(**OPTIONS)
def gate(frame, token, to):
    """The gated inputs of a token, to [K] floats. Returns whether the gate is sound."""
    inputs = inputs_of(frame)
    x, keep = address(frame, X) + token * inputs * 4, integer(frame, TENSORS, KEEP)
    if keep == gates.NONE:
        source, h = f32s(x), f32s(to)
        for i in range(inputs):
            h[i] = source[i]
    elif keep == gates.TOP_K:
        gates.keep_largest(x, to, inputs, integer(frame, TENSORS, TOP), scratch(frame))
    elif keep == gates.LISTED:
        return gates.keep_listed(x, to, inputs, frame, INDICES, token, X)
    else:
        thresholds = address(frame, THRESHOLDS)
        many = thresholds != 0 and elements(frame, THRESHOLDS) > 1
        gates.drop_below(x, to, inputs, keep, number(frame, TENSORS, THRESHOLD), thresholds, many)
    return True


# --- scratch: [1 KB for gates][tokens: TOKEN][gated x: padded floats][codes][outputs to compute] --------------------------


@njit(**OPTIONS)
def padded(count):
    return (count + 127) // 128 * 128


@njit(**OPTIONS)
def token_at(frame, token):
    return scratch(frame) + 1024 + token * TOKEN


@njit(**OPTIONS)
def gated_at(frame, token):
    return scratch(frame) + 1024 + rows(frame, X) * TOKEN + token * padded(inputs_of(frame)) * 4


@njit(**OPTIONS)
def _code_bytes(inputs):
    return padded(inputs) // 64 * BYTE_CHUNK  # chunks of bytes take the most


@njit(**OPTIONS)
def _codes_at(frame, token):
    return gated_at(frame, rows(frame, X)) + token * _code_bytes(inputs_of(frame))


@njit(**OPTIONS)
def _chosen_at(frame, token):
    return _codes_at(frame, rows(frame, X)) + token * outputs_of(frame) * 8


@njit(**OPTIONS)
def out_in_bytes(tokens, inputs, chosen):
    """Scratch memory of a linear of these sizes. chosen: how many outputs a token's list of kept ones may have."""
    return 1024 + tokens * (TOKEN + padded(inputs) * 4 + _code_bytes(inputs) + chosen * 8)


@njit(**OPTIONS)
def out_in_scratch(frame, part, nparts):
    return out_in_bytes(rows(frame, X), inputs_of(frame), outputs_of(frame) if address(frame, KEPT) != 0 else 0)


@njit(**OPTIONS)
def is_kept(frame, token, n):
    """Whether output ``n`` of a token is wanted."""
    at, kept = token * outputs_of(frame) + n, address(frame, KEPT)
    return f32s(kept)[at] != 0 if element_type(frame, KEPT) == F32 else u8s(kept)[at] != 0


@njit(**OPTIONS)
def choose_outputs(frame, token, to):
    """The places of the outputs of a token that are kept. Returns how many."""
    chosen, count = i64s(to), 0
    for n in range(outputs_of(frame)):
        chosen[count] = n
        count += is_kept(frame, token, n)
    return count


@njit(**OPTIONS)
def form_of(frame, codes_a_byte):
    """CHANNEL, GROUPS, LOOSE or OTHER."""
    block, inputs = integer(frame, TENSORS, BLOCK), inputs_of(frame)
    one_zero = address(frame, ZERO) == 0 or elements(frame, ZERO) == 1
    if codes_a_byte == 1 and block == 0:
        return CHANNEL
    chunk = 64 * codes_a_byte
    if block == 0:
        block = inputs
        if elements(frame, SCALE) != outputs_of(frame):
            return OTHER
    elif elements(frame, SCALE) == 1:
        return OTHER
    follows = block % chunk == 0 or block == chunk // 2 or block == chunk // 4
    if inputs % chunk == 0 and one_zero and follows:
        return GROUPS
    return LOOSE if inputs > 0 and (follows or block >= inputs) else OTHER


@njit(**OPTIONS)
def zero_at(frame, index):
    """The zero point at ``index``; of tensors of one element that one."""
    zero = address(frame, ZERO)
    if zero == 0 or elements(frame, ZERO) == 0:
        return np.int64(0)
    return code_at(zero, element_type(frame, ZERO), 0, index if elements(frame, ZERO) > 1 else 0)


@njit(**OPTIONS)
def scale_at(frame, index):
    """The scale at ``index``; 1 where there is none."""
    scale = address(frame, SCALE)
    if scale == 0 or elements(frame, SCALE) == 0:
        return np.float32(1)
    return f32s(scale)[index if elements(frame, SCALE) > 1 else 0]


#: What the loops need of a frame, read once: what they write could be the frame, for all that a compiler knows.
INPUTS, OUTPUTS, WEIGHTS, SCALES, MANY_SCALES, ZEROS, MANY_ZEROS, ZERO_TYPE, BIASES, RESULT, LINE = range(11)


@njit(**OPTIONS)
def bytes_of(kind):
    """The bytes of an element."""
    return 4 if kind == F32 else 2 if kind in (F16, BF16) else 1


@njit(**OPTIONS)
def read_once(frame):
    """The sizes and addresses in the order INPUTS, OUTPUTS .. LINE (the bytes of a row)."""
    scale, zero = address(frame, SCALE), address(frame, ZERO)
    return (
        inputs_of(frame), outputs_of(frame), address(frame, WEIGHT),
        scale, 1 if scale != 0 and elements(frame, SCALE) > 1 else 0,
        zero, 1 if zero != 0 and elements(frame, ZERO) > 1 else 0, element_type(frame, ZERO),
        address(frame, BIAS), address(frame, Y), size(frame, WEIGHT, 1) * bytes_of(element_type(frame, WEIGHT)),
    )  # fmt: skip


@njit(**OPTIONS)
def write(at, token, n, value):
    """Output ``n`` of a token, to which the bias is added."""
    if at[BIASES] != 0:
        value += f32s(at[BIASES])[n]
    f32s(at[RESULT])[token * at[OUTPUTS] + n] = value


@njit(**OPTIONS)
def plain_sum(frame, kind, packed, token, n):
    """Output ``n`` of a token, value by value."""
    inputs, h, weight = inputs_of(frame), f32s(gated_at(frame, token)), address(frame, WEIGHT)
    block = integer(frame, TENSORS, BLOCK)
    if block == 0:
        block = max(inputs, 1)
    groups = (inputs + block - 1) // block
    total = np.float64(0)
    for g in range(groups):
        index = n * groups + g
        zero, some = zero_at(frame, index), np.float64(0)
        for k in range(g * block, min(g * block + block, inputs)):
            if h[k] == np.float32(0):
                continue  # dropped: its weight is not read
            at = n * inputs + k
            if packed != 0 or kind in (U8, I8):
                some += np.float64(h[k] * np.float32(code_at(weight, kind, packed, at) - zero))
            else:
                some += np.float64(h[k] * (float_at(weight, kind, at) - np.float32(zero)))
        total += some * scale_at(frame, index)
    return np.float32(total)


# --- preparation: once a call -----------------------------------------------------------------------------------------------


def preparation(kind: int, packed: int) -> Any:
    codes_a_byte = 2 if packed else 1 if kind in (U8, I8) else 0
    offset = 8 if packed == PACKED_I4 else 128 if kind == I8 and not packed else 0

    @njit(**OPTIONS)
    def prepare(frame, part, nparts):
        inputs = inputs_of(frame)
        for token in range(rows(frame, X)):
            h = gated_at(frame, token)
            if not gate(frame, token, h):
                return 2
            gated = f32s(h)
            for i in range(inputs, padded(inputs)):
                gated[i] = np.float32(0)
            info = token_at(frame, token)
            if codes_a_byte > 0:
                step = step_of(h, inputs)
                f32s(info)[0] = step
                if step == step:
                    form, codes = form_of(frame, codes_a_byte), _codes_at(frame, token)
                    i64s(info)[3], i64s(info)[4] = form, codes
                    if form == CHANNEL:
                        total = write_planes(h, inputs, padded(inputs), step, codes, codes + padded(inputs))
                        i64s(info)[1] = total
                    elif form == GROUPS and codes_a_byte == 1:
                        write_byte_chunks(h, inputs, step, zero_at(frame, 0) + offset, codes)
                    elif form == GROUPS:
                        write_half_chunks(h, inputs, step, zero_at(frame, 0) + offset, codes)
                    elif form == LOOSE and codes_a_byte == 1:
                        write_byte_chunks(h, inputs, step, -1, codes)  # the sums themselves
                    elif form == LOOSE:
                        write_half_chunks(h, inputs, step, -1, codes)
            if address(frame, KEPT) != 0:
                y, base = f32s(address(frame, Y)), token * outputs_of(frame)
                for n in range(outputs_of(frame)):
                    y[base + n] = np.float32(0)
                i64s(info)[2] = choose_outputs(frame, token, _chosen_at(frame, token))
        return 0

    return prepare


# --- the products: by parts -------------------------------------------------------------------------------------------------


def over_all(products: Any) -> Any:
    """A loop of ``products(frame, at, token, n0 .. n3, p0 .. p3)`` over outputs ``start`` to ``stop`` of all tokens.

    at: see ``read_once``. Output n0 is computed while row p0 is prefetched, or what comes ``dot.AHEAD`` later where p0 is -1.
    """

    @njit(**OPTIONS)
    def run(frame, at, start, stop):
        tokens, quarter = rows(frame, X), (stop - start) // 4
        for n in range(start, start + quarter):
            for token in range(tokens):
                products(frame, at, token, n, n + quarter, n + 2 * quarter, n + 3 * quarter, -1, -1, -1, -1)
        for n in range(start + 4 * quarter, stop):
            for token in range(tokens):
                products(frame, at, token, n, n, n, n, -1, -1, -1, -1)

    return run


def over_chosen(products: Any) -> Any:
    """As ``over_all``, for the outputs of a token that are at ``start`` to ``stop`` of the list at ``places``."""

    @njit(**OPTIONS)
    def run(frame, at, token, places, start, stop):
        chosen, last, far = i64s(places), stop - 1, 4 * max(1, dot.AHEAD // max(at[LINE], 64))
        for i in range(start, stop, 4):
            n1, n2, n3, j = chosen[min(i + 1, last)], chosen[min(i + 2, last)], chosen[min(i + 3, last)], i + far
            p0, p1, p2, p3 = chosen[min(j, last)], chosen[min(j + 1, last)], chosen[min(j + 2, last)], chosen[min(j + 3, last)]
            products(frame, at, token, chosen[i], n1, n2, n3, p0, p1, p2, p3)

    return run


def _main(products: Any) -> Any:
    """The stage of ``products``."""
    everything, some = over_all(products), over_chosen(products)

    @njit(**OPTIONS)
    def main(frame, part, nparts):
        at = read_once(frame)
        if address(frame, KEPT) != 0:
            for token in range(rows(frame, X)):
                start, stop = share(i64s(token_at(frame, token))[2], 4, part, nparts)
                some(frame, at, token, _chosen_at(frame, token), start, stop)
            return 0
        start, stop = share(at[OUTPUTS], 4, part, nparts)
        everything(frame, at, start, stop)
        return 0

    return main


@njit(**OPTIONS)
def _later(at, n, row):
    """What to prefetch beside row ``n``: row ``row``, or what comes later where that is -1."""
    return at[WEIGHTS] + n * at[LINE] + dot.AHEAD if row < 0 else at[WEIGHTS] + row * at[LINE]


@njit(**OPTIONS)
def _four(at, token, n0, n1, n2, n3, y0, y1, y2, y3):
    write(at, token, n0, y0)
    write(at, token, n1, y1)
    write(at, token, n2, y2)
    write(at, token, n3, y3)


@njit(**OPTIONS)
def _scale(at, n):
    return f32s(at[SCALES])[n if at[MANY_SCALES] != 0 else 0] if at[SCALES] != 0 else np.float32(1)


@njit(**OPTIONS)
def _zero(at, n):
    return code_at(at[ZEROS], at[ZERO_TYPE], 0, n if at[MANY_ZEROS] != 0 else 0) if at[ZEROS] != 0 else np.int64(0)


def float_products(load: Any, kind: int, width: int) -> Any:
    product = dot.dot_floats(load, kind, width)

    @njit(**OPTIONS)
    def products(frame, at, token, n0, n1, n2, n3, p0, p1, p2, p3):
        if integer(frame, TENSORS, BLOCK) != 0 or at[ZEROS] != 0:
            for n in (n0, n1, n2, n3):
                write(at, token, n, plain_sum(frame, kind, 0, token, n))
            return
        weight, line, x = at[WEIGHTS], at[INPUTS] * width, gated_at(frame, token)
        r0, r1, r2, r3 = weight + n0 * line, weight + n1 * line, weight + n2 * line, weight + n3 * line
        p0, p1, p2, p3 = _later(at, n0, p0), _later(at, n1, p1), _later(at, n2, p2), _later(at, n3, p3)
        y0, y1, y2, y3 = product(r0, r1, r2, r3, p0, p1, p2, p3, x, at[INPUTS])
        if at[SCALES] != 0:
            y0, y1, y2, y3 = y0 * _scale(at, n0), y1 * _scale(at, n1), y2 * _scale(at, n2), y3 * _scale(at, n3)
        _four(at, token, n0, n1, n2, n3, y0, y1, y2, y3)

    return products


def code_products(kind: int, packed: int) -> Any:
    flip, codes_a_byte = (packed == PACKED_I4) if packed else kind == I8, 2 if packed else 1
    offset, chunk = (8 if packed else 128) if flip else 0, 64 * codes_a_byte
    by_channel = dot.dot_bytes(flip)
    family = dot.dot_half_groups if packed else dot.dot_byte_groups
    one, two, four = family(flip, 1), family(flip, 2), family(flip, 4)
    loose = [dot_loose(flip, bool(packed), groups) for groups in (1, 2, 4)]
    loose_one, loose_two, loose_four = loose

    @njit(**OPTIONS)
    def loosely(frame, at, token, n, later):
        """Output ``n`` of a token in the form LOOSE."""
        inputs, block = at[INPUTS], integer(frame, TENSORS, BLOCK)
        if block == 0:
            block = inputs
        line, row, chunks = inputs // codes_a_byte, (inputs + block - 1) // block, (inputs + chunk - 1) // chunk
        groups = 4 if block * 4 == chunk else 2 if block * 2 == chunk else 1
        behind = chunks * groups if groups > 1 else row
        if n * line + chunks * 64 > at[OUTPUTS] * line or n * row + behind > at[OUTPUTS] * row:
            write(at, token, n, plain_sum(frame, kind, packed, token, n))  # it would read beyond the weight
            return
        zeros, zero = np.int64(0), np.int64(0)
        if at[MANY_ZEROS] != 0:
            zeros = at[ZEROS] + n * row * (4 if at[ZERO_TYPE] == I32 else 1)
        else:
            zero = _zero(at, 0)
        info, weight, scales = token_at(frame, token), at[WEIGHTS] + n * line, at[SCALES] + n * row * 4
        codes, per = i64s(info)[4], chunks if block >= inputs else max(block // chunk, 1)
        if groups == 4:
            y = loose_four(weight, later, scales, zeros, at[ZERO_TYPE], per, zero, codes, inputs)
        elif groups == 2:
            y = loose_two(weight, later, scales, zeros, at[ZERO_TYPE], per, zero, codes, inputs)
        else:
            y = loose_one(weight, later, scales, zeros, at[ZERO_TYPE], per, zero, codes, inputs)
        write(at, token, n, y * f32s(info)[0])

    @njit(**OPTIONS)
    def channel(at, n, total, step, sum_of_codes):
        return np.float32(total - (_zero(at, n) + offset) * sum_of_codes) * step * _scale(at, n)

    @njit(**OPTIONS)
    def products(frame, at, token, n0, n1, n2, n3, p0, p1, p2, p3):
        info, inputs, weight = token_at(frame, token), at[INPUTS], at[WEIGHTS]
        step, form = f32s(info)[0], i64s(info)[3]
        one_scale = form != CHANNEL and at[MANY_SCALES] == 0  # beside a weight with many, for which the form was chosen
        if form == OTHER or step != step or one_scale:
            for n in (n0, n1, n2, n3):
                write(at, token, n, plain_sum(frame, kind, packed, token, n))
            return
        line, codes = inputs // codes_a_byte, i64s(info)[4]
        r0, r1, r2, r3 = weight + n0 * line, weight + n1 * line, weight + n2 * line, weight + n3 * line
        p0, p1, p2, p3 = _later(at, n0, p0), _later(at, n1, p1), _later(at, n2, p2), _later(at, n3, p3)
        if form == LOOSE:
            loosely(frame, at, token, n0, p0)
            if n1 != n0:  # else one output stands in all four places
                loosely(frame, at, token, n1, p1)
                loosely(frame, at, token, n2, p2)
                loosely(frame, at, token, n3, p3)
            return
        if codes_a_byte == 1 and form == CHANNEL:
            t0, t1, t2, t3 = by_channel(r0, r1, r2, r3, p0, p1, p2, p3, codes, codes + padded(inputs), inputs)
            sums = i64s(info)[1]
            y0, y1 = channel(at, n0, t0, step, sums), channel(at, n1, t1, step, sums)
            _four(at, token, n0, n1, n2, n3, y0, y1, channel(at, n2, t2, step, sums), channel(at, n3, t3, step, sums))
            return
        block = integer(frame, TENSORS, BLOCK)
        if block == 0:
            block = inputs
        scale, row = at[SCALES], (inputs + block - 1) // block * 4
        s0, s1, s2, s3 = scale + n0 * row, scale + n1 * row, scale + n2 * row, scale + n3 * row
        if block * 4 == chunk:
            y0, y1, y2, y3 = four(r0, r1, r2, r3, p0, p1, p2, p3, s0, s1, s2, s3, 1, codes, inputs)
        elif block * 2 == chunk:
            y0, y1, y2, y3 = two(r0, r1, r2, r3, p0, p1, p2, p3, s0, s1, s2, s3, 1, codes, inputs)
        else:
            y0, y1, y2, y3 = one(r0, r1, r2, r3, p0, p1, p2, p3, s0, s1, s2, s3, block // chunk, codes, inputs)
        _four(at, token, n0, n1, n2, n3, y0 * step, y1 * step, y2 * step, y3 * step)

    return products


def _claims(types: Sequence[TensorType | None], attributes: dict[str, Any]) -> bool:
    """Zero points and masks of the types that are read here."""
    zero, kept = types[ZERO], types[KEPT]
    return (zero is None or zero.dtype in (DType.I8, DType.U8, DType.I32)) and (
        kept is None or kept.dtype in (DType.F32, DType.BOOL)
    )


LINEAR = OpKernels(
    op="linear",
    key_operands=(WEIGHT,),
    key_attributes=("layout", "packed"),
    errors=ERRORS,
    operands=(DType.F32, None, DType.F32, None, DType.F32, DType.F32, None, None),
    claims=_claims,
)

_SHAPE, _SCRATCH = Stage("linear_shape", shape), Stage("linear_out_in_scratch", out_in_scratch)
FLOATS = (
    (DType.F32, F32, simd.load_f32, 4), (DType.BF16, BF16, simd.load_bf16, 2), (DType.F16, F16, simd.load_f16, 2),
    (DType.F8E4M3, F8E4M3, simd.load_f8e4m3, 1), (DType.F8E5M2, F8E5M2, simd.load_f8e5m2, 1),
)  # fmt: skip
CODES = ((DType.I8, I8, 0, ""), (DType.U8, U8, 0, ""), (DType.U8, U8, PACKED_I4, "i4"), (DType.U8, U8, PACKED_U4, "u4"))

for _dtype, _kind, _load, _width in FLOATS:
    LINEAR.kernels.append(
        NumbaKernel(
            types=(_dtype,),
            attributes=("out_in", ""),
            shape=_SHAPE,
            scratch=_SCRATCH,
            stages=(
                Stage("linear_prepare_float", preparation(F32, 0)),
                Stage(f"linear_out_in_{_dtype}", _main(float_products(_load, _kind, _width)), parallel=True),
            ),
        )
    )
for _dtype, _kind, _packed, _name in CODES:
    LINEAR.kernels.append(
        NumbaKernel(
            types=(_dtype,),
            attributes=("out_in", _name),
            shape=_SHAPE,
            scratch=_SCRATCH,
            stages=(
                Stage(f"linear_prepare_{_name or _dtype}", preparation(_kind, _packed)),
                Stage(f"linear_out_in_{_name or _dtype}", _main(code_products(_kind, _packed)), parallel=True),
            ),
        )
    )
