"""The numba kernels besides ``linear``: the samples of their ops in plain calls and in onnxruntime, and what they leave out."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actgraph.errors import InputError
from actgraph.graph.graph import Array
from actgraph.ops.dtypes import DType
from actgraph.ops.registry import get_op
from actgraph.runtime.kernels.calls import call
from actgraph.runtime.kernels.registry import all_kernels
from actgraph.runtime.native.library import available
from tests.conformance.harness import Case
from tests.runtime.kernel_cases import THREADS, agree, claimed, float32_cases, reference, run_as_operator

pytestmark = pytest.mark.skipif(not available(), reason="the kernels' library was not built")

KERNELS = all_kernels()
NAMES = [name for name in KERNELS if name != "linear"]
CASES = float32_cases(NAMES)
#: The samples that kernels decline: types of results and codes that they do not make.
DECLINED = {
    "quantize-1-f32", "quantize-5-f32", "quantize-6-f32", "dequantize-1-i8", "dequantize-2-i8", "dequantize-10-i16",
    "dequantize-10-i32",
}  # fmt: skip


def check(case: Case, got: Array, want: Array) -> None:
    assert got.shape == want.shape and got.dtype == want.dtype
    if case.op.exact or want.dtype.kind != "f":
        assert np.array_equal(got, want, equal_nan=True)
        if case.op.exact == "bits":
            assert np.array_equal(np.signbit(got) & (got == 0), np.signbit(want) & (want == 0))
        return
    codes = case.op.name == "feed_forward" and any(a is not None and a.dtype.kind in "iu" for a in case.operands())
    agree(got, want, 2e-4 if codes else 3e-6)  # activations beside integer weights have 16 bits


def test_what_is_declined() -> None:
    assert {str(case) for case in CASES if not claimed(case)} == DECLINED


@pytest.mark.parametrize("case", [case for case in CASES if str(case) not in DECLINED], ids=str)
def test_conforms(case: Case) -> None:
    """Every sample, by 1 to 3 threads, in plain calls and as a custom operator of onnxruntime."""
    operands, attributes = case.operands(), case.attributes
    want = reference(case.op, operands, attributes)
    for threads in THREADS:
        check(case, call(KERNELS[case.op.name], operands, attributes, threads), want)
        check(case, run_as_operator(case.op, operands, attributes, threads)[0], want)


def run(name: str, operands: list[Array | None], attributes: dict[str, Any], tolerance: float = 3e-6) -> Array:
    """A call that must agree with the reference by any number of threads."""
    op = get_op(name)
    want = reference(op, operands, op.complete(attributes))
    for threads in THREADS:
        got = call(KERNELS[name], operands, attributes, threads)
        agree(got, want, tolerance)
    return got


# --- functions --------------------------------------------------------------------------------------------------------------


def _everywhere(limit: float = 3e38) -> Array:
    """Numbers of all exponents and both signs, densely around 1, and the special ones."""
    rng = np.random.default_rng(1)
    sizes = 10.0 ** rng.uniform(-44, math.log10(limit), 20000)
    near = rng.uniform(0, 110, 40000)
    values = np.concatenate([sizes, near, [0.0, 88.72283, 88.72284, 87.3, 103.9, 104.1, 0.625, 0.92773, 3.9, 4.1, 9.1]])
    return np.concatenate([values, -values]).astype(np.float32)


def _applied(function: Any, x: Array) -> Array:
    from numba import njit

    @njit(error_model="numpy")
    def loop(x: Any, y: Any) -> None:
        for i in range(x.size):
            y[i] = function(x[i])

    y = np.empty_like(x)
    loop(x, y)
    return y


_erf = np.vectorize(math.erf)


@pytest.mark.parametrize(("name", "exact"), [("exp", np.exp), ("tanh", np.tanh), ("erf", _erf)])
def test_functions(name: str, exact: Callable[[Array], Array]) -> None:
    """Within 2 units in the last place everywhere, and right at infinity and NaN."""
    from actgraph.runtime.kernels.numba import functions

    x, function = _everywhere(), getattr(functions, name)
    with np.errstate(over="ignore"):
        want = exact(x.astype(np.float64))
        rounded = want.astype(np.float32)
    got = _applied(function, x)
    finite = np.isfinite(rounded)
    assert np.array_equal(got[~finite], rounded[~finite])
    unit = np.maximum(np.spacing(np.abs(rounded[finite])).astype(np.float64), 2.0**-149)
    assert (np.abs(got[finite] - want[finite]) / unit).max() < 2
    limits = {"exp": (np.inf, 0.0), "tanh": (1.0, -1.0), "erf": (1.0, -1.0)}[name]
    ends = _applied(function, np.float32([np.inf, -np.inf, np.nan]))
    assert tuple(ends[:2]) == limits and np.isnan(ends[2])


def test_sine_and_cosine() -> None:
    """Of numbers of any size, which are far beyond what plain argument reduction can do."""
    from actgraph.runtime.kernels.numba.functions import sine_cosine

    x = _everywhere()
    pairs = np.array([sine_cosine(v) for v in x])
    np.testing.assert_allclose(pairs[:, 0], np.sin(x.astype(np.float64)), rtol=0, atol=2.0**-24)
    np.testing.assert_allclose(pairs[:, 1], np.cos(x.astype(np.float64)), rtol=0, atol=2.0**-24)
    for odd in (np.inf, -np.inf, np.nan):
        assert np.isnan(sine_cosine(np.float32(odd))).all()


def test_rounding() -> None:
    from actgraph.runtime.kernels.numba.functions import rint

    x = np.concatenate([_everywhere(), np.arange(-20, 20) / np.float32(2), np.float32([4194304.5, 8388607.5, np.inf, -np.inf])])
    x = x.astype(np.float32)
    np.testing.assert_array_equal(_applied(rint, x), np.rint(x))


# --- norms and rotary embeddings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 15, 16, 100, 1024])
def test_norms_of_many_sizes(channels: int) -> None:
    rng = np.random.default_rng(channels)
    x, w, b = (rng.standard_normal(s).astype(np.float32) for s in ((5, 3, channels), (channels,), (channels,)))
    x[0] *= 1e-12
    x[1] += 100
    run("rms_norm", [x, w], {"offset": 1.0})
    run("layer_norm", [x, w, b], {"eps": 1e-5}, 1e-4 if channels == 15 else 3e-5)  # the mean of the row of 100s cancels


def test_refusals() -> None:
    x = np.ones((2, 8), np.float32)
    for name, operands, attributes in (
        ("rms_norm", [x, np.ones(7, np.float32)], {}),
        ("rotary", [np.ones((1, 1, 2, 4), np.float32), np.ones((1, 3, 4), np.float32), np.ones((1, 2, 4), np.float32)], {}),
        ("shift", [x, np.ones(3, np.float32)], {}),
        ("shift", [x, np.ones(8, np.float32), np.ones(3, np.float32)], {}),
        ("channel_scale", [x, np.ones(8, np.float32)], {"axis": 4}),
        ("lowrank_map", [x, np.ones((8, 2), np.float32), np.ones((3, 2), np.float32)], {}),
        ("latent_edit", [x, np.ones((3, 7), np.float32), np.ones((3, 7), np.float32)], {}),
        ("latent_edit", [x, np.ones((3, 8), np.float32)], {"mode": "set"}),
        ("latent_edit", [x, np.ones((3, 8), np.float32), None, None, None, np.ones(2, np.float32)], {"mode": "add"}),
        ("lowrank_map", [x, np.ones((8, 2), np.float32), np.ones((3, 2, 2), np.float32)], {}),
        ("index_gate", [x, np.array([8])], {}),
        ("index_gate", [x, np.ones(4, np.float32)], {}),
        ("topk_gate", [x], {"k": 1, "group_size": 3}),
        ("quantize", [x, np.ones(3, np.float32)], {"axis": 1}),
        ("attention", [np.ones((1, 3, 1, 4), np.float32), *[np.ones((1, 2, 5, 4), np.float32)] * 2], {"scale": 1.0}),
        ("feed_forward", [x, np.ones((4, 8), np.float32), np.ones((5, 8), np.float32)], {}),
    ):
        with pytest.raises(InputError, match=f"actgraph.{name}: "):
            call(KERNELS[name], operands, attributes)  # type: ignore[arg-type]


# --- feed_forward -----------------------------------------------------------------------------------------------------------


def weight(rng: np.random.Generator, kind: str, rows: int, columns: int, block: int, *, down: bool) -> list[Array | None]:
    """A weight and its scale, or None."""
    scales: tuple[int, ...] = (columns if down else rows,)
    if block:
        scales = (-(-rows // block), columns) if down else (rows, -(-columns // block))
    scale = rng.uniform(0.5, 1, scales).astype(np.float32)
    if kind in ("i4", "u4"):
        return [rng.integers(0, 256, (rows, columns // 2)).astype(np.uint8), scale * np.float32(0.02)]
    if kind == "i8":
        return [rng.integers(-127, 128, (rows, columns)).astype(np.int8), scale * np.float32(0.001)]
    values = (rng.standard_normal((rows, columns)) * 0.1).astype(DType(kind).numpy)
    return [values, scale if kind.startswith("f8") else None]


def drawn(kind: str, sizes: tuple[int, int, int, int], block: int = 0, gated: bool = True) -> list[Array | None]:
    tokens, inputs, neurons, outputs = sizes
    rng = np.random.default_rng(4)
    (up, up_scale), (gate, gate_scale) = (weight(rng, kind, neurons, inputs, block, down=False) for _ in range(2))
    down, down_scale = weight(rng, kind, neurons, outputs, block, down=True)
    x, up_bias, down_bias, gate_bias = (
        rng.standard_normal(s).astype(np.float32) for s in ((tokens, inputs), neurons, outputs, neurons)
    )
    if not gated:
        gate = gate_scale = gate_bias = None  # type: ignore[assignment]
    return [x, up, down, gate, up_scale, down_scale, gate_scale, up_bias, down_bias, gate_bias]


@pytest.mark.parametrize(
    ("kind", "block"), [("f32", 0), ("bf16", 0), ("f8e4m3", 0), ("i8", 0), ("i8", 64), ("u4", 32), ("i4", 128)]
)
def test_feed_forward(kind: str, block: int) -> None:
    """Formats and rules at sizes with and without whole vectors."""
    packing = {"packed": kind} if kind in ("i4", "u4") else {}
    for sizes in ((1, 128, 256, 128), (3, 66, 130, 34), (1, 2, 1, 2)):
        for gated, rules in (
            (True, {}),
            (True, {"sparse": "act", "threshold": 0.2, "activation": "gelu"}),
            (True, {"sparse": "hidden", "threshold": 0.2, "keep": "x>=", "activation": "gelu_tanh"}),
            (False, {"sparse": "act", "keep": "x>=", "threshold": 0.05, "activation": "relu2"}),
        ):
            run(
                "feed_forward",
                drawn(kind, sizes, block, gated),
                rules | packing | {"block_size": block},
                3e-3 if packing or kind == "i8" else 1e-5,
            )


@pytest.mark.parametrize("kind", ["f32", "bf16", "f8e4m3"])
def test_dropped_neurons_are_not_read(kind: str) -> None:
    """Under "act" neither the up nor the down rows of dropped neurons, under "hidden" not the down rows."""
    operands, op = drawn(kind, (1, 64, 200, 48)), get_op("feed_forward")
    up, down, gate = operands[1:4]
    for sparse in ("act", "hidden"):
        rules = {"sparse": sparse, "threshold": 0.3}
        want = reference(op, operands, op.complete(rules))
        hidden_of = [*operands[:2], np.eye(200, dtype=np.float32), gate, operands[4], None, *operands[6:8], None, operands[9]]
        dropped = reference(op, hidden_of, op.complete(rules))[0] == 0
        assert 20 < dropped.sum() < 200
        spoiled = [*operands]
        spoiled[2] = down.copy()  # type: ignore[union-attr]
        spoiled[2][dropped] = np.nan
        if sparse == "act":
            spoiled[1] = up.copy()  # type: ignore[union-attr]
            spoiled[1][dropped] = np.nan
        for threads in THREADS:
            agree(call(KERNELS["feed_forward"], spoiled, rules, threads), want, 1e-5)


def test_feed_forward_mixes_formats() -> None:
    """Numbers in up and gate beside codes in down, and the other way round."""
    plain, codes = drawn("bf16", (2, 64, 128, 64)), drawn("i8", (2, 64, 128, 64))
    run("feed_forward", [*plain[:2], codes[2], plain[3], None, codes[5], None], {}, 1e-3)
    run("feed_forward", [codes[0], codes[1], plain[2], codes[3], codes[4], None, codes[6]], {}, 1e-3)


def test_tokens_with_nan_stay_alone() -> None:
    operands, op = drawn("i8", (3, 64, 128, 64)), get_op("feed_forward")
    want = reference(op, operands, op.complete({}))
    operands[0][1, 5] = np.nan  # type: ignore[index]
    got = call(KERNELS["feed_forward"], operands, {}, 2)
    agree(got[[0, 2]], want[[0, 2]], 1e-3)


@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
def test_special_values_spread_as_in_the_reference(special: float) -> None:
    """Through norms, rotary embeddings, steering, and feed-forward blocks in float: in the same places, and nowhere else."""
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(s).astype(np.float32) for s in ((4, 2, 33), (33,)))
    heads_, table = (rng.standard_normal(s).astype(np.float32) for s in ((1, 2, 3, 8), (1, 3, 8)))
    basis = np.linalg.qr(rng.standard_normal((33, 2)))[0].astype(np.float32)
    x[1, 0, 5] = heads_[0, 1, 1, 2] = special
    run("rms_norm", [x, w], {})
    run("layer_norm", [x, w, w], {})
    run("rotary", [heads_, table, table], {})
    for norm in ("none", "restore", "relative"):
        run("shift", [x, w], {"norm": norm, "scale": 0.5})
    run("lowrank_map", [x, basis, 2 * np.eye(2, dtype=np.float32)], {})
    run("target_angle", [x, basis, np.float32(0.5)], {})
    weights: list[Array | None] = [rng.standard_normal(s).astype(np.float32) for s in ((20, 33), (20, 9), (20, 33))]
    for activation in ("silu", "gelu", "gelu_tanh", "relu", "relu2"):
        got = run("feed_forward", [x, *weights], {"activation": activation, "sparse": "act", "threshold": 0.2}, 1e-5)
        assert np.isfinite(got[:, 1]).all() and np.isfinite(got[[0, 2, 3]]).all()


# --- latents ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 7, 16, 100, 1024])
@pytest.mark.parametrize("normalize", ["none", "rescale", "layer_norm"])
def test_latents_of_many_sizes(channels: int, normalize: str) -> None:
    """Widths around the vector length, by several threads, with thresholds and numbers for each token."""
    rng = np.random.default_rng(channels)
    x = rng.standard_normal((5, 13, channels)).astype(np.float32)
    decoder, encoder = (rng.standard_normal((6, channels)).astype(np.float32) / np.float32(channels**0.5) for _ in range(2))
    bias, thresholds, values = (rng.standard_normal(s).astype(np.float32) for s in (6, 6, (13, 6)))
    for mode in ("add", "set", "scale"):
        operands = [x, decoder, encoder, bias, thresholds, values, rng.random((5, 1)) < 0.7]
        run("latent_edit", operands, {"mode": mode, "normalize": normalize}, 1e-5)


@pytest.mark.parametrize("axis", [-1, 1])
def test_silent_latents_leave_every_bit(axis: int) -> None:
    """No latent fires, or the mask is 0: -0.0 and NaN stay, whatever the decoder holds."""
    x = np.tile(np.float32([-0.0, 0.0, 1.5, -2.5, 1e-30, 7, -3, 2]), (4, 3, 1))
    x = np.ascontiguousarray(np.moveaxis(x, -1, axis))
    rows, low = np.random.default_rng(2).standard_normal((2, 8)).astype(np.float32), np.full(2, -100, np.float32)
    broken = np.full((2, 8), np.nan, np.float32)
    for operands, mode in (
        ([x, broken, rows, low], "set"),
        ([x, rows, rows, low, None, np.float32([2, 3])], "scale"),
        ([x, broken, None, None, None, np.zeros(2, np.float32)], "add"),
        ([np.where(x == 7, np.float32(np.nan), x), rows, rows, None, None, None, np.zeros((4, 3), bool)], "set"),
    ):
        for threads in THREADS:
            got = call(KERNELS["latent_edit"], operands, get_op("latent_edit").complete({"mode": mode, "axis": axis}), threads)
            assert np.array_equal(got.view(np.uint32), operands[0].view(np.uint32))


# --- attention --------------------------------------------------------------------------------------------------------------


def heads(batch: int, heads_: int, groups: int, queries: int, keys: int, head: int, width: int) -> list[Array | None]:
    rng = np.random.default_rng(keys)
    shapes = ((batch, heads_, queries, head), (batch, groups, keys, head), (batch, groups, keys, width))
    return [rng.standard_normal(s).astype(np.float32) for s in shapes]


@pytest.mark.parametrize("keys", [0, 1, 63, 64, 65, 130, 515])
def test_attention(keys: int) -> None:
    """Any number of keys, of key heads and of threads; heads that fill no vector; masks of every rank."""
    rng = np.random.default_rng(keys)
    for sizes in ((1, 4, 1, 1, keys, 64, 64), (2, 6, 2, 3, keys, 20, 70), (1, 3, 3, 1, keys, 7, 5)):
        operands, queries = heads(*sizes), sizes[3]
        run("attention", operands, {"scale": 0.3})
        run("attention", operands, {"scale": 0.5, "softcap": 2.0})
        for shape in ((keys,), (queries, keys), (1, 1, keys), (sizes[0], 1, queries, keys), (sizes[0], sizes[1], 1, 1), ()):
            run("attention", [*operands, rng.standard_normal(shape).astype(np.float32)], {"scale": 0.3})
            run("attention", [*operands, rng.random(shape) < 0.4], {"scale": 0.3})


def test_attention_of_special_values() -> None:
    """NaN and infinite scores make their query NaN; hidden blocks are not read, whatever they hold; all hidden gives zeros."""
    operands = heads(1, 2, 2, 2, 200, 16, 16)
    query, key, value = operands
    assert query is not None and key is not None and value is not None
    clean = reference(get_op("attention"), operands, {"scale": 0.3, "softcap": 0.0})
    query[0, 1, 0, 3] = np.nan
    got = call(KERNELS["attention"], operands, {"scale": 0.3}, 2)
    assert np.isnan(got[0, 1, 0]).all()
    agree(got[0, 0], clean[0, 0], 3e-6)
    agree(got[0, 1, 1], clean[0, 1, 1], 3e-6)
    query[0, 1, 0, 3] = 1e38  # the score overflows
    key[0, 1, 70] = 1e38
    assert np.isnan(call(KERNELS["attention"], operands, {"scale": 1.0}, 2)[0, 1, 0]).all()
    operands = heads(1, 2, 2, 2, 200, 16, 16)
    seen = np.arange(200) < 60
    want = reference(get_op("attention"), [a[..., :60, :] if i else a for i, a in enumerate(operands)], {"scale": 0.3})  # type: ignore[index]
    operands[1][:, :, 64:], operands[2][:, :, 64:] = np.nan, np.inf  # type: ignore[index]
    for threads in THREADS:
        agree(call(KERNELS["attention"], [*operands, seen], {"scale": 0.3}, threads), want, 3e-6)
        assert (call(KERNELS["attention"], [*operands, seen & False], {"scale": 0.3}, threads) == 0).all()
        hidden = np.where(seen, 0, -np.inf).astype(np.float32)[None].repeat(2, 0)
        hidden[1] = -np.inf
        zeros = call(KERNELS["attention"], [*heads(1, 2, 2, 2, 200, 16, 16), hidden], {"scale": 0.3}, threads)
        agree(zeros[:, :, 0], want[:, :, 0], 3e-6)
        assert (zeros[:, :, 1] == 0).all()


STORED = ("f32", "f16", "bf16", "i8")


def stored(x: Array, kind: str) -> tuple[Array, Array | None]:
    """Numbers [batch, heads, keys, head] as a cache keeps them, and their scales."""
    if kind != "i8":
        return x.astype(DType(kind).numpy), None
    scale = np.abs(x).max(-1, keepdims=True, initial=1e-3).astype(np.float32) / np.float32(127)
    return np.rint(x / scale).astype(np.int8), scale


def as_stored(operands: list[Array | None], key: str, value: str) -> list[Array | None]:
    """The operands [query, key, value, mask, key_scale, value_scale] in which keys and values are stored so."""
    query, k, v, mask = (*operands, None)[:4]
    assert k is not None and v is not None
    (k, key_scale), (v, value_scale) = stored(k, key), stored(v, value)
    return [query, k, v, mask, key_scale, value_scale]


@pytest.mark.parametrize("value", STORED)
@pytest.mark.parametrize("key", STORED)
def test_attention_over_a_stored_cache(key: str, value: str) -> None:
    """Grouped heads, several queries and threads, heads that fill no vector, masks, capped scores."""
    rng = np.random.default_rng(0)
    for sizes in ((1, 4, 1, 1, 200, 64, 64), (2, 6, 2, 3, 70, 20, 70), (1, 3, 3, 1, 65, 7, 5), (1, 2, 1, 1, 0, 16, 16)):
        operands, (queries, keys) = heads(*sizes), sizes[3:5]
        for mask in (None, rng.random((sizes[0], 1, queries, keys)) < 0.4, rng.standard_normal(keys).astype(np.float32)):
            run("attention", as_stored([*operands, mask], key, value), {"scale": 0.3, "softcap": 0.0 if mask is None else 5.0})


@pytest.mark.parametrize("kind", ["f16", "bf16", "i8"])
def test_stored_attention_of_special_values(kind: str) -> None:
    """NaN and infinity in a query, in keys of half precision or in a scale; hidden blocks are not read."""
    operands = as_stored(heads(1, 2, 2, 2, 200, 16, 16), kind, kind)
    query, key, value, _, key_scale, value_scale = operands
    assert query is not None and key is not None and value is not None
    clean = reference(get_op("attention"), operands, {"scale": 0.3, "softcap": 0.0})
    query[0, 1, 0, 3] = np.nan
    got = call(KERNELS["attention"], operands, {"scale": 0.3}, 2)
    assert np.isnan(got[0, 1, 0]).all()
    agree(got[0, 0], clean[0, 0], 3e-6)
    agree(got[0, 1, 1], clean[0, 1, 1], 3e-6)
    query[0, 1, 0, 3] = 0
    (key if key_scale is None else key_scale)[0, 0, 5] = np.nan
    (value if value_scale is None else value_scale)[0, 1, 5] = np.inf
    got = call(KERNELS["attention"], operands, {"scale": 0.3}, 2)
    agree(got, reference(get_op("attention"), operands, {"scale": 0.3, "softcap": 0.0}), 3e-6)
    assert np.isnan(got[0, 0]).all() and not np.isfinite(got[0, 1]).all()
    operands = as_stored(heads(1, 2, 2, 2, 200, 16, 16), kind, kind)
    seen = np.arange(200) < 60
    want = reference(
        get_op("attention"), [a if a is None or not i else a[..., :60, :] for i, a in enumerate(operands)], {"scale": 0.3}
    )
    for tensor in (operands[1], operands[2]) if kind != "i8" else (operands[4], operands[5]):
        tensor[:, :, 64:] = np.nan  # type: ignore[index]
    operands[3] = seen
    for threads in THREADS:
        agree(call(KERNELS["attention"], operands, {"scale": 0.3}, threads), want, 3e-6)


def test_what_stored_attention_refuses() -> None:
    operands = as_stored(heads(1, 2, 2, 1, 8, 16, 16), "i8", "i8")
    for place, bad in ((4, None), (5, None), (4, np.ones((1, 2, 7, 1), np.float32)), (5, np.ones((1, 2, 8, 16), np.float32))):
        with pytest.raises(InputError, match="need a scale for each row"):
            call(KERNELS["attention"], [bad if i == place else a for i, a in enumerate(operands)], {"scale": 1.0})
    floats = [*heads(1, 2, 2, 1, 8, 16, 16), None, np.ones((1, 2, 8, 1), np.float32)]
    with pytest.raises(InputError, match="and others take none"):
        call(KERNELS["attention"], floats, {"scale": 1.0})


# --- steering and the rest --------------------------------------------------------------------------------------------------


def test_masks_of_every_type_and_place() -> None:
    """Masks and strengths that broadcast in any of the token axes, over channels in any place."""
    rng = np.random.default_rng(7)
    x = rng.standard_normal((2, 3, 4, 5)).astype(np.float32)
    for axis in (0, 1, -2, 3):
        others = [size for place, size in enumerate(x.shape) if place != axis % 4]
        vector = rng.standard_normal(x.shape[axis]).astype(np.float32)
        basis = np.linalg.qr(rng.standard_normal((x.shape[axis], 2)))[0].astype(np.float32)
        for shape in ((), (1,), (others[2],), (1, others[2]), (others[1], 1), tuple(others), (others[0], 1, 1)):
            for kind in (np.float32, np.bool_, np.int64, np.int32, np.float16):
                mask = rng.integers(0, 2, shape).astype(kind)
                got = run("shift", [x, vector, None, mask], {"axis": axis, "norm": "restore"})
                off = np.broadcast_to(np.expand_dims(np.broadcast_to(mask, others) == 0, axis), x.shape)
                assert np.array_equal(got[off], x[off])
            run("channel_scale", [x, vector, mask], {"axis": axis})
            run("lowrank_map", [x, basis, np.eye(2, dtype=np.float32), mask], {"axis": axis})
            run("lowrank_map", [x, basis, rng.standard_normal((*shape, 2, 2)).astype(np.float32), mask], {"axis": axis})
            run(
                "target_angle", [x, basis, rng.standard_normal(shape).astype(np.float32), mask], {"axis": axis, "when": "above"}
            )
    full = rng.standard_normal((3, 1, 5)).astype(np.float32)
    for norm in ("none", "restore", "relative"):
        run("shift", [x, full], {"axis": 1, "norm": norm, "scale": 0.5})
        run("shift", [x, full, None, np.ones(5, np.float32)], {"axis": 2, "norm": norm})
    run("channel_scale", [x, full], {"axis": 1})
    run("gate", [x, np.abs(full)], {"axis": 2})
    run("clip", [x, -np.abs(full), np.float32(0.3)], {"axis": 2})


def test_quantizing_what_is_not_finite() -> None:
    """Infinity saturates, values far outside too; a cache's codes and scales come back within half a step."""
    x = np.float32([[np.inf, -np.inf, 3e38, -3e38, 0.5, 1.5, -0.5, 126.5]])
    got = call(KERNELS["quantize"], [x, np.float32(1)], {})
    assert got.tolist() == [[127, -128, 127, -128, 0, 2, 0, 126]]
    keys = np.random.default_rng(3).standard_normal((2, 3, 5, 64)).astype(np.float32)
    scale = call(KERNELS["token_scale"], [keys], {}, 2)
    block = {"axis": -1, "block_size": 64}
    codes = call(KERNELS["quantize"], [keys, scale], block, 2)
    assert np.array_equal(codes, reference(get_op("quantize"), [keys, scale], get_op("quantize").complete(block)))
    back = call(KERNELS["dequantize"], [codes, scale], block, 2)
    assert (np.abs(back - keys) <= scale * 0.5001).all()


@pytest.mark.slow
@pytest.mark.parametrize("processor", ["x86-64-v3", "x86-64"])
def test_lesser_processors(processor: str, tmp_path: Path) -> None:
    """All of this file with code for processors without AVX-512 and VNNI, and without AVX and FMA."""
    features = "+avx,+avx2,+fma,+f16c,+bmi,+bmi2" if processor == "x86-64-v3" else "+sse2"
    environment = os.environ | {"NUMBA_CPU_NAME": processor, "NUMBA_CPU_FEATURES": features, "ACTGRAPH_CACHE": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
