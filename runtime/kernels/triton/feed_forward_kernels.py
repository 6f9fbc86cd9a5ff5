"""Device code of ``feed_forward``: gate, up, activation and threshold in one pass over the neurons."""

from __future__ import annotations

import triton
import triton.language as tl

from actgraph.runtime.kernels.triton.common import affine, gate, load_thresholds, rows_product


@triton.jit
def activate(h, ACTIVATION: tl.constexpr):
    """The activation, float32."""
    if ACTIVATION == "silu":
        h = h / (1.0 + tl.exp(-h))
    elif ACTIVATION == "gelu":
        h = h * 0.5 * (1.0 + tl.erf(h * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh z) / 2 is the sigmoid of 2 z
        h = h / (1.0 + tl.exp(-1.5957691216057308 * (h + 0.044715 * h * h * h)))
    else:
        h = tl.where(h <= 0, 0.0, h)  # NaN stays
        if ACTIVATION == "relu2":
            h = h * h
    return h


@triton.jit
def drop(h, thresholds, threshold, channels, mask, KEEP: tl.constexpr, THRESHOLDS: tl.constexpr):
    """Tokens by channels, gated."""
    return gate(h, load_thresholds(thresholds, threshold, channels, mask, THRESHOLDS)[None, :], KEEP)


@triton.jit
def combine(
    act, up, thresholds, threshold, channels, mask,
    GATE: tl.constexpr, SPARSE: tl.constexpr, KEEP: tl.constexpr, THRESHOLDS: tl.constexpr,
):  # fmt: skip
    """The input of down from an activation (gated already where SPARSE is "act" and there is a GATE) and ``up``."""
    h = act
    if GATE:
        h = act * up
        if SPARSE == "act":
            h = tl.where(act == 0, 0.0, h)
    if SPARSE == "hidden" or (SPARSE == "act" and not GATE):
        h = drop(h, thresholds, threshold, channels, mask, KEEP, THRESHOLDS)
    return h


@triton.jit
def neurons(
    x, up_weight, up_scale, up_bias, gate_weight, gate_scale, gate_bias, thresholds, hidden, threshold,
    n_tokens, n_inputs, n_neurons, up_stride, gate_stride, up_groups, gate_groups,
    UP_FORM: tl.constexpr, UP_PACKED: tl.constexpr, UP_SCALE: tl.constexpr, UP_ZERO: tl.constexpr,
    UP_GROUP: tl.constexpr, UP_ALIGNED: tl.constexpr,
    GATE_FORM: tl.constexpr, GATE_PACKED: tl.constexpr, GATE_SCALE: tl.constexpr, GATE_ZERO: tl.constexpr,
    GATE_GROUP: tl.constexpr, GATE_ALIGNED: tl.constexpr,
    ACTIVATION: tl.constexpr, SPARSE: tl.constexpr, KEEP: tl.constexpr, THRESHOLDS: tl.constexpr,
    TOKENS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """Few tokens: ``hidden`` [tokens, neurons], float32. With SPARSE "act" rows of up that every token drops are not read."""
    rows = tl.program_id(0).to(tl.int64) * OUTPUTS + tl.arange(0, OUTPUTS)
    mask = rows < n_neurons
    tokens = tl.arange(0, TOKENS).to(tl.int64)
    token_mask = tokens < n_tokens
    needed = mask
    end = n_inputs
    if gate_weight is not None:
        act = rows_product(
            x, gate_weight, gate_scale, None, None, 0.0, tokens, token_mask, rows, mask, 0, n_inputs,
            n_inputs, n_neurons, gate_stride, gate_groups, False, "none", "attribute",
            GATE_FORM, GATE_PACKED, GATE_SCALE, GATE_ZERO, GATE_GROUP, GATE_ALIGNED, TOKENS, OUTPUTS, INPUTS,
        )  # fmt: skip
        act = activate(affine(act, gate_scale, gate_bias, rows, mask, GATE_SCALE), ACTIVATION)
        if SPARSE == "act":
            act = drop(act, thresholds, threshold, rows, mask, KEEP, THRESHOLDS)
            on = tl.max(((act != 0) & token_mask[:, None]).to(tl.int32), axis=0)
            needed = mask & (on > 0)
            end = tl.where(tl.max(on, axis=0) > 0, end, 0)
    up = rows_product(
        x, up_weight, up_scale, None, None, 0.0, tokens, token_mask, rows, needed, 0, end,
        n_inputs, n_neurons, up_stride, up_groups, False, "none", "attribute",
        UP_FORM, UP_PACKED, UP_SCALE, UP_ZERO, UP_GROUP, UP_ALIGNED, TOKENS, OUTPUTS, INPUTS,
    )  # fmt: skip
    up = affine(up, up_scale, up_bias, rows, mask, UP_SCALE)
    if gate_weight is not None:
        h = combine(act, up, thresholds, threshold, rows, mask, True, SPARSE, KEEP, THRESHOLDS)
    else:
        act = activate(up, ACTIVATION)
        h = combine(act, act, thresholds, threshold, rows, mask, False, SPARSE, KEEP, THRESHOLDS)
    tl.store(hidden + (tokens[:, None] * n_neurons + rows[None, :]), h, mask=token_mask[:, None] & mask[None, :])


@triton.jit
def combine_flat(
    gate_sums, up_sums, thresholds, hidden, threshold, n_values, n_neurons,
    ACTIVATION: tl.constexpr, SPARSE: tl.constexpr, KEEP: tl.constexpr, THRESHOLDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Many tokens: ``hidden`` from the products with gate (absent: none) and up, all float32 [tokens, neurons]."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < n_values
    rows = place % n_neurons
    up = tl.load(up_sums + place, mask=mask, other=0)[None, :]
    if gate_sums is not None:
        act = activate(tl.load(gate_sums + place, mask=mask, other=0)[None, :], ACTIVATION)
        if SPARSE == "act":
            act = drop(act, thresholds, threshold, rows, mask, KEEP, THRESHOLDS)
        h = combine(act, up, thresholds, threshold, rows, mask, True, SPARSE, KEEP, THRESHOLDS)
    else:
        act = activate(up, ACTIVATION)
        h = combine(act, act, thresholds, threshold, rows, mask, False, SPARSE, KEEP, THRESHOLDS)
    tl.store(hidden + place[None, :], h, mask=mask[None, :])
