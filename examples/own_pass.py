"""A pass in a script: scale every feed-forward's output. Passes are classes whose fields are their options."""

from typing import ClassVar

from pydantic import Field

import actgraph as ag
from actgraph.passes.places import SitePass
from actgraph.pipeline import UNBOUNDED, PassContext, PassResult


@ag.register
class Dim(SitePass):
    """Multiply each site by ``factor``."""

    name: ClassVar[str] = "dim"
    family: ClassVar[str] = "examples"

    factor: float = Field(ge=0.0, le=1.0, description="What is left of the activation, from 0 to 1.")

    def run(self, graph: ag.Graph, context: PassContext) -> PassResult:
        result = PassResult(expected_change=f"activations are scaled by {self.factor:g}", expected_size=UNBOUNDED)
        with context.edit(graph) as editor:
            for site in self.select(graph):
                editor.insert_at(site, "mul", [self.factor])
                result.counts["scaled"] += 1
        return result


graph = ag.load("stories260k")
for factor in (1.0, 0.9, 0.5):
    out = ag.run(graph, f"dim{{site=blocks.*.mlp.out factor={factor}}}")
    print(f"{factor}: {out.report['dim'].did}, perplexity {ag.perplexity(out.graph):.2f}")
