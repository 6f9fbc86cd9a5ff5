"""MoTE: suppress, force or bias experts of mixtures of experts, and find those that a behaviour depends on.

Source: *Mixture of Tunable Experts: Behavior Modification of DeepSeek-R1 at Inference Time*, 2025. Where the abstract and
public notes do not tell (the weight of a stimulated expert), the choice is an option.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from actgraph.calibrate.experts import collect_routing
from actgraph.errors import InputError, OptionError, PassError
from actgraph.formats.expert_profiles import ExpertProfile, load_profile
from actgraph.formats.vectors import model_fingerprint
from actgraph.graph import Editor, Graph, Value
from actgraph.graph.graph import Role
from actgraph.graph.recognize.router import Router
from actgraph.graph.views import MixtureOfExperts
from actgraph.graph.where import Where
from actgraph.graph.where_mask import where_mask
from actgraph.ops.dtypes import DType
from actgraph.ops.shapes import TensorType
from actgraph.passes.places import WHERE
from actgraph.passes.steer.drop_experts import Stack, drop_experts, expert_stacks
from actgraph.passes.steer.of_model import OfModel
from actgraph.passes.steer.routing import (
    TokenMask,
    add_to_logits,
    add_to_selection,
    closed_groups,
    extremes,
    fixed_before,
    reweight,
    set_selection,
    token_mask,
    too_many_forced,
    too_many_suppressed,
)
from actgraph.pipeline.base import ROUNDING, UNBOUNDED, Declined, PassContext, PassResult

_SPEC = re.compile(r"(?:(?P<number>[0-9]+)|(?P<all>\*)|(?P<name>[\w.]*blocks\.[0-9]+)):(?P<expert>[0-9]+)")
#: The optional input with which biases are given at run time.
INPUT = "mote.expert_bias"


class Mote(OfModel):
    """Suppress, force or bias experts in the routers of mixtures of experts; shared experts are never touched.

    ``suppress`` with ``policy=after_topk``: an expert that was chosen gets weight 0, the others share its weight so that the
    token's total stays, and no other expert is admitted (if all are suppressed, what is left is the shared path).
    ``policy=before_topk``: it is never chosen and the next best enters. ``force``: it is among the ``k`` experts of every
    token, with the weight of its own score, or with ``weight`` before the total is restored. ``bias``: a number is added to
    its router logit (or, with ``on=selection``, to the score that experts are chosen by alone).

    The choice is edited on the scores that the top-k sees, before groups of experts are chosen (DeepSeek), and weights are
    always made of the router's own scores: a router that normalises shares out the same total, one that does not keeps the
    weight of each expert, and the total changes with the experts. For all tokens the choice of DeepSeek-style routers folds
    into their stored selection bias, and a bias of logits into the router's bias; otherwise a node or two are added per block.
    ``drop`` removes the weights of experts that no token gets; the router keeps its rows and groups, and the outputs stay.
    """

    name: ClassVar[str] = "mote"
    family: ClassVar[str] = "steer"
    repeatable: ClassVar[bool] = True
    off: ClassVar[Mapping[str, Any]] = {"amount": 0.0}
    oracle: ClassVar[Mapping[str, Any]] = {"fold": False}

    experts: str | tuple[str, ...] = Field(
        default=(), description="Which experts: BLOCK:EXPERT or a list of them (blocks.3:17, 3:17, or *:17 for every block)."
    )
    profile: str = Field(
        default="", description="A file from profile_experts: its most distinctive experts.", json_schema_extra={"path": True}
    )
    top: int = Field(default=10, ge=1, description="How many experts to take from the profile.")
    mode: Literal["suppress", "force", "bias"] = Field(default="suppress", description="What to do with them.")
    policy: Literal["after_topk", "before_topk"] = Field(
        default="after_topk", description="Suppressed experts lose their weight, or are not chosen in the first place."
    )
    amount: Annotated[float, Field(allow_inf_nan=False)] | Literal["input"] = Field(
        default=1.0,
        description="mode=bias: the number added, or `input`: a graph input mote.expert_bias [blocks, experts]. after_topk: "
        "the part of its weight that an expert loses. Otherwise 1. 0 is the identity.",
    )
    weight: float | None = Field(
        default=None,
        gt=0.0,
        allow_inf_nan=False,
        description="mode=force: the weight of a forced expert; default: its score's.",
    )
    on: Literal["logits", "selection"] = Field(
        default="logits", description="mode=bias: the router's logits, or only the scores that experts are chosen by."
    )
    where: str = Field(default="all", description=WHERE)
    drop: bool = Field(
        default=False,
        description="policy=before_topk for all tokens: remove the weights of the experts, which nobody gets now.",
    )
    fold: bool = Field(default=True, description="Move an edit into a stored bias where that is exact: with where=all.")

    @field_validator("where")
    @classmethod
    def _readable(cls, clause: str) -> str:
        Where.parse(clause)
        return clause

    @model_validator(mode="after")
    def _sensible(self) -> Mote:
        named = bool(self.experts)
        if self.amount == "input":
            if self.mode != "bias" or named or self.profile:
                raise OptionError("mote: amount=input needs mode=bias and no experts", "the input has a number for each expert")
        elif named == bool(self.profile):
            raise OptionError("mote: say which experts, once", "with experts=3:17, or with profile=FILE top=10")
        elif self.mode != "bias" and not self._partial and self.amount not in (0.0, 1.0):
            raise OptionError(f"mote: an expert is chosen or not: amount cannot be {self.amount}", "use 1, or mode=bias")
        elif self._partial and not 0.0 <= float(self.amount) <= 1.0:
            raise OptionError(f"mote: amount={self.amount} is no share of a weight", "use 0 to 1")
        never = self.mode == "suppress" and self.policy == "before_topk" and Where.parse(self.where).everywhere
        if self.drop and not never:
            raise OptionError("mote: only experts that no token gets can be dropped", "use policy=before_topk where=all")
        if self.weight is not None and self.mode != "force":
            raise OptionError("mote: weight is for mode=force", "use amount, or leave it out")
        for spec in (self.experts,) if isinstance(self.experts, str) else self.experts:
            if spec and _SPEC.fullmatch(spec) is None:
                raise OptionError(f"mote: {spec!r} is no expert", "write BLOCK:EXPERT, such as blocks.3:17 or 3:17")
        return self

    @property
    def _partial(self) -> bool:
        return self.mode == "suppress" and self.policy == "after_topk"

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        routers = mixtures_by_block(graph)
        if not routers:
            raise PassError(
                f"mote: {graph.name} has no mixture of experts that is recognised", "`actgraph sites MODEL '*.moe.*'`"
            )
        result = PassResult(expected_change="tokens are routed otherwise", expected_size=UNBOUNDED)
        chosen = self._chosen(graph, routers, result)
        where = Where.parse(self.where)
        if self.amount == 0:
            result.counts["identity"] += max(len(chosen), 1)
            result.expected_change, result.expected_size = "exact", ROUNDING
            return result
        semantics = graph.views.semantics if self.drop else None
        stacks = {b: expert_stacks(semantics, routers[b][0]) for b in chosen} if semantics is not None else {}
        with context.edit(graph) as editor:
            edits = _Edits(self, graph, editor, where, result, stacks)
            for row, (block, experts) in enumerate(chosen.items()):
                mixture, found = routers[block]
                if isinstance(found, str):
                    result.declined.append(Declined(block, found))
                    continue
                if mixture.experts != found.experts and self.mode != "bias" and not self._partial:
                    reason = f"{found.experts - mixture.experts} of its experts were dropped: choose before dropping"
                    result.declined.append(Declined(block, reason))
                    continue
                rule = edits.apply(block, row, len(chosen), mixture, found, sorted(experts))
                if rule:
                    result.counts[rule] += 1
                    what = "all" if self.amount == "input" else " ".join(map(str, sorted(experts)))
                    result.details.append({"site": block, "experts": what, "rule": rule})
        result.messages += where.assumptions() if result.counts else []
        result.messages += editor.messages
        if not result.counts:
            raise PassError(f"mote changed nothing: {result.declined[0].site}: {result.declined[0].reason}")
        return result

    def _chosen(
        self, graph: Graph, routers: Mapping[str, tuple[MixtureOfExperts, Router | str]], result: PassResult
    ) -> dict[str, set[int]]:
        """The experts of each block, in the order of the blocks."""
        if self.amount == "input":
            return {block: set() for block in routers}
        pairs: list[tuple[str, int]] = []
        if self.profile:
            profile = load_profile(self.profile)
            self.check_model(profile.model, graph, self.profile)
            pairs = [(row.block, row.expert) for row in profile.ranking(self.top)]
        for spec in (self.experts,) if isinstance(self.experts, str) else self.experts:
            match = _SPEC.fullmatch(spec)
            if match is not None:
                number, name = match["number"], match["name"]
                blocks = list(routers) if match["all"] else [f"blocks.{number}" if number else name]
                pairs += [(block, int(match["expert"])) for block in blocks]
        for block, expert in pairs:
            if block not in routers:
                raise PassError(f"mote: {block} is no mixture of experts", f"they are in {_listed(list(routers))}")
            count = routers[block][0].router.out_features
            if expert >= count:
                raise PassError(f"mote: {block} has no expert {expert}", f"its experts are 0 to {count - 1}")
        return {block: {e for b, e in pairs if b == block} for block in routers if any(b == block for b, _ in pairs)}


class _Edits:
    """The edits of one run: the clause is computed once for all blocks."""

    def __init__(
        self, options: Mote, graph: Graph, editor: Editor, where: Where, result: PassResult,
        stacks: Mapping[str, list[Stack] | str],
    ) -> None:  # fmt: skip
        self.stacks = stacks
        self.options, self.graph, self.editor, self.result = options, graph, editor, result
        self.tokens = None if where.everywhere else where_mask(editor, graph, where)
        self.masks: dict[tuple[object, ...], TokenMask | str] = {}
        self.given: Value | None = None

    def apply(self, block: str, row: int, rows: int, mixture: MixtureOfExperts, router: Router, experts: list[int]) -> str:
        """Edit one block and return the rule that was used; empty when declined."""
        o = self.options
        mask = self._mask(router)
        if isinstance(mask, str):
            self.result.declined.append(Declined(block, mask))
            return ""
        if o.mode == "bias":
            return self._bias(block, row, rows, mixture, router, experts, mask)
        if o.mode == "suppress" and o.policy == "after_topk":
            reweight(self.editor, router, experts, 1.0 - float(o.amount), None, mask)
            return "reweighted"
        forced = o.mode == "force"
        fixed = {**fixed_before(self.graph, router), **dict.fromkeys(experts, forced)}
        alike = [expert for expert, into in fixed.items() if into == forced]
        reason = too_many_forced(router, alike) if forced else too_many_suppressed(router, alike)
        if reason:
            raise PassError(f"mote: {block}: {reason}", "name fewer experts" if forced else "or use policy=after_topk")
        self._say(block, router, alike, forced)
        if o.drop:
            self._drop(block, router, experts)
        score = extremes(router)[0 if forced else 1]
        if forced and o.weight is not None:  # first: the weights may be the top-k's own values, which the next edit replaces
            reweight(self.editor, router, experts, 0.0, o.weight, mask)
        return set_selection(self.editor, router, dict.fromkeys(experts, score), mask, o.fold)

    def _bias(
        self, block: str, row: int, rows: int, mixture: MixtureOfExperts, router: Router, experts: list[int],
        mask: TokenMask | None,
    ) -> str:  # fmt: skip
        o = self.options
        bias: Value | np.ndarray[Any, Any]
        if o.amount == "input":
            bias = self._row(block, row, rows, router)
        else:
            bias = np.zeros(router.experts, np.float64)
            bias[experts] = float(o.amount)
        if o.on == "selection":
            return add_to_selection(self.editor, router, bias, mask, o.fold)
        logits = self.graph.site(f"{block}.moe.router_logits").value
        return add_to_logits(self.editor, router, mixture.router, logits, bias, mask, o.fold)

    def _drop(self, block: str, router: Router, experts: list[int]) -> None:
        stacks = self.stacks[block]
        if isinstance(stacks, str):
            self.result.declined.append(Declined(block, f"its experts are suppressed and not dropped: {stacks}"))
            return
        saved = drop_experts(self.editor, self.graph, stacks, router.experts, experts)
        self.result.messages.append(f"{block}: dropped the weights of {len(experts)} experts, {saved} bytes")
        self.result.counts["dropped"] += len(experts)

    def _row(self, block: str, row: int, rows: int, router: Router) -> Value:
        """The biases of one block, ``[experts]``, out of the graph's input."""
        if self.given is None:
            if any(value.name == INPUT for value in self.graph.inputs()):
                raise PassError(f"mote: {self.graph.name} has an input {INPUT} already", "use amount=input once")
            kind = TensorType(DType.F32, (rows, router.experts))
            default = np.zeros((rows, router.experts), np.float32)
            self.given = self.editor.add_input(INPUT, kind, role=Role.USER, default=default)
        if self.given.shape != (rows, router.experts):
            raise PassError(f"mote: {block} has {router.experts} experts, and {INPUT} is {self.given.type}", "bias by number")
        row_of = self.editor.insert("slice", [self.given], {"axis": 0, "start": row, "end": row + 1}).output
        return self.editor.insert("reshape", [row_of], {"shape": (router.experts,)}, name=f"{INPUT}.{row}").output

    def _mask(self, router: Router) -> TokenMask | str | None:
        if self.tokens is None:
            return None
        key = router.selection.shape[:-1] if router.selection.shape is not None else ()
        if key not in self.masks:
            self.masks[key] = token_mask(self.editor, self.graph, self.tokens, router.selection)
        return self.masks[key]

    def _say(self, block: str, router: Router, experts: list[int], forced: bool) -> None:
        if not router.normalised and self.options.weight is None:
            self.result.messages.append(
                f"{block}: the router does not normalise: each expert keeps the weight of its score, and the total changes"
            )
        for group in [] if forced else closed_groups(router, experts):
            self.result.messages.append(f"{block}: too few experts are left in group {group}: none of it is chosen any more")


def mixtures_by_block(graph: Graph) -> dict[str, tuple[MixtureOfExperts, Router | str]]:
    """``{"blocks.3": (mixture, router or the reason why it cannot be read)}``, in the order of the blocks."""
    from actgraph.graph.recognize.router import read_router

    views = graph.views
    return {
        f"{block.prefix}blocks.{block.index}": (block.moe, read_router(views.semantics, block.moe))
        for block in views.blocks()
        if block.moe is not None
    }


def _listed(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" ... {names[-1]}" if len(names) > 4 else "")


def profile_experts(
    graph: Graph,
    target: Any,
    others: Any,
    *,
    measure: Literal["selections", "weights"] = "selections",
    per_token: bool = True,
    batch_size: int = 8,
    max_length: int | None = None,
    progress: bool = True,
) -> ExpertProfile:
    """Functional token resonance imaging: the experts that prompts of one class use more than those of the others.

    target: a corpus of prompts that trigger the behaviour. others: a corpus, or a mapping of labels to corpora, of prompts that
    do not. For every prompt the selections of each expert (``measure="weights"``: its weights) are summed over the prompt's
    tokens, padding excluded; classes are means over their prompts, and an expert's score is the target's mean minus the mean
    of the other classes' means. per_token: divide the sums by the number of tokens of the prompt, for prompts of different
    lengths. One forward per prompt; results do not depend on ``batch_size``.

    Raises InputError for a graph without mixtures of experts, for a router that cannot be read and for an empty class.
    """
    classes = dict(others) if isinstance(others, Mapping) and not _is_arrays(others) else {"others": others}
    if not classes or "target" in classes:
        raise InputError("the other classes need labels of their own", "give a corpus, or {label: corpus}")
    found = mixtures_by_block(graph)
    if not found:
        raise InputError(f"{graph.name} has no mixture of experts that is recognised", "profile a model that has experts")
    routers: dict[str, Router] = {}
    for block, (_, router) in found.items():
        if isinstance(router, str):
            raise InputError(f"the router of {block} cannot be read: {router}", "profile a model with a top-k router")
        routers[block] = router
    usage = {
        label: collect_routing(graph, routers, corpus, batch_size=batch_size, max_length=max_length, progress=progress)
        for label, corpus in {"target": target, **classes}.items()
    }
    counts = tuple(router.experts for router in routers.values())
    return ExpertProfile(tuple(routers), counts, usage, measure, per_token, model_fingerprint(graph))


def _is_arrays(source: Mapping[str, Any]) -> bool:
    """Whether a mapping is a corpus of named arrays."""
    return all(isinstance(value, np.ndarray) for value in source.values())
