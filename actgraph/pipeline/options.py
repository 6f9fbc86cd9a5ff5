"""Options of passes: from untyped values to a validated pass, and back to text.

Validation is pydantic's, in its strict JSON mode (``sparsity="0.4"`` is a wrong type, a list is a tuple); its errors become
one line that names the option, what it must be, and the nearest spelling.
"""

from __future__ import annotations

import hashlib
import json
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from actgraph.errors import ActgraphError, OptionError
from actgraph.pipeline.base import Pass
from actgraph.pipeline.registry import get_pass_class
from actgraph.pipeline.suggest import nearest
from actgraph.pipeline.text import write_entry, write_value

#: Where an option stands, for messages: called with the option's name, or with "" for the pass itself.
Where = Callable[[str], str]


def _nowhere(option: str) -> str:
    return ""


def build(name: str, options: Mapping[str, Any], where: Where = _nowhere) -> Pass:
    """The pass ``name`` with ``options`` as read from text or YAML. Raises OptionError naming the place."""
    try:
        cls = get_pass_class(name)
    except OptionError as error:
        raise OptionError(where("") + error.message, error.hint) from error
    unknown = [key for key in options if key not in cls.model_fields]
    if unknown:
        known = list(cls.model_fields)
        hint = nearest(unknown[0], known) if known else f"{name} takes no options"
        raise OptionError(f"{where(unknown[0])}{name} has no option {unknown[0]!r}", hint)
    try:
        document = json.dumps(dict(options))
    except TypeError as error:
        raise OptionError(f"{where('')}the options of {name} cannot be read: {error}") from error
    try:
        return cls.model_validate_json(document, strict=True)
    except ValidationError as error:
        raise _explain(cls, options, error, where) from error
    except ActgraphError:
        raise
    except (TypeError, ValueError) as error:
        raise OptionError(f"{where('')}{name}: {error}") from error


def _explain(cls: type[Pass], options: Mapping[str, Any], error: ValidationError, where: Where) -> OptionError:
    """The first complaint as one line."""
    problems = error.errors(include_url=False)
    missing = [str(problem["loc"][0]) for problem in problems if problem["type"] == "missing" and len(problem["loc"]) == 1]
    if missing:
        field = cls.model_fields[missing[0]]
        return OptionError(f"{where('')}{cls.name} needs the option {missing[0]!r}", field.description or "")
    problem = problems[0]
    if not problem["loc"]:
        return OptionError(f"{where('')}{cls.name}: {_plain(problem['msg'])}")
    option = str(problem["loc"][0])
    field = cls.model_fields[option]
    given = _shown(options.get(option))
    mine = [p for p in problems if p["loc"] and p["loc"][0] == option]
    of_value = [p for p in mine if not _is_type_problem(p["type"])]
    about = f"{where(option)}option {option!r} of {cls.name}"
    if of_value:
        return OptionError(f"{about} is {given}: {_plain(of_value[0]['msg'])}", field.description or "")
    hint = field.description or ""
    if isinstance(options.get(option), (int, float, bool)) and "text" in describe(field):
        hint = f'put it in quotes: {option}="{given}"'
    return OptionError(f"{about} must be {describe(field)}, not {given}", hint)


def _is_type_problem(kind: str) -> bool:
    return kind.endswith(("_type", "_parsing")) or kind in {"is_instance_of", "missing"}


def _plain(message: str) -> str:
    message = message.removeprefix("Value error, ").removeprefix("Assertion failed, ")
    return message[0].lower() + message[1:] if message.startswith("Input should") else message


def _shown(value: Any) -> str:
    try:
        return write_value(value)
    except TypeError:
        return repr(value)


_NAMES: dict[Any, str] = {
    str: "text", int: "an integer", float: "a number", bool: "true or false", type(None): "null", Path: "a path",
}  # fmt: skip


def describe(field: FieldInfo) -> str:
    """The type of an option in words: ``"text or a list of text"``."""
    return _describe(field.annotation)


def _describe(annotation: Any) -> str:
    if annotation in _NAMES:
        return _NAMES[annotation]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _describe(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_describe(argument) for argument in arguments))
    if origin is typing.Literal:
        return "one of " + ", ".join(_shown(argument) for argument in arguments)
    if origin in (list, tuple, set, frozenset):
        inner = [argument for argument in arguments if argument is not Ellipsis]
        return "a list of " + " and ".join(dict.fromkeys(_plural(_describe(argument)) for argument in inner))
    if isinstance(annotation, type) and hasattr(annotation, "__members__"):
        return "one of " + ", ".join(_shown(member.value) for member in annotation)  # type: ignore[attr-defined]
    return getattr(annotation, "__name__", str(annotation))


def _plural(words: str) -> str:
    return {"an integer": "integers", "a number": "numbers", "a path": "paths"}.get(words, words)


def option_values(step: Pass, *, everything: bool = False) -> dict[str, Any]:
    """The options of ``step`` as plain values, in field order; without ``everything`` only those that are not the default."""
    values: dict[str, Any] = {}
    for name, field in type(step).model_fields.items():
        value = getattr(step, name)
        if everything or not _same(value, _default(field)):
            values[name] = plain(value)
    return values


def _default(field: FieldInfo) -> Any:
    value = field.get_default(call_default_factory=False)
    if value is None and field.default_factory is not None:
        return field.default_factory()  # type: ignore[call-arg]
    return value


def _same(value: Any, default: Any) -> bool:
    if default is PydanticUndefined or isinstance(value, np.ndarray) or isinstance(default, np.ndarray):
        return False
    return bool(type(value) is type(default) and value == default) or value is default


def plain(value: Any) -> Any:
    """``value`` as what the syntax holds: enumerations and paths as text, sequences as lists, sets sorted."""
    if isinstance(value, Path):
        return value.as_posix()
    if hasattr(value, "value") and hasattr(type(value), "__members__"):
        return plain(value.value)
    if isinstance(value, (frozenset, set)):
        return sorted((plain(item) for item in value), key=repr)
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    return value


def pass_text(step: Pass, *, strict: bool = False) -> str:
    """``step`` as pipeline text.

    An option that holds data with no text form (an array) is written as its content hash, which names it for provenance
    but cannot be read back; with ``strict`` that raises OptionError.
    """
    written: dict[str, Any] = {}
    for name, value in option_values(step).items():
        try:
            write_value(value)
        except TypeError as error:
            if strict:
                raise OptionError(
                    f"option {name!r} of {step.name} holds {type(value).__name__} data, which has no text form",
                    "save it to a file and name the file",
                ) from error
            value = _digest(value)
        written[name] = value
    return write_entry(step.name, written)


def _digest(value: Any) -> str:
    if isinstance(value, BaseModel):
        value = value.model_dump_json()
    if isinstance(value, np.ndarray):
        array = np.ascontiguousarray(value)
        return f"array:{array.dtype}{list(array.shape)}:{hashlib.sha256(array.tobytes()).hexdigest()[:12]}".replace(" ", "")
    return f"{type(value).__name__}:{hashlib.sha256(repr(value).encode()).hexdigest()[:12]}"


def is_path(field: FieldInfo) -> bool | None:
    """True where an option is always a path, False where it is never one, None where text may also name a file."""
    extra = field.json_schema_extra
    if isinstance(extra, dict) and extra.get("path"):
        return None
    found = _annotations(field.annotation)
    if Path not in found:
        return False
    return None if str in found else True


def _annotations(annotation: Any) -> set[Any]:
    arguments = typing.get_args(annotation)
    if not arguments:
        return {annotation}
    return set().union(*(_annotations(argument) for argument in arguments))
