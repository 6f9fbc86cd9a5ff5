"""Dead-code elimination."""

from __future__ import annotations

from typing import ClassVar

from actgraph.graph import Graph
from actgraph.pipeline.base import Pass, PassContext, PassResult


class DeadCode(Pass):
    """Remove nodes, parameters and functions that no output depends on."""

    name: ClassVar[str] = "dce"
    family: ClassVar[str] = "cleanup"
    preserves: ClassVar[frozenset[str]] = frozenset({"values"})
    repeatable: ClassVar[bool] = True
    may_do_nothing: ClassVar[bool] = True

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        result = PassResult()
        with context.edit(graph) as editor:
            result.counts["removed"] = editor.erase_dead()
        return result
