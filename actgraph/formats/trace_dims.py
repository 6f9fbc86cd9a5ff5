"""Dynamic dimensions of a capture: the user's names, example sizes that torch does not specialise, what torch refuses."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import sympy
import torch
from torch.export import Dim
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.numbers import int_oo

from actgraph.errors import InputError
from actgraph.graph.fx_types import size_expression

DynamicSpec = Mapping[str, Any]  # argument -> names per axis, nested as the argument is
Bounds = tuple[int | None, int | None]
Limits = Mapping[str, Bounds]

_HERE = str(Path(__file__).resolve().parent.parent)
_TORCH = str(Path(torch.__file__).resolve().parent)


@dataclass(frozen=True)
class Leaf:
    """One tensor among the arguments: where it is and the dimension name of each axis."""

    path: tuple[Any, ...]
    dims: tuple[str | None, ...]


@dataclass(frozen=True)
class Change:
    """What torch demands of a dimension. ``value``: a constant, another ``Dim``, or text of an expression."""

    name: str
    value: Any
    text: str


@dataclass(frozen=True)
class Plan:
    """Arguments with usable sizes, and the ``Dim`` (or constant) of each name."""

    given: dict[str, Any]
    arguments: dict[str, Any]
    leaves: tuple[Leaf, ...]
    dims: dict[str, Any]
    sizes: dict[str, int]
    given_sizes: dict[str, int] = field(default_factory=dict)

    def specification(self) -> dict[str, Any]:
        """``dynamic_shapes`` of torch.export."""
        by_path = {leaf.path: leaf for leaf in self.leaves}

        def build(value: Any, path: tuple[Any, ...]) -> Any:
            if isinstance(value, torch.Tensor):
                leaf = by_path[path]
                return {axis: self.dims[n] for axis, n in enumerate(leaf.dims) if n and self.dims[n] is not None}
            return _map_children(value, path, build)

        return {key: build(value, (key,)) for key, value in self.arguments.items()}

    def apply(self, change: Change) -> Plan:
        """The plan with one dimension restricted as torch demands."""
        if isinstance(change.value, int):
            sizes = {**self.sizes, change.name: self.given_sizes[change.name]}
            dims = {**self.dims, change.name: None}
            return replace(self, dims=dims, sizes=sizes, arguments=_resize(self.given, self.leaves, sizes))
        return replace(self, dims={**self.dims, change.name: change.value})


def plan_dimensions(arguments: dict[str, Any], dynamic: DynamicSpec, limits: Limits) -> Plan:
    """Match ``dynamic`` with the arguments and choose example sizes: at least 2, distinct for distinct names.

    Raises InputError for names of arguments that are not given, specs of the wrong length, sizes that disagree
    or lie outside the limits, and limits that disagree: those of a ``torch.export.Dim`` count like ``limits``.
    """
    limits = {**limits}
    unknown = sorted(set(dynamic) - set(arguments))
    if unknown:
        raise InputError(f"dynamic names the argument {unknown[0]!r}, which is not given", f"given are {', '.join(arguments)}")
    leaves: list[Leaf] = []
    for key, value in arguments.items():
        leaves += _leaves(value, dynamic.get(key), (key,), limits)
    given: dict[str, int] = {}
    for leaf, tensor in zip(leaves, (_at(arguments, leaf.path) for leaf in leaves), strict=True):
        for axis, name in enumerate(leaf.dims):
            if name is None:
                continue
            size = given.setdefault(name, tensor.shape[axis])
            if size != tensor.shape[axis]:
                where = ".".join(map(str, leaf.path))
                raise InputError(f"dimension {name!r} is {size} in one argument and {tensor.shape[axis]} in {where}")
    sizes: dict[str, int] = {}
    for name, size in given.items():
        _check_limits(name, size, limits.get(name, (None, None)))
        high = limits.get(name, (None, None))[1]
        candidate = max(size, 2)
        while candidate in sizes.values() and (high is None or candidate < high):
            candidate += 1
        sizes[name] = candidate
    dims = {name: _dim(name, limits.get(name, (None, None))) for name in given}
    return Plan(arguments, _resize(arguments, leaves, sizes), tuple(leaves), dims, sizes, given)


def _dim(name: str, limits: tuple[int | None, int | None]) -> Any:
    if not name.isidentifier():
        raise InputError(f"{name!r} is no dimension name", "use a name like batch or seq")
    return Dim(name, min=limits[0], max=limits[1])


def _check_limits(name: str, size: int, limits: Bounds) -> None:
    low, high = limits
    if (low is not None and size < low) or (high is not None and size > high):
        bounds = {key: str(bound) for key, bound in (("min", low), ("max", high)) if bound is not None}
        raise InputError(f"dimension {name!r} is {size} in the arguments, and must be {_limits_text(bounds)}")


def dims_of_spec(spec: Any, rank: int, where: str, limits: dict[str, Bounds] | None = None) -> tuple[str | None, ...]:
    """Names per axis of one tensor: from a tuple, or a dict by axis. Raises InputError when they do not fit the rank.

    limits: where those of ``torch.export.Dim`` objects are noted. Raises InputError when others are there already.
    """
    if spec is None:
        return (None,) * rank
    if isinstance(spec, Mapping):
        names: list[Any] = [None] * rank
        for axis, name in spec.items():
            if not isinstance(axis, int) or not -rank <= axis < rank:
                raise InputError(f"dynamic names axis {axis} of {where}, which has {rank} axes")
            names[axis] = name
    elif isinstance(spec, Sequence) and not isinstance(spec, str):
        names = list(spec)
    else:
        raise InputError(f"dynamic for {where} must be a tuple of names, not {spec!r}", 'such as ("batch", "seq")')
    if len(names) != rank:
        raise InputError(f"dynamic for {where} names {len(names)} axes, the tensor has {rank}")
    if limits is not None:
        for dim in names:
            if isinstance(dim, Dim):
                _note_limits(dim, limits)
    names = [getattr(name, "__name__", name) for name in names]
    if any(name is not None and not isinstance(name, str) for name in names):
        raise InputError(f"dynamic for {where} must hold names or None, not {spec!r}")
    return tuple(names)


def _note_limits(dim: Any, limits: dict[str, Bounds]) -> None:
    """The limits that ``dim`` was made with; torch's own defaults, 0 and infinity, say nothing."""
    bounds = (int(dim.min) or None, int(dim.max) if dim.max != int_oo else None)
    if bounds != (None, None) and limits.setdefault(dim.__name__, bounds) != bounds:
        raise InputError(
            f"dimension {dim.__name__!r} is given different limits", "use one Dim object, or its name in other places"
        )


def _leaves(value: Any, spec: Any, path: tuple[Any, ...], limits: dict[str, Bounds]) -> Iterator[Leaf]:
    if isinstance(value, torch.Tensor):
        yield Leaf(path, dims_of_spec(spec, value.dim(), ".".join(map(str, path)), limits))
        return
    children = _children(value)
    if children is None:
        return
    for key, child in children:
        inner = None
        if isinstance(spec, Mapping):
            inner = spec.get(key)
        elif isinstance(spec, Sequence) and isinstance(key, int) and key < len(spec):
            inner = spec[key]
        yield from _leaves(child, inner, (*path, key), limits)


def _children(value: Any) -> list[tuple[Any, Any]] | None:
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, (list, tuple)):
        return list(enumerate(value))
    return None


def _map_children(value: Any, path: tuple[Any, ...], build: Callable[[Any, tuple[Any, ...]], Any]) -> Any:
    """The container ``value`` with ``build`` applied to its items; ``None`` for anything that is no container."""
    children = _children(value)
    if children is None:
        return None
    items = [(key, build(child, (*path, key))) for key, child in children]
    return dict(items) if isinstance(value, Mapping) else type(value)([item for _, item in items])


def _at(arguments: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        arguments = arguments[key]
    return arguments


def _resize(arguments: dict[str, Any], leaves: Sequence[Leaf], sizes: Mapping[str, int]) -> dict[str, Any]:
    """The arguments with each named axis brought to its size by repeating what is there."""
    by_path = {leaf.path: leaf for leaf in leaves}

    def build(value: Any, path: tuple[Any, ...]) -> Any:
        if isinstance(value, torch.Tensor):
            for axis, name in enumerate(by_path[path].dims):
                if name is not None and value.shape[axis] != sizes[name]:
                    value = _stretch(value, axis, sizes[name])
            return value
        if _children(value) is None:
            return value
        return _map_children(value, path, build)

    return {key: build(value, (key,)) for key, value in arguments.items()}


def _stretch(tensor: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    if tensor.shape[axis] == 0:
        shape = list(tensor.shape)
        shape[axis] = size
        return torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
    return tensor.index_select(axis, torch.arange(size, device=tensor.device) % tensor.shape[axis])


# --- what torch refuses ---------------------------------------------------------------------------------------------------


class ConstantWatch:
    """Notes where in user code torch replaced a size symbol by a constant during a capture."""

    def __init__(self) -> None:
        self.places: dict[int, str] = {}
        self._original: Any = None

    def __enter__(self) -> ConstantWatch:
        original = ShapeEnv._set_replacement
        places = self.places

        def noting(env: ShapeEnv, symbol: Any, target: Any, message: str) -> None:
            if getattr(target, "is_Integer", False) and int(target) not in places:
                place = _place_of_stack()
                if place:
                    places[int(target)] = place
            original(env, symbol, target, message)

        self._original = original
        ShapeEnv._set_replacement = noting  # type: ignore[method-assign, assignment]
        return self

    def __exit__(self, *error: object) -> None:
        ShapeEnv._set_replacement = self._original  # type: ignore[method-assign]


def _is_user_code(filename: str) -> bool:
    return not filename.startswith((_TORCH, _HERE, "<")) and "/contextlib.py" not in filename


def _place_of_stack() -> str:
    frame = sys._getframe(2)
    while frame is not None:
        if _is_user_code(frame.f_code.co_filename):
            return _line(frame.f_code.co_filename, frame.f_lineno)
        frame = frame.f_back  # type: ignore[assignment]
    return ""


def user_line(trace: TracebackType | None) -> str:
    """``file.py:12: code`` of the deepest frame outside torch and actgraph; empty where there is none."""
    found = ""
    while trace is not None:
        filename = trace.tb_frame.f_code.co_filename
        if _is_user_code(filename):
            found = _line(filename, trace.tb_lineno)
        trace = trace.tb_next
    return found


def _line(filename: str, number: int) -> str:
    import linecache

    code = linecache.getline(filename, number).strip()
    short = "/".join(Path(filename).parts[-3:]) if "site-packages" in filename else filename
    return f"{short}:{number}" + (f": {code}" if code else "")


def explain_violation(error: Exception, plan: Plan, watch: ConstantWatch, known: Sequence[str] = ()) -> list[Change]:
    """The changes to dimensions that torch's message demands, each with the line that says so; empty for other errors.

    known: the lines of changes made before. Where torch demands one of them again, or knows no way to keep a dimension
    dynamic, the dimension becomes static.
    """
    message = str(error)
    violated = re.search(r"Constraints violated \(([\w, ]+)\)", message)
    if violated is None:
        return []
    changes = [change for change in _suggested(message, plan, watch) if change.text not in known]
    if changes:
        return changes
    guard = re.search(r"satisfy the generated guard (.+)", message)
    reason = f"torch cannot express the guard {guard.group(1).rstrip('.')}" if guard else "torch cannot capture it otherwise"
    names = [name.strip() for name in violated.group(1).split(",")]
    return [_static(name, plan, reason) for name in names if plan.dims.get(name) is not None]


def _static(name: str, plan: Plan, reason: str) -> Change:
    return Change(name, plan.given_sizes[name], f"dimension {name!r} is kept static at {plan.given_sizes[name]}: {reason}")


def _suggested(message: str, plan: Plan, watch: ConstantWatch) -> Iterator[Change]:
    """The fixes that torch suggests: ``seq = 8``, ``seq = Dim('seq', max=9)``, ``seq = 2*_seq``."""
    new_dims: dict[str, Any] = {}
    for line in message.partition("Suggested fixes:")[2].splitlines():
        match = re.fullmatch(r"\s*(\w+) = (.+?)\s*(#.*)?", line)
        if not match:
            continue
        name, value = match.group(1), match.group(2)
        root = re.search(r"[A-Za-z_]\w*", value)
        if value.startswith("Dim("):
            limits = dict(re.findall(r"(min|max)=(\d+)", value))
            new_dims[name] = Dim(name, **{key: int(number) for key, number in limits.items()})
            if name in plan.dims:
                yield Change(name, new_dims[name], f"dimension {name!r} is restricted to {_limits_text(limits)} by the model")
        elif plan.dims.get(name) is None:
            continue
        elif root is None:
            place = watch.places.get(plan.sizes[name], "")
            yield _static(name, plan, "torch can only capture it as a constant" + (f" (at {place})" if place else ""))
        else:
            base = new_dims.get(root.group()) or plan.dims.get(root.group()) or Dim(root.group())
            yield Change(name, _derived(value, base), f"dimension {name!r} must be {value} for the model")


def _limits_text(limits: Mapping[str, str]) -> str:
    return " and ".join(f"{'at least' if key == 'min' else 'at most'} {number}" for key, number in limits.items())


def _derived(text: str, root: Any) -> Any:
    """The ``Dim`` of ``2*root + 1``."""
    expression = size_expression(text)
    factor, rest = sympy.div(expression, next(iter(expression.free_symbols)))
    result = root if factor == 1 else int(factor) * root
    return result if rest == 0 else result + int(rest)
