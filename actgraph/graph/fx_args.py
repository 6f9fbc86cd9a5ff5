"""The arguments of an FX call in the order of its schema: which are tensor operands, which are attributes.

Operands come in this order: every ``Tensor`` or ``Tensor?`` argument (``None`` where absent, or where a number stands in
for the tensor), tensor lists flattened in place, then every size (``SymInt``) that another node computes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

Path = tuple[Any, ...]  # (argument name, index, index ...) into the bound arguments

_MISSING = object()


@dataclass(frozen=True, slots=True)
class Argument:
    name: str
    kind: str  # "tensor" | "tensors" | "other"
    keyword_only: bool
    required: bool
    default: Any


@functools.cache
def signature(target: Any) -> tuple[Argument, ...] | None:
    """The arguments of an op overload; ``None`` for targets without a schema (``operator.add``, higher-order ops)."""
    schema = getattr(target, "_schema", None)
    if schema is None:
        return None
    arguments = []
    for argument in schema.arguments:
        text = str(argument.type)
        kind = "other"
        if text in ("Tensor", "Optional[Tensor]"):
            kind = "tensor"
        elif "List[Tensor]" in text or "List[Optional[Tensor]]" in text:
            kind = "tensors"
        required = not argument.has_default_value()
        arguments.append(Argument(argument.name, kind, argument.kwarg_only, required, argument.default_value))
    return tuple(arguments)


def bind(node: fx.Node) -> dict[str, Any]:
    """Arguments by schema name, absent ones left out. Targets without a schema get ``arg0``, ``arg1`` ..."""
    arguments = signature(node.target)
    if arguments is None:
        return {**{f"arg{i}": value for i, value in enumerate(node.args)}, **node.kwargs}
    positional = [a.name for a in arguments if not a.keyword_only]
    return {**dict(zip(positional, node.args, strict=False)), **node.kwargs}


def rebuild(node: fx.Node, bound: dict[str, Any]) -> None:
    """Write ``bound`` back as args and kwargs, arguments that equal their default left out where they can be."""
    arguments = signature(node.target)
    if arguments is None:
        count = len(node.args)
        node.args = tuple(bound[f"arg{i}"] for i in range(count))
        node.kwargs = {key: value for key, value in bound.items() if key not in {f"arg{i}" for i in range(count)}}
        return
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    gap = False
    for argument in arguments:
        value = bound.get(argument.name, _MISSING)
        if value is _MISSING or (not argument.required and is_default(value, argument.default)):
            gap = gap or not argument.keyword_only
        elif argument.keyword_only or gap:
            kwargs[argument.name] = value
        else:
            args.append(value)
    node.args = tuple(args)
    node.kwargs = kwargs


def is_default(value: Any, default: Any) -> bool:
    if isinstance(value, fx.Node):
        return False
    if isinstance(value, (list, tuple)) and isinstance(default, (list, tuple)):
        return len(value) == len(default) and all(map(is_default, value, default))
    return type(value) is type(default) and bool(value == default)


def operand_paths(node: fx.Node) -> list[tuple[Path, fx.Node | None]]:
    """Each operand with where it sits in the bound arguments."""
    arguments = signature(node.target)
    bound = bind(node)
    found: list[tuple[Path, fx.Node | None]] = []
    if arguments is None:
        for name, value in bound.items():
            _collect((name,), value, found, absent=False)
        return found
    for argument in arguments:
        value = bound.get(argument.name)
        if argument.kind == "tensor":
            found.append(((argument.name,), value if isinstance(value, fx.Node) else None))
        elif argument.kind == "tensors":
            _collect((argument.name,), value, found, absent=True)
    for argument in arguments:
        if argument.kind == "other" and argument.name in bound:
            _collect((argument.name,), bound[argument.name], found, absent=False)
    return found


def is_branch(node: fx.Node) -> bool:
    """Whether a node is the access to a subgraph (a branch of control flow), which is no value."""
    return node.op == "get_attr" and "val" not in node.meta


def _collect(path: Path, value: Any, found: list[tuple[Path, fx.Node | None]], *, absent: bool) -> None:
    if isinstance(value, fx.Node):
        if not is_branch(value):
            found.append((path, value))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            if item is None and absent:
                found.append(((*path, index), None))
            else:
                _collect((*path, index), item, found, absent=absent)
    elif isinstance(value, dict):
        for key, item in value.items():
            _collect((*path, key), item, found, absent=absent)
    elif isinstance(value, slice):
        for key in ("start", "stop", "step"):
            _collect((*path, key), getattr(value, key), found, absent=False)


def replace_at(value: Any, path: Path, new: Any) -> Any:
    """A copy of ``value`` with the item at ``path`` replaced."""
    if not path:
        return new
    head, rest = path[0], path[1:]
    if isinstance(value, slice):
        parts = {key: getattr(value, key) for key in ("start", "stop", "step")}
        parts[head] = replace_at(parts[head], rest, new)
        return slice(parts["start"], parts["stop"], parts["step"])
    if isinstance(value, dict):
        return {**value, head: replace_at(value.get(head), rest, new)}
    items = list(value)
    items[head] = replace_at(items[head], rest, new)
    return tuple(items) if isinstance(value, tuple) else items


def attributes_of(node: fx.Node, name_of: Callable[[fx.Node], str]) -> dict[str, Any]:
    """Every argument that is not purely a tensor operand, by schema name, as plain Python values; defaults left out.

    References to nodes inside (sizes) appear as ``%name``.
    """
    arguments = signature(node.target)
    bound = bind(node)
    if arguments is None:
        return {key: plain(value, name_of) for key, value in bound.items() if not _is_operand(value)}
    result: dict[str, Any] = {}
    for argument in arguments:
        if argument.name not in bound:
            continue
        value = bound[argument.name]
        if argument.kind == "tensors" or (argument.kind == "tensor" and (value is None or isinstance(value, fx.Node))):
            continue
        if not argument.required and is_default(value, argument.default):
            continue
        result[argument.name] = plain(value, name_of)
    return result


def _is_operand(value: Any) -> bool:
    if isinstance(value, fx.Node):
        return not is_branch(value)
    return isinstance(value, (list, tuple)) and bool(value) and all(map(_is_operand, value))


def plain(value: Any, name_of: Callable[[fx.Node], str]) -> Any:
    """``value`` in plain Python: dtypes and layouts by name, nodes as ``%name``, sequences as lists."""
    from actgraph.ops.dtypes import DType

    if isinstance(value, fx.Node):
        return name_of(value) if is_branch(value) else f"%{name_of(value)}"
    if isinstance(value, torch.dtype):
        return DType.of(value).value
    if isinstance(value, (torch.layout, torch.memory_format)):
        return str(value).removeprefix("torch.")
    if isinstance(value, torch.device):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [plain(item, name_of) for item in value]
    if isinstance(value, dict):
        return {str(key): plain(item, name_of) for key, item in value.items()}
    if isinstance(value, slice):
        return [plain(item, name_of) for item in (value.start, value.stop, value.step)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)
