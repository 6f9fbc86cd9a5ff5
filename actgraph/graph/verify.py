"""The verifier: every invariant of a graph, checked through the reading interface alone.

Structure (SSA, topological order, no dangling users, unique names, signature, slots paired), types where they can be known,
operands that fit together, provenance, and the attributes and operands of actgraph ops. What only a dialect can see is in
``Graph.structural_problems``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

from actgraph.errors import ActgraphError, VerifyError
from actgraph.graph.fitting import misfits
from actgraph.graph.graph import Graph, Kind, Node, Value
from actgraph.graph.slots import slot_problems
from actgraph.ops.dtypes import DType
from actgraph.ops.registry import DOMAIN, get_op

#: How many problems an error lists.
LISTED = 10


def verify(graph: Graph, nodes: Iterable[Node] | None = None) -> None:
    """Raise VerifyError listing up to ten broken invariants, the number of the others, and nothing when all hold.

    nodes: check these nodes alone (what an edit touched); order and names are then checked against their neighbours only.
    """
    found = problems(graph) if nodes is None else _local_problems(nodes)
    listed = list(islice(found, LISTED + 1))
    if listed:
        more = " and more" if len(listed) > LISTED else ""
        shown = listed[:LISTED]
        raise VerifyError(
            f"{graph.name}: {'; '.join(shown)}{more}",
            "a pass that edits through Editor cannot cause this: please report it" if graph.history else "",
        )


def problems(graph: Graph) -> Iterator[str]:
    """Every broken invariant of ``graph``, one line each."""
    yield from _names(graph)
    yield from _order(graph)
    yield from _users(graph)
    yield from _signature(graph)
    yield from slot_problems(graph)
    for node in graph.nodes():
        yield from _node_problems(node)
    yield from graph.structural_problems()


def _local_problems(nodes: Iterable[Node]) -> Iterator[str]:
    for node in nodes:
        yield from _node_problems(node)
        for index, operand in enumerate(node.operands):
            if operand is not None and not any(use.node == node and use.index == index for use in operand.uses):
                yield f"{node.name} reads {_show(operand)}, which does not list it as a user"


def _names(graph: Graph) -> Iterator[str]:
    seen_values: dict[str, Value] = {}
    for value in _all_values(graph):
        name = value.name
        if not name:
            yield "a value has no name"
        elif name in seen_values and seen_values[name] != value:
            yield f"two values are called %{name}"
        seen_values.setdefault(name, value)
    seen_nodes: set[str] = set()
    for node in graph.nodes():
        if node.name in seen_nodes:
            yield f"two nodes are called {node.name}"
        seen_nodes.add(node.name)
    labels = [label for label, _ in graph.outputs()]
    yield from (f"two outputs are called {label!r}" for label in sorted({x for x in labels if labels.count(x) > 1}))


def _all_values(graph: Graph) -> Iterator[Value]:
    yield from graph.inputs()
    yield from (p for p in graph.parameters() if p.kind is Kind.PARAMETER)
    for node in graph.nodes():
        yield from node.outputs


def _order(graph: Graph) -> Iterator[str]:
    """Each value is defined once, and before it is read."""
    defined: set[Value] = set(graph.inputs()) | set(graph.parameters())
    for node in graph.nodes():
        for operand in node.operands:
            if operand is not None and operand not in defined:
                where = "after the node" if operand.producer is not None else "nowhere in the graph"
                yield f"{node.name} reads {_show(operand)}, which is defined {where}"
        for output in node.outputs:
            if output in defined:
                yield f"{_show(output)} is defined twice"
            defined.add(output)
    for label, value in graph.outputs():
        if value not in defined:
            yield f"output {label!r} is {_show(value)}, which nothing in the graph defines"


def _users(graph: Graph) -> Iterator[str]:
    """Operands and uses are two views of the same edges."""
    edges: dict[Value, set[tuple[Node | None, int]]] = {}
    for node in graph.nodes():
        for index, operand in enumerate(node.operands):
            if operand is not None:
                edges.setdefault(operand, set()).add((node, index))
    for index, (_, value) in enumerate(graph.outputs()):
        edges.setdefault(value, set()).add((None, index))
    for value in _all_values(graph):
        listed = {(use.node, use.index) for use in value.uses}
        read = edges.get(value, set())
        for node_or_output, index in listed - read:
            reader = node_or_output.name if node_or_output is not None else f"output {index}"
            yield f"{_show(value)} lists {reader} as a user, which does not read it"
        for node_or_output, index in read - listed:
            reader = node_or_output.name if node_or_output is not None else f"output {index}"
            yield f"{reader} reads {_show(value)}, which does not list it as a user"


def _signature(graph: Graph) -> Iterator[str]:
    if not graph.outputs():
        yield "the graph has no output"
    for value in graph.inputs():
        if value.kind not in (Kind.INPUT, Kind.PARAMETER):
            yield f"input {value.name!r} is computed by {value.producer.name if value.producer else '?'}"
        if value.dtype is None:
            yield f"input {value.name!r} has no element type"
    for name in [value.name for value in graph.inputs()] + [label for label, _ in graph.outputs()]:
        try:
            graph.role(name)
        except KeyError:
            yield f"{name!r} has no role in the signature"


def _node_problems(node: Node) -> Iterator[str]:
    origin = node.origin
    if not origin.sources and not origin.created_by:
        yield f"{node.name} has no provenance"
    if node.op.startswith(f"{DOMAIN}."):
        yield from _op_problems(node)
    else:
        yield from misfits(node)


def _op_problems(node: Node) -> Iterator[str]:
    """The contract of an actgraph op: attributes, number and dtypes of operands, output types."""
    operands = node.operands
    try:
        op = get_op(node.op)
        attributes = op.complete(node.attributes)
        expected = op.result_types([operand.type if operand is not None else None for operand in operands], attributes)
    except (ActgraphError, ValueError) as error:
        yield f"{node.name}: {error.message if isinstance(error, ActgraphError) else error}"
        return
    names = [spec.name for spec in op.inputs]
    for spec, operand in zip(op.inputs, operands, strict=False):
        other = operands[names.index(spec.same_as)] if spec.same_as in names else None
        if operand is not None and other is not None and _clash(operand.dtype, other.dtype):
            yield f"{node.name}: operand {spec.name!r} is {operand.dtype} but {spec.same_as!r} is {other.dtype}"
    if len(node.outputs) != len(op.outputs):
        yield f"{node.name}: {node.op} has {len(op.outputs)} outputs, not {len(node.outputs)}"
        return
    for output, want in zip(node.outputs, expected, strict=True):
        have = output.type
        if _clash(have.dtype, want.dtype):
            yield f"{_show(output)} is {have.dtype}, but {node.op} makes {want.dtype}"
        if have.shape is None or want.shape is None:
            continue
        clash = len(have.shape) != len(want.shape) or any(
            isinstance(a, int) and isinstance(b, int) and a != b for a, b in zip(have.shape, want.shape, strict=False)
        )
        if clash:
            yield f"{_show(output)} is {have}, but {node.op} makes {want}"
        elif have.dtype is None:
            yield f"{_show(output)} has no element type, though {node.op} gives it one"


def _clash(left: DType | None, right: DType | None) -> bool:
    return left is not None and right is not None and left is not right


def _show(value: Value) -> str:
    return f"%{value.name}"
