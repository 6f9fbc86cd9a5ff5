"""Quantile sketches: the promised accuracy, exact ends, and the distribution function as inverse."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from actgraph.calibrate.accumulators import Layout
from actgraph.calibrate.sketch import QuantileSketch
from actgraph.errors import InputError

Array = np.ndarray[Any, Any]
WHOLE = Layout(False, False)


def sketch(data: Array, *, absolute: bool = False, resolution: int = 8, layout: Layout = WHOLE) -> QuantileSketch:
    result = QuantileSketch(layout, resolution, absolute=absolute)
    result.update(data if data.ndim == 2 else data[:, None], None)
    return result


@settings(max_examples=200, deadline=None)
@given(
    data=hnp.arrays(np.float32, st.integers(1, 60), elements=st.floats(-1e6, 1e6, width=32)),
    q=st.floats(0, 1),
    absolute=st.booleans(),
    resolution=st.integers(3, 10),
)
def test_quantiles_are_within_the_stated_relative_accuracy(data: Array, q: float, absolute: bool, resolution: int) -> None:
    found = float(sketch(data, absolute=absolute, resolution=resolution).quantile(q))
    ordered = np.sort(np.abs(data) if absolute else data).astype(np.float64)
    n = len(ordered)
    # rank q*n lies in the bin of the order statistic ceil(q*n); rounding of q*n may take its neighbour
    near = ordered[[max(0, min(n - 1, int(np.ceil(q * n + delta)) - 1)) for delta in (-1e-9, 1e-9)]]
    slack = 2.0**-resolution * np.abs(near) + 2.0**-40
    assert ((found >= near - slack) & (found <= near + slack)).any()


def test_ends_are_the_exact_minimum_and_maximum() -> None:
    data = np.random.default_rng(1).normal(size=1000).astype(np.float32)
    found = sketch(data)
    assert found.quantile(0.0) == data.min()
    assert found.quantile(1.0) == data.max()
    np.testing.assert_array_equal(found.quantile(np.array([0.0, 1.0])), [data.min(), data.max()])


def test_the_share_at_or_below_a_quantile_is_the_quantile() -> None:
    data = np.random.default_rng(2).standard_t(3, size=200_000).astype(np.float32)
    found = sketch(data, absolute=True)
    for q in (0.1, 0.4, 0.5, 0.9, 0.999):
        threshold = float(found.quantile(q))
        assert np.mean(np.abs(data) <= threshold) == pytest.approx(q, abs=5e-4)
        assert float(found.cdf(threshold)) == pytest.approx(q, abs=1e-6)


def test_every_channel_has_its_own_quantile() -> None:
    data = np.random.default_rng(3).normal(size=(4000, 3)) * [1.0, 10.0, 0.01]
    found = sketch(data.astype(np.float32), layout=Layout(True, False))
    wanted = np.quantile(data, [0.25, 0.9], axis=0)
    assert found.quantile(np.array([0.25, 0.9])).shape == (2, 3)
    np.testing.assert_allclose(found.quantile(np.array([0.25, 0.9])), wanted, rtol=2e-2)
    np.testing.assert_array_equal(found.count, [4000, 4000, 4000])


@pytest.mark.parametrize("kind", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_the_bin_of_a_number_does_not_depend_on_its_type(kind: Any) -> None:
    data = np.random.default_rng(4).normal(size=500).astype(ml_dtypes.bfloat16).astype(np.float32)
    data = data.astype(np.float16).astype(np.float32) if kind is np.float16 else data
    given_type = data.astype(kind)
    given_type = given_type.astype(np.float32) if kind is ml_dtypes.bfloat16 else given_type
    wanted, found = sketch(data).state(), sketch(given_type).state()
    np.testing.assert_array_equal(wanted["keys"], found["keys"])
    np.testing.assert_array_equal(wanted["counts"], found["counts"])


def test_infinities_zeros_and_tiny_numbers_have_places() -> None:
    found = sketch(np.array([-np.inf, 0.0, -0.0, 1e-30, 5.0, np.inf]))
    assert found.quantile(0.0) == -np.inf
    assert found.quantile(1.0) == np.inf
    assert float(found.cdf(0.0)) == pytest.approx(4 / 6)
    assert abs(float(found.quantile(0.5))) <= 1e-12


def test_histogram_counts_between_edges() -> None:
    data = np.random.default_rng(5).uniform(-2, 2, 50_000)
    edges = np.linspace(-2, 2, 9)
    np.testing.assert_allclose(sketch(data).histogram(edges), np.histogram(data, edges)[0], rtol=0.02)


@pytest.mark.parametrize("q", [-0.1, 1.5, 99.9, float("nan")])
def test_a_quantile_outside_of_0_to_1_is_an_error(q: float) -> None:
    with pytest.raises(InputError, match="outside of 0 to 1"):
        sketch(np.ones(3)).quantile(q)
