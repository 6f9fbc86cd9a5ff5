"""Models without slots: calls of few tokens and of many, by kernels; results are those without."""

from __future__ import annotations

import functools
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import actgraph as ag
from actgraph.errors import InputError, UnsupportedError
from actgraph.graph.graph import Array, Graph
from actgraph.runtime.native.library import available
from actgraph.runtime.slotless import FEW, Slotless

pytestmark = pytest.mark.skipif(not available(), reason="the kernels' library was not built: there is no C compiler")

both_engines = pytest.mark.parametrize("engine", ["torch", "onnxruntime"])
PIPELINES = {
    "sparsify{method=teal sparsity=0.5}": 1e-5,
    "quantize{weights=int8}": 2e-4,
    "sparsify{method=teal sparsity=0.5}, quantize{weights=int4 group_size=32}": 2e-4,
}


class TwoLayers(torch.nn.Module):
    """x -> x + down(relu(up(x))), with weights that kernels are worth their call for."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = torch.nn.Linear(256, 512), torch.nn.ReLU(), torch.nn.Linear(512, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.act(self.up(x)))


def drawn(*shape: int) -> Array:
    return np.random.default_rng(len(shape) + shape[0]).standard_normal((*shape, 256)).astype(np.float32)


@functools.cache
def source(*dynamic: str | None) -> ag.FxGraph:
    torch.manual_seed(0)
    shape = [2 + place for place in range(len(dynamic))]
    named = {"x": (*dynamic, None)} if any(dynamic) else None
    return ag.trace(TwoLayers().eval(), (torch.randn(*shape, 256),), dynamic=named)


@functools.cache
def rewritten(pipeline: str, *dynamic: str | None) -> Graph:
    shape = [4 if name else 2 + place for place, name in enumerate(dynamic)]
    data = [{"x": drawn(*shape)}]
    return ag.run(source(*dynamic), pipeline, data, parity="none", reproducer=False).graph


def runner_of(compiled: ag.Compiled) -> Slotless:
    found = compiled.runner(next(iter(compiled.program.graphs)))
    assert isinstance(found, Slotless)
    return found


def agree(got: dict[str, Array], want: dict[str, Array], bound: float) -> None:
    assert list(got) == list(want)
    for name, array in want.items():
        assert np.abs(got[name] - array).max() <= bound * np.abs(array).max()


@both_engines
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_kernels_change_nothing(pipeline: str, engine: str) -> None:
    """Each number of rows goes to the graph that is meant for it; results are those of the engine alone."""
    graph = rewritten(pipeline, "batch", "seq")
    compiled, plain = ag.compile(graph, engine, require_kernels=True), ag.compile(graph, engine, kernels=False)
    assert plain.claims is None
    runner, taken = runner_of(compiled), []
    call = runner._call
    runner._call = lambda held, arrays: (taken.append(held), call(held, arrays))[1]  # type: ignore[method-assign,func-returns-value]
    for shape in ((1, 1), (2, 1), (1, FEW), (2, FEW), (1, 30)):
        inputs = {"x": drawn(*shape)}
        agree(compiled(inputs), plain(inputs), PIPELINES[pipeline])
        assert taken.pop() is runner.held(shape[0] * shape[1] <= FEW)
    assert compiled.claims is not None
    (claims,) = compiled.claims.values()
    assert len(claims.claimed) == 2 and not claims.unclaimed, claims
    assert all("linear" in kernel for kernel in claims.claimed.values())


@both_engines
def test_sizes_that_are_known_open_one_graph(engine: str) -> None:
    """Also for the claims: those of a graph that no call can take would say nothing."""
    for dynamic, opened in (((None,), [True]), (("batch", None), [False, True]), ((None, None), [False])):
        pipeline = "sparsify{method=teal sparsity=0.5}"
        if dynamic == (None, None):  # six rows
            graph, shape = rewritten(pipeline, None, None), (2, 3)
        else:
            graph, shape = rewritten(pipeline, *dynamic), (2, 3)[: len(dynamic)]
        compiled = ag.compile(graph, engine, require_kernels=True)
        assert list(runner_of(compiled)._opened) == opened
        agree(compiled({"x": drawn(*shape)}), ag.compile(graph, engine, kernels=False)({"x": drawn(*shape)}), 1e-5)
        assert compiled.claims is not None and runner_of(compiled).kinds == sorted(opened, reverse=True)
        assert list(runner_of(compiled)._opened) == opened


class Odd(torch.nn.Module):
    """A number and a view of a weight among the results."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(256, 256)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, int, torch.Tensor, torch.Tensor]:
        return self.linear(x), x.shape[0], self.linear.weight[:2], x


def test_results_of_every_kind() -> None:
    graph = ag.trace(Odd(), (torch.randn(2, 256),), dynamic={"x": ("batch", None)})
    for rows in (0, 1, 9):
        inputs = {"x": np.ones((rows, 256), np.float32)}
        got, want = ag.compile(graph)(inputs), ag.compile(graph, kernels=False)(inputs)
        assert list(got) == list(want) and len(got) == 4
        for name, array in want.items():
            np.testing.assert_allclose(got[name], array, rtol=1e-5, atol=1e-6)


def test_texts_and_sequences_go_through_onnxruntime(tmp_path: Path) -> None:
    from onnx import TensorProto, helper, save

    nodes = [helper.make_node("Identity", ["text"], ["same"]), helper.make_node("SplitToSequence", ["x"], ["parts"], axis=0)]
    graph = helper.make_graph(
        nodes, "odd",
        [
            helper.make_tensor_value_info("text", TensorProto.STRING, ["n"]),
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3]),
        ],
        [
            helper.make_tensor_value_info("same", TensorProto.STRING, ["n"]),
            helper.make_tensor_sequence_value_info("parts", TensorProto.FLOAT, [1, 3]),
        ],
    )  # fmt: skip
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), tmp_path / "odd.onnx")
    compiled = ag.compile(ag.load(tmp_path / "odd.onnx"))
    results = compiled({"text": np.array(["a", "bc"], object), "x": np.arange(6, dtype=np.float32).reshape(2, 3)})
    assert list(results["same"]) == ["a", "bc"]
    np.testing.assert_array_equal(results["parts"][1], [[3, 4, 5]])


@both_engines
@pytest.mark.parametrize("kind", ["float16", "float64"])
def test_models_of_other_types_run_as_they_did(kind: str, engine: str) -> None:
    """Kernels compute in float32: dense linears of other types stay the engine's."""
    model = TwoLayers().eval().to(getattr(torch, kind))
    graph = ag.trace(model, (torch.randn(2, 256, dtype=getattr(torch, kind)),), dynamic={"x": ("batch", None)})
    compiled = ag.compile(graph, engine, require_kernels=True)
    assert compiled.claims is not None and not next(iter(compiled.claims.values())).claimed
    inputs = {"x": drawn(1).astype(kind)}
    got, want = compiled(inputs), ag.compile(graph, engine, kernels=False)(inputs)
    agree(got, want, 1e-6)


def test_small_models_of_onnxruntime_keep_their_threads() -> None:
    """One thread serves steps of one token; here a call may be a batch of images."""
    compiled = ag.compile(rewritten("quantize{weights=int8}", "batch"), "onnxruntime")
    plain = ag.compile(rewritten("quantize{weights=int8}", "batch"), "onnxruntime", kernels=False)
    want = plain.runner(next(iter(plain.program.graphs))).session.get_session_options().intra_op_num_threads  # type: ignore[attr-defined]
    for few in (True, False):
        session = runner_of(compiled).held(few).plain.session
        assert session.get_session_options().intra_op_num_threads == want


@both_engines
def test_dense_float32_linears_of_few_tokens_have_kernels(engine: str) -> None:
    compiled = ag.compile(source("batch"), engine)
    assert compiled.claims is not None
    assert len(next(iter(compiled.claims.values())).claimed) == 2
    agree(compiled({"x": drawn(1)}), ag.compile(source("batch"), engine, kernels=False)({"x": drawn(1)}), 1e-5)
    held = runner_of(compiled).held(False)
    assert not held.claims.claimed, "products of many tokens are the engine's"


def test_a_saved_file_with_functions_has_kernels(tmp_path: Path) -> None:
    graph = rewritten("sparsify{method=teal sparsity=0.5}, quantize{weights=int4 group_size=32}", "batch")
    graph = ag.run(graph, "fuse", parity="none", reproducer=False).graph
    graph.save(tmp_path / "gated.onnx")
    compiled = ag.compile(ag.load(tmp_path / "gated.onnx"), require_kernels=True)
    assert compiled.engine == "onnxruntime"
    assert compiled.claims is not None and len(next(iter(compiled.claims.values())).claimed) == 2
    inputs = {"x": drawn(3)}
    agree(compiled(inputs), ag.compile(graph, "torch", kernels=False)(inputs), 2e-4)


@both_engines
def test_what_does_not_fit_is_refused(engine: str) -> None:
    compiled = ag.compile(rewritten("quantize{weights=int8}", "batch"), engine)
    for wrong, message in (
        ({"x": drawn(1).astype(np.float64)}, "is float64, the graph takes"),
        ({"y": drawn(1)}, "has no input 'y'"),
        ({"x": drawn(1)[:, :9]}, "has shape"),
        ({}, "is missing"),
    ):
        with pytest.raises(InputError, match=message):
            compiled(wrong)


@both_engines
def test_several_threads(engine: str) -> None:
    """Each with inputs of its own, of few rows and of many, at once."""
    compiled = ag.compile(rewritten("sparsify{method=teal sparsity=0.5}", "batch"), engine)
    inputs = [{"x": drawn(rows)} for rows in (1, 2, 3, FEW, FEW + 1, 20)]
    want, failed = [compiled(each) for each in inputs], []

    def work(place: int) -> None:
        for step in range(20):
            which = (place + step) % len(inputs)
            found = compiled(inputs[which])
            if any(not np.allclose(found[name], want[which][name], rtol=1e-5, atol=1e-5) for name in found):
                failed.append(which)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


@both_engines
def test_profile(engine: str) -> None:
    """Kernels are named at their sites; the calls' results stay what they are."""
    graph = rewritten("sparsify{method=teal sparsity=0.5}, quantize{weights=int4 group_size=32}", "batch")
    compiled = ag.compile(graph, engine)
    inputs: dict[str, Any] = {"x": drawn(1)}
    want = compiled(inputs)
    with compiled.profile(stream=False) as profile:
        got = compiled(inputs)
        compiled({"x": drawn(9)})
    agree(got, want, 1e-6)
    assert len(profile.steps) == 2
    kernels = {row.kernel for row in profile.rows if row.op.endswith("linear")}
    assert any("linear" in kernel for kernel in kernels), kernels
    agree(compiled(inputs), want, 0.0)
    with compiled.profile(stream=False) as again:
        compiled({"x": drawn(30)})  # whose graph is not open yet
    assert sum(row.total for row in again.rows if not row.op) < again.total  # opening it is no part of the call


def test_kernels_that_are_required_and_refused() -> None:
    graph = rewritten("quantize{weights=int8}", "batch")
    with pytest.raises(InputError, match="exclude each other"):
        ag.compile(graph, kernels=False, require_kernels=True)
    model = TwoLayers().eval().half()
    half = ag.trace(model, (torch.randn(2, 256).half(),), dynamic={"x": ("batch", None)})
    half = ag.run(
        half, "sparsify{method=teal sparsity=0.5}", [{"x": drawn(4).astype(np.float16)}], parity="none", reproducer=False
    )
    with pytest.raises(UnsupportedError, match=r"has no kernel for f16\[.*that makes f16") as caught:
        ag.compile(half.graph, require_kernels=True)
    assert "cast{dtype=f32}" in str(caught.value)
