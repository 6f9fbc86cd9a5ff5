"""Rank-1 edits of weights from a file.

Source: Steer2Edit: From Activation Steering to Component-Level Editing, 2026, whose edits are of this form.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from actgraph.errors import PassError
from actgraph.graph import Graph
from actgraph.graph.sites import SiteKind
from actgraph.passes.linears import Places, input_value
from actgraph.passes.places import Selector
from actgraph.passes.steer.of_model import OfModel
from actgraph.passes.steer.weight_edits import Mode, Place, apply_edits, load_edits
from actgraph.pipeline.base import ROUNDING, UNBOUNDED, PassContext, PassResult

#: A finite factor, or that the host gives one with each call.
Scale = Annotated[float, Field(allow_inf_nan=False)] | Literal["input"]
MODE = (
    "merge: add the update to the stored weight, at no cost. side_branch: leave the weight as it is and add (x . k) u beside "
    "it, which survives quantization and can be off."
)
TOKENS = "Which tokens, with mode=side_branch: all, prompt, generated, a window of positions (3:) ..."
SCALE = "Factor of the update; 0 is the identity. side_branch also takes `input`: a run-time input, off where nobody gives it."


class RankOne(OfModel):
    """Add rank-1 updates ``u k^T`` to the weights of linears, as a file lists them."""

    name: ClassVar[str] = "rank_one"
    family: ClassVar[str] = "steer"
    repeatable: ClassVar[bool] = True
    off: ClassVar[Mapping[str, Any]] = {"scale": 0.0}
    oracle: ClassVar[Mapping[str, Any]] = {"mode": "side_branch"}

    edits: str = Field(
        description="A safetensors file with two vectors for each edit, SITE:write [out] and SITE:read [in].",
        json_schema_extra={"path": True},
    )
    mode: Mode = Field(default="merge", description=MODE)
    scale: Scale = Field(default=1.0, description=SCALE)
    where: str = Field(default="all", description=TOKENS)
    site: Selector = Field(default=(), description="Which of the file's linears, by input or output; default: all.")
    ignore: Selector = Field(default=(), description="Linears to leave as they are.")

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        loaded = load_edits(self.edits)
        self.check_model(loaded.model, graph, self.edits)
        wanted, unwanted = Places.of(graph, self.site), Places.ignored(graph, self.ignore)
        places = [(place_at(graph, name), edit) for name, edit in loaded.edits.items()]
        chosen = [
            (place, edit)
            for place, edit in places
            if (not self.site or named(place, wanted)) and not named(place, unwanted)
        ]  # fmt: skip
        if not chosen:
            raise PassError(f"rank_one: {self.edits} has no edit at what is selected", f"it has {', '.join(loaded.edits)}")
        result = PassResult(expected_change="weights are edited", expected_size=UNBOUNDED)
        with context.edit(graph) as editor:
            options: dict[str, Any] = {"mode": self.mode, "where": self.where, "scale": self.scale}
            result.details += apply_edits(graph, editor, chosen, result, by=self.name, **options)
        result.messages += editor.messages
        return finished(self.name, result)


def named(place: Place, places: Places) -> bool:
    """Whether a selector names the linear, by its output, its input or the edge between."""
    return places.covers(place.linear) or places.covers_input(place.linear)


def finished(name: str, result: PassResult) -> PassResult:
    """The result with the size of its change. Raises PassError where nothing was done."""
    if set(result.counts) == {"identity"}:
        result.expected_change, result.expected_size = "exact", ROUNDING
    if not result.counts:
        raise PassError(f"{name} changed nothing: {result.declined[0].site}: {result.declined[0].reason}")
    return result


def place_at(graph: Graph, name: str) -> Place:
    """The one linear whose output, or else whose input, is the site. Raises PassError when there is none or several."""
    places = Places.of(graph, name)
    linears = graph.views.linears()
    found = [linear for linear in linears if places.covers(linear)]
    if not found:
        found = [linear for linear in linears if places.covers_input(linear)]
    site = graph.site(name)
    if not found and site.kind is SiteKind.VALUE:  # another pass edits what only this linear reads
        s = graph.views.semantics
        found = [linear for linear in linears if s.edited(input_value(linear)) == s.edited(site.value)]
    if len(found) != 1:
        what = "is no linear's input or output" if not found else f"is the input of {len(found)} linears"
        raise PassError(f"{name} {what}", "name the output of one linear, or an input that it alone reads")
    return Place(name, found[0])
