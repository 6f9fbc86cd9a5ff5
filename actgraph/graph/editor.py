"""The one way to change a graph.

An ``Editor`` is a transaction. It gives new nodes their provenance, keeps the site table true (a site denotes what its
readers see now), records what it touched, and rolls the graph back when the block raises.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from actgraph.errors import PassError
from actgraph.graph.graph import Array, Graph, Node, Role, Use, Value
from actgraph.graph.provenance import Origin
from actgraph.graph.slots import Slot, declare_slot
from actgraph.ops.shapes import TensorType

if TYPE_CHECKING:
    from actgraph.graph.sites import Site


class Editor:
    """Edits to ``graph`` by pass ``by`` (whose pipeline text is ``options``)."""

    def __init__(self, graph: Graph, *, by: str = "", options: str = "") -> None:
        self.graph = graph
        self.by = by
        self.options = options
        self.counts: Counter[str] = Counter()
        self.touched: set[str] = set()  # names of nodes and parameters that were made or changed
        self.messages: list[str] = []  # what happened that a user should know, such as an untied weight
        self._erase_at_end = False
        self._snapshot: Graph | None = None  # taken before the first change, for many a pass changes nothing
        self._open = False
        self._names: set[str] | None = None  # node names when the first op was named
        self._numbers: Counter[str] = Counter()

    def __enter__(self) -> Editor:
        _ = self.graph.site_table  # names are assigned before the first edit
        self._open = True
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is not None:
                self.rollback()
            elif self._erase_at_end:
                self._erase_or_roll_back()
        finally:
            self._snapshot, self._open, self._erase_at_end = None, False, False

    def _erase_or_roll_back(self) -> None:
        try:
            self.erase_dead()
        except BaseException:
            self.rollback()
            raise

    def rollback(self) -> None:
        """Undo everything since the transaction began. Handles taken since then are invalid afterwards."""
        if not self._open:
            raise PassError("rollback outside of a transaction", "use `with graph.edit(...)`")
        if self._snapshot is not None:
            self.graph._restore(self._snapshot)
            self._snapshot = None
        self.counts.clear()
        self.touched.clear()
        self.messages.clear()
        self._names = None
        self._numbers.clear()
        self._erase_at_end = False

    def _to_change(self) -> Graph:
        """The graph, of which a copy to go back to is kept: every change goes through here."""
        if self._open and self._snapshot is None:
            self._snapshot = self.graph.clone()
        return self.graph

    # --- nodes --------------------------------------------------------------------------------------------------------

    def insert(
        self,
        op: str,
        operands: Sequence[Value | Array | float | None],
        attributes: Mapping[str, Any] | None = None,
        *,
        after: Node | None = None,
        before: Node | None = None,
        name: str = "",
        like: Node | None = None,
        origin: Origin | None = None,
    ) -> Node:
        """Insert one node; nothing reads it yet.

        op: a registry op (``"actgraph.shift"``) or a shared vocabulary name (``"add"``).
        operands: values, or arrays and numbers that become parameters.
        like: a node whose module scope and sources the new node inherits (default: the producer of the first operand).
        origin: where the node comes from, for one that is put back; the running pass otherwise.
        """
        name = name or self._unique(op.rsplit(".", 1)[-1])
        values = [self._as_value(operand, f"{name}.operand_{i}") for i, operand in enumerate(operands)]
        model = like
        if model is None:
            model = next((v.producer for v in values if v is not None and v.producer is not None), None)
        inherited = model.origin if model is not None else Origin()
        origin = origin or Origin(inherited.sources, inherited.scope, self.by, self.options)
        node = self._to_change()._insert(op, values, attributes or {}, after=after, before=before, name=name, origin=origin)
        self._count("inserted", node.name)
        return node

    def insert_at(
        self,
        site: Site,
        op: str,
        operands: Sequence[Value | Array | float | None] = (),
        attributes: Mapping[str, Any] | None = None,
        *,
        name: str = "",
        keep: Sequence[Node] = (),
    ) -> Value:
        """Put ``op(x, *operands)`` at a site, where ``x`` is what the site's readers see now, and return its output.

        At a value site every reader (graph outputs included) then reads the result; at an edge only that operand does.
        keep: readers that go on reading ``x``, because ``operands`` are computed from what they make of it (gates).
        """
        value = self.site_value(site)
        uses = [use for use in site.uses(self.graph) if use.node not in keep]
        everything = {use for use in value.uses if use.node not in keep}
        node = self.insert(op, [value, *operands], attributes, name=name, after=value.producer)
        self.redirect(value, node.output, uses)
        if keep and set(uses) == everything:
            self.move_sites(value, node.output)
        return node.output

    def site_value(self, site: Site) -> Value:
        """The value that a site denotes now; a virtual site is materialised first."""
        return self.graph.site_table.materialise(self, site)

    def redirect(self, old: Value, new: Value, uses: Iterable[Use] | None = None) -> None:
        """Make ``uses`` of ``old`` (default: all but those of the producer of ``new``) read ``new``.

        When every reader moves, sites that denoted ``old`` denote ``new``.
        """
        maker = new.producer
        everything = [use for use in old.uses if use.node is None or use.node != maker]
        chosen = everything if uses is None else [use for use in uses if use.node is None or use.node != maker]
        self._to_change()._redirect(old, new, chosen)
        if len(chosen) == len(everything):
            self.graph.site_table.move(old, new)
        for use in chosen:
            self._count("rewired", use.node.name if use.node is not None else new.name)

    def set_operand(self, node: Node, index: int, value: Value | Array | None) -> None:
        """Replace one operand of one node."""
        self._to_change()._set_operand(node, index, self._as_value(value, f"{node.name}.operand_{index}"))
        self._count("rewired", node.name)

    def copy_region(self, nodes: Sequence[Node], replace: Mapping[Value, Value]) -> dict[Value, Value]:
        """Copy ``nodes`` (in topological order) with operands substituted; returns old output -> new output."""
        mapping = dict(replace)
        for node in nodes:
            operands = [mapping.get(v, v) if v is not None else None for v in node.operands]
            inherited = node.origin
            origin = Origin(inherited.sources, inherited.scope, self.by, self.options, inherited.inlined)
            copy = self._to_change()._copy_node(node, operands, origin=origin)
            mapping.update(zip(node.outputs, copy.outputs, strict=True))
            self._count("inserted", copy.name)
        return {old: new for old, new in mapping.items() if old not in replace}

    def erase_dead(self) -> int:
        """Remove everything that nothing reads. Returns how many nodes went; their sites are marked as removed."""
        removed = self._to_change()._erase_dead()
        self.graph.site_table.mark_removed(self.graph, removed, self.by)
        self.counts["erased"] += len(removed)
        return len(removed)

    def erase(self, node: Node) -> None:
        """Remove one node that nothing reads, and the stored data that only it read.

        Raises PassError when something reads it.
        """
        readers = [use.node.name if use.node is not None else "an output" for output in node.outputs for use in output.uses]
        if readers:
            raise PassError(f"{node.name} cannot be erased: {', '.join(readers)} reads it", "redirect its readers first")
        own = [v for v in node.operands if v is not None and v.is_parameter and all(use.node == node for use in v.uses)]
        removed = self._to_change()._erase_dead({node.name, *(value.name for value in own)})
        self.graph.site_table.mark_removed(self.graph, removed, self.by)
        self.counts["erased"] += len(removed)

    def erase_stored(self, parameter: Value) -> None:
        """Remove stored data that nothing reads. Raises PassError when something does."""
        if parameter.uses:
            raise PassError(f"{parameter.name} cannot be erased: it is read", "redirect its readers first")
        self._to_change()._erase_dead({parameter.name})

    def erase_later(self) -> None:
        """``erase_dead`` when the transaction ends: until then, what was inserted may not have a reader yet."""
        self._erase_at_end = True

    def retype(self, nodes: Iterable[Node], *, propagate: bool = True) -> None:
        """Infer types again from ``nodes`` on (after a parameter changed its shape); without ``propagate`` for them only."""
        self._to_change()._retype(nodes, propagate=propagate)

    # --- sites --------------------------------------------------------------------------------------------------------

    def move_sites(self, old: Value, new: Value) -> None:
        """The value sites on ``old`` denote ``new`` from now on, whoever reads the two."""
        self._to_change().site_table.move(old, new)

    def move_edges(self, old: Use, *new: Use) -> None:
        """The edge sites on the operand ``old`` are on ``new`` from now on (a node was replaced by another, or by several)."""
        places = [(use.node, use.index) for use in new if use.node is not None]
        if old.node is not None and places:
            self._to_change().site_table.move_edge((old.node, old.index), places)

    def make_virtual(self, old: Node | Value, recipe: str, new: Node, kind: TensorType) -> None:
        """The virtual sites of a node, or the sites of a value, are virtual sites of ``new`` from now on, of type ``kind``."""
        self._to_change().site_table.make_virtual(old, recipe, new, kind)

    def forget_sites(self, value: Value, by: str) -> None:
        """The sites on ``value`` and the edges that read it no longer hold what their names say: ``by`` removed them."""
        self._to_change().site_table.forget(value, by)

    def forget_edge(self, use: Use, by: str) -> None:
        """The edges that include the operand ``use`` no longer hold what their names say: ``by`` removed them."""
        if use.node is not None:
            self._to_change().site_table.forget_edge(use.node, use.index, by)

    # --- parameters ---------------------------------------------------------------------------------------------------

    def add_parameter(self, name: str, data: Array, *, buffer: bool = False) -> Value:
        """Store ``data`` under a unique name derived from ``name``."""
        value = self._to_change()._add_parameter(name, np.asarray(data), buffer=buffer)
        self._count("parameters added", value.name)
        return value

    def set_parameter(self, parameter: Value, data: Array, *, uses: Iterable[Use] | None = None) -> Value:
        """Replace the data of a parameter for ``uses`` (default: all of them) and return the value they read now.

        Editing some uses of a shared weight unties it for those and leaves a message that says so.
        """
        everything = list(parameter.uses)
        chosen = everything if uses is None else list(uses)
        if len(chosen) == len(everything):
            self._to_change()._set_parameter(parameter, data)
            self._count("parameters changed", parameter.name)
            return parameter
        copy = self.add_parameter(f"{parameter.name}_untied", data)
        self._to_change()._redirect(parameter, copy, chosen)
        readers = ", ".join(use.node.name if use.node is not None else "an output" for use in chosen)
        self.messages.append(f"untied {parameter.name} for {readers}: the other readers keep the original")
        return copy

    # --- signature ----------------------------------------------------------------------------------------------------

    def add_input(self, name: str, type: TensorType, *, role: Role = Role.USER, default: Array | None = None) -> Value:
        """Append a graph input; ``default`` of shape [1] makes it optional."""
        value = self._to_change()._add_input(name, type, role, default)
        self._count("inputs added", name)
        return value

    def set_input_type(self, value: Value, type: TensorType) -> None:
        """Declare another type of a graph input, and infer again the types of what depends on it."""
        self._to_change()._set_input_type(value, type)
        self.retype(dict.fromkeys(use.node for use in value.uses if use.node is not None))
        self._count("inputs changed", value.name)

    def add_slot(self, slot: Slot) -> Value:
        """Declare state across calls and return its old content, a graph input. ``write_slot`` gives it the new one."""
        value = self.add_input(slot.input, slot.type, role=Role.SLOT)
        declare_slot(self.graph, slot)
        return value

    def write_slot(self, slot: Slot, value: Value) -> None:
        """Make ``value`` the slot's new content, a graph output."""
        self.add_output(value, slot.output, role=Role.SLOT)

    def add_output(self, value: Value, name: str, *, role: Role = Role.USER) -> None:
        """Append a graph output. Raises PassError when the name is taken."""
        if name in {existing for existing, _ in self.graph.outputs()}:
            raise PassError(f"an output named {name!r} exists already", "choose another name")
        self._to_change()._add_output(value, name, role)
        self._count("outputs added", name)

    def remove_output(self, name: str) -> None:
        """Drop a graph output (the value stays until ``erase_dead``)."""
        self._to_change()._remove_output(name)
        self._count("outputs removed", name)

    # --- helpers ------------------------------------------------------------------------------------------------------

    def _as_value(self, operand: Value | Array | float | None, name: str) -> Value | None:
        if operand is None or isinstance(operand, Value):
            return operand
        return self.add_parameter(name, np.asarray(operand))

    def _unique(self, stem: str) -> str:
        """``shift.0``, ``shift.1`` ...: names of new ops never renumber old ones."""
        if self._names is None:
            self._names = {node.name for node in self.graph.nodes()}
        number = self._numbers[stem]
        while f"{stem}.{number}" in self._names or f"{stem}_{number}" in self._names:
            number += 1
        self._numbers[stem] = number + 1
        return f"{stem}.{number}"

    def _count(self, what: str, name: str) -> None:
        self.counts[what] += 1
        self.touched.add(name)
