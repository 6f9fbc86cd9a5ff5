"""Programs of several graphs as a folder: ``program.json``, one ``.onnx`` file per graph, one file with all weights."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import onnx_ir as ir

from actgraph.errors import InputError
from actgraph.formats import onnx_finish, onnx_stream
from actgraph.formats.atomic import StagedFiles
from actgraph.formats.companions import write_companions
from actgraph.formats.onnx_file import load_onnx
from actgraph.graph.graph import Graph
from actgraph.graph.onnx import OnnxGraph
from actgraph.graph.program import Driver, Program
from actgraph.graph.text import data_hash

MANIFEST = "program.json"
_VERSION = 1
_NAME = re.compile(r"\w[\w.-]*")

#: The file that says that a folder is one for onnxruntime-genai.
GENAI_MANIFEST = "genai_config.json"

_Tensor = tuple[str, ir.TensorProtocol, str]  # name, data, content hash


def save_program(program: Program, folder: Path, *, opset: int | None = None) -> Path:
    """Write ``program`` into ``folder`` (made if missing) and return it. Weights of equal content are stored once.

    All files take their names when the last one is written, the manifest at the end: a program that was there before stays
    whole where this one cannot be written, and what is left of it goes afterwards. Raises InputError then, for a folder that
    holds anything but a program, and for names of graphs that cannot be names of files.
    """
    if folder.suffix in (".onnx", ".pt2"):
        hint = "name a folder, without a suffix, or use kv_cache{graphs=combined} to get one graph"
        raise InputError(f"cannot write {folder}: a program of several graphs is a folder", hint)
    odd = next((name for name in program.graphs if not _NAME.fullmatch(name)), None)
    if odd is not None:
        raise InputError(
            f"a graph called {odd!r} cannot be a file", "name graphs by letters, digits, dots, dashes, underscores"
        )
    refuse_other_content(folder, MANIFEST)
    before = _files_of(folder)
    graphs = {name: _as_onnx(graph, opset) for name, graph in program.graphs.items()}
    opened = {name: graph.clone() for name, graph in graphs.items()}
    renamed = {name: onnx_finish.finish(graph) for name, graph in opened.items()}
    tensors = {name: _tensors(graph) for name, graph in opened.items()}
    with StagedFiles() as staged:
        staged.folder(folder)
        location, offsets = _write_weights(staged, folder, [item for listed in tensors.values() for item in listed])
        files = {}
        for name, graph in opened.items():
            path = folder / f"{name}.onnx"
            record = write_companions(graphs[name].companions, path, staged)
            onnx_finish.write_metadata(graph, graphs[name], renamed[name], record)
            _write_graph(staged, graph, path, tensors[name], location, offsets)
            files[name] = path.name
        manifest = {
            "version": _VERSION, "name": program.name, "graphs": files, "driver": program.driver.to_dict(), "weights": location,
            "slots": [program.slots[name].to_dict() for name in sorted(program.slots)],
        }  # fmt: skip
        with staged.file(folder / MANIFEST) as file:
            file.stream.write(json.dumps(manifest, indent=2).encode() + b"\n")
    for stale in before - {*files.values(), location}:
        with contextlib.suppress(OSError):  # a file that another process has open stays, where systems do not let it go
            (folder / stale).unlink()
    return folder


def _files_of(folder: Path) -> set[str]:
    """Graphs and weights of the program that ``folder`` holds; empty where it holds none that can be read."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        names = {*manifest["graphs"].values(), manifest["weights"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()
    return {name for name in names if isinstance(name, str) and name and Path(name).name == name}


def refuse_other_content(folder: Path, manifest: str) -> None:
    """Raises InputError for a folder that holds files, and not those of a model with this ``manifest``.

    What a folder loads as is told by what it holds: a program among the files of another model would be loaded in its place.
    Hidden files do not count.
    """
    if not folder.is_dir():
        return
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    other = MANIFEST if manifest == GENAI_MANIFEST else GENAI_MANIFEST
    if names and (manifest not in names or other in names):
        held = next((name for name in (other, "config.json") if name in names), names[0])
        raise InputError(f"the folder {folder} holds something else ({held})", "name a new or an empty folder")


def load_program(folder: str | Path, **options: Any) -> Program:
    """The program that ``save_program`` wrote. Raises InputError for a folder that holds none or is damaged."""
    if options:
        raise InputError(f"a program has no loading option {next(iter(options))!r}")
    folder = Path(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if not isinstance(manifest, dict):
            raise TypeError("it is no JSON object")
        if manifest["version"] != _VERSION:
            raise InputError(f"{folder} was written by another version of actgraph", "save it again with this one")
        driver, files, name = Driver.from_dict(manifest["driver"]), dict(manifest["graphs"]), str(manifest["name"])
    except OSError as error:
        raise InputError(f"{folder} holds no {MANIFEST}", "a program is a folder that Program.save wrote") from error
    except KeyError as error:
        raise InputError(f"{folder / MANIFEST} is damaged: it lacks {error.args[0]!r}", "save the program again") from error
    except (ValueError, TypeError) as error:
        raise InputError(f"{folder / MANIFEST} is damaged: {error}", "save the program again") from error
    outside = [file for file in files.values() if Path(file).name != file]
    if outside:
        raise InputError(f"{folder / MANIFEST} names a file outside of its folder: {outside[0]}")
    graphs: dict[str, Graph] = {stage: load_onnx(folder / file) for stage, file in files.items()}
    return Program(graphs, driver, name)


def _as_onnx(graph: Graph, opset: int | None) -> OnnxGraph:
    if isinstance(graph, OnnxGraph):
        return graph
    from actgraph.formats.onnx_export import to_onnx
    from actgraph.graph.fx import FxGraph

    assert isinstance(graph, FxGraph)
    return to_onnx(graph, opset)


def _tensors(graph: OnnxGraph) -> list[_Tensor]:
    found = []
    for value in graph.model.graph.initializers.values():
        if value.const_value is None:
            continue
        name = str(value.name)
        found.append((name, value.const_value, data_hash(graph.value(name))))
    return found


def _is_external(tensor: ir.TensorProtocol) -> bool:
    return tensor.nbytes >= onnx_stream.SMALLEST_EXTERNAL and not isinstance(tensor, ir.StringTensor)


def _write_weights(staged: StagedFiles, folder: Path, tensors: list[_Tensor]) -> tuple[str, dict[str, int]]:
    """Write each content once; returns the name of the file and where each content is."""
    distinct = {digest: tensor for _, tensor, digest in tensors if _is_external(tensor)}
    if not distinct:
        return "", {}
    with staged.file(folder / "weights.data") as file:
        places, digest = onnx_stream.write_data(file.stream, distinct.items())
        location = onnx_stream.data_name(folder / "weights.data", digest)
        file.target = file.target.with_name(location)
    return location, {content: offset for content, offset, _ in places}


def _write_graph(
    staged: StagedFiles, graph: OnnxGraph, path: Path, tensors: list[_Tensor], location: str, offsets: dict[str, int]
) -> None:
    entries: list[onnx_stream.Entry] = []
    for name, tensor, digest in tensors:
        if digest in offsets and _is_external(tensor):
            entries.append((onnx_stream.external_header(name, tensor, location, offsets[digest]), None))
        else:
            entries.extend(onnx_stream.headers([(name, tensor)]))
    native = graph.model.graph
    declared = {value.name for value in native.inputs}
    values = [value for value in native.initializers.values() if value.metadata_props and value.name not in declared]
    native.initializers.clear()
    proto = ir.to_proto(graph.model)
    for value in values:
        ir.serde.serialize_value_into(proto.graph.value_info.add(), value)
    with staged.file(path) as file:
        onnx_stream.write_model(file.stream, proto, entries)
