"""Moving a fixed edit into weights and biases, where that computes the same, and saying why or why not.

Let ``y = edit(x)`` be the value that readers see behind the edit, and ``x`` the value before it.

- *bias*: a shift of ``x`` moves into the bias of the linear, norm or convolution that writes ``x``, directly or through
  additions and reshapes of tokens, if nothing but the edit reads ``x`` and nothing else reads what lies between: then only
  readers of ``y`` notice.
- *writer weights*: a linear map (low-rank map, channel scale) moves into weight and bias of the linear or convolution that
  writes ``x``, or into the table of embeddings, if nothing but the edit reads ``x`` and no more than copies lie between.
- *norm weight*: factors per channel move into the weight and bias of the norm that writes ``x``, under the same condition.
- *reader weights*: a linear map moves into the weights of the readers of ``y`` if all of them are linears (and none is an
  output of the graph). *reader bias*: a shift moves into their biases if each has one.

A weight that others share is untied for that use; a quantized one cannot carry an edit. What is folded is recorded in
``graph.folds``, from which ``unfold`` takes it out again.

Sources: Refusal in Language Models Is Mediated by a Single Direction (2024), weight orthogonalisation; Steering Language
Models With Activation Engineering (2023), on steering as a bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from actgraph.graph import Editor, Graph, Node, Use, Value
from actgraph.graph.evaluate import evaluate
from actgraph.graph.folds import FoldRecord
from actgraph.graph.graph import Array
from actgraph.graph.prims import Prim
from actgraph.graph.views import Convolution, Linear, Norm
from actgraph.passes.steer.edits import Edit, read_edit
from actgraph.passes.steer.targets import (
    Illegal,
    Write,
    channels_last,
    conv_bias,
    conv_map,
    linear_bias,
    linear_map,
    norm_bias,
    norm_scale,
    rounding,
    table_edit,
)


@dataclass(frozen=True)
class Folding:
    """What became of one edit.

    rule: ``bias``, ``writer weights``, ``norm weight``, ``reader weights``, ``reader bias``, or ``declined``.
    condition: why folding computes the same, or what stands against it.
    nbytes: what was recorded to undo it.
    """

    site: str
    op: str
    rule: str
    condition: str
    nbytes: int = 0

    @property
    def folded(self) -> bool:
        return self.rule != "declined"


@dataclass
class _Plan:
    rule: str
    condition: str
    writes: list[Write]
    into: str  # the weight that takes it, for messages
    path: list[Value] = field(default_factory=list)  # values between a bias and x
    readers: list[Linear] = field(default_factory=list)


def fold_edit(graph: Graph, editor: Editor, node: Node, *, site: str = "") -> Folding:
    """Fold the edit that ``node`` makes into weights, if that is exact; nothing is changed if not.

    site: what the report and the record call the place (default: the site it is at). Numbers are computed in float64 and
    rounded once to the type of the weight. A folded node is erased, and its record appended to ``graph.folds``.
    """
    site = site or site_of(graph, node)
    edit = read_edit(graph, node)
    if isinstance(edit, str):
        return Folding(site, node.op, "declined", edit)
    reasons = []
    targets = _Targets(graph)
    for attempt in (_into_writer, _into_readers):
        try:
            plan = attempt(edit, targets)
        except Illegal as reason:
            reasons.append(str(reason))
            continue
        record = _carry_out(graph, editor, edit, plan, site)
        return Folding(site, node.op, plan.rule, plan.condition, record.nbytes)
    return Folding(site, node.op, "declined", "; ".join(reasons))


def site_of(graph: Graph, node: Node) -> str:
    """The name of the site that an edit is at: of its result, of the edges that read it, or of its value."""
    table, output = graph.site_table, node.output
    names = table.names_of(output)
    edges = [table.edge_name(use.node, use.index) for use in output.uses if use.node is not None]
    return table.role_name_of(output) or next((name for name in (*names, *edges) if name), f"%{output.name}")


def content_uses(value: Value) -> list[Use]:
    """The uses of ``value`` that see its numbers, and not its sizes alone."""
    prims = ((use, use.node.prim if use.node is not None else None) for use in value.uses)
    return [use for use, prim in prims if prim is None or prim.op != "shape_of"]


# --- where it may go --------------------------------------------------------------------------------------------------------


class _Targets:
    """What the values of a graph are written and read by, as it is now."""

    def __init__(self, graph: Graph) -> None:
        views = graph.views
        self.linears: dict[Value, Linear] = {linear.output: linear for linear in views.linears()}
        self.convs: dict[Value, Convolution] = {conv.output: conv for conv in views.convs()}
        self.norms: dict[Value, Norm] = {norm.output: norm for norm in views.norms()}

    def has(self, value: Value) -> bool:
        """Whether a linear, a convolution or a norm writes ``value``."""
        return value in self.linears or value in self.convs or value in self.norms

    def readers(self, value: Value) -> list[Linear]:
        """The linears that read ``value``. Raises Illegal naming a reader that is none."""
        by_input = {linear.input: linear for linear in self.linears.values()}
        uses = content_uses(value)
        for use in uses:
            if use.node is None:
                raise Illegal("it is an output of the graph, which no weight comes after")
            if use not in by_input:
                raise Illegal(f"it is read by {use.node.op} {use.node.name}, which has no weights to carry it")
        if not uses:
            raise Illegal("nothing reads it")
        return [by_input[use] for use in uses]


def _check_alone(edit: Edit) -> None:
    others = [use for use in content_uses(edit.x) if use.node != edit.node]
    if others:
        names = ", ".join(_name(use) for use in others[:3])
        raise Illegal(f"what is before it, %{edit.x.name}, is also read by {names}, which must not see the edit")


def _name(use: Use) -> str:
    return use.node.name if use.node is not None else "an output of the graph"


def _into_writer(edit: Edit, targets: _Targets) -> _Plan:
    _check_alone(edit)
    if edit.is_shift:
        found = _bias(edit, edit.x, targets)
        if isinstance(found, str):
            raise Illegal(found)
        return found
    value = _through_copies(edit.x, edit.axis, targets)
    path = _between(edit.x, value)
    last = edit.axis == -1
    if value in targets.norms and channels_last(targets.norms[value]) == last and (last or edit.axis == 1 - _rank(value)):
        if edit.factor is None:
            raise Illegal("it is written by a norm, whose weight is one factor per channel and no map")
        norm = targets.norms[value]
        writes = norm_scale(norm, edit)
        condition = "factors per channel of a norm's result are factors of its weight and bias"
        return _plan("norm weight", condition, writes, path=path)
    if value in targets.linears and last:
        linear = targets.linears[value]
        condition = f"nothing but the edit reads what {linear.weight.name} writes: a linear map of it is one of its weight"
        return _plan("writer weights", condition, linear_map(edit, linear, reader=False), path=path, linear=linear)
    if value in targets.convs and edit.axis == 1 - _rank(value):
        conv = targets.convs[value]
        condition = f"nothing but the edit reads what {conv.weight.name} writes: a map of its channels is one of its weight"
        return _plan("writer weights", condition, conv_map(edit, conv), path=path)
    table = _table(value) if last else None
    if table is not None:
        condition = "nothing but the edit reads the embeddings: a map of a row looked up is one of every row"
        return _plan("writer weights", condition, table_edit(edit, *table), path=path)
    raise Illegal(_writer_is_none(edit.x))


def _bias(edit: Edit, value: Value, targets: _Targets) -> _Plan | str:
    """Into the bias of what writes ``value`` or one of the summands of what it is the sum of; or why not."""
    assert edit.shift is not None
    last, channels = edit.axis == -1, edit.axis == 1 - _rank(value)
    why = ""
    try:
        if value in targets.linears and last:
            linear = targets.linears[value]
            created = "" if linear.bias is not None else " (it had none: one was created)"
            return _bias_plan(edit, value, linear_bias(linear, edit.shift), linear.weight.name, created)
        if value in targets.convs and channels:
            conv = targets.convs[value]
            created = "" if conv.bias is not None else " (it had none: one was created)"
            return _bias_plan(edit, value, conv_bias(conv, edit.shift), conv.weight.name, created)
        if value in targets.norms and (last if channels_last(targets.norms[value]) else channels):
            norm = targets.norms[value]
            assert norm.output == value
            return _bias_plan(edit, value, norm_bias(norm, edit), norm.bias.name if norm.bias is not None else "", "")
        table = _table(value) if last else None
        if table is not None:
            plan = _plan("writer weights", "a constant added to an embedding is added to every row of its table", [])
            plan.writes, plan.into = table_edit(edit, *table), table[0].name
            return plan
    except Illegal as reason:
        why = str(reason)
    prim = value.producer.prim if value.producer is not None else None
    if why or prim is None or not (prim.op == "add" or _passes_rows(prim, edit.axis)):
        return why or _writer_is_none(value)
    for operand in reversed([o for o in prim.operands if isinstance(o, Value) and not o.is_parameter]):
        others = [use for use in content_uses(operand) if use.node != value.producer]
        if others:
            why = why or f"its summand %{operand.name} is also read by {_name(others[0])}, which must not see the edit"
        elif operand.dtype != value.dtype or (prim.op == "add" and operand.shape != value.shape):
            why = why or f"its summand %{operand.name} is {operand.type} and is broadcast"
        elif len(content_uses(operand)) != 1:
            why = why or f"its summand %{operand.name} is added to itself"
        else:
            found = _bias(edit, operand, targets)
            if not isinstance(found, str):
                found.path.insert(0, operand)
                return found
            why = found
    return why or _writer_is_none(value)


def _bias_plan(edit: Edit, value: Value, write: Write, into: str, created: str) -> _Plan:
    through = "" if value == edit.x else " through additions that nothing else reads"
    condition = f"a constant added to what {into} writes{through}, for every token, is in its bias{created}"
    return _plan("bias", condition, [write], into=into)


def _into_readers(edit: Edit, targets: _Targets) -> _Plan:
    if edit.axis != -1:
        raise Illegal("its channels are not the last axis, which linears read")
    readers = targets.readers(edit.output)
    names = ", ".join(linear.weight.name for linear in readers)
    if edit.shift is not None:
        writes = []
        for linear in readers:
            wide = linear.read_weight().astype("float64")
            writes.append(linear_bias(linear, wide @ edit.shift, create=False))
        condition = f"all readers are linears with biases ({names}): what the constant adds to their results is constant"
        return _plan("reader bias", condition, writes, readers=readers)
    writes = [write for linear in readers for write in linear_map(edit, linear, reader=True)]
    condition = f"all readers are linears ({names}): a linear map of what they read is one of their weights"
    return _plan("reader weights", condition, writes, readers=readers)


def _plan(
    rule: str,
    condition: str,
    writes: list[Write],
    *,
    into: str = "",
    path: list[Value] | None = None,
    readers: list[Linear] | None = None,
    linear: Linear | None = None,
) -> _Plan:
    stored = [write.stored for write in writes if write.stored is not None]
    into = into or (linear.weight.name if linear is not None else stored[0].name if stored else "")
    condition += "".join(dict.fromkeys(rounding(value) for value in stored))
    return _Plan(rule, condition, writes, into, path or [], readers or [])


def _rank(value: Value) -> int:
    return len(value.shape) if value.shape is not None else 0


def _passes_rows(prim: Prim, axis: int) -> bool:
    """Whether an operation hands the channels of each token on as they are: a copy, or a reshape of the other axes."""
    source = prim.operands[0] if prim.operands else None
    if prim.op == "identity":
        return True
    if prim.op != "reshape" or axis != -1 or not isinstance(source, Value):
        return False
    before, after = source.shape, prim.output.shape
    if not before or not after:
        return False
    return isinstance(before[-1], int) and before[-1] == after[-1]


def _through_copies(value: Value, axis: int, targets: _Targets) -> Value:
    """What ``value`` is a copy or another arrangement of tokens of, over values that nothing else reads."""
    while not targets.has(value):
        prim = value.producer.prim if value.producer is not None else None
        source = prim.operands[0] if prim is not None and _passes_rows(prim, axis) else None
        if not isinstance(source, Value) or source.is_parameter or len(content_uses(source)) != 1:
            break
        value = source
    return value


def _between(value: Value, source: Value) -> list[Value]:
    found: list[Value] = []
    while value != source:
        prim = value.producer.prim if value.producer is not None else None
        assert prim is not None and isinstance(prim.operands[0], Value)
        value = prim.operands[0]
        found.append(value)
    return found


def _table(value: Value) -> tuple[Value, Use] | None:
    """The stored table whose rows ``value`` looks up, and the operand that reads it."""
    prim = value.producer.prim if value.producer is not None else None
    if prim is None or prim.op != "gather" or prim.attributes.get("axis", 0) != 0:
        return None
    table = prim.operands[0]
    if not isinstance(table, Value) or not table.is_parameter or len(table.shape or ()) != 2:
        return None
    return table, Use(prim.node, prim.node.operands.index(table))


def _writer_is_none(value: Value) -> str:
    node = value.producer
    if node is None:
        return f"it is written by nothing: %{value.name} is an input"
    if node.prim is not None and node.prim.op == "add":
        return f"it is the sum {node.name}, and a map of a sum is not one of a summand"
    return f"it is written by {node.op} {node.name}, which is no linear, norm, convolution or table of embeddings"


# --- doing it ---------------------------------------------------------------------------------------------------------------


def _carry_out(graph: Graph, editor: Editor, edit: Edit, plan: _Plan, site: str) -> FoldRecord:
    node, x, y = edit.node, edit.x, edit.output
    table = graph.site_table
    lost = [row for value in plan.path for row in table.rows_on(value, value.uses)]
    lost += table.rows_on(y, y.uses) if plan.readers else []
    path = [content_uses(value)[0] for value in plan.path]  # a bias of its own makes another value to be read there
    operands = tuple(None if o is None else (o.name, _data(graph, o)) for o in node.operands[1:])
    readers = tuple(linear.input for linear in plan.readers)
    attributes, origin, name, output, op = node.attributes, node.origin, node.name, y.name, node.op
    if plan.readers:
        editor.forget_sites(y, f"{editor.by or 'an edit'} (folded into the weights of its readers)")
    editor.redirect(y, x, y.uses)
    editor.erase(node)
    anchor = readers[0] if readers else next(iter(x.uses), None)
    changes = tuple(write.make(editor) for write in plan.writes)
    for use in path:
        assert use.node is not None
        shifted = use.node.operands[use.index]
        assert shifted is not None
        what = "shift" if edit.is_shift else "map"
        editor.forget_sites(shifted, f"{editor.by or 'an edit'} (its {what} was folded into {plan.into}'s bias)")
    after = _now(graph, anchor, x)
    record = FoldRecord(
        site=site, rule=plan.rule, condition=plan.condition, node=name, output=output, op=op, attributes=attributes,
        origin=origin, operands=operands, changes=changes, value="" if plan.readers else after.name,
        readers=_weights(graph, readers), path=tuple(_now(graph, use, x).name for use in path), sites=tuple(lost),
    )  # fmt: skip
    graph.folds.append(record)
    return record


def _now(graph: Graph, use: Use | None, value: Value) -> Value:
    """What ``use`` reads now (a new bias may stand before it); ``value`` where there is no use."""
    if use is None:
        return value
    if use.node is None:
        return graph.outputs()[use.index][1]
    operand = use.node.operands[use.index]
    return operand if operand is not None else value


def _weights(graph: Graph, readers: Sequence[Use]) -> tuple[str, ...]:
    if not readers:
        return ()
    by_input = {linear.input: linear.weight.name for linear in graph.views.linears()}
    return tuple(by_input[use] for use in readers)


def _data(graph: Graph, value: Value) -> Array:
    return evaluate(graph, value).copy()
