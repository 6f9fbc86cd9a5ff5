"""Steering: add a vector to an activation.

Sources: Steering Language Models With Activation Engineering (ActAdd, 2023); Steering Llama 2 via Contrastive Activation
Addition (CAA, 2023). ``h' = h + scale * v`` at every token, or at those that ``where`` names (CAA steers all tokens behind the
prompt, ActAdd the first ones).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from pydantic import Field, field_validator

from actgraph.errors import PassError
from actgraph.formats.vectors import SteeringVector, is_of_another_model, load_vector
from actgraph.graph import Editor, Graph, Site, SiteKind, Use, Value
from actgraph.graph.context import token_dims
from actgraph.graph.graph import Array
from actgraph.graph.views import Linear
from actgraph.ops import get_op
from actgraph.passes.places import Selector, SitePass
from actgraph.passes.steer.folding import bias_writer
from actgraph.passes.steer.where import Where, where_mask
from actgraph.pipeline.base import ROUNDING, UNBOUNDED, Declined, PassContext, PassResult


class Steer(SitePass):
    """Add ``scale`` times a vector at each site, for all tokens or those that ``where`` names.

    ``where`` is ``all``, ``prompt``, ``generated``, or a window of positions: ``3:`` (from position 3 on), ``:4`` (the first
    four), ``2:5`` (2, 3 and 4); ``prompt & 2:`` are the tokens that meet both. Positions count the real tokens of each row
    from 0, and never padding. A token is generated when as many tokens as the prompt has stand before it; sessions tell the
    lengths of prompts, and where nobody does (the input ``prompt_lengths`` is optional) all tokens are prompt. A clause means
    the same with and without a cache, which may be inserted before or after. It needs sites of [batch, seq, channels].

    Vectors at one site, value or edge, merge into one. Where the site's value is a linear's output, directly or through
    residual adds, and nothing else reads that linear's output, the shift folds into the linear's bias and costs nothing; the
    sites that lie between the two are then gone (their values contain the shift), which a later pass that names them is told.
    A shift at some tokens only does neither: it stays a node.
    """

    name: ClassVar[str] = "steer"
    family: ClassVar[str] = "steer"
    repeatable: ClassVar[bool] = True
    off: ClassVar[Mapping[str, Any]] = {"scale": 0.0}
    oracle: ClassVar[Mapping[str, Any]] = {"fold": False}

    site: Selector = Field(default=(), description="Where to add the vector; default: the site named in the vector's file.")
    vector: str | tuple[float, ...] = Field(
        description="A safetensors file (see `actgraph extract-vector`), or the numbers themselves.",
        json_schema_extra={"path": True},
    )
    scale: float = Field(default=1.0, description="Factor on the vector; 0 is the identity.", allow_inf_nan=False)
    where: str = Field(
        default="all", description="Which tokens: all, prompt, generated, or a window of positions (3:, :4, 2:5); & joins them."
    )
    fold: bool = Field(default=True, description="Move the shift into a bias where that is exact: with where=all.")
    axis: int = Field(default=-1, description="The axis of the site that the vector lies along (1 for NCHW images).")

    @field_validator("where")
    @classmethod
    def _readable(cls, clause: str) -> str:
        Where.parse(clause)
        return clause

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        vector = (
            load_vector(self.vector)
            if isinstance(self.vector, str)
            else SteeringVector({"": np.asarray(self.vector, np.float32)})
        )
        selector = self.site or tuple(name for name in vector.directions if name)
        if not selector:
            raise PassError("steer: the vector names no site", "say where with site=blocks.2.resid_post")
        sites = self.model_copy(update={"site": selector}).select(graph)
        where = Where.parse(self.where)
        result = PassResult(expected_change="the outputs are steered", expected_size=UNBOUNDED)
        with context.edit(graph) as editor:
            mask = None if where.everywhere or self.scale == 0 else where_mask(editor, graph, where)
            for site in sites:
                direction = vector.for_site((site.name, *site.aliases)).astype(np.float64) * self.scale
                rule = self._apply(graph, editor, site, direction, mask, result)
                if rule:
                    result.counts[rule] += 1
                    result.details.append(
                        {"site": site.name, "rule": rule, "scale": self.scale, "norm": float(np.linalg.norm(direction))}
                    )
        if not where.everywhere and self.fold and result.counts["inserted"]:
            result.messages.append(f"not folded: a bias is added to every token, and the shift is where={self.where}")
        if where.part and result.counts["inserted"]:
            told = "where nobody gives it, all tokens are prompt"
            result.messages.append(f"where={self.where} reads the input prompt_lengths: {told}")
        if is_of_another_model(vector.model, graph):
            result.messages.append(
                f"{self.vector} was extracted from another model than {graph.name}, or before its embeddings were changed"
            )
        result.messages += editor.messages
        if set(result.counts) == {"identity"}:
            result.expected_change, result.expected_size = "exact", ROUNDING
        if not result.counts:
            raise PassError(f"steer changed nothing: {result.declined[0].site}: {result.declined[0].reason}")
        return result

    def _apply(self, graph: Graph, editor: Editor, site: Site, direction: Array, mask: Value | None, result: PassResult) -> str:
        """Steer one site, at the tokens of ``mask``, and return the rule that was used; empty when declined."""
        width = site.type.shape[self.axis] if site.type.shape else None
        if site.type.dtype is None or width is None:
            result.declined.append(Declined(site.name, "its type or width is unknown"))
            return ""
        if width != len(direction):
            raise PassError(
                f"steer: the vector has {len(direction)} numbers but {site.name} is {site.type}",
                "use a vector extracted at this site, or set axis",
            )
        if not direction.any():
            return "identity"
        data = direction.astype(site.type.dtype.numpy)
        attributes = {} if self.axis == -1 else {"axis": self.axis}
        if mask is not None:
            assert site.type.shape is not None
            channel = self.axis % len(site.type.shape)
            tokens = (*site.type.shape[:channel], *site.type.shape[channel + 1 :])
            if tokens != token_dims(graph):
                result.declined.append(
                    Declined(site.name, f"where={self.where} is about tokens, and {site.type} has other axes")
                )
                return ""
            editor.insert_at(site, "actgraph.shift", [data, None, mask], attributes)
            return "inserted"
        if site.kind is not SiteKind.VIRTUAL and self._merge(graph, editor, site, direction):
            return "merged"
        if site.kind is SiteKind.VALUE and self.fold and self._fold(graph, editor, site, direction):
            return "folded"
        editor.insert_at(site, "actgraph.shift", [data], attributes)
        return "inserted"

    def _merge(self, graph: Graph, editor: Editor, site: Site, direction: Array) -> bool:
        """Add to the constant shift that already produces what the site's readers see and nobody else does, if there is one."""
        node = site.value.producer
        if node is None or node.op != "actgraph.shift" or any(o is not None for o in node.operands[2:]):
            return False
        if set(site.uses(graph)) != set(site.value.uses):
            return False
        old = node.operands[1]
        plain = get_op(node.op).complete({"axis": self.axis})
        if old is None or not old.is_parameter or get_op(node.op).complete(node.attributes) != plain:
            return False
        total = graph.read(old).astype(np.float64) + direction
        editor.set_parameter(old, total.astype(graph.read(old).dtype), uses=[Use(node, 1)])
        return True

    def _fold(self, graph: Graph, editor: Editor, site: Site, direction: Array) -> bool:
        if self.axis not in (-1, len(site.type.shape or ()) - 1):
            return False
        linears: dict[Value, Linear] = {linear.output: linear for linear in graph.views.linears()}
        found = bias_writer(graph, site.value, linears)
        if found is None:
            return False
        linear, between = found
        bias = linear.read_bias()
        dtype = site.type.dtype.numpy if site.type.dtype else np.dtype(np.float32)
        total = direction if bias is None else bias.astype(np.float64) + direction
        path = [value.uses[0] for value in between]  # where a bias becomes a node of its own, another value is read there
        linear.write_bias(editor, total.astype(dtype))
        for use in path:
            shifted = use.node.operands[use.index] if use.node is not None else None
            assert shifted is not None
            editor.forget_sites(shifted, f"{self.name} (its shift was folded into {linear.weight.name}'s bias)")
        return True
