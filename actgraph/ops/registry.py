"""The op registry: what an actgraph op is, and where all of them are found.

An op is defined once, in a file of this package, and everything else is derived from the definition: the
``torch.library`` schema and fake kernel, the ONNX schema and function body, the verifier's checks, the reference
documentation and the conformance tests. To add one, see CONTRIBUTING.md ("add an op").
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from actgraph.errors import OptionError, VerifyError
from actgraph.ops.dtypes import COMPUTE_FLOATS, DType
from actgraph.ops.shapes import TensorType

if TYPE_CHECKING:
    import torch

    from actgraph.ops.body import BodyBuilder, BodyValue

DOMAIN = "actgraph"
OPSET_VERSION = 1

AttributeValue = int | float | bool | str | tuple[int, ...] | tuple[float, ...]
Attributes = Mapping[str, Any]  # values are AttributeValue; Any keeps bodies readable


class Trait(enum.Enum):
    """What passes may assume of an op."""

    ELEMENTWISE = "elementwise"  # out[i] depends on x[i] (and constants) only
    PER_TOKEN = "per-token"  # reduces over the last axis only
    PER_SAMPLE = "per-sample"  # couples tokens of one batch row
    BATCH_COUPLED = "batch-coupled"  # couples batch rows
    STATEFUL = "stateful"  # reads or writes a slot
    POSITION_AWARE = "position-aware"  # depends on positions or token masks
    FOLDS_AS_BIAS = "foldable as bias"  # adds a constant to its first operand
    FOLDS_AS_LINEAR_MAP = "foldable as linear map"  # multiplies its first operand by a constant matrix


class _Required:
    def __repr__(self) -> str:
        return "required"


REQUIRED: Any = _Required()


@dataclass(frozen=True)
class Operand:
    """One tensor operand. ``same_as`` names the operand whose dtype this one shares."""

    name: str
    doc: str
    dtypes: frozenset[DType] = COMPUTE_FLOATS
    same_as: str = ""
    optional: bool = False
    variadic: bool = False


@dataclass(frozen=True)
class Attribute:
    """One attribute. ``kind`` is the Python type of the value (for lists ``"ints"`` or ``"floats"``).

    ``structural`` attributes select the body (strings, axes): each of their values becomes an overload of the ONNX
    function. The others (thresholds, scales) are passed to one shared body as attribute references.
    """

    name: str
    kind: str  # "int" | "float" | "bool" | "str" | "ints" | "floats"
    doc: str
    default: Any = REQUIRED
    choices: tuple[str, ...] = ()
    structural: bool = True


@dataclass(frozen=True)
class Sample:
    """One case of the conformance grid: shapes and dtypes of the operands plus attributes, with a drawing rule."""

    shapes: tuple[tuple[int, ...] | None, ...]
    attributes: Attributes = field(default_factory=dict)
    dtypes: tuple[DType, ...] = ()  # empty: every dtype that the first operand admits
    draw: Callable[..., tuple[Any, ...]] | None = None  # (rng, shapes, dtype) -> operands, where random normal does not do
    note: str = ""


@dataclass(frozen=True)
class OpDef:
    """One op.

    infer: ``(operand types, attributes) -> output types``, over symbolic shapes; absent operands are ``None``.
    reference: ``(*tensors, **attributes) -> tensor or tuple``, in plain torch ops (differentiable where trained through).
    body: ``(builder, operands, attributes) -> output values``, in standard ONNX ops of ``builder.opset``.
    eager: plain torch code that is faster than the reference on real tensors because it may look at values.
    surrogate: what backward passes differentiate where the reference has no useful gradient (straight-through estimators).
    """

    name: str
    doc: str
    inputs: tuple[Operand, ...]
    outputs: tuple[str, ...]
    infer: Callable[[Sequence[TensorType | None], Attributes], list[TensorType]]
    reference: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]
    body: Callable[[BodyBuilder, Sequence[BodyValue | None], Attributes], Sequence[BodyValue]]
    attributes: tuple[Attribute, ...] = ()
    traits: frozenset[Trait] = frozenset()
    samples: tuple[Sample, ...] = ()
    min_opset: int = 18
    version: int = 1
    differentiable: bool = True  # False: no gradient flows (integer results)
    exact: str = ""  # what every engine must give alike: "bits", "values" (the sign of zero is free), "" (rounding is free)
    eager: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]] | None = None
    surrogate: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]] | None = None  # differentiated instead of the reference

    @property
    def qualified_name(self) -> str:
        """``actgraph.<name>``: how canonical text and passes spell the op."""
        return f"{DOMAIN}.{self.name}"

    @property
    def onnx_name(self) -> str:
        """The ONNX ``op_type``: ``fake_quant`` is ``FakeQuant``."""
        return "".join(part.capitalize() for part in self.name.split("_"))

    def complete(self, attributes: Mapping[str, Any]) -> dict[str, AttributeValue]:
        """``attributes`` checked and with defaults filled in, in the order of definition.

        Raises OptionError for an unknown, missing or ill-typed attribute.
        """
        unknown = sorted(set(attributes) - {a.name for a in self.attributes})
        if unknown:
            raise OptionError(
                f"{self.qualified_name} has no attribute {unknown[0]!r}",
                f"its attributes are {', '.join(a.name for a in self.attributes) or 'none'}",
            )
        return {a.name: _check(self, a, attributes.get(a.name, a.default)) for a in self.attributes}

    def result_types(self, operand_types: Sequence[TensorType | None], attributes: Attributes) -> list[TensorType]:
        """The output types of a call, after checking it: operand count, presence and element types, then ``infer``.

        attributes: complete ones (see ``complete``). Raises VerifyError naming the operand that does not fit.
        """
        types = list(operand_types)
        variadic = bool(self.inputs) and self.inputs[-1].variadic
        if not variadic:
            if len(types) > len(self.inputs):
                raise VerifyError(f"{self.qualified_name} takes {len(self.inputs)} operands, not {len(types)}")
            types += [None] * (len(self.inputs) - len(types))
        for index, kind in enumerate(types):
            operand = self.inputs[min(index, len(self.inputs) - 1)]
            if kind is None and not operand.optional:
                raise VerifyError(f"{self.qualified_name} needs its operand {operand.name!r}", operand.doc)
            if kind is not None and kind.dtype is not None and kind.dtype not in operand.dtypes:
                raise VerifyError(
                    f"operand {operand.name!r} of {self.qualified_name} cannot be {kind.dtype}",
                    f"it takes {', '.join(sorted(operand.dtypes))}",
                )
        return self.infer(types, attributes)


_KINDS: dict[str, Callable[[Any], AttributeValue]] = {
    "int": int, "float": lambda v: shortest(v), "bool": bool, "str": str,
    "ints": lambda v: tuple(int(i) for i in v), "floats": lambda v: tuple(shortest(i) for i in v),
}  # fmt: skip


def shortest(value: Any) -> float:
    """The shortest decimal that names the float32 nearest to ``value``: how float attributes are held and printed.

    ONNX stores float attributes in single precision; with this both dialects hold (and print) the same number.
    """
    with np.errstate(over="ignore"):
        return float(str(np.float32(value)))


def single(value: Any) -> float:
    """The float32 nearest to ``value``, exactly: what a float attribute means, in references as in ONNX."""
    with np.errstate(over="ignore"):
        return float(np.float32(value))


def _check(op: OpDef, attribute: Attribute, value: Any) -> AttributeValue:
    where = f"attribute {attribute.name!r} of {op.qualified_name}"
    if value is REQUIRED:
        raise OptionError(f"{where} is missing", attribute.doc)
    try:
        result = _KINDS[attribute.kind](value)
    except (TypeError, ValueError) as error:
        raise OptionError(f"{where} must be {attribute.kind}, not {value!r}", attribute.doc) from error
    if attribute.choices and result not in attribute.choices:
        raise OptionError(f"{where} must be one of {', '.join(attribute.choices)}, not {value!r}", attribute.doc)
    return result


@dataclass(frozen=True)
class Kernel:
    """An implementation of an op for one engine and device, registered by ``actgraph.runtime``.

    claims: ``(operand types, attributes) -> bool``, asked per node before the engine sees the graph.
    implementation: what the engine calls; for the engine ``"torch"`` it takes what the reference takes.
    """

    op: str
    name: str  # "numba", "triton" ...
    engine: str  # "torch" or "onnxruntime"
    device: str  # "cpu" or "cuda"
    claims: Callable[[Sequence[TensorType | None], Attributes], bool]
    implementation: Callable[..., Any]


_OPS: dict[str, OpDef] = {}
_KERNELS: list[Kernel] = []


def register_kernel(kernel: Kernel) -> Kernel:
    """Add a kernel. Later ones are asked first."""
    _KERNELS.insert(0, kernel)
    return kernel


def kernels(op: str = "", engine: str = "", device: str = "") -> list[Kernel]:
    """The registered kernels of an op, engine and device (empty: of any), in the order in which they are asked."""
    return [
        k
        for k in _KERNELS
        if (not op or k.op == op) and (not engine or k.engine == engine) and (not device or k.device == device)
    ]


def register(op: OpDef) -> OpDef:
    """Add ``op`` to the registry. Raises ValueError if the name is taken by another definition."""
    if op.name in _OPS and _OPS[op.name] is not op:
        raise ValueError(f"op {op.qualified_name} is registered already")
    names = [o.name for o in op.inputs] + [a.name for a in op.attributes]
    if len(set(names)) != len(names):
        raise ValueError(f"op {op.qualified_name} uses one name for two operands or attributes: {', '.join(names)}")
    _OPS[op.name] = op
    return op


def get_op(name: str) -> OpDef:
    """The op called ``name`` (``"shift"``, ``"actgraph.shift"`` or the ONNX spelling ``"Shift"``). Raises OptionError."""
    from actgraph import ops

    ops.load_all()
    short = name.removeprefix(f"{DOMAIN}.")
    if short in _OPS:
        return _OPS[short]
    for op in _OPS.values():
        if op.onnx_name == short:
            return op
    raise OptionError(f"there is no op {name!r}", f"ops are {', '.join(sorted(_OPS))}")


def all_ops() -> list[OpDef]:
    """Every registered op, by name."""
    from actgraph import ops

    ops.load_all()
    return [_OPS[name] for name in sorted(_OPS)]
