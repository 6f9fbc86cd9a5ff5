"""The numba kernels of ``linear``: its samples, and a grid of formats, layouts, groups, gates and odd sizes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actgraph.errors import InputError
from actgraph.graph.graph import Array
from actgraph.ops.dtypes import DType
from actgraph.ops.registry import get_op
from actgraph.runtime.kernels.calls import call, describe, frame_of
from actgraph.runtime.kernels.numba import linear
from actgraph.runtime.kernels.registry import all_kernels
from actgraph.runtime.native.library import available
from tests.conformance.harness import Case
from tests.runtime.kernel_cases import THREADS, agree, claimed, float32_cases, reference, run_as_operator

pytestmark = pytest.mark.skipif(not available(), reason="the kernels' library was not built")

OP = get_op("linear")
LINEAR = all_kernels()["linear"]
CASES = float32_cases(["linear"])
FLOATS = ("f32", "bf16", "f16", "f8e4m3", "f8e5m2")
CODES = ("i8", "u8", "i4", "u4")
#: tokens, inputs, outputs: none of them, one, whole vectors, and what is left of them.
SIZES = ((1, 768, 256), (3, 200, 37), (1, 128, 5), (2, 64, 130), (0, 128, 8), (1, 1, 1), (2, 1152, 66))


def check(got: Array, want: Array, operands: Sequence[Array | None], attributes: dict[str, Any]) -> None:
    """Next to integer weights activations are rounded to 16 bits: five standard deviations of that, and of float32 sums."""
    x, weight, scale, zero = (*operands, None, None)[:4]
    assert x is not None and weight is not None
    if weight.dtype.kind not in "iu":
        return agree(got, want, 1e-5)
    form = {key: attributes[key] for key in ("layout", "block_size", "packed")}
    inputs = np.eye(x.shape[-1], dtype=np.float32)
    columns = np.linalg.norm(reference(OP, [inputs, weight, scale, zero], OP.complete(form)), axis=0)
    largest = np.abs(x, where=np.isfinite(x), out=np.zeros_like(x)).max(initial=0)
    agree(got, want, 5e-5, largest * columns.max(initial=0))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_conforms(case: Case) -> None:
    assert claimed(case)
    operands, attributes = case.operands(), case.attributes
    want = reference(OP, operands, attributes)
    for threads in THREADS:
        check(call(LINEAR, operands, attributes, threads), want, operands, attributes)


@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_conforms_in_onnxruntime(case: Case) -> None:
    operands, attributes = case.operands(), case.attributes
    want = reference(OP, operands, attributes)
    for threads in THREADS:
        (got,) = run_as_operator(OP, operands, attributes, threads)
        check(got, want, operands, attributes)


def drawn(
    kind: str, layout: str, sizes: tuple[int, int, int], block: int = 0, seed: int = 1
) -> tuple[list[Array | None], dict[str, Any]]:
    """Operands and attributes of a linear with weights of ``kind``; one zero point where there are no groups."""
    tokens, inputs, outputs = sizes
    rng = np.random.default_rng(seed)
    packed = kind if kind in ("i4", "u4") else ""
    rows, columns = (outputs, inputs) if layout == "out_in" else (inputs, outputs)
    shape = (rows, columns // 2) if packed else (rows, columns)
    if packed or kind == "u8":
        weight: Array = rng.integers(0, 256, shape).astype(np.uint8)
    elif kind == "i8":
        weight = rng.integers(-128, 128, shape).astype(np.int8)
    else:
        weight = rng.standard_normal(shape).astype(DType(kind).numpy)
    groups = -(-inputs // block) if block else 0
    scales = (outputs,) if not block else (outputs, groups) if layout == "out_in" else (groups, outputs)
    coded = kind in CODES or kind.startswith("f8")
    scale = rng.uniform(0.5, 1, scales).astype(np.float32) if coded else None
    zero = {"u8": np.array(120, np.uint8), "u4": np.array(8, np.uint8)}.get(kind) if not block else None
    bias = rng.standard_normal(outputs).astype(np.float32)
    x = rng.standard_normal((tokens, inputs)).astype(np.float32)
    return [x, weight, scale, zero, bias], {"layout": layout, "block_size": block, "packed": packed}


def gates(inputs: int) -> list[dict[str, Any]]:
    return [{}, {"keep": "abs>", "threshold": 0.6}, {"keep": "top_k", "k": inputs // 3 + 1}]


@pytest.mark.parametrize("layout", ["out_in", "in_out"])
@pytest.mark.parametrize("kind", [*FLOATS, *CODES])
def test_formats(kind: str, layout: str) -> None:
    """Every format by channel and by groups of 32, 64 and 128, dense and gated, at odd sizes."""
    ran = 0
    for sizes in SIZES:
        for block in (0, 32, 64, 128):
            if kind in ("i4", "u4") and (sizes[1] % 2 or sizes[2] % 2):
                continue
            if block and kind in ("f32", "bf16", "f16"):
                continue
            operands, form = drawn(kind, layout, sizes, block)
            for keep in gates(sizes[1]):
                want = reference(OP, operands, OP.complete(form | keep))
                for threads in THREADS if block in (0, 32) else (2,):
                    check(call(LINEAR, operands, form | keep, threads), want, operands, form)
                ran += 1
    assert ran >= 12


@pytest.mark.parametrize("kind", ["i8", "u4"])
@pytest.mark.parametrize("layout", ["out_in", "in_out"])
@pytest.mark.parametrize("size", [1e-30, 1e-36, 5e-38])
def test_tiny_activations(kind: str, layout: str, size: float) -> None:
    """A step has an inverse however small the activations are; scales of 1e30 bring them back to sizes that can be compared."""
    operands, form = drawn(kind, layout, (2, 128, 64), 32 if kind == "u4" else 0)
    x, scale = operands[0], operands[2]
    assert x is not None and scale is not None
    x *= np.float32(size)
    scale *= np.float32(1e30)
    got = call(LINEAR, operands, form, 2)
    want = reference(OP, operands, OP.complete(form))
    largest = np.abs(want).max()
    assert np.abs(got - want).max() < largest * max(1e-3, 1.2e-38 / size)  # a step is no smaller than the least normal number


@pytest.mark.parametrize("kind", ["f32", "i8", "u4", "f8e4m3"])
@pytest.mark.parametrize("layout", ["out_in", "in_out"])
def test_special_values(kind: str, layout: str) -> None:
    """NaN and infinity among the inputs reach every output of their token, as IEEE arithmetic has it; others do not feel it."""
    operands, form = drawn(kind, layout, (4, 128, 64), 32 if kind == "u4" else 0)
    x = operands[0]
    assert x is not None
    x[0, 3], x[2, 100], x[3] = np.nan, -np.inf, 0.0
    x[3, 5] = -0.0
    for keep in ({}, {"keep": "abs>", "threshold": 0.6}, {"keep": "x>=", "threshold": 0.1}, {"keep": "top_k", "k": 9}):
        want = reference(OP, operands, OP.complete(form | keep))
        for threads in THREADS:
            check(call(LINEAR, operands, form | keep, threads), want, operands, form)


@pytest.mark.parametrize("kind", ["f32", "bf16", "f16", "f8e4m3", "f8e5m2", "i8", "u4"])
def test_dropped_rows_are_not_read(kind: str) -> None:
    """Weights of dropped inputs may be NaN where they are rows: a kernel that read them would spread it."""
    operands, form = drawn(kind, "in_out", (1, 256, 200), 32 if kind in ("i8", "u4") else 0)
    x, weight, scale = operands[:3]
    assert x is not None and weight is not None
    x[0, ::2] = 0.01 * x[0, ::2] / np.abs(x[0, ::2]).max()
    x[0, 96:160] = 0.0  # whole groups, whose scales are not used either
    keep = {"keep": "abs>", "threshold": 0.02}
    want = reference(OP, operands, OP.complete(form | keep))
    dropped, sound = np.abs(x[0]) <= 0.02, [None if a is None else a.copy() for a in operands]
    if kind in CODES:
        assert scale is not None
        scale[3:5] = np.nan
        weight[dropped] ^= 0x55
    else:
        weight[dropped] = np.nan
    for threads in THREADS:
        check(call(LINEAR, operands, form | keep, threads), want, sound, form)


@pytest.mark.parametrize("zero", ["uint8", "int8", "int32"])
@pytest.mark.parametrize("kind", ["i8", "u8", "i4", "u4"])
def test_zero_points_of_their_own_in_weights_stored_by_inputs(kind: str, zero: str) -> None:
    """For each output, and for each output of a group: few rows of a group go another way than many, and x may lie off 0."""
    for block in (0, 32, 128, 256):
        operands, form = drawn(kind, "in_out", (2, 512, 300), block)
        x, _, scale = operands[:3]
        assert x is not None and scale is not None
        x += 0.5
        operands[3] = np.random.default_rng(2).integers(0, 16, scale.shape).astype(zero)
        for keep in ({}, {"keep": "abs>", "threshold": 0.9}):
            want = reference(OP, operands, OP.complete(form | keep))
            for threads in THREADS:
                check(call(LINEAR, operands, form | keep, threads), want, operands, form)


@pytest.mark.parametrize("layout", ["out_in", "in_out"])
@pytest.mark.parametrize("kind", ["i8", "u8"])
def test_sums_of_many_inputs(kind: str, layout: str) -> None:
    """As large as they become: every product at its limit, with one scale for all."""
    shape = (4, 100_000) if layout == "out_in" else (100_000, 64)
    weight = np.full(shape, 127 if kind == "i8" else 255, np.int8 if kind == "i8" else np.uint8)
    operands = [np.full((1, 100_000), 3.0, np.float32), weight, np.array(0.5, np.float32)]
    for form in ({}, {"block_size": 100_000}):
        if form:
            operands[2] = np.full((4, 1) if layout == "out_in" else (1, 64), 0.5, np.float32)
        for threads in THREADS:
            got = call(LINEAR, operands, {"layout": layout} | form, threads)
            np.testing.assert_allclose(got, 100_000 * 1.5 * float(weight.flat[0]), rtol=1e-4)


@pytest.mark.parametrize("layout", ["out_in", "in_out"])
def test_no_outputs_at_all(layout: str) -> None:
    """Empty tensors of torch have no memory: nothing of them is read."""
    import torch

    from actgraph.runtime.torch_kernels import kernel_call

    for zero in (None, torch.empty(0, dtype=torch.uint8)):
        run = kernel_call(OP, {"layout": layout})
        assert run is not None
        weight = torch.empty((0, 64) if layout == "out_in" else (64, 0), dtype=torch.uint8)
        got = run(torch.randn(1, 64), weight, torch.empty(0), zero, *[None] * (len(OP.inputs) - 4))
        assert tuple(got.shape) == (1, 0)


@pytest.mark.parametrize("kind", ["f32", "bf16", "f8e5m2"])
def test_infinite_weights(kind: str) -> None:
    """A kept input brings infinity to its outputs, whatever the number of inputs that are kept, and NaN to none of them."""
    for count in range(1, 10):
        operands, form = drawn(kind, "in_out", (1, 64, 100))
        x, weight = operands[:2]
        assert x is not None and weight is not None
        x[0, count:] = 0.0
        x[0, :count] = 1.0
        weight[:count, 7] = np.inf
        want = reference(OP, operands, OP.complete(form | {"keep": "abs>", "threshold": 0.1}))
        assert want[0, 7] == np.inf and np.isfinite(np.delete(want[0], 7)).all()
        for threads in THREADS:
            check(call(LINEAR, operands, form | {"keep": "abs>", "threshold": 0.1}, threads), want, operands, form)


@pytest.mark.parametrize("kind", ["f32", "f8e4m3", "i8", "i4"])
@pytest.mark.parametrize("layout", ["out_in", "in_out"])
def test_kept_outputs(kind: str, layout: str) -> None:
    """Outputs outside of the mask are 0 without bias, whatever their weights are; NaN in a mask keeps."""
    operands, form = drawn(kind, layout, (3, 192, 70))
    rng = np.random.default_rng(5)
    for kept in (rng.random((3, 70)) < 0.3, np.zeros((3, 70), bool), rng.choice(np.float32([0, 0.5, np.nan]), (3, 70))):
        given = [*operands, None, None, kept]
        want = reference(OP, given, OP.complete(form))
        assert (want[kept == 0] == 0).all()
        if kind == "f32" and layout == "out_in":
            weight = operands[1].copy()
            weight[(kept == 0).all(0)] = np.nan
            given[1] = weight
        for threads in THREADS:
            got = call(LINEAR, given, form, threads)
            check(got, want, operands, form)
            assert (got[kept == 0] == 0).all() and not np.signbit(got[kept == 0]).any()


def test_results_depend_on_nothing_else() -> None:
    """The same numbers twice give the same bits, and rows of a batch are what they are alone."""
    for layout in ("out_in", "in_out"):
        for kind in ("f32", "i8"):
            operands, form = drawn(kind, layout, (3, 200, 300))
            first = call(LINEAR, operands, form, 2)
            np.testing.assert_array_equal(first, call(LINEAR, operands, form, 2))
            alone = [operands[0][1:2], *operands[1:]]
            np.testing.assert_array_equal(first[1:2], call(LINEAR, alone, form, 2))


def test_refusals() -> None:
    operands, form = drawn("f32", "out_in", (1, 8, 4))
    with pytest.raises(InputError, match="input axis"):
        call(LINEAR, [np.zeros((1, 9), np.float32), *operands[1:]], form)
    listed = [*operands, None, np.array([1, 8])]
    with pytest.raises(InputError, match="beyond the channels"):
        call(LINEAR, listed, form | {"keep": "listed"})
    three = [np.zeros((3, 8), np.float32), *listed[1:6]]
    for indices in (np.zeros((2, 4), np.int64), np.zeros((1, 3, 4), np.int64), np.array(1), None, np.zeros(4, np.float32)):
        with pytest.raises(InputError, match="no indices that fit the tokens of x"):
            call(LINEAR, [*three, indices], form | {"keep": "listed"})
    with pytest.raises(InputError, match="the gate has no k"):
        call(LINEAR, operands, form | {"keep": "top_k", "k": 0})
    with pytest.raises(InputError, match="a scale"):
        call(LINEAR, operands, form | {"block_size": -8})
    with pytest.raises(InputError, match="bias"):
        call(LINEAR, [*operands[:4], np.zeros(5, np.float32)], form)
    with pytest.raises(InputError, match="no kernel"):
        call(LINEAR, [operands[0].astype(np.float16), *operands[1:]], form)


# --- groups in rows that fill no chunk, and zero points for each group ------------------------------------------------------

#: inputs, outputs: rows shorter than a chunk, of one and a part, of many, and of so few bytes that most would be read beyond.
LOOSE = ((64, 172), (172, 64), (1000, 33), (96, 17), (128, 40), (30, 9), (2, 3))


def loose(
    kind: str, inputs: int, outputs: int, block: int, zero: str, tokens: int = 2
) -> tuple[list[Array | None], dict[str, Any]]:
    """A linear stored by outputs whose groups have scales, and zero points of type ``zero`` (empty: none) of their own."""
    operands, form = drawn(kind, "out_in", (tokens, inputs, outputs), block)
    assert operands[2] is not None
    if zero:
        operands[3] = np.random.default_rng(2).integers(0, 16, operands[2].shape).astype(zero)
    elif kind == "u4":
        operands[3] = np.array(8, np.uint8)
    return operands, form


@pytest.mark.parametrize("zero", ["", "uint8", "int8", "int32"])
@pytest.mark.parametrize("kind", ["i4", "u4", "i8", "u8"])
def test_loose_groups(kind: str, zero: str) -> None:
    for inputs, outputs in LOOSE:
        for block in (0, 16, 32, 64, 128, 256):
            operands, form = loose(kind, inputs, outputs, block, zero)
            want = reference(OP, operands, OP.complete(form))
            for threads in THREADS if block == 32 else (2,):
                check(call(LINEAR, operands, form, threads), want, operands, form)
        operands, form = loose(kind, inputs, outputs, 32, zero)
        kept = (np.random.default_rng(3).random((2, outputs)) > 0.5).astype(np.float32)
        operands = [*operands, None, None, kept]
        check(call(LINEAR, operands, form, 2), reference(OP, operands, OP.complete(form)), operands, form)


def test_loose_groups_go_by_vectors() -> None:
    """All but groups that lanes do not follow."""
    for kind, inputs, block, zero, form in (
        ("u4", 64, 32, "", linear.LOOSE), ("u4", 172, 32, "", linear.LOOSE), ("u4", 256, 32, "uint8", linear.LOOSE),
        ("i8", 172, 32, "int8", linear.LOOSE), ("u4", 172, 0, "", linear.LOOSE), ("u4", 256, 32, "", linear.GROUPS),
        ("i8", 172, 0, "", linear.CHANNEL), ("u4", 256, 24, "", linear.OTHER),
    ):  # fmt: skip
        operands, attributes = loose(kind, inputs, 6, block, zero)
        frame = frame_of(LINEAR, [*operands, None, None, None], OP.complete(attributes))
        describe(frame, linear.Y, 0, 1, (2, 6))
        assert linear.form_of(frame.ctypes.data, 2 if kind == "u4" else 1) == form, (kind, inputs, block, zero)


def test_special_values_in_loose_groups() -> None:
    """A scale that is not a number stays in its own output, and NaN among the inputs in its own token."""
    operands, form = loose("u4", 172, 64, 32, "uint8", 3)
    assert operands[0] is not None and operands[2] is not None
    operands[0][1, 7], operands[2][5, 0] = np.nan, np.nan
    got, want = call(LINEAR, operands, form, 2), reference(OP, operands, OP.complete(form))
    assert np.array_equal(np.isnan(got), np.isnan(want)) and np.isnan(got[1]).all() and np.isnan(got[:, 5]).all()
    assert not np.isnan(got[0, 4]) and not np.isnan(got[2, 63])


_AT_THE_END = """
import ctypes, mmap
import numpy as np
from tests.runtime.test_numba_linear import LINEAR, LOOSE, call, loose
libc, page = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE
kept = []
def at_the_end(array):  # of memory that may be read
    if array is None:
        return None
    size = -(-array.nbytes // page) * page
    memory = mmap.mmap(-1, size + page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(ctypes.c_void_p(start + size), ctypes.c_size_t(page), 0) == 0
    kept.append(memory)
    moved = np.ndarray(array.shape, array.dtype, memory, size - array.nbytes)
    moved[...] = array
    return moved
for kind in ("u4", "i8"):
    for inputs, outputs in LOOSE:
        for block in (0, 16, 32, 128):
            for zero in ("", "uint8", "int32"):
                operands, form = loose(kind, inputs, outputs, block, zero)
                got = call(LINEAR, [operands[0], *map(at_the_end, operands[1:4]), operands[4]], form, 1)
                assert np.array_equal(got, call(LINEAR, operands, form, 1))
print("read")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="protects memory as Linux does")
def test_nothing_beyond_a_weight_is_read() -> None:
    done = subprocess.run([sys.executable, "-c", _AT_THE_END], capture_output=True, text=True)
    assert done.stdout == "read\n", (done.returncode, done.stderr[-2000:])


@pytest.mark.slow
@pytest.mark.parametrize("processor", ["x86-64-v3", "x86-64"])
def test_lesser_processors(processor: str, tmp_path: Path) -> None:
    """All of this file with code for processors without AVX-512 and VNNI, and without AVX and FMA."""
    features = "+avx,+avx2,+fma,+f16c,+bmi,+bmi2" if processor == "x86-64-v3" else "+sse2"
    environment = os.environ | {"NUMBA_CPU_NAME": processor, "NUMBA_CPU_FEATURES": features, "ACTGRAPH_CACHE": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def test_sums_of_many_inputs_do_not_overflow() -> None:
    """70,000 products of the largest codes are more than 32 bits hold."""
    count = 70_000
    x, weight = np.ones((1, count), np.float32), np.full((count, 64), 127, np.int8)
    attributes = {"layout": "in_out", "keep": "abs>", "threshold": 0.5}
    got = call(LINEAR, [x, weight, np.ones(64, np.float32)], attributes, 1)
    np.testing.assert_allclose(got, np.full((1, 64), 127.0 * count), rtol=1e-4)


@pytest.mark.parametrize("outputs", [2560, 2561, 2624, 5121, 5200])
@pytest.mark.parametrize("kind", ["f32", "i8", "u4"])
def test_rows_in_several_pieces(kind: str, outputs: int) -> None:
    """Rows longer than what is summed at once."""
    operands, form = drawn(kind, "in_out", (1, 64, outputs + outputs % 2), 32 if kind == "u4" else 0)
    attributes = {**form, "keep": "abs>", "threshold": 0.3}
    check(call(LINEAR, operands, attributes, 2), reference(OP, operands, OP.complete(attributes)), operands, attributes)
