"""``.onnx_adapter`` files: values of optional inputs that onnxruntime swaps without a new session.

A host of plain onnxruntime loads one (``onnxruntime.LoraAdapter``), and each call names what it wants
(``RunOptions.add_active_adapter``). What it should know: the adapter overrides what is fed under the same name without a word,
``IOBinding`` ignores adapters, and tensors have rank 1 at least. Sessions of ours read the file and feed its values.

Source: the adapter format of onnxruntime (``onnxruntime/lora/adapter_format``), after LoRA, 2021.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from actgraph.errors import InputError, UnsupportedError
from actgraph.formats.atomic import atomic_file
from actgraph.graph.input_values import InputValue, as_input, optional_inputs, unknown_input
from actgraph.ops.dtypes import DType

if TYPE_CHECKING:
    from actgraph.graph.graph import Array, Graph
    from actgraph.graph.program import Program

SUFFIX = ".onnx_adapter"
#: Element types that onnxruntime's adapters take from numpy.
_TYPES = frozenset({
    DType.F64, DType.F32, DType.F16, DType.I64, DType.I32, DType.I16, DType.I8, DType.U64, DType.U32, DType.U16, DType.U8,
    DType.BOOL,
})  # fmt: skip


def save_adapter(
    path: str | Path, values: Mapping[str, InputValue], graph: Graph | Program, *, version: int = 1, model_version: int = 1
) -> Path:
    """Write ``values`` of optional inputs of ``graph`` (or of the graphs of a program) as an ``.onnx_adapter`` file.

    values: by the input's name, numbers, lists or arrays; one for all rows (``[1]``, ``[1, width]``) or one for each. version,
    model_version: numbers that the file carries for its host. The same values give the same bytes, in any order.
    Raises InputError for a name or type that does not fit the graph; UnsupportedError for element types without numpy's.
    """
    import tempfile

    import onnxruntime as ort

    path = Path(path)
    if path.suffix != SUFFIX:
        raise InputError(f"cannot write an adapter to {path}", f"its name ends in {SUFFIX}")
    if not values:
        raise InputError("an adapter without values changes nothing", "give one at least")
    arrays = {name: np.ascontiguousarray(_fitting(name, values[name], graph)) for name in sorted(values)}
    file = ort.AdapterFormat()
    file.set_adapter_version(version)
    file.set_model_version(model_version)
    file.set_parameters({name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()})
    with atomic_file(path) as stream, tempfile.TemporaryDirectory(prefix="actgraph-") as folder:
        made = Path(folder) / "adapter"
        file.export_adapter(str(made))  # while ``arrays`` is alive: onnxruntime keeps their addresses only
        stream.write(made.read_bytes())
    return path


def load_adapter(path: str | Path) -> dict[str, Array]:
    """The values in an ``.onnx_adapter`` file, by the name of the input, sorted. Raises InputError where it cannot be read."""
    import onnxruntime as ort

    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no adapter {path}", "make one with `actgraph export-adapter`")
    try:
        found = ort.AdapterFormat.read_adapter(str(path)).get_parameters()
        return {name: found[name].numpy().copy() for name in sorted(found)}
    except Exception as error:  # onnxruntime raises its own classes, which derive from Exception directly
        raise InputError(f"{path} is no adapter of onnxruntime, or holds types that numpy lacks", "write it again") from error


def _fitting(name: str, value: InputValue, graph: Graph | Program) -> Array:
    """``value`` as an array for the optional input ``name`` of each graph that has it."""
    from actgraph.graph.program import Program

    graphs = list(graph) if isinstance(graph, Program) else [graph]
    takers = [each for each in graphs if name in optional_inputs(each)]
    if not takers:
        if any(name == value.name for each in graphs for value in each.inputs()):
            raise InputError(f"input {name!r} of {graph.name} has no default, or says which tokens there are", "feed it")
        raise unknown_input(name, {other for each in graphs for other in optional_inputs(each)}, graph.name)
    for each in takers:
        array = as_input(name, value, each)
        dtype = each.value(name).dtype
        if dtype not in _TYPES:
            raise UnsupportedError(f"input {name!r} of {graph.name} is {each.value(name).type}: no type of adapters", "feed it")
    if not array.ndim:
        raise InputError(f"input {name!r} of {graph.name} has no axes, and adapters hold tensors with one at least", "feed it")
    return array
