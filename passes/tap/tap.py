"""Tap: add named outputs at sites."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from actgraph.errors import PassError
from actgraph.graph import Graph, Role
from actgraph.passes.places import SitePass
from actgraph.pipeline.base import PassContext, PassResult


class Tap(SitePass):
    """Make the value of each site a graph output named after the site; the value is what its readers see now."""

    name: ClassVar[str] = "tap"
    family: ClassVar[str] = "tap"
    preserves: ClassVar[frozenset[str]] = frozenset({"values"})

    prefix: str = Field(default="", description="Text put before the site's name in the output's name.")

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        result = PassResult()
        taken = {name for name, _ in graph.outputs()}
        with context.edit(graph) as editor:
            for site in self.select(graph):
                name = self.prefix + site.name
                if name in taken:
                    raise PassError(f"tap: an output named {name!r} exists already", "set prefix, or ignore the site")
                editor.add_output(editor.site_value(site), name, role=Role.TAP)
                taken.add(name)
                result.counts["outputs added"] += 1
                result.details.append({"site": site.name, "output": name, "type": str(site.type)})
        return result
