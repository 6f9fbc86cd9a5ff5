"""Directional ablation: project a direction out of an activation.

Source: Refusal in Language Models Is Mediated by a Single Direction (2024). ``h' = h - (h . v) v`` with a unit vector v.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from actgraph.errors import PassError
from actgraph.formats.vectors import SteeringVector, load_vector
from actgraph.graph import Editor, Graph, Site, SiteKind
from actgraph.graph.graph import Array
from actgraph.graph.views import Linear
from actgraph.passes.places import Selector, SitePass
from actgraph.passes.steer.folding import linear_readers
from actgraph.pipeline.base import UNBOUNDED, Declined, PassContext, PassResult


class Ablate(SitePass):
    """Project the unit direction out of each site, for all tokens.

    Folds into weights where that is exact: ``W <- (I - v v^T) W`` where the site is a linear's output (bias likewise),
    ``W <- W (I - v v^T)`` into the linears that read it where nothing else does. A residual stream has other readers and
    keeps a node. The papers ablate at every site that writes the stream: select ``embed, blocks.*.attn.out, blocks.*.mlp.out``.
    """

    name: ClassVar[str] = "ablate"
    family: ClassVar[str] = "steer"
    repeatable: ClassVar[bool] = True
    oracle: ClassVar[Mapping[str, Any]] = {"fold": False}

    site: Selector = Field(default=(), description="Where to ablate; default: the sites named in the direction's file.")
    direction: str | tuple[float, ...] = Field(
        description="A safetensors file with the direction, or its numbers; normalised to unit length.",
        json_schema_extra={"path": True},
    )
    fold: bool = Field(default=True, description="Move the projection into weights where that is exact.")

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        given = self.direction
        vector = load_vector(given) if isinstance(given, str) else SteeringVector({"": np.asarray(given, np.float32)})
        selector = self.site or tuple(name for name in vector.directions if name)
        if not selector:
            raise PassError("ablate: the direction names no site", "say where with site=blocks.2.resid_post")
        result = PassResult(expected_change="a direction is projected out", expected_size=UNBOUNDED)
        with context.edit(graph) as editor:
            for site in self.model_copy(update={"site": selector}).select(graph):
                unit = _unit(vector.for_site((site.name, *site.aliases)))
                rule = self._apply(graph, editor, site, unit, result)
                if rule:
                    result.counts[rule] += 1
                    result.details.append({"site": site.name, "rule": rule})
        result.messages += editor.messages
        if not result.counts:
            raise PassError(f"ablate changed nothing: {result.declined[0].site}: {result.declined[0].reason}")
        return result

    def _apply(self, graph: Graph, editor: Editor, site: Site, unit: Array, result: PassResult) -> str:
        shape, dtype = site.type.shape, site.type.dtype
        if not shape or dtype is None:
            result.declined.append(Declined(site.name, "its type is unknown"))
            return ""
        if shape[-1] != len(unit):
            raise PassError(
                f"ablate: the direction has {len(unit)} numbers but {site.name} is {site.type}", "use a direction of this site"
            )
        if self.fold and self._fold(graph, editor, site, unit):
            return "folded"
        basis = unit[:, None].astype(dtype.numpy)
        editor.insert_at(site, "actgraph.lowrank_map", [basis, np.array([[-1.0]], dtype.numpy)])
        return "inserted"

    def _fold(self, graph: Graph, editor: Editor, site: Site, unit: Array) -> bool:
        linears = graph.views.linears()
        if site.kind is SiteKind.EDGE:
            uses = set(site.uses(graph))
            readers = [linear for linear in linears if linear.input in uses]
            if uses != {linear.input for linear in readers}:
                return False  # a reader without weights keeps the direction
        elif site.kind is SiteKind.VALUE:
            writer = next((linear for linear in linears if linear.output == site.value), None)
            if writer is not None and _stored(writer):
                weight = writer.read_weight().astype(np.float64)
                writer.write_weight(editor, (weight - np.outer(unit, unit @ weight)).astype(writer.read_weight().dtype))
                bias = writer.read_bias()
                if bias is not None:
                    wide = bias.astype(np.float64)
                    writer.write_bias(editor, (wide - unit * (unit @ wide)).astype(bias.dtype))
                return True
            readers = linear_readers(graph, site.value, linears) or []
        else:
            return False
        if not readers or not all(_stored(linear) for linear in readers):
            return False
        for linear in readers:
            weight = linear.read_weight().astype(np.float64)
            linear.write_weight(editor, (weight - np.outer(weight @ unit, unit)).astype(linear.read_weight().dtype))
        by = f"{self.name} (folded into the weights of its readers)"
        if site.kind is SiteKind.VALUE:
            editor.forget_sites(site.value, by)
        for linear in readers:
            editor.forget_edge(linear.input, by)
        return True


def _stored(linear: Linear) -> bool:
    """Whether the weight is stored in floating point and can be replaced."""
    return linear.weight.is_parameter and linear.matrix is not None


def _unit(direction: Array) -> Array:
    wide = direction.astype(np.float64)
    norm = float(np.linalg.norm(wide))
    if norm == 0.0:
        raise PassError("ablate: the direction is zero", "extract it from sets that differ")
    return np.asarray(wide / norm)
