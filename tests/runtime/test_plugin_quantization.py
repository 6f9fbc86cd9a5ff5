"""quantize, dequantize and topk_gate in a plugin: in a process that knows onnxruntime and the plugin alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest

import actgraph as ag
from actgraph.graph.graph import Array
from actgraph.ops.dtypes import DType
from actgraph.ops.quantizer import dequantize_array, pack_nibbles, quantize_array, unpack_nibbles
from actgraph.ops.registry import get_op
from actgraph.runtime.native.build import build
from tests import zoo
from tests.conformance.harness import Case, carried, feeds, run_torch, types_of
from tests.runtime.kernel_cases import reference
from tests.runtime.plugin_models import call_model, needs_compiler, session

pytestmark = [needs_compiler, pytest.mark.slow]
OPS = ("quantize", "dequantize", "topk_gate")
F16, BF16 = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)

#: Models from a folder, with a plugin: their results, and how many kernels each has run.
_HOST = """
import ctypes, json, sys
from pathlib import Path
import numpy as np, onnxruntime as ort
plugin, folder = sys.argv[1], Path(sys.argv[2])
count = ctypes.CDLL(plugin).ag_runs
count.restype = ctypes.c_int64
ran = {}
for path in sorted(folder.glob("*.onnx")):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 3
    options.log_severity_level = 4
    options.register_custom_ops_library(plugin)
    before = count()
    given = np.load(path.with_suffix(".npz"))
    try:
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        results = session.run(None, {name: given[name] for name in given.files})
    except Exception as error:
        ran[path.stem] = str(error)
        continue
    np.savez(path.with_suffix(".out.npz"), *results)
    ran[path.stem] = count() - before
assert not [name for name in sys.modules if name.split(".")[0] in ("actgraph", "numba", "torch")]
print(json.dumps(ran))
"""


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plugin") / "libactgraph.so"
    assert set(build(path, "host", ops=OPS).ops) == set(OPS)
    return path


def run(plugin: Path, folder: Path) -> dict[str, Any]:
    """What ran for each model of a folder, or the error that stopped it."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", _HOST, str(plugin), str(folder)]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


class Cases:
    """Calls with the results that they must have, and those that the plugin gives."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.wanted: dict[str, Array] = {}

    def add(self, op: str, operands: Sequence[Array | None], attributes: dict[str, Any], want: Array) -> None:
        definition = get_op(op)
        model = call_model(definition, attributes, types_of(operands))
        name = f"{op}_{len(self.wanted):03}"
        onnx.save(model, self.folder / f"{name}.onnx")
        np.savez(self.folder / f"{name}.npz", **feeds(operands))  # type: ignore[arg-type]
        self.wanted[name] = want

    def check(self, plugin: Path) -> None:
        ran = run(plugin, self.folder)
        assert ran == dict.fromkeys(self.wanted, 1)
        for name, want in self.wanted.items():
            got = np.load(self.folder / f"{name}.out.npz")["arr_0"]
            assert got.dtype == carried(want).dtype and (want.size == 0 or np.any(want))
            np.testing.assert_array_equal(got, carried(want), err_msg=name)


#: (shape of x, shape of the scales, axis, block size)
LAYOUTS = [
    ((5, 7), (), 0, 0), ((5, 7), (1,), 0, 0), ((5, 7), (5,), 0, 0), ((5, 7), (7,), -1, 0), ((3, 4, 5), (4,), 1, 0),
    ((4, 10), (4, 3), 1, 4), ((6, 5), (2, 5), 0, 3), ((2, 7, 4), (2, 2, 4), -2, 5), ((4, 10), (), 1, 4),
    ((0, 7), (7,), 1, 0), ((4, 0, 3), (4,), 0, 0), ((300, 257), (300,), 0, 0),
]  # fmt: skip


@pytest.mark.parametrize("dtype", ["i8", "u8", "i4", "u4", "i16", "u16", "f8e4m3", "f8e5m2"])
def test_quantize_to_each_type(plugin: Path, tmp_path: Path, dtype: str) -> None:
    """Of floats of each width, with the scales and zero points of every layout: the codes of the numpy reference, all equal."""
    kind, cases, rng = DType(dtype), Cases(tmp_path), np.random.default_rng(1)
    largest = {"i4": 7, "u4": 15, "f8e4m3": 448, "f8e5m2": 57344}.get(dtype, 100)
    for place, (shape, scales, axis, block) in enumerate(LAYOUTS):
        scale = np.asarray(rng.uniform(0.5, 1.5, scales), np.float32) / np.float32(largest)
        x = (rng.standard_normal(shape) * 1.5).astype([np.float32, F16, BF16][place % 3])
        if x.size:
            x.flat[0], x.flat[1] = np.inf, -np.inf
            x.flat[2] = 1e-3
        zero = None
        if place % 4 and not kind.is_float:
            zero = np.asarray(rng.integers(0, 8, scales), [np.int32, np.int8, np.int16, np.uint8, ml_dtypes.uint4][place % 5])
        attributes = {"dtype": dtype, "axis": axis, "block_size": block}
        spread = scale if scales or not block else np.full((4, 3), scale)
        middle = zero if zero is None or scales or not block else np.full((4, 3), zero)
        want = quantize_array(x.astype(np.float32), spread, middle, kind, axis=axis, block_size=block)
        cases.add("quantize", [x, scale, zero], attributes, want)
    cases.check(plugin)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "f64"])
def test_dequantize_to_each_type(plugin: Path, tmp_path: Path, dtype: str) -> None:
    """Of codes of each type, with the scales and zero points of every layout: computed in float32, and rounded once."""
    kind, cases, rng = DType(dtype), Cases(tmp_path), np.random.default_rng(2)
    codes = ["i8", "u8", "i16", "u16", "i32", "i64", "u32", "u64", "i4", "u4", "f8e4m3", "f8e5m2"]
    zeros = [np.int32, np.int8, np.uint8, np.int16, np.uint16, ml_dtypes.int4]
    for place, (shape, scales, axis, block) in enumerate(LAYOUTS):
        q = rng.integers(0, 8, shape).astype(DType(codes[place]).numpy)
        if q.size and DType(codes[place]).bits >= 32:
            q.flat[:2] = (1 << 24) + 1, np.iinfo(q.dtype).max
        scale = np.asarray(rng.uniform(0.01, 0.3, scales), np.float32 if place % 3 else np.float16)
        zero = np.asarray(rng.integers(0, 8, scales), zeros[place % len(zeros)]) if place % 4 else None
        spread, middle = (
            a if a is None or scales or not block else np.full((4, 3), a) for a in (scale.astype(np.float32), zero)
        )
        with np.errstate(over="ignore"):
            want = dequantize_array(q, spread, middle, axis=axis, block_size=block).astype(kind.numpy)
        cases.add("dequantize", [q, scale, zero], {"dtype": dtype, "axis": axis, "block_size": block}, want)
    for packed, four in (("u4", ml_dtypes.uint4), ("i4", ml_dtypes.int4)):
        for axis, block, scales in ((0, 0, (6,)), (1, 0, (8,)), (1, 4, (6, 2)), (0, 3, (2, 8))):
            q = pack_nibbles(rng.integers(0, 16, (6, 8)).astype(np.uint8))
            scale = rng.uniform(0.01, 0.3, scales).astype(np.float32)
            zero = np.full(scales, 7, np.uint8)
            whole = unpack_nibbles(q, DType.of(four))
            want = dequantize_array(whole, scale, zero, axis=axis, block_size=block).astype(kind.numpy)
            attributes = {"dtype": dtype, "axis": axis, "block_size": block, "packed": packed}
            cases.add("dequantize", [q, scale, zero], attributes, want)
    cases.check(plugin)


@pytest.mark.parametrize("name", OPS)
def test_every_sample_of_the_ops_in_every_type(plugin: Path, tmp_path: Path, name: str) -> None:
    """As what is registered hides the body, it takes every call; float64 is refused when the session opens."""
    cases, op, refusals = Cases(tmp_path), get_op(name), 0
    for index, sample in enumerate(op.samples):
        for kind in sample.dtypes or sorted(op.inputs[0].dtypes):
            case = Case(op, index, kind)
            operands = case.operands()
            if kind is DType.F64:
                text = refused(plugin, tmp_path, call_model(op, case.attributes, types_of(operands)))
                refusals += "its kernels do not compute in float64" in text
                (tmp_path / "refused.onnx").unlink()
            else:
                (want,) = run_torch(op.reference, case, operands)
                cases.add(name, operands, case.attributes, want)
    assert refusals == (0 if name == "dequantize" else len(op.samples))
    cases.check(plugin)


def test_topk_gate(plugin: Path, tmp_path: Path) -> None:
    cases, rng, op = Cases(tmp_path), np.random.default_rng(3), get_op("topk_gate")
    for kind in (np.float32, np.float16):
        x = (rng.integers(-5, 6, (2, 3, 40)) / 4).astype(kind)
        for attributes in ({"k": 9}, {"k": 2, "group_size": 4}, {"k": 99}, {"k": 1, "axis": 1}):
            cases.add("topk_gate", [x], attributes, reference(op, [x], attributes))
    cases.check(plugin)


def agree_with_bodies(plugin: Path, path: Path, inputs: dict[str, Array], kernels: int, tolerance: float) -> None:
    """That ``kernels`` kernels ran, and all outputs are those of the bodies, within ``tolerance`` of the largest."""
    np.savez(path.with_suffix(".npz"), **inputs)  # type: ignore[arg-type]
    assert run(plugin, path.parent) == {path.stem: kernels}
    results = np.load(path.with_suffix(".out.npz"))
    for place, want in enumerate(session(path, None).run(None, inputs)):
        got = results[f"arr_{place}"]
        assert got.dtype == want.dtype and np.abs(want).max() > 0
        allowed = 1 if want.dtype == np.int8 else tolerance * np.abs(want).max()
        assert np.abs(got.astype(np.float64) - want).max() <= allowed


@pytest.mark.parametrize("pipeline", ["quantize{weights=int8}", "quantize{weights=int4 group_size=16}"])
def test_an_exported_model_of_quantized_weights_and_gates(plugin: Path, tmp_path: Path, pipeline: str) -> None:
    graph = ag.run(zoo.captured("llama"), pipeline, parity="none", reproducer=False).graph
    with graph.edit("test") as editor:
        editor.insert_at(graph.sites("blocks.0.resid_post")[0], "actgraph.topk_gate", [], {"k": 12})
    path = graph.save(tmp_path / "model.onnx")
    kinds = [node.op_type for node in onnx.load(path).graph.node if node.domain == "actgraph"]
    assert kinds.count("Dequantize") == 15 and kinds.count("TopkGate") == 1 and len(kinds) == 16
    agree_with_bodies(plugin, path, zoo.inputs("llama"), 16, 2e-5)


def test_an_exported_model_with_a_cache_of_8_bits(plugin: Path, tmp_path: Path) -> None:
    pipeline = "kv_cache{form=growing storage=int8 graphs=combined}"
    program = ag.run(zoo.captured("llama"), pipeline, parity="none", reproducer=False).program
    path = tmp_path / "model.onnx"
    program.save(path)
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert kinds.count("Quantize") == kinds.count("Dequantize") == 4
    inputs, rng = dict(zoo.inputs("llama")), np.random.default_rng(4)
    batch, new = inputs["input_ids"].shape
    for value in session(path, None).get_inputs():
        if value.name.startswith("past"):  # [batch, heads, 3, channels]
            shape = [batch, value.shape[1], 3, value.shape[3]]
            scales = value.name.endswith("scale")
            inputs[value.name] = (rng.uniform(0.001, 0.01, shape) if scales else rng.integers(-99, 99, shape)).astype(
                np.float32 if scales else np.int8
            )
    inputs["attention_mask"] = np.ones((batch, 3 + new), np.int64)
    inputs["position_ids"] = np.tile(np.arange(3, 3 + new), (batch, 1))
    agree_with_bodies(plugin, path, inputs, 8, 1e-4)


# --- what is refused ----------------------------------------------------------------------------------------------------------


def small(op: str = "quantize", **attributes: Any) -> onnx.ModelProto:
    operands = [np.ones((2, 4), np.float32), np.ones(2, np.float32), np.ones(2, np.int8)]
    if op == "dequantize":
        operands[0] = np.ones((2, 4), np.int8)
    return call_model(get_op(op), attributes, types_of(operands))


def refused(plugin: Path, folder: Path, model: onnx.ModelProto) -> str:
    """The error of opening a session on it."""
    onnx.save(model, folder / "refused.onnx")
    np.savez(folder / "refused.npz")
    found = run(plugin, folder)["refused"]
    assert isinstance(found, str)
    return found


def test_models_that_do_not_fit_are_refused_when_the_session_opens(plugin: Path, tmp_path: Path) -> None:
    model = small()
    model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.UINT8
    text = "actgraph: Quantize: attribute dtype names another type than the model gives its output"
    assert text in refused(plugin, tmp_path, model)
    model = small()
    model.graph.node[-1].input.append("in_0")
    assert "actgraph: Quantize: has more inputs than the op" in refused(plugin, tmp_path, model)
    model = small("dequantize")
    model.graph.input[1].type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    assert "Dequantize: input scale is float64, which its kernels do not read" in refused(plugin, tmp_path, model)
    model = small()
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    assert "Quantize: its kernels do not compute in float64" in refused(plugin, tmp_path, model)


def test_an_output_whose_type_the_model_does_not_say(plugin: Path, tmp_path: Path) -> None:
    """onnxruntime itself says so: an op cannot tell it a type that depends on an attribute."""
    model = small("dequantize")
    node, output = model.graph.node[-1], model.graph.output[0]
    model.graph.node.append(onnx.helper.make_node("Neg", [node.output[0]], ["y"]))
    output.name = "y"
    del model.graph.value_info[:]
    assert "type inference failed" in refused(plugin, tmp_path, model)


def test_no_channel_is_not_a_number_of_channels(plugin: Path, tmp_path: Path) -> None:
    operands = [np.ones((2, 4), np.float32)]
    model = call_model(get_op("topk_gate"), {"k": 2}, types_of(operands))
    next(a for a in model.graph.node[-1].attribute if a.name == "k").i = 0
    onnx.save(model, tmp_path / "none.onnx")
    np.savez(tmp_path / "none.npz", in_0=operands[0])
    assert "actgraph: TopkGate: k is not positive" in run(plugin, tmp_path)["none"]
