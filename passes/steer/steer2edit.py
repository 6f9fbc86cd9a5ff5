"""Steer2Edit: a steering direction turned into edits of the attention heads and neurons that write it.

Source: Steer2Edit: From Activation Steering to Component-Level Editing, 2026. For each block, the difference ``v`` of the mean
outputs of two sets of responses is what to steer towards. Heads and neurons whose mean output lies along it are strengthened,
by ``lambda`` of an elastic-net problem, so that few components are edited. All edits of one matrix write the same unit vector,
so together they are one rank-1 update (see ``actgraph.passes.steer.weight_edits``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from actgraph.calibrate.document_rows import pooled_request
from actgraph.calibrate.engine import collect
from actgraph.calibrate.statistics import Statistic
from actgraph.errors import InputError, OptionError, PassError
from actgraph.formats.atomic import atomic_file
from actgraph.formats.vectors import model_fingerprint
from actgraph.graph import Graph
from actgraph.graph.graph import Array
from actgraph.passes.linears import Places, check_selectors, input_value
from actgraph.passes.places import Selector
from actgraph.passes.steer.of_model import OfModel
from actgraph.passes.steer.rank_one import MODE, SCALE, TOKENS, Scale, finished, named
from actgraph.passes.steer.weight_edits import Mode, Place, RankOneEdit, RankOneEdits, apply_edits, read_safetensors
from actgraph.pipeline.base import UNBOUNDED, Declined, PassContext, PassResult

FORMAT = "actgraph.steer2edit/1"
_HINT = "make it with actgraph.passes.steer.steer2edit.steer2edit_directions on this model"


# --- calibration ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """One matrix: ``direction [out]``, the difference of its mean outputs; ``mean_input [in]``, the middle of its inputs'."""

    direction: Array
    mean_input: Array


@dataclass(frozen=True)
class Steer2EditDirections:
    """What calibration found, by the site that is the matrix's input (``blocks.0.attn.head_out``, ``blocks.0.mlp.hidden``).

    model: fingerprint of the model. notes: how many documents there were.
    """

    matrices: Mapping[str, Measured]
    model: str = ""
    notes: Mapping[str, str] = field(default_factory=dict)

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file, ``{site}:direction`` and ``{site}:mean_input`` float32, with a manifest."""
        from safetensors.numpy import save

        tensors: dict[str, Array] = {}
        for name, measured in self.matrices.items():
            tensors[f"{name}:direction"] = np.ascontiguousarray(measured.direction, np.float32)
            tensors[f"{name}:mean_input"] = np.ascontiguousarray(measured.mean_input, np.float32)
        manifest = {"format": FORMAT, "model": self.model, "notes": dict(self.notes)}
        with atomic_file(Path(path)) as stream:
            stream.write(save(tensors, metadata={"actgraph": json.dumps(manifest, sort_keys=True)}))
        return Path(path)


def load_directions(path: str | Path) -> Steer2EditDirections:
    """Read what ``Steer2EditDirections.save`` wrote. Raises InputError for a missing, corrupt or unsuitable file."""
    tensors, manifest = read_safetensors(path, FORMAT, "directions of steer2edit")
    names = sorted({key.rpartition(":")[0] for key in tensors})
    if not names or set(tensors) != {f"{name}:{part}" for name in names for part in ("direction", "mean_input")}:
        raise InputError(f"{path} holds no directions of steer2edit", _HINT)
    if any(tensor.ndim != 1 for tensor in tensors.values()):
        raise InputError(f"{path}: the tensors of directions must be 1-D", _HINT)
    measured = {name: Measured(tensors[f"{name}:direction"], tensors[f"{name}:mean_input"]) for name in names}
    return Steer2EditDirections(measured, str(manifest.get("model", "")), manifest.get("notes", {}))


def steer2edit_directions(
    graph: Graph,
    positive: Any,
    negative: Any,
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    cache: bool | str | Path = True,
    progress: bool = True,
) -> Steer2EditDirections:
    """Measure both sets of responses at the output projections of attention and feed-forward of every block.

    positive, negative: corpora of documents with a prompt and a response, not necessarily as many. Each document counts by its
    mean over the positions that predict its response. max_length: cut documents on the right. Raises InputError for documents
    without responses, PassError for a model without such projections.
    """
    found, _ = components(graph)
    if not found:
        raise PassError(f"steer2edit: {graph.name} has no output projections of attention or feed-forward")
    values = {v.name for c in found for v in (input_value(c.place.linear), c.place.linear.output)}
    requests = {name: pooled_request(f"%{name}", Statistic.MEAN, "response") for name in sorted(values)}
    options: dict[str, Any] = {"batch_size": batch_size, "max_length": max_length, "cache": cache, "progress": progress}
    sets = [collect(graph, requests.values(), source, **options) for source in (positive, negative)]
    above, below = ({name: found.array(request) for name, request in requests.items()} for found in sets)
    measured = {}
    for c in found:
        x, y = input_value(c.place.linear).name, c.place.linear.output.name
        measured[c.place.name] = Measured(
            (above[y] - below[y]).astype(np.float32), ((above[x] + below[x]) / 2).astype(np.float32)
        )
    counts = {"positive": str(sets[0].documents), "negative": str(sets[1].documents)}
    return Steer2EditDirections(measured, model_fingerprint(graph), counts)


# --- components -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Components:
    """A matrix whose input is made of components: ``count`` heads of equal width, or of neurons (width 1)."""

    place: Place
    family: Literal["att", "mlp"]
    count: int


def components(graph: Graph) -> tuple[list[Components], list[Declined]]:
    """The output projections of attention and feed-forward of every block, and what has none that can be edited."""
    found: list[Components] = []
    declined: list[Declined] = []
    for block in graph.views.blocks():
        stem = f"{block.prefix}blocks.{block.index}"
        attention, feed_forward = block.attention, block.feed_forward
        projection = attention.out_projection if attention is not None else None
        if attention is not None and projection is not None and projection.in_features % attention.heads == 0:
            found.append(Components(Place(f"{stem}.attn.head_out", projection), "att", attention.heads))
        elif attention is not None:
            declined.append(Declined(f"{stem}.attn", "its heads are not side by side before one output projection"))
        if block.moe is not None:
            declined.append(Declined(f"{stem}.mlp", f"a mixture of {block.moe.experts} experts has no single down projection"))
        elif feed_forward is not None:
            found.append(Components(Place(f"{stem}.mlp.hidden", feed_forward.down), "mlp", feed_forward.down.in_features))
        if attention is None and feed_forward is None and block.moe is None:
            declined.append(Declined(stem, "it has neither attention nor feed-forward"))
    return found, declined


@dataclass(frozen=True)
class ComponentEdits:
    """The edits of one matrix: ``scores [n]`` in -1..1, ``strengths [n]`` (lambda, 0: not edited), and the update they make."""

    scores: Array
    strengths: Array
    update: RankOneEdit

    @property
    def edited(self) -> int:
        """How many components are edited."""
        return int(np.count_nonzero(self.strengths))


def strengths(scores: Array, rho: float, a: float) -> Array:
    """``lambda``, the maximiser of ``sum(lambda g - rho (a |lambda| + (1 - a) / 2 lambda^2))`` for ``scores`` g.

    ``sign(g) max(|g| - rho a, 0) / (rho (1 - a))``; all 0 for ``rho <= 0``, which leaves the family alone. ``a`` is below 1.
    """
    if not 0 <= a < 1:
        raise OptionError(f"steer2edit: a is {a}", "it is at least 0 and below 1")
    if rho <= 0:
        return np.zeros_like(scores)
    return np.asarray(np.sign(scores) * np.maximum(np.abs(scores) - rho * a, 0.0) / (rho * (1 - a)))


def edit_heads(weight: Array, measured: Measured, heads: int, rho: float, a: float) -> ComponentEdits:
    """The edits of the heads of ``weight [d, heads * width]``: ``W_j += lambda_j v k_j^T`` with ``k_j = W_j^T v / |W_j^T v|``.

    A head's score is the cosine of its mean output ``W_j x_j`` and v.
    """
    wide, v = weight.astype(np.float64), _unit(measured.direction)
    parts = wide.reshape(len(v), heads, -1)
    inputs = measured.mean_input.astype(np.float64).reshape(heads, -1)
    outputs = np.einsum("dhw,hw->hd", parts, inputs)
    scores = _ratio(outputs @ v, np.linalg.norm(outputs, axis=1))
    back = np.einsum("dhw,d->hw", parts, v)
    lengths = np.linalg.norm(back, axis=1)
    found = np.where(lengths > 0, strengths(scores, rho, a), 0.0)
    read = found[:, None] * _ratio(back, lengths[:, None])
    return ComponentEdits(scores, found, RankOneEdit(v, read.reshape(-1)))


def edit_neurons(weight: Array, measured: Measured, rho: float, a: float) -> ComponentEdits:
    """The edits of the columns of ``weight [d, neurons]``: ``w_i += lambda_i sign(w_i . v) v``.

    A neuron's score is the cosine of its mean output ``w_i x_i`` and v.
    """
    wide, v = weight.astype(np.float64), _unit(measured.direction)
    along = v @ wide
    scores = np.sign(measured.mean_input.astype(np.float64)) * _ratio(along, np.linalg.norm(wide, axis=0))
    found = np.where(along != 0, strengths(scores, rho, a), 0.0)
    return ComponentEdits(scores, found, RankOneEdit(v, found * np.sign(along)))


def _unit(direction: Array) -> Array:
    wide = direction.astype(np.float64)
    return np.asarray(wide / np.linalg.norm(wide))


def _ratio(numbers: Array, by: Array) -> Array:
    """``numbers / by``, and 0 where ``by`` is."""
    return np.asarray(np.divide(numbers, by, out=np.zeros(np.broadcast_shapes(numbers.shape, by.shape)), where=by > 0))


def compute_edits(
    graph: Graph, directions: Steer2EditDirections, *, rho_att: float, rho_mlp: float, a: float
) -> dict[str, ComponentEdits]:
    """The edits of every matrix that was measured, by its site; a matrix that both sets drive alike is left out.

    Raises PassError where the sizes are not those of the graph.
    """
    found = {}
    for c in components(graph)[0]:
        measured = directions.matrices.get(c.place.name)
        if measured is None or not np.any(measured.direction):
            continue
        linear = c.place.linear
        if (len(measured.direction), len(measured.mean_input)) != (linear.out_features, linear.in_features):
            raise PassError(
                f"steer2edit: {c.place.name} was measured as [{len(measured.direction)}, {len(measured.mean_input)}], and its "
                f"weight is [{linear.out_features}, {linear.in_features}]",
                _HINT,
            )
        weight = linear.read_weight()
        if c.family == "att":
            found[c.place.name] = edit_heads(weight, measured, c.count, rho_att, a)
        else:
            found[c.place.name] = edit_neurons(weight, measured, rho_mlp, a)
    return found


def compact(directions: Steer2EditDirections, edits: Mapping[str, ComponentEdits]) -> RankOneEdits:
    """The edits as two vectors a matrix, to be saved and applied with the pass ``rank_one``."""
    chosen = {name: edit.update for name, edit in edits.items() if edit.edited}
    return RankOneEdits(chosen, directions.model, "steer2edit", directions.notes)


# --- the pass ---------------------------------------------------------------------------------------------------------


class Steer2Edit(OfModel):
    """Push what attention heads and neurons write on average along a direction: one rank-1 update of each output projection.

    ``rho`` and ``a`` say how strongly and how sparsely: a component whose score (the cosine of its mean output and the
    direction) is at most ``rho * a`` in size is left alone, and so is everything where ``rho * a >= 1``. The edit is absolute:
    it does not grow with the weight. Experts of mixtures are declined.
    """

    name: ClassVar[str] = "steer2edit"
    family: ClassVar[str] = "steer"
    repeatable: ClassVar[bool] = True
    off: ClassVar[Mapping[str, Any]] = {"scale": 0.0}
    oracle: ClassVar[Mapping[str, Any]] = {"mode": "side_branch"}

    directions: str = Field(
        description="A safetensors file of `steer2edit_directions`: what was measured of two sets of responses.",
        json_schema_extra={"path": True},
    )
    rho_att: float = Field(default=0.18, description="Penalty of heads; the larger, the weaker. At most 0: none is edited.")
    rho_mlp: float = Field(default=0.55, description="Penalty of neurons; the larger, the weaker. At most 0: none is edited.")
    a: float = Field(default=0.8, ge=0.0, lt=1.0, description="Share of the penalty that makes edits sparse (L1).")
    mode: Mode = Field(default="merge", description=MODE)
    scale: Scale = Field(default=1.0, description=SCALE)
    where: str = Field(default="all", description=TOKENS)
    site: Selector = Field(
        default=(),
        description="Which projections, by blocks.{i}.attn.head_out and blocks.{i}.mlp.hidden; default: all measured.",
    )
    ignore: Selector = Field(default=(), description="Projections to leave as they are.")

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        directions = load_directions(self.directions)
        self.check_model(directions.model, graph, self.directions)
        result = PassResult(expected_change="components that write a direction are edited", expected_size=UNBOUNDED)
        chosen = self._chosen(graph, directions, result)
        found = compute_edits(graph, directions, rho_att=self.rho_att, rho_mlp=self.rho_mlp, a=self.a)
        edits = [(c.place, found[c.place.name].update) for c in chosen if found[c.place.name].edited]
        if not edits:
            best = max((float(np.abs(found[c.place.name].scores).max(initial=0.0)) for c in chosen), default=0.0)
            raise PassError(
                f"steer2edit: no component's score exceeds rho * a (the largest is {best:.3g})", "use a smaller rho or a"
            )
        with context.edit(graph) as editor:
            options: dict[str, Any] = {"mode": self.mode, "where": self.where, "scale": self.scale}
            rows = apply_edits(graph, editor, edits, result, by=self.name, **options)
        families = {c.place.name: c for c in chosen}
        for row in rows:
            edit, c = found[row["site"]], families[row["site"]]
            result.counts["heads edited" if c.family == "att" else "neurons edited"] += edit.edited
            largest = float(np.abs(edit.strengths).max())
            result.details.append({**row, "edited": edit.edited, "of": c.count, "largest lambda": largest})
        result.messages += editor.messages
        return finished(self.name, result)

    def _chosen(self, graph: Graph, directions: Steer2EditDirections, result: PassResult) -> list[Components]:
        """The selected projections that were measured and are driven apart; the others are declined."""
        found, refused = components(graph)
        if not found:
            why = f"{refused[0].site}: {refused[0].reason}" if refused else f"{graph.name} has no blocks"
            raise PassError(f"steer2edit has nothing to edit: {why}")
        wanted, unwanted = Places.of(graph, self.site), Places.ignored(graph, self.ignore)
        check_selectors(graph, self.site, lambda places: any(named(c.place, places) for c in found), "output projection")
        if not self.site:
            result.declined += refused
        chosen = []
        for c in found:
            if (self.site and not named(c.place, wanted)) or named(c.place, unwanted):
                continue
            measured = directions.matrices.get(c.place.name)
            if measured is None:
                result.declined.append(Declined(c.place.name, f"it was not measured in {self.directions}"))
            elif not np.any(measured.direction):
                result.declined.append(Declined(c.place.name, "positive and negative responses have the same mean there"))
            else:
                chosen.append(c)
        if not chosen:
            where = f"{result.declined[0].site}: {result.declined[0].reason}" if result.declined else "nothing is selected"
            raise PassError(f"steer2edit has nothing to edit: {where}", _HINT)
        return chosen
