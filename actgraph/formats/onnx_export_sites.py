"""Sites across the export: which FX nodes must stay separate, and where each site is in the ONNX graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import onnx_ir as ir
from torch import fx

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
        natives = {fx_node.name: fx_node for fx_node in self.graph.graph.nodes}
        alive = set(result.model.graph)
        data = self.sites.to_dict()
        rows = []
        for row in data["sites"]:
            moved = dict(row)
            if "value" in row:
                value = translator.values.get(self.graph.value(row["value"]).key)
                if not isinstance(value, ir.Value) or not _exists(value, alive):
                    data["removed"].update(dict.fromkeys([row["name"], *row.get("aliases", ())], "export to ONNX"))
                    continue
                moved["value"] = value.name
            elif "edges" in row:
                moved["edges"] = [
                    [str(node.name), index]
                    for name, position in row["edges"]
                    for node, index in _edge(translator, self.graph, natives[name], position, alive)
                ]
                if not moved["edges"]:
                    data["removed"].update(dict.fromkeys([row["name"], *row.get("aliases", ())], "export to ONNX"))
                    continue
            elif "node" in row:
                inner = translator.inner.get((natives[row["node"]], row["recipe"]))
                if inner is not None:
                    moved = {key: value for key, value in row.items() if key not in ("node", "recipe", "type")}
                    moved["value"] = inner.name
            rows.append(moved)
        return SiteTable.from_dict(result, {**data, "sites": rows})


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
