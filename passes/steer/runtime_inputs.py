"""Strengths, angles and vectors that the host gives with each call instead of the file.

Each becomes an optional input of the graph, one number (vector, index) for each row of the batch, whose default leaves the
model as it is, bit for bit: a file with such inputs is the unsteered model to a host that knows nothing of them. Defaults have
size 1 on every axis but the last of vectors, so one value may also be given for all rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from actgraph.graph import Editor, Graph, Role
from actgraph.graph.context import token_dims
from actgraph.ops.dtypes import DType
from actgraph.ops.shapes import Shape, TensorType

if TYPE_CHECKING:
    from actgraph.graph import Value

#: What an option says to be such an input.
INPUT = "input"


def row_input(
    editor: Editor, graph: Graph, name: str, *, width: int | None = None, default: float = 0, dtype: DType = DType.F32
) -> Value:
    """A new optional input ``name`` of ``[batch]`` (``[batch, width]`` for vectors), ``default`` where nobody gives it.

    Where the graph has no batch it is ``[1]`` (``[1, width]``). A taken name gets a number: ``steer.scale``, ``steer.scale_1``.
    """
    dims = token_dims(graph)
    batch: Any = dims[0] if dims else 1
    shape = (batch,) if width is None else (batch, width)
    values = np.full((1,) if width is None else (1, width), default, dtype.numpy)
    taken = {value.name for value in graph.inputs()}
    unique = next(n for n in (name, *(f"{name}_{i}" for i in range(1, 1 << 16))) if n not in taken)
    return editor.add_input(unique, TensorType(dtype, shape), role=Role.USER, default=values)


def why_no_rows(graph: Graph, shape: Shape, axis: int) -> str:
    """Why a site of ``shape`` has no row for each of the batch's; empty where it has, and in graphs without a batch."""
    dims = token_dims(graph)
    if not dims or (shape and shape[0] is not None and shape[0] == dims[0] and axis % len(shape) != 0):
        return ""
    shown = ", ".join("?" if size is None else str(size) for size in shape)
    return f"what is given at run time is for each row of the batch ({dims[0]}), which is not the first axis of [{shown}]"


def looked_up(editor: Editor, table: Sequence[float], index: Value) -> Value:
    """The number of ``table`` for each row, ``[batch, 1]``; index: ``[batch]``, which of them."""
    column = np.asarray(table, np.float32)[:, None]
    return editor.insert("gather", [column, index], {"axis": 0}).output


def not_zero(editor: Editor, value: Value) -> Value:
    """1 for rows of ``value [batch, width]`` that are not all zeros (in their squares), else 0; ``[batch, 1]``."""
    square = editor.insert("mul", [value, value]).output
    total = editor.insert("sum", [square], {"axes": (1,), "keepdims": True}).output
    truth = editor.insert("cast", [total], {"to": DType.BOOL}).output
    return editor.insert("cast", [truth], {"to": DType.F32}).output


def per_token(editor: Editor, value: Value, tokens: int) -> Value:
    """``value [batch]`` or ``[batch, 1]`` as ``[batch, 1, ...]``, to be broadcast to ``tokens`` axes of tokens."""
    if value.shape is not None and len(value.shape) == tokens:
        return value
    return editor.insert("reshape", [value], {"shape": (-1, *[1] * (tokens - 1))}).output


def per_channel(editor: Editor, value: Value, rank: int, axis: int) -> Value:
    """``value [batch, width]`` as ``[batch, 1, ..., width, ..., 1]`` of ``rank`` axes, ``axis`` that of the channels."""
    place = axis % rank
    shape: list[int] = [-1] + [1] * (rank - 1)
    shape[place] = int(value.shape[1]) if value.shape and isinstance(value.shape[1], int) else -1
    return editor.insert("reshape", [value], {"shape": tuple(shape)}).output
