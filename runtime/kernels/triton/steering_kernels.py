"""Device code of the steering ops, ``clip`` and ``gate``, for channels on the last axis; float32 inside, one rounding.

A channel operand holds one number or one per channel (``mode`` "one", "channel"; "none": absent). A token operand is read at
``token * step``: a step of 0 gives one number to all tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

from actgraph.runtime.kernels.triton.common import gate as gated
from actgraph.runtime.kernels.triton.common import load_thresholds


@triton.jit
def per_channel(pointer, channels, mask, MODE: tl.constexpr):
    """A channel operand, float32."""
    if MODE == "one":
        value = tl.zeros(channels.shape, tl.float32) + tl.load(pointer).to(tl.float32)
    else:
        value = tl.load(pointer + channels, mask=mask, other=0).to(tl.float32)
    return value


@triton.jit
def at_least_tiny(norm):
    """A norm that may divide; NaN stays."""
    return tl.where(norm < 1e-8, 1e-8, norm)


@triton.jit
def shift(
    x, vector, strength, mask, y, scale, n_channels, span, strength_step, mask_step,
    VECTOR: tl.constexpr, NORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``x + c vector`` for one token and the channels [span * program 1, + span), which are all of them where norms count."""
    token = tl.program_id(0).to(tl.int64)
    x += token * n_channels
    y += token * n_channels
    c = tl.zeros((1,), tl.float32) + scale
    if strength is not None:
        c = tl.load(strength + token * strength_step).to(tl.float32) * c
    if mask is not None:
        c = tl.load(mask + token * mask_step).to(tl.float32) * c
    unit = tl.full((1,), 1.0, tl.float32)
    ratio = tl.full((1,), 1.0, tl.float32)
    if NORM != "none":
        x_squares = tl.zeros((BLOCK,), tl.float32)
        v_squares = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, n_channels, BLOCK):
            channels = first + tl.arange(0, BLOCK)
            inside = channels < n_channels
            h = tl.load(x + channels, mask=inside, other=0).to(tl.float32)
            x_squares += h * h
            if NORM == "relative":
                v = per_channel(vector, channels, inside, VECTOR)
                v_squares += v * v
        size = tl.sqrt_rn(tl.sum(x_squares, axis=0))
        if NORM == "relative":
            unit = unit * (size / at_least_tiny(tl.sqrt_rn(tl.sum(v_squares, axis=0))))
        else:
            y_squares = tl.zeros((BLOCK,), tl.float32)
            for first in range(0, n_channels, BLOCK):
                channels = first + tl.arange(0, BLOCK)
                inside = channels < n_channels
                h = tl.load(x + channels, mask=inside, other=0).to(tl.float32)
                h = h + tl.where(inside, c * per_channel(vector, channels, inside, VECTOR), 0.0)
                y_squares += h * h
            ratio = ratio * (size / at_least_tiny(tl.sqrt_rn(tl.sum(y_squares, axis=0))))
    start = tl.program_id(1) * span
    for first in range(start, tl.minimum(start + span, n_channels), BLOCK):
        channels = first + tl.arange(0, BLOCK)
        inside = channels < n_channels
        raw = tl.load(x + channels, mask=inside, other=0)
        edited = (raw.to(tl.float32) + c * (unit * per_channel(vector, channels, inside, VECTOR))) * ratio
        tl.store(y + channels, tl.where(c != 0, edited.to(y.dtype.element_ty), raw), mask=inside)


@triton.jit
def channel_scale(x, gamma, mask, y, n_values, n_channels, mask_step, GAMMA: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < n_values
    raw = tl.load(x + place, mask=inside, other=0)
    factor = per_channel(gamma, place % n_channels, inside, GAMMA)
    if mask is not None:
        m = tl.load(mask + (place // n_channels) * mask_step, mask=inside, other=0).to(tl.float32)
        factor = tl.where(m == 1, factor, 1.0 + m * (factor - 1.0))
        edited = tl.where(m == 0, raw, (raw.to(tl.float32) * factor).to(y.dtype.element_ty))
    else:
        edited = (raw.to(tl.float32) * factor).to(y.dtype.element_ty)
    tl.store(y + place, edited, mask=inside)


@triton.jit
def lowrank_map(
    x, basis, matrix, mask, y, n_channels, rank, mask_step, matrix_step, RANK: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """``x + m ((x basis) matrix) basis^T`` for one token."""
    token = tl.program_id(0).to(tl.int64)
    x += token * n_channels
    y += token * n_channels
    matrix += token * matrix_step
    r = tl.arange(0, RANK)
    part = tl.zeros((RANK,), tl.float32)
    for first in range(0, n_channels, BLOCK):
        channels = first + tl.arange(0, BLOCK)
        inside = channels < n_channels
        h = tl.load(x + channels, mask=inside, other=0).to(tl.float32)
        both = inside[:, None] & (r < rank)[None, :]
        b = tl.load(basis + (channels[:, None] * rank + r[None, :]), mask=both, other=0).to(tl.float32)
        part += tl.sum(h[:, None] * b, axis=0)
    square = (r < rank)[:, None] & (r < rank)[None, :]
    a = tl.load(matrix + (r[:, None] * rank + r[None, :]), mask=square, other=0).to(tl.float32)
    part = tl.sum(tl.where(square, part[:, None] * a, 0.0), axis=0)
    m = tl.full((1,), 1.0, tl.float32)
    if mask is not None:
        m = m * tl.load(mask + token * mask_step).to(tl.float32)
    for first in range(0, n_channels, BLOCK):
        channels = first + tl.arange(0, BLOCK)
        inside = channels < n_channels
        both = inside[:, None] & (r < rank)[None, :]
        b = tl.load(basis + (channels[:, None] * rank + r[None, :]), mask=both, other=0).to(tl.float32)
        delta = tl.sum(tl.where(both, b * part[None, :], 0.0), axis=1)
        raw = tl.load(x + channels, mask=inside, other=0)
        edited = raw.to(tl.float32) + m * delta
        tl.store(y + channels, tl.where(m != 0, edited.to(y.dtype.element_ty), raw), mask=inside)


@triton.jit
def clip(
    x, lo, hi, y, least, most, n_values, n_channels,
    LO: tl.constexpr, HI: tl.constexpr, POLICY: tl.constexpr, NAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < n_values
    raw = tl.load(x + place, mask=inside, other=0)
    h = raw.to(tl.float32)
    low = tl.zeros((BLOCK,), tl.float32) + least
    high = tl.zeros((BLOCK,), tl.float32) + most
    if LO != "none":
        low = per_channel(lo, place % n_channels, inside, LO)
    if HI != "none":
        high = per_channel(hi, place % n_channels, inside, HI)
    if POLICY == "saturate":
        bounded = tl.where(h < low, low, h)
        outside = (h < low) | (bounded > high)
        bounded = tl.where(bounded > high, high, bounded)
    else:
        outside = (h < low) | (h > high)
        bounded = tl.zeros((BLOCK,), tl.float32)
    if NAN == "zero":
        outside = outside | (h != h)
        bounded = tl.where(h != h, 0.0, bounded)
    tl.store(y + place, tl.where(outside, bounded.to(y.dtype.element_ty), raw), mask=inside)


@triton.jit
def gate(x, thresholds, y, threshold, n_values, n_channels, KEEP: tl.constexpr, THRESHOLDS: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < n_values
    h = tl.load(x + place, mask=inside, other=0).to(tl.float32)
    t = load_thresholds(thresholds, threshold, place % n_channels, inside, THRESHOLDS)
    tl.store(y + place, gated(h, t, KEEP).to(y.dtype.element_ty), mask=inside)


@triton.jit
def latent_edit(
    x, decoder, encoder, bias, thresholds, values, mask, y, value, n_channels, rank, values_step, mask_step,
    MODE: tl.constexpr, NORMALIZE: tl.constexpr, RANK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``x + m out ((g - f) decoder)`` for one token, ``f`` and ``g`` being its latents before and after."""
    token = tl.program_id(0).to(tl.int64)
    x += token * n_channels
    y += token * n_channels
    r = tl.arange(0, RANK)
    live = r < rank
    mean = tl.zeros((1,), tl.float32)
    divisor = tl.full((1,), 1.0, tl.float32)
    out = tl.full((1,), 1.0, tl.float32)
    if NORMALIZE == "layer_norm":
        sums = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, n_channels, BLOCK):
            channels = first + tl.arange(0, BLOCK)
            sums += tl.load(x + channels, mask=channels < n_channels, other=0).to(tl.float32)
        mean += tl.sum(sums, axis=0) / n_channels
    if NORMALIZE != "none":
        squares = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, n_channels, BLOCK):
            channels = first + tl.arange(0, BLOCK)
            inside = channels < n_channels
            h = tl.where(inside, tl.load(x + channels, mask=inside, other=0).to(tl.float32) - mean, 0.0)
            squares += h * h
        degrees = tl.zeros((1,), tl.float32) + n_channels
        if NORMALIZE == "layer_norm":
            degrees -= 1.0
        out = tl.sqrt_rn(tl.sum(squares, axis=0) / degrees)
        divisor = out
        if NORMALIZE == "layer_norm":
            divisor = out + 1e-5
    change = tl.zeros((RANK,), tl.float32) + value
    if values is not None:
        change = tl.load(values + token * values_step + r, mask=live, other=0).to(tl.float32)
    if MODE != "add":
        f = tl.zeros((RANK,), tl.float32)
        for first in range(0, n_channels, BLOCK):
            channels = first + tl.arange(0, BLOCK)
            inside = channels < n_channels
            h = (tl.load(x + channels, mask=inside, other=0).to(tl.float32) - mean) / divisor
            both = inside[:, None] & live[None, :]
            e = tl.load(encoder + (r[None, :] * n_channels + channels[:, None]), mask=both, other=0).to(tl.float32)
            f += tl.sum(tl.where(both, h[:, None] * e, 0.0), axis=0)
        if bias is not None:
            f += tl.load(bias + r, mask=live, other=0).to(tl.float32)
        low = tl.zeros((RANK,), tl.float32)
        if thresholds is not None:
            limit = tl.load(thresholds + r, mask=live, other=0).to(tl.float32)
            low = tl.where(limit < 0.0, 0.0, limit)
        f = tl.where(f <= low, 0.0, f)
        change = change - f if MODE == "set" else (change - 1.0) * f
    change = tl.where(live, change, 0.0)
    m = tl.full((1,), 1.0, tl.float32)
    if mask is not None:
        m = m * tl.load(mask + token * mask_step).to(tl.float32)
    edits = (m != 0) & (tl.sum(tl.where(change != 0, 1, 0), axis=0) > 0)
    for first in range(0, n_channels, BLOCK):
        channels = first + tl.arange(0, BLOCK)
        inside = channels < n_channels
        both = inside[:, None] & live[None, :]
        d = tl.load(decoder + (r[None, :] * n_channels + channels[:, None]), mask=both, other=0).to(tl.float32)
        delta = out * tl.sum(tl.where(both, d * change[None, :], 0.0), axis=1)
        raw = tl.load(x + channels, mask=inside, other=0)
        edited = raw.to(tl.float32) + m * delta
        tl.store(y + channels, tl.where(edits, edited.to(y.dtype.element_ty), raw), mask=inside)
