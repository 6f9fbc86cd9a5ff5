"""Unfolding: taking edits out of weights again, from what was recorded when they were folded."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar

import numpy as np
from pydantic import Field

from actgraph.errors import PassError
from actgraph.graph import Editor, Graph, Use, Value
from actgraph.graph.evaluate import evaluate
from actgraph.graph.folds import FoldRecord, WeightChange
from actgraph.graph.graph import Array
from actgraph.graph.text import array_hash, data_hash
from actgraph.graph.views import Linear
from actgraph.passes.places import Selector
from actgraph.passes.steer.fold_edits import promise
from actgraph.passes.steer.folding import content_uses
from actgraph.pipeline.base import Declined, Pass, PassContext, PassResult


class Unfold(Pass):
    """Take folded edits out of weights: the nodes are put back where they were, and the weights as they were, bit for bit.

    Edits are taken out in the reverse order of folding. One whose weight was changed since (by another pass, or outside) is
    declined, and the reason says which; so is one below it in the same weight. Names of sites that folding took away denote
    what they did again.
    """

    name: ClassVar[str] = "unfold"
    family: ClassVar[str] = "steer"
    repeatable: ClassVar[bool] = True

    site: Selector = Field(default=(), description="Names or globs of sites whose edits are taken out; default: all edits.")

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        patterns = (self.site,) if isinstance(self.site, str) else tuple(self.site)
        if not graph.folds:
            raise PassError("unfold: nothing was folded in this graph", "fold_edits, steer and ablate record what they fold")
        chosen = [f for f in graph.folds if not patterns or any(fnmatchcase(f.site, pattern) for pattern in patterns)]
        if not chosen:
            sites = ", ".join(dict.fromkeys(record.site for record in graph.folds))
            raise PassError(f"unfold: nothing was folded at {', '.join(patterns)}", f"edits were folded at {sites}")
        result = PassResult()
        with context.edit(graph) as editor:
            for record in reversed(chosen):
                reason = unfold_edit(graph, editor, record)
                if reason:
                    result.declined.append(Declined(record.site, reason))
                else:
                    result.counts["unfolded"] += 1
                rule = "declined" if reason else f"out of the {record.rule}"
                result.details.append({"site": record.site, "op": record.op, "rule": rule, "condition": reason})
        result.messages += editor.messages
        result.expected_change, result.expected_size = promise(graph)
        if not result.counts:
            reasons = "; ".join(f"{each.site}: {each.reason}" for each in result.declined[:5])
            raise PassError(f"unfold took nothing out: {reasons}", "unfold before the passes that change those weights")
        return result


def unfold_edit(graph: Graph, editor: Editor, record: FoldRecord) -> str:
    """Take one folded edit out again, and its record off ``graph.folds``; or return why not, with nothing changed."""
    try:
        plan = _plan(graph, record)
    except _Changed as reason:
        return str(reason)
    renamed: dict[Value, Value] = {}
    names: dict[str, str] = {}
    for undo in plan.undos:
        undo.apply(editor, renamed, names)
    operands = [_stored(graph, editor, operand) for operand in record.operands]
    if plan.value is not None:
        value = renamed.get(plan.value, plan.value)
        places = [(value, list(value.uses))]
    else:
        places = _by_value(plan.inputs)
    for value, uses in places:
        node = editor.insert(
            record.op, [value, *operands], record.attributes, after=value.producer, name=record.node, origin=record.origin
        )
        editor.redirect(value, node.output, uses)
        names[record.output] = node.output.name
    rows = [{**row, "value": names.get(row["value"], row["value"])} if "value" in row else row for row in record.sites]
    graph.site_table.put_back(graph, rows)
    graph.folds = [other for other in graph.folds if other is not record]
    return ""


class _Changed(Exception):
    """Why an edit cannot be taken out."""


@dataclass
class _Undo:
    """One weight change to undo: ``data`` for the parameter, the ``original`` in its place, or (neither) no bias."""

    change: WeightChange
    parameter: Value
    data: Array | None = None
    original: Value | None = None

    def apply(self, editor: Editor, renamed: dict[Value, Value], names: dict[str, str]) -> None:
        """Change the graph. ``renamed`` and ``names`` are told what stands for the sum with a bias that goes."""
        if self.data is not None:
            editor.set_parameter(self.parameter, self.data)
            return
        use = self.parameter.uses[0]
        if self.original is not None:
            for each in self.parameter.uses:
                assert each.node is not None
                editor.set_operand(each.node, each.index, self.original)
        else:
            node = use.node
            assert node is not None
            if node.prim is None or node.prim.op != "add":
                editor.set_operand(node, use.index, None)
            else:
                before = next(o for o in node.operands if o is not None and o != self.parameter)
                editor.redirect(node.output, before)
                renamed[node.output] = before
                names[node.output.name] = before.name
                editor.erase(node)
                return
        editor.erase_stored(self.parameter)


@dataclass
class _Plan:
    undos: list[_Undo]
    value: Value | None
    inputs: list[Use]


def _plan(graph: Graph, record: FoldRecord) -> _Plan:
    """What to do, or _Changed."""
    undos: list[_Undo] = []
    known: dict[str, Array] = {}  # data that earlier steps bring back
    for change in reversed(record.changes):
        undos.append(_undo(graph, change, known))
    for name in record.path:
        if len(content_uses(_value(graph, name))) != 1:
            raise _Changed(f"%{name}, which holds the edit on its way to %{record.value}, has other readers now")
    if record.value:
        return _Plan(undos, _value(graph, record.value), [])
    by_weight: dict[str, list[Linear]] = {}
    for linear in graph.views.linears():
        by_weight.setdefault(linear.weight.name, []).append(linear)
    inputs = []
    for name in record.readers:
        found = by_weight.get(name, [])
        if len(found) != 1:
            raise _Changed(f"{len(found)} linears read the weight {name} now, and not one")
        inputs.append(found[0].input)
    return _Plan(undos, None, inputs)


def _undo(graph: Graph, change: WeightChange, known: dict[str, Array]) -> _Undo:
    try:
        parameter = graph.value(change.parameter)
    except KeyError:
        raise _Changed(f"the weight {change.parameter} that holds it is gone: a later pass replaced it") from None
    if not parameter.is_parameter:
        raise _Changed(f"{change.parameter} is no stored weight now")
    now = known.get(change.parameter)
    digest = array_hash(now) if now is not None else data_hash(parameter)
    if digest != change.digest:
        raise _Changed(f"the weight {change.parameter} that holds it was changed since, by a later pass or outside")
    if change.kind == "untied":
        try:
            original = graph.value(change.original)
        except KeyError:
            raise _Changed(f"{change.original}, which {change.parameter} was copied from, is gone") from None
        data = known.get(change.original)
        data = evaluate(graph, original) if data is None else data
        if array_hash(data) != change.original_digest:
            raise _Changed(f"{change.original}, which {change.parameter} was copied from, was changed since")
        return _Undo(change, parameter, original=original)
    if change.kind == "created":
        uses = parameter.uses
        prim = uses[0].node.prim if len(uses) == 1 and uses[0].node is not None else None
        if prim is None or not (prim.op == "add" or (prim.op in ("linear", "conv", "conv_transpose") and uses[0].index == 2)):
            raise _Changed(f"the bias {change.parameter} is no longer the bias of one linear or convolution")
        return _Undo(change, parameter)
    data = change.undone(now if now is not None else graph.read(parameter))
    known[change.parameter] = np.ascontiguousarray(data)
    return _Undo(change, parameter, data=known[change.parameter])


def _value(graph: Graph, name: str) -> Value:
    try:
        return graph.value(name)
    except KeyError:
        raise _Changed(f"the value %{name} that it was at is gone: a later pass rewrote it") from None


def _by_value(inputs: list[Use]) -> list[tuple[Value, list[Use]]]:
    """The places by what they read now (another edit may have come between for some)."""
    found: dict[Value, list[Use]] = {}
    for use in inputs:
        assert use.node is not None
        value = use.node.operands[use.index]
        assert value is not None
        found.setdefault(value, []).append(use)
    return list(found.items())


def _stored(graph: Graph, editor: Editor, operand: tuple[str, Array] | None) -> Value | Array | None:
    """The stored operand as it was: the parameter of that name, if it is there, or a new one."""
    if operand is None:
        return None
    name, data = operand
    try:
        value = graph.value(name)
    except KeyError:
        value = None
    if value is not None and value.is_parameter and data_hash(value) == array_hash(data):
        return value
    return editor.add_parameter(name, data)
