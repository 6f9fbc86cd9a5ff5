"""The C library's own threads: several callers at once, more parts than work or threads, errors of single parts."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from actgraph.errors import InputError
from actgraph.runtime.kernels.calls import call
from actgraph.runtime.kernels.registry import all_kernels
from actgraph.runtime.native.library import available

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
