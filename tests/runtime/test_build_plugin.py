"""Kernels compiled ahead of time: a library that needs no Python, run by a host that has none."""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import actgraph as ag
from actgraph.errors import InputError, UnsupportedError
from actgraph.ops.dtypes import DType
from actgraph.runtime.kernels.numba.target import Target
from actgraph.runtime.kernels.registry import all_kernels
from actgraph.runtime.native import build as module
from actgraph.runtime.native.build import build, why_left_out
from actgraph.runtime.native.levels import CHOICES, LEVELS, chosen, highest
from actgraph.runtime.native.library import library
from actgraph.runtime.native.tables import table_of
from tests import zoo
from tests.conformance.harness import Case, assert_conforms, feeds, run_torch, types_of
from tests.runtime.plugin_models import (
    INT8_TOLERANCE,
    SCALE,
    WEIGHT,
    X,
    call_model,
    close,
    linear_model,
    names,
    needs_compiler,
    needs_library,
    session,
    with_kernels,
)

pytestmark = needs_compiler
ROOT = Path(__file__).resolve().parents[2]
KERNELS = ("linear_in_out_i8", "linear_out_in_i8")
#: Roundings to 16 bits add up over the layers of the model: of the largest logit.
MODEL_TOLERANCE = 5e-4


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels that the model below needs, for this processor."""
    path = tmp_path_factory.mktemp("plugin") / "libactgraph.so"
    counted: list[tuple[int, int]] = []
    built = build(path, "host", ops=["linear"], only=KERNELS, progress=lambda *count: counted.append(count))
    assert built.ops == ("linear",) and len(built.levels) == 1
    assert counted == [(i + 1, len(counted)) for i in range(len(counted))] and len(counted) >= 5
    assert os.listdir(path.parent) == ["libactgraph.so"]
    return path


def _host(folder: Path, *flags: str) -> Path:
    """The example host, linked with the library inside the wheel of onnxruntime and nothing else of it."""
    found = next((Path(ort.__file__).parent / "capi").glob("libonnxruntime.so.*"))
    (folder / "libonnxruntime.so.1").symlink_to(found)
    command = [
        *module.c_compiler(), "-O2", "-Wall", "-Wextra", "-Werror", *flags, str(ROOT / "examples" / "host.c"), "-o",
        str(folder / "host"), str(folder / "libonnxruntime.so.1"), f"-Wl,-rpath,{folder}", "-ldl", "-lm",
    ]  # fmt: skip
    subprocess.run(command, check=True)
    return folder / "host"


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _host(tmp_path_factory.mktemp("host"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gated int8 language model with its functions kept, inputs beside it, and the logits that Python's onnxruntime gives."""
    folder = tmp_path_factory.mktemp("model")
    pipeline = "sparsify{method=teal threshold=0.05}, quantize{weights=int8}, fuse"
    path = ag.run(zoo.captured("stories260k"), pipeline, parity="none").graph.save(folder / "model.onnx")
    ids = np.array([[1, 403, 407, 261, 378]])
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(5)[None]}
    (logits,) = session(path, None).run(["logits"], inputs)
    for name, array in {**inputs, "logits": logits}.items():
        array.tofile(folder / f"{name}.bin")
    return path


def _run(host: Path, model: Path, library: Path | str, times: int = 1) -> Any:
    """In an empty environment."""
    command = [str(host), str(model), str(library), str(model.parent), str(times)]
    done = subprocess.run(command, env={}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_host_without_python_runs_a_gated_int8_model(plugin: Path, host: Path, model: Path) -> None:
    """With kernels for all linears; the same file without them runs by its bodies, to the same numbers."""
    linears = sum(node.op_type == "Linear" for node in onnx.load(model).graph.node)
    assert linears == 36
    with_plugin, without = _run(host, model, plugin, 3), _run(host, model, "-")
    assert with_plugin["kernels run"] == 3 * linears and without["kernels run"] == 0
    assert without["largest"] > 1 and without["difference"] <= 1e-6 * without["largest"]
    assert 0 < with_plugin["difference"] <= MODEL_TOLERANCE * with_plugin["largest"]


def test_the_library_shows_two_functions_and_needs_the_c_library_alone(plugin: Path) -> None:
    if shutil.which("nm") is None:
        pytest.skip("there is no nm")
    lines = subprocess.run(["nm", "-D", str(plugin)], capture_output=True, text=True, check=True).stdout.splitlines()
    shown = {line.split()[-1] for line in lines if line.split()[-2] == "T"}
    assert shown == {"RegisterCustomOps", "ag_runs"}
    wanted = {line.split()[-1].partition("@")[0] for line in lines if line.split()[-2] == "U"}
    assert "memcpy" in wanted and not [name for name in wanted if name.startswith(("Py", "_Py", "NRT", "numba", "Ort"))]
    every = subprocess.run(["nm", str(plugin)], capture_output=True, text=True)
    assert "numba" not in every.stdout
    assert b"numba" not in plugin.read_bytes() and b"PyGILState" not in plugin.read_bytes()


@needs_library
def test_a_plugin_beside_the_library_of_the_package(plugin: Path, model: Path) -> None:
    """Each session has the kernels of its own library, in one process and in turn; one session takes one library only."""
    rng = np.random.default_rng(0)
    operands = {
        X: rng.standard_normal((1, 3, 64)).astype(np.float32), WEIGHT: rng.integers(-9, 9, (64, 64)).astype(np.int8),
        SCALE: rng.uniform(0.1, 0.2, 64).astype(np.float32),
    }  # fmt: skip
    with_kernels("linear_out_in_i8")
    one, other = session(linear_model(operands)), session(linear_model(operands), plugin)
    count = ctypes.CDLL(str(plugin)).ag_runs
    count.restype = ctypes.c_int64
    before = library().ag_runs(), count()
    results = [opened.run(None, names(operands))[0] for _ in range(3) for opened in (one, other)]
    assert (library().ag_runs(), count()) == (before[0] + 3, before[1] + 3)
    (want,) = session(linear_model(operands), None).run(None, names(operands))
    for got in results:
        close(got, want, INT8_TOLERANCE)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(str(plugin))
    from actgraph.runtime.ort_kernels import register_library

    register_library(options)
    with pytest.raises(Exception, match="Domain already set in registry"):
        ort.InferenceSession(linear_model(operands).SerializeToString(), options, providers=["CPUExecutionProvider"])


# --- levels and refusals ----------------------------------------------------------------------------------------------------


def test_levels() -> None:
    assert [level.name for level in chosen("all")] == [level.name for level in LEVELS] == list(CHOICES[2:])
    assert chosen("v3") == chosen("x86-64-v3") == (LEVELS[1],)
    assert len(chosen("host")) == 1
    with pytest.raises(InputError, match="there is no processor level 'v9'"):
        chosen("v9")
    for lower, higher in itertools.pairwise(LEVELS):
        assert set(lower.features) < set(higher.features) and higher.test.startswith(lower.test)
        assert highest(Target("some", frozenset(higher.features))) is higher
        assert highest(Target("some", frozenset(higher.features[:-1]))) in LEVELS[: LEVELS.index(higher)]
    with pytest.raises(InputError, match="is older than x86-64-v2"):
        highest(Target("ancient", frozenset()))


def test_what_cannot_be_in_a_plugin_is_said() -> None:
    for op, kernels in all_kernels().items():
        why = why_left_out(kernels)
        lists = any(attribute.kind == "floats" for attribute in kernels.definition.attributes)
        assert bool(why) == (lists or (kernels.claims is not None and op not in module.TOTAL)), op
        if why:
            with pytest.raises(InputError, match=f"{op} cannot be in a plugin"):
                build(Path("never.so"), ops=[op])
    with pytest.raises(InputError, match="no op 'lin' has kernels"):
        build(Path("never.so"), ops=["lin"])
    assert not Path("never.so").exists()


def test_ops_whose_bodies_are_faster_are_taken_where_they_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_compile", lambda *arguments: None)
    monkeypatch.setattr(module, "_link", lambda compiler, work: (work / "plugin.so").write_bytes(b""))
    everything = build(tmp_path / "all.so", "host")
    assert everything.left_out == module.ASKED_FOR and set(module.ASKED_FOR) == {"dequantize"}
    assert {*everything.ops, *everything.left_out} == set(all_kernels()) and {"quantize", "topk_gate"} <= set(everything.ops)
    some = build(tmp_path / "some.so", "host", ops=["linear", "dequantize"])
    assert set(some.ops) == {"linear", "dequantize"} and not some.left_out


def test_what_c_is_told_of_result_types_is_what_the_ops_say() -> None:
    """Over all samples in all types: outputs have the type of the first operand, or always that of the kernels."""
    seen = set()
    for case in _calls([op for op, kernels in all_kernels().items() if not why_left_out(kernels)]):
        kernels = all_kernels()[case.op.name]
        types = types_of(case.operands())
        assert types[0] is not None
        result = case.op.infer(types, case.attributes)[0].dtype
        table = table_of(kernels)
        if table.result_attribute >= 0:
            choice = case.op.attributes[table.result_attribute].choices.index(case.attributes[kernels.result_attribute])
            assert table.result_types[choice] == result.onnx and not table.follows, str(case)
        else:
            assert result is (types[0].dtype if table.follows else kernels.result), str(case)
        seen.add((table_of(kernels).follows, types[0].dtype))
    assert {(True, DType.F16), (False, DType.F16)} <= seen


def test_failures_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "lib.so"
    target.write_bytes(b"old")
    with pytest.raises(InputError, match="there is no folder"):
        build(tmp_path / "none" / "lib.so")
    monkeypatch.setattr(module, "_compile", lambda *arguments: None)  # objects are missing: the linker says so
    with pytest.raises(UnsupportedError, match="cannot link the plugin: "):
        build(target, "host", ops=["linear"])
    monkeypatch.setenv("CC", "no-such-compiler -m64")
    with pytest.raises(UnsupportedError, match=r"the C compiler no-such-compiler \(CC\) was not found"):
        build(target, "host", ops=["linear"])
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UnsupportedError, match="there is no C compiler"):
        build(target, "host", ops=["linear"])
    assert os.listdir(tmp_path) == ["lib.so"] and target.read_bytes() == b"old"


def test_a_kernel_that_does_not_compile_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_environment", lambda level: {**os.environ, "PYTHONPATH": "", "PYTHONHOME": "/nowhere"})
    with pytest.raises(UnsupportedError, match="the kernels do not compile for ") as caught:
        build(tmp_path / "lib.so", "host", ops=["linear"])
    assert "\n" not in caught.value.message and not os.listdir(tmp_path)


# --- everything, slowly -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> module.Plugin:
    return build(tmp_path_factory.mktemp("whole") / "libactgraph.so", "host")


def _calls(ops: Sequence[str]) -> list[Case]:
    found = []
    for name in ops:
        op = all_kernels()[name].definition
        for index, sample in enumerate(op.samples):
            kinds = sample.dtypes or tuple(sorted(op.inputs[0].dtypes))
            found += [Case(op, index, kind) for kind in kinds]
    return found


@pytest.mark.slow
def test_every_call_of_every_op_of_a_plugin(whole: module.Plugin) -> None:
    """A host chooses by the op alone, so what is registered takes every call: the conformance samples, in all types.

    float64 is refused when the session opens, in our words.
    """
    assert {"linear", "feed_forward", "shift"} <= set(whole.ops)
    for case in _calls(whole.ops):
        operands = case.operands()
        model = call_model(case.op, case.attributes, types_of(operands))
        if operands[0] is not None and operands[0].dtype == np.float64:
            with pytest.raises(Exception, match="its kernels do not compute in float64"):
                session(model, whole.path)
            continue
        want = run_torch(case.op.reference, case, operands)
        got = session(model, whole.path).run(None, feeds(operands))
        weight = operands[1] if len(operands) > 1 else None
        coded = any(operand is not None and operand.dtype.kind in "iu" for operand in operands)
        if (case.op.name == "linear" and weight is not None and weight.dtype.kind in "iu") or (
            case.op.name == "feed_forward" and coded
        ):  # activations at 16 bits
            for one, other in zip(got, want, strict=True):
                finite = np.isfinite(other)
                assert one.dtype == other.dtype and np.array_equal(one[~finite], other[~finite], equal_nan=True), str(case)
                if finite.any():
                    largest = max(float(np.abs(other[finite]).max()), 1e-6)
                    slack = {DType.BF16: 2.0**-7, DType.F16: 2.0**-10}.get(case.dtype, 0.0) + 2e-4
                    assert np.abs(one[finite].astype(np.float64) - other[finite]).max() <= slack * largest, str(case)
        else:
            assert_conforms(case, got, want, f"plugin, {case}")


@pytest.mark.slow
def test_all_levels_in_one_library_and_each_alone(host: Path, model: Path, tmp_path: Path) -> None:
    path = tmp_path / "all.so"
    assert build(path, "all", ops=["linear"], only=KERNELS).levels == tuple(level.name for level in LEVELS)
    best = chosen("host")[0]
    for level in LEVELS[: LEVELS.index(best) + 1]:
        build(tmp_path / "one.so", level.name, ops=["linear"], only=KERNELS)
        result = _run(host, model, tmp_path / "one.so")
        assert result["kernels run"] == 36 and 0 < result["difference"] <= MODEL_TOLERANCE * result["largest"], level.name
    chosen_now = _run(host, model, path)
    build(tmp_path / "one.so", best.name, ops=["linear"], only=KERNELS)
    assert chosen_now["difference"] == _run(host, model, tmp_path / "one.so")["difference"]
