"""Structural difference of two graphs.

Graphs of one dialect are compared node by node: nodes are matched by name, and what is left over by origin (source nodes,
op and pass), so that a renumbered graph does not look rewritten. Graphs of different dialects have no nodes in common; for
them the diff compares signature, sites and views, and says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from actgraph.graph.graph import Graph, Node, Role, Value
from actgraph.graph.text import attribute_text, data_hash, value_text

if TYPE_CHECKING:
    from actgraph.graph.program import Program


@dataclass(frozen=True)
class Change:
    """One difference. ``old`` and ``new`` are one line each; ``None`` where the thing is on one side only.

    kind: ``dialect``, ``input``, ``output``, ``node``, ``parameter``, ``site``, ``view``, ``pass`` or ``metadata``.
    """

    kind: str
    name: str
    old: str | None
    new: str | None

    @property
    def action(self) -> str:
        """``added``, ``removed`` or ``changed``."""
        return "added" if self.old is None else "removed" if self.new is None else "changed"


@dataclass(frozen=True)
class GraphDiff:
    """The differences from ``left`` to ``right``; false when there are none.

    scope: what was compared, ``"structure"`` or (across dialects) ``"signature, sites and views"``.
    unrelated: what each takes, where no input of one is like any input of the other by name or type; empty otherwise.
    """

    left: str
    right: str
    scope: str
    changes: tuple[Change, ...]
    unrelated: str = ""

    def __bool__(self) -> bool:
        return bool(self.changes)

    def __iter__(self) -> Iterator[Change]:
        return iter(self.changes)

    def counts(self) -> dict[str, int]:
        """How many of each, such as ``{"node added": 4, "parameter changed": 1}``."""
        return dict(Counter(f"{change.kind} {change.action}" for change in self.changes))

    def text(self) -> str:
        """Lines with ``-`` and ``+``, grouped by kind, under a header that says what was compared.

        Of models that take different inputs only that is said; iterate over the diff for all the rest.
        """
        head = [f"--- {self.left}", f"+++ {self.right}", f"compared: {self.scope}"]
        if self.unrelated:
            return "\n".join([*head, f"different models: {self.unrelated}"]) + "\n"
        if not self.changes:
            return "\n".join([*head, "no difference"]) + "\n"
        lines = list(head)
        last = ""
        for change in self.changes:
            if change.kind != last:
                lines.append(f"@@ {plural(change.kind)}")
                last = change.kind
            if change.old is not None:
                lines.append(f"- {change.old}")
            if change.new is not None:
                lines.append(f"+ {change.new}")
        lines.append("summary: " + ", ".join(map(_counted, self.counts().items())))
        return "\n".join(lines) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """The diff as JSON data."""
        changes = [{"kind": c.kind, "action": c.action, "name": c.name, "old": c.old, "new": c.new} for c in self.changes]
        return {
            "left": self.left, "right": self.right, "scope": self.scope, "unrelated": self.unrelated, "counts": self.counts(),
            "changes": changes,
        }  # fmt: skip

    def __str__(self) -> str:
        return self.text()


def plural(noun: str, count: int = 2) -> str:
    """``node`` -> ``nodes``, ``pass`` -> ``passes``; ``metadata`` and one of anything stay."""
    if count == 1 or noun == "metadata":
        return noun
    return f"{noun}es" if noun.endswith("s") else f"{noun}s"


def _counted(item: tuple[str, int]) -> str:
    """``("node added", 3)`` -> ``3 nodes added``; of a graph of a program: ``prefill: 3 nodes added``."""
    of, _, counted = item[0].rpartition(": ")
    kind, action = counted.split(" ")
    return f"{of}: {item[1]} {plural(kind, item[1])} {action}" if of else f"{item[1]} {plural(kind, item[1])} {action}"


def diff(left: Graph | Program, right: Graph | Program) -> GraphDiff:
    """What changed from ``left`` to ``right``. Equal graphs give an empty diff; names of graphs are not compared.

    Programs: see ``diff_programs``; a graph is a program of one.
    """
    from actgraph.graph.program import Program, diff_programs

    if isinstance(left, Program) or isinstance(right, Program):
        return diff_programs(*(side if isinstance(side, Program) else Program.of(side) for side in (left, right)))
    if left.dialect == right.dialect:
        return GraphDiff(left.name, right.name, "structure", tuple(_same_dialect(left, right)), _unrelated(left, right))
    note = Change("dialect", "dialect", left.dialect, right.dialect)
    changes = [note, *_signatures(left, right), *_sites(left, right, types=True), *_views(left, right)]
    if changes == [note]:
        changes = []
    return GraphDiff(
        f"{left.name} ({left.dialect})", f"{right.name} ({right.dialect})", "signature, sites and views", tuple(changes),
        _unrelated(left, right),
    )  # fmt: skip


def _unrelated(left: Graph, right: Graph) -> str:
    """Why the two cannot be versions of one model: they share no input, by name or by type. Empty where they may be."""
    users = [[value for value in graph.inputs() if graph.role(value.name) is Role.USER] for graph in (left, right)]
    if not all(users):
        return ""
    for same in (lambda value: value.name, lambda value: str(value.type)):
        if set(map(same, users[0])) & set(map(same, users[1])):
            return ""
    takes = [", ".join(f"{value.name} {value.type}" for value in values) for values in users]
    return f"the first takes {takes[0]}, the second {takes[1]}"


def _same_dialect(left: Graph, right: Graph) -> Iterator[Change]:
    yield from _signatures(left, right)
    renamed = _match(left, right)
    back = {new: old for old, new in renamed.items()}
    values = {
        a.name: b.name
        for old, new in renamed.items()
        for a, b in zip(old.outputs, new.outputs, strict=False)
        if a.name != b.name
    }
    for node in right.nodes():
        if node not in back:
            yield Change("node", node.name, None, node_text(node))
    for node in left.nodes():
        if node not in renamed:
            yield Change("node", node.name, node_text(node), None)
            continue
        old, new = node_text(node), node_text(renamed[node])
        if node_text(node, values) != new:
            yield Change("node", node.name, old, new)
    yield from _tables("parameter", _parameters(left), _parameters(right))
    yield from _returned(left, right, values)
    yield from _sites(left, right, types=False)
    yield from _history(left, right)
    yield from _tables("metadata", _metadata(left), _metadata(right))


def node_text(node: Node, names: Mapping[str, str] | None = None) -> str:
    """The node on one line, as in canonical text but without sites; ``names`` renames results it reads and makes."""
    names = names or {}

    def shown(value: Value | None) -> str:
        if value is None:
            return "none"
        return f"%{names[value.name]}" if value.name in names and not value.is_parameter else value_text(value)

    attributes = ", ".join(f"{key} = {attribute_text(value)}" for key, value in sorted(node.attributes.items()))
    for old, new in names.items():
        attributes = attributes.replace(f'"%{old}"', f'"%{new}"')
    call = f"{node.op}({', '.join(map(shown, node.operands))})" + (f" {{{attributes}}}" if attributes else "")
    types = ", ".join(str(output.type) for output in node.outputs)
    made_by = f"  by {node.origin.created_by}" if node.origin.created_by else ""
    return f"{', '.join(map(shown, node.outputs))} = {call} : {types}{made_by}"


def _match(left: Graph, right: Graph) -> dict[Node, Node]:
    """Nodes of ``left`` and their counterparts, by name and op, then by origin where that is unique."""
    by_name = {(node.name, node.op): node for node in right.nodes()}
    pairs: dict[Node, Node] = {}
    for node in left.nodes():
        twin = by_name.pop((node.name, node.op), None)
        if twin is not None:
            pairs[node] = twin
    rest_left = _unique(_origin_key, (node for node in left.nodes() if node not in pairs))
    rest_right = _unique(_origin_key, by_name.values())
    pairs.update({node: rest_right[key] for key, node in rest_left.items() if key in rest_right})
    # A node that kept its name and changed its op is one change, not a removal and an addition.
    taken = set(pairs.values())
    renamed = {node.name: node for node in by_name.values() if node not in taken}
    for node in left.nodes():
        if node not in pairs and node.name in renamed:
            pairs[node] = renamed[node.name]
    return pairs


def _origin_key(node: Node) -> tuple[object, ...]:
    return (node.origin.sources, node.op, node.origin.created_by, node.origin.options)


def _unique(key: Callable[[Node], tuple[object, ...]], nodes: Iterable[Node]) -> dict[tuple[object, ...], Node]:
    listed = list(nodes)
    counts = Counter(map(key, listed))
    return {key(node): node for node in listed if counts[key(node)] == 1 and node.origin.sources}


def _tables(kind: str, left: Mapping[str, str], right: Mapping[str, str]) -> Iterator[Change]:
    for name in left:
        if left[name] != right.get(name):
            yield Change(kind, name, left[name], right.get(name))
    for name in right:
        if name not in left:
            yield Change(kind, name, None, right[name])


def _signatures(left: Graph, right: Graph) -> Iterator[Change]:
    inputs, outputs = ([_slots(graph, which) for graph in (left, right)] for which in ("inputs", "outputs"))
    yield from _tables("input", *inputs)
    yield from _tables("output", *outputs)
    for kind, (old, new) in (("input", inputs), ("output", outputs)):
        if list(old) != list(new) and sorted(old) == sorted(new):
            yield Change(kind, "order", ", ".join(old), ", ".join(new))


def _slots(graph: Graph, which: str) -> dict[str, str]:
    pairs = [(v.name, v) for v in graph.inputs()] if which == "inputs" else list(graph.outputs())
    return {name: f"{name}: {value.type} <{graph.role(name).value}>" for name, value in pairs}


def _returned(left: Graph, right: Graph, names: Mapping[str, str]) -> Iterator[Change]:
    """Outputs that are another value than before."""
    new = dict(right.outputs())
    for name, value in left.outputs():
        if name in new and names.get(value.name, value.name) != new[name].name:
            yield Change("output", name, f"{name} = {value_text(value)}", f"{name} = {value_text(new[name])}")


def _parameters(graph: Graph) -> dict[str, str]:
    found = {}
    for parameter in graph.parameters():
        if value_text(parameter).startswith("%"):  # small constants show up where they are read
            others = sorted(set(graph.aliases(parameter)) - {parameter.name})
            also = f"  also {', '.join(others)}" if others else ""
            found[parameter.name] = f"{value_text(parameter)} : {parameter.type}  #{data_hash(parameter)[:12]}{also}"
    return found


def _sites(left: Graph, right: Graph, *, types: bool) -> Iterator[Change]:
    """Sites on one side only; with ``types`` also those whose type differs. ``%value`` names are left out."""
    paths = [_module_paths(graph) for graph in (left, right)] if types else []
    unknown = set().union(*paths) if not all(paths) else set()  # modules that only one side knows of
    roles = left.site_table.role_names | right.site_table.role_names
    tables = []
    for graph in (left, right):
        sites = [site for site in graph.sites() if not site.name.startswith("%")]
        if types:
            # Module sites depend on the modules of the source model and not on what is computed: left out across dialects.
            sites = [site for site in sites if site.role != "module"]
        named = {name: site for site in sites for name in (site.name, *site.aliases) if not name.startswith("%")}
        tables.append({
            name: f"{name} : {site.type}" if types else name
            for name, site in named.items()
            if name in roles or name.partition(":")[0] not in unknown
        })  # fmt: skip
    yield from _tables("site", *tables)


def _module_paths(graph: Graph) -> set[str]:
    """The modules that the nodes say they come from, and those around them; empty for a file without scopes."""
    found: set[str] = set()
    for scope in {node.origin.scope for node in graph.nodes()}:
        parts = scope.split(".")
        found.update(".".join(parts[:depth]) for depth in range(1, len(parts) + 1))
    return found - {""}


def _history(left: Graph, right: Graph) -> Iterator[Change]:
    old, new = ([record.text or record.name for record in graph.history] for graph in (left, right))
    common = 0
    while common < min(len(old), len(new)) and old[common] == new[common]:
        common += 1
    yield from (Change("pass", line, line, None) for line in old[common:])
    yield from (Change("pass", line, None, line) for line in new[common:])


def _metadata(graph: Graph) -> dict[str, str]:
    return {key: f"{key} = {value}" for key, value in sorted(graph.metadata.items())}


def _views(left: Graph, right: Graph) -> Iterator[Change]:
    yield from _tables("view", _view_lines(left), _view_lines(right))


def _view_lines(graph: Graph) -> dict[str, str]:
    """One line per view, with what both dialects must agree on."""
    views = graph.views
    lines: dict[str, list[str]] = {
        "linear": [f"{v.in_features} -> {v.out_features}{', bias' if v.bias is not None else ''}" for v in views.linears()],
        "conv": [f"groups {v.groups}{', transposed' if v.transposed else ''}" for v in views.convs()],
        "norm": [f"{v.kind}, eps {v.eps:.3g}" for v in views.norms()],
        "activation": [v.function for v in views.activations()],
        "attention": [f"{v.heads}/{v.kv_heads} heads of {v.head_dim}, scale {v.scale:.5g}" for v in views.attentions()],
        "feed_forward": [f"{v.activation.function}{', gated' if v.gate is not None else ''}" for v in views.feed_forwards()],
        "moe": [f"{v.experts} experts" for v in views.moe()],
        "block": [f"{v.prefix}{' '.join(unit.kind for unit in v.units)}" for v in views.blocks()],
    }
    return {f"{kind}.{i}": f"{kind}.{i}: {text}" for kind, texts in lines.items() for i, text in enumerate(texts)}
