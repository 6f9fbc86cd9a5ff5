"""Device code of ``linear``: compaction of gated inputs, streamed products for few tokens, tiles for many, sums of parts.

Sums are float32. Nothing is added atomically: parts of a split are written apart and summed in order by ``sum_parts``, so
that every run gives the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from actgraph.runtime.kernels.triton.common import by_group, finish, load_gated, load_kept, load_tile, rows_product, shift_zero


@triton.jit
def compact(
    x, thresholds, indices, values, count, threshold, n_tokens, n_inputs,
    KEEP: tl.constexpr, THRESHOLDS: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The channels that any token keeps, ascending: ``indices`` [K], gated ``values`` [tokens, K] beside, and how many.

    One program, so that the order is that of the channels. A channel that is 0 for every token counts as dropped.
    """
    tokens = tl.arange(0, TOKENS).to(tl.int64)
    token_mask = tokens < n_tokens
    total = tl.program_id(0)  # 0: the one program
    for first in range(0, n_inputs, BLOCK):
        channels = first + tl.arange(0, BLOCK)
        h = load_gated(
            x, thresholds, threshold, tokens, token_mask, channels, channels < n_inputs, n_inputs, KEEP, THRESHOLDS
        )  # fmt: skip
        active = tl.max((h != 0).to(tl.int32), axis=0)
        place = total + tl.cumsum(active, axis=0) - active
        tl.store(indices + place, channels, mask=active > 0)
        mask = token_mask[:, None] & (active > 0)[None, :]
        tl.store(values + (tokens[:, None] * n_inputs + place[None, :]), h, mask=mask)
        total += tl.sum(active, axis=0)
    tl.store(count, total)


@triton.jit
def stream_out_in(
    x, weight, scale, zero, bias, kept, thresholds, y, threshold,
    n_tokens, n_inputs, n_outputs, stride, groups, part_length,
    GATED: tl.constexpr, KEEP: tl.constexpr, THRESHOLDS: tl.constexpr, FORM: tl.constexpr, PACKED: tl.constexpr,
    SCALE: tl.constexpr, ZERO: tl.constexpr, GROUP: tl.constexpr, ALIGNED: tl.constexpr, SPLIT: tl.constexpr,
    TOKENS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """Few tokens by a weight [N, K]. Rows that no token keeps are not read, nor columns that every token drops.

    SPLIT: ``y`` is float32 [parts, tokens, N] and gets the bare sums.
    """
    part = tl.program_id(1)
    outputs = tl.program_id(0).to(tl.int64) * OUTPUTS + tl.arange(0, OUTPUTS)
    output_mask = outputs < n_outputs
    tokens = tl.arange(0, TOKENS).to(tl.int64)
    token_mask = tokens < n_tokens
    start = part * part_length
    end = tl.minimum(start + part_length, n_inputs)
    needed = output_mask
    if kept is not None:
        on = load_kept(kept, tokens, token_mask, outputs, output_mask, n_outputs)
        needed = tl.max(on.to(tl.int32), axis=0) > 0
        end = tl.where(tl.max(needed.to(tl.int32), axis=0) > 0, end, start)
    total = rows_product(
        x, weight, scale, zero, thresholds, threshold, tokens, token_mask, outputs, needed, start, end,
        n_inputs, n_outputs, stride, groups,
        GATED, KEEP, THRESHOLDS, FORM, PACKED, SCALE, ZERO, GROUP, ALIGNED, TOKENS, OUTPUTS, INPUTS,
    )  # fmt: skip
    if SPLIT:
        place = (part * n_tokens + tokens)[:, None] * n_outputs + outputs[None, :]
        tl.store(y + place, total, mask=token_mask[:, None] & output_mask[None, :])
    else:
        finish(total, y, scale, bias, kept, tokens, token_mask, outputs, output_mask, n_outputs, SCALE)


@triton.jit
def stream_in_out(
    x, weight, scale, zero, bias, kept, indices, count, y,
    n_tokens, n_inputs, n_outputs, stride, groups, part_length,
    FORM: tl.constexpr, PACKED: tl.constexpr, SCALE: tl.constexpr, ZERO: tl.constexpr, GROUP: tl.constexpr,
    ALIGNED: tl.constexpr, SPLIT: tl.constexpr, TOKENS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """Few tokens by a weight [K, N]; with ``indices`` (of ``count`` channels, ``x`` being their values) only those rows are
    read. Columns that no token keeps are not read unless packed. SPLIT: as ``stream_out_in``.
    """
    part = tl.program_id(1)
    first_output = tl.program_id(0).to(tl.int64) * OUTPUTS
    outputs = first_output + tl.arange(0, OUTPUTS)
    output_mask = outputs < n_outputs
    tokens = tl.arange(0, TOKENS).to(tl.int64)
    token_mask = tokens < n_tokens
    length = n_inputs
    if indices is not None:
        length = tl.load(count)
        part_length = tl.cdiv(tl.cdiv(length, tl.num_programs(1)), INPUTS) * INPUTS
    start = part * part_length
    end = tl.minimum(start + part_length, length)
    needed = output_mask
    if kept is not None:
        on = load_kept(kept, tokens, token_mask, outputs, output_mask, n_outputs)
        needed = tl.max(on.to(tl.int32), axis=0) > 0
        end = tl.where(tl.max(needed.to(tl.int32), axis=0) > 0, end, start)
    sums = tl.zeros((TOKENS, INPUTS, OUTPUTS), tl.float32)
    for first in range(start, end, INPUTS):
        places = first + tl.arange(0, INPUTS)
        mask = places < end
        inputs = places
        if indices is not None:
            inputs = tl.load(indices + places, mask=mask, other=0)
        h = tl.load(
            x + (tokens[:, None] * n_inputs + places[None, :]), mask=token_mask[:, None] & mask[None, :], other=0
        ).to(tl.float32)  # fmt: skip
        w = load_tile(weight, inputs.to(tl.int64), mask, first_output, n_outputs, needed, stride, FORM, PACKED, OUTPUTS)
        w = shift_zero(
            w, zero, outputs, output_mask, inputs, mask, first, n_outputs, groups, ZERO, GROUP, False, ALIGNED, INPUTS
        )  # fmt: skip
        if SCALE == "group":
            w = w * by_group(
                scale, outputs, output_mask, inputs, mask, first, n_outputs, groups, GROUP, False, ALIGNED, INPUTS
            )  # fmt: skip
        sums += h[:, :, None] * w[None, :, :]
    total = tl.sum(sums, axis=1)
    if SPLIT:
        place = (part * n_tokens + tokens)[:, None] * n_outputs + outputs[None, :]
        tl.store(y + place, total, mask=token_mask[:, None] & output_mask[None, :])
    else:
        finish(total, y, scale, bias, kept, tokens, token_mask, outputs, output_mask, n_outputs, SCALE)


@triton.jit
def sum_parts(
    parts, y, scale, bias, kept, n_parts, n_tokens, n_outputs, SCALE: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr
):
    """The sum of ``parts`` [n_parts, tokens, N] in their order, and what ``finish`` does."""
    outputs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    output_mask = outputs < n_outputs
    tokens = tl.arange(0, TOKENS).to(tl.int64)
    token_mask = tokens < n_tokens
    total = tl.zeros((TOKENS, BLOCK), tl.float32)
    for part in range(0, n_parts):
        place = (part * n_tokens + tokens)[:, None] * n_outputs + outputs[None, :]
        total += tl.load(parts + place, mask=token_mask[:, None] & output_mask[None, :], other=0)
    finish(total, y, scale, bias, kept, tokens, token_mask, outputs, output_mask, n_outputs, SCALE)


@triton.jit
def tiles(
    x, weight, scale, zero, bias, kept, thresholds, y, threshold,
    n_tokens, n_inputs, n_outputs, stride, groups,
    KEEP: tl.constexpr, THRESHOLDS: tl.constexpr, FORM: tl.constexpr, PACKED: tl.constexpr,
    SCALE: tl.constexpr, ZERO: tl.constexpr, GROUP: tl.constexpr, ALIGNED: tl.constexpr, AFTER: tl.constexpr,
    OUT_IN: tl.constexpr, DOT: tl.constexpr,
    TOKENS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """Many tokens: tiles of the weight are decoded in registers and multiplied by ``tl.dot`` in the type DOT.

    DOT is narrower than float32 only where it holds ``x`` and the codes exactly. AFTER: an input tile lies in one group, whose
    scale multiplies the product in place of the tile. A tile of outputs that nothing keeps is not computed.
    """
    first_output = tl.program_id(0).to(tl.int64) * OUTPUTS
    outputs = first_output + tl.arange(0, OUTPUTS)
    output_mask = outputs < n_outputs
    tokens = tl.program_id(1).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    token_mask = tokens < n_tokens
    end = n_inputs
    if kept is not None:
        on = load_kept(kept, tokens, token_mask, outputs, output_mask, n_outputs)
        end = tl.where(tl.max(tl.max(on.to(tl.int32), axis=1), axis=0) > 0, end, 0)
    sums = tl.zeros((TOKENS, OUTPUTS), tl.float32)
    for first in range(0, end, INPUTS):
        inputs = first + tl.arange(0, INPUTS)
        mask = inputs < n_inputs
        h = load_gated(x, thresholds, threshold, tokens, token_mask, inputs, mask, n_inputs, KEEP, THRESHOLDS)
        if OUT_IN:
            w = load_tile(weight, outputs, output_mask, first, n_inputs, mask, stride, FORM, PACKED, INPUTS)
        else:
            w = load_tile(
                weight, inputs.to(tl.int64), mask, first_output, n_outputs, output_mask, stride, FORM, PACKED, OUTPUTS
            )  # fmt: skip
        w = shift_zero(
            w, zero, outputs, output_mask, inputs, mask, first, n_outputs, groups, ZERO, GROUP, OUT_IN, ALIGNED, INPUTS
        )  # fmt: skip
        if SCALE == "group":
            factor = by_group(
                scale, outputs, output_mask, inputs, mask, first, n_outputs, groups, GROUP, OUT_IN, ALIGNED, INPUTS
            )  # fmt: skip
            if not AFTER:
                w = w * factor
        if OUT_IN:
            w = tl.trans(w)
        product = tl.dot(h.to(DOT), w.to(DOT), input_precision="ieee")
        if AFTER:
            product = product * tl.trans(factor) if OUT_IN else product * factor
        sums += product
    finish(sums, y, scale, bias, kept, tokens, token_mask, outputs, output_mask, n_outputs, SCALE)
