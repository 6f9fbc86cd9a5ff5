"""Symbolic shapes: tuples of sizes, where a size is an ``int``, a canonical expression such as ``"batch"`` or
``"2*seq + 1"`` over dimension names, or ``None`` when nothing is known.

Expressions are kept as text so that both dialects, files and canonical text share them; arithmetic goes through sympy.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

from actgraph.ops.dtypes import DType

Dim = int | str | None
Shape = tuple[Dim, ...]


class TensorType(NamedTuple):
    """What is known of a value: its element type and symbolic shape (``None``: unknown)."""

    dtype: DType | None
    shape: Shape | None

    def __str__(self) -> str:
        dtype = self.dtype.value if self.dtype is not None else "?"
        return f"{dtype}[{', '.join('?' if d is None else str(d) for d in self.shape)}]" if self.shape is not None else dtype

    @property
    def rank(self) -> int | None:
        return None if self.shape is None else len(self.shape)


UNKNOWN = TensorType(None, None)


@functools.lru_cache(maxsize=4096)
def canonical_dim(expression: str) -> Dim:
    """The canonical form of a size expression: ``"seq+1 - 1"`` gives ``"seq"``, ``"4"`` gives 4.

    Text that sympy cannot read (names with dots or spaces) is kept as it is.
    """
    expression = expression.strip()
    if expression.isidentifier():
        return expression
    try:
        return int(expression)
    except ValueError:
        pass
    import sympy

    names = set(_identifiers(expression)) - {"Max", "Min", "Mod", "floor", "ceiling", "FloorDiv"}
    scope: dict[str, object] = {name: sympy.Symbol(name, integer=True, positive=True) for name in names}
    scope["FloorDiv"] = lambda a, b: sympy.floor(a / b)
    try:
        value = sympy.sympify(expression, locals=scope)
        value = sympy.expand(value)
    except (sympy.SympifyError, TypeError, SyntaxError, AttributeError):
        return expression
    return int(value) if value.is_Integer else str(value)


def _identifiers(text: str) -> list[str]:
    import re

    return re.findall(r"[A-Za-z_]\w*", text)


def dim_mul(left: Dim, right: Dim) -> Dim:
    """The product of two sizes."""
    if left is None or right is None:
        return None
    if isinstance(left, int) and isinstance(right, int):
        return left * right
    return canonical_dim(f"({left})*({right})")


def dim_add(left: Dim, right: Dim) -> Dim:
    """The sum of two sizes."""
    if left is None or right is None:
        return None
    if isinstance(left, int) and isinstance(right, int):
        return left + right
    return canonical_dim(f"({left})+({right})")


def broadcast(shapes: Sequence[Shape | None]) -> Shape | None:
    """The numpy broadcast of several shapes; ``None`` where one is unknown. Raises ValueError on a known mismatch."""
    if any(shape is None for shape in shapes):
        return None
    known = [shape for shape in shapes if shape is not None]
    rank = max((len(shape) for shape in known), default=0)
    result: list[Dim] = []
    for axis in range(-rank, 0):
        sizes = {shape[axis] for shape in known if len(shape) >= -axis} - {1}
        if not sizes:
            result.append(1)
            continue
        fixed = sorted(size for size in sizes if isinstance(size, int))
        if len(fixed) > 1:
            raise ValueError(f"cannot broadcast sizes {fixed} of {known}")
        if fixed:
            result.append(fixed[0])
        else:
            result.append(next(iter(sizes)) if len(sizes) == 1 else None)
    return tuple(result)
