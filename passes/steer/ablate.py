"""Directional ablation: project a direction out of an activation.

Source: Refusal in Language Models Is Mediated by a Single Direction (2024). ``h' = h - (h . v) v`` with a unit vector v.
With a scale it is the mirror variant of *Selective Steering* (2026): ``h' = h - scale (h . v) v``, which reflects at 2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from actgraph.errors import OptionError, PassError
from actgraph.formats.vectors import SteeringVector, load_vector, name_sites, vector_messages
from actgraph.graph import Graph, Site
from actgraph.graph.graph import Array
from actgraph.passes.places import Selector
from actgraph.passes.steer.edit import Edit, FoldingEditPass, edit_dtype
from actgraph.passes.steer.runtime_inputs import INPUT
from actgraph.pipeline.base import PassContext, PassResult


class Ablate(FoldingEditPass):
    """Project the unit direction out of each site, for all tokens or those that ``where`` names.

    Several directions are made orthonormal first, so that what they span is taken out. ``scale`` 1 ablates, 0.5 leaves half, 2
    reflects, and ``scale=input`` makes it an optional input of each row (``ablate.scale``, 0 where nobody gives it).

    Folds into weights where that is exact: ``W <- (I - v v^T) W`` where the site is a linear's output (bias likewise),
    ``W <- W (I - v v^T)`` into the linears that read it where nothing else does (see ``fold_edits``; ``unfold`` takes it out
    again). A residual stream has other readers and keeps a node. The papers ablate at every site that writes the stream: select
    ``embed, blocks.*.attn.out, blocks.*.mlp.out``, or use ``orthogonalize``.
    """

    name: ClassVar[str] = "ablate"
    change: ClassVar[str] = "a direction is projected out"
    off: ClassVar[Mapping[str, Any]] = {"scale": 0.0}

    site: Selector = Field(default=(), description="Where to ablate; default: the sites named in the direction's file.")
    direction: str | tuple[str, ...] | tuple[float, ...] = Field(
        description="A file with the direction, several, or its numbers; normalised to unit length.",
        json_schema_extra={"path": True},
    )
    scale: float | Literal["input"] = Field(default=1.0, description="How much is taken out: 1 all, 2 reflects; or `input`.")

    @model_validator(mode="after")
    def _finite(self) -> Ablate:
        if self.scale != INPUT and not np.isfinite(self.scale):
            raise OptionError(f"ablate: scale is {self.scale}", "give a finite number")
        return self

    @property
    def _files(self) -> tuple[str, ...]:
        given = (self.direction,) if isinstance(self.direction, str) else self.direction
        return tuple(name for name in given if isinstance(name, str))

    def _vectors(self, graph: Graph) -> list[SteeringVector]:
        found = [name_sites(load_vector(name), graph) for name in self._files]
        for name, vector in zip(self._files, found, strict=True):
            self.check_origin(vector, graph, name)
        return found or [SteeringVector({"": np.asarray(self.direction, np.float32)})]

    def reads_rows(self, edit: Edit) -> bool:
        return self.scale == INPUT

    def targets(self, graph: Graph) -> Selector:
        return tuple(dict.fromkeys(name for vector in self._vectors(graph) for name in vector.directions if name))

    def hook(self, graph: Graph, site: Site, inputs: Mapping[str, Array]) -> Callable[[Array], Array] | None:
        if self.scale == INPUT:
            return None
        basis, scale = _orthonormal(self._vectors(graph), site), float(self.scale)
        return self.at_tokens(lambda rows: rows - scale * (rows @ basis) @ basis.T, inputs)

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        vectors = self._vectors(graph)
        result = self.run_at(graph, context, vectors=vectors)
        for name, vector in zip(self._files, vectors, strict=False):
            result.messages += vector_messages(vector, graph, called=name, where=self.where)
        return result

    def apply(self, edit: Edit, site: Site, width: int) -> str:
        basis = _orthonormal(edit.shared["vectors"], site)
        if len(basis) != width:
            raise PassError(
                f"ablate: the direction has {len(basis)} numbers but {site.name} is {site.type}", "use a direction of this site"
            )
        if self.scale == 0:
            return "identity"
        mask, strength = edit.mask(), self.scale
        if strength == INPUT:  # a mask scales the change, and 0 leaves a token bit for bit as it is
            mask, strength = edit.times(mask, edit.of_rows(site, "ablate.scale")), 1.0
        dtype = edit_dtype(site)
        operands = [basis.astype(dtype), (-float(strength) * np.eye(basis.shape[1])).astype(dtype)]
        rule = edit.place(
            site, "actgraph.lowrank_map", [*operands, mask] if mask is not None else operands, self.attributes, fold=self.fold
        )
        edit.result.details.append({"site": site.name, "rule": rule})
        return rule


def _orthonormal(vectors: list[SteeringVector], site: Site) -> Array:
    """``[width, r]`` float64: the directions for a site, orthonormal. Raises PassError where one is zero or depends on
    others.
    """
    columns: list[Array] = []
    for vector in vectors:
        wide = vector.for_site((site.name, *site.aliases)).astype(np.float64)
        if not wide.any():
            raise PassError("ablate: the direction is zero", "extract it from sets that differ")
        left = wide / np.linalg.norm(wide)
        for column in columns:
            if len(column) == len(left):
                left = left - (left @ column) * column
        if np.linalg.norm(left) < 1e-6:
            raise PassError("ablate: one direction is a combination of the others", "leave it out")
        columns.append(left / np.linalg.norm(left))
    if len({len(column) for column in columns}) != 1:
        raise PassError("ablate: directions have different widths", "use directions of one site")
    return np.stack(columns, 1)
