"""Which tokens: the clauses of steering, taps and calibration, read from text and evaluated on arrays.

A clause names tokens by their part of the row, by position, by token id and by row of the batch::

    all                         every token
    prompt, generated           of the prompt, or behind it
    3   3:   :4   2:5           positions in the row, from 0 (half-open windows)
    prompt[-1]   prompt[2:5]    positions in the prompt; negative ones count from its end
    generated[0]   generated[:4]    positions behind the prompt
    token(13, 198)              these token ids
    row(0, 2:4)                 these rows of the batch
    prompt & 2:                 tokens that meet both
    prompt[-1] | generated      tokens that meet one of them
    all ! 0 ! token(1)          without those behind each ``!``, whatever stands before

``&`` binds closer than ``|``, and ``!`` excludes from the whole. Positions count the real tokens of each row, never padding,
and come from the host (position ids, prompt lengths), never from the shape of a tensor: a clause means the same for a whole
text, for chunks of it, for single tokens behind a cache and in a padded batch. A token is *generated* iff its position is at
least the number of prompt tokens of its row; where nobody tells the lengths of prompts, every token is prompt, of unknown end.
In a graph rows are told from outside as well (sessions do), and where nobody tells them no token is of a named row.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from actgraph.errors import InputError, OptionError

Array = np.ndarray[Any, Any]

LARGEST = 1 << 24  # in graphs positions are compared as differences in float32, which holds integers up to here
HINT = (
    "use all, prompt, generated, positions (3, 3:, :4, 2:5, prompt[-1], generated[:4]), token(13), row(0), joined by & and |, "
    "with exclusions behind !"
)

_WINDOW = re.compile(r"(-?[0-9]+)?\s*(:)?\s*(-?[0-9]+)?")
_PART = re.compile(r"(prompt|generated)\s*(?:\[([^\]]*)\])?")
_CALL = re.compile(r"(token|row)\s*\(([^)]*)\)")


@dataclass(frozen=True)
class Window:
    """``start <= number < stop``; ``None``: no bound."""

    start: int | None = None
    stop: int | None = None

    def __and__(self, other: Window) -> Window:
        starts = [n for n in (self.start, other.start) if n is not None]
        stops = [n for n in (self.stop, other.stop) if n is not None]
        return Window(max(starts, default=None), min(stops, default=None))

    def __le__(self, other: Window) -> bool:
        """Whether every number of this window is in the other."""
        starts = other.start is None or (self.start is not None and self.start >= other.start)
        return starts and (other.stop is None or (self.stop is not None and self.stop <= other.stop))

    @property
    def empty(self) -> bool:
        return self.start is not None and self.stop is not None and self.start >= self.stop

    @property
    def everything(self) -> bool:
        return self.start is None and self.stop is None

    def holds(self, numbers: Array) -> Array:
        """Which of ``numbers`` lie within."""
        result = np.ones(numbers.shape, bool)
        if self.start is not None:
            result &= numbers >= self.start
        if self.stop is not None:
            result &= numbers < self.stop
        return result

    def __str__(self) -> str:
        if self.start is not None and self.stop == self.start + 1:
            return str(self.start)
        return f"{'' if self.start is None else self.start}:{'' if self.stop is None else self.stop}"


@dataclass(frozen=True)
class Box:
    """Tokens that meet all of: a window of positions in the row, one of positions behind the prompt (negative: before its end),
    a set of token ids (sorted; ``None``: any), and windows of rows (``None``: any)."""

    positions: Window = Window()
    behind: Window = Window()
    tokens: tuple[int, ...] | None = None
    rows: tuple[Window, ...] | None = None

    def __and__(self, other: Box) -> Box:
        tokens = self.tokens if other.tokens is None else other.tokens
        if self.tokens is not None and other.tokens is not None:
            tokens = tuple(sorted(set(self.tokens) & set(other.tokens)))
        rows = self.rows if other.rows is None else other.rows
        if self.rows is not None and other.rows is not None:
            both = (a & b for a in self.rows for b in other.rows)
            rows = tuple(window for window in both if not window.empty)
        return Box(self.positions & other.positions, self.behind & other.behind, tokens, rows)

    def __le__(self, other: Box) -> bool:
        """Whether every token that meets this one surely meets the other."""
        tokens = other.tokens is None or (self.tokens is not None and set(self.tokens) <= set(other.tokens))
        within = self.rows is not None and all(any(a <= b for b in other.rows or ()) for a in self.rows)
        positions = Window(self.positions.start or 0, self.positions.stop) <= other.positions
        return positions and self.behind <= other.behind and tokens and (other.rows is None or within)

    @property
    def empty(self) -> bool:
        """Whether no token can meet it."""
        none = self.positions.stop is not None and self.positions.stop <= (self.positions.start or 0)
        return none or self.behind.empty or self.tokens == () or self.rows == ()

    @property
    def everywhere(self) -> bool:
        return self == Box()

    def __str__(self) -> str:
        terms = []
        if not self.behind.everything:
            start, stop = self.behind.start, self.behind.stop
            if start is not None and start >= 0:
                window = str(self.behind)
                terms.append("generated" if window == "0:" else f"generated[{window}]")
            else:  # ``stop`` is at most 0: no term reaches over the end of the prompt
                inside = Window(start, None if stop == 0 else stop)
                one = start is not None and stop == start + 1
                terms.append("prompt" if inside.everything else f"prompt[{start if one else inside}]")
        if not self.positions.everything:
            terms.append(str(self.positions))
        if self.tokens is not None:
            terms.append(f"token({', '.join(map(str, self.tokens))})")
        if self.rows is not None:
            terms.append(f"row({', '.join(map(str, self.rows))})")
        return " & ".join(terms) or "all"


@dataclass(frozen=True)
class Where:
    """A clause: tokens in one of the boxes of ``includes`` and in none of ``excludes``."""

    includes: tuple[Box, ...] = (Box(),)
    excludes: tuple[Box, ...] = ()

    @staticmethod
    def parse(clause: str) -> Where:
        """Read a clause. Raises OptionError for one that is empty or unknown, or that no token can meet."""
        parts = clause.split("!")
        if not parts[0].strip() and len(parts) > 1:
            raise OptionError(f"where={clause!r} names nothing to exclude from", "write all before the first !")
        includes = _boxes(parts[0], clause)
        excludes = [box for part in parts[1:] for box in _boxes(part, clause)]
        result = Where(tuple(dict.fromkeys(includes)), tuple(dict.fromkeys(excludes)))
        if all(any(box <= excluded for excluded in result.excludes) for box in result.includes):
            raise OptionError(f"where={clause!r} is met by no token: all are excluded", HINT)
        return replace(result, includes=(Box(),)) if Box() in result.includes else result

    @property
    def everywhere(self) -> bool:
        """Whether every token meets it."""
        return self == Where()

    @property
    def reads_prompt_lengths(self) -> bool:
        """Whether it depends on where prompts end."""
        return any(not box.behind.everything for box in self._all)

    @property
    def reads_positions(self) -> bool:
        """Whether it depends on positions."""
        return self.reads_prompt_lengths or any(not box.positions.everything for box in self._all)

    @property
    def reads_tokens(self) -> bool:
        """Whether it depends on token ids."""
        return any(box.tokens is not None for box in self._all)

    @property
    def reads_rows(self) -> bool:
        """Whether it depends on the row of the batch."""
        return any(box.rows is not None for box in self._all)

    def assumptions(self) -> list[str]:
        """What it takes for granted where the host does not tell more than the tokens, one line each."""
        told = []
        if self.reads_prompt_lengths:
            told.append("the input prompt_lengths: where nobody gives it, all tokens are prompt")
        if self.reads_rows:
            told.append("the input row_index: where nobody gives it, no token is of a row that a clause names")
        return [f"where={self} reads {each}" for each in told]

    @property
    def _all(self) -> tuple[Box, ...]:
        return (*self.includes, *self.excludes)

    def __str__(self) -> str:
        """The clause in its canonical spelling, which ``parse`` reads."""
        return " ! ".join([" | ".join(map(str, self.includes)), *map(str, self.excludes)])

    def mask(
        self, positions: Array, prompt_lengths: Array | None = None, tokens: Array | None = None, rows: Array | None = None
    ) -> Array:
        """Which tokens meet it: bool, shaped like ``positions`` [batch, seq].

        prompt_lengths, rows: ``[batch]``, the number of prompt tokens of each row (``None``: all tokens are prompt) and its
        index (``None``: 0, 1, 2 ...); tokens: the token ids, like ``positions``. Raises InputError where ids are needed and
        not given.
        """
        if self.reads_tokens and tokens is None:
            raise InputError(f"the clause {self} is about token ids, and there are none", "use positions instead")
        lengths = np.full(len(positions), 2**31 - 1) if prompt_lengths is None else np.asarray(prompt_lengths)
        numbers = np.arange(len(positions)) if rows is None else np.asarray(rows)

        def within(box: Box) -> Array:
            result = box.positions.holds(positions) & box.behind.holds(positions - lengths[:, None])
            if box.tokens is not None:
                assert tokens is not None
                result &= np.isin(tokens, box.tokens)
            if box.rows is not None:
                of_rows = np.zeros(len(numbers), bool)
                for window in box.rows:
                    of_rows |= window.holds(numbers)
                result &= of_rows[:, None]
            return result

        result = np.zeros(positions.shape, bool)
        for box in self.includes:
            result |= within(box)
        for box in self.excludes:
            result &= ~within(box)
        return result


def _boxes(text: str, clause: str) -> list[Box]:
    """The boxes of a union."""
    return [_box(part, clause) for part in text.split("|")]


def _box(text: str, clause: str) -> Box:
    result = Box()
    for term in text.split("&"):
        result = result & _term(term.strip(), clause)
    if result.empty:
        raise OptionError(f"where={clause!r}: no token meets {text.strip()!r}", HINT)
    return result


def _term(term: str, clause: str) -> Box:
    if not term:
        raise OptionError(f"where={clause!r} has an empty part" if clause.strip() else f"where={clause!r} is empty", HINT)
    if term == "all":
        return Box()
    if call := _CALL.fullmatch(term):
        return _call(call[1], call[2], term, clause)
    if part := _PART.fullmatch(term):
        return _part(part[1], part[2], term, clause)
    window = _window(term, term, clause)
    if (window.start or 0) < 0 or (window.stop or 0) < 0:
        raise OptionError(f"{term!r} in where={clause!r}: positions in the row count from 0", "prompt[-1] is the prompt's last")
    return Box(positions=window if window.start else Window(None, window.stop))


def _call(name: str, inside: str, term: str, clause: str) -> Box:
    windows = [_window(item.strip(), term, clause) for item in inside.split(",")]
    if any((bound or 0) < 0 for window in windows for bound in (window.start, window.stop)):
        raise OptionError(f"{term!r} in where={clause!r}: {name}s count from 0", HINT)
    if name == "row":
        return Box(rows=tuple(dict.fromkeys(windows)))
    if any(window.start is None or window.stop != window.start + 1 for window in windows):
        raise OptionError(f"{term!r} in where={clause!r} is no list of token ids", "write token(13, 198)")
    return Box(tokens=tuple(sorted({window.start for window in windows if window.start is not None})))


def _part(part: str, inside: str | None, term: str, clause: str) -> Box:
    if inside is None:
        return Box(behind=Window(0) if part == "generated" else Window(None, 0))
    window = _window(inside.strip(), term, clause)
    negative = [bound is not None and bound < 0 for bound in (window.start, window.stop)]
    if part == "generated":
        if any(negative):
            raise OptionError(f"{term!r} in where={clause!r}: where a text will end is not known", "count from 0")
        return Box(behind=Window(window.start or 0, window.stop))
    if window.start == -1 and window.stop == 0:  # prompt[-1]
        return Box(behind=Window(-1, 0))
    start, stop = window.start, window.stop
    result = Box(behind=Window(None, 0))
    if start is not None:
        result = result & (Box(behind=Window(start)) if start < 0 else Box(positions=Window(start or None)))
    if stop is not None:
        result = result & (Box(behind=Window(None, stop)) if stop < 0 else Box(positions=Window(None, stop)))
    return result


def _window(text: str, term: str, clause: str) -> Window:
    """``3``, ``3:``, ``:4`` or ``2:5``. Raises OptionError for anything else."""
    found = _WINDOW.fullmatch(text)
    if found is None or not text or text == ":":
        raise OptionError(f"{term!r} in where={clause!r} is not known", HINT)
    start, colon, stop = found.groups()
    if not colon and stop is not None:
        raise OptionError(f"{term!r} in where={clause!r} is not known", HINT)
    low, high = (None if bound is None else int(bound) for bound in (start, stop))
    if max(abs(low or 0), abs(high or 0)) > LARGEST:
        raise OptionError(f"where={clause!r}: positions go up to {LARGEST}", HINT)
    if not colon:
        assert low is not None
        return Window(low, low + 1)
    window = Window(low, high)
    if window.empty and ((low or 0) < 0) == ((high or 0) < 0):
        raise OptionError(f"where={clause!r} is met by no token: no position is in {text}", HINT)
    return window
