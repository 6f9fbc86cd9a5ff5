"""What a kernel is: functions over a frame, and the element types and attributes that they are for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from actgraph.ops.dtypes import DType
from actgraph.ops.registry import OpDef, get_op
from actgraph.ops.shapes import TensorType
from actgraph.runtime.native.library import RANK

Function = Callable[..., Any]
Claims = Callable[[Sequence[TensorType | None], dict[str, Any]], bool]


@dataclass(frozen=True)
class Stage:
    """One step of a kernel: called once, or for each part by several threads."""

    name: str
    function: Function
    parallel: bool = False


@dataclass(frozen=True)
class NumbaKernel:
    """One kernel of an op.

    types: element type of each operand in ``OpKernels.key_operands`` (``None``: absent). attributes: the values of those in
    ``OpKernels.key_attributes``. shape: sets the shapes of the outputs and checks the inputs. scratch: bytes of memory wanted.
    """

    types: tuple[DType | None, ...]
    attributes: tuple[Any, ...]
    shape: Stage
    stages: tuple[Stage, ...]
    scratch: Stage | None = None


@dataclass(eq=False)
class OpKernels:
    """The kernels of one op.

    key_operands, key_attributes: what a kernel is chosen by. errors: the texts of the numbers that functions return, from 1 on.
    operands: the element type of each operand that is always the same (``None``: any). result: the type of the output.
    claims: ``(types of all operands, complete attributes) -> whether it is for them``, where more than the key decides.
    result_attribute: the attribute that names the type of the outputs, where there is one; written: the type that kernels write
    for each of its choices, in their order. Sessions call kernels that write ``result``.
    refused: types of operands that the op takes and its kernels do not.
    as_they_are: operands of several types that kernels tell apart by themselves: nothing but float64 is converted for them.
    """

    op: str
    key_operands: tuple[int, ...]
    key_attributes: tuple[str, ...]
    errors: tuple[str, ...]
    operands: tuple[DType | None, ...]
    result: DType = DType.F32
    claims: Claims | None = None
    result_attribute: str = ""
    written: Mapping[str, DType] = field(default_factory=dict)
    refused: Mapping[int, frozenset[DType]] = field(default_factory=dict)
    as_they_are: tuple[int, ...] = ()
    kernels: list[NumbaKernel] = field(default_factory=list)

    @property
    def definition(self) -> OpDef:
        return get_op(self.op)

    def accepted(self, operand: int) -> frozenset[DType]:
        """The element types of an operand that kernels read, by themselves or after the library's conversions."""
        return self.definition.inputs[operand].dtypes - self.refused.get(operand, frozenset())

    def find(self, types: Sequence[TensorType | None], attributes: dict[str, Any]) -> NumbaKernel | None:
        """The kernel for operands of these types (``None``: absent) and complete attributes, or ``None``."""
        types = [*types, *[None] * (len(self.operands) - len(types))]
        kinds = [None if kind is None else kind.dtype for kind in types]
        for kind, wanted in zip(kinds, self.operands, strict=True):
            if kind is not None and wanted is not None and kind is not wanted:
                return None
        if any(kind is not None and kind.rank is not None and kind.rank > RANK for kind in types):
            return None
        if self.claims is not None and not self.claims(types, attributes):
            return None
        key = tuple(kinds[i] for i in self.key_operands), tuple(attributes[name] for name in self.key_attributes)
        return next((kernel for kernel in self.kernels if (kernel.types, kernel.attributes) == key), None)

    def word(self, name: str, value: Any) -> int:
        """An attribute as it stands in frames, except for floats: an integer, or the place of a string among its choices.

        A list of axes stands there as a set: bit k for axis -k, bit 16 + k for axis k. Other lists do not stand in frames:
        kernels are for one value of them (see ``claims``).
        """
        attribute = next(a for a in self.definition.attributes if a.name == name)
        if attribute.kind == "floats":
            return 0
        if attribute.kind == "ints":
            found = 0
            for axis in value:
                found |= 1 << (-axis if axis < 0 else 16 + axis) if -16 < axis < 16 else 1
            return found
        return attribute.choices.index(value) if attribute.kind == "str" else int(value)
