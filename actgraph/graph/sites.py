"""Sites: the shared language of passes.

A site is a named activation. Names are assigned once, when a graph is first asked for them, and carried by edits: a
``SiteTable`` maps each name to an *anchor*, and the editor moves anchors when readers move. What a name means is fixed in
docs/sites.md; how the names are found is in ``actgraph.graph.recognize``.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from actgraph.errors import SiteError
from actgraph.graph.anchors import (
    Anchor,
    Site,
    SiteKind,
    edge_anchor,
    read_anchor,
    role_of,
    type_now,
    value_anchor,
    virtual_anchor,
)
from actgraph.graph.graph import Graph, Kind, Node, Use, Value
from actgraph.graph.selectors import Pattern, compile_selector, expand_braces
from actgraph.ops.dtypes import DType
from actgraph.ops.shapes import TensorType

if TYPE_CHECKING:
    from actgraph.graph.editor import Editor

__all__ = ["Anchor", "Site", "SiteKind", "SiteTable", "edge_anchor", "value_anchor", "virtual_anchor"]


@dataclass
class SiteTable:
    """All sites of one graph, in topological order. Owned by the graph; changed by the editor only.

    anchors: canonical name -> anchor. aliases: other name -> canonical name. roles: canonical name -> ``Site.role``.
    role_names: the canonical names and aliases that are role names. removed: name -> pass that removed it.
    Names that begin with ``%`` are values that an edit moved; they are found by name and never listed.
    """

    anchors: dict[str, Anchor] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    roles: dict[str, str] = field(default_factory=dict)
    role_names: set[str] = field(default_factory=set)
    removed: dict[str, str] = field(default_factory=dict)
    _on_value: dict[Value, list[str]] = field(default_factory=dict, repr=False)
    _on_node: dict[Node, list[str]] = field(default_factory=dict, repr=False)
    _aliases_of: dict[str, list[str]] = field(default_factory=dict, repr=False)
    _spellings: dict[str, str] | None = field(default=None, repr=False)

    # --- building -----------------------------------------------------------------------------------------------------

    def add(self, name: str, anchor: Anchor, role: str, aliases: Iterable[str] = (), role_names: Iterable[str] = ()) -> None:
        """Append a site. Raises ValueError when a name is taken."""
        if name in self.anchors or name in self.aliases:
            raise ValueError(f"two sites are called {name!r}")
        self.roles[name] = role
        self._place(name, anchor)
        for alias in aliases:
            if alias in self.anchors or alias in self.aliases:
                raise ValueError(f"two sites are called {alias!r}")
            self.aliases[alias] = name
            self._aliases_of.setdefault(name, []).append(alias)
        self.role_names.update(role_names)
        self._spellings = None

    def _place(self, name: str, anchor: Anchor) -> None:
        self.anchors[name] = anchor  # an assignment to an existing key keeps its place in the order
        if anchor.value is not None:
            self._on_value.setdefault(anchor.value, []).append(name)
        if anchor.node is not None:
            for node in dict.fromkeys([anchor.node, *(node for node, _ in anchor.more)]):
                self._on_node.setdefault(node, []).append(name)

    def _unplace(self, name: str) -> Anchor:
        anchor = self.anchors[name]
        if anchor.value is not None:
            _drop(self._on_value, anchor.value, name)
        if anchor.node is not None:
            for node in dict.fromkeys([anchor.node, *(node for node, _ in anchor.more)]):
                _drop(self._on_node, node, name)
        return anchor

    # --- reading ------------------------------------------------------------------------------------------------------

    def names_of(self, value: Value) -> tuple[str, ...]:
        """The canonical names of the sites that denote ``value`` (one, or several after edits merged values)."""
        return tuple(name for name in self._on_value.get(value, ()) if not name.startswith("%"))

    def role_name_of(self, value: Value) -> str:
        """The role name of ``value``, or ``""``."""
        return next((name for name in self.names_of(value) if name in self.role_names), "")

    def edge_name(self, node: Node, index: int) -> str:
        """The canonical name of the edge that is operand ``index`` of ``node`` and no other, or ``""``."""
        for name in self._on_node.get(node, ()):
            anchor = self.anchors[name]
            if anchor.kind is SiteKind.EDGE and anchor.edges == ((node, index),):
                return name
        return ""

    def current(self, site: Site) -> Anchor:
        """Where ``site`` is now, after the edits since it was looked up. Raises SiteError when it was removed."""
        name = self.aliases.get(site.name, site.name)
        if name in self.removed:
            raise self._gone(site.name)
        return self.anchors.get(name, site.anchor)

    def anchored_operands(self, node: Node) -> frozenset[tuple[str, int]]:
        """The edge and virtual sites at ``node``: canonical name and operand, -1 for a virtual one."""
        found: list[tuple[str, int]] = []
        for name in self._on_node.get(node, ()):
            anchor = self.anchors[name]
            found += [(name, index) for at, index in anchor.edges if at == node] or [(name, -1)]
        return frozenset(found)

    def select(self, graph: Graph, selector: str | Sequence[str] | None, ignore: str | Sequence[str] = ()) -> list[Site]:
        """See ``Graph.sites``. A place is listed once however many of its names match."""
        chosen: dict[str, str] = {}  # canonical name -> name to show
        direct: list[Site] = []
        if selector is None:
            chosen = {name: name for name in self.anchors if not name.startswith("%")}
        for text in _as_list(selector):
            if text.strip().startswith("%"):
                direct.extend(site for site in self._by_value_name(graph, text.strip()) if site not in direct)
                continue
            for name, shown in self._matching(text).items():
                chosen.setdefault(name, shown)
        dropped = self._ignored(graph, _as_list(ignore))
        if selector is not None:
            order = {name: place for place, name in enumerate(self.anchors)}
            chosen = {name: chosen[name] for name in sorted(chosen, key=order.__getitem__)}
        sites = [self._site(name, shown) for name, shown in chosen.items()] + direct
        # Edits can make two names denote one place; whoever edits every site of a list must meet it once.
        unique = {site.anchor.key: site for site in reversed(sites) if site.anchor.key not in dropped}
        sites = list(reversed(unique.values())) if selector is not None else sites
        if selector is not None and not sites:
            raise SiteError(f"everything that {', '.join(_as_list(selector))} selects is ignored", "narrow `ignore`")
        return sites

    def one(self, graph: Graph, name: str) -> Site:
        """See ``Graph.site``."""
        found = self.select(graph, name)
        if len(found) > 1:
            listed = ", ".join(site.name for site in found[:4]) + (" ..." if len(found) > 4 else "")
            raise SiteError(f"{name!r} stands for {len(found)} sites ({listed})", "name exactly one")
        return found[0]

    def all_names(self) -> Iterator[str]:
        """Every name and alias."""
        yield from (name for name in self.anchors if not name.startswith("%"))
        yield from self.aliases

    def _counted(self) -> Iterator[str]:
        """The names among which a negative index counts: all, and other tools' names for them."""
        yield from self.all_names()
        yield from self.spellings()

    def spellings(self) -> dict[str, str]:
        """Names of TransformerLens, Hugging Face and pyvene -> canonical name (see ``actgraph.graph.spellings``)."""
        if self._spellings is None:
            from actgraph.graph.spellings import spell

            own = {name: self.aliases.get(name, name) for name in sorted(self.role_names)}
            own |= self._inputs_of_roles(own)
            self._spellings = {
                spelling: own[name]
                for spelling, name in spell(own).items()
                if spelling not in self.anchors and spelling not in self.aliases
            }
        return self._spellings

    def _inputs_of_roles(self, own: Mapping[str, str]) -> dict[str, str]:
        """What computes a role, as ``actgraph.graph.spellings`` asks for it: ``role:in``, and ``role@norm`` and ``role@raw``.

        own: role name -> canonical name. The first is the edge that the role's linear or norm reads; the others are there for
        an ``attn.out`` or ``mlp.out`` that a (sandwich) norm computes: the role itself, and the edge that the norm reads.
        ``logits@raw`` is the output of the last linear, where the logits are made from it number by number (soft-capped).
        """
        found: dict[str, str] = {}
        heads = [name for name in self.all_names() if name.startswith("linear.") and _STRUCTURAL.fullmatch(name)]
        if "logits" in own and heads:
            last = max(heads, key=lambda name: int(name.partition(".")[2]))
            head = self.aliases.get(last, last)
            alike = type_now(self.anchors[head]).shape == type_now(self.anchors[own["logits"]]).shape
            if alike and head not in self.role_names:  # with a role it is the logits themselves, or no head
                found["logits@raw"] = head
        for name, canonical in own.items():
            for other in (canonical, *self._aliases_of.get(canonical, ())):
                edge = self.aliases.get(f"{other}:in", f"{other}:in")
                if edge not in self.anchors or not _STRUCTURAL.fullmatch(other):
                    continue
                found[f"{name}:in"] = edge
                if other.startswith("norm.") and name.endswith((".attn.out", ".mlp.out")):
                    found |= {f"{name}@norm": canonical, f"{name}@raw": edge}
        return found

    def _matching(self, selector: str) -> dict[str, str]:
        """Canonical name -> the role name that matched, else the canonical name. Raises SiteError when empty.

        Names of the graph itself come before other tools' names.
        """
        found = self._own(selector)
        if selector in self.removed and not found:
            raise self._gone(selector)  # not what another model's spelling of the same name would stand for
        for foreign in () if found else _normal_spellings(selector):
            # `model.layers[5].mlp.output` is a site by its module's name, where the model has modules.
            hits = self._own(foreign) or {self.spellings()[name]: self.spellings()[name] for name in self._spelled(foreign)}
            found |= hits
        if not found:
            raise self._nothing(selector)
        return found

    def _spelled(self, selector: str) -> list[str]:
        """The spellings that ``selector``, in normal form, matches."""
        table = self.spellings()
        hits: list[str] = []
        for pattern in compile_selector(selector, self._counted):
            if pattern.literal:
                hits += [pattern.literal] if pattern.literal in table else []
            else:
                hits += [name for name in table if pattern.matches(name)]
        return hits

    def _own(self, selector: str) -> dict[str, str]:
        """As ``_matching``, by the names of the graph itself."""
        found: dict[str, str] = {}
        exact: set[str] = set()  # canonical names that matched themselves
        for pattern in compile_selector(selector, self._counted):
            for name in self._hits(pattern):
                canonical = self.aliases.get(name, name)
                if name == canonical:
                    exact.add(name)
                if name in self.role_names and canonical not in exact and found.get(canonical, canonical) == canonical:
                    found[canonical] = name
                elif name == canonical or canonical not in found:
                    found[canonical] = canonical
        return found

    def _hits(self, pattern: Pattern) -> list[str]:
        if pattern.literal:
            return [pattern.literal] if pattern.literal in self.anchors or pattern.literal in self.aliases else []
        return [name for name in self.all_names() if pattern.matches(name)]

    def ignored(self, graph: Graph, ignore: str | Sequence[str]) -> list[Anchor]:
        """The places that ``ignore`` leaves out. A pattern may match nothing; a plain name that does not exist is an error."""
        keys = self._ignored(graph, _as_list(ignore))
        return [anchor for anchor in dict.fromkeys(self.anchors.values()) if anchor.key in keys]

    def _ignored(self, graph: Graph, selectors: list[str]) -> set[tuple[object, ...]]:
        """Keys of the anchors to leave out. A pattern without a suffix leaves out the edges of what it names, too."""
        dropped: set[tuple[object, ...]] = set()
        for selector in selectors:
            if selector.strip().startswith("%"):
                dropped.update(site.anchor.key for site in self._by_value_name(graph, selector.strip()))
                continue
            hits = self._with_edges(selector)
            for foreign in () if hits or selector in self.removed else _normal_spellings(selector):
                hits += self._with_edges(foreign) or [self.spellings()[name] for name in self._spelled(foreign)]
            literal = all(pattern.literal for pattern in compile_selector(selector, self._counted))
            if not hits and literal and selector not in self.removed:
                # A pattern may rightly match nothing in this model; a plain name that is not there is a typing error.
                raise self._nothing(selector)
            dropped.update(self.anchors[name].key for name in hits)
        return dropped

    def _with_edges(self, selector: str) -> list[str]:
        """The canonical names of the graph's own sites that ``selector`` matches; without a suffix, with their edges."""
        hits: list[str] = []
        for pattern in compile_selector(selector, self._counted):
            for name in self.all_names():
                if pattern.matches(name) or (not pattern.suffixed and pattern.matches(name.partition(":")[0])):
                    hits.append(self.aliases.get(name, name))
        return hits

    def _by_value_name(self, graph: Graph, selector: str) -> list[Site]:
        """Sites for ``%name`` selectors, which may be globs over value names."""
        found: list[Site] = []
        for pattern in compile_selector(selector[1:], lambda: ()):
            names = [pattern.literal] if pattern.literal else _value_names(graph)
            for name in names:
                if not pattern.matches(name):
                    continue
                moved = self.anchors.get(f"%{name}")
                if moved is not None:
                    found.append(self._site(f"%{name}", f"%{name}"))
                    continue
                try:
                    value = graph.value(name)
                except KeyError:
                    continue
                found.append(Site(f"%{name}", SiteKind.VALUE, "value", value.type, value_anchor(value), self.names_of(value)))
        if not found:
            near = difflib.get_close_matches(selector[1:], _value_names(graph), n=3, cutoff=0.5)
            hint = f"nearest are {', '.join('%' + name for name in near)}" if near else "print(graph) shows all values"
            raise SiteError(f"no value is called {selector!r}", hint)
        return found

    def _site(self, name: str, shown: str) -> Site:
        anchor = self.anchors[name]
        others = tuple(other for other in (name, *self._aliases_of.get(name, ())) if other != shown)
        role = role_of(shown) if shown != name else self.roles.get(name, "value")
        return Site(shown, anchor.kind, role, type_now(anchor), anchor, others)

    def _nothing(self, selector: str) -> SiteError:
        from actgraph.graph.spellings import spell

        if selector in self.removed:
            return self._gone(selector)
        spelled = spell(self.removed)
        for foreign in _normal_spellings(selector):
            if foreign in spelled:
                return self._gone(spelled[foreign])
        patterns = list(compile_selector(selector, self._counted))
        gone = [name for name in self.removed if any(pattern.matches(name) for pattern in patterns)]
        if gone:
            return self._gone(gone[0])
        near = difflib.get_close_matches(selector, list(self.all_names()), n=3, cutoff=0.5)
        if not near:
            near = difflib.get_close_matches(selector.rsplit(".", 1)[-1], list(self.all_names()), n=3, cutoff=0.3)
        hint = f"nearest are {', '.join(near)}" if near else "`actgraph sites MODEL` lists them"
        return SiteError(f"no site matches {selector!r}", hint)

    def _gone(self, name: str) -> SiteError:
        by = self.removed[name]
        return SiteError(
            f"site {name} was removed by {by}", f"put this pass before {by.split(' (')[0]}, or choose another site"
        )

    # --- following edits ----------------------------------------------------------------------------------------------

    def materialise(self, editor: Editor, site: Site) -> Value:
        """The value that ``site`` denotes now; a virtual site is given one by taking its fused op apart."""
        anchor = self.current(site)
        if anchor.kind is SiteKind.VIRTUAL:
            from actgraph.graph.recognize.materialise import materialise

            assert anchor.node is not None
            materialise(editor, anchor.node, anchor.recipe)
            anchor = self.current(site)
        return read_anchor(site.name, anchor)

    def move(self, old: Value, new: Value) -> None:
        """Value anchors on ``old`` now denote ``new``."""
        names = self._on_value.pop(old, [])
        own = f"%{old.name}"
        if old.kind is not Kind.PARAMETER and own not in self.anchors:
            self.anchors[own] = value_anchor(new)
            names.append(own)
        for name in names:
            self.anchors[name] = replace(self.anchors[name], value=new)
        here = self._on_value.setdefault(new, [])
        here.extend(name for name in names if name not in here)

    def move_edge(self, old: tuple[Node, int], new: Sequence[tuple[Node, int]]) -> None:
        """Edge anchors on operand ``old`` are now on the operands ``new`` (a node was replaced by others)."""
        for name in list(self._on_node.get(old[0], ())):
            anchor = self.anchors[name]
            if anchor.kind is SiteKind.EDGE and old in anchor.edges:
                self._unplace(name)
                edges = [edge for each in anchor.edges for edge in (new if each == old else [each])]
                self._place(name, edge_anchor(list(dict.fromkeys(edges))))

    def resolve(self, node: Node, recipe: str, value: Value) -> None:
        """The virtual sites of ``node`` made by ``recipe`` are now ``value``."""
        for name in list(self._on_node.get(node, ())):
            anchor = self.anchors[name]
            if anchor.kind is SiteKind.VIRTUAL and anchor.recipe == recipe:
                self._unplace(name)
                self._place(name, value_anchor(value))

    def make_virtual(self, old: Node | Value, recipe: str, new: Node, kind: TensorType) -> None:
        """The sites that ``old`` had are virtual ones of ``new``: of a node those by ``recipe``, of a value all."""
        listed = self._on_value.get(old, ()) if isinstance(old, Value) else self._on_node.get(old, ())
        for name in list(listed):
            anchor = self.anchors[name]
            if anchor.kind is SiteKind.VALUE or (anchor.kind is SiteKind.VIRTUAL and anchor.recipe == recipe):
                self._unplace(name)
                self._place(name, virtual_anchor(new, recipe, kind))

    def mark_removed(self, graph: Graph, names: Sequence[str], by: str) -> None:
        """Forget anchors whose node or value is gone after nodes or parameters ``names`` were, remembering who removed them."""
        if not names:
            return
        nodes = graph.nodes()
        alive_nodes = set(nodes)
        alive = {output for node in nodes for output in node.outputs} | set(graph.inputs()) | set(graph.parameters())
        for name, anchor in list(self.anchors.items()):
            if anchor.kind is SiteKind.VALUE and anchor.value in alive:
                continue
            if anchor.kind is not SiteKind.VALUE:
                left = [edge for edge in anchor.edges if edge[0] in alive_nodes]
                if anchor.kind is SiteKind.VIRTUAL and anchor.node in alive_nodes:
                    continue
                if left:
                    if len(left) < len(anchor.edges):
                        self._unplace(name)
                        self._place(name, edge_anchor(left))
                    continue
            self._forget(name, by or "an edit")

    def forget(self, value: Value, by: str) -> None:
        """The sites that denote ``value``, and the edges that read it, no longer hold what their names say.

        Asking for them names ``by``.
        """
        for name in self.names_of(value):
            self._forget(name, by)
        for use in value.uses:
            if use.node is not None:
                self.forget_edge(use.node, use.index, by)

    def forget_edge(self, node: Node, index: int, by: str) -> None:
        """The edges that include operand ``index`` of ``node`` no longer hold what their names say."""
        for name in list(self._on_node.get(node, ())):
            anchor = self.anchors[name]
            if anchor.kind is SiteKind.EDGE and (node, index) in anchor.edges:
                self._forget(name, by)

    def _forget(self, name: str, by: str) -> None:
        self._unplace(name)
        del self.anchors[name]
        self.roles.pop(name, None)
        if name.startswith("%"):
            return
        self._spellings = None
        for each in (name, *self._aliases_of.pop(name, ())):
            self.aliases.pop(each, None)
            self.role_names.discard(each)
            self.removed[each] = by

    # --- other containers of the same graph -----------------------------------------------------------------------------

    def remap(self, graph: Graph, values: Mapping[str, str], nodes: Mapping[str, str]) -> SiteTable:
        """The table for another container of the same graph (a clone, an exported file).

        values, nodes: native names here -> native names there; names that are not listed are the same in both. A site
        whose place ``graph`` does not have is marked as removed there.
        """
        return SiteTable.from_dict(graph, self.to_dict(values, nodes))

    def to_dict(self, values: Mapping[str, str] | None = None, nodes: Mapping[str, str] | None = None) -> dict[str, Any]:
        """The table as JSON data by native names, translated by ``values`` and ``nodes``; see ``from_dict``."""
        values, nodes = values or {}, nodes or {}
        listed = [self._row(name, values, nodes) for name in self.anchors]
        return {"sites": listed, "role_names": sorted(self.role_names), "removed": dict(self.removed)}

    def _row(self, name: str, values: Mapping[str, str], nodes: Mapping[str, str]) -> dict[str, Any]:
        """One site as JSON data."""
        anchor = self.anchors[name]
        own = f"%{_translate(values, name[1:])}" if name.startswith("%") else name
        row: dict[str, Any] = {"name": own, "role": self.roles.get(name, "")}
        if name in self._aliases_of:
            row["aliases"] = list(self._aliases_of[name])
        if anchor.value is not None:
            row["value"] = _translate(values, anchor.value.name)
        elif anchor.kind is SiteKind.EDGE:
            row["edges"] = [[_translate(nodes, node.name), index] for node, index in anchor.edges]
        elif anchor.node is not None:
            row["node"] = _translate(nodes, anchor.node.name)
            kind, *rest = anchor.recipe.split("|")  # an expert's recipe names values
            row["recipe"] = "|".join([kind, *rest[:1], *(_translate(values, part) for part in rest[1:])])
            shape = anchor.type.shape
            row["type"] = [anchor.type.dtype.value if anchor.type.dtype else None, None if shape is None else list(shape)]
        return row

    def rows_on(self, value: Value, uses: Iterable[Use] = ()) -> list[dict[str, Any]]:
        """The sites that denote ``value`` and the edges that include one of ``uses``, as JSON data; see ``put_back``."""
        names = [name for name in self._on_value.get(value, ()) if not name.startswith("%")]
        for node, index in uses:
            if node is not None:
                names += [name for name in self._on_node.get(node, ()) if (node, index) in self.anchors[name].edges]
        places = {name: place for place, name in enumerate(self.anchors)}
        rows = []
        for name in dict.fromkeys(names):
            roles = [each for each in (name, *self._aliases_of.get(name, ())) if each in self.role_names]
            rows.append({**self._row(name, {}, {}), "role_names": roles, "place": places[name]})
        return rows

    def put_back(self, graph: Graph, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add the sites of ``rows_on`` again where they were removed since and their place exists."""
        nodes = {node.name: node for node in graph.nodes()}
        order = list(self.anchors)
        for row in sorted(rows, key=lambda row: int(row["place"])):
            names = [row["name"], *row.get("aliases", ())]
            anchor = _anchor_from(graph, nodes, row)
            if anchor is None or any(name in self.anchors or name in self.aliases for name in names):
                continue
            for name in names:
                self.removed.pop(name, None)
            self.add(row["name"], anchor, row["role"], row.get("aliases", ()), row["role_names"])
            order.insert(int(row["place"]), row["name"])
        self.anchors = {name: self.anchors[name] for name in order}

    @staticmethod
    def from_dict(graph: Graph, data: Mapping[str, Any]) -> SiteTable:
        """The table that ``to_dict`` wrote, on ``graph``. Sites whose place is missing are marked as removed."""
        table = SiteTable(removed=dict(data.get("removed", {})), role_names=set(data.get("role_names", ())))
        by_name = {node.name: node for node in graph.nodes()}
        for row in data.get("sites", ()):
            anchor = _anchor_from(graph, by_name, row)
            if anchor is None:
                if not row["name"].startswith("%"):
                    table.removed.update(dict.fromkeys([row["name"], *row.get("aliases", ())], "another tool"))
                continue
            table.add(row["name"], anchor, row.get("role", ""), row.get("aliases", ()))
        table.role_names &= table.anchors.keys() | table.aliases.keys()
        return table


def _anchor_from(graph: Graph, nodes: Mapping[str, Node], row: Mapping[str, Any]) -> Anchor | None:
    try:
        if "value" in row:
            return value_anchor(graph.value(row["value"]))
        if "edges" in row:
            edges = [(nodes[name], int(index)) for name, index in row["edges"]]
            return edge_anchor(edges) if all(index < len(node.operands) for node, index in edges) else None
        dtype, shape = row.get("type", (None, None))
        kind = TensorType(DType(dtype) if dtype else None, None if shape is None else tuple(shape))
        return virtual_anchor(nodes[row["node"]], row["recipe"], kind)
    except KeyError:
        return None


def _value_names(graph: Graph) -> list[str]:
    results = [output.name for node in graph.nodes() for output in node.outputs]
    return [value.name for value in graph.inputs()] + results + [value.name for value in graph.parameters()]


#: What computes a role: its name among the structural ones.
_STRUCTURAL = re.compile(r"(linear|norm)\.\d+")


def _normal_spellings(selector: str) -> list[str]:
    """The selectors that ``selector`` stands for, in the form of the spelling table (``spellings.normal_spelling``)."""
    from actgraph.graph.spellings import normal_spelling

    selector = selector.strip()
    return [selector] if selector.startswith("re:") else [normal_spelling(text) for text in expand_braces(selector)]


def _translate(names: Mapping[str, str], name: str) -> str:
    return names.get(name, name)


def _as_list(selector: str | Sequence[str] | None) -> list[str]:
    if selector is None:
        return []
    return [selector] if isinstance(selector, str) else list(selector)


def _drop(table: dict[Any, list[str]], key: Any, name: str) -> None:
    names = table.get(key, [])
    if name in names:
        names.remove(name)
    if not names:
        table.pop(key, None)
