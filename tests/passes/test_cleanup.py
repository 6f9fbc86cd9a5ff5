"""Cleanup: the numbers stay, sites stay, what is redundant goes."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

import actgraph as ag
from actgraph.graph import Graph
from actgraph.graph.sites import value_anchor
from actgraph.passes.cleanup.cse import _frozen
from tests.graph import onnx_models
from tests.passes.conftest import apply, as_dialect, relative, run


class Wasteful(torch.nn.Module):
    """Equal branches, a constant expression, no-ops and a dead branch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(4, 4)
        self.register_buffer("table", torch.arange(4.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        constant = torch.cos(self.table) * 2 + torch.sin(self.table)
        a = torch.exp(x) * constant
        b = torch.exp(x) * constant
        _ = torch.tanh(x)
        return self.linear((a + b).reshape(x.shape)) * 1


def wasteful(dialect: str) -> Graph:
    graph = ag.trace(Wasteful().eval(), (torch.randn(3, 4),), dynamic={"x": ("batch", None)})
    if dialect == "fx":
        return graph
    from actgraph.formats.onnx_export import to_onnx

    return to_onnx(graph)


X = {"x": np.random.default_rng(0).normal(0, 1, (5, 4)).astype(np.float32)}


def test_each_pass_keeps_the_numbers(dialect: str) -> None:
    graph = wasteful(dialect)
    for step in ("dce", "identity", "cse", "fold", "identity, cse, fold, dce"):
        assert relative(run(graph, X), run(apply(graph, step), X)) < 1e-6, step


def test_together_they_leave_what_is_needed() -> None:
    cleaned = apply(wasteful("fx"), "identity, cse, fold, dce")
    ops = sorted(node.op for node in cleaned.nodes())
    assert ops == ["aten.add", "aten.exp", "aten.linear", "aten.mul"]


@pytest.mark.parametrize("step", ["identity", "cse", "fold", "dce", "identity, cse, fold, dce"])
def test_real_model(stories: Graph, step: str) -> None:
    cleaned = apply(stories, step)
    cleaned.verify()
    assert relative(run(stories), run(cleaned)) < 1e-6
    names = {name for name in stories.site_table.all_names() if name.startswith("blocks.")}
    assert names <= set(cleaned.site_table.all_names()), "no role site is lost"
    assert len(cleaned.nodes()) <= len(stories.nodes())


def test_cleaned_twice_is_cleaned_once(stories: Graph) -> None:
    once = apply(stories, "identity, cse, fold, dce")
    twice = apply(once, "identity, cse, fold, dce")
    assert len(once.nodes()) == len(twice.nodes())


def test_sites_stay_apart() -> None:
    """Two equal activations with sites of their own are not merged: editing one must not edit the other."""

    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([torch.relu(self.linear(x)), torch.relu(self.linear(x)) * 2], -1)

    torch.manual_seed(0)
    graph = ag.trace(Twice().eval(), (torch.randn(2, 4),), dynamic={"x": ("batch", None)})
    cleaned = apply(graph, "cse, dce")
    edited = apply(cleaned, "clip{site=activation.0 min=0 max=0.01}")
    assert np.array_equal(run(graph, X)[:, 4:], run(edited, X)[:, 4:])
    assert not np.array_equal(run(graph, X)[:, :4], run(edited, X)[:, :4])


BESIDE = """<ir_version: 9, opset_import: ["": 18]>
    g (float[batch, 4] x) => (float[batch, 4] y, float[batch, 4] z)
    { a = Abs(x)  b = %s  y = Neg(a)  z = Exp(b) }"""


@pytest.mark.parametrize(("step", "twin"), [("identity", "Mul(a, one)"), ("cse", "Abs(x)")])
def test_a_site_does_not_gain_readers(step: str, twin: str) -> None:
    """``b`` equals ``a``: after the cleanup, an edit at the site on ``b`` still leaves what only read ``a``."""
    graph = onnx_models.graph(BESIDE % twin, **({"one": np.ones((), np.float32)} if "one" in twin else {}))
    graph.site_table.add("here", value_anchor(graph.value("b")), "value")
    before = graph.run(X)
    after = apply(graph, f"{step}, dce, clip{{site=here min=0 max=0.01}}").run(X)
    assert np.array_equal(before["y"], after["y"])
    assert np.allclose(after["z"], np.exp(np.clip(np.abs(X["x"]), 0, 0.01)), rtol=1e-6)


def test_reshapes_between_unknown_sizes_stay() -> None:
    graph = onnx_models.graph(
        """<ir_version: 9, opset_import: ["": 18]>
        g (float[n] x, int64[2] s, int64[2] t) => (float[a, b] y)
        { u = Reshape(x, s)  v = Abs(u)  w = Reshape(v, t)  y = Neg(w) }"""
    )
    assert graph.value("v").shape == graph.value("w").shape == (None, None), "equal as far as anyone can say"
    feed = {"x": np.arange(6, dtype=np.float32), "s": np.array([2, 3]), "t": np.array([3, 2])}
    assert run(apply(graph, "identity, dce"), feed).shape == (3, 2)


def test_fold_grows_the_model_up_to_its_limit_only() -> None:
    """A result may be as large as the constants that it frees; constants that stay for others do not count."""
    text = """<ir_version: 9, opset_import: ["": 18]>
        g (float[batch, 4] x) => (float[batch, 4] y%s)
        { c = Cos(table)  s = Add(x, c)  y = Neg(s)  %s }"""
    table = np.linspace(0, 1, 4, dtype=np.float32)
    freed = onnx_models.graph(text % ("", ""), table=table)
    shared = onnx_models.graph(text % (", float[batch, 4] z", "z = Mul(x, table)"), table=table)
    counts = [
        sum(node.op == "onnx.Cos" for node in apply(graph, f"fold{{limit={limit}}}").nodes())
        for graph, limit in ((freed, 1), (shared, 3), (shared, 4))
    ]
    assert counts == [0, 1, 0]


def test_fold_leaves_weights_if_asked_to(both_stories: dict[str, Graph]) -> None:
    """Transposes of weights stay, so that the weight is still shared by name."""
    graph = both_stories["onnx"]
    transposed = [n.name for n in graph.nodes() if n.op == "onnx.Transpose" and n.operands[0] and n.operands[0].is_parameter]
    assert transposed
    kept = {node.name for node in apply(graph, "fold{weights=false}").nodes()}
    assert kept.issuperset(transposed) and not {n.name for n in apply(graph, "fold").nodes()}.issuperset(transposed)


def test_fold_keeps_packed_weights(stories: Graph) -> None:
    quantized = apply(stories, "quantize{weights=int8}, fold")
    assert any(node.op == "actgraph.dequantize" for node in quantized.nodes())


def test_golden(dialect: str, golden) -> None:  # type: ignore[no-untyped-def]
    graph = wasteful(dialect)
    cleaned = apply(graph, "identity, cse, fold, dce")
    golden(f"passes/cleanup.{dialect}", cleaned.text())
    assert relative(run(graph, X), run(cleaned, X)) < 1e-6


class Doubled(torch.nn.Module):
    """``x * 2`` once for a linear and once for itself: two readers on the edge into this module."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x * 2) * (x * 2)


class Siblings(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(4, 4)
        self.a, self.b = Doubled(), Doubled()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.first(x)
        return self.a(h), self.b(h)


@pytest.mark.parametrize(("site", "moved"), [("a:in", 0), ("b:in", 1)])
def test_an_edge_does_not_gain_readers(dialect: str, site: str, moved: int) -> None:
    graph = as_dialect(ag.trace(Siblings().eval(), (torch.randn(2, 4),), dynamic={"x": ("batch", None)}), dialect)
    cleaned = apply(graph, "cse, dce")
    assert sum(node.prim is not None and node.prim.op == "mul" for node in cleaned.nodes()) == 4, "one x * 2 in each module"
    step = f"steer{{site='{site}' vector=[1.0, 2.0, 3.0, 4.0]}}"
    before, plain, after = (list(g.run(X).values()) for g in (graph, apply(graph, step), apply(cleaned, step)))
    assert np.array_equal(before[1 - moved], after[1 - moved])
    assert relative(plain[moved], after[moved]) < 1e-6 < 1e-2 < relative(before[moved], after[moved])


def test_numbers_are_equal_when_their_bits_are() -> None:
    class Signs(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x * 2
            return torch.cat([torch.tanh(x / 0.0), torch.tanh(x / -0.0)])

    graph = ag.trace(Signs().eval(), (torch.randn(2, 4),), dynamic={"x": ("batch", None)})
    assert np.array_equal(run(graph, X), run(apply(graph, "cse, dce", parity="none"), X))
    for left, right in ((0.0, -0.0), (1, True), (1, 1.0), ([0.0], [-0.0]), (np.float32(0), np.float32(-0.0)), (0j, -0j)):
        assert _frozen(left) != _frozen(right), (left, right)
    for value in (float("nan"), -0.0, True, np.zeros(2), {"a": [1, 2.0]}):
        assert _frozen(value) == _frozen(copy.deepcopy(value))
        hash(_frozen(value))
    assert _frozen(slice(1)) != _frozen(slice(2)), "what cannot be hashed equals nothing"
