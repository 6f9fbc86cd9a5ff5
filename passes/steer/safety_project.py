"""A fine-tuning update projected on the alignment update: the experiment of Safety Subspaces.

Source: Safety Subspaces are Not Distinct: A Fine-Tuning Case Study, 2025. With ``V = W_aligned - W_base`` and
``U = W_tuned - W_aligned``, ``L`` the first left singular vectors of V, and ``P = L L^T U``: a model with ``W_aligned + P``
(the part of the update that is in the subspace of alignment), ``W_aligned + U - P`` (the rest) or ``W_aligned - P``. The
paper's result is negative: keeping or removing the part takes safety and usefulness along together, so a random subspace
(``control``) belongs beside every run.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from actgraph.errors import InputError, PassError
from actgraph.graph import Graph
from actgraph.graph.graph import Array
from actgraph.passes.steer.parameters import Stored, same_topology, stored_parameters
from actgraph.passes.steer.subspaces import energies_of, random_basis
from actgraph.passes.steer.weight_edits import Projection, weight_project
from actgraph.pipeline.base import UNBOUNDED, Pass, PassContext, PassResult

Control = Literal["none", "random_subspace", "random_vectors"]


@dataclass(frozen=True)
class Projected:
    """One matrix or vector.

    part: ``P``. kept: the update that remains, by mode. rank: how many directions were projected on. size: ``|U|^2``. energy:
    ``|P|^2 / |U|^2``. cos_update: of U and P. cos_alignment: of U and V. removed: ``|U - kept|^2 / |U|^2``. All are 0 where one
    of the two is.
    """

    name: str
    part: Array
    kept: Array
    rank: int
    size: float
    energy: float
    cos_update: float
    cos_alignment: float
    removed: float


def project_update(
    name: str, update: Array, alignment: Array, *, fraction: float, mode: Projection, control: Control = "none", seed: int = 0
) -> Projected:
    """The part of ``update [m, n]`` in the span of ``round(fraction * min(m, n))`` left singular vectors of ``alignment``.

    At least one vector; none where the alignment is zero. Vectors (``[n]``) are projected on the alignment itself. control: a
    random subspace of as many dimensions instead, or as many of all singular vectors. Numbers are drawn by name and seed.
    """
    if update.shape != alignment.shape:
        raise InputError(f"the updates of {name} have the shapes {list(update.shape)} and {list(alignment.shape)}")
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    u, v = update.astype(np.float64), alignment.astype(np.float64)
    if not (np.isfinite(u).all() and np.isfinite(v).all()):
        raise InputError(f"{name} holds NaN or infinite numbers", "look for them in the models")
    basis = _basis(v, fraction, control, rng)
    part = weight_project(u, basis, "same")
    kept = weight_project(u, basis, mode)
    total = float(np.square(u).sum())
    removed = float(np.square(u - kept).sum()) / total if total else 0.0
    energy = float(np.square(part).sum()) / total if total else 0.0
    return Projected(name, part, kept, basis.shape[1], total, energy, cosine(u, part), cosine(u, v), removed)


def _basis(v: Array, fraction: float, control: Control, rng: np.random.Generator) -> Array:
    """Orthonormal columns, ``[m, rank]``."""
    if not v.any():
        return np.zeros((v.shape[0], 0))
    if v.ndim == 1:
        direction = rng.standard_normal(v.shape) if control == "random_subspace" else v
        return np.asarray(direction / np.linalg.norm(direction))[:, None]
    rank = max(1, round(fraction * min(v.shape)))
    if control == "random_subspace":
        return random_basis(rng, v.shape[0], rank)
    vectors = energies_of(v).vectors
    chosen = np.sort(rng.permutation(vectors.shape[1])[:rank]) if control == "random_vectors" else np.arange(rank)
    return np.asarray(vectors[:, chosen])


def cosine(a: Array, b: Array) -> float:
    """``<a, b> / (|a| |b|)``, and 0 where one of them is zero."""
    lengths = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(np.vdot(a, b)) / lengths if lengths else 0.0


def project_models(
    tuned: Graph, aligned: Graph, base: Graph, *, fraction: float, mode: Projection, control: Control = "none", seed: int = 0
) -> Iterator[tuple[Stored, list[Projected], list[Array]]]:
    """Each parameter of ``tuned`` with its projections and what becomes of it, part by part (see ``Stored.parts``).

    Raises InputError for models of other topologies.
    """
    same_topology(tuned, aligned, base)
    tables = [{p.name: p for p in stored_parameters(graph)} for graph in (aligned, base)]
    for parameter in stored_parameters(tuned):
        now = parameter.parts()
        then, before = (table[parameter.name].parts() for table in tables)
        found = [
            project_update(name, w - a, a - b, fraction=fraction, mode=mode, control=control, seed=seed)
            for name, w, a, b in zip(parameter.part_names(), now, then, before, strict=True)
        ]
        yield parameter, found, [a + each.kept for a, each in zip(then, found, strict=True)]


class SafetyProject(Pass):
    """Keep the part of a fine-tuning update inside of, outside of, or against the subspace of the alignment update.

    The graph is the fine-tuned model; ``aligned`` is what it was tuned from and ``base`` what that was aligned from, captured
    in the same way. Vectors (norms, biases) are projected on the alignment's vector. This separates no behaviour from others
    (the paper's finding); compare with ``control``.
    """

    name: ClassVar[str] = "safety_project"
    family: ClassVar[str] = "steer"

    aligned: str = Field(description="The aligned model that the graph was fine-tuned from.", json_schema_extra={"path": True})
    base: str = Field(description="The base model that the aligned one was trained from.", json_schema_extra={"path": True})
    fraction: float = Field(default=0.5, gt=0.0, le=1.0, description="Share of the alignment's left singular vectors.")
    mode: Projection = Field(
        default="orth", description="same: keep the part in the subspace; orth: the rest; opp: subtract the part instead."
    )
    control: Control = Field(
        default="none",
        description="random_subspace: as many random directions; random_vectors: any singular vectors.",
    )

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        aligned, base = (_load(path) for path in (self.aligned, self.base))
        result = PassResult(expected_change="the fine-tuning update is projected", expected_size=UNBOUNDED)
        total = part = 0.0
        found = list(
            project_models(
                graph, aligned, base, fraction=self.fraction, mode=self.mode, control=self.control, seed=context.seed
            )
        )
        with context.edit(graph) as editor:
            for parameter, projected, edited in found:
                if not any(each.size for each in projected):
                    result.counts["unchanged"] += 1
                    continue
                parameter.write(editor, edited)
                result.counts["projected"] += 1
                total += sum(each.size for each in projected)
                part += sum(each.size * each.energy for each in projected)
                result.details += [_row(each) for each in projected]
        if not result.counts["projected"]:
            raise PassError(f"safety_project: {graph.name} has the weights of {self.aligned}", "give the fine-tuned model")
        result.messages.append(f"{part / total:.3g} of the update's energy is in the subspace")
        result.messages += editor.messages
        return result


def _row(each: Projected) -> dict[str, Any]:
    return {
        "weight": each.name,
        "rank": each.rank,
        "energy": each.energy,
        "cos update": each.cos_update,
        "cos alignment": each.cos_alignment,
        "removed": each.removed,
    }


def _load(path: str) -> Graph:
    from actgraph import formats
    from actgraph.graph.program import Program

    loaded = formats.load(path)
    if isinstance(loaded, Program):
        raise InputError(f"{path} is a program of several graphs", "give the model that it was made from")
    return loaded
