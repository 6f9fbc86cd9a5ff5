"""The C library's own threads: several callers at once, more parts than work or threads, errors of single parts."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from actgraph.errors import InputError
from actgraph.graph.graph import Array
from actgraph.ops.dtypes import DType
from actgraph.ops.shapes import TensorType
from actgraph.runtime.kernels.calls import call, describe, frame_of, variant_of
from actgraph.runtime.kernels.registry import all_kernels
from actgraph.runtime.native.library import available, library

pytestmark = pytest.mark.skipif(not available(), reason="the kernels' library was not built")


def test_several_callers_at_once() -> None:
    """Who finds the threads busy does all parts itself: nobody waits, and nobody gets another's numbers."""
    rng, kernels = np.random.default_rng(0), all_kernels()["linear"]
    weight = rng.standard_normal((64, 48)).astype(np.float32)
    inputs = [rng.standard_normal((1 + i, 48)).astype(np.float32) for i in range(6)]
    alone = [call(kernels, [x, weight], {}, 3) for x in inputs]

    def work(number: int) -> bool:
        place = number % len(inputs)
        return np.array_equal(call(kernels, [inputs[place], weight], {}, 2 + number % 3), alone[place])

    with ThreadPoolExecutor(5) as pool:
        assert all(pool.map(work, range(400)))


@pytest.mark.parametrize("threads", [1, 7, 64, 300])
def test_more_parts_than_work_and_an_error_of_one_of_them(threads: int) -> None:
    x = np.arange(48, dtype=np.float32).reshape(6, 8)
    indices = np.zeros((6, 1), np.int64)
    kernels = all_kernels()["index_gate"]
    assert np.array_equal(call(kernels, [x, indices], {}, threads), np.where(np.arange(8) == 0, x, 0))
    indices[4] = 8
    with pytest.raises(InputError, match="an index is beyond the channels of x"):
        call(kernels, [x, indices], {}, threads)
    indices[4] = -1
    kept = np.arange(6) != 4
    assert np.array_equal(call(kernels, [x, indices], {}, threads)[:, 0], np.where(kept, x[:, 0], 0))


def test_products_that_share_what_was_prepared_for_one_of_them() -> None:
    """Steps of one group, of weights with a scale for each output and with one for all: the numbers of each alone."""
    kernels, rng = all_kernels()["linear"], np.random.default_rng(0)
    x = rng.standard_normal((1, 128)).astype(np.float32)
    attributes = kernels.definition.complete({"packed": "u4"})
    kept: list[Any] = []

    def step(scale: Array, shares: int) -> tuple[list[int], Array, Array]:
        operands: list[Array | None] = [x, rng.integers(0, 256, (64, 64)).astype(np.uint8), scale, np.array(8, np.uint8)]
        types = [None if a is None else TensorType(DType.of(a.dtype), a.shape) for a in operands]
        kernel = kernels.find(types, attributes)
        assert kernel is not None
        variant, frame, y = variant_of(kernels, kernel), frame_of(kernels, operands, attributes), np.zeros((1, 64), np.float32)
        describe(frame, len(kernels.definition.inputs), y.ctypes.data, DType.F32.onnx, y.shape)
        kept.append((operands, variant, frame))
        return [ctypes.addressof(variant), frame.ctypes.data, 7, shares], y, call(kernels, operands, attributes, 2)

    many, one = np.full(64, 0.5, np.float32), np.array(0.5, np.float32)
    for scales in ((many, one, many), (one, many, one), (many, many, many)):
        made = [step(scale, int(place > 0)) for place, scale in enumerate(scales)]
        steps, place = np.array([words for words, _, _ in made], np.int64), np.zeros(1, np.int64)
        assert library().ag_replay(steps.ctypes.data, len(steps), 2, place.ctypes.data) == 0
        for _, got, alone in made:
            np.testing.assert_allclose(got, alone, rtol=0, atol=2e-4 * np.abs(alone).max())
