"""The plain onnxruntime engine: runs ONNX graphs as they are, without our kernels."""

from __future__ import annotations

import contextlib
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

if TYPE_CHECKING:
    import onnxruntime as ort

Array = np.ndarray[Any, Any]

_NOT_IN_NUMPY = frozenset({DType.BF16, DType.F8E4M3, DType.F8E5M2, DType.I4, DType.U4})
_ACCURACY = "session.qdq_matmulnbits_accuracy_level"


class OrtExecutor:
    """Opens ONNX graphs with onnxruntime on the CPU."""

    def open(self, graph: Graph, values: Sequence[Value] = ()) -> OrtRunner:
        """A runner for ``graph`` that also returns ``values`` under their names.

        Where an extra value and an output have one name, the value is returned. Raises UnsupportedError when onnxruntime
        cannot run the graph, naming why.
        """
        if not isinstance(graph, OnnxGraph):
            raise UnsupportedError(f"{graph.name} is no ONNX graph", "graphs of torch run with the torch engine")
        return OrtRunner(graph, values)


class OrtRunner:
    """A graph in an onnxruntime session. Thread-safe, as sessions are."""

    def __init__(self, graph: OnnxGraph, values: Sequence[Value] = ()) -> None:
        import onnxruntime as ort

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
        self._inputs = {value.name: value.dtype for value in graph.inputs()}
        self._optional = graph.optional
        options = session_options(graph)
        with _model_source(twin) as (source, self._weights):
            if self._weights:
                shared = [ort.OrtValue.ortvalue_from_numpy(array) for array in self._weights.values()]
                options.add_external_initializers(list(self._weights), shared)
            self.session = open_session(source, options, graph.name)
        kinds = {*self._inputs.values(), *(value.dtype for value in values), *(value.dtype for _, value in graph.outputs())}
        self._binary = not kinds.isdisjoint(_NOT_IN_NUMPY)

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name. Raises InputError for missing, unknown or ill-shaped inputs."""
        unknown = sorted(set(inputs) - set(self._inputs))
        missing = [name for name in self._inputs if name not in inputs and name not in self._optional]
        if unknown or missing:
            problem = f"there is no input {unknown[0]!r}" if unknown else f"input {missing[0]!r} is missing"
            raise InputError(problem, f"inputs are {', '.join(self._inputs)}")
        feed = {name: self._cast(name, array) for name, array in inputs.items()}
        try:
            results = self._run_values(feed) if self._binary else self.session.run(self._names, feed)
        except Exception as error:  # onnxruntime raises its own classes, which derive from Exception directly
            raise InputError(f"onnxruntime cannot run these inputs: {_first_line(error)}") from error
        return {self._keys[name]: array for name, array in zip(self._names, results, strict=True)}

    def _cast(self, name: str, array: Array) -> Array:
        kind = self._inputs[name]
        array = np.asarray(array)
        return array if kind is None or array.dtype == kind.numpy else array.astype(kind.numpy)

    def _run_values(self, feed: Mapping[str, Array]) -> list[Array]:
        """Through OrtValues, which carry the element types that numpy lacks."""
        import onnxruntime as ort

        values = {name: _ort_value(array) for name, array in feed.items()}
        results = self.session.run_with_ort_values(self._names, values)
        return [_array(value) if isinstance(value, ort.OrtValue) else np.asarray(value) for value in results]


def session_options(graph: OnnxGraph | None = None) -> ort.SessionOptions:
    """Options for an accurate session: int8 weights are not multiplied by quantized activations unless ``graph`` says so."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    if graph is None or not quantizes_activations(graph):
        options.add_session_config_entry(_ACCURACY, "1")
    return options


def quantizes_activations(graph: OnnxGraph) -> bool:
    """Whether the graph quantizes values that depend on its inputs."""
    quantizers = {"QuantizeLinear", "DynamicQuantizeLinear", "FakeQuant", "DynamicQuantizeMatMul"}
    for node in graph.model.graph.all_nodes():
        if node.op_type in quantizers and node.inputs and node.inputs[0] is not None and not node.inputs[0].is_initializer():
            return True
    return False


def open_session(source: bytes | str, options: ort.SessionOptions, name: str = "the model") -> ort.InferenceSession:
    """A CPU session on serialized bytes or a file. Raises UnsupportedError with onnxruntime's reason."""
    import onnxruntime as ort

    try:
        return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # see OrtRunner.__call__
        raise UnsupportedError(f"onnxruntime cannot run {name}: {_first_line(error)}", _hint(str(error))) from error


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


def _ort_value(array: Array) -> ort.OrtValue:
    import onnxruntime as ort

    kind = DType.of(array.dtype)
    if kind not in _NOT_IN_NUMPY:
        return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
    raw = np.ascontiguousarray(array).view(np.uint8 if kind.bits == 8 else np.uint16)
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(raw, kind.onnx)


def _array(value: ort.OrtValue) -> Array:
    import onnx_ir as ir

    kind = native_dtype(ir.DataType(value.element_type()))
    if kind in (DType.BF16, DType.F8E4M3, DType.F8E5M2):
        return np.asarray(_copy_raw(value, kind))
    return np.asarray(value.numpy())


def _copy_raw(value: ort.OrtValue, kind: DType) -> Array:
    import ctypes

    shape = tuple(value.shape())
    count = int(np.prod(shape, dtype=np.int64))
    if count == 0:
        return np.empty(shape, kind.numpy)
    data = ctypes.string_at(value.data_ptr(), count * kind.bits // 8)
    return np.frombuffer(data, kind.numpy).reshape(shape).copy()


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0][:300] if text else type(error).__name__


def _hint(text: str) -> str:
    if "NOT_IMPLEMENTED" in text or "Could not find an implementation" in text:
        return "onnxruntime's CPU has no kernel for this element type: use float32 (the cast pass), or inline the op"
    return ""
