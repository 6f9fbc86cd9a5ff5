"""Suppressing what a model knows of a subject: signatures of it in activations, and capsules that take them out.

Source: Representation-Aware Unlearning via Activation Signatures: From Suppression to Knowledge-Signature Erasure (KIF, 2026).
Where the released code and sense differ: the soft gate's mean and deviation are those of *control* prompts at the edited site
(the code takes them from the subject's own prompts at the last hidden state, where its gate is about 0.01 for the subject
itself), and the gate is one per token (one for the whole batch couples requests). Further directions are judged by the size of
projections, since their means cannot differ (see ``further_directions``; by the code's rule none can be kept).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from actgraph.calibrate.document_rows import collect_rows
from actgraph.calibrate.engine import collect
from actgraph.calibrate.statistics import Request
from actgraph.errors import InputError, PassError
from actgraph.formats.artifacts import Artifact, load_artifact
from actgraph.formats.vectors import model_fingerprint
from actgraph.graph import Graph, Node, Site, Value
from actgraph.passes.places import Selector
from actgraph.passes.steer.edit import Edit, FoldingEditPass, edit_dtype
from actgraph.passes.steer.pca import fixed_sign
from actgraph.pipeline.base import PassContext, PassResult

Array = np.ndarray[Any, Any]
KIND = "kif_signature"
_MADE_BY = "make one with actgraph.passes.steer.kif.mine_signature"
_RANK = 1e-6  # of the rows' size: what is smaller is rounding noise
_FOLDS, _FEWEST = 5, 8


@dataclass(frozen=True)
class SiteSignature:
    """What tells a subject's prompts from controls at one site.

    directions: ``[width, r]`` float64, orthonormal: the raw-space direction of the difference of means, then further ones
    (``further_directions``).
    effect: the standardised effect size along it (in deviations), with its bootstrap 95 % interval ``low`` to ``high``.
    mean, deviation: of ``|h . v|`` over the tokens of control prompts, for the gate.
    """

    site: str
    directions: Array
    effect: float
    low: float
    high: float
    mean: float = 0.0
    deviation: float = 1.0


@dataclass(frozen=True)
class Signature:
    """A subject's signature: the site with the largest effect, and what all sites had.

    strong: whether that effect reaches ``threshold``; a weaker one says that the subject is not told apart.
    """

    best: SiteSignature
    sites: tuple[SiteSignature, ...]
    strong: bool
    model: str = ""
    threshold: float = 2.0

    def table(self) -> list[dict[str, Any]]:
        """One row a site, in the order of the model."""
        return [
            {
                "site": s.site, "effect": s.effect, "low": s.low, "high": s.high, "directions": s.directions.shape[1],
                "chosen": s.site == self.best.site,
            }
            for s in self.sites
        ]  # fmt: skip

    def save(self, path: str | Path) -> Path:
        """Write what the pass ``kif`` reads."""
        best = self.best
        notes = {"site": best.site, "effect": best.effect, "mean": best.mean, "deviation": best.deviation}
        notes |= {"strong": self.strong, "threshold": self.threshold}
        return Artifact(KIND, {"directions": best.directions.astype(np.float32)}, notes, self.model).save(path)


def mine_signature(
    graph: Graph,
    subject: Any,
    controls: Any,
    *,
    site: str | Sequence[str] = "blocks.*.mlp.out",
    position: str = "span",
    control_position: str = "mean",
    threshold: float = 2.0,
    most: int = 3,
    bootstrap: int = 100,
    seed: int = 0,
    batch_size: int = 8,
    progress: bool = True,
) -> Signature:
    """The signature of a subject.

    subject: texts about it, with the subject's name as ``span`` (``{"text": ..., "span": ...}``), or with another ``position``.
    controls: neutral texts. site: where to look; the site with the largest effect is chosen (the first of equal ones).
    most: how many further directions at most (see ``further_directions``) are kept where their effect reaches ``threshold``.
    Raises InputError where sets cannot be told apart, and what ``collect`` raises.
    """
    names = [each.name for each in graph.sites(site)]
    options: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    positive = collect_rows(graph, names, subject, position=position, **options)
    negative = collect_rows(graph, names, controls, position=control_position, **options)
    found = tuple(_of_site(name, positive[name], negative[name], threshold, most, bootstrap, seed) for name in names)
    best = max(found, key=lambda each: each.effect)
    mean, deviation = _on_controls(graph, best, controls, options)
    chosen = SiteSignature(best.site, best.directions, best.effect, best.low, best.high, mean, deviation)
    return Signature(
        chosen,
        tuple(chosen if each is best else each for each in found),
        best.effect >= threshold,
        model_fingerprint(graph),
        threshold,
    )


def effect_size(positive: Array, negative: Array) -> float:
    """``|mean+ - mean-| / sqrt((var+ + var-) / 2)`` of two sets of numbers, with unbiased variances."""
    spread = (positive.var(ddof=1) + negative.var(ddof=1)) / 2
    difference = abs(float(positive.mean() - negative.mean()))
    return difference / float(np.sqrt(spread)) if spread > 0 else float(np.inf if difference else 0.0)


def _of_site(
    site: str, positive: Array, negative: Array, threshold: float, most: int, bootstrap: int, seed: int
) -> SiteSignature:
    if min(len(positive), len(negative)) < 2:
        raise InputError("an effect size needs at least two texts about the subject and two controls", "give more texts")
    both = np.concatenate([positive, negative]).astype(np.float64)
    deviation = both.std(0, ddof=1)
    deviation[deviation == 0] = 1.0
    standard = [(rows - both.mean(0)) / deviation for rows in (positive, negative)]
    u = standard[0].mean(0) - standard[1].mean(0)
    if not u.any():
        raise InputError(f"texts about the subject and controls give the same mean at {site}", "use texts that differ")
    scores = [rows @ (u / np.linalg.norm(u)) for rows in standard]
    effect = effect_size(*scores)
    draws = np.random.default_rng(seed)
    again = [effect_size(*(s[draws.integers(0, len(s), len(s))] for s in scores)) for _ in range(bootstrap)]
    low, high = np.percentile(again, [2.5, 97.5]) if again else (effect, effect)
    first = positive.mean(0, dtype=np.float64) - negative.mean(0, dtype=np.float64)
    directions = [first / np.linalg.norm(first)]
    for component in further_directions(standard[0], standard[1], threshold=threshold, most=most):
        raw = component * deviation  # how raw rows move where standardised ones move along it
        left = raw - sum(((raw @ each) * each for each in directions), np.zeros_like(raw))
        if np.linalg.norm(left) > _RANK * np.linalg.norm(raw):
            directions.append(fixed_sign(left / np.linalg.norm(left)))
    basis, _ = np.linalg.qr(np.stack(directions, 1))
    basis = basis * np.sign((basis * np.stack(directions, 1)).sum(0))
    return SiteSignature(site, basis, effect, float(low), float(high))


def further_directions(positive: Array, negative: Array, *, threshold: float = 2.0, most: int = 3) -> list[Array]:
    """Facets of a subject that its mean does not show: unit vectors in the space of the standardised rows ``[n, width]``.

    They are the first ``most`` principal components of the subject's rows, after the direction of the difference of means is
    projected out of them, whose effect reaches ``threshold``. With that direction gone both sets have the same mean along
    every other one, so that an effect size of projections is 0 up to rounding; what can differ is how far rows lie from that
    mean. The effect is that of ``log |projection|``, the subject's being the larger: of sizes themselves it could not reach
    1.9 where the facet is normal, however large. A component fits the rows that it was made of, of few rows in a wide space
    even if it says nothing, so each row is measured with components of the other four fifths. Sets of less than
    eight rows tell too little, and have none; nor are components of negligible size (1e-6 of the rows) looked at.
    """
    if min(len(positive), len(negative)) < _FEWEST or most < 1:
        return []
    _, found = _components(positive, negative, most)
    near, far = [], []
    folds = [np.arange(len(rows)) % _FOLDS for rows in (positive, negative)]
    for fold in range(_FOLDS):
        kept = [rows[labels != fold] for rows, labels in zip((positive, negative), folds, strict=True)]
        middle, components = _components(kept[0], kept[1], most)
        found = found[: len(components)]
        far.append(np.abs((positive[folds[0] == fold] - middle) @ components.T))
        near.append(np.abs((negative[folds[1] == fold] - middle) @ components.T))
    count = len(found)
    sizes = [np.log(np.maximum(np.concatenate([part[:, :count] for part in each]), _RANK)) for each in (far, near)]
    larger = sizes[0].mean(0) > sizes[1].mean(0)
    return [found[k] for k in range(count) if larger[k] and effect_size(sizes[0][:, k], sizes[1][:, k]) >= threshold]


def _components(positive: Array, negative: Array, most: int) -> tuple[Array, Array]:
    """The mean of the subject's rows without the direction of the difference of means, and the first principal components of
    these rows, ``[at most most, width]``, by the smaller Gram matrix.
    """
    u = positive.mean(0) - negative.mean(0)
    u = u / (np.linalg.norm(u) or 1.0)
    left = positive - np.outer(positive @ u, u)
    middle = left.mean(0)
    centred = left - middle
    wide = centred.shape[1] > len(centred)
    values, vectors = np.linalg.eigh(centred @ centred.T if wide else centred.T @ centred)
    values, vectors = values[::-1], vectors[:, ::-1]
    whole = ((positive - positive.mean(0)) ** 2).sum()
    count = min(most, int((values > whole * _RANK**2).sum()))
    rows = (centred.T @ vectors[:, :count] if wide else vectors[:, :count]).T
    rows = rows - np.outer(rows @ u, u)
    return middle, rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _on_controls(graph: Graph, best: SiteSignature, controls: Any, options: Mapping[str, Any]) -> tuple[float, float]:
    """Mean and deviation of ``|h . v|`` over the tokens of controls: one more forward, with the scores in the graph."""
    scored = graph.clone()
    with scored.edit("kif") as editor:
        value = editor.site_value(scored.site(best.site))
        direction = best.directions[:, :1].astype(np.float32)
        scores = editor.insert("actgraph.direction_scores", [value, direction], {"measure": "size"}).output
        editor.add_output(scores, "kif.scores")
    requests = [Request(f"%{scores.name}", kind) for kind in ("mean", "second_moment")]
    found = collect(scored, requests, controls, **options)
    mean, second = (float(found.array(request)) for request in requests)
    return mean, max(float(np.sqrt(max(second - mean * mean, 0.0))), 1e-12)


def route(similarity: Array, *, threshold: float = 0.68, keywords: Array | None = None) -> Array:
    """The subject of each request, ``-1``: none. At most one: the most similar of those that a request may be about.

    similarity: ``[requests, subjects]`` cosines of sentence embeddings with the subjects' centroids; a request may be about
    those of at least ``threshold`` and those whose keywords it holds (``keywords``, bool of the same shape).
    """
    similarity = np.asarray(similarity, np.float64)
    candidates = similarity >= threshold
    if keywords is not None:
        candidates = candidates | np.asarray(keywords, bool)
    best = np.where(candidates, similarity, -np.inf).argmax(1)
    return np.asarray(np.where(candidates.any(1), best, -1))


class Kif(FoldingEditPass):
    """A capsule: scale the part of an activation that lies along a subject's signature, ``h' = h + s (h . v) v``.

    ``strength`` -1 takes it out, -0.8 (the method's default) leaves a fifth, -2 reflects it. ``gate=projection`` acts on the
    tokens that carry the signature: softly, ``sigmoid(1.6 (z - 3))`` of how many deviations ``|h . v|`` is above its mean on
    control prompts. ``gate=input`` leaves it to the host, request by request: the optional input ``kif.gate`` [batch], 0 (off,
    bit for bit) where nobody gives it. A file holds several directions where a subject has them; they are orthonormal.

    Without a gate and for all tokens it is a linear map, which folds into weights as that of ``ablate`` does.
    """

    name: ClassVar[str] = "kif"
    change: ClassVar[str] = "a signature is scaled"
    off: ClassVar[Mapping[str, Any]] = {"strength": 0.0}

    signature: str = Field(description=f"The subject's file: {_MADE_BY}.", json_schema_extra={"path": True})
    site: Selector = Field(default=(), description="Where the capsule sits; default: the site of the signature.")
    strength: float = Field(default=-0.8, ge=-5.0, le=0.0, description="s: -1 takes the signature out, 0 is the identity.")
    gate: Literal["none", "projection", "input"] = Field(default="none", description="Which tokens or requests are edited.")
    steepness: float = Field(default=1.6, gt=0, description="Of the gate by projection.")
    threshold: float = Field(default=3.0, description="Deviations above the mean of controls at which that gate is half open.")

    def reads_rows(self, edit: Edit) -> bool:
        return self.gate == "input"

    def targets(self, graph: Graph) -> Selector:
        return str(load_artifact(self.signature, KIND, _MADE_BY).notes.get("site", ""))

    def hook(self, graph: Graph, site: Site, inputs: Mapping[str, Array]) -> Callable[[Array], Array] | None:
        file = load_artifact(self.signature, KIND, _MADE_BY)
        basis = file.array("directions", 2).astype(np.float64)
        if self.gate == "input":
            return None

        def edited(rows: Array) -> Array:
            part = rows @ basis
            gate: Array | float = 1.0
            if self.gate == "projection":
                z = (np.abs(part[..., :1]) - float(file.notes["mean"])) / float(file.notes["deviation"])
                gate = 1 / (1 + np.exp(-np.clip(self.steepness * (z - self.threshold), -700, 700)))
            return np.asarray(rows + self.strength * gate * (part @ basis.T))

        return self.at_tokens(edited, inputs)

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        file = load_artifact(self.signature, KIND, _MADE_BY)
        self.check_model(file.model, graph, self.signature)
        result = self.run_at(graph, context, file=file)
        if not file.notes.get("strong", True):
            effect, least = float(file.notes["effect"]), float(file.notes.get("threshold", 2.0))
            told = f"its effect is {effect:.2g}, below {least:g}"
            result.messages.append(f"{self.signature} is a weak signature: the subject is hardly told from controls ({told})")
        return result

    def apply(self, edit: Edit, site: Site, width: int) -> str:
        file: Artifact = edit.shared["file"]
        directions = file.array("directions", 2)
        if len(directions) != width:
            raise PassError(
                f"kif: the signature has {len(directions)} channels, and {site.name} is {site.type}", "mine it there"
            )
        if self.strength == 0:
            return "identity"
        assert site.type.shape is not None
        mask = edit.mask()
        keep: list[Node] = []
        if self.gate == "projection":
            if self.axis not in (-1, len(site.type.shape) - 1):
                return edit.declined(site, "the gate by projection takes channels on the last axis")
            mask = edit.times(mask, self._carries(edit, site, directions, file, keep))
        elif self.gate == "input":
            mask = edit.times(mask, edit.of_rows(site, "kif.gate"))
        dtype = edit_dtype(site)
        operands: list[Value | Array | None] = [
            directions.astype(dtype), (self.strength * np.eye(directions.shape[1])).astype(dtype)
        ]  # fmt: skip
        operands += [mask] if mask is not None else []
        rule = edit.place(site, "actgraph.lowrank_map", operands, self.attributes, fold=self.fold, keep=keep)
        edit.result.details.append({"site": site.name, "rule": rule, "strength": self.strength, "gate": self.gate})
        return rule

    def _carries(self, edit: Edit, site: Site, directions: Array, file: Artifact, keep: list[Node]) -> Value:
        """How much each token carries the signature, 0 to 1, read before the edit."""
        value = edit.editor.site_value(site)
        keep.append(edit.editor.insert("actgraph.direction_scores", [value, directions[:, :1]], {"measure": "size"}))
        scores = keep[-1].output
        control = {"mean": float(file.notes["mean"]), "deviation": float(file.notes["deviation"])}
        soft = {"mode": "soft", "steepness": self.steepness, "threshold": self.threshold, **control}
        gate = edit.editor.insert("actgraph.switch", [scores], soft).output
        return edit.editor.insert("sum", [gate], {"axes": (-1,), "keepdims": False}).output
