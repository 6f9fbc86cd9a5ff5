"""FX values and our types: fake tensors, symbolic sizes under the user's names, and tensors as numpy arrays."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
import sympy
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from actgraph.graph.graph import Array
from actgraph.ops.dtypes import DType
from actgraph.ops.shapes import UNKNOWN, Dim, TensorType, canonical_dim


def size_expression(text: str) -> sympy.Expr:
    """A size given as text (``batch``, ``2*seq + 1``, ``seq/4``) over positive integer symbols."""
    if text.isidentifier():
        return sympy.Symbol(text, integer=True, positive=True)
    names = set(re.findall(r"[A-Za-z_]\w*", text)) - {"floor", "Max", "Min", "Mod"}
    scope = {name: sympy.Symbol(name, integer=True, positive=True) for name in names}
    return sympy.sympify(text.replace("//", "/"), locals=scope)


class DimNames:
    """The user's names of torch's size symbols: ``s43`` is ``batch``.

    A symbol may stand for an expression of a name: where the model demands that ``seq`` is four times a symbol, the symbol is
    called ``seq/4``, and the input keeps its name.
    """

    def __init__(self, names: dict[sympy.Symbol, str] | None = None) -> None:
        self.names: dict[sympy.Symbol, str] = dict(names or {})
        self._cache: dict[sympy.Expr, Dim] = {}

    def copy(self) -> DimNames:
        twin = DimNames(self.names)
        twin._cache = dict(self._cache)
        return twin

    def set(self, symbol: sympy.Symbol, name: str) -> None:
        self.names[symbol] = name
        self._cache.clear()

    def dim(self, size: Any) -> Dim:
        """One size of a fake tensor: an ``int``, or a ``SymInt`` as canonical text."""
        if isinstance(size, int):
            return size
        expression = size.node.expr
        if expression not in self._cache:
            self._cache[expression] = self._render(expression)
        return self._cache[expression]

    def _render(self, expression: sympy.Expr) -> Dim:
        if expression.is_Integer:
            return int(expression)
        if expression.is_Symbol:
            return self.names.get(expression, str(expression))
        renamed = expression.xreplace({symbol: size_expression(name) for symbol, name in self.names.items()})
        return canonical_dim(str(renamed))

    def type_of(self, value: Any) -> TensorType:
        """The type of one ``meta["val"]``: tensors, and sizes as scalars of rank 0."""
        if isinstance(value, torch.Tensor):
            return TensorType(DType.of(value.dtype), tuple(self.dim(size) for size in value.shape))
        if isinstance(value, (torch.SymBool, bool)):
            return TensorType(DType.BOOL, ())
        if isinstance(value, (torch.SymInt, int)):
            return TensorType(DType.I64, ())
        if isinstance(value, (torch.SymFloat, float)):
            return TensorType(DType.F64, ())
        return UNKNOWN


def new_symbol(env: ShapeEnv, name: str, hint: int | None, low: int = 0, high: int | None = None) -> sympy.Symbol:
    """A new size symbol between ``low`` and ``high``; without a ``hint`` one that depends on data."""
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic
    from torch.utils._sympy.numbers import int_oo
    from torch.utils._sympy.value_ranges import ValueRanges

    if hint is None:
        symbol: sympy.Symbol = env.create_unbacked_symint().node.expr
    else:
        source = ConstantSource(f"actgraph_{name}")
        symbol = env.create_symbol(
            hint, source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None, do_not_specialize_zero_one=True
        )
    env.var_to_range[symbol] = ValueRanges(low, int_oo if high is None else high)
    return symbol


def find_fake_mode(values: Iterable[Any]) -> FakeTensorMode:
    """The fake mode of most of the values (the first that has symbolic sizes, if any); a new one where there is none."""
    counts: dict[FakeTensorMode, int] = {}
    for value in values:
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, FakeTensor):
                if any(isinstance(size, torch.SymInt) for size in item.shape):
                    return item.fake_mode
                counts[item.fake_mode] = counts.get(item.fake_mode, 0) + 1
    if counts:
        return max(counts, key=counts.__getitem__)
    return FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)


def refake(value: Any, fake_mode: FakeTensorMode) -> Any:
    """``value`` (static sizes) in another fake mode: ops refuse operands of different modes."""
    if isinstance(value, (tuple, list)):
        return type(value)([refake(item, fake_mode) for item in value])
    if not isinstance(value, torch.Tensor) or (isinstance(value, FakeTensor) and value.fake_mode is fake_mode):
        return value
    with fake_mode:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


def same_type(left: Any, right: Any) -> bool:
    """Whether two ``meta["val"]`` have equal dtype, sizes and strides (nothing downstream can tell them apart)."""
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        return (
            left.dtype == right.dtype
            and left.dim() == right.dim()
            and all(map(_same_size, left.shape, right.shape))
            and all(map(_same_size, left.stride(), right.stride()))
        )
    if isinstance(left, (tuple, list)) and isinstance(right, (tuple, list)):
        return len(left) == len(right) and all(map(same_type, left, right))
    return type(left) is type(right) and _same_size(left, right)


def _same_size(left: Any, right: Any) -> bool:
    """Equality that never adds a guard."""
    symbolic = (torch.SymInt, torch.SymFloat, torch.SymBool)
    if isinstance(left, symbolic) or isinstance(right, symbolic):
        if not (isinstance(left, symbolic) and isinstance(right, symbolic)):
            return False
        return bool(left.node.expr == right.node.expr)
    return bool(left == right)


def array_of(tensor: torch.Tensor) -> Array:
    """``tensor`` as a numpy array that shares its memory (bfloat16 and float8 through ml_dtypes)."""
    tensor = tensor.detach().cpu()
    dtype = DType.of(tensor.dtype)
    if dtype in (DType.BF16, DType.F8E4M3, DType.F8E5M2):
        raw = torch.int16 if dtype.bits == 16 else torch.int8
        return tensor.contiguous().view(raw).numpy().view(dtype.numpy)
    return tensor.resolve_conj().resolve_neg().numpy()


def tensor_of(array: Array) -> torch.Tensor:
    """``array`` as a tensor that shares its memory where numpy's layout allows it. Read-only by contract."""
    array = np.asarray(array)
    if any(stride < 0 for stride in array.strides) or not array.dtype.isnative:
        array = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("="))
    dtype = DType.of(array.dtype)
    if array.flags.writeable and dtype not in (DType.BF16, DType.F8E4M3, DType.F8E5M2):
        return torch.from_numpy(array)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable.*")
        if dtype in (DType.BF16, DType.F8E4M3, DType.F8E5M2):
            raw = np.int16 if dtype.bits == 16 else np.int8
            return torch.from_numpy(np.ascontiguousarray(array).view(raw)).view(dtype.torch).reshape(array.shape)
        return torch.from_numpy(array)
