"""Do two behaviours live in subspaces of their own? A report over activations, or over weights.

Source: Safety Subspaces are Not Distinct: A Fine-Tuning Case Study, 2025, whose answer is no: activations of useful and harmful
prompts, and updates of alignment and of fine-tuning, overlap far more than random subspaces do. So do not expect that an edit
of a subspace touches one behaviour only; this report says how far apart two are in a model at hand.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from actgraph.calibrate.corpora import Corpus
from actgraph.calibrate.engine import collect
from actgraph.calibrate.statistics import Request, Tokens
from actgraph.errors import InputError, SiteError
from actgraph.graph import Graph
from actgraph.graph.graph import Array
from actgraph.passes.places import Selector
from actgraph.passes.steer.parameters import Stored, same_topology, stored_parameters
from actgraph.passes.steer.subspaces import Overlap, energies_of, energies_of_gram, overlaps

#: The shares of energy of the paper's figures.
ENERGIES = (0.01, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
#: The depth, as a share of the blocks, at which the paper looks at activations.
DEPTH = (0.65, 0.9)


@dataclass(frozen=True)
class SubspaceReport:
    """Overlaps of two subspaces, place by place and share of energy by share. ``str(report)`` is the table.

    a, b: what the two are. documents: how many of each were seen (0 for weights).
    unchanged: places without a subspace, because one of the two does not change there.
    """

    a: str
    b: str
    rows: tuple[Overlap, ...]
    documents: tuple[int, int] = (0, 0)
    unchanged: tuple[str, ...] = ()

    def at(self, place: str, energy: float) -> Overlap:
        """One row. Raises InputError when there is none."""
        for row in self.rows:
            if row.place == place and np.isclose(row.energy, energy):
                return row
        raise InputError(f"the report has no row for {place} at {energy}", "see report.rows")

    def means(self) -> list[tuple[float, float, float]]:
        """``(energy, overlap, random)`` for each share of energy: means over places."""
        shares = list(dict.fromkeys(row.energy for row in self.rows))
        found = []
        for share in shares:
            rows = [row for row in self.rows if row.energy == share]
            found.append((share, float(np.mean([r.overlap for r in rows])), float(np.mean([r.random for r in rows]))))
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def __str__(self) -> str:
        seen = f", {self.documents[0]} and {self.documents[1]} documents" if any(self.documents) else ""
        lines = [f"overlap of {self.a} and {self.b}{seen} (1: one holds the other; random: what chance gives)"]
        width = max([len("place"), *(len(row.place) for row in self.rows)])
        lines.append(f"{'place':{width}}  energy  k_a  k_b   of  overlap  random")
        for row in self.rows:
            numbers = f"{row.energy:6.2f} {row.k_a:4d} {row.k_b:4d} {row.size:4d}  {row.overlap:7.3f} {row.random:7.3f}"
            lines.append(f"{row.place:{width}}  {numbers}")
        for share, overlap, random in self.means():
            lines.append(f"{'mean':{width}}  {share:6.2f} {'':14}  {overlap:7.3f} {random:7.3f}")
        if self.unchanged:
            lines.append(f"unchanged: {', '.join(self.unchanged[:6])}{' ...' if len(self.unchanged) > 6 else ''}")
        return "\n".join(lines)


# --- activations --------------------------------------------------------------------------------------------------------


def activation_overlap(
    graph: Graph, useful: Any, harmful: Any, *, site: Selector = (), energies: Sequence[float] = ENERGIES,
    names: tuple[str, str] = ("useful", "harmful"), batch_size: int = 8, max_length: int | None = None, progress: bool = True,
) -> SubspaceReport:  # fmt: skip
    """Overlap of the subspaces of two corpora's last-token activations, uncentred, at each site.

    useful, harmful: corpora (anything that ``Corpus.of`` takes). site: default, the residual stream behind the blocks at 65 to
    90 % of the depth. Gram matrices stream, so corpora may be of any size. Raises SiteError for a site without a fixed width.
    """
    sites = graph.sites(site or _deep(graph))
    for s in sites:
        if not s.type.shape or not isinstance(s.type.shape[-1], int):
            raise SiteError(f"site {s.name} has no fixed width: {s.type}", "choose one such as blocks.1.resid_post")
    requests = [Request(s.name, "gram", tokens=Tokens.LAST) for s in sites]
    options: dict[str, Any] = {"batch_size": batch_size, "max_length": max_length, "progress": progress}
    found = [collect(graph, requests, Corpus.of(source), **options) for source in (useful, harmful)]
    rows: list[Overlap] = []
    for request in requests:
        a, b = (energies_of_gram(statistics.array(request)) for statistics in found)
        rows += overlaps(request.site, a, b, energies)
    return SubspaceReport(*names, tuple(rows), (found[0].documents, found[1].documents))


def _deep(graph: Graph) -> list[str]:
    blocks = [block for block in graph.views.blocks() if not block.prefix]
    low, high = DEPTH
    chosen = [b.index for b in blocks if low <= (b.index + 1) / len(blocks) <= high]
    if not chosen:
        raise SiteError(f"{graph.name} has no block at 65 to 90 % of its depth", "say where with site=")
    return [f"blocks.{index}.resid_post" for index in chosen]


# --- weights --------------------------------------------------------------------------------------------------------------


def weight_overlap(
    base: Graph, a: Graph, b: Graph, *, per: Literal["parameter", "block"] = "parameter", energies: Sequence[float] = ENERGIES,
    names: tuple[str, str] = ("a", "b"),
) -> SubspaceReport:  # fmt: skip
    """Overlap of two updates of one model, ``a - base`` and ``b - base``, matrix by matrix, in the space of outputs.

    For the paper's question take the aligned model as ``base``, and two fine-tuned ones. per: ``parameter``, or ``block``: the
    matrices of a block that have inputs of one width, stacked. Raises InputError for models of other shapes.
    """
    same_topology(base, a, b)
    tables = [{p.name: p for p in stored_parameters(graph)} for graph in (base, a, b)]
    rows: list[Overlap] = []
    unchanged: list[str] = []
    for place, members in _grouped(list(tables[0].values()), per):
        left, right = (_update(tables[0], table, members) for table in tables[1:])
        if not left.any() or not right.any():
            unchanged.append(place)
            continue
        rows += overlaps(place, energies_of(left), energies_of(right), energies)
    return SubspaceReport(*names, tuple(rows), unchanged=tuple(unchanged))


def _update(before: dict[str, Stored], after: dict[str, Stored], members: list[tuple[str, int]]) -> Array:
    return np.concatenate([after[name].parts()[i] - before[name].parts()[i] for name, i in members])


def _grouped(parameters: list[Stored], per: str) -> Iterator[tuple[str, list[tuple[str, int]]]]:
    """``(place, [(parameter, part)])``: each matrix by itself, or those of a block with inputs of one width together."""
    if per not in ("parameter", "block"):
        raise InputError(f"overlaps are not per {per}", "use parameter or block")
    groups: dict[str, list[tuple[str, int]]] = {}
    for parameter in parameters:
        for i, (name, part) in enumerate(zip(parameter.part_names(), parameter.parts(), strict=True)):
            if part.ndim == 2:
                together = per == "block" and parameter.block
                place = f"{parameter.block} ({part.shape[1]} inputs)" if together else name
                groups.setdefault(place, []).append((parameter.name, i))
    yield from groups.items()
