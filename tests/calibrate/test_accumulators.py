"""Statistics agree with numpy on the whole data, for any split into batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from actgraph.calibrate import Request, Statistics
from actgraph.errors import InputError, OptionError

Array = np.ndarray[Any, Any]

EXACT = ("min", "max", "absmax", "zeros", "count", "histogram", "quantile", "abs_quantile")
MOMENTS = ("mean", "absmean", "second_moment", "l2", "norm", "gram")

_floats = st.floats(-1e4, 1e4, width=32) | st.sampled_from([0.0, -0.0, 1e-30, 1e30, -3e-13])
_data = hnp.arrays(np.float32, st.tuples(st.integers(1, 40), st.integers(1, 5)), elements=_floats)
_cuts = st.lists(st.integers(0, 40), max_size=4)
_layouts = st.sampled_from([(None, False), (-1, False), (None, True), (-1, True)])


def request_of(kind: str, axis: int | None = None, positions: bool = False) -> Request:
    histogram = {"low": -5.0, "high": 5.0, "bins": 7} if kind == "histogram" else {}
    if kind in ("gram", "norm"):
        axis, positions = None, False
    return Request("x", kind, axis=axis, positions=positions, **histogram)


def collected(request: Request, parts: Sequence[tuple[Array, Array]]) -> Statistics:
    statistics = Statistics({request: request.accumulator()})
    for x, positions in parts:
        statistics.accumulators[request].update(x, positions if request.positions else None)
    return statistics


def split(data: Array, positions: Array, cuts: Sequence[int]) -> list[tuple[Array, Array]]:
    where = sorted(min(cut, len(data)) for cut in cuts)
    return list(zip(np.split(data, where), np.split(positions, where), strict=True))


def states(statistics: Statistics, request: Request) -> dict[str, Array]:
    return statistics.accumulator(request).state()


@settings(max_examples=150, deadline=None)
@given(data=_data, cuts=_cuts, kind=st.sampled_from(EXACT), layout=_layouts, rows=st.integers(1, 9))
def test_counts_bins_and_extremes_are_equal_for_any_split(
    data: Array, cuts: list[int], kind: str, layout: tuple[int | None, bool], rows: int
) -> None:
    request = request_of(kind, *layout)
    positions = np.arange(len(data)) % rows
    whole = states(collected(request, [(data, positions)]), request)
    parts = states(collected(request, split(data, positions, cuts)), request)
    assert whole.keys() == parts.keys()
    for key in whole:
        np.testing.assert_array_equal(whole[key], parts[key])


@settings(max_examples=150, deadline=None)
@given(data=_data, cuts=_cuts, kind=st.sampled_from(MOMENTS), layout=_layouts)
def test_moments_are_within_1e_9_for_any_split(
    data: Array, cuts: list[int], kind: str, layout: tuple[int | None, bool]
) -> None:
    request = request_of(kind, *layout)
    positions = np.arange(len(data)) % 3
    whole = collected(request, [(data, positions)]).array(request)
    parts = collected(request, split(data, positions, cuts)).array(request)
    scale = np.abs(data.astype(np.float64)).max() ** (2 if kind in ("second_moment", "gram") else 1)
    np.testing.assert_allclose(parts, whole, rtol=1e-9, atol=1e-9 * scale * 1e-3)


@settings(max_examples=100, deadline=None)
@given(
    data=_data, cuts=st.tuples(st.integers(0, 40), st.integers(0, 40)), kind=st.sampled_from(EXACT + MOMENTS), layout=_layouts
)
def test_merging_is_associative_and_commutative(
    data: Array, cuts: tuple[int, int], kind: str, layout: tuple[int | None, bool]
) -> None:
    request = request_of(kind, *layout)
    a, b, c = (collected(request, [part]) for part in split(data, np.arange(len(data)) % 4, cuts))
    left, right, swapped = a.merge(b).merge(c), a.merge(b.merge(c)), c.merge(a).merge(b)
    for other in (right, swapped):
        for key, array in states(left, request).items():
            if kind in EXACT:
                np.testing.assert_array_equal(array, states(other, request)[key])
        if kind in MOMENTS:
            np.testing.assert_allclose(left.array(request), other.array(request), rtol=1e-12, atol=1e-300)


def test_moments_of_a_cancelling_sum_do_not_depend_on_the_split() -> None:
    data = np.array([[1e16], [1.0], [-1e16], [1.0]] * 50, np.float64)
    request = request_of("mean")
    parts = [(data[i : i + 1], np.zeros(1, int)) for i in range(len(data))]
    assert collected(request, parts).array(request) == pytest.approx(0.5, rel=1e-12)


DATA = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
DATA[3, 1] = 0.0
POSITIONS = np.arange(60) % 6
WIDE = DATA.astype(np.float64)


@pytest.mark.parametrize(
    ("kind", "direct"),
    [
        ("min", lambda x, axis: x.min(axis)),
        ("max", lambda x, axis: x.max(axis)),
        ("absmax", lambda x, axis: np.abs(x).max(axis)),
        ("zeros", lambda x, axis: (x == 0).sum(axis)),
        ("count", lambda x, axis: np.ones_like(x).sum(axis)),
        ("mean", lambda x, axis: x.mean(axis)),
        ("absmean", lambda x, axis: np.abs(x).mean(axis)),
        ("second_moment", lambda x, axis: (x * x).mean(axis)),
        ("l2", lambda x, axis: np.sqrt((x * x).sum(axis))),
    ],
)
def test_each_layout_is_numpys_answer(kind: str, direct: Any) -> None:
    parts = split(DATA, POSITIONS, [7, 20, 41])
    for axis, positions in ((None, False), (-1, False), (None, True), (-1, True)):
        request = request_of(kind, axis, positions)
        found = collected(request, parts).array(request)
        if positions:
            groups = [WIDE[p == POSITIONS] for p in range(6)]
            wanted = np.stack([direct(group, 0 if axis is not None else None) for group in groups])
        else:
            wanted = np.asarray(direct(WIDE, 0 if axis is not None else None))
        assert found.shape == wanted.shape
        np.testing.assert_allclose(found, wanted, rtol=1e-12)


def test_gram_norm_and_histogram_are_numpys() -> None:
    parts = split(DATA, POSITIONS, [9, 33])
    gram = request_of("gram")
    found = collected(gram, parts).array(gram)
    np.testing.assert_allclose(found, WIDE.T @ WIDE, rtol=1e-12, atol=1e-12)
    assert np.array_equal(found, found.T)
    norm = request_of("norm")
    np.testing.assert_allclose(collected(norm, parts).array(norm), np.linalg.norm(WIDE, axis=1).mean(), rtol=1e-12)
    histogram = Request("x", "histogram", low=-1, high=1, bins=4)
    counts = collected(histogram, parts).accumulator(histogram).read()
    wanted = [np.sum(DATA < -1), *np.histogram(DATA, np.linspace(-1, 1, 5))[0], np.sum(DATA >= 1)]
    assert counts.tolist() == [int(count) for count in wanted]


def test_positions_that_no_row_reached_are_nan_and_widen_later() -> None:
    request = request_of("mean", None, True)
    statistics = collected(request, [(np.ones((1, 2)), np.array([0])), (np.full((1, 2), 3.0), np.array([2]))])
    np.testing.assert_array_equal(statistics.array(request), [1.0, np.nan, 3.0])


def test_infinite_activations_have_extremes_but_no_moments() -> None:
    data = np.array([[1.0, -np.inf]], np.float32)
    low = request_of("min")
    assert collected(low, [(data, np.zeros(1, int))]).array(low) == -np.inf
    mean = request_of("mean")
    with pytest.raises(InputError, match="infinite activations"):
        collected(mean, [(data, np.zeros(1, int))])


def test_integers_and_booleans_have_statistics() -> None:
    for data in (np.array([[3], [-2]], np.int64), np.array([[True], [False]])):
        for kind in ("min", "max", "mean", "absmax"):
            request = request_of(kind)
            found = collected(request, [(data, np.zeros(2, int))]).array(request)
            wide = data.astype(np.float64)
            wanted = {"min": wide.min(), "max": wide.max(), "mean": wide.mean(), "absmax": np.abs(wide).max()}[kind]
            assert found == wanted


def test_what_was_not_collected_or_not_seen_is_an_error() -> None:
    request = request_of("mean")
    with pytest.raises(InputError, match="mean of x was not collected"):
        Statistics()[request]
    with pytest.raises(InputError, match="saw nothing at x"):
        Statistics({request: request.accumulator()})[request]
    with pytest.raises(InputError, match="cannot merge"):
        Statistics({request: request.accumulator()}).merge(Statistics())


@pytest.mark.parametrize(
    "bad", [{"kind": "median"}, {"kind": "mean", "tokens": "some"}, {"kind": "histogram"}, {"kind": "gram", "positions": True}]
)
def test_impossible_requests_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        Request("x", **bad)


def test_a_request_reads_back_from_plain_values() -> None:
    request = Request("x", "histogram", axis=1, positions=True, tokens="not_first", low=-1.0, high=2.0, bins=3)
    assert Request.from_dict(request.to_dict()) == request
