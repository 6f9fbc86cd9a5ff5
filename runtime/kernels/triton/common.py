"""What the kernels share on the device: stored weights to float32, their scales, the rules of gates.

A weight is read as tiles in its stored orientation, float32, zero points taken off. ``FORM`` is how an element is stored
("number", "f8e4m3", "f8e5m2"; the bits of float8 come as uint8, so that devices without float8 can read them, too), or
``PACKED`` ("u4", "i4") two 4-bit codes a byte along the last axis. ``mode`` of a scale or zero point: "none", "one",
"output" (one per output channel), "group" (one per group of inputs and output channel), "eight" (the zero point 8).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def decode(raw, FORM: tl.constexpr):
    """Stored elements as float32."""
    if FORM == "f8e4m3":
        # The bits of a float16 with the same exponent field, whose bias is larger by 8; subnormals come out right.
        bits = raw.to(tl.uint16)
        half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
        value = tl.where((bits & 0x7F) == 0x7F, float("nan"), half.to(tl.float32) * 256.0)
    elif FORM == "f8e5m2":
        value = (raw.to(tl.uint16) << 8).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        value = raw.to(tl.float32)
    return value


@triton.jit
def load_tile(
    weight, rows, row_mask, first, limit, column_mask, stride, FORM: tl.constexpr, PACKED: tl.constexpr, COLUMNS: tl.constexpr
):
    """Rows ``rows`` and the columns [first, first + COLUMNS) of a stored weight as float32 [rows, COLUMNS].

    rows: int64, since a weight may have more than 2^31 elements. Rows out of ``row_mask`` are not read, neither are columns
    out of ``column_mask`` unless packed (a byte holds two). limit: columns of the weight; what is not read is 0, as a code.
    """
    if PACKED == "":
        columns = first + tl.arange(0, COLUMNS)
        mask = row_mask[:, None] & (column_mask & (columns < limit))[None, :]
        raw = tl.load(weight + (rows[:, None] * stride + columns[None, :]), mask=mask, other=0)
        tile = decode(raw, FORM)
    else:
        columns = first // 2 + tl.arange(0, COLUMNS // 2)
        mask = row_mask[:, None] & (columns < limit // 2)[None, :]
        raw = tl.load(weight + (rows[:, None] * stride + columns[None, :]), mask=mask, other=0)
        tile = tl.interleave(raw & 0xF, raw >> 4).to(tl.float32)
        if PACKED == "i4":
            tile = tl.where(tile >= 8, tile - 16, tile)
    return tile


@triton.jit
def by_output(pointer, outputs, mask, MODE: tl.constexpr):
    """A scale or zero point of mode "one" or "output" for the output channels ``outputs``, float32."""
    if MODE == "one":
        value = tl.full(outputs.shape, 0.0, tl.float32) + tl.load(pointer).to(tl.float32)
    else:
        value = tl.load(pointer + outputs, mask=mask, other=0).to(tl.float32)
    return value


@triton.jit
def by_group(
    pointer, outputs, output_mask, inputs, input_mask, first, n_outputs, groups,
    BLOCK: tl.constexpr, OUT_IN: tl.constexpr, ALIGNED: tl.constexpr, LENGTH: tl.constexpr,
):  # fmt: skip
    """Scales or zero points of groups of BLOCK inputs, for a tile in the stored orientation, float32.

    ALIGNED: ``inputs`` are the LENGTH inputs from ``first`` on, and one of LENGTH and BLOCK divides the other, so that each
    group is read once. Otherwise ``inputs`` are any, and the number of each element is read by itself.
    """
    if ALIGNED:
        COUNT: tl.constexpr = LENGTH // BLOCK if LENGTH > BLOCK else 1
        group = first // BLOCK + tl.arange(0, COUNT)
        if OUT_IN:
            mask = output_mask[:, None] & (group < groups)[None, :]
            few = tl.load(pointer + (outputs[:, None] * groups + group[None, :]), mask=mask, other=0).to(tl.float32)
            if COUNT > 1:
                few = tl.broadcast_to(few[:, :, None], (outputs.shape[0], COUNT, BLOCK))
                few = tl.reshape(few, (outputs.shape[0], LENGTH))
        else:
            mask = (group < groups)[:, None] & output_mask[None, :]
            few = tl.load(pointer + (group[:, None] * n_outputs + outputs[None, :]), mask=mask, other=0).to(tl.float32)
            if COUNT > 1:
                few = tl.broadcast_to(few[:, None, :], (COUNT, BLOCK, outputs.shape[0]))
                few = tl.reshape(few, (LENGTH, outputs.shape[0]))
    else:
        group = inputs // BLOCK
        if OUT_IN:
            mask = output_mask[:, None] & input_mask[None, :]
            few = tl.load(pointer + (outputs[:, None] * groups + group[None, :]), mask=mask, other=0).to(tl.float32)
        else:
            mask = input_mask[:, None] & output_mask[None, :]
            few = tl.load(pointer + (group[:, None] * n_outputs + outputs[None, :]), mask=mask, other=0).to(tl.float32)
    return few


@triton.jit
def shift_zero(
    tile, zero, outputs, output_mask, inputs, input_mask, first, n_outputs, groups,
    MODE: tl.constexpr, BLOCK: tl.constexpr, OUT_IN: tl.constexpr, ALIGNED: tl.constexpr, LENGTH: tl.constexpr,
):  # fmt: skip
    """Codes less their zero points."""
    if MODE == "eight":
        tile = tile - 8
    elif MODE == "group":
        tile = tile - by_group(
            zero, outputs, output_mask, inputs, input_mask, first, n_outputs, groups, BLOCK, OUT_IN, ALIGNED, LENGTH
        )  # fmt: skip
    elif MODE != "none":
        value = by_output(zero, outputs, output_mask, MODE)
        tile = tile - value[:, None] if OUT_IN else tile - value[None, :]
    return tile


@triton.jit
def gate(h, t, KEEP: tl.constexpr):
    """``h`` (float32) with what the rule drops at +0.0; NaN compares false and stays."""
    if KEEP == "abs>":
        h = tl.where(tl.abs(h) <= t, 0.0, h)
    elif KEEP == "x>=":
        h = tl.where(h < t, 0.0, h)
    return h


@triton.jit
def load_thresholds(thresholds, threshold, channels, mask, MODE: tl.constexpr):
    """The thresholds of ``channels`` [BLOCK], float32. MODE: "attribute", "one", "channel"."""
    if MODE == "channel":
        t = tl.load(thresholds + channels, mask=mask, other=0).to(tl.float32)
    elif MODE == "one":
        t = tl.full(channels.shape, 0.0, tl.float32) + tl.load(thresholds).to(tl.float32)
    else:
        t = tl.full(channels.shape, 0.0, tl.float32) + threshold
    return t


@triton.jit
def load_gated(
    x, thresholds, threshold, tokens, token_mask, channels, channel_mask, stride,
    KEEP: tl.constexpr, THRESHOLDS: tl.constexpr,
):  # fmt: skip
    """Tokens by channels of ``x``, gated, float32; 0 out of the masks."""
    mask = token_mask[:, None] & channel_mask[None, :]
    h = tl.load(x + (tokens[:, None] * stride + channels[None, :]), mask=mask, other=0).to(tl.float32)
    if KEEP == "abs>" or KEEP == "x>=":
        t = load_thresholds(thresholds, threshold, channels, channel_mask, THRESHOLDS)
        h = gate(h, t[None, :], KEEP)
    return h


@triton.jit
def rows_product(
    x, weight, scale, zero, thresholds, threshold, tokens, token_mask, outputs, needed, start, end,
    n_inputs, n_outputs, stride, groups,
    GATED: tl.constexpr, KEEP: tl.constexpr, THRESHOLDS: tl.constexpr, FORM: tl.constexpr, PACKED: tl.constexpr,
    SCALE: tl.constexpr, ZERO: tl.constexpr, GROUP: tl.constexpr, ALIGNED: tl.constexpr,
    TOKENS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """Sums [TOKENS, OUTPUTS] over the inputs [start, end) of gated ``x`` times rows ``outputs`` of a weight [N, K].

    Rows out of ``needed`` are not read, nor (GATED) columns that every token drops. Scales of outputs are left to ``affine``.
    Sums are kept per input of the block and added up once at the end.
    """
    sums = tl.zeros((TOKENS, OUTPUTS, INPUTS), tl.float32)
    for first in range(start, end, INPUTS):
        inputs = first + tl.arange(0, INPUTS)
        input_mask = inputs < end
        h = load_gated(x, thresholds, threshold, tokens, token_mask, inputs, input_mask, n_inputs, KEEP, THRESHOLDS)
        read = input_mask
        if GATED:
            read = tl.max((h != 0).to(tl.int32), axis=0) > 0
        w = load_tile(weight, outputs, needed, first, n_inputs, read, stride, FORM, PACKED, INPUTS)
        w = shift_zero(
            w, zero, outputs, needed, inputs, input_mask, first, n_outputs, groups, ZERO, GROUP, True, ALIGNED, INPUTS
        )  # fmt: skip
        if SCALE == "group":
            w = w * by_group(
                scale, outputs, needed, inputs, input_mask, first, n_outputs, groups, GROUP, True, ALIGNED, INPUTS
            )  # fmt: skip
        sums += h[:, None, :] * w[None, :, :]
    return tl.sum(sums, axis=2)


@triton.jit
def affine(acc, scale, bias, outputs, output_mask, SCALE: tl.constexpr):
    """The scale of outputs and the bias on sums [tokens, outputs]."""
    if SCALE == "one" or SCALE == "output":
        acc = acc * by_output(scale, outputs, output_mask, SCALE)[None, :]
    if bias is not None:
        acc = acc + tl.load(bias + outputs, mask=output_mask, other=0).to(tl.float32)[None, :]
    return acc


@triton.jit
def load_kept(kept, tokens, token_mask, outputs, output_mask, n_outputs):
    """Where [tokens, outputs] the mask of outputs is not 0 (NaN is not)."""
    mask = token_mask[:, None] & output_mask[None, :]
    return tl.load(kept + (tokens[:, None] * n_outputs + outputs[None, :]), mask=mask, other=0).to(tl.float32) != 0


@triton.jit
def finish(acc, y, scale, bias, kept, tokens, token_mask, outputs, output_mask, n_outputs, SCALE: tl.constexpr):
    """Scale, bias and the mask of outputs on float32 sums [tokens, outputs]; then the one rounding, to the type of ``y``."""
    acc = affine(acc, scale, bias, outputs, output_mask, SCALE)
    if kept is not None:
        acc = tl.where(load_kept(kept, tokens, token_mask, outputs, output_mask, n_outputs), acc, 0.0)
    place = tokens[:, None] * n_outputs + outputs[None, :]
    tl.store(y + place, acc.to(y.dtype.element_ty), mask=token_mask[:, None] & output_mask[None, :])
