"""What a graph is: two native containers behind one face, with sites, views, canonical text and a verifier."""

from actgraph.graph.editor import Editor
from actgraph.graph.graph import Companions, Graph, Kind, Node, Role, Use, Value
from actgraph.graph.provenance import Origin, PassRecord
from actgraph.graph.sites import Site, SiteKind

__all__ = [
    "Companions", "Editor", "Graph", "Kind", "Node", "Origin", "PassRecord", "Role", "Site", "SiteKind", "Use", "Value",
]  # fmt: skip
