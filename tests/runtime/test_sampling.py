"""Drawing tokens without sorting the vocabulary: the same draws as with it."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actgraph.errors import InputError
from actgraph.runtime.sampling import Sampling


def by_sorting(sampling: Sampling, logits: np.ndarray, number: int, row: int) -> int:
    """The definition: sort, cut after top_k, cut after top_p, draw."""
    order = np.argsort(-logits, kind="stable")[: sampling.top_k or None]
    weights = np.exp((logits[order] - logits.max()) / sampling.temperature)
    if sampling.top_p < 1:
        before = np.cumsum(weights) - weights
        kept = int((before < sampling.top_p * weights.sum()).sum())
        order, weights = order[:kept], weights[:kept]
    key = np.asarray([sampling.seed, (row << 32) + number], np.uint64)
    draw = np.random.Generator(np.random.Philox(key=key)).random()
    place = int(np.searchsorted(np.cumsum(weights), draw * weights.sum(), side="right"))
    return int(order[min(place, len(order) - 1)])


@given(
    kind=st.sampled_from(["flat", "peaked", "tied", "masked"]),
    size=st.integers(1, 300),
    temperature=st.sampled_from([1e-300, 1e-3, 0.3, 1.0, 5.0, 100.0]),
    top_k=st.sampled_from([0, 1, 2, 7, 299, 1000]),
    top_p=st.sampled_from([1e-9, 0.3, 0.9, 0.999, 1.0]),
    seed=st.integers(0, 2**64 - 1),
    row=st.integers(0, 5),
)
@settings(max_examples=400, deadline=None)
def test_draws_are_those_of_the_definition(
    kind: str, size: int, temperature: float, top_k: int, top_p: float, seed: int, row: int
) -> None:
    random = np.random.default_rng(seed % 1000)
    logits = random.normal(size=size) * {"flat": 0.01, "peaked": 20.0, "tied": 1.0, "masked": 1.0}[kind]
    if kind == "tied":
        logits = np.round(logits)
    if kind == "masked":
        logits[1:][random.random(size - 1) < 0.5] = -np.inf
    sampling = Sampling(temperature, top_k, top_p, seed)
    with np.errstate(over="ignore"):
        assert sampling.pick(logits, 3, row) == by_sorting(sampling, logits, 3, row)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_of_any_type(dtype: np.dtype, temperature: float) -> None:
    logits = np.asarray([1.0, -np.inf, 9.0, 8.0], dtype)
    assert Sampling(temperature, top_k=1).pick(logits, 0) == 2
    for broken in (np.nan, np.inf):
        logits[1] = broken
        with pytest.raises(InputError, match="are not numbers"):
            Sampling(temperature).pick(logits, 0)
    with pytest.raises(InputError, match="are not numbers"):
        Sampling(temperature).pick(np.full(4, -np.inf, dtype), 0)


def test_greedy_takes_the_first_of_equals() -> None:
    assert Sampling().pick(np.asarray([0.0, 2.0, 2.0]), 0) == 1


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seeds_have_64_bits(seed: int) -> None:
    with pytest.raises(InputError, match="seed must be"):
        Sampling(1.0, seed=seed)
