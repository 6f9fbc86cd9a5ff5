"""The plane that Angular and Selective Steering turn activations in, and the blocks that Selective Steering turns them in.

Sources: Angular Steering (2025); Selective Steering: Norm-Preserving Control Through Discriminative Layer Selection (2026).
Each site has a direction from the negative to the positive samples. The one that is most like all others is the first axis of
the plane, for all sites; the second one is the first principal component of the directions, made orthogonal to it. A site
discriminates where the means of the two sets lie on different sides of zero along the first axis.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from actgraph.calibrate.document_rows import collect_rows
from actgraph.errors import InputError
from actgraph.formats.artifacts import Artifact, load_artifact
from actgraph.formats.vectors import model_fingerprint

if TYPE_CHECKING:
    from actgraph.graph import Graph

Array = np.ndarray[Any, Any]
#: Activations by site, ``[samples, width]`` each, the sites in execution order.
Rows = Mapping[str, Array]
Method = Literal["selective", "angular"]

#: What both papers read and steer: the outputs of the norms before attention and before the feed-forward network.
SITES = ("blocks.*.attn.norm", "blocks.*.mlp.norm")
KIND = "steering_plane"
_MADE_BY = "make one with actgraph.passes.steer.plane.extract_plane(graph, positive, negative).save(path)"
#: Below this, relative to the means, two means differ by rounding alone (as they do where all prompts end in one token).
_NOISE = 1e-6


@dataclass(frozen=True)
class PlaneSite:
    """What the samples say about one site.

    norm: length of the difference of the means (for ``angular`` of the means of samples of length 1, themselves of length 1).
    cosine: mean cosine of its direction with those of all sites, its own included; 0 where the sets do not differ.
    positive, negative: mean cosine of the samples of each set with the first axis of the plane.
    straddles: whether these have opposite signs. selected: whether Selective Steering turns here.
    """

    name: str
    norm: float
    cosine: float
    positive: float
    negative: float
    straddles: bool
    selected: bool


@dataclass(frozen=True)
class SteeringPlane:
    """A plane to turn activations in.

    basis: ``[width, 2]`` float32 with orthonormal columns. sites: what is known of each site, in execution order; empty for a
    plane that is for any site. source: the site whose direction is the first axis. model: fingerprint of the model
    (``actgraph.formats.vectors.model_fingerprint``), empty when unknown. Raises InputError for a basis that is not orthonormal.
    """

    basis: Array
    sites: tuple[PlaneSite, ...] = ()
    source: str = ""
    method: str = ""
    model: str = ""

    def __post_init__(self) -> None:
        basis = np.asarray(self.basis, np.float64)
        if basis.ndim != 2 or basis.shape[1] != 2:
            raise InputError(f"a plane is [width, 2], not {list(basis.shape)}", "give two columns")
        if not np.isfinite(basis).all() or np.abs(basis.T @ basis - np.eye(2)).max() > 1e-4:
            raise InputError("the basis of the plane is not orthonormal", "make it with plane_basis(first, second)")

    @property
    def selected(self) -> tuple[str, ...]:
        """The sites that Selective Steering turns, in execution order."""
        return tuple(site.name for site in self.sites if site.selected)

    def table(self) -> list[dict[str, Any]]:
        """One row a site: its statistics, and whether its direction is the first axis."""
        return [{**asdict(site), "source": site.name == self.source} for site in self.sites]

    def save(self, path: str | Path) -> Path:
        """Write the file for the passes ``angular_steer`` and ``selective_steer``."""
        notes = {"source": self.source, "method": self.method, "sites": [asdict(site) for site in self.sites]}
        return Artifact(KIND, {"basis": np.asarray(self.basis, np.float32)}, notes, self.model).save(path)


def load_plane(path: str | Path) -> SteeringPlane:
    """Read a plane. Raises InputError for a missing, damaged or unsuitable file."""
    found = load_artifact(path, KIND, _MADE_BY)
    basis, notes = found.array("basis", 2), found.notes
    try:
        sites = tuple(PlaneSite(**site) for site in notes.get("sites", ()))
        return SteeringPlane(basis, sites, str(notes.get("source", "")), str(notes.get("method", "")), found.model)
    except (TypeError, AttributeError) as error:
        raise InputError(f"the manifest of {path} is damaged: {error}", _MADE_BY) from error


def steering_plane(
    positive: Rows,
    negative: Rows,
    *,
    method: Method = "selective",
    choose: Literal["similarity", "norm"] = "similarity",
    keep: Literal["blocks", "sites"] = "blocks",
    model: str = "",
) -> SteeringPlane:
    """The plane of two sets of activations, and the sites at which they are told apart.

    positive, negative: ``[samples, width]`` for each site, in execution order; the sets need not be of one size.
    method: how the direction of a site is made. ``selective``: the normalised difference of the means. ``angular``: each sample
        is normalised, then each of the two means; their difference.
    choose: which direction is the first axis: the one with the largest mean cosine with all, or the longest one before it is
        normalised; the first one of equals.
    keep: which sites are selected: those of blocks all of whose sites straddle zero, or each site by itself.

    A site at which the sets do not differ (the first norm, where all prompts end in one token) has no direction, and does not
    straddle. Computed in float64. Raises InputError for arrays that do not fit and for sets without a plane.
    """
    names = _checked(positive, negative)
    wide = [[np.asarray(rows[name], np.float64) for rows in (positive, negative)] for name in names]
    differences = np.stack([_difference(above, below, method) for above, below in wide])
    norms = np.linalg.norm(differences, axis=1)
    known = norms > 0
    if not known.any():
        raise InputError("the positive and negative samples have the same mean at every site", "use sets that differ")
    units = np.divide(differences, norms[:, None], out=np.zeros_like(differences), where=known[:, None])
    cosines = (units @ units.T).sum(axis=1) / known.sum()
    scores = cosines if choose == "similarity" else norms
    best = float(scores[known].max())
    place = int(np.flatnonzero(known & (scores >= best - 1e-12 * abs(best)))[0])  # sums differ in their last bits
    first = units[place]
    basis = plane_basis(first, _component((units if method == "selective" else differences)[known]))
    above, below = ([float(np.mean(_unit_rows(pair[side]) @ first)) for pair in wide] for side in (0, 1))
    straddles = [bool(known[i]) and above[i] * below[i] < 0 for i in range(len(names))]
    selected = _kept(names, straddles) if keep == "blocks" else straddles
    sites = tuple(
        PlaneSite(name, float(norms[i]), float(cosines[i]), above[i], below[i], straddles[i], selected[i])
        for i, name in enumerate(names)
    )
    return SteeringPlane(basis, sites, names[place], method, model)


def extract_plane(
    graph: Graph,
    positive: Any,
    negative: Any,
    *,
    site: str | Sequence[str] = SITES,
    method: Method = "selective",
    choose: Literal["similarity", "norm"] = "similarity",
    keep: Literal["blocks", "sites"] = "blocks",
    position: str = "last",
    batch_size: int = 8,
    progress: bool = True,
) -> SteeringPlane:
    """``steering_plane`` of a model, from two corpora (the papers: prompts that are to be refused, and others).

    positive, negative: a file with a text a line, a list of texts, and so on. position: which tokens are read
    (``actgraph.calibrate.document_rows``), the last one in both papers. site: where; the sites must have one width. The code
    of Angular Steering reads what goes into the norms, ``["blocks.*.resid_pre", "blocks.*.resid_mid"]``, and steers what comes
    out of them: give its pass ``site``. Raises InputError and SiteError.
    """
    names = [_block_name((found.name, *found.aliases)) for found in graph.sites(site)]
    rows = [
        collect_rows(graph, names, corpus, position=position, batch_size=batch_size, progress=progress)
        for corpus in (positive, negative)
    ]
    fingerprint = model_fingerprint(graph)
    return steering_plane(rows[0], rows[1], method=method, choose=choose, keep=keep, model=fingerprint)


def plane_basis(first: Array, second: Array) -> Array:
    """An orthonormal basis ``[width, 2]`` float32 of the plane of two vectors; its first column is ``first`` normalised.

    Raises InputError for vectors that span no plane.
    """
    one, other = (np.asarray(vector, np.float64) for vector in (first, second))
    if one.ndim != 1 or one.shape != other.shape:
        raise InputError(f"vectors of shapes {list(one.shape)} and {list(other.shape)} span no plane", "give two of one width")
    lengths = [float(np.linalg.norm(vector)) for vector in (one, other)]
    if not all(np.isfinite(lengths)) or min(lengths) == 0:
        raise InputError("a vector of the plane is zero or not finite", "use sets that differ")
    one, other = one / lengths[0], other / lengths[1]
    for _ in range(2):  # once more, for what rounding leaves of nearly parallel ones
        other = other - (other @ one) * one
    length = float(np.linalg.norm(other))
    if length < _NOISE:
        raise InputError("the two vectors of the plane are parallel", "read activations at more sites")
    return np.stack([one, other / length], axis=1).astype(np.float32)


def _difference(positive: Array, negative: Array, method: Method) -> Array:
    """The direction of one site, not normalised; zero where the means differ by rounding alone."""
    if method == "angular":
        means = [_unit_rows(rows).mean(axis=0) for rows in (positive, negative)]
        means = [_unit_rows(mean[None])[0] for mean in means]
    else:
        means = [rows.mean(axis=0) for rows in (positive, negative)]
    difference: Array = means[0] - means[1]
    size = max(float(np.linalg.norm(mean)) for mean in means)
    return difference if float(np.linalg.norm(difference)) > _NOISE * size else np.zeros_like(difference)


def _component(directions: Array) -> Array:
    """The first principal component of ``[sites, width]``, centred; its largest entry (the first of equals) is positive."""
    centred = directions - directions.mean(axis=0)
    sizes, components = np.linalg.svd(centred, full_matrices=False)[1:]
    if len(directions) < 2 or sizes[0] < _NOISE * np.linalg.norm(directions):
        raise InputError("the directions of all sites are one, and span no plane", "read activations at more sites")
    component: Array = components[0]
    turned: Array = component * np.sign(component[int(np.argmax(np.abs(component)))])
    return turned


def _unit_rows(rows: Array) -> Array:
    """Every row at length 1; a row of zeros stays."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    result: Array = np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)
    return result


def _kept(names: Sequence[str], straddles: Sequence[bool]) -> list[bool]:
    """Of blocks all of whose sites straddle, the sites; a site outside blocks is one of its own."""
    failed = {_block(name) for name, good in zip(names, straddles, strict=True) if not good}
    return [_block(name) not in failed for name in names]


_BLOCK = re.compile(r"(?:.*\.)?(?:blocks|layers|layer|h)\.\d+(?=\.)")


def _block(name: str) -> str:
    found = _BLOCK.match(name)
    return found.group() if found else name


def _block_name(names: Sequence[str]) -> str:
    """The name of a site that says its block, where there is one."""
    return next((name for name in names if _block(name) != name), names[0])


def _checked(positive: Rows, negative: Rows) -> list[str]:
    """The names of the sites. Raises InputError for arrays that do not fit together."""
    names = list(positive)
    if set(names) != set(negative) or not names:
        raise InputError("the positive and negative samples are not of the same sites", "collect both at the same sites")
    widths = set()
    for name in names:
        for what, rows in (("positive", positive[name]), ("negative", negative[name])):
            if np.ndim(rows) != 2 or not len(rows):
                raise InputError(f"the {what} samples of {name} are {list(np.shape(rows))}, not [samples, width]")
            if not np.isfinite(rows).all():
                raise InputError(f"the {what} samples of {name} hold NaN or infinite values", "find out where they come from")
            widths.add(np.shape(rows)[1])
    if len(widths) > 1:
        raise InputError(f"the sites have different widths, {sorted(widths)}, and no plane in common", "choose fewer sites")
    return names
