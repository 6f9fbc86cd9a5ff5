"""Reading structure off a graph: recognisers written once on the shared vocabulary, for both dialects."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from actgraph.graph.graph import Graph
    from actgraph.graph.sites import SiteTable


def assign_sites(graph: Graph) -> SiteTable:
    """The sites of ``graph`` under all their names: roles, structure, and modules where the graph has scopes."""
    from actgraph.graph.recognize.module_sites import module_sites
    from actgraph.graph.recognize.naming import build_table
    from actgraph.graph.recognize.roles import role_sites
    from actgraph.graph.recognize.structural import structural_sites

    views = graph.views
    return build_table(views.semantics, [*role_sites(views), *structural_sites(views), *module_sites(graph)])
