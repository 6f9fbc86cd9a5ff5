"""Tap: add named outputs at sites."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from pydantic import Field, field_validator

from actgraph.errors import PassError
from actgraph.graph import Editor, Graph, Role, Site, Value
from actgraph.graph.context import token_dims
from actgraph.graph.where import Where
from actgraph.graph.where_mask import where_mask
from actgraph.ops.dtypes import DType
from actgraph.passes.places import WHERE, SitePass
from actgraph.pipeline.base import PassContext, PassResult


class Tap(SitePass):
    """Make the value of each site a graph output named after the site; the value is what its readers see now.

    An edit of the same site in a later pass edits what the output holds as well: it is one of the readers. For values before
    and after an edit tap the graph before and the graph after.

    With ``where`` the output holds the tokens that the clause names, and exact zeros for all others.
    """

    name: ClassVar[str] = "tap"
    family: ClassVar[str] = "tap"
    preserves: ClassVar[frozenset[str]] = frozenset({"values"})

    where: str = Field(default="all", description=WHERE)
    prefix: str = Field(default="", description="Text put before the site's name in the output's name.")

    @field_validator("where")
    @classmethod
    def _readable(cls, clause: str) -> str:
        Where.parse(clause)
        return clause

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        result, where = PassResult(), Where.parse(self.where)
        taken = {name for name, _ in graph.outputs()}
        with context.edit(graph) as editor:
            mask = where_mask(editor, graph, where)
            for site in self.select(graph):
                name = self.prefix + site.name
                if name in taken:
                    raise PassError(f"tap: an output named {name!r} exists already", "set prefix, or ignore the site")
                value = editor.site_value(site)
                if mask is not None:
                    value = self._named(editor, graph, site, value, mask)
                editor.add_output(value, name, role=Role.TAP)
                taken.add(name)
                result.counts["outputs added"] += 1
                result.details.append({"site": site.name, "output": name, "type": str(site.type)})
        result.messages += where.assumptions()
        return result

    def _named(self, editor: Editor, graph: Graph, site: Site, value: Value, mask: Value) -> Value:
        """The tokens of the mask, and zeros. Raises PassError for a site that is not [batch, seq, channels]."""
        shape = site.type.shape
        if shape is None or shape[:-1] != token_dims(graph):
            raise PassError(f"tap: where={self.where} is about tokens, and {site.name} is {site.type}", "tap another site")
        number = editor.insert("cast", [mask], {"to": DType.I64}).output
        column = editor.insert("gather", [np.array([[0], [1]], np.float32), number], {"axis": 0}).output  # with a last axis
        named = editor.insert("cast", [column], {"to": DType.BOOL}).output
        return editor.insert("where", [named, value, np.asarray(0, value_type(value))]).output


def value_type(value: Value) -> np.dtype[Any]:
    """The numpy type of a value's elements (float32 where it is not known)."""
    return value.dtype.numpy if value.dtype is not None else np.dtype(np.float32)
