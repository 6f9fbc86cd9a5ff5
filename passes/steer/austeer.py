"""AUSteer: scaling the few channels that move the same way in most pairs of answers.

Source: Fine-Grained Activation Steering: Steering Less, Achieving More (2026). A unit is one channel at one site of a family
(``blocks.*.attn.head_out``, ``blocks.*.mlp.out`` or ``blocks.*.resid_post``). Its activation momentum is the share of pairs of
a preferred and a dispreferred answer in which it changes in the direction that most do, with that sign. The units of all blocks
are ranked together; the first k are scaled, ``h' = h + scale * momentum * h``, at every token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator

from actgraph.calibrate.document_rows import collect_rows
from actgraph.errors import InputError, PassError
from actgraph.formats.artifacts import Artifact, load_artifact
from actgraph.formats.vectors import model_fingerprint
from actgraph.graph import Graph, Site
from actgraph.passes.places import Selector
from actgraph.passes.steer.edit import Edit, FoldingEditPass, stored_for
from actgraph.passes.steer.plane_edit import finite
from actgraph.passes.steer.runtime_inputs import INPUT
from actgraph.pipeline.base import PassContext, PassResult

if TYPE_CHECKING:
    from actgraph.graph import Value

Array = np.ndarray[Any, Any]
KIND = "activation_momentum"
_MADE_BY = "make one with actgraph.passes.steer.austeer.extract_momentum(graph, positive, negative).save(path)"


@dataclass(frozen=True)
class Unit:
    """One channel of one site, and the share of pairs that agree on its direction, with its sign."""

    site: str
    channel: int
    momentum: float


@dataclass(frozen=True)
class UnitMomentum:
    """The momentum of every channel, ``[width]`` float32 for each site, in execution order; of how many pairs; the model."""

    momentum: Mapping[str, Array]
    pairs: int = 0
    model: str = ""

    def units(self, k: int) -> list[Unit]:
        """The first k units, see ``ranked_units``."""
        return ranked_units(self.momentum, k)

    def table(self, k: int = 10) -> list[dict[str, Any]]:
        """One row for each of the first k units."""
        return [asdict(unit) for unit in self.units(k)]

    def save(self, path: str | Path) -> Path:
        """Write the file for the pass ``austeer``."""
        return Artifact(KIND, self.momentum, {"pairs": self.pairs}, self.model).save(path)


def activation_momentum(positive: Mapping[str, Array], negative: Mapping[str, Array]) -> dict[str, Array]:
    """The momentum of every channel, ``[width]`` float32 in [-1, 1] for each site.

    positive, negative: ``[pairs, width]`` for each site, row n of both being of pair n. With ``p`` pairs in which a channel is
    larger in the positive and ``q`` in which it is smaller it is ``p / pairs`` where ``p >= q``, else ``-q / pairs``: equal
    ones count as pairs and vote for neither, and a tie is positive. Raises InputError for arrays that do not fit.
    """
    if set(positive) != set(negative) or not positive:
        raise InputError("the positive and negative samples are not of the same sites", "collect both at the same sites")
    result = {}
    for site, above in positive.items():
        below = negative[site]
        if np.ndim(above) != 2 or not len(above) or np.shape(above) != np.shape(below):
            shapes = f"{list(np.shape(above))} and {list(np.shape(below))}"
            raise InputError(f"the samples of {site} are {shapes}", "give [pairs, width] of both, row n of both being pair n")
        if not (np.isfinite(above).all() and np.isfinite(below).all()):
            raise InputError(f"the samples of {site} hold NaN or infinite values", "find out where they come from")
        larger, smaller = (np.greater(above, below).sum(axis=0), np.less(above, below).sum(axis=0))
        votes = np.where(larger >= smaller, larger, -smaller)
        result[site] = (votes / len(above)).astype(np.float32)
    return result


def ranked_units(momentum: Mapping[str, Array], k: int) -> list[Unit]:
    """The k units with the largest absolute momentum; of equal ones the first, by site (in their order) and then by channel.

    momentum: ``[width]`` for each site, the sites in execution order. Ties are frequent (momentum is a multiple of one over the
    number of pairs), so that the order is part of the method. Raises InputError where fewer units have a momentum.
    """
    sites = list(momentum)
    values = np.concatenate([np.asarray(momentum[site], np.float32) for site in sites])
    moving = int(np.count_nonzero(values))
    if not 0 < k <= moving:
        raise InputError(f"{k} units are asked for, and {moving} of {len(values)} have a momentum", f"say k from 1 to {moving}")
    places = [(site, channel) for site in sites for channel in range(len(momentum[site]))]
    order = np.argsort(-np.abs(values), kind="stable")[:k]
    return [Unit(*places[int(place)], float(values[place])) for place in order]


def pair_texts(pairs: Sequence[tuple[str, str, str]], *, refusal: str | None = None) -> tuple[list[str], list[str]]:
    """The texts of pairs ``(prompt, preferred answer, dispreferred answer)``: prompt and answer, joined as they are.

    refusal: a sentence; where the preferred answer holds it, that text is the answer without the prompt (the authors' code does
    so for "I'm sorry, but I can't assist").
    """
    positive = [good if refusal is not None and refusal in good else prompt + good for prompt, good, _ in pairs]
    return positive, [prompt + bad for prompt, _, bad in pairs]


def extract_momentum(
    graph: Graph,
    positive: Any,
    negative: Any,
    *,
    site: str | Sequence[str] = "blocks.*.attn.head_out",
    batch_size: int = 8,
    max_length: int | None = 512,
    progress: bool = True,
) -> UnitMomentum:
    """The activation momentum at the last token of each text; ``.save("units.safetensors")`` makes the file for ``austeer``.

    positive, negative: corpora of one size, document n of both being pair n (see ``pair_texts``). site: one family, at all
    blocks. max_length: texts are cut to that many tokens. Raises InputError and SiteError.
    """
    names = [found.name for found in graph.sites(site)]
    rows = [
        collect_rows(graph, names, corpus, batch_size=batch_size, max_length=max_length, progress=progress)
        for corpus in (positive, negative)
    ]
    return UnitMomentum(activation_momentum(*rows), len(rows[0][names[0]]), model_fingerprint(graph))


class AUSteer(FoldingEditPass):
    """Scale the ``k`` channels with the largest activation momentum, at every token or those that ``where`` names.

    A channel with momentum ``m`` becomes ``1 + scale * m`` times what it was, so that the shift follows the activation. The
    channels of all sites are ranked together, of equal ones the first in the order of execution; a site without any of them
    gets no node. ``scale=input`` makes the scale an optional input of each row (``austeer.scale``, 0 where nobody gives it: the
    unsteered model, bit for bit).

    The factors fold into the weight that writes the site or into all that read it (``head_out``, ``mlp.out``), and cost nothing
    (see ``fold_edits``; ``unfold`` takes them out). A residual stream has other readers and keeps a node, and so do factors
    for some tokens only and a scale that is given at run time.
    """

    name: ClassVar[str] = "austeer"
    off: ClassVar[Mapping[str, Any]] = {"scale": 0.0}

    site: Selector = Field(default=(), description="Which sites' channels are ranked; default: those of the file.")
    units: str = Field(
        description="A file with the momentum of channels, written by extract_momentum(...).save.",
        json_schema_extra={"path": True},
    )
    k: int = Field(default=10, ge=1, description="How many channels are scaled, of all sites together.")
    scale: float | Literal["input"] = Field(default=5.0, description="Factor on the momentum, or `input`.")

    _finite = field_validator("scale")(finite)

    def reads_rows(self, edit: Edit) -> bool:
        return self.scale == INPUT

    def targets(self, graph: Graph) -> Selector:
        return tuple(load_artifact(self.units, KIND, _MADE_BY).arrays)

    def hook(self, graph: Graph, site: Site, inputs: Mapping[str, Array]) -> Callable[[Array], Array] | None:
        if isinstance(self.scale, str):
            return None
        found = load_artifact(self.units, KIND, _MADE_BY)
        sites = self.select(graph)
        factors = np.ones(len(_of(found, site)))
        for unit in ranked_units({each.name: _of(found, each) for each in sites}, self.k):
            if unit.site == site.name:
                factors[unit.channel] += float(self.scale) * unit.momentum
        return self.at_tokens(lambda rows: rows * factors, inputs)

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        found = load_artifact(self.units, KIND, _MADE_BY)
        self.check_model(found.model, graph, self.units)
        sites = self.select(graph)  # in the order of execution, which is that of ties; files have them by name
        units = ranked_units({site.name: _of(found, site) for site in sites}, self.k)
        touched = [site.name for site in sites if any(unit.site == site.name for unit in units)]
        result = self.model_copy(update={"site": tuple(touched)}).run_at(graph, context, units=units, found=found)
        result.messages.insert(0, f"{len(units)} channels at {len(touched)} of {len(sites)} sites")
        return result

    def apply(self, edit: Edit, site: Site, width: int) -> str:
        units: list[Unit] = [unit for unit in edit.shared["units"] if unit.site == site.name]
        own = len(_of(edit.shared["found"], site))
        if own != width:
            raise PassError(
                f"austeer: {self.units} has {own} channels for {site.name}: {site.type}", "use a file of this model"
            )
        if self.scale == 0:
            return "identity"
        factors = np.ones(width, np.float32)
        for unit in units:
            factors[unit.channel] += (1 if isinstance(self.scale, str) else self.scale) * unit.momentum
        mask = edit.mask()
        if self.scale == INPUT:  # a fraction of a mask scales what the factor adds
            mask = edit.times(mask, edit.of_rows(site, "austeer.scale"))
        operands: list[Value | Array | None] = [factors] if mask is None else [factors, mask]
        rule = edit.place(site, "actgraph.channel_scale", operands, self.attributes, fold=self.fold)
        for unit in units:
            edit.result.details.append({"site": site.name, "rule": rule, "channel": unit.channel, "momentum": unit.momentum})
        return rule


def _of(found: Artifact, site: Site) -> Array:
    """The momentum of a site, ``[width]``; that of another site says nothing about it."""
    return stored_for(found, site, 1, by="austeer", what="momentum", any_site=False)
