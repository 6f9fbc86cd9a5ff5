"""Values that a host gives for inputs once, for all calls: numbers and lists become arrays, arrays must be as declared."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from actgraph.errors import InputError
from actgraph.graph.context import token_dims
from actgraph.graph.graph import Array, Graph, Role
from actgraph.ops.dtypes import DType
from actgraph.ops.shapes import TensorType

#: What may be given for an input: an array of its type, or numbers.
InputValue = Array | float | int | bool | list[Any] | tuple[Any, ...]

#: Kinds of numbers that mean a value of each kind of type.
_MEANT = {"f": "iuf", "V": "iuf", "i": "iu", "u": "iu", "b": "b"}


def has_rows(graph: Graph, name: str) -> bool:
    """Whether the first axis of the input ``name`` of ``graph`` is that of the batch.

    In ONNX files it is of no known size, and 1 by default (see ``onnx_native.loosened``).
    """
    dims, shape, default = token_dims(graph), graph.value(name).shape, graph.default(name)
    if not dims or not shape:
        return False
    return shape[0] == dims[0] or (shape[0] is None and default is not None and default.shape[0] == 1)


def shown_type(graph: Graph, name: str) -> TensorType:
    """The type of an input, whose first axis is called by the name of the batch where it is that."""
    kind, dims = graph.value(name).type, token_dims(graph)
    return TensorType(kind.dtype, (dims[0], *kind.shape[1:])) if dims and kind.shape and has_rows(graph, name) else kind


def as_input(name: str, value: InputValue, graph: Graph, *, batch: int | None = None, of: str = "") -> Array:
    """``value`` as an array for the input ``name`` of ``graph``, which has one of that name.

    Numbers and lists are converted where that changes nothing, arrays must have the declared type. What lacks the axis of the
    batch alone gets one of size 1. A size of 1 on that axis serves all rows, else it must be ``batch`` (``None``: any).
    of: whose input it is, for errors. Raises InputError.
    """
    kind, of = shown_type(graph, name), of or graph.name
    array = _converted(name, value, kind, of)
    if kind.shape is None:
        return array
    rows = has_rows(graph, name)
    if rows and array.ndim == len(kind.shape) - 1:
        array = array[None]
    default = graph.default(name)
    fits = array.ndim == len(kind.shape)
    for axis, (size, declared) in enumerate(zip(array.shape, kind.shape, strict=False)):
        one = size == 1 and (default is None or default.ndim <= axis or default.shape[axis] == 1)
        if rows and axis == 0:
            fits = fits and (one or size == (batch if batch is not None else declared if isinstance(declared, int) else size))
        elif isinstance(declared, int):
            fits = fits and size == declared
    if not fits:
        told = (
            f"give [{', '.join(map(str, ('1' if batch in (None, 1) else f'1 or {batch}', *kind.shape[1:])))}]" if rows else ""
        )
        raise InputError(f"input {name!r} of {of} has shape {list(np.shape(value))}, the graph takes {kind}", told)
    return array


def _converted(name: str, value: InputValue, kind: TensorType, of: str) -> Array:
    """``value`` in the declared type."""
    takes = f"the graph takes {kind}"
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise InputError(f"input {name!r} of {of} is given {_shown(value)}, whose rows differ in length", takes) from error
    if kind.dtype is None or array.dtype == kind.dtype.numpy:
        return array
    if isinstance(value, np.ndarray) and value.ndim:
        raise InputError(f"input {name!r} of {of} is {array.dtype}, {takes}", "convert it")
    wanted = np.dtype(kind.dtype.numpy)
    if kind.dtype is DType.STRING or array.dtype.kind not in _MEANT.get(wanted.kind, ""):
        raise InputError(f"input {name!r} of {of} is given {_shown(value)}, {takes}", "give numbers of that type")
    made = array.astype(wanted)
    if wanted.kind in "iu" and not np.array_equal(made, array):
        raise InputError(f"input {name!r} of {of} is given {_shown(value)}, {takes}", "a number is too large for that type")
    return made


def _shown(value: object) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 40 else f"{text[:37]}..."


def unknown_input(name: str, names: Iterable[str], of: str) -> InputError:
    """The error for a name that is no input, with the nearest ``names``."""
    known = sorted(names)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"they are {', '.join(known[:8])}" if known else "it takes none"
    return InputError(f"{of} has no input {name!r} that is given from outside", hint)


def optional_inputs(graph: Graph) -> Iterable[str]:
    """Inputs of ``graph`` with a default that a host may give, in their order: not those that say which tokens there are."""
    return [v.name for v in graph.inputs() if graph.role(v.name) is Role.USER and graph.default(v.name) is not None]


def table_rows(graph: Graph, name: str) -> int | None:
    """How many rows the table has that the input ``name`` is looked up in; ``None`` where it is not used so."""
    value = graph.value(name)
    for use in value.uses:
        prim = use.node.prim if use.node is not None else None
        table = prim.operands[0] if prim is not None and prim.op == "gather" and prim.operands[1] == value else None
        shape = None if table is None or isinstance(table, (int, float)) else table.shape
        if shape and isinstance(shape[0], int):
            return shape[0]
    return None


def given_twice(inputs: Mapping[str, object], adapter: Mapping[str, object], path: object) -> None:
    """Raises InputError where a name is in both."""
    for name in inputs:
        if name in adapter:
            raise InputError(f"input {name!r} is given and in the adapter {path}", "leave it out of one of them")
