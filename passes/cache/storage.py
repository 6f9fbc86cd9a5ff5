"""In which numbers a cache is stored: as they are computed, in half precision, or in 8 bits with a scale per token and head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from actgraph.errors import PassError
from actgraph.graph import Editor, Value
from actgraph.ops.dtypes import DType

Storage = Literal["same", "float16", "int8"]
#: The tensors that are kept for one of keys or values, by what their names end in.
PARTS = {"same": ("",), "float16": ("",), "int8": ("", "_scale")}


def stored(editor: Editor, new: Value, storage: Storage) -> list[Value]:
    """``new`` [batch, kv_heads, tokens, head] as it is stored: one tensor for each of ``PARTS``.

    int8 is symmetric: codes of the shape of ``new`` and their scales [batch, kv_heads, tokens, 1] in float32.
    """
    if storage == "float16" and new.dtype is not DType.F16:
        return [editor.insert("cast", [new], {"to": DType.F16}).output]
    if storage != "int8":
        return [new]
    scale = editor.insert("actgraph.token_scale", [new]).output
    codes = editor.insert("actgraph.quantize", [new, scale], {"dtype": "i8", "axis": -1, "block_size": _head(new)}).output
    return [codes, scale]


def read(editor: Editor, parts: Sequence[Value], storage: Storage, dtype: DType) -> Value:
    """The inverse of ``stored`` for all tokens, in the type that the attention computes in."""
    if storage == "int8":
        codes, scale = parts
        attributes = {"dtype": dtype.value, "axis": -1, "block_size": _head(codes)}
        return editor.insert("actgraph.dequantize", [codes, scale], attributes).output
    (only,) = parts
    return only if only.dtype is dtype else editor.insert("cast", [only], {"to": dtype}).output


def _head(x: Value) -> int:
    size = x.shape[-1] if x.shape is not None else None
    if not isinstance(size, int):
        raise PassError(f"the head of {x.name} ({x.type}) has no known size", "int8 has one scale for each head")
    return size
