"""Several directions at once, each with a strength of its own: parametric steering of contextual-integrity factors.

Source: Do LLMs Know What Is Private Internally? Probing and Steering Contextual Privacy Norms (CI-parametric steering,
2026). The released loader picks blocks by the norm of stored directions, which are unit vectors, so that its order is that
of insertion: here blocks are picked by the probes' accuracy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from actgraph.calibrate.document_rows import collect_rows
from actgraph.errors import InputError, OptionError, PassError
from actgraph.formats.artifacts import Artifact, load_artifact
from actgraph.formats.vectors import model_fingerprint
from actgraph.graph import Graph, Site, Value
from actgraph.passes.places import Selector
from actgraph.passes.steer.edit import Edit, FoldingEditPass, stored_for
from actgraph.passes.steer.logistic import standardised
from actgraph.passes.steer.pca import first_component
from actgraph.passes.steer.runtime_inputs import INPUT, per_channel, per_token, row_input
from actgraph.pipeline.base import PassContext, PassResult

Array = np.ndarray[Any, Any]
KIND = "ci_factors"
_MADE_BY = "make one with actgraph.passes.steer.ci_parametric.factor_directions"


@dataclass(frozen=True)
class FactorDirections:
    """A direction for each factor at each site.

    directions: site -> ``[factors, width]`` float64 unit vectors. accuracy: site -> ``[factors]``, of the probes that tell a
    factor's values apart. chosen: the sites that are steered, the best ones by mean accuracy, in the order of the model.
    """

    factors: tuple[str, ...]
    directions: Mapping[str, Array]
    accuracy: Mapping[str, Array]
    chosen: tuple[str, ...]
    model: str = ""

    def weights(self, site: str, *, by_accuracy: bool = False) -> float:
        """``w``: 1, or the site's mean accuracy over the largest one."""
        best = max(float(each.mean()) for each in self.accuracy.values())
        return float(self.accuracy[site].mean()) / best if by_accuracy else 1.0

    def table(self) -> list[dict[str, Any]]:
        """One row a site: accuracy by factor, and whether it is chosen."""
        return [
            {"site": site, **dict(zip(self.factors, map(float, scores), strict=True)), "chosen": site in self.chosen}
            for site, scores in self.accuracy.items()
        ]

    def save(self, path: str | Path, *, by_accuracy: bool = False) -> Path:
        """Write the chosen sites' directions, times their weights, for the pass ``ci_parametric``."""
        arrays = {
            site: (self.directions[site] * self.weights(site, by_accuracy=by_accuracy)).astype(np.float32)
            for site in self.chosen
        }
        return Artifact(KIND, arrays, {"factors": list(self.factors)}, self.model).save(path)


def factor_directions(
    graph: Graph,
    stimuli: Mapping[str, Mapping[str, Sequence[Any]]],
    *,
    site: str | Sequence[str] = "blocks.*.resid_post",
    best: int = 5,
    position: str = "last",
    seed: int = 0,
    batch_size: int = 8,
    progress: bool = True,
) -> FactorDirections:
    """The direction along which each factor varies, and how well its values can be read off.

    stimuli: factor -> value -> documents in which only that factor varies (others are held fixed). best: how many sites are
    chosen. Raises InputError for a factor with fewer than two values.
    """
    names = [each.name for each in graph.sites(site)]
    found: dict[str, list[Array]] = {name: [] for name in names}
    scores: dict[str, list[float]] = {name: [] for name in names}
    for factor, values in stimuli.items():
        if len(values) < 2 or not all(values.values()):
            raise InputError(f"the factor {factor} has {len(values)} values with texts", "give texts for at least two values")
        documents = [document for texts in values.values() for document in texts]
        labels = np.repeat(np.arange(len(values)), [len(texts) for texts in values.values()])
        rows = collect_rows(graph, names, documents, position=position, batch_size=batch_size, progress=progress)
        for name in names:
            found[name].append(varying_direction(rows[name]))
            scores[name].append(probe_accuracy(rows[name], labels, seed=seed))
    accuracy = {name: np.array(scores[name]) for name in names}
    order = sorted(names, key=lambda name: -float(accuracy[name].mean()))  # sorted is stable: the first of equal ones
    chosen = tuple(name for name in names if name in order[:best])
    return FactorDirections(
        tuple(stimuli), {name: np.stack(found[name]) for name in names}, accuracy, chosen, model_fingerprint(graph)
    )


def varying_direction(rows: Array) -> Array:
    """The unit vector ``[width]`` along which ``rows [n, width]`` vary most, on the side of their mean."""
    direction = first_component(rows)
    return np.asarray(-direction if rows.astype(np.float64).mean(0) @ direction < 0 else direction)


def probe_accuracy(rows: Array, labels: Array, *, steps: int = 200, seed: int = 0) -> float:
    """The training accuracy of a linear softmax probe on standardised rows (Adam 1e-2, weight decay 1e-4)."""
    import torch

    x, target = torch.tensor(standardised(rows)[0], dtype=torch.float32), torch.tensor(labels)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        probe = torch.nn.Linear(x.shape[1], int(labels.max()) + 1)
        solver = torch.optim.Adam(probe.parameters(), lr=1e-2, weight_decay=1e-4)
        for _ in range(steps):
            solver.zero_grad()
            torch.nn.functional.cross_entropy(probe(x), target).backward()  # type: ignore[no-untyped-call]
            solver.step()
        return float((probe(x).argmax(1) == target).double().mean())


@dataclass(frozen=True)
class Independence:
    """cosines: ``[factors, factors]`` absolute cosines. mean: over pairs. p: the share of permutations with a mean as small."""

    cosines: Array
    mean: float
    p: float


def independence(groups: Sequence[Array], *, permutations: int = 1000, seed: int = 0) -> Independence:
    """Whether the factors' directions are closer to orthogonal than those of random groups of the same stimuli.

    groups: the rows ``[n_p, width]`` of each factor at one site. Permutations pool all rows and deal them out again.
    """
    directions = np.stack([varying_direction(rows) for rows in groups])
    cosines = np.abs(directions @ directions.T)
    pairs = list(combinations(range(len(groups)), 2))
    observed = float(np.mean([cosines[a, b] for a, b in pairs]))
    pool, sizes = np.concatenate(groups), np.cumsum([len(rows) for rows in groups])[:-1]
    random, below = np.random.default_rng(seed), 0
    for _ in range(permutations):
        dealt = [varying_direction(part) for part in np.split(pool[random.permutation(len(pool))], sizes)]
        below += float(np.mean([abs(dealt[a] @ dealt[b]) for a, b in pairs])) <= observed
    return Independence(cosines, observed, below / permutations)


class CiParametric(FoldingEditPass):
    """Add ``sum_p alpha_p v_p`` at each chosen site, one strength for each factor.

    Constant strengths sum to one vector: one shift, that folds where a steering vector does (see ``fold_edits``). With
    ``alpha=input`` they are the optional input ``ci_parametric.alpha`` [batch, factors], 0 (off, bit for bit) where nobody
    gives it. ``norm=restore`` gives each token its norm back.
    """

    name: ClassVar[str] = "ci_parametric"
    off: ClassVar[Mapping[str, Any]] = {"alpha": 0.0}

    factors: str = Field(description=f"The file with directions: {_MADE_BY}.", json_schema_extra={"path": True})
    site: Selector = Field(default=(), description="Where; default: the sites of the file.")
    alpha: float | tuple[float, ...] | Literal["input"] = Field(
        description="A strength for each factor, in their order, one for all, or `input`; 0 is the identity."
    )
    norm: Literal["none", "restore"] = Field(default="none", description="restore: tokens keep their norm.")

    @model_validator(mode="after")
    def _finite(self) -> CiParametric:
        if self.alpha != INPUT and not np.isfinite(np.asarray(self.alpha, float)).all():
            raise OptionError(f"ci_parametric: alpha is {self.alpha}", "give finite numbers")
        return self

    def reads_rows(self, edit: Edit) -> bool:
        return self.alpha == INPUT

    def targets(self, graph: Graph) -> Selector:
        return tuple(load_artifact(self.factors, KIND, _MADE_BY).arrays)

    def hook(self, graph: Graph, site: Site, inputs: Mapping[str, Array]) -> Callable[[Array], Array] | None:
        if self.alpha == INPUT:
            return None
        directions = _directions(load_artifact(self.factors, KIND, _MADE_BY), site)
        total = self._total(directions)

        def edited(rows: Array) -> Array:
            sizes, shifted = np.linalg.norm(rows, axis=-1, keepdims=True), rows + total
            if self.norm == "restore":
                shifted = shifted * sizes / np.linalg.norm(shifted, axis=-1, keepdims=True)
            return np.asarray(shifted)

        return self.at_tokens(edited, inputs)

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        file = load_artifact(self.factors, KIND, _MADE_BY)
        names = list(file.notes.get("factors", []))
        self.check_model(file.model, graph, self.factors)
        if isinstance(self.alpha, tuple) and len(self.alpha) != len(names):
            raise PassError(f"ci_parametric: there are {len(self.alpha)} strengths", f"the factors are {', '.join(names)}")
        return self.run_at(graph, context, file=file)

    def apply(self, edit: Edit, site: Site, width: int) -> str:
        file: Artifact = edit.shared["file"]
        directions = _directions(file, site)
        if directions.shape[1] != width:
            raise PassError(f"ci_parametric: directions have {directions.shape[1]} channels, and {site.name} is {site.type}")
        assert site.type.dtype is not None and site.type.shape is not None
        editor, rank = edit.editor, len(site.type.shape)
        attributes = {**self.attributes, **({} if self.norm == "none" else {"norm": self.norm})}
        operands: list[Value | Array | None]
        if self.alpha == INPUT:
            if "alpha" not in edit.shared:
                edit.shared["alpha"], edit.shared["on"] = self._strengths(edit, len(directions))
            vector = editor.insert("matmul", [edit.shared["alpha"], directions.astype(np.float32)]).output
            operands = [per_channel(editor, vector, rank, self.axis), per_token(editor, edit.shared["on"], rank - 1)]
        else:
            total = self._total(directions)
            if not total.any():
                return "identity"
            operands = [total.astype(site.type.dtype.numpy), None]
        mask = edit.mask()
        operands += [mask] if mask is not None else []
        rule = edit.place(site, "actgraph.shift", operands, attributes, fold=self.fold)
        edit.result.details.append({"site": site.name, "rule": rule, "factors": len(directions)})
        return rule

    def _total(self, directions: Array) -> Array:
        """The directions ``[factors, width]``, each times its strength, as one vector."""
        return np.asarray(np.broadcast_to(np.asarray(self.alpha, np.float64), len(directions)) @ directions.astype(np.float64))

    @staticmethod
    def _strengths(edit: Edit, count: int) -> tuple[Value, Value]:
        """The input, and 1 for rows in which some strength is not 0."""
        editor = edit.editor
        alpha = row_input(editor, edit.graph, "ci_parametric.alpha", width=count)
        squares = editor.insert("matmul", [editor.insert("mul", [alpha, alpha]).output, np.ones((count, 1), np.float32)]).output
        on = editor.insert("actgraph.switch", [squares], {"threshold": 0.0}).output
        return alpha, editor.insert("reshape", [on], {"shape": (-1,)}).output


def _directions(file: Artifact, site: Site) -> Array:
    """``[factors, width]`` for a site."""
    return stored_for(file, site, 2, by="ci_parametric", what="directions")
