"""The syntax of one-line pipelines: ``name{key=value key=value}, name``.

Values are bare words, quoted strings, numbers, booleans, ``null`` and ``[lists]``. A bare word may hold braces that
balance, so globs need no quotes: ``steer{site=blocks.{2..4}.resid_post scale=4}``. What is read here is untyped; the
options of a pass give it types (``actgraph.pipeline.options``). ``write(parse(text))`` is canonical, and
``parse(write(x)) == x`` for everything that ``write`` takes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from actgraph.errors import OptionError

Literal = None | bool | int | float | str | list["Literal"]

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_INT = re.compile(r"[+-]?[0-9]+")
_FLOAT = re.compile(r"[+-]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+)(?:[eE][+-]?[0-9]+)?|[+-]?inf|nan")
_WORDS: dict[str, bool | None] = {"true": True, "false": False, "null": None}
_SPACE = re.compile(r"\s*")
#: Ends a bare word at depth 0. Braces are handled apart, because they nest.
_STOPS = frozenset(" \t\r\n\f\v,[]=\"'")


@dataclass(frozen=True)
class Entry:
    """One pass as written: its name, untyped options, and where each stands in the text (character offsets)."""

    name: str
    options: dict[str, Literal] = field(default_factory=dict)
    position: int = field(default=0, compare=False)
    positions: dict[str, int] = field(default_factory=dict, compare=False)


def parse(text: str) -> list[Entry]:
    """The passes of ``text`` in order; empty text is an empty pipeline. Raises OptionError naming the position."""
    return _Parser(text).pipeline()


def write(entries: Sequence[Entry]) -> str:
    """The canonical text of ``entries``, on one line."""
    return ", ".join(write_entry(entry.name, entry.options) for entry in entries)


def write_entry(name: str, options: Mapping[str, Any]) -> str:
    """One pass as text: ``name``, or ``name{key=value}``."""
    if not options:
        return name
    return f"{name}{{{' '.join(f'{key}={write_value(value)}' for key, value in options.items())}}}"


def write_value(value: Any) -> str:
    """One value as text. Raises TypeError for what the syntax cannot hold."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        text = str(value)  # a StrEnum member as its text
        return text if _is_bare(text) else json.dumps(text, ensure_ascii=False)
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(write_value(item) for item in value)}]"
    raise TypeError(f"{type(value).__name__} has no pipeline text")


def read_word(word: str) -> Literal:
    """What a bare word means: ``true``, ``null`` and numbers are themselves, everything else is text."""
    if word in _WORDS:
        return _WORDS[word]
    if _INT.fullmatch(word):
        return int(word)
    if _FLOAT.fullmatch(word):
        return float(word)
    return word


def _is_bare(text: str) -> bool:
    """Whether ``text`` as a bare word reads back as itself."""
    if not text or not text.isprintable() or not isinstance(read_word(text), str):
        return False
    end = _bare_end(text, 0)
    return end == len(text)


def _bare_end(text: str, start: int) -> int:
    """Where the bare word that begins at ``start`` ends. Commas inside balanced braces belong to the word."""
    depth = 0
    last_balanced = start
    for i in range(start, len(text)):
        c = text[i]
        if c == "{":
            depth += 1
        elif c == "}":
            if depth == 0:
                return i
            depth -= 1
        elif c.isspace() or (c in _STOPS and not (depth and c == ",")):
            return last_balanced if depth else i
        if depth == 0:
            last_balanced = i + 1
    return last_balanced


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def fail(self, what: str, hint: str = "", at: int | None = None) -> NoReturn:
        raise OptionError(f"pipeline text, {place(self.text, self.at if at is None else at)}: {what}", hint)

    def space(self) -> None:
        match = _SPACE.match(self.text, self.at)
        self.at = match.end() if match else self.at

    def peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def found(self) -> str:
        return repr(self.peek()) if self.peek() else "the end"

    def pipeline(self) -> list[Entry]:
        entries: list[Entry] = []
        self.space()
        if not self.peek():
            return entries
        while True:
            entries.append(self.entry())
            self.space()
            if not self.peek():
                return entries
            if self.peek() != ",":
                self.fail(f"expected ',' between passes, found {self.found()}")
            self.at += 1
            self.space()

    def entry(self) -> Entry:
        start = self.at
        match = _NAME.match(self.text, self.at)
        if match is None:
            self.fail(f"expected the name of a pass, found {self.found()}", "write name{key=value key=value}, name")
        self.at = match.end()
        options: dict[str, Literal] = {}
        positions: dict[str, int] = {}
        self.space()
        if self.peek() == "{":
            opened = self.at
            self.at += 1
            while True:
                self.space()
                if self.peek() == "}":
                    self.at += 1
                    break
                if not self.peek():
                    self.fail(f"the '{{' of {match.group()} is never closed", "add '}'", at=opened)
                key, value, where = self.option(match.group(), next(reversed(options), ""))
                if key in options:
                    self.fail(f"option {key!r} of {match.group()} is given twice", at=where)
                options[key], positions[key] = value, where
        return Entry(match.group(), options, start, positions)

    def option(self, owner: str, former: str) -> tuple[str, Literal, int]:
        where = self.at
        match = _KEY.match(self.text, self.at)
        if match is None:
            hint = f"quote a value that has spaces: {former}='...'" if former else ""
            if self.peek() == ",":
                hint = "options are separated by spaces; a list is written [a, b]"
            self.fail(f"expected an option key=value of {owner}, found {self.found()}", hint)
        self.at = match.end()
        self.space()
        if self.peek() != "=":
            self.fail(
                f"expected '=' after {match.group()!r}, found {self.found()}",
                f"write {match.group()}=value, or {match.group()}=true",
            )
        self.at += 1
        self.space()
        value = self.value()
        after = self.peek()
        if after and after != "}" and not after.isspace():
            hint = "a list is written [a, b]; options are separated by spaces" if after == "," else "put the value in quotes"
            self.fail(f"unexpected {after!r} after the value of {match.group()!r}", hint)
        return match.group(), value, where

    def value(self) -> Literal:
        c = self.peek()
        if c == "[":
            return self.items()
        if c in ('"', "'") and c:
            return self.quoted(c)
        end = _bare_end(self.text, self.at)
        if end == self.at:
            self.fail(f"expected a value, found {self.found()}", "text with special characters goes in quotes")
        word = self.text[self.at : end]
        self.at = end
        return read_word(word)

    def items(self) -> list[Literal]:
        opened = self.at
        self.at += 1
        result: list[Literal] = []
        self.space()
        while self.peek() != "]":
            if not self.peek():
                self.fail("the '[' is never closed", "add ']'", at=opened)
            result.append(self.value())
            self.space()
            if self.peek() == ",":
                self.at += 1
                self.space()
                if self.peek() == "]":
                    self.fail("expected a value after ',', found ']'")
            elif self.peek() and self.peek() != "]":
                self.fail(f"expected ',' or ']' in a list, found {self.found()}")
        self.at += 1
        return result

    def quoted(self, quote: str) -> str:
        opened = self.at
        i = self.at + 1
        while i < len(self.text) and self.text[i] != quote:
            i += 2 if self.text[i] == "\\" else 1
        if i >= len(self.text):
            self.fail("the quotes are never closed", f"add {quote}", at=opened)
        inner = self.text[self.at + 1 : i]
        self.at = i + 1
        if quote == "'":
            inner = re.sub(r'\\.|"', lambda m: {"\\'": "'", '"': '\\"'}.get(m.group(), m.group()), inner, flags=re.DOTALL)
        try:
            return str(json.loads(f'"{inner}"', strict=False))
        except json.JSONDecodeError as error:
            self.fail(f"bad escape in a quoted string: {error.msg}", r"a backslash is written \\", at=opened)


def place(text: str, at: int) -> str:
    """``character 12`` (counted from 1), with the line when there are several, and a look at what stands there."""
    line = text.count("\n", 0, at)
    column = at - (text.rfind("\n", 0, at) + 1) + 1
    where = f"line {line + 1}, character {column}" if "\n" in text else f"character {column}"
    rest = text[at:].split("\n")[0][:20]
    return f"{where} (at {rest!r})" if rest else where
