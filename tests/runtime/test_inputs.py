"""One rule for the inputs of both engines: names, dtypes, ranks, sizes, named dimensions and their limits."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

import actgraph as ag
from actgraph.errors import InputError
from actgraph.formats.onnx_export import to_onnx
from actgraph.graph import Graph
from actgraph.graph.executor import Runner, executor_for


class Scores(torch.nn.Module):
    """Two inputs that share their dimensions."""

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return x.sum(-1) * ids


@functools.cache
def _graph(dialect: str) -> Graph:
    given = (torch.ones(2, 3, 4), torch.ones(2, 3, dtype=torch.int64))
    dynamic = {"x": ("batch", "seq", None), "ids": ("batch", "seq")}
    graph = ag.trace(Scores().eval(), given, dynamic=dynamic, limits={"seq": (2, 6)}, name="scores")
    return graph if dialect == "fx" else to_onnx(graph)


@pytest.fixture(params=["fx", "onnx"])
def runner(request: pytest.FixtureRequest) -> Runner:
    graph = _graph(request.param)
    return executor_for(graph).open(graph)


X, IDS = np.ones((2, 3, 4), np.float32), np.full((2, 3), 2, np.int64)

BAD = {
    "unknown name": ({"x": X, "ids": IDS, "mask": IDS}, "scores has no input 'mask' (its inputs are x, ids)"),
    "missing": ({"x": X}, "input 'ids' of scores is missing (its inputs are x, ids)"),
    "wider dtype": (
        {"x": X.astype(np.float64), "ids": IDS},
        "input 'x' of scores is float64, the graph takes f32[batch, seq, 4] (convert it)"
    ),
    "narrower dtype": (
        {"x": X, "ids": IDS.astype(np.int32)},
        "input 'ids' of scores is int32, the graph takes i64[batch, seq] (convert it)"
    ),
    "floats for integers": (
        {"x": X, "ids": IDS.astype(np.float32)},
        "input 'ids' of scores is float32, the graph takes i64[batch, seq] (convert it)"
    ),
    "rank": ({"x": X[0], "ids": IDS}, "input 'x' of scores has shape [3, 4], the graph takes f32[batch, seq, 4]"),
    "static size": (
        {"x": X[..., :3], "ids": IDS},
        "input 'x' of scores has shape [2, 3, 3], the graph takes f32[batch, seq, 4] (batch = 2, seq = 3)",
    ),
    "two sizes of one name": (
        {"x": X, "ids": IDS[:, :2]},
        "input 'ids' of scores has shape [2, 2], the graph takes i64[batch, seq] (batch = 2, seq = 3)"
    ),
    "above the limit": (
        {"x": np.ones((2, 7, 4), np.float32), "ids": np.ones((2, 7), np.int64)},
        "input 'x' of scores has seq = 7, the limit is 6",
    ),
    "below the limit": ({"x": X[:, :1], "ids": IDS[:, :1]}, "input 'x' of scores has seq = 1, the least is 2"),
}  # fmt: skip


def test_arrays_without_names_are_an_error(runner: Runner) -> None:
    with pytest.raises(InputError, match=r"mapping of names to arrays, not a ndarray .its inputs are x, ids"):
        runner(X)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", BAD)
def test_both_engines_say_the_same(runner: Runner, case: str) -> None:
    inputs, message = BAD[case]
    with pytest.raises(InputError) as caught:
        runner(inputs)
    assert " ".join(str(caught.value).split()) == message


def test_what_fits_runs_in_any_order(runner: Runner) -> None:
    expected = X.sum(-1) * IDS
    for inputs in ({"x": X, "ids": IDS}, {"ids": IDS, "x": X}):
        (result,) = runner(inputs).values()
        np.testing.assert_array_equal(result, expected)


def test_limits_survive_a_file(tmp_path) -> None:
    loaded = ag.load(_graph("onnx").save(tmp_path / "m.onnx"))
    assert loaded.dim_ranges["seq"] == _graph("fx").dim_ranges["seq"] == (2, 6)
    inputs, _ = BAD["above the limit"]
    with pytest.raises(InputError, match="the limit is 6"):
        loaded.run(inputs)
