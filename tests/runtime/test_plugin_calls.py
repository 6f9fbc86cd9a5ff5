"""Calls that kernels decline in sessions, and take where a host chooses by the op alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import actgraph as ag
from actgraph.errors import InputError
from actgraph.graph.graph import Array
from actgraph.ops.dtypes import DType
from actgraph.ops.registry import get_op
from actgraph.runtime.kernels.calls import call
from actgraph.runtime.kernels.registry import all_kernels
from actgraph.runtime.native.build import build
from actgraph.runtime.ort_kernels import register
from tests import zoo
from tests.conformance.harness import build as model_of
from tests.conformance.harness import feeds, types_of
from tests.runtime.kernel_cases import THREADS, agree, reference, run_as_operator
from tests.runtime.plugin_models import needs_compiler, needs_library, session

KERNELS = all_kernels()


# --- shift: norms over any axes ---------------------------------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize("norm", ["restore", "relative"])
@pytest.mark.parametrize(("axis", "axes"), [(-1, (-2, -1)), (-3, (-3, -2, -1)), (1, (-2,)), (2, (-1, 0)), (1, (-3,))])
def test_norms_over_any_axes(axis: int, axes: tuple[int, ...], norm: str) -> None:
    """With strengths and masks, tokens that are left alone, and vectors that broadcast; as onnxruntime reads the list, too."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((2, 3, 4, 5)).astype(np.float32)
    x[0, 1] *= 30
    others = [size for place, size in enumerate(x.shape) if place != axis % 4]
    mask, strength = rng.integers(0, 2, others).astype(np.float32), rng.standard_normal(others).astype(np.float32)
    shapes = [[1 if drop and place % 2 else size for place, size in enumerate(x.shape)] for drop in (False, True)]
    op, attributes = get_op("shift"), {"axis": axis, "norm": norm, "norm_axes": axes, "scale": 0.7}
    for shape in shapes:
        vector = rng.standard_normal(shape).astype(np.float32)
        for operands in ([x, vector, None, None], [x, vector, strength, mask]):
            want = reference(op, operands, attributes)
            assert np.abs(want - x).max() > 0.1
            for threads in THREADS:
                agree(call(KERNELS["shift"], operands, attributes, threads), want, 3e-6)
                agree(run_as_operator(op, operands, attributes, threads)[0], want, 3e-6)
        want, channels = (reference(op, [x, vector], {**attributes, "norm_axes": over}) for over in (axes, ()))
        assert axes == (axis - 4,) or np.abs(want - channels).max() > 0.01


@needs_library
def test_axes_that_x_does_not_have() -> None:
    x, v = np.ones((2, 3), np.float32), np.ones(3, np.float32)
    for axis in (-3, 2, -99, 99):
        with pytest.raises(InputError, match="x has not all axes of the norms"):
            call(KERNELS["shift"], [x, v], {"norm": "restore", "norm_axes": (axis,)})


@needs_library
def test_too_many_axes_are_refused_when_the_session_opens() -> None:
    operands: list[Array | None] = [np.ones((2, 3), np.float32), np.ones(3, np.float32), None, None]
    op = get_op("shift")
    register(KERNELS["shift"], KERNELS["shift"].kernels[0])
    model = model_of(op, op.complete({"norm": "restore"}), types_of(operands), 21)
    node = model.graph.node[0]
    kept = [a for a in node.attribute if a.name != "norm_axes"]
    del node.attribute[:]
    node.attribute.extend([*kept, onnx.helper.make_attribute("norm_axes", [-1] * 9)])
    with pytest.raises(Exception, match="actgraph: Shift: attribute norm_axes has more than 8 axes"):
        session(model)


@needs_library
@pytest.mark.parametrize("value", [-1, 1.5, "-1", [1.5]], ids=["int", "float", "text", "floats"])
def test_axes_of_another_kind_are_refused_when_the_session_opens(value: Any) -> None:
    operands: list[Array | None] = [np.ones((2, 3), np.float32), np.ones(3, np.float32), None, None]
    op = get_op("shift")
    register(KERNELS["shift"], KERNELS["shift"].kernels[0])
    for axes, text in ((value, "is of the wrong kind"), ([-1] * 9, "has more than 8 axes")):
        model = model_of(op, op.complete({"norm": "restore"}), types_of(operands), 21)
        node = model.graph.node[0]
        kept = [a for a in node.attribute if a.name != "norm_axes"]
        del node.attribute[:]
        node.attribute.extend([*kept, onnx.helper.make_attribute("norm_axes", axes)])
        with pytest.raises(Exception, match=f"actgraph: Shift: attribute norm_axes {text}"):
            session(model)


# --- feed_forward: gates that are stored in another way than up -------------------------------------------------------------


def block(up: str, gate: str, block_size: int = 0) -> tuple[list[Array | None], dict[str, Any]]:
    rng, inputs, neurons, outputs = np.random.default_rng(1), 48, 40, 24

    def stored(kind: str, rows: int, columns: int, *, down: bool = False) -> tuple[Array, Array | None]:
        weight = rng.standard_normal((rows, columns)).astype(np.float32)
        if kind == "i8":
            channels = columns if down else rows
            shape = [channels]
            if block_size:
                groups = -(-(rows if down else columns) // block_size)
                shape = [groups, channels] if down else [channels, groups]
            return (weight * 40).astype(np.int8), rng.uniform(0.02, 0.03, shape).astype(np.float32)
        return weight.astype(DType(kind).numpy), None

    u, g, d = stored(up, neurons, inputs), stored(gate, neurons, inputs), stored("i8", neurons, outputs, down=True)
    x, bias = rng.standard_normal((3, inputs)).astype(np.float32), rng.standard_normal(neurons).astype(np.float32)
    operands = [x, u[0], d[0], g[0], u[1], d[1], g[1], None, None, bias, None]
    return operands, {"block_size": block_size}


UNLIKE = [("i8", "f32", 0), ("f32", "i8", 0), ("f16", "f32", 0), ("f32", "bf16", 16), ("i8", "f8e4m3", 16), ("i8", "i8", 0)]


@needs_library
@pytest.mark.parametrize("sparse", ["none", "act", "hidden"])
@pytest.mark.parametrize(("up", "gate", "size"), UNLIKE)
def test_gates_of_another_type(up: str, gate: str, size: int, sparse: str) -> None:
    operands, attributes = block(up, gate, size)
    if up == gate:  # scales of another number
        operands[6] = np.full(1, 0.025, np.float32)
    attributes |= {"sparse": sparse, "threshold": 0.02}
    op, kernels = get_op("feed_forward"), KERNELS["feed_forward"]
    types = types_of(operands)
    assert kernels.find(types, op.complete(attributes)) is None  # in sessions
    chosen = next(k for k in kernels.kernels if k.types == (types[1].dtype, types[2].dtype) and k.attributes == ("",))  # type: ignore[union-attr]
    register(kernels, chosen)
    model = model_of(op, op.complete(attributes), types, 21)
    (got,) = session(model).run(None, feeds(operands))
    agree(got, reference(op, operands, attributes), 3e-4)


@needs_library
def test_a_gate_of_a_type_that_is_not_read() -> None:
    operands, attributes = block("f32", "f32")
    op, kernels = get_op("feed_forward"), KERNELS["feed_forward"]
    types = types_of(operands)
    register(kernels, next(k for k in kernels.kernels if k.types == (DType.F32, DType.I8)))
    model = model_of(op, op.complete(attributes), types, 21)
    model.graph.input[3].type.tensor_type.elem_type = onnx.TensorProto.INT64
    with pytest.raises(Exception, match="FeedForward: input gate_weight is int64, which its kernels do not read"):
        session(model)


@needs_library
def test_blocks_of_a_negative_size() -> None:
    op = get_op("feed_forward")
    for kind in ("i8", "f32"):
        operands, attributes = block(kind, kind)
        agree(call(KERNELS["feed_forward"], operands, attributes), reference(op, operands, attributes), 1e-3)
        with pytest.raises(InputError, match="a scale has another size than its weight asks for"):
            call(KERNELS["feed_forward"], operands, {"block_size": -16})


# --- in plugins -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@needs_compiler
def test_files_with_steering_and_feed_forwards_run_with_a_plugin(tmp_path: Path) -> None:
    """Kept shift and feed_forward nodes: the results with the plugin are those without, and its kernels ran."""
    graph = ag.run(
        zoo.captured("llama"), "sparsify{method=cats threshold=0.1}, fuse{feed_forwards=true}", parity="none", reproducer=False
    ).graph
    vector = np.random.default_rng(0).standard_normal(zoo.WIDTH).astype(np.float32)
    with graph.edit("test") as editor:
        attributes = {"scale": 0.5, "norm": "restore", "norm_axes": (-2, -1)}
        editor.insert_at(graph.sites("blocks.0.resid_post")[0], "actgraph.shift", [vector], attributes)
    path = graph.save(tmp_path / "model.onnx")
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert kinds.count("Shift") == 1 and kinds.count("FeedForward") == 2
    names = ("shift", "feed_forward")
    only = ("shift", "feed_forward_neurons_f32")
    built = build(tmp_path / "plugin.so", "host", ops=names, only=only)
    assert set(built.ops) == set(names)
    inputs = zoo.inputs("llama")
    with_plugin, without = session(path, built.path), session(path, None)
    (got,), (want,) = with_plugin.run(["logits"], inputs), without.run(["logits"], inputs)
    agree(got, want, 1e-5)
    import ctypes

    assert ctypes.CDLL(str(built.path)).ag_runs() == 3
