"""Sites across the export: which FX nodes must stay separate, and where each site is in the ONNX graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
from torch import fx

from actgraph.graph.folds import FoldRecord
from actgraph.graph.fx import FxGraph
from actgraph.graph.graph import Node
from actgraph.graph.onnx import OnnxGraph
from actgraph.graph.sites import SiteKind, SiteTable

if TYPE_CHECKING:
    from actgraph.formats.onnx_export_translate import Translator

Edge = tuple[fx.Node, int]


class Carrier:
    """Takes the site table of an FX graph to the ONNX graph that is made from it."""

    def __init__(self, graph: FxGraph) -> None:
        self.graph = graph
        self.sites = graph.site_table
        self._values: set[fx.Node] = set()
        self._edges: dict[fx.Node, set[int]] = {}
        for anchor in self.sites.anchors.values():
            if anchor.value is not None:
                self._values.add(anchor.value.key)
            if anchor.kind is SiteKind.EDGE:
                for node, index in anchor.edges:
                    self._edges.setdefault(node.key, set()).add(index)

    def must_stay(self, node: fx.Node, constant: bool) -> bool:
        """Whether a node that passes its operand through (or is a constant) must be kept, so that sites stay apart.

        An edge needs its node. A value needs one of its own when it is a constant (which others share), or when its source
        has other readers or is an input or parameter.
        """
        if node in self._edges:
            return True
        shared = any(len(source.users) > 1 or source.op != "call_function" for source in node.all_input_nodes[:1])
        return node in self._values and (constant or shared)

    def edge_operands(self, node: fx.Node) -> list[fx.Node]:
        """The operands of ``node`` that an edge site denotes."""
        operands = self.graph.operands(Node(self.graph, node)) if node in self._edges else ()
        return [v.key for index, v in enumerate(operands) if v is not None and index in self._edges[node]]

    def table(self, result: OnnxGraph, translator: Translator) -> SiteTable:
        """The site table of ``result``. Sites whose place is gone (a folded constant) are marked as removed there."""
        translate = self._translation(result, translator)
        data = self.sites.to_dict()
        rows = []
        for row in data["sites"]:
            moved = translate(row)
            if moved is None:
                data["removed"].update(dict.fromkeys([row["name"], *row.get("aliases", ())], "export to ONNX"))
            else:
                rows.append(moved)
        return SiteTable.from_dict(result, {**data, "sites": rows})

    def record(self, record: FoldRecord, translator: Translator, result: OnnxGraph) -> FoldRecord:
        """What is recorded of a fold, in the names of ``result``: copies are one value there, edges are on other nodes."""
        translate = self._translation(result, translator)
        rows = [row if row.get("value") == record.output else translate(row) for row in record.sites]

        def name(old: str) -> str:
            try:
                value = translator.values.get(self.graph.value(old).key) if old else None
            except KeyError:
                value = None
            return str(value.name) if isinstance(value, ir.Value) else old

        return dataclasses.replace(
            record,
            sites=tuple(row for row in rows if row is not None),
            value=name(record.value),
            path=tuple(map(name, record.path)),
            changes=tuple(dataclasses.replace(change, original=name(change.original)) for change in record.changes),
        )

    def _translation(
        self, result: OnnxGraph, translator: Translator
    ) -> Callable[[Mapping[str, Any]], Mapping[str, Any] | None]:
        """Rows of the site table in the names of ``result``; ``None`` for one whose place is gone."""
        natives = {fx_node.name: fx_node for fx_node in self.graph.graph.nodes}
        alive = set(result.model.graph)

        def translate(row: Mapping[str, Any]) -> Mapping[str, Any] | None:
            if "value" in row:
                try:
                    value = translator.values.get(self.graph.value(row["value"]).key)
                except KeyError:  # of a record: removed since
                    return None
                exists = isinstance(value, ir.Value) and _exists(value, alive)
                return {**row, "value": value.name} if exists and value is not None else None
            if "edges" in row:
                edges = [
                    [str(node.name), index]
                    for name, position in row["edges"]
                    if name in natives
                    for node, index in _edge(translator, self.graph, natives[name], position, alive)
                ]
                return {**row, "edges": edges} if edges else None
            inner = translator.inner.get((natives[row["node"]], row["recipe"]))
            if inner is None:
                return row
            moved = {key: value for key, value in row.items() if key not in ("node", "recipe", "type")}
            return {**moved, "value": inner.name}

        return translate


def _exists(value: ir.Value, alive: set[ir.Node]) -> bool:
    producer = value.producer()
    return producer in alive if producer is not None else value.is_graph_input() or value.is_initializer()


def _edge(
    translator: Translator, graph: FxGraph, node: fx.Node, position: int, alive: set[ir.Node]
) -> Iterator[tuple[ir.Node, int]]:
    """The operands of ONNX nodes that read, on behalf of ``node``, what its operand ``position`` is."""
    operands = graph.operands(Node(graph, node))
    operand = operands[position]
    if operand is None:
        return
    value = translator.values.get(operand.key)
    found = [
        (made, index)
        for made in translator.made.get(node, ())
        if made in alive and made.op_type not in ("Shape", "Size")
        for index, read in enumerate(made.inputs)
        if read is value
    ]
    same = [index for index, other in enumerate(operands) if other == operand]
    if len(same) == len(found):  # the same value twice: take the reader in the same place
        found = [found[same.index(position)]]
    yield from found
