"""Clauses as values of a graph: which tokens of a call meet one (see ``where``).

The mask is made of a few plain operations on context values (positions, lengths of prompts, token ids, rows), so every engine
runs it, and one set of them serves all sites of a pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from actgraph.errors import InputError
from actgraph.graph.context import graph_context, token_dims
from actgraph.graph.where import Box, Where, Window
from actgraph.ops.dtypes import DType

if TYPE_CHECKING:
    from actgraph.graph.editor import Editor
    from actgraph.graph.graph import Graph, Value


def where_mask(editor: Editor, graph: Graph, clause: str | Where) -> Value | None:
    """1 for the tokens that ``clause`` names and 0 for others, float32, to be broadcast to [batch, seq]; ``None``: all tokens.

    Positions count the real tokens of each row from 0, padding excluded (a token of padding has position 0 or none that
    matters). Token p of a row is generated iff ``p >= prompt_lengths[row]``; where nobody tells them, all are prompt.
    Rows are told by ``row_index``; where nobody does, no token is of a row that a clause names.
    Raises OptionError for a clause that cannot be read, and InputError for a graph without token dimensions, or without token
    ids where the clause names some.
    """
    where = Where.parse(clause) if isinstance(clause, str) else clause
    if where.everywhere:
        return None
    factors = _Factors(editor, graph)
    named = factors.union([factors.box(box) for box in where.includes])
    for box in where.excludes:
        excluded = factors.box(box)
        assert excluded is not None
        named = factors.both(named, factors.inverse(excluded))
    return named


@dataclass
class _Factors:
    """Masks of numbers 0 and 1, each made once."""

    editor: Editor
    graph: Graph
    _made: dict[object, Value] = field(default_factory=dict)

    def box(self, box: Box) -> Value | None:
        """1 where all conditions of ``box`` are met; ``None``: everywhere."""
        result: Value | None = None
        if not box.positions.everything:
            result = self.both(result, self._within(box.positions, "positions"))
        if not box.behind.everything:
            result = self.both(result, self._within(box.behind, "behind"))
        if box.tokens is not None:
            result = self.both(result, self._one_of(box.tokens))
        if box.rows is not None:
            result = self.both(result, self.union([self._within(Window(w.start or 0, w.stop), "rows") for w in box.rows]))
        return result

    def union(self, masks: Sequence[Value | None]) -> Value | None:
        """1 where one of ``masks`` is."""
        result = masks[0]
        for mask in masks[1:]:
            if result is None or mask is None:
                return None
            neither = self.both(self.inverse(result), self.inverse(mask))
            assert neither is not None
            result = self.inverse(neither)
        return result

    def both(self, a: Value | None, b: Value | None) -> Value | None:
        if a is None or b is None:
            return b if a is None else a
        return self.editor.insert("mul", [a, b], name="where").output

    def inverse(self, mask: Value) -> Value:
        """1 - mask."""
        return self._once(("not", mask), lambda: self.editor.insert("sub", [np.asarray(1, np.float32), mask]).output)

    def _within(self, window: Window, what: str) -> Value | None:
        result: Value | None = None
        if window.start is not None:
            result = self._above(what, window.start - 1)
        if window.stop is not None:
            result = self.both(result, self.inverse(self._above(what, window.stop - 1)))
        return result

    def _above(self, what: str, than: int) -> Value:
        """1 where an integer is greater than ``than``, else 0."""

        def make() -> Value:
            number = self._number(what)
            above = self.editor.insert("sub", [number, np.asarray(than)]).output if than else number
            number = self.editor.insert("cast", [above], {"to": DType.F32}).output
            bounds = np.zeros((), np.float32), np.ones((), np.float32)
            return self.editor.insert("clip", [number, *bounds]).output

        return self._once(("above", what, than), make)

    def _number(self, what: str) -> Value:
        """``positions``, ``behind`` (how far behind the prompt) or ``rows``, to be broadcast to [batch, seq]."""
        if what == "positions":
            return self._once(what, lambda: graph_context(self.graph, self.editor, "positions"))
        if what == "rows":
            return self._once(what, lambda: self._of_rows("row_index"))
        positions = self._number("positions")
        return self._once(what, lambda: self.editor.insert("sub", [positions, self._of_rows("prompt_lengths")]).output)

    def _of_rows(self, context: str) -> Value:
        return self.editor.insert("reshape", [graph_context(self.graph, self.editor, context)], {"shape": (-1, 1)}).output

    def _one_of(self, tokens: tuple[int, ...]) -> Value:
        """1 where the token id is one of ``tokens``: looked up in a table of 0 and 1."""

        def make() -> Value:
            ids = next((v for v in self.graph.inputs() if v.name in ("input_ids", "decoder_input_ids")), None)
            if ids is None or ids.shape is None or ids.shape[:2] != token_dims(self.graph):
                takes = ", ".join(value.name for value in self.graph.inputs())
                raise InputError(f"{self.graph.name} takes {takes}: no token ids that a clause could name", "name positions")
            known = _vocabulary(ids)
            if tokens[-1] >= known:
                raise InputError(f"token({tokens[-1]}): {self.graph.name} has {known} tokens", "see the tokenizer's vocabulary")
            table = np.zeros((known, 1), np.float32)
            table[list(tokens)] = 1
            found = self.editor.insert("gather", [table, ids], {"axis": 0}, name="where_token").output
            return self.editor.insert("sum", [found], {"axes": (-1,), "keepdims": False}).output

        return self._once(("tokens", tokens), make)

    def _once(self, key: object, make: Callable[[], Value]) -> Value:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


def _vocabulary(ids: Value) -> int:
    """How many tokens the graph knows: the rows of the table that it looks ids up in. Raises InputError without one."""
    same = [ids]  # the ids, and the same in other shapes and types
    for value in same:
        for use in value.uses:
            prim = use.node.prim if use.node is not None else None
            if prim is None:
                continue
            if prim.op in ("reshape", "identity", "cast"):
                same.append(prim.output)
            table = prim.operands[0] if prim.op == "gather" and prim.operands[1] == value else None
            if table is not None and not isinstance(table, (int, float)) and table.shape and isinstance(table.shape[0], int):
                return table.shape[0]
    raise InputError(f"{ids.graph.name} does not look {ids.name} up in a table", "name positions instead of token ids")
