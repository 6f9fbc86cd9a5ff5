"""Mask fills: finite numbers that stand for "never", such as -3.4e38 in a mask that is added to attention scores.

Beyond the range of a narrower type they would become infinite, and a row of nothing else would be NaN after its softmax.
They become the largest finite number of that type instead, as transformers fills masks with ``torch.finfo(dtype).min``.
Infinities stay what they are.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from actgraph.graph import Editor, Graph, Node, Value
from actgraph.graph.graph import Array
from actgraph.ops.dtypes import DType

#: What may happen to a mask, or to the number in it, on the way to the scores.
_MASKING = frozenset({
    "where", "add", "sub", "mul", "min", "max", "clip", "cast", "identity", "reshape", "expand", "transpose", "slice", "index",
    "concat", "pad", "repeat", "sdpa",
})  # fmt: skip
#: What is added to scores, or multiplies a mask, to say "never" is no larger than this: -1e6, -1e9, -1e30 ...
_NEVER = -1e6
_FLOATS = (DType.F16, DType.BF16, DType.F32, DType.F64)


def limit(dtype: DType) -> float:
    """The largest finite number of a float type."""
    return float(ml_dtypes.finfo(dtype.numpy).max)  # type: ignore[no-untyped-call]


def becomes_infinite(data: Array, dtype: DType) -> Array:
    """Where ``data`` is finite and its rounding to ``dtype`` is not."""
    with np.errstate(over="ignore"):
        rounded = data.astype(dtype.numpy).astype(np.float64)
    return np.isinf(rounded) & np.isfinite(data.astype(np.float64))


def clamped(data: Array, dtype: DType) -> Array:
    """``data`` as ``dtype``, with finite numbers beyond its range at the end of the range."""
    with np.errstate(over="ignore"):
        rounded = data.astype(dtype.numpy)
    beyond = becomes_infinite(data, dtype)
    ends = np.where(data.astype(np.float64) < 0, -limit(dtype), limit(dtype)).astype(dtype.numpy)
    return np.asarray(np.where(beyond, ends, rounded), dtype=dtype.numpy)


def is_mask(parameter: Value, data: Array, beyond: Array) -> bool:
    """Whether the numbers of a parameter that are ``beyond`` a range are mask fills, by what they are and who reads them.

    They are when only operations on masks read it, and they are the ends of some float type's range, or it holds nothing but
    zeros and one negative number, or one number that a ``where`` chooses.
    """
    prims = [use.node.prim if use.node is not None else None for use in parameter.uses]
    if not prims or any(prim is None or prim.op not in _MASKING for prim in prims):
        return False
    numbers = np.unique(data[beyond].astype(np.float64))
    if all(_is_end(float(number)) for number in numbers):
        return True
    if len(numbers) != 1:
        return False
    if all(prim is not None and prim.op == "where" for prim in prims):
        return data.size == 1 or bool(numbers[0] < 0)
    return bool(numbers[0] < 0) and bool(((data == 0) | beyond).all())


def clamp_numbers(editor: Editor, graph: Graph, dtype: DType) -> int:
    """Clamp the fills that are written into calls (``where(mask, x, -3.4e38)``, ``full(-3.4e38)``). Returns how many."""
    count = 0
    for node in list(graph.nodes()):
        prim = node.prim
        kind = node.outputs[0].dtype if node.outputs else None
        if prim is None or kind is None or kind not in _FLOATS:
            continue
        if prim.op == "full" and _is_fill("where", prim.attributes.get("value"), dtype):
            bounds = [np.asarray(bound, kind.numpy) for bound in (-limit(dtype), limit(dtype))]
            _replace(editor, node, "clip", [node.outputs[0], *bounds])
        elif prim.op in ("where", "mul", "add", "sub", "clip") and any(_is_fill(prim.op, o, dtype) for o in prim.operands):
            operands: list[Value | Array | None] = []
            for operand in prim.operands:
                if operand is None or isinstance(operand, Value):
                    operands.append(operand)
                    continue
                number = float(np.clip(operand, -limit(dtype), limit(dtype))) if _is_fill(prim.op, operand, dtype) else operand
                operands.append(np.asarray(number, kind.numpy))
            _replace(editor, node, prim.op, operands)
        else:
            continue
        count += 1
    if count:
        editor.erase_dead()  # the calls with the old numbers would not run in the new type
    return count


def _replace(editor: Editor, node: Node, op: str, operands: list[Value | Array | None]) -> None:
    old = node.outputs[0]
    new = editor.insert(op, operands, after=node, like=node, name=f"{node.name}_clamped")
    editor.redirect(old, new.output, [use for use in old.uses if use.node != new])


def _is_fill(op: str, number: object, dtype: DType) -> bool:
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        return False
    if not becomes_infinite(np.asarray(number, np.float64), dtype).any():
        return False
    return op == "where" or number <= _NEVER or _is_end(float(number))


def _is_end(number: float) -> bool:
    """Whether a number is the largest or smallest finite one of a float type, as float32 rounds it."""
    return any(np.isclose(abs(number), limit(dtype), rtol=1e-6, atol=0) for dtype in _FLOATS)
