"""Kernels as custom operators of onnxruntime: element types, shapes, errors, sessions, threads, processes, long runs."""

from __future__ import annotations

import functools
import gc
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from actgraph.errors import UnsupportedError
from actgraph.graph.graph import Array
from actgraph.runtime.kernels.registry import all_kernels
from actgraph.runtime.native.library import library
from actgraph.runtime.native.tables import OpTable, table_of
from tests.runtime.plugin_models import (
    BIAS,
    INDICES,
    INT8_TOLERANCE,
    KEPT,
    SCALE,
    WEIGHT,
    ZERO,
    X,
    close,
    linear_model,
    names,
    needs_library,
    session,
    with_kernels,
)

pytestmark = needs_library
FLOAT, INT8 = "linear_out_in_f32", "linear_out_in_i8"


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    with_kernels(FLOAT, INT8)


def drawn(tokens: int = 3, inputs: int = 24, outputs: int = 7, seed: int = 0) -> dict[int, Array]:
    """A float linear."""
    rng = np.random.default_rng(seed)
    shapes = {X: (2, tokens, inputs), WEIGHT: (outputs, inputs), BIAS: (outputs,)}
    return {place: rng.standard_normal(shape).astype(np.float32) for place, shape in shapes.items()}


def int8(tokens: int = 3, inputs: int = 256, outputs: int = 64, seed: int = 0) -> dict[int, Array]:
    """A linear of int8 weights."""
    rng = np.random.default_rng(seed)
    x, scale = rng.standard_normal((2, tokens, inputs)), rng.uniform(0.01, 0.02, outputs)
    codes = rng.integers(-127, 128, (outputs, inputs)).astype(np.int8)
    return {X: x.astype(np.float32), WEIGHT: codes, SCALE: scale.astype(np.float32)}


def runs() -> int:
    return int(library().ag_runs())


def both(model: onnx.ModelProto, feeds: dict[str, Array]) -> tuple[Array, Array]:
    """The results with kernels, which must have run, and without."""
    before = runs()
    (got,) = session(model).run(None, feeds)
    assert runs() == before + 1
    (want,) = session(model, None).run(None, feeds)
    assert runs() == before + 1
    return got, want


# --- element types ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("constant", [(), (WEIGHT, BIAS)], ids=["inputs", "constants"])
@pytest.mark.parametrize(("kind", "tolerance"), [("float32", 1e-6), ("float16", 1e-3), ("bfloat16", 1e-2)])
def test_activations_of_each_float_type(kind: str, tolerance: float, constant: tuple[int, ...]) -> None:
    """Kernels compute in float32 and round once, as the op says. bfloat16 enters and leaves by Cast."""
    import ml_dtypes

    wanted = np.dtype(ml_dtypes.bfloat16 if kind == "bfloat16" else kind)
    operands = {place: array.astype(wanted) for place, array in drawn().items()}
    if kind == "bfloat16":
        model = linear_model(operands)
        got, want = both(model, {name: array.astype(np.float32) for name, array in names(operands).items()})
    else:
        got, want = both(linear_model(operands, constant), names(operands, constant))
    close(got, want, tolerance)


def test_rounding_to_float16_is_that_of_numpy() -> None:
    """A weight of 1 passes every value through: halves, subnormals, overflow, infinities and NaN."""
    values = np.arange(65536, dtype=np.uint16).view(np.float16).reshape(-1, 1)
    model = linear_model({X: values, WEIGHT: np.ones((1, 1), np.float16)})
    (same,) = session(model).run(None, {"in_0": values, "in_1": np.ones((1, 1), np.float16)})
    np.testing.assert_array_equal(same.view(np.uint16) & 0x7FFF, _quiet(values).view(np.uint16) & 0x7FFF)
    third = np.full((1, 1), 0.3333, np.float16)
    (got,) = session(model).run(None, {"in_0": values, "in_1": third})
    with np.errstate(over="ignore", invalid="ignore"):
        want = (values.astype(np.float32) * third.astype(np.float32)).astype(np.float16)
    np.testing.assert_array_equal(got, want)


def _quiet(values: Array) -> Array:
    return np.where(np.isnan(values), np.float16(np.nan), values)


def test_float64_is_refused_when_the_session_opens_and_runs_by_its_body() -> None:
    operands = {place: array.astype(np.float64) for place, array in drawn().items()}
    with pytest.raises(Exception, match="Linear: its kernels do not compute in float64; save the file with all ops inlined"):
        session(linear_model(operands))
    (want,) = session(linear_model(operands), None).run(None, names(operands))
    assert want.dtype == np.float64 and np.abs(want).max() > 0


def test_several_types_in_one_model() -> None:
    """float32, float16 and int8 weights side by side, each node with what it needs."""
    feeds: dict[str, Array] = {}
    parts = {"a/": drawn(), "b/": {p: a.astype(np.float16) for p, a in drawn(seed=1).items()}, "c/": int8()}
    models = [onnx.compose.add_prefix(linear_model(o), p, rename_functions=False) for p, o in parts.items()]
    functions = [model.functions.pop() for model in models]
    merged = functools.reduce(lambda one, other: onnx.compose.merge_models(one, other, io_map=[]), models)
    merged.functions.extend(functions)
    assert len({function.overload for function in functions}) == 3
    for prefix, operands in parts.items():
        feeds |= {prefix + name: array for name, array in names(operands).items()}
    before = runs()
    got, want = session(merged).run(None, feeds), session(merged, None).run(None, feeds)
    assert runs() == before + 3
    for one, other, tolerance in zip(got, want, (1e-6, 1e-3, INT8_TOLERANCE), strict=True):
        close(one, other, tolerance)


@pytest.mark.parametrize("kind", ["int8", "int16", "uint16", "int32"])
def test_zero_points_of_each_type(kind: str) -> None:
    operands = int8()
    operands[ZERO] = np.arange(64).astype(kind)
    close(*both(linear_model(operands), names(operands)), INT8_TOLERANCE)
    assert operands[ZERO].max() == 63  # one that is misread moves the results


@pytest.mark.parametrize("kind", ["bool", "float32", "float16", "float64"])
def test_masks_of_each_type(kind: str) -> None:
    operands = drawn()
    operands[KEPT] = (np.arange(42).reshape(2, 3, 7) % 3).astype(kind)
    got, want = both(linear_model(operands), names(operands))
    np.testing.assert_array_equal(got == 0, want == 0)
    close(got, want, 1e-6)


@pytest.mark.parametrize("kind", ["float16", "float64"])
def test_weights_that_have_no_kernel_of_their_type(kind: str) -> None:
    operands = drawn()
    operands[WEIGHT] = operands[WEIGHT].astype(kind)
    for constant in ((), (WEIGHT,)):
        close(*both(linear_model(operands, constant), names(operands, constant)), 1e-6)


# --- where nodes are, and shapes --------------------------------------------------------------------------------------------


def test_nodes_in_branches_and_in_other_functions() -> None:
    """Without kernels onnxruntime finds no overload from inside another function, so this one is none."""
    operands = {place: drawn()[place] for place in (X, WEIGHT)}
    model = linear_model(operands)
    call, function = model.graph.node[0], model.functions[0]
    call.overload = function.overload = ""
    call.input[:], call.output[:] = ["x", "w"], ["y"]
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    z = helper.make_tensor_value_info("z", TensorProto.FLOAT, None)
    imports = [helper.make_opsetid(domain, version) for domain, version in (("", 21), ("actgraph", 1), ("mine", 1))]
    double = helper.make_node("Add", ["y", "y"], ["z"])
    inside = helper.make_function("mine", "Twice", ["x", "w"], ["z"], [call, double], imports[:2])
    branches = [helper.make_graph(nodes, "branch", [], [out]) for nodes, out in (([call], y), ([call, double], z))]
    given = [
        helper.make_tensor_value_info("c", TensorProto.BOOL, []),
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, None, 24]),
        helper.make_tensor_value_info("w", TensorProto.FLOAT, [7, 24]),
    ]
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, None)
    either = helper.make_node("If", ["c"], ["out"], then_branch=branches[0], else_branch=branches[1])
    twice = helper.make_node("Twice", ["x", "w"], ["out"], domain="mine")
    results = []
    for node, condition in ((either, True), (either, False), (twice, True)):
        graph = helper.make_graph([node], "places", given, [out])
        whole = helper.make_model(graph, functions=[function, inside], opset_imports=imports, ir_version=10)
        feeds = {"c": np.array(condition), "x": operands[X], "w": operands[WEIGHT]}
        results.append(both(whole, feeds))
        close(*results[-1], 1e-6)
    np.testing.assert_allclose(results[1][0], 2 * results[0][0], rtol=1e-5)
    np.testing.assert_array_equal(results[1][0], results[2][0])


def test_sessions_know_the_shapes_of_outputs(capfd: pytest.CaptureFixture[str]) -> None:
    """Symbols go through an op, and further on; nothing is said of tensors of unknown rank."""
    for kind in (np.float32, np.float16):
        operands = {place: array.astype(kind) for place, array in drawn().items()}
        model = linear_model(operands, (WEIGHT, BIAS))
        for axis, size in enumerate(("batch", None, 24)):
            dim = model.graph.input[0].type.tensor_type.shape.dim[axis]
            dim.Clear()
            if isinstance(size, int):
                dim.dim_value = size
            elif size:
                dim.dim_param = size
        model.graph.node.append(helper.make_node("Neg", [model.graph.output[0].name], ["after"]))
        kind_number = model.graph.output[0].type.tensor_type.elem_type
        model.graph.output.append(helper.make_tensor_value_info("after", kind_number, None))
        for output in model.graph.output:
            output.type.tensor_type.ClearField("shape")
        for value in session(model).get_outputs():
            assert value.shape[0] == "batch" and value.shape[2] == 7 and not isinstance(value.shape[1], int)
        feeds = {"in_0": operands[X]}
        np.testing.assert_array_equal(*[np.abs(a) for a in session(model).run(None, feeds)])
        model.graph.input[0].type.tensor_type.ClearField("shape")
        shapes = [value.shape for value in session(model).get_outputs()]
        assert shapes == [[], []]  # onnxruntime's way to say that it knows nothing
        assert session(model).run(None, feeds)[0].shape == (2, 3, 7)
    assert "shape" not in capfd.readouterr().err.lower()


# --- errors -----------------------------------------------------------------------------------------------------------------


def test_errors_of_kernels_are_errors_of_onnxruntime_with_our_text() -> None:
    operands = drawn()
    opened = session(linear_model(operands))
    feeds = names(operands)
    with pytest.raises(Exception, match="actgraph: Linear: the last axis of x is not the input axis of weight"):
        opened.run(None, {**feeds, "in_0": feeds["in_0"][..., :-1]})
    with pytest.raises(Exception, match="actgraph: Linear: a scale, zero point, bias, threshold or mask has another size"):
        opened.run(None, {**feeds, f"in_{BIAS}": np.zeros(6, np.float32)})
    assert opened.run(None, feeds)[0].shape == (2, 3, 7)  # the session goes on
    listed = {**{place: operands[place] for place in (X, WEIGHT)}, INDICES: np.array([0, 24])}
    with pytest.raises(Exception, match="actgraph: Linear: an index is beyond the channels of x"):
        session(linear_model(listed, keep="listed")).run(None, names(listed))


def test_attributes_are_checked_when_the_session_opens() -> None:
    model = linear_model(drawn())
    layout = next(a for a in model.graph.node[0].attribute if a.name == "layout")
    layout.s = b"sideways"
    with pytest.raises(Exception, match="actgraph: Linear: attribute layout has a value that is no choice"):
        session(model)


def _attribute(kind: str) -> onnx.AttributeProto:
    """One called "a" of each kind that there is."""
    tensor, graph = helper.make_tensor("t", TensorProto.FLOAT, [1], [1.0]), helper.make_graph([], "g", [], [])
    values = {
        "int": 1, "float": 1.5, "text": "out_in", "ints": [1, 2], "floats": [1.5], "texts": ["out_in"], "tensor": tensor,
        "graph": graph,
    }  # fmt: skip
    return helper.make_attribute("a", values[kind])


@pytest.mark.parametrize(
    ("name", "right"), [("layout", "text"), ("block_size", "int"), ("k", "int"), ("threshold", "float"), ("packed", "text")]
)
def test_attributes_of_another_kind_are_refused_and_absent_ones_have_their_defaults(name: str, right: str) -> None:
    operands = drawn()
    for kind in ("int", "float", "text", "ints", "floats", "texts", "tensor", "graph"):
        if kind == right:
            continue
        model = linear_model(operands)
        attributes = model.graph.node[0].attribute
        place = next(i for i, a in enumerate(attributes) if a.name == name)
        attributes[place].CopyFrom(_attribute(kind))
        attributes[place].name = name
        with pytest.raises(Exception, match=f"actgraph: Linear: attribute {name} is of the wrong kind"):
            session(model)
    model = linear_model(operands)
    (want,) = session(model).run(None, names(operands))
    del model.graph.node[0].attribute[:]
    np.testing.assert_array_equal(session(model).run(None, names(operands))[0], want)


@pytest.mark.parametrize("length", [62, 63, 64, 65, 500])
def test_texts_of_any_length_that_are_no_choice(length: int) -> None:
    model = linear_model(drawn())
    next(a for a in model.graph.node[0].attribute if a.name == "keep").s = b"x" * length
    with pytest.raises(Exception, match="actgraph: Linear: attribute keep has a value that is no choice"):
        session(model)


@pytest.mark.parametrize("kind", ["BOOL", "INT64", "UINT32", "FLOAT"])
def test_operands_of_types_that_kernels_do_not_read_are_refused_when_the_session_opens(kind: str) -> None:
    """Zero points choose no kernel: one of another type was read as 32-bit integers."""
    operands = int8()
    operands[ZERO] = np.arange(64).astype(np.int32)
    model = linear_model(operands)
    next(v for v in model.graph.input if v.name == f"in_{ZERO}").type.tensor_type.elem_type = TensorProto.DataType.Value(kind)
    spelled = {"BOOL": "bool", "FLOAT": "float32"}.get(kind, kind.lower())
    with pytest.raises(Exception, match=f"actgraph: Linear: input zero_point is {spelled}, which its kernels do not read"):
        session(model)
    listed = {**{place: drawn()[place] for place in (X, WEIGHT)}, INDICES: np.array([0, 2])}
    model = linear_model(listed, keep="listed")
    next(v for v in model.graph.input if v.name == f"in_{INDICES}").type.tensor_type.elem_type = TensorProto.INT16
    with pytest.raises(Exception, match="actgraph: Linear: input indices is int16, which its kernels do not read"):
        session(model)


def test_what_c_is_told_that_kernels_accept_is_what_the_ops_take() -> None:
    """And of types that no kernel reads, kernels take nothing but what the library converts."""
    for kernels in all_kernels().values():
        table = table_of(kernels)
        assert table.input_names.split("|") == [operand.name for operand in kernels.definition.inputs]
        for place, operand in enumerate(kernels.definition.inputs):
            kinds = operand.dtypes - kernels.refused.get(place, frozenset())
            assert table.accepts[place] == sum(1 << kind.onnx for kind in kinds) > 0


def test_an_element_type_without_a_kernel_is_refused_when_the_session_opens() -> None:
    operands = {place: drawn()[place] for place in (X, WEIGHT)}
    operands[WEIGHT] = operands[WEIGHT].astype(np.int64)
    model = linear_model({**operands, WEIGHT: operands[WEIGHT].astype(np.float32)})
    model.graph.input[1].type.tensor_type.elem_type = TensorProto.INT64
    with pytest.raises(Exception, match="actgraph: Linear: there is no kernel for these types and attributes"):
        session(model)


# --- sessions, threads, processes -------------------------------------------------------------------------------------------


def test_several_threads_on_one_session() -> None:
    cases = [int8(tokens=1 + i % 5, seed=i) for i in range(12)]
    weights = {place: cases[0][place] for place in (WEIGHT, SCALE)}
    opened = session(linear_model(cases[0], (WEIGHT, SCALE)), threads=2)
    plain = session(linear_model(cases[0], (WEIGHT, SCALE)), None)
    want = [plain.run(None, {"in_0": case[X]})[0] for case in cases]
    alone = [opened.run(None, {"in_0": case[X]})[0] for case in cases]
    for got, other in zip(alone, want, strict=True):
        close(got, other, INT8_TOLERANCE)
    assert weights[WEIGHT].shape == (64, 256)

    def work(number: int) -> bool:
        place = number % len(cases)
        (got,) = opened.run(None, {"in_0": cases[place][X]})
        return bool(np.array_equal(got, alone[place]))

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(work, range(600)))


def test_sessions_with_different_kernels_of_one_op_and_one_after_another() -> None:
    first, second = drawn(), int8()
    a, b = session(linear_model(first)), session(linear_model(second))
    want = a.run(None, names(first))[0], b.run(None, names(second))[0]
    for _ in range(3):
        np.testing.assert_array_equal(a.run(None, names(first))[0], want[0])
        np.testing.assert_array_equal(b.run(None, names(second))[0], want[1])
    del a
    gc.collect()
    np.testing.assert_array_equal(b.run(None, names(second))[0], want[1])
    del b
    gc.collect()
    np.testing.assert_array_equal(session(linear_model(first)).run(None, names(first))[0], want[0])


_FORKED = """
import os, sys
import numpy as np
from tests.runtime.plugin_models import linear_model, names, session, with_kernels
from tests.runtime.test_plugin import FLOAT, drawn, runs
from actgraph.runtime.kernels.calls import call
from actgraph.runtime.kernels.registry import all_kernels
with_kernels(FLOAT)
operands = drawn(outputs=64)
plain = [operands.get(place) for place in range(5)]
want = session(linear_model(operands)).run(None, names(operands))[0]
pooled = call(all_kernels()["linear"], plain, {}, threads=2)  # starts the library's own threads
child = os.fork()
if not child:
    try:
        before = runs()
        got = session(linear_model(operands)).run(None, names(operands))[0]
        again = call(all_kernels()["linear"], plain, {}, threads=2)
        os._exit(0 if np.array_equal(got, want) and np.array_equal(again, pooled) and runs() == before + 1 else 3)
    except BaseException as error:
        print(error, file=sys.stderr)
        os._exit(4)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_has_the_kernels_of_its_parent() -> None:
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", _FORKED], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_one_line_says_that_there_is_no_library() -> None:
    """Everything goes on by the bodies; the line comes once, and only for those who want kernels."""
    code = (
        "from actgraph.runtime.native.library import available\n"
        "print([available(), available(asked=True), available(asked=True)])"
    )
    for value in ("", "/nowhere/library.so"):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).resolve().parents[2],
            env={**os.environ, "ACTGRAPH_LIBRARY": value},
        )  # fmt: skip
        assert done.returncode == 0 and done.stdout == "[False, False, False]\n"
        assert done.stderr.count("\n") == 1 and "everything runs without them" in done.stderr


def test_a_file_that_is_not_the_library_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No library at all, and one that has none of the functions: not a traceback of ctypes."""
    text = tmp_path / "library.so"
    text.write_text("nothing")
    for file, why in ((text, "cannot be loaded"), (np._core._multiarray_umath.__file__, "is not the kernels' library")):  # type: ignore[attr-defined]
        monkeypatch.setenv("ACTGRAPH_LIBRARY", str(file))
        with pytest.raises(UnsupportedError, match=why):
            library.__wrapped__()


def test_a_named_library_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from actgraph.runtime.native import library as native

    monkeypatch.setattr(native, "_SAID", [])
    monkeypatch.setenv("ACTGRAPH_LIBRARY", "/nowhere/library.so")
    assert not native.available(asked=True)
    assert "ACTGRAPH_LIBRARY names no file (/nowhere/library.so)" in capsys.readouterr().err


def test_threads_register_an_op_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library keeps pointing to the structure that came first, so no second one may replace what keeps it alive."""
    from actgraph.runtime import ort_kernels

    made, kernels = [], all_kernels()["linear"]
    kernel = next(k for k in kernels.kernels if any(stage.name == FLOAT for stage in k.stages))
    monkeypatch.setattr(ort_kernels, "_KNOWN", {})
    build = ort_kernels.as_structure

    def slow(table: OpTable) -> object:
        made.append(table.name)
        time.sleep(0.05)
        return build(table)

    monkeypatch.setattr(ort_kernels, "as_structure", slow)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: ort_kernels.register(kernels, kernel), range(4)))
    assert made == ["Linear"]


_WITHOUT = """
import sys
import actgraph as ag
from actgraph.errors import UnsupportedError
program = ag.run(ag.load("stories260k"), "quantize{weights=int8}, fuse, kv_cache", parity="none").rewritten
for engine in ("torch", "onnxruntime"):
    try:
        ag.compile(program, engine=engine, require_kernels=True)
        print("compiled")
    except UnsupportedError as error:
        print(error.message)
    print(ag.generate(ag.compile(program, engine=engine), "Once", 5).tokens)
"""


@pytest.mark.slow
def test_without_the_library_models_run_and_require_kernels_is_an_error() -> None:
    """Both engines generate by bodies and references, to the same tokens."""
    without = subprocess.run(
        [sys.executable, "-c", _WITHOUT], capture_output=True, text=True, cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, "ACTGRAPH_LIBRARY": ""},
    )  # fmt: skip
    assert without.returncode == 0, without.stderr
    lines = without.stdout.splitlines()
    assert lines[0] == lines[2] == "the kernels' library was not built"
    assert lines[1] == lines[3] and lines[1].count(",") >= 4
    assert without.stderr.count("everything runs without them") == 1


# --- long runs --------------------------------------------------------------------------------------------------------------


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
def test_memory_is_flat_over_ten_thousand_runs(half: bool) -> None:
    """Each output is compared; between run 1,000 and run 10,000 the process grows by less than 2 MB (a leak of one output of
    1 KB a run would be 9 MB)."""
    operands = int8(tokens=4)
    if half:
        operands = {
            place: array.astype(np.float16) if array.dtype == np.float32 else array for place, array in operands.items()
        }
    opened = session(linear_model(operands, (WEIGHT, SCALE)), threads=2)
    feeds = {"in_0": operands[X]}
    (want,) = opened.run(None, feeds)
    close(want, session(linear_model(operands, (WEIGHT, SCALE)), None).run(None, feeds)[0], 2e-3 if half else INT8_TOLERANCE)
    before = runs()
    start = 0
    for number in range(10_000):
        assert np.array_equal(opened.run(None, feeds)[0], want), number
        if number == 1_000:
            start = _resident()
    assert runs() == before + 10_000
    assert _resident() - start < 2 << 20


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_sessions_that_fail_and_close_leave_nothing() -> None:
    operands = {place: array.astype(np.float16) for place, array in drawn(inputs=4096, outputs=64).items()}  # 1 MB in float32
    model = linear_model(operands, (WEIGHT, BIAS))
    broken = linear_model(operands, (WEIGHT, BIAS))
    next(a for a in broken.graph.node[0].attribute if a.name == "layout").s = b"sideways"

    def once() -> None:
        opened = session(model)
        opened.run(None, {"in_0": operands[X]})
        with pytest.raises(Exception, match="last axis"):
            opened.run(None, {"in_0": operands[X][..., :-1]})
        with pytest.raises(Exception, match="no choice"):
            session(broken)

    for _ in range(20):
        once()
    gc.collect()
    start = _resident()
    for _ in range(100):
        once()
    gc.collect()
    assert _resident() - start < 20 << 20  # of 100 MB, if constants were kept
