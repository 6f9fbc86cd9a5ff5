"""Recipes: pipelines as YAML, ``actgraph: 1`` and a list of ``passes``.

Read with YAML's safe loader only. Messages name the line of the recipe.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from actgraph.errors import InputError, OptionError
from actgraph.pipeline.base import Pass
from actgraph.pipeline.options import build, is_path, option_values
from actgraph.pipeline.registry import get_pass_class
from actgraph.pipeline.suggest import nearest
from actgraph.pipeline.text import write_value

VERSION = 1
_SHOWN = 40  # characters of a recipe's line that a message quotes
#: A value of pipeline text that YAML reads as syntax: a glob, or a range in braces.
_UNQUOTED = re.compile(r"(?:(?<=[:\[,-] )|(?<=\[))(?:[*&][^\s,\]}]+|[\w.*]+\{[\w.,]*\}[^\s,\]}]*)")
_EXAMPLE = "a recipe looks like {actgraph: 1, passes: [{sparsify: {sparsity: 0.4}}, quantize]}, on one line or on several"


def _place(mark: yaml.Mark) -> str:
    """``line 3, character 5 (at 'sparsty: 0.4')``: lines are often long, so the text that stands there is shown."""
    # PyYAML ends the buffer of a mark with NUL, which is no part of the recipe.
    rest = (mark.buffer or "").rstrip("\0")[mark.pointer :].split("\n")[0][:_SHOWN].rstrip()
    return f"line {mark.line + 1}, character {mark.column + 1} (at {rest!r})" if rest else f"line {mark.line + 1}, at its end"


def _yaml_problem(error: yaml.YAMLError) -> OptionError:
    """What PyYAML complains about on one line, with what is around it and, for text that needs quotes, how to mend it."""
    mark, opened = getattr(error, "problem_mark", None), getattr(error, "context_mark", None)
    if mark is None:
        return OptionError("recipe: not valid YAML", _EXAMPLE)
    problem = str(getattr(error, "problem", None) or "not valid YAML").replace("'<stream end>'", "the end")
    context = str(getattr(error, "context", None) or "")
    message = f"recipe, {_place(mark)}: {problem}"
    if opened is not None and ("flow mapping" in context or "flow sequence" in context):
        message += f", in the {'{' if 'mapping' in context else '['} of {_place(opened)}"
    line = (mark.buffer or "").rstrip("\0").split("\n")[mark.line : mark.line + 1]
    word = next(iter(_UNQUOTED.findall(line[0] if line else "")), "")
    if word:
        return OptionError(message, f'text that begins with or holds one of * & {{ }} goes in quotes: "{word}"')
    if "\\t" in problem:
        return OptionError(message, "indent with spaces")
    return OptionError(message, _EXAMPLE)


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, with ``1e-5`` a number (YAML 1.1 reads it as text) and duplicate keys an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise OptionError(f"recipe, {_place(key.start_mark)}: {key.value!r} is given twice")
                seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """The safe dumper, quoting text that ``_Loader`` would read as a number, and line breaks that are not ``\\n``."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        # YAML 1.1 folds these into spaces; double quotes escape them.
        odd = any(mark in text for mark in "\x85\u2028\u2029")
        return self.represent_scalar("tag:yaml.org,2002:str", text, style='"' if odd else None)


_Dumper.add_representer(str, _Dumper.represent_text)

_FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+)$"
    r"|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
)
for _kind in (_Loader, _Dumper):
    _kind.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag.rsplit(":", 1)[-1] not in ("float", "timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def read_file(path: Path) -> list[Pass]:
    """The passes of a recipe file; paths in it are relative to its folder."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the recipe {path}: {getattr(error, 'strerror', None) or error}") from error
    try:
        return read_text(text, path.parent)
    except OptionError as error:
        raise OptionError(f"{path}: {error.message}", error.hint) from error


def read_text(text: str, base: Path | None = None) -> list[Pass]:
    """The passes of a recipe. Raises OptionError naming the line."""
    try:
        loader = _Loader(text)
        try:
            root = loader.get_single_node()
            document = loader.construct_document(root) if root is not None else None
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise _yaml_problem(error) from error
    if not isinstance(document, Mapping) or not isinstance(root, yaml.MappingNode):
        raise OptionError("recipe: it is not a mapping", _EXAMPLE)
    unknown = [key for key in document if key not in ("actgraph", "passes")]
    if unknown:
        key = str(unknown[0])
        raise OptionError(f"recipe: there is no key {key!r}", nearest(key, ["actgraph", "passes"]))
    if document.get("actgraph") != VERSION or isinstance(document.get("actgraph"), bool):
        version = document.get("actgraph")
        raise OptionError(f"recipe: the format version is {version!r}, not {VERSION}", "begin with `actgraph: 1`")
    steps = document.get("passes")
    if steps is None:
        return []
    if not isinstance(steps, list):
        raise OptionError("recipe: `passes` is not a list", _EXAMPLE)
    nodes = next(value for key, value in root.value if key.value == "passes").value
    return [_step(step, node, base) for step, node in zip(steps, nodes, strict=True)]


def _step(step: Any, node: yaml.Node, base: Path | None) -> Pass:
    if isinstance(step, str):
        place = f"recipe, {_place(node.start_mark)}"
        if "{" in step:
            raise OptionError(f"{place}: {step!r} is pipeline text", "in a recipe a pass is written `- name: {option: value}`")
        return build(step, {}, lambda option: f"{place}: ")
    if not isinstance(step, Mapping) or len(step) != 1 or not isinstance(node, yaml.MappingNode):
        raise OptionError(f"recipe, {_place(node.start_mark)}: a pass is written `- name: {{option: value}}`", _EXAMPLE)
    ((name, options),) = step.items()
    marks: dict[str, yaml.Mark] = {}
    value_node = node.value[0][1]
    if isinstance(value_node, yaml.MappingNode):
        marks = {str(key.value): key.start_mark for key, _ in value_node.value}

    def where(option: str) -> str:
        return f"recipe, {_place(marks.get(option, node.start_mark))}: "

    if options is None:
        options = {}
    if not isinstance(options, Mapping) or not all(isinstance(key, str) for key in options):
        raise OptionError(f"{where('')}the options of {name} are not a mapping", "write `- name: {option: value}`")
    wrong = next((key for key, value in options.items() if value is None and "=" in key), "")
    if wrong:
        raise OptionError(f"{where(wrong)}{wrong!r} is no option of {name}", f"write {wrong.replace('=', ': ', 1)}")
    if not isinstance(name, str):
        raise OptionError(f"{where('')}{name!r} is not the name of a pass")
    return build(name, _map_paths(name, options, _joined(base)) if base is not None else options, where)


def write_text(passes: Iterable[Pass], base: Path | None = None) -> str:
    """A recipe that reads back to equal passes. Raises OptionError for options that have no text form."""
    steps: list[Any] = []
    for step in passes:
        options = option_values(step)
        for name, value in options.items():
            try:
                write_value(value)
            except TypeError as error:
                raise OptionError(
                    f"option {name!r} of {step.name} holds {type(value).__name__} data, which has no text form",
                    "save it to a file and name the file",
                ) from error
        if base is not None:
            options = _map_paths(step.name, options, _relative(base))
        steps.append({step.name: options} if options else step.name)
    document = {"actgraph": VERSION, "passes": steps}
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120)


def write_file(passes: Iterable[Pass], path: Path) -> Path:
    """Write a recipe beside ``path``, then rename it."""
    text = write_text(passes, path.parent)
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise InputError(f"cannot write the recipe {path}: {error.strerror or error}") from error
    return path


def _map_paths(name: str, options: Mapping[str, Any], change: Callable[[str, bool], str]) -> dict[str, Any]:
    """``options`` with ``change(text, always_a_path)`` applied to those that are paths."""
    try:
        fields = get_pass_class(name).model_fields
    except OptionError:
        return dict(options)  # the caller reports the unknown name
    result = dict(options)
    for key, value in options.items():
        kind = is_path(fields[key]) if key in fields else False
        if kind is False:
            continue
        if isinstance(value, str):
            result[key] = change(value, kind is True)
        elif isinstance(value, list):
            result[key] = [change(item, kind is True) if isinstance(item, str) else item for item in value]
    return result


def _joined(base: Path) -> Callable[[str, bool], str]:
    def change(value: str, always: bool) -> str:
        joined = base / value
        try:
            return str(joined) if value and (always or joined.exists()) else value
        except (OSError, ValueError):
            return value

    return change


def _relative(base: Path) -> Callable[[str, bool], str]:
    def change(value: str, always: bool) -> str:
        try:
            if always or Path(value).exists():
                return Path(value).resolve().relative_to(base.resolve()).as_posix()
        except (OSError, ValueError):
            pass  # outside of the folder, or no path at all
        return value

    return change
