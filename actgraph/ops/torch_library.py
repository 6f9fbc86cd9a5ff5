"""The ops as ``torch.library`` ops: schema, reference implementation, fake kernel and autograd from one ``OpDef``.

``register_all`` defines ``actgraph::<name>`` for every op. The implementation is the reference
(``CompositeExplicitAutograd``, so that tracing keeps the node whole), the fake kernel is the reference on fake tensors
after the op's own ``infer`` has checked them, and backward differentiates the reference (or the op's ``surrogate``)
anew from the saved inputs. ``actgraph.runtime`` adds kernels for devices; they take precedence over the reference.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from actgraph.ops.dtypes import DType
from actgraph.ops.registry import DOMAIN, REQUIRED, Attribute, OpDef, all_ops, get_op
from actgraph.ops.shapes import Dim, TensorType, canonical_dim

_KINDS = {"int": "int", "float": "float", "bool": "bool", "str": "str", "ints": "int[]", "floats": "float[]"}


def torch_schema(op: OpDef) -> str:
    """The schema: operands by position, attributes by keyword.

    Infinite defaults do not exist in torch schemas: such an attribute is required there (editors always pass it).
    """
    operands = [_operand_schema(o.name, o.optional, o.variadic) for o in op.inputs]
    attributes = [_attribute_schema(a) for a in op.attributes]
    arguments = ", ".join([*operands, *(["*", *attributes] if attributes else [])])
    results = "Tensor" if len(op.outputs) == 1 else f"({', '.join('Tensor' for _ in op.outputs)})"
    return f"({arguments}) -> {results}"


def _operand_schema(name: str, optional: bool, variadic: bool) -> str:
    if variadic:
        return f"Tensor[] {name}"
    return f"Tensor? {name}=None" if optional else f"Tensor {name}"


def _attribute_schema(attribute: Attribute) -> str:
    text = f"{_KINDS[attribute.kind]} {attribute.name}"
    default = attribute.default
    if default is REQUIRED or (isinstance(default, float) and not math.isfinite(default)):
        return text
    if attribute.kind == "str":
        return f'{text}="{default}"'
    if attribute.kind in ("ints", "floats"):
        return f"{text}=[{', '.join(map(repr, default))}]"
    return f"{text}={default!r}"


_LIBRARY: torch.library.Library | None = None


def register_all() -> None:
    """Define every op of the registry in torch. Calling it again defines only what is new."""
    global _LIBRARY
    if _LIBRARY is None:
        _LIBRARY = torch.library.Library(DOMAIN, "DEF")  # type: ignore[no-untyped-call]  # kept for the life of the process
    for op in all_ops():
        if not hasattr(getattr(torch.ops, DOMAIN), op.name):
            _define(_LIBRARY, op)


def torch_op(name: str) -> torch._ops.OpOverload:
    """The overload of an op: ``torch_op("shift")`` is ``torch.ops.actgraph.shift.default``. Raises OptionError."""
    op = get_op(name)
    register_all()
    overload: torch._ops.OpOverload = getattr(getattr(torch.ops, DOMAIN), op.name).default
    return overload


def op_of(target: Any) -> OpDef | None:
    """The op that a call target of an FX node stands for, or ``None``."""
    if isinstance(target, torch._ops.OpOverload) and target.namespace == DOMAIN:
        return get_op(target._schema.name.split("::")[1])
    return None


def decomposition_table() -> dict[torch._ops.OpOverload, Callable[..., Any]]:
    """Overload to reference, for ``ExportedProgram.run_decompositions``: files saved with it hold ATen ops only."""
    return {torch_op(op.name): op.reference for op in all_ops()}


def result_fakes(overload: torch._ops.OpOverload, operands: Sequence[Any], attributes: dict[str, Any]) -> Any:
    """What a call gives, as empty tensors, from the op's ``infer`` alone; ``None`` where a size is none of the operands'.

    An order of magnitude cheaper than the reference on fake tensors, for graphs that are edited node by node. Call it under the
    operands' fake mode. Raises VerifyError for operands that the op refuses.
    """
    op = get_op(overload._schema.name.partition("::")[2])
    results = op.result_types(operand_types(operands), op.complete(attributes))
    tensors = [t for o in operands for t in (o if isinstance(o, (list, tuple)) else [o]) if t is not None]
    sizes = {_dim(size): size for tensor in tensors for size in tensor.shape}
    made = []
    for kind in results:
        if kind.dtype is None or kind.shape is None:
            return None
        shape = [size if isinstance(size, int) else sizes.get(size) for size in kind.shape]
        if None in shape:
            return None
        like = next((t for t in tensors if tuple(map(_dim, t.shape)) == kind.shape), None)
        if like is not None:  # elementwise code keeps the layout
            made.append(torch.empty_like(like, dtype=kind.dtype.torch))
        else:
            made.append(torch.empty(shape, dtype=kind.dtype.torch))  # type: ignore[arg-type]
    return made[0] if len(op.outputs) == 1 else tuple(made)


def operand_types(operands: Sequence[Any]) -> list[TensorType | None]:
    """The types of torch tensors (real or fake), as ``OpDef.infer`` takes them; variadic operands are flattened."""
    types: list[TensorType | None] = []
    for operand in operands:
        if isinstance(operand, (list, tuple)):
            types.extend(operand_types(operand))
        else:
            types.append(None if operand is None else TensorType(DType.of(operand.dtype), tuple(map(_dim, operand.shape))))
    return types


def _dim(size: int | torch.SymInt) -> Dim:
    return size if isinstance(size, int) else canonical_dim(str(size))


def reference_call(op: OpDef) -> Callable[..., Any]:
    """What a call of ``op`` does on any device: its eager code or reference, whatever kernels the dispatcher knows."""
    compute = op.eager or op.reference

    @functools.wraps(op.reference)
    def implementation(*operands: Any, **attributes: Any) -> Any:
        check_once(op, operands, attributes)
        return fresh(compute(*operands, **attributes), operands)

    return implementation


def _define(library: torch.library.Library, op: OpDef) -> None:
    torch.library.define(f"{DOMAIN}::{op.name}", torch_schema(op), lib=library, tags=(torch.Tag.pt2_compliant_tag,))

    def fake(*operands: Any, **attributes: Any) -> Any:
        _check(op, operands, attributes)
        return fresh(op.reference(*operands, **attributes), operands)

    library.impl(op.name, reference_call(op), "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"{DOMAIN}::{op.name}", fake, lib=library)
    if op.differentiable:
        backward, setup = _autograd(op)
        torch.library.register_autograd(f"{DOMAIN}::{op.name}", backward, setup_context=setup, lib=library)


def _check(op: OpDef, operands: Sequence[Any], attributes: dict[str, Any]) -> None:
    """Refuse what the op's rules refuse, instead of letting torch broadcast it to something unmeant."""
    types = operand_types(operands)
    op.result_types(types, op.complete(attributes))


#: Calls that passed ``_check`` already: eager code calls an op with the same few shapes over and over.
_CHECKED: set[Any] = set()


def check_once(op: OpDef, operands: Sequence[Any], attributes: dict[str, Any]) -> None:
    """Refuse what the op's rules refuse; what passed before is not looked at again."""
    try:
        key = (op.name, *[t if t is None else (t.dtype, t.shape) for t in operands], *map(str, attributes.items()))
    except AttributeError:  # a list of tensors
        return _check(op, operands, attributes)
    if key not in _CHECKED:
        _check(op, operands, attributes)
        if len(_CHECKED) > 4096:
            _CHECKED.clear()
        _CHECKED.add(key)
    return None


def fresh(result: Any, operands: Sequence[Any]) -> Any:
    """``result`` with every tensor that may share memory with an operand copied: custom ops must not alias."""
    if isinstance(result, tuple):
        return tuple(fresh(r, operands) for r in result)
    tensors = [t for o in operands for t in (o if isinstance(o, (list, tuple)) else [o]) if t is not None]
    return result.clone() if result._is_view() or any(result is t for t in tensors) else result


def _autograd(op: OpDef) -> tuple[Callable[..., Any], Callable[..., Any]]:
    forward = op.surrogate or op.reference

    def setup(ctx: Any, inputs: Any, output: Any, keyword_only_inputs: dict[str, Any] | None = None) -> None:
        flat, ctx.layout = _flatten(inputs)
        ctx.attributes = dict(keyword_only_inputs or {})
        ctx.save_for_backward(*flat)

    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        flat = list(ctx.saved_tensors)
        wanted = [i for i, t in enumerate(flat) if t is not None and t.is_floating_point() and _needs_gradient(ctx, i)]

        def run(*chosen: torch.Tensor) -> Any:
            filled = list(flat)
            for index, tensor in zip(wanted, chosen, strict=True):
                filled[index] = tensor
            return forward(*_unflatten(filled, ctx.layout), **ctx.attributes)

        results: list[torch.Tensor | None] = [None] * len(flat)
        if wanted:
            pull = torch.func.vjp(run, *(flat[i] for i in wanted))[1]
            pulled = pull(gradients if len(gradients) > 1 else gradients[0])
            for index, gradient in zip(wanted, pulled, strict=True):
                results[index] = gradient
        structured = _unflatten(results, ctx.layout)
        return structured[0] if len(structured) == 1 else tuple(structured)

    def _needs_gradient(ctx: Any, flat_index: int) -> bool:
        place = 0
        for position, count in enumerate(ctx.layout):
            size = 1 if count is None else count
            if place <= flat_index < place + size:
                need = ctx.needs_input_grad[position]
                return any(need) if isinstance(need, (list, tuple)) else bool(need)
            place += size
        return False

    return backward, setup


def _flatten(inputs: Sequence[Any]) -> tuple[list[Any], list[int | None]]:
    flat: list[Any] = []
    layout: list[int | None] = []
    for value in inputs:
        if isinstance(value, (list, tuple)):
            flat.extend(value)
            layout.append(len(value))
        else:
            flat.append(value)
            layout.append(None)
    return flat, layout


def _unflatten(flat: Sequence[Any], layout: Sequence[int | None]) -> list[Any]:
    values: list[Any] = []
    place = 0
    for count in layout:
        if count is None:
            values.append(flat[place])
            place += 1
        else:
            values.append(list(flat[place : place + count]))
            place += count
    return values
