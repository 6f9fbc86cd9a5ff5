"""Structured pruning of feed-forward neurons by activation-aware importance.

Sources: CFSP (2024) for the setting and the importance measures; Wanda (2023) for activation-aware scores. The weight-aware
contribution norm is the default, because the score that CFSP's code ships reduces to the activation norm alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from actgraph.calibrate.statistics import Request
from actgraph.errors import PassError
from actgraph.graph import Editor, Graph, Node, Use, Value
from actgraph.graph.graph import Array
from actgraph.graph.views import FeedForward, Linear
from actgraph.passes.linears import Places, check_selectors, edge_name
from actgraph.passes.places import Selector
from actgraph.passes.prune.importance import DOCS, Importance, keep_indices, neuron_importance
from actgraph.passes.prune.region import Region, neuron_region
from actgraph.pipeline.base import UNBOUNDED, Declined, Pass, PassContext, PassResult


class Prune(Pass):
    """Remove the least important neurons of each feed-forward: rows of gate and up, columns of down, and their biases.

    Companions along the way (thresholds, steering vectors, scales of that width) are cut by the same indices. ``mode=mask``
    multiplies the neurons by 0 instead: the same numbers at the same cost, as an oracle.
    """

    name: ClassVar[str] = "prune"
    family: ClassVar[str] = "prune"
    oracle: ClassVar[Mapping[str, Any]] = {"mode": "mask"}

    ratio: float = Field(gt=0.0, lt=1.0, description="Share of the neurons to remove in each feed-forward.")
    importance: Importance = Field(default="activation", description="; ".join(f"{k}: {v}" for k, v in DOCS.items()))
    mode: Literal["remove", "mask"] = Field(default="remove", description="remove them physically, or mask them.")
    round_to: int = Field(default=1, ge=1, description="Keep a multiple of this many neurons.")
    site: Selector = Field(default=(), description="Which feed-forwards, by blocks.{i}.mlp.hidden; default: all.")
    ignore: Selector = Field(default=(), description="Feed-forwards to leave whole.")

    def requests(self, graph: Graph) -> Sequence[Request]:
        if self.importance == "magnitude":
            return ()
        return [_request(graph, f) for group in self._groups(graph) for f in group]

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        groups = self._groups(graph)
        if not groups:
            if not graph.views.feed_forwards():
                experts = "experts of a mixture are not pruned" if graph.views.moe() else ""
                raise PassError(f"prune: {graph.name} has no feed-forward that can be pruned", experts)
            raise PassError("prune: no feed-forward is selected", "list them with `actgraph sites MODEL '*.mlp.hidden'`")
        result = PassResult(
            expected_change=f"{100 * self.ratio:.10g}% of the feed-forward neurons are removed", expected_size=UNBOUNDED
        )
        with context.edit(graph) as editor:
            for group in groups:
                name = edge_name(graph, group[0].down)
                refusal = _refusal(group)
                neurons = group[0].down.in_features
                regions = [neuron_region(graph, f, _starts(f), neurons) for f in group]
                refusal = refusal or next((r.refusal for r in regions if r.refusal), "")
                if refusal:
                    result.declined.append(Declined(name, refusal))
                    continue
                scores = self._scores(graph, context, group)
                keep = keep_indices(scores, self.ratio, self.round_to)
                if len(keep) == neurons:
                    result.declined.append(Declined(name, f"round_to={self.round_to} keeps all {neurons} neurons"))
                    continue
                if self.mode == "mask":
                    _mask(editor, group, keep, neurons)
                else:
                    _remove(editor, group, regions, keep)
                result.counts["feed-forwards pruned"] += len(group)
                result.counts["neurons removed"] += neurons - len(keep)
                kept = float(scores[keep].sum() / scores.sum()) if scores.sum() > 0 else 1.0
                result.details.append({"site": name, "neurons": neurons, "kept": len(keep), "importance kept": kept})
            editor.erase_dead()
        result.messages += editor.messages
        if not result.counts:
            raise PassError(f"prune changed nothing: {result.declined[0].site}: {result.declined[0].reason}")
        return result

    def _groups(self, graph: Graph) -> list[list[FeedForward]]:
        """Selected feed-forwards, those that share their weights (ALBERT's layers) together."""
        wanted, unwanted = Places.of(graph, self.site), Places.ignored(graph, self.ignore)
        groups: dict[object, list[FeedForward]] = {}
        found = graph.views.feed_forwards()
        check_selectors(graph, self.site, lambda named: any(_named(f, named) for f in found), "feed-forward")
        for f in found:
            if (not self.site or _named(f, wanted)) and not _named(f, unwanted):
                groups.setdefault(f.down.weight, []).append(f)
        return list(groups.values())

    def _scores(self, graph: Graph, context: PassContext, group: list[FeedForward]) -> Array:
        """Neuron scores; blocks that share weights add up their mean squares."""
        moments: list[Array] = []
        if self.importance != "magnitude":
            assert context.statistics is not None
            moments = [context.statistics.array(_request(graph, f)) for f in group]
        mean_square = np.sum(moments, axis=0) if moments else None
        return neuron_importance(self.importance, group[0].down.read_weight(), mean_square)


def _named(feed_forward: FeedForward, places: Places) -> bool:
    return places.covers_input(feed_forward.down) or feed_forward.hidden in places.values


def _request(graph: Graph, feed_forward: FeedForward) -> Request:
    return Request(edge_name(graph, feed_forward.down), "second_moment", axis=-1)


def _starts(feed_forward: FeedForward) -> list[Value]:
    """The values where the neurons begin: outputs of gate and up, or the halves of a fused projection."""
    if feed_forward.fused_gate_up:
        assert feed_forward.up_value is not None
        return [feed_forward.pre_act, feed_forward.up_value]
    return [linear.output for linear in (feed_forward.gate, feed_forward.up) if linear is not None]


def _projections(feed_forward: FeedForward) -> list[Linear]:
    return [linear for linear in dict.fromkeys((feed_forward.gate, feed_forward.up)) if linear is not None]


def _refusal(group: list[FeedForward]) -> str:
    for f in group:
        for linear in (*_projections(f), f.down):
            if not linear.weight.is_parameter or linear.matrix is None:
                return f"the weight {linear.weight.name} is not stored as it is used: prune before quantizing"
    if len(group) > 1 and group[0].fused_gate_up:
        return "shared fused projections are not supported"
    return ""


def _mask(editor: Editor, group: list[FeedForward], keep: Array, neurons: int) -> None:
    for f in group:
        node, index = f.down.input
        assert node is not None
        value = node.operands[index]
        assert value is not None and value.dtype is not None
        mask = np.zeros(neurons, value.dtype.numpy)
        mask[keep] = 1
        product = editor.insert("mul", [value, mask], after=value.producer)
        editor.redirect(value, product.output, [f.down.input])


def _remove(editor: Editor, group: list[FeedForward], regions: list[Region], keep: Array) -> None:
    graph = editor.graph
    down = group[0].down
    if group[0].fused_gate_up:  # the projection is gone afterwards: types start from what reads its successors
        changed = [*_split_fused(editor, group[0], keep), *down.nodes]
    else:
        changed = [node for f in group for linear in (*_projections(f), f.down) for node in linear.nodes]
        planned = {
            linear.weight: (linear, linear.read_weight()[keep], linear.read_bias()) for f in group for linear in _projections(f)
        }
        for linear, weight, bias in planned.values():
            _store(editor, linear, weight, group)
            if bias is not None and len(group) == 1:
                linear.write_bias(editor, bias[keep])
            elif bias is not None and linear.bias is not None:
                editor.set_parameter(linear.bias, np.ascontiguousarray(bias[keep]), uses=_uses(linear.bias, group))
    cut = set()
    for operand, use in [pair for region in regions for pair in region.companions]:
        if (operand, use) not in cut and not any(operand == linear.bias for f in group for linear in _projections(f)):
            cut.add((operand, use))
            editor.set_parameter(operand, np.ascontiguousarray(graph.read(operand)[..., keep]), uses=[use])
    _store(editor, down, down.read_weight()[:, keep], group)
    editor.retype(changed)


def _store(editor: Editor, linear: Linear, weight: Array, group: list[FeedForward]) -> None:
    """Write ``[out, in]`` back as it is stored, for every linear of the group that shares it."""
    if len(group) == 1:
        linear.write_weight(editor, np.ascontiguousarray(weight))
    else:
        data = np.ascontiguousarray(weight if linear.out_axis == 0 else weight.T)
        editor.set_parameter(linear.weight, data, uses=_uses(linear.weight, group))


def _uses(parameter: Value, group: list[FeedForward]) -> list[Use]:
    """The places where the projections of the group read a shared parameter."""
    nodes = {node for f in group for linear in (*_projections(f), f.down) for node in linear.nodes}
    return [use for use in parameter.uses if use.node in nodes]


def _split_fused(editor: Editor, f: FeedForward, keep: Array) -> list[Node]:
    """Replace a fused gate-up projection and its split by two products, so that no split sizes have to change.

    Returns the nodes that read the new products, in place of the halves.
    """
    weight, bias = f.up.read_weight(), f.up.read_bias()
    half = weight.shape[0] // 2
    node, index = f.up.input
    assert node is not None
    source = node.operands[index]
    assert f.up_value is not None
    gate_rows = keep if f.gate_first else keep + half
    up_rows = keep + half if f.gate_first else keep
    readers: list[Node] = []
    for rows, old, part in ((gate_rows, f.pre_act, "gate"), (up_rows, f.up_value, "up")):
        stored = editor.add_parameter(f"{f.up.weight.name}_{part}", np.ascontiguousarray(weight[rows].T))
        product = editor.insert("matmul", [source, stored], before=node, like=node)
        if bias is not None:
            shift = editor.add_parameter(f"{f.up.weight.name}_{part}_bias", np.ascontiguousarray(bias[rows]))
            product = editor.insert("add", [product.output, shift], after=product)
        readers += [use.node for use in old.uses if use.node is not None]
        editor.redirect(old, product.output)
    editor.erase_dead()
    return readers
