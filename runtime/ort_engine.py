"""The plain onnxruntime engine: runs ONNX graphs as they are, without our kernels."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from actgraph.errors import InputError, UnsupportedError
from actgraph.graph.graph import Graph, Role, Value
from actgraph.graph.onnx import OnnxGraph
from actgraph.graph.onnx_native import native_dtype
from actgraph.ops.dtypes import DType
from actgraph.runtime.inputs import InputChecker
from actgraph.runtime.threads import wanted_threads

if TYPE_CHECKING:
    import onnxruntime as ort

Array = np.ndarray[Any, Any]

_NOT_IN_NUMPY = frozenset({DType.BF16, DType.F8E4M3, DType.F8E5M2, DType.I4, DType.U4})
#: What onnxruntime calls the element types that numpy has: all others pass through OrtValues.
_IN_NUMPY = frozenset(
    f"tensor({name})"
    for name in (
        "float", "double", "float16", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool",
        "string", "complex64", "complex128",
    )
)  # fmt: skip
_ACCURACY = "session.qdq_matmulnbits_accuracy_level"


class OrtExecutor:
    """Opens ONNX graphs with onnxruntime on the CPU."""

    def open(self, graph: Graph, values: Sequence[Value] = (), *, optimize: bool = True) -> OrtRunner:
        """A runner for ``graph`` that also returns ``values`` under their names.

        Where an extra value and an output have one name, the value is returned.
        optimize: without, onnxruntime's graph optimizations are off, whose time grows faster than the graph.
        Raises UnsupportedError when onnxruntime cannot run the graph, naming why.
        """
        if not isinstance(graph, OnnxGraph):
            raise UnsupportedError(f"{graph.name} is no ONNX graph", "graphs of torch run with the torch engine")
        return OrtRunner(graph, values, optimize)


class OrtRunner:
    """A graph in an onnxruntime session. Thread-safe, as sessions are."""

    def __init__(self, graph: OnnxGraph, values: Sequence[Value] = (), optimize: bool = True, *, profile: str = "") -> None:
        twin = graph.clone()
        keys: dict[str, str] = {name: name for name, _ in graph.outputs()}
        for value in values:
            taken = {name for name, _ in twin.outputs()} | {v.name for v in twin.inputs()}
            label = value.name
            while label in taken:
                label += "'"
            twin._add_output(twin.value(value.name), label, Role.USER)
            keys = {file: key for file, key in keys.items() if key != value.name} | {label: value.name}
        self._names = list(keys)
        self._keys = keys
        self._check = InputChecker(graph, graph.dim_ranges, graph.optional)
        self.session, self._weights = open_graph(twin, optimize=optimize, profile=profile, owned=True)
        self._binary = needs_values(self.session)

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name. Raises InputError for inputs that are not as declared (see ``InputChecker``)."""
        results = run_session(self.session, self._names, self._check(inputs), values=self._binary)
        return {self._keys[name]: array for name, array in zip(self._names, results, strict=True)}


def needs_values(session: ort.InferenceSession) -> bool:
    """Whether inputs or outputs have element types that numpy lacks."""
    declared = {item.type for item in (*session.get_inputs(), *session.get_outputs())}
    return any(kind.startswith("tensor(") and kind not in _IN_NUMPY for kind in declared)


def run_session(session: ort.InferenceSession, names: Sequence[str], feed: Mapping[str, Array], *, values: bool) -> list[Any]:
    """The outputs ``names``. values: through OrtValues, which carry what numpy lacks. Raises InputError, UnsupportedError."""
    import onnxruntime as ort

    try:
        if not values:
            return list(session.run(list(names), dict(feed)))
        results = session.run_with_ort_values(list(names), {name: value_of(array) for name, array in feed.items()})
        return [array_of_value(value) if isinstance(value, ort.OrtValue) else np.asarray(value) for value in results]
    except UnsupportedError:
        raise
    except Exception as error:  # onnxruntime raises its own classes, which derive from Exception directly
        raise InputError(f"onnxruntime cannot run these inputs: {first_line(error)}") from error


def open_graph(
    graph: OnnxGraph, *, optimize: bool = True, threads: int = 0, kernels: bool = False, profile: str = "", owned: bool = False
) -> tuple[ort.InferenceSession, dict[str, Array]]:
    """A session on a copy of ``graph``, and the weights that it reads where they are: keep them as long as the session.

    threads: how many compute one operator; 0: as many as ``using_threads`` says, or there are cores. kernels: all its
    actgraph nodes have kernels (see ``ort_kernels``). profile: onnxruntime's profiler writes a file whose name begins so.
    owned: ``graph`` is read by nobody else and need not be copied.
    """
    import onnxruntime as ort

    options = session_options()
    options.intra_op_num_threads = threads or wanted_threads()
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, profile
    if kernels:
        from actgraph.runtime.ort_kernels import register_library

        register_library(options)
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    with _model_source(graph if owned else graph.clone()) as (source, weights):
        if weights:
            shared = [ort.OrtValue.ortvalue_from_numpy(array) for array in weights.values()]
            options.add_external_initializers(list(weights), shared)
        return open_session(source, options, graph.name), weights


def session_options() -> ort.SessionOptions:
    """Options for an accurate session: linears of int8 weights are multiplied in float, whatever is quantized before them.

    At its default level onnxruntime quantizes what it multiplies by int8 weights. In a graph that quantizes activations that
    rounds again what has been rounded, in blocks of its own, and only in those linears that it fuses.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry(_ACCURACY, "1")
    return options


def open_session(source: bytes | str, options: ort.SessionOptions, name: str = "the model") -> ort.InferenceSession:
    """A CPU session on serialized bytes or a file. Raises UnsupportedError with onnxruntime's reason."""
    import onnxruntime as ort

    try:
        return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # see OrtRunner.__call__
        raise UnsupportedError(f"onnxruntime cannot run {name}: {first_line(error)}", _hint(str(error))) from error


@contextlib.contextmanager
def _model_source(graph: OnnxGraph) -> Iterator[tuple[bytes | str, dict[str, Array]]]:
    """A clone as onnxruntime takes it: bytes and the large weights where they are in memory.

    Weights of types that numpy lacks go into the bytes; above 1.5 GB of those it is a temporary file instead.
    """
    from actgraph.formats.onnx_file import SINGLE_FILE_BYTES, copied_bytes, serialize_shared, write_temporary

    if copied_bytes(graph) <= SINGLE_FILE_BYTES:
        yield serialize_shared(graph)
        return
    with tempfile.TemporaryDirectory(prefix="actgraph-") as folder:
        write_temporary(graph, Path(folder) / "model.onnx")
        yield str(Path(folder) / "model.onnx"), {}


def value_of(array: Array) -> ort.OrtValue:
    """``array`` as onnxruntime holds it: without a copy, except for 4-bit integers, which it packs two to a byte."""
    import ctypes

    import onnxruntime as ort

    try:
        kind = DType.of(array.dtype) if array.dtype.kind not in "OSU" else DType.STRING
    except KeyError as error:
        raise UnsupportedError(f"an input of element type {array.dtype} cannot be given", "cast it inside the graph") from error
    array = np.ascontiguousarray(array).reshape(array.shape)
    if kind not in _NOT_IN_NUMPY:
        return ort.OrtValue.ortvalue_from_numpy(array)
    if kind.bits >= 8:
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(f"u{kind.bits // 8}"), kind.onnx)
    value = ort.OrtValue.ortvalue_from_shape_and_type(list(array.shape), kind.onnx)
    packed = pack4(array)
    ctypes.memmove(value.data_ptr(), packed.ctypes.data, packed.nbytes)
    return value


def array_of_value(value: ort.OrtValue) -> Array:
    """What onnxruntime returned, as an array of its own. Raises UnsupportedError for an element type that we do not know."""
    array = view_of_value(value)
    return array if array.flags.owndata else array.copy()


def view_of_value(value: ort.OrtValue) -> Array:
    """The content of ``value``, shared where numpy has its type: good as long as ``value`` is kept. Raises UnsupportedError."""
    import ctypes

    import onnx_ir as ir

    native = ir.DataType(value.element_type())
    kind = native_dtype(native)
    if kind is None:
        raise UnsupportedError(f"an output of element type {native.name} cannot be returned", "cast it inside the graph")
    if kind not in _NOT_IN_NUMPY:
        return np.asarray(value.numpy())
    shape = tuple(value.shape())
    count = math.prod(shape)
    if count == 0:
        return np.empty(shape, kind.numpy)
    data = np.frombuffer(ctypes.string_at(value.data_ptr(), (count * kind.bits + 7) // 8), np.uint8)
    return unpack4(data, shape, kind) if kind.bits < 8 else data.view(kind.numpy).reshape(shape).copy()


def pack4(array: Array) -> Array:
    """4-bit integers, two to a byte, the first in the low half: ``[ceil(size / 2)]`` uint8, as ONNX stores them."""
    halves = np.zeros(-(-array.size // 2) * 2, np.uint8)
    halves[: array.size] = array.reshape(-1).astype(np.int8).view(np.uint8) & 0xF
    return halves[::2] | halves[1::2] << 4


def unpack4(data: Array, shape: tuple[int, ...], kind: DType) -> Array:
    """The inverse of ``pack4``: an array of ``shape`` and of the 4-bit type ``kind``."""
    halves = np.stack([data & 0xF, data >> 4], axis=-1).reshape(-1)[: math.prod(shape)].view(np.int8)
    signed = np.where(halves > 7, halves - 16, halves) if kind is DType.I4 else halves
    return signed.astype(kind.numpy).reshape(shape)


def first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0][:300] if text else type(error).__name__


def _hint(text: str) -> str:
    if "NOT_IMPLEMENTED" in text or "Could not find an implementation" in text:
        return "onnxruntime's CPU has no kernel for this element type: use float32 (the cast pass), or inline the op"
    return ""
