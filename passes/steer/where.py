"""Which tokens a pass acts on, written as text: ``prompt``, ``generated``, ``3:``, ``prompt & 2:5``.

Positions and lengths are context values (``actgraph.graph.context``) that the host gives, never read off the shape of a
tensor: a call with a cache has the new tokens only, and rows are padded. So a clause means the same for a whole text, for
chunks of it, for single tokens behind a cache, and in a batch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from actgraph.errors import OptionError
from actgraph.graph import Editor, Graph, Value
from actgraph.graph.context import graph_context
from actgraph.ops.dtypes import DType

_WINDOW = re.compile(r"([0-9]*)\s*:\s*([0-9]*)")
_LARGEST = 1 << 24  # positions are compared as differences in float32, which holds integers up to here
HINT = "use all, prompt, generated, a window of positions such as 3:, :4 or 2:5, or several of them joined by &"


@dataclass(frozen=True)
class Where:
    """A clause: the tokens at positions ``start <= p < stop`` of their row (``None``: no bound), of the prompt or behind it.

    part: ``"prompt"`` (``p`` is less than the number of prompt tokens of the row), ``"generated"``, or ``""`` for both.
    """

    start: int = 0
    stop: int | None = None
    part: str = ""

    @staticmethod
    def parse(clause: str) -> Where:
        """Read a clause. Raises OptionError for one that is empty or unknown, or that no token can meet."""
        result = Where()
        for term in clause.split("&"):
            result = result & _term(term.strip(), clause)
        if result.stop is not None and result.start >= result.stop:
            raise OptionError(f"where={clause!r} is met by no token: no position is in {result.start}:{result.stop}", HINT)
        return result

    def __and__(self, other: Where) -> Where:
        """The tokens that meet both. Raises OptionError when none can."""
        if self.part and other.part and self.part != other.part:
            raise OptionError("where: no token is both of the prompt and generated", HINT)
        stops = [stop for stop in (self.stop, other.stop) if stop is not None]
        return Where(max(self.start, other.start), min(stops, default=None), self.part or other.part)

    @property
    def everywhere(self) -> bool:
        """Whether every token meets it."""
        return self == Where()


def _term(term: str, clause: str) -> Where:
    if term == "all":
        return Where()
    if term in ("prompt", "generated"):
        return Where(part=term)
    window = _WINDOW.fullmatch(term)
    if window is None or not any(window.groups()):
        what = f"{term!r} in where={clause!r} is not known" if term else f"where={clause!r} is empty"
        what = what if term or not clause.strip() else f"where={clause!r} has an empty part"
        raise OptionError(what, HINT)
    start, stop = (int(number) if number else None for number in window.groups())
    if max(start or 0, stop or 0) > _LARGEST:
        raise OptionError(f"where={clause!r}: positions go up to {_LARGEST}", HINT)
    return Where(start or 0, stop)


def where_mask(editor: Editor, graph: Graph, clause: str | Where) -> Value | None:
    """1 for the tokens that ``clause`` names and 0 for others, float32, to be broadcast to [batch, seq]; ``None``: all tokens.

    Positions count the real tokens of each row from 0, padding excluded (a token of padding has position 0 or none that
    matters). Token p of a row is generated iff ``p >= prompt_lengths[row]``; where nobody tells them, all are prompt.
    Raises OptionError for a clause that cannot be read, and InputError for a graph without token dimensions.
    """
    where = Where.parse(clause) if isinstance(clause, str) else clause
    factors = []
    positions = graph_context(graph, editor, "positions")
    if where.start:
        factors.append(_positive(editor, positions, where.start - 1))
    if where.stop is not None:
        factors.append(_inverse(editor, _positive(editor, positions, where.stop - 1)))
    if where.part:
        lengths = editor.insert("reshape", [graph_context(graph, editor, "prompt_lengths")], {"shape": (-1, 1)}).output
        left = editor.insert("sub", [lengths, positions]).output
        of_prompt = _positive(editor, left, 0)
        factors.append(of_prompt if where.part == "prompt" else _inverse(editor, of_prompt))
    result: Value | None = None
    for factor in factors:
        result = factor if result is None else editor.insert("mul", [result, factor], name="where").output
    return result


def _positive(editor: Editor, number: Value, than: int) -> Value:
    """1 where an integer is greater than ``than``, else 0."""
    above = editor.insert("sub", [number, np.asarray(than)]).output if than else number
    return editor.insert("clip", [editor.insert("cast", [above], {"to": DType.F32}).output, 0.0, 1.0]).output


def _inverse(editor: Editor, factor: Value) -> Value:
    """1 - factor."""
    return editor.insert("sub", [np.asarray(1, np.float32), factor]).output
