"""Reading and writing ONNX files without holding the weights twice.

A ``ModelProto`` is one length-prefixed field after another. So the graph is written first without its initializers, then
each initializer with its data straight from memory; the file is an ordinary protobuf that any reader takes. And it is read
by stepping over the data of large initializers, which goes from the file into arrays.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
import onnx_ir as ir

_GRAPH, _INITIALIZER, _RAW_DATA = 7, 5, 9  # field numbers of ModelProto.graph, GraphProto.initializer, TensorProto.raw_data
#: External data: smaller tensors stay in the file (shape inference reads them), larger ones start at a page.
SMALLEST_EXTERNAL = 1024
_PAGE = 4096

Entry = tuple[onnx.TensorProto, ir.TensorProtocol | None]  # the header, and the data where it belongs into the file


def headers(tensors: Iterable[tuple[str, ir.TensorProtocol]]) -> Iterator[Entry]:
    """Initializers with their data in the file."""
    for name, tensor in tensors:
        if isinstance(tensor, ir.StringTensor):
            proto = ir.serde.serialize_tensor(tensor)
            proto.name = name
            yield proto, None
        else:
            yield _header(name, tensor), tensor


def write_model(stream: BinaryIO, model: onnx.ModelProto, entries: Sequence[Entry]) -> None:
    """Write ``model`` with ``entries`` as the initializers of its graph. ``model`` loses its graph."""
    graph = model.graph.SerializeToString()
    model.ClearField("graph")
    parts = []
    for proto, tensor in entries:
        head = proto.SerializeToString()
        if tensor is not None:
            head += _key(_RAW_DATA) + _varint(tensor.nbytes)
        parts.append((head, tensor, len(head) + (tensor.nbytes if tensor is not None else 0)))
    total = len(graph) + sum(len(_key(_INITIALIZER) + _varint(size)) + size for _, _, size in parts)
    stream.write(model.SerializeToString() + _key(_GRAPH) + _varint(total) + graph)
    for head, tensor, size in parts:
        stream.write(_key(_INITIALIZER) + _varint(size) + head)
        if tensor is not None:
            stream.write(data_of(tensor))


def write_data(stream: BinaryIO, tensors: Iterable[tuple[str, ir.TensorProtocol]]) -> tuple[list[tuple[str, int, int]], str]:
    """Write the data of ``tensors`` one after the other. Returns ``(name, offset, length)`` of each and the sha256 of all."""
    digest = hashlib.sha256()
    places: list[tuple[str, int, int]] = []
    offset = 0
    for name, tensor in tensors:
        padding = -offset % (_PAGE if tensor.nbytes >= _PAGE else 16)
        data = data_of(tensor)
        for piece in (bytes(padding), data):
            stream.write(piece)
            digest.update(piece)
        places.append((name, offset + padding, tensor.nbytes))
        offset += padding + tensor.nbytes
    return places, digest.hexdigest()


def external_header(name: str, tensor: ir.TensorProtocol, location: str, offset: int) -> onnx.TensorProto:
    """An initializer whose data is in ``location``, a file beside the model."""
    proto = _header(name, tensor)
    proto.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(tensor.nbytes))):
        proto.external_data.add(key=key, value=value)
    return proto


def data_of(tensor: ir.TensorProtocol) -> memoryview | bytes:
    """The little-endian bytes of a tensor, in place where its memory is laid out like that already."""
    if tensor.dtype.bitwidth < 8:
        return tensor.tobytes()
    array = tensor.numpy()
    if not array.flags.c_contiguous or array.dtype.byteorder == ">" or np.little_endian is False:
        return tensor.tobytes()
    return array.reshape(-1).view(np.uint8).data


def _header(name: str, tensor: ir.TensorProtocol) -> onnx.TensorProto:
    return onnx.TensorProto(name=name, data_type=int(tensor.dtype), dims=tensor.shape.numpy())


def _key(field: int) -> bytes:
    return _varint(field << 3 | 2)


def _varint(value: int) -> bytes:
    result = bytearray()
    while value > 0x7F:
        result.append(value & 0x7F | 0x80)
        value >>= 7
    result.append(value)
    return bytes(result)


# --- reading ----------------------------------------------------------------------------------------------------------


def read_model(path: Path) -> tuple[onnx.ModelProto, dict[int, bytearray]]:
    """A model and, by position among the initializers of its graph, the data of the large ones, which the proto lacks.

    Raises OSError when the file cannot be read, ValueError when it is no protobuf of a model.
    """
    with open(path, "rb") as stream:
        if os.fstat(stream.fileno()).st_size == 0:
            raise ValueError("the file is empty")
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            skeleton, cuts = _without_data(data)
        contents: dict[int, bytearray] = {}
        for index, (start, length) in cuts.items():
            contents[index] = bytearray(length)
            stream.seek(start)
            if stream.readinto(contents[index]) != length:
                raise ValueError("the file ends early")
    proto = onnx.ModelProto()
    proto.ParseFromString(skeleton)
    return proto, contents


def _without_data(data: mmap.mmap) -> tuple[bytes, dict[int, tuple[int, int]]]:
    """The serialized model less the raw data of large initializers, and where in the file those are."""
    outer: list[bytes] = []
    inner: list[bytes] = []
    cuts: dict[int, tuple[int, int]] = {}
    count = 0
    for key, begin, start, end in _fields(data, 0, len(data)):
        if key != _GRAPH << 3 | 2:
            outer.append(data[begin:end])
            continue
        for field, first, low, high in _fields(data, start, end):
            if field != _INITIALIZER << 3 | 2:
                inner.append(data[first:high])
                continue
            if high - low >= SMALLEST_EXTERNAL:
                pieces = []
                for part, at, left, right in _fields(data, low, high):
                    if part == _RAW_DATA << 3 | 2 and right - left >= SMALLEST_EXTERNAL:
                        cuts[count] = (left, right - left)
                    else:
                        pieces.append(data[at:right])
                tensor = b"".join(pieces)
                inner.append(_key(_INITIALIZER) + _varint(len(tensor)) + tensor)
            else:
                inner.append(data[first:high])
            count += 1
    graph = b"".join(inner)
    return b"".join(outer) + _key(_GRAPH) + _varint(len(graph)) + graph, cuts


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """The fields of a message at ``data[start:end]``: key, where the field begins, where its content begins, where it ends."""
    position = start
    while position < end:
        begin = position
        key, position = _read_varint(data, position, end)
        match key & 7:
            case 0:
                low = position
                _, position = _read_varint(data, position, end)
            case 1:
                low, position = position, position + 8
            case 2:
                length, low = _read_varint(data, position, end)
                position = low + length
            case 5:
                low, position = position, position + 4
            case _:
                raise ValueError("not a protobuf message")
        if position > end or key >> 3 == 0:
            raise ValueError("not a protobuf message, or a damaged one")
        yield key, begin, low, position


def _read_varint(data: mmap.mmap, position: int, end: int) -> tuple[int, int]:
    result = shift = 0
    while position < end and shift < 64:
        byte = data[position]
        position += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result, position
        shift += 7
    raise ValueError("not a protobuf message, or a damaged one")


def data_name(path: Path, digest: str) -> str:
    """The name of the data file of a model: its stem and a part of the content hash."""
    return f"{path.stem}.{digest[:8]}.data"
