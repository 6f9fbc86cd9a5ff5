"""Activation sparsity by magnitude thresholds.

Sources: Training-Free Activation Sparsity in Large Language Models (TEAL, 2024); Contextually-Aware Thresholding for Sparsity
in LLMs (CATS, 2024). Both zero an activation ``x`` where ``|x| <= t``; the threshold ``t`` is the quantile of ``|x|`` on
calibration text at the wanted sparsity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from actgraph.calibrate.statistics import Request
from actgraph.errors import OptionError, PassError
from actgraph.graph import Graph, Node, Use, Value
from actgraph.graph.views import FeedForward, Views
from actgraph.passes.linears import Places, check_selectors, edge_name, expert_weights, input_value
from actgraph.passes.places import Selector
from actgraph.pipeline.base import UNBOUNDED, Declined, Pass, PassContext, PassResult


class Sparsify(Pass):
    """Insert a threshold gate ``x -> where(|x| <= t, 0, x)``; t = 0 is the identity and NaN passes.

    teal gates the input edge of every linear in the blocks, each with its own threshold (q's copy of x and not k's).
    cats gates the activation of every gated feed-forward, before its product with ``up``; ``down`` is sparse with it.
    The published TEAL code inverts the CDF of the signed activation under a symmetry assumption; the quantile of ``|x|``
    used here means the same and needs none.
    """

    name: ClassVar[str] = "sparsify"
    family: ClassVar[str] = "sparsify"
    off: ClassVar[Mapping[str, Any]] = {"sparsity": None, "threshold": 0.0}

    method: Literal["teal", "cats"] = Field(default="teal", description="Which activations are gated; see the class.")
    sparsity: float | None = Field(default=None, ge=0.0, lt=1.0, description="Share of each gated activation to drop (0 to 1).")
    threshold: float | None = Field(default=None, ge=0.0, description="A threshold given outright, in place of sparsity.")
    site: Selector = Field(
        default=(), description="teal: inputs of linears; cats: blocks.{i}.mlp.act. Default: all in the blocks."
    )
    ignore: Selector = Field(default=(), description="Places to leave dense.")

    @model_validator(mode="after")
    def _one_of(self) -> Sparsify:
        if (self.sparsity is None) == (self.threshold is None):
            raise OptionError("sparsify takes either sparsity or threshold", "for example sparsity=0.4")
        return self

    def requests(self, graph: Graph) -> Sequence[Request]:
        if self.sparsity is None:
            return ()
        return [_request(name) for name, _, _ in self._places(graph, graph.views)]

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        views = graph.views
        places = self._places(graph, views)
        experts = expert_weights(graph, views, self.site, self.ignore) if self.method == "teal" else []
        if not places:
            raise PassError(
                f"sparsify: no {'linear input' if self.method == 'teal' else 'gated feed-forward'} is selected",
                "list candidates with `actgraph sites MODEL '*.mlp.*'`",
            )
        result = PassResult()
        with context.edit(graph) as editor:
            for name, value, uses in places:
                threshold, measured = self._threshold(context, name)
                if len(value.uses) and value.dtype is None:
                    result.declined.append(Declined(name, "its type is unknown"))
                    continue
                node = editor.insert("actgraph.gate", [value, None], {"threshold": threshold}, after=value.producer)
                editor.redirect(value, node.output, uses)
                result.counts["gates"] += 1
                if threshold > 0:
                    result.expected_change = f"activations with |x| <= t are dropped ({self.method})"
                    result.expected_size = UNBOUNDED
                result.details.append({"site": name, "threshold": threshold, "sparsity": measured})
        result.declined += [Declined(name, f"{reason}: their inputs are not gated") for name, reason in experts]
        if not result.counts:
            raise PassError(f"sparsify changed nothing: {result.declined[0].site}: {result.declined[0].reason}")
        return result

    def _threshold(self, context: PassContext, name: str) -> tuple[float, float | None]:
        """The threshold at a place and the share of calibration activations that it drops."""
        if self.sparsity is None:
            assert self.threshold is not None
            return self.threshold, None
        assert context.statistics is not None
        sketch = context.statistics.sketch(_request(name))
        threshold = float(sketch.quantile(self.sparsity)) if self.sparsity > 0 else 0.0
        return threshold, float(sketch.cdf(threshold))

    def _places(self, graph: Graph, views: Views) -> list[tuple[str, Value, list[Use] | None]]:
        """``(site name, value, uses)``: what to gate and for which readers (``None``: all)."""
        wanted, unwanted = Places.of(graph, self.site), Places.ignored(graph, self.ignore)
        if self.method == "cats":
            gated = [f for f in views.feed_forwards() if f.gate is not None and f.act != f.hidden]
            check_selectors(graph, self.site, lambda named: any(f.act in named.values for f in gated), "gated activation")
            return [
                (_act_name(graph, f), f.act, None)
                for f in gated
                if (not self.site or f.act in wanted.values) and f.act not in unwanted.values
            ]
        linears = views.linears()
        check_selectors(graph, self.site, lambda named: any(named.covers_input(x) for x in linears), "input of a linear")
        inside = set() if self.site else _in_blocks(graph, views)
        return [
            (edge_name(graph, linear), input_value(linear), [linear.input])
            for linear in linears
            if (wanted.covers_input(linear) if self.site else linear.nodes[0] in inside)
            and not (unwanted.covers_input(linear) or unwanted.covers(linear))
        ]


def _request(name: str) -> Request:
    return Request(name, "abs_quantile")


def _act_name(graph: Graph, feed_forward: FeedForward) -> str:
    names = graph.site_table.names_of(feed_forward.act)
    return graph.site_table.role_name_of(feed_forward.act) or (names[0] if names else f"%{feed_forward.act.name}")


def _in_blocks(graph: Graph, views: Views) -> set[Node]:
    """The first nodes of the projections of all blocks (of all linears in a model without blocks)."""
    linears = views.linears()
    blocks = views.blocks()
    if not blocks:
        return {x.nodes[0] for x in linears}
    first, last = blocks[0].resid_pre, {block.resid_post for block in blocks}
    order = {node: position for position, node in enumerate(graph.nodes())}
    start = order.get(first.producer, -1) if first.producer is not None else -1
    end = max(order[value.producer] for value in last if value.producer is not None)
    routers = {moe.router.output for moe in views.moe()}
    return {x.nodes[0] for x in linears if start < order[x.nodes[0]] <= end and x.output not in routers}
