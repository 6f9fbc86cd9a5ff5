"""The selector language: how a user names one site or many.

A selector is a name (``blocks.2.mlp.hidden``), a glob (``*`` and ``?``, which cross dots), with braces for alternatives
(``{gate,up}``) and ranges (``{2..4}``, both ends included), or ``re:`` and a regular expression that must match the whole
name. A name or glob without a ``:`` suffix means values, never edges: ``linear.*`` is every linear's output, ``linear.*:in``
every linear's input. A negative index counts from the end (``blocks.-1.resid_post``).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from actgraph.errors import SiteError

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?")
_NEGATIVE = re.compile(r"(?:(?<=\.)|^)(?P<stem>[A-Za-z_]\w*)\.-(?P<back>\d+)(?=[.:]|$)")
#: More alternatives than this are a typing error (``{1..99999999}``), not a selection.
MAX_ALTERNATIVES = 100_000


@dataclass(frozen=True)
class Pattern:
    """One selector without braces, compiled.

    literal: the exact name, empty for globs and regular expressions. suffixed: whether the pattern says ``:something``.
    """

    text: str
    literal: str
    matches: Callable[[str], bool]
    suffixed: bool


def expand_braces(selector: str) -> list[str]:
    """``a.{1..2}.{x,y}`` gives the four names. Raises SiteError for unbalanced braces."""
    found = _BRACES.search(selector)
    if found is None:
        if "{" in selector or "}" in selector:
            raise SiteError(f"unbalanced braces in selector {selector!r}", "write {a,b} or {2..4}")
        return [selector]
    before, after = selector[: found.start()], selector[found.end() :]
    heads = [before + choice for choice in _alternatives(found.group(1), selector)]
    # Innermost braces come first, so nested ones are expanded by the recursion.
    result = list(dict.fromkeys(itertools.chain.from_iterable(expand_braces(head + after) for head in heads)))
    if len(result) > MAX_ALTERNATIVES:
        raise SiteError(f"selector {selector!r} stands for more than {MAX_ALTERNATIVES} names", "narrow the range")
    return result


def _alternatives(body: str, selector: str) -> list[str]:
    match = _RANGE.fullmatch(body.strip())
    if match is None:
        return [choice.strip() for choice in body.split(",")]
    start, stop = int(match.group(1)), int(match.group(2))
    step = abs(int(match.group(3) or 1))
    if step == 0 or abs(stop - start) // step > MAX_ALTERNATIVES:
        raise SiteError(f"bad range {{{body}}} in selector {selector!r}", "write {first..last} or {first..last..step}")
    step = step if stop >= start else -step
    return [str(i) for i in range(start, stop + (1 if step > 0 else -1), step)]


def compile_selector(selector: str, names: Callable[[], Iterable[str]]) -> Iterator[Pattern]:
    """The patterns that ``selector`` stands for. ``names`` gives all known names (for negative indices).

    Raises SiteError when the selector is not well-formed.
    """
    selector = selector.strip()
    if not selector:
        raise SiteError("an empty selector", 'name a site, such as "blocks.0.resid_post"')
    if selector.startswith("re:"):
        try:
            compiled = re.compile(selector[3:].strip())
        except re.error as error:
            raise SiteError(f"bad regular expression in selector {selector!r}: {error}", "see Python's re") from error
        yield Pattern(selector, "", lambda name: compiled.fullmatch(name) is not None, ":" in selector[3:])
        return
    for text in expand_braces(selector):
        text = _resolve_negative(text, names)
        suffixed = ":" in text
        if "*" not in text and "?" not in text:
            # ``x:out`` is another way to write ``x``; tables hold the short form only.
            literal = text.removesuffix(":out")
            yield Pattern(text, literal, literal.__eq__, suffixed and literal == text)
            continue
        stem, _, suffix = text.partition(":")
        regex = re.compile(_glob(stem) + (":" + _glob(suffix) if suffix and suffix != "out" else ""))
        anything = suffix == "*"
        plain = re.compile(_glob(stem))
        yield Pattern(text, "", _matcher(regex, plain, anything), suffixed)


def _matcher(regex: re.Pattern[str], plain: re.Pattern[str], anything: bool) -> Callable[[str], bool]:
    if anything:  # ``x:*`` is every suffix and none
        return lambda name: regex.fullmatch(name) is not None or plain.fullmatch(name) is not None
    return lambda name: regex.fullmatch(name) is not None


def _glob(text: str) -> str:
    """A regular expression for a glob. ``*`` crosses dots but not the colon; brackets are literal (``:in[0]``)."""
    pieces = {"*": "[^:]*", "?": "[^:]"}
    return "".join(pieces.get(char, re.escape(char)) for char in text)


def _resolve_negative(text: str, names: Callable[[], Iterable[str]]) -> str:
    while (match := _NEGATIVE.search(text)) is not None:
        stem = text[: match.end("stem")]
        index = re.compile((_glob(stem)) + r"\.(\d+)(?:[.:].*)?")
        found = [int(hit.group(1)) for name in names() if (hit := index.fullmatch(name)) is not None]
        if not found or int(match.group("back")) > max(found) + 1:
            raise SiteError(f"selector {text!r} counts back beyond the first {stem!r}", f"there are {len(set(found))}")
        text = f"{stem}.{max(found) + 1 - int(match.group('back'))}{text[match.end() :]}"
    return text
