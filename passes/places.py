"""The options ``site``, ``ignore`` and ``where``, the same in every pass that takes places."""

from __future__ import annotations

from pydantic import Field

from actgraph.graph import Graph, Site
from actgraph.pipeline.base import Pass

Selector = str | tuple[str, ...]

#: What the option ``where`` says of itself.
WHERE = (
    "Which tokens: all, prompt, generated, positions (3, 3:, :4, 2:5, prompt[-1], generated[:4]), token(13), row(0); & and | "
    "join them, ! excludes."
)


class SitePass(Pass):
    """A pass that acts at sites."""

    site: Selector = Field(
        description="Where: a site name, glob (blocks.*.mlp.hidden), range (blocks.{2..4}.resid_post), re:pattern, or a list."
    )
    ignore: Selector = Field(default=(), description="Sites to leave out, in the same spellings as site.")

    def select(self, graph: Graph) -> list[Site]:
        """The chosen sites, one per place however many of its names match. Raises SiteError."""
        return graph.sites(self.site, self.ignore)
