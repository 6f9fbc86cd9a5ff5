"""Loading and saving ``.onnx`` files."""

from __future__ import annotations

import contextlib
import io
import logging
import mmap
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from actgraph import __version__
from actgraph.errors import ActgraphError, InputError, UnsupportedError
from actgraph.formats import onnx_finish, onnx_stream
from actgraph.formats.atomic import StagedFiles
from actgraph.formats.companions import read_companions, write_companions
from actgraph.formats.onnx_engines import engine_note
from actgraph.graph.graph import Graph
from actgraph.graph.onnx import OnnxGraph
from actgraph.graph.onnx_native import array_of, tensor_of
from actgraph.graph.onnx_opset import renew_bodies
from actgraph.graph.onnx_state import collector_paused

#: The oldest standard opset that is read.
MIN_OPSET = 7
#: Weights up to this size are stored in the ``.onnx`` file itself (protobuf ends at 2 GB).
SINGLE_FILE_BYTES = 1_500_000_000
_PROTOBUF_BYTES = 2_147_000_000
_SHARED = 1 << 16  # weights from this size on are not copied into the bytes of a session


def load_onnx(path: str | Path, **options: Any) -> OnnxGraph:
    """The graph in an ``.onnx`` file of opset 7 or newer, with external data mapped, not read.

    What actgraph recorded in the file (sites, history, provenance, companions beside it) comes back.
    Raises InputError for a file that is missing, corrupt or incomplete, UnsupportedError for what onnx_ir cannot hold.
    """
    if options:
        raise InputError(f"an .onnx file has no loading option {next(iter(options))!r}")
    with collector_paused():
        return _load(Path(path))


def _load(path: Path) -> OnnxGraph:
    proto, contents = _parse(path)
    _check(path, proto)
    names = {tensor.name: contents[index] for index, tensor in enumerate(proto.graph.initializer) if index in contents}
    try:
        with _quiet():
            model = ir.from_proto(proto)
        graph = _build(model, path, names)
        if proto.training_info:
            graph.notes.append(f"the training information of {path.name} is not kept")
        return graph
    except ActgraphError:
        raise
    except Exception as error:  # a damaged file that parses can break any assumption; the cause is kept for --debug
        raise InputError(f"{path} is not a valid ONNX model: {_root_cause(error)}", "export or copy it again") from error


def _build(model: ir.Model, path: Path, contents: Mapping[str, bytearray]) -> OnnxGraph:
    _read_tensors(model, path, contents)
    found = onnx_finish.read_metadata(model)
    outputs = onnx_finish.take_back_names(model, found.get("renamed", {}))
    ours = "version" in found
    typed = ours and int(found.get("untyped", -1)) == onnx_finish.count_untyped(model)
    name = model.graph.name if ours and model.graph.name else path.stem
    graph = OnnxGraph(
        model, name, outputs=outputs, roles=onnx_finish.stored_roles(found),
        optional=found.get("optional", []) if ours else None, typed=typed,
    )  # fmt: skip
    onnx_finish.restore(graph, found)
    if found.get("version") != __version__:
        renew_bodies(graph)  # ops may have changed since the file was written
    graph.companions = read_companions(path, found.get("companions", {}) if ours else None)
    return graph


def save_onnx(
    graph: Graph,
    path: str | Path,
    *,
    inline: str | Sequence[str] = "none",
    external_data: bool | None = None,
    opset: int | None = None,
) -> Path:
    """Write ``graph`` to ``path`` and return it. The file and those beside it appear whole or not at all.

    inline: which actgraph ops become standard ops: ``"none"`` (their functions are kept, for kernels to claim), ``"all"``,
    or a list of op names.
    external_data: weights in a data file beside; by default only above 1.5 GB.
    opset: the opset that a torch graph is exported to.
    Raises InputError where the file cannot be written, UnsupportedError where ONNX cannot hold the graph.
    """
    path = Path(path)
    if not isinstance(graph, OnnxGraph):
        from actgraph.formats.onnx_export import to_onnx
        from actgraph.graph.fx import FxGraph

        assert isinstance(graph, FxGraph)
        graph = to_onnx(graph, opset)
    elif opset is not None and opset != graph.opset:
        raise UnsupportedError(f"{graph.name} has opset {graph.opset} already", "opset= is for graphs captured from torch")
    note = engine_note(graph)
    if note and note not in graph.notes:
        graph.notes.append(note)
        warnings.warn(note, stacklevel=2)
    twin = graph.clone()
    if inline != "none":
        onnx_finish.inline_ops(twin, None if inline == "all" else [inline] if isinstance(inline, str) else inline)
    renamed = onnx_finish.finish(twin)
    size = weight_bytes(twin)
    external = size > SINGLE_FILE_BYTES if external_data is None else external_data
    if not external and size > _PROTOBUF_BYTES:
        raise UnsupportedError(f"{size / 1e9:.1f} GB of weights do not fit into one .onnx file", "drop external_data=False")
    with StagedFiles() as staged:
        onnx_finish.write_metadata(twin, graph, renamed, write_companions(graph.companions, path, staged))
        _write(twin, path, external, staged)
    return path


def serialize(graph: OnnxGraph) -> bytes:
    """``graph`` as the bytes of a file, without metadata. The graph is used up: give a clone."""
    onnx_finish.finish(graph)
    proto, tensors = _split(graph.model)
    stream = io.BytesIO()
    onnx_stream.write_model(stream, proto, list(onnx_stream.headers(tensors)))
    return stream.getvalue()


def serialize_shared(graph: OnnxGraph) -> tuple[bytes, dict[str, np.ndarray[Any, Any]]]:
    """As ``serialize``, without the large weights: those are given as arrays, for an engine to take where they are.

    In the bytes they are external data of a file ``memory``, which does not exist.
    """
    onnx_finish.finish(graph)
    proto, tensors = _split(graph.model)
    entries: list[onnx_stream.Entry] = []
    shared: dict[str, np.ndarray[Any, Any]] = {}
    listed = {value.name for value in proto.graph.input}
    for name, tensor in tensors:
        if _is_sharable(tensor) and name not in listed:
            entries.append((onnx_stream.external_header(name, tensor, "memory", 0), None))
            shared[name] = tensor.numpy()
        else:
            entries.extend(onnx_stream.headers([(name, tensor)]))
    stream = io.BytesIO()
    onnx_stream.write_model(stream, proto, entries)
    return stream.getvalue(), shared


def _is_sharable(tensor: ir.TensorProtocol) -> bool:
    """Whether onnxruntime can use the memory of ``tensor``: large, in C order, of a type that numpy has."""
    if isinstance(tensor, ir.StringTensor) or tensor.nbytes < _SHARED or tensor.dtype.bitwidth < 8:
        return False
    array = tensor.numpy()
    return array.dtype.kind in "fiub" and array.flags.c_contiguous and array.flags.aligned


def copied_bytes(graph: OnnxGraph) -> int:
    """Bytes of the weights that ``serialize_shared`` cannot share."""
    tensors = graph.model.graph.initializers.tensors()
    return sum(tensor.nbytes for tensor in tensors if not _is_sharable(tensor))


def write_temporary(graph: OnnxGraph, path: Path) -> None:
    """``graph`` as a file with external data, without metadata and companions. The graph is used up: give a clone."""
    onnx_finish.finish(graph)
    with StagedFiles() as staged:
        _write(graph, path, True, staged)


def weight_bytes(graph: OnnxGraph) -> int:
    """Bytes of all initializers."""
    return sum(tensor.nbytes for tensor in graph.model.graph.initializers.tensors())


def _write(twin: OnnxGraph, path: Path, external: bool, staged: StagedFiles) -> None:
    target = Path(os.path.realpath(path))
    proto, tensors = _split(twin.model)
    entries = _write_external(target, tensors, staged) if external else list(onnx_stream.headers(tensors))
    with staged.file(target) as file:
        onnx_stream.write_model(file.stream, proto, entries)


def _split(model: ir.Model) -> tuple[onnx.ModelProto, list[tuple[str, ir.TensorProtocol]]]:
    """The model as a protobuf without the initializers of its outermost graph, and those. ``model`` loses them."""
    graph = model.graph
    values = list(graph.initializers.values())
    tensors = [(str(value.name), value.const_value) for value in values if value.const_value is not None]
    graph.initializers.clear()
    model.opset_imports.update(sorted((model.opset_imports.pop(key), key)[::-1] for key in list(model.opset_imports)))
    proto = ir.to_proto(model)
    listed = {value.name for value in graph.inputs}
    for value in values:
        if value.metadata_props and value.name not in listed:
            ir.serde.serialize_value_into(proto.graph.value_info.add(), value)
    return proto, tensors


def _write_external(
    target: Path, tensors: Sequence[tuple[str, ir.TensorProtocol]], staged: StagedFiles
) -> list[onnx_stream.Entry]:
    """Write large tensors to a data file named by content, and return the headers of all."""
    large = [
        (name, tensor)
        for name, tensor in tensors
        if tensor.nbytes >= onnx_stream.SMALLEST_EXTERNAL and not isinstance(tensor, ir.StringTensor)
    ]
    if not large:
        return list(onnx_stream.headers(tensors))
    with staged.file(target.with_suffix(".data")) as file:
        places, digest = onnx_stream.write_data(file.stream, large)
        location = onnx_stream.data_name(target, digest)
        file.target = target.with_name(location)
    offsets = {name: offset for name, offset, _ in places}
    entries: list[onnx_stream.Entry] = []
    for name, tensor in tensors:
        if name in offsets:
            entries.append((onnx_stream.external_header(name, tensor, location, offsets[name]), None))
        else:
            entries.extend(onnx_stream.headers([(name, tensor)]))
    return entries


# --- reading ----------------------------------------------------------------------------------------------------------


def _parse(path: Path) -> tuple[onnx.ModelProto, dict[int, bytearray]]:
    try:
        return onnx_stream.read_model(path)
    except OSError as error:
        raise InputError(f"cannot read {path}: {(error.strerror or str(error)).lower()}") from error
    except (DecodeError, ValueError) as error:
        raise InputError(f"{path} is not an ONNX file, or it is damaged", "export or copy the model again") from error


def _check(path: Path, proto: onnx.ModelProto) -> None:
    if not proto.opset_import and not proto.graph.node and not proto.graph.output:
        raise InputError(f"{path} holds no ONNX graph", "export or copy the model again")
    newest = onnx.defs.onnx_opset_version()
    for entry in proto.opset_import:
        if entry.domain in ("", "ai.onnx") and not MIN_OPSET <= entry.version <= newest:
            hint = "convert it with onnx.version_converter" if entry.version < MIN_OPSET else "upgrade the onnx package"
            raise UnsupportedError(f"{path} has opset {entry.version}; {MIN_OPSET} to {newest} are supported", hint)
    if not all(isinstance(text, str) for text in _texts(proto)):  # protobuf gives bytes where text is no UTF-8
        raise InputError(f"{path} is damaged: it has names that are no text", "export or copy the model again")
    if proto.graph.sparse_initializer:
        raise UnsupportedError(f"{path} has sparse initializers", "store the weights densely")


def _texts(proto: onnx.ModelProto) -> Iterator[object]:
    """Every name in the model."""
    graphs = [proto.graph]
    nodes = [node for function in proto.functions for node in function.node]
    for function in proto.functions:
        yield from (function.name, function.domain, function.overload, *function.input, *function.output, *function.attribute)
    while graphs or nodes:
        if graphs:
            graph = graphs.pop()
            nodes.extend(graph.node)
            yield from (item.name for item in (*graph.input, *graph.output, *graph.value_info, *graph.initializer))
            continue
        node = nodes.pop()
        yield from (node.name, node.op_type, node.domain, node.overload, *node.input, *node.output)
        for attribute in node.attribute:
            yield attribute.name
            graphs.extend([attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else attribute.graphs)


def _read_tensors(model: ir.Model, path: Path, contents: Mapping[str, bytearray]) -> None:
    """Replace every tensor that refers to the file or its data by one over memory: a view, mapped where it is external."""
    maps: dict[str, mmap.mmap] = {}
    for value in model.graph.initializers.values():
        if value.name in contents and value.const_value is not None:
            value.const_value = _from_memory(path, str(value.name), value.const_value, contents[str(value.name)])
    for value in _initialized(model):
        tensor = value.const_value
        if tensor is not None:
            value.const_value = _resident(str(value.name), tensor, path, maps)
    for node in _every_node(model):
        for name, attribute in list(node.attributes.items()):
            if attribute.type == ir.AttributeType.TENSOR and isinstance(attribute.value, ir.ExternalTensor):
                node.attributes[name] = ir.AttrTensor(name, _resident(f"{node.name}.{name}", attribute.value, path, maps))


def _resident(name: str, tensor: ir.TensorProtocol, path: Path, maps: dict[str, mmap.mmap]) -> ir.TensorProtocol:
    if isinstance(tensor, ir.StringTensor):
        return tensor
    if isinstance(tensor, ir.ExternalTensor):
        return _mapped(name, tensor, path, maps)
    try:
        array = array_of(tensor)
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: the data of {name} does not fit its shape {list(tensor.shape)}") from error
    return tensor_of(array, name)


def _from_memory(path: Path, name: str, tensor: ir.TensorProtocol, data: bytearray) -> ir.TensorProtocol:
    """A tensor whose data was read past the protobuf parser."""
    if len(data) != tensor.nbytes:
        raise InputError(f"{path}: the data of {name} does not fit its shape {list(tensor.shape)}")
    shape = tensor.shape.numpy()
    if tensor.dtype.bitwidth < 8:
        return ir.PackedTensor(np.frombuffer(data, np.uint8), tensor.dtype, shape=shape, name=name)
    array = np.frombuffer(data, tensor.dtype.numpy())
    array.flags.writeable = False
    return tensor_of(array.reshape(shape), name)


def _mapped(name: str, tensor: ir.ExternalTensor, path: Path, maps: dict[str, mmap.mmap]) -> ir.TensorProtocol:
    """External data as an array over the mapped file. The mapping outlives the file's name: replacing it is harmless."""
    location = os.fspath(tensor.location)
    # a file may be a link into a store (the Hugging Face cache); then its data may be a link into the same place
    folders = (Path(os.path.realpath(path.parent)), Path(os.path.realpath(path)).parent)
    target = Path(os.path.realpath(path.parent / location))
    if os.path.isabs(location) or not any(target.is_relative_to(folder) for folder in folders):
        raise InputError(f"{path}: the data of {name} lies outside of its folder ({location})", "move it beside the model")
    shape = tensor.shape.numpy()
    if tensor.nbytes == 0:
        return tensor_of(np.empty(shape, tensor.dtype.numpy()), name)
    if location not in maps:
        try:
            with open(target, "rb") as stream:
                maps[location] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            reason = "is missing" if not target.exists() else "cannot be read"
            raise InputError(f"{path}: its data file {location} {reason}", "keep the data file beside the model") from error
    start, length = tensor.offset or 0, tensor.nbytes
    if start < 0 or start + length > len(maps[location]) or tensor.length not in (None, length):
        raise InputError(f"{path}: its data file {location} is too short for {name}", "copy the data file again")
    raw = np.frombuffer(maps[location], np.uint8, length, start)
    if tensor.dtype.bitwidth < 8:
        return ir.PackedTensor(raw, tensor.dtype, shape=shape, name=name)
    return tensor_of(raw.view(tensor.dtype.numpy()).reshape(shape), name)


def _initialized(model: ir.Model) -> Iterator[ir.Value]:
    for graph in model.graphs():
        yield from graph.initializers.values()


def _every_node(model: ir.Model) -> Iterator[ir.Node]:
    yield from model.graph.all_nodes()
    for function in model.functions.values():
        yield from function.all_nodes()


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip().splitlines()
    return text[0][:200] if text else type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """onnx_ir logs what is wrong with an invalid graph; the verifier says it better."""
    logger = logging.getLogger("onnx_ir")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
