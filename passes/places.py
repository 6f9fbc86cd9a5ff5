"""The options ``site`` and ``ignore``, the same in every pass that takes places."""

from __future__ import annotations

from pydantic import Field

from actgraph.errors import PassError
from actgraph.graph import Graph, Site
from actgraph.pipeline.base import Pass

Selector = str | tuple[str, ...]


class SitePass(Pass):
    """A pass that acts at sites."""

    site: Selector = Field(description="Where: a site name, glob (blocks.*.mlp.hidden), range (blocks.{2..4}.resid_post), re:pattern, or a list.")
    ignore: Selector = Field(default=(), description="Sites to leave out, in the same spellings as site.")

    def select(self, graph: Graph) -> list[Site]:
        """The chosen sites, one per place: spellings of one anchor are acted on once. Raises SiteError or PassError."""
        return distinct(graph.sites(self.site, self.ignore), f"{self.name}: every site was ignored")


def distinct(sites: list[Site], when_empty: str) -> list[Site]:
    """``sites`` with those that share an anchor listed once. Raises PassError when nothing is left."""
    chosen = {site.anchor: site for site in reversed(sites)}
    if not chosen:
        raise PassError(when_empty, "relax ignore")
    return [site for site in sites if chosen.get(site.anchor) is site]
