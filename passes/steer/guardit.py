"""Unlearning at inference time: turn activations away from what is to be forgotten, in requests that are about it.

Source: Inference-Time Machine Unlearning via Gated Activation Redirection (GUARD-IT, 2026). The hook of the released code
subtracts ``alpha s`` with positive alpha and ``s`` pointing to the forget set, and so does the pass (a README example has
the other sign). The code's ``best`` has no threshold: say ``threshold=-1.5`` for that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from actgraph.calibrate.document_rows import collect_rows
from actgraph.errors import InputError, OptionError, PassError
from actgraph.formats.artifacts import Artifact, load_artifact
from actgraph.formats.vectors import model_fingerprint
from actgraph.graph import Editor, Graph, Node, Site, Value
from actgraph.graph.context import graph_context, has_context, token_dims
from actgraph.graph.slots import slots_of
from actgraph.graph.where_mask import where_mask
from actgraph.ops.dtypes import DType
from actgraph.passes.cache.carried import carry_sum
from actgraph.passes.places import Selector
from actgraph.passes.steer.clusters import best_clusters, normalised
from actgraph.passes.steer.edit import Edit, EditPass, token_axes
from actgraph.passes.steer.runtime_inputs import per_channel, per_token, row_input
from actgraph.passes.steer.upstream import computed_from
from actgraph.pipeline.base import PassContext, PassResult

Array = np.ndarray[Any, Any]
KIND = "guardit_clusters"
_MADE_BY = "make one with actgraph.passes.steer.guardit.forget_clusters"
_EPS = 1e-6
_MEASURES = ("cosine", "euclidean")
_DIRECTIONS = ("orthogonal", "difference", "orthogonal_difference")
_NEVER = -2.0  # a cosine that is below any threshold
_FAR = -3e38  # minus a distance that is beyond any threshold
_LEAST = 1e-9  # the sum of clamped similarities above which `soft` acts


@dataclass(frozen=True)
class ForgetClusters:
    """What is to be forgotten, in clusters.

    centroids: ``[k, e]`` float64, the unit means of the embeddings of each cluster (of unit activations, ``[k, width]``, where
    ``gate`` is ``activation``; the means of activations as they are where ``measure`` is ``euclidean``). vectors:
    ``[k, width]`` float64, what the pass subtracts. labels: the cluster of each forget document. threshold: the similarity
    above which a request is about a cluster. retain_centroid: ``[e]`` (``[width]``) float64, the same of the retain documents,
    for ``mode=ratio`` and ``retain_threshold``; ``None``: not known. measure: what similarity is, the ``cosine`` or minus the
    ``euclidean`` distance.
    """

    site: str
    centroids: Array
    vectors: Array
    labels: Array
    threshold: float
    model: str = ""
    gate: Literal["embedding", "activation"] = "embedding"
    retain_centroid: Array | None = None
    measure: Literal["cosine", "euclidean"] = "cosine"

    def similarity(self, embeddings: Array, *, best: bool = False, retain: bool = False) -> Array:
        """What to give as ``guardit.similarity``: ``[requests, k]`` float32 cosines of embeddings ``[requests, e]`` with the
        centroids. best: only that of the most similar cluster of each request, so that no other one can be active. retain: one
        more column, the cosine with the retain centroid, which the pass takes with ``mode=ratio`` or ``retain_threshold``.
        Raises InputError where that centroid is not known, and for clusters of activations.
        """
        if self.gate == "activation":
            raise InputError(
                "these clusters are of activations, which the graph compares itself", "give the model no similarity"
            )
        rows = normalised(embeddings)
        if rows.shape[1] != self.centroids.shape[1]:
            raise InputError(
                f"embeddings are of size {rows.shape[1]}, and the clusters' of {self.centroids.shape[1]}", "use one encoder"
            )
        cosines = np.asarray(rows @ self.centroids.T, np.float32)
        if best:
            most = cosines.argmax(1)[:, None]
            cosines = np.where(np.arange(cosines.shape[1]) == most, cosines, np.float32(_NEVER))
        if not retain:
            return cosines
        if self.retain_centroid is None:
            raise InputError("these clusters have no retain centroid", _MADE_BY)
        return np.concatenate([cosines, np.asarray(rows @ self.retain_centroid, np.float32)[:, None]], 1)

    def save(self, path: str | Path) -> Path:
        """Write what the pass ``guardit`` reads."""
        arrays = {"vectors": self.vectors.astype(np.float32), "centroids": self.centroids.astype(np.float32)}
        if self.retain_centroid is not None:
            arrays["retain_centroid"] = self.retain_centroid.astype(np.float32)
        notes = {"site": self.site, "threshold": self.threshold, "gate": self.gate, "measure": self.measure}
        return Artifact(KIND, arrays, notes, self.model).save(path)


def default_site(graph: Graph) -> str:
    """The output of the block at a quarter of the depth."""
    return f"blocks.{len(graph.views.blocks()) // 4}.resid_post"


def forget_clusters(
    graph: Graph,
    forget: Sequence[str],
    retain: Sequence[str],
    embed: Callable[[Sequence[str]], Array] | None = None,
    *,
    site: str = "",
    clusters: int | None = None,
    direction: Literal["orthogonal", "difference", "orthogonal_difference"] = "orthogonal",
    measure: Literal["cosine", "euclidean"] = "cosine",
    threshold: float | Literal["balanced", "quantile"] = "balanced",
    fpr_weight: float = 1.0,
    fpr: float = 0.05,
    seed: int = 0,
    batch_size: int = 8,
    max_length: int | None = 512,
    progress: bool = True,
) -> ForgetClusters:
    """Cluster the forget documents and find what the pass subtracts for each cluster.

    embed: texts -> ``[n, e]`` embeddings of a sentence encoder; ``None``: activations at the site, averaged over the tokens of
    a text, are clustered and compared instead, and the pass gates by them within the graph. site: one residual stream
    (default: a quarter of the depth). clusters: how many (default: 2 to 20 by the best silhouette, the smallest of equal
    ones). direction: the forget mean without its part along the retain mean, their difference, or that without its part.
    measure: how activations are compared, by cosine or by minus the Euclidean distance (embeddings: by cosine). threshold: a
    number, ``balanced`` (the best recall minus ``fpr_weight`` times the false positives, over 200 steps of the scores), or
    ``quantile`` (all but ``fpr`` of the retain texts). Every vector is as long as the mean of the two sets' norms, so that
    ``alpha`` means the same for any model.
    """
    if not forget or not retain:
        raise InputError("there is nothing to forget or to retain", "give texts of both")
    for given, known in ((direction, _DIRECTIONS), (measure, _MEASURES), (threshold, ("balanced", "quantile"))):
        if isinstance(given, str) and given not in known:
            raise OptionError(f"forget_clusters: {given!r} is not known", f"choose {', '.join(known)}")
    if embed is not None and measure != "cosine":
        raise OptionError(f"forget_clusters: embeddings are not compared by measure={measure}", "leave embed or measure out")
    name = graph.site(site or default_site(graph)).name
    how: dict[str, Any] = {"position": "mean", "batch_size": batch_size, "max_length": max_length, "progress": progress}
    found, kept = (collect_rows(graph, [name], texts, **how)[name].astype(np.float64) for texts in (forget, retain))
    own = {"forget": found, "retain": kept}
    both = (("forget", forget), ("retain", retain))
    unit = normalised if measure == "cosine" else np.asarray
    embedded = {key: unit(own[key] if embed is None else embed(texts)) for key, texts in both}
    for key, texts in both:
        if len(embedded[key]) != len(texts):
            raise InputError(f"there are {len(texts)} texts and {len(embedded[key])} embeddings", "give one for each text")
    labels = best_clusters(embedded["forget"], clusters, seed)
    norms = [float(np.linalg.norm(each, axis=1).mean()) for each in (found, kept)]
    retained = kept.mean(0)
    count = int(labels.max()) + 1
    vectors = np.stack([partial_vector(found[labels == k].mean(0), retained, direction) for k in range(count)])
    vectors = vectors / (np.linalg.norm(vectors, axis=1, keepdims=True) + _EPS) * (sum(norms) / 2)
    centroids = unit(np.stack([embedded["forget"][labels == k].mean(0) for k in range(count)]))
    if not isinstance(threshold, str):
        limit = float(threshold)
    else:
        scores = [similarities(embedded[key], centroids, measure).max(1) for key in ("forget", "retain")]
        balanced = balanced_threshold(scores[0], scores[1], fpr_weight)
        limit = balanced if threshold == "balanced" else float(np.quantile(scores[1], 1 - fpr))
    gate: Literal["embedding", "activation"] = "activation" if embed is None else "embedding"
    mean = embedded["retain"].mean(0)
    retain_centroid = unit(mean[None])[0] if mean.any() else None
    return ForgetClusters(name, centroids, vectors, labels, limit, model_fingerprint(graph), gate, retain_centroid, measure)


def similarities(rows: Array, centroids: Array, measure: str) -> Array:
    """Of each row with each centroid, ``[n, k]``: cosines of unit rows, or minus the Euclidean distances."""
    if measure == "cosine":
        return np.asarray(rows @ centroids.T)
    return np.asarray(-np.linalg.norm(rows[:, None] - centroids, axis=-1))


def partial_vector(forget: Array, retain: Array, direction: str = "orthogonal") -> Array:
    """What leads to the forget mean and not to the retain mean."""
    start = forget if direction == "orthogonal" else forget - retain
    if direction == "difference":
        return np.asarray(start)
    return np.asarray(start - (start @ retain) / (retain @ retain + _EPS) * retain)


def balanced_threshold(forget: Array, retain: Array, weight: float = 1.0, steps: int = 200) -> float:
    """The threshold with the largest ``recall - weight * false positives`` of scores ``> threshold`` (the first of equal
    ones).
    """
    both = np.concatenate([forget, retain])
    grid = np.linspace(both.min(), both.max(), steps)
    gain = [(forget > t).mean() - weight * (retain > t).mean() for t in grid]
    return float(grid[int(np.argmax(gain))])


class Guardit(EditPass):
    """Turn activations away from clusters of what is to be forgotten, keeping norms: ``u = h - alpha s``, ``h' = u |h| / |u|``.

    Clusters whose similarity is above the threshold are active, and ``s`` is the mean of their vectors, or what else ``mode``
    makes of similarities. Where none is active a token stays as it is bit for bit. Which requests are meant is

    - told from outside, once for each, with clusters of embeddings: the optional input ``guardit.similarity`` [batch, k] of
      cosines with the centroids (``ForgetClusters.similarity``); nobody gives it: none. With ``mode=ratio`` or
      ``retain_threshold`` it is [batch, k + 1], and its last column the cosine with the retain centroid
      (``similarity(..., retain=True)``).
    - found within the graph, with clusters of activations: cosines of the centroids with the mean activation, at the site of
      the clusters and before the edit, of the prompt up to each token, padding left out. Every generated token has that of its
      whole prompt (``prompt_lengths`` says where it ends), which a cache carries in a slot. A token of the prompt sees no
      later one, unlike in a gate on the whole prompt, so that chunks of a prompt give what the whole gives. Clusters whose
      ``measure`` is ``euclidean`` are compared by minus the distance between mean and centroid.
    """

    name: ClassVar[str] = "guardit"
    change: ClassVar[str] = "activations are turned away from what is to be forgotten, in requests about it"
    off: ClassVar[Mapping[str, Any]] = {"alpha": 0.0}

    clusters: str = Field(description=f"The file with clusters: {_MADE_BY}.", json_schema_extra={"path": True})
    site: Selector = Field(default=(), description="Where; default: the site of the clusters.")
    alpha: float = Field(default=0.5, ge=0, allow_inf_nan=False, description="How far, as a multiple of the vectors; 0 is off.")
    threshold: float | None = Field(
        default=None,
        description="Similarity above which a cluster is active; default: the file's, and 1 for the quotient of `ratio`.",
    )
    mode: Literal["threshold", "weighted", "best", "soft", "ratio"] = Field(
        default="threshold",
        description="What `s` is. `threshold`: the mean over active clusters. `weighted`: that mean weighted by similarity. "
        "`best`: the vector of the most similar cluster (the first of equal ones), where it is active. `soft`: the mean over "
        "all clusters weighted by max(similarity, 0), without a threshold; no similarity above 0 closes the gate. `ratio`: the "
        "vector of the most similar cluster, where its similarity divided by that with what is to be retained (1e-6 at least) "
        "is above the threshold.",
    )
    retain_threshold: float | None = Field(
        default=None,
        description="The gate is closed where the similarity with what is to be retained is above this; default: not read.",
    )

    def reads_rows(self, edit: Edit) -> bool:
        return not _inside(edit.shared["file"])

    def targets(self, graph: Graph) -> Selector:
        return str(load_artifact(self.clusters, KIND, _MADE_BY).notes.get("site", ""))

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        file = load_artifact(self.clusters, KIND, _MADE_BY)
        self.check_model(file.model, graph, self.clusters)
        return self.run_at(graph, context, file=file)

    def apply(self, edit: Edit, site: Site, width: int) -> str:
        file: Artifact = edit.shared["file"]
        vectors = file.array("vectors", 2)
        if vectors.shape[1] != width:
            raise PassError(
                f"guardit: clusters have {vectors.shape[1]} channels, and {site.name} is {site.type}", "make them there"
            )
        if self.alpha == 0:
            return "identity"
        assert site.type.dtype is not None and site.type.shape is not None
        editor, rank = edit.editor, len(site.type.shape)
        inside = _inside(file)
        if inside and editor.site_value(site) in self._above(edit, file):
            return edit.declined(site, f"the gate reads {file.notes['site']}, which depends on it")
        if inside and self.axis not in (-1, rank - 1):
            return edit.declined(site, "the gate by activations takes channels on the last axis")
        if inside and token_axes(site.type.shape, self.axis) != token_dims(edit.graph):
            return edit.declined(site, f"the gate by activations is about tokens, and {site.type} has other axes")
        if _measure(file) == "euclidean" and self.mode not in ("threshold", "best"):
            raise OptionError(
                f"guardit: mode={self.mode} weighs by similarity, and minus a distance is no weight", "choose threshold or best"
            )
        keep: list[Node] = edit.shared.setdefault("keep", [])
        if "vector" not in edit.shared:
            given = self._read(edit, file, keep) if inside else self._told(edit, len(vectors))
            edit.shared["vector"], edit.shared["on"] = self._chosen(edit, given, vectors, self._limit(file))
        vector, strength = edit.shared["vector"], edit.shared["on"]
        if vector.shape is None or len(vector.shape) != rank:
            vector, strength = per_channel(editor, vector, rank, self.axis), per_token(editor, strength, rank - 1)
        attributes = {**self.attributes, "norm": "restore", "scale": -self.alpha}
        editor.insert_at(site, "actgraph.shift", [vector, strength, edit.mask()], attributes, keep=keep)
        edit.result.details.append({"site": site.name, "rule": "inserted", "clusters": len(vectors), "alpha": self.alpha})
        return "inserted"

    @property
    def _asks_retain(self) -> bool:
        """Whether the similarity with what is to be retained counts: then it is one more column."""
        return self.mode == "ratio" or self.retain_threshold is not None

    def _limit(self, file: Artifact) -> float:
        """What a similarity, or a quotient of two, must exceed."""
        if self.threshold is not None:
            return self.threshold
        return 1.0 if self.mode == "ratio" else float(file.notes["threshold"])

    def _told(self, edit: Edit, count: int) -> Value:
        """The similarity of each request with each cluster, ``[batch, k]``, from outside; ``k + 1`` with that to retain."""
        width = count + self._asks_retain
        given = row_input(edit.editor, edit.graph, "guardit.similarity", width=width, default=_NEVER)
        if self.mode in ("threshold", "soft"):
            return given
        # what a host says to be infinitely dissimilar, as a number: infinity times 0 is NaN
        return edit.editor.insert("clip", [given, _NEVER, -_NEVER]).output

    def _above(self, edit: Edit, file: Artifact) -> frozenset[Value]:
        """What the gate is computed from, as it is before any edit."""
        if "above" not in edit.shared:
            edit.shared["above"] = computed_from(edit.editor.site_value(edit.graph.site(str(file.notes["site"]))))
        above: frozenset[Value] = edit.shared["above"]
        return above

    def _read(self, edit: Edit, file: Artifact, keep: list[Node]) -> Value:
        """The similarity at each token with each cluster, ``[batch, seq, k]`` (``k + 1``), of what the graph computes."""
        editor, graph = edit.editor, edit.graph
        read = graph.site(str(file.notes["site"]))
        if read.type.shape is None or read.type.shape[:2] != token_dims(graph) or len(read.type.shape) != 3:
            raise PassError(f"guardit: {read.name} is {read.type}, and a gate on activations reads [batch, seq, channels]")
        counted = where_mask(editor, graph, "prompt")
        assert counted is not None
        if has_context(graph, "valid_tokens"):
            valid = editor.insert("cast", [graph_context(graph, editor, "valid_tokens")], {"to": DType.F32}).output
            counted = editor.insert("mul", [counted, valid]).output
        pooled = _summed(editor, graph, editor.site_value(read), counted, keep)
        edit.result.messages.append(
            "the gate reads the input prompt_lengths: where nobody gives it, generated tokens count as prompt"
        )
        rows = file.array("centroids", 2)
        if self._asks_retain:
            rows = np.concatenate([rows, file.array("retain_centroid", 1)[None]])
        centroids = np.ascontiguousarray(rows.T.astype(np.float32))
        if _measure(file) == "cosine":  # of the sum as of the mean
            return editor.insert("actgraph.direction_scores", [pooled, centroids], {"measure": "cosine"}).output
        assert counted.shape is not None
        column = editor.insert("reshape", [counted], {"shape": (*counted.shape, 1)}).output
        count = _summed(editor, graph, column, None, keep)
        mean = editor.insert("div", [pooled, editor.insert("clip", [count, 1.0, None]).output]).output
        scores = editor.insert("actgraph.direction_scores", [mean, centroids], {"measure": "euclidean"}).output
        some = editor.insert("cast", [count], {"to": DType.BOOL}).output
        return editor.insert("where", [some, scores, np.full(1, _FAR, np.float32)]).output

    def _chosen(self, edit: Edit, given: Value, vectors: Array, limit: float) -> tuple[Value, Value]:
        """``s [..., width]`` of the similarities ``given [..., k]`` (``k + 1``), and 1 where the gate is open ``[...]``."""
        editor, count = edit.editor, len(vectors)
        forget, retain = given, given
        if self._asks_retain:
            assert given.shape is not None
            axis = len(given.shape) - 1
            forget = editor.insert("slice", [given], {"axis": axis, "start": 0, "end": count}).output
            retain = editor.insert("slice", [given], {"axis": axis, "start": count, "end": count + 1}).output
        compared = forget
        if self.mode == "ratio":
            compared = editor.insert("div", [forget, editor.insert("clip", [retain, _EPS, None]).output]).output
        if self.mode == "soft":
            active = editor.insert("relu", [forget]).output
        else:
            active = editor.insert("actgraph.switch", [compared], {"threshold": limit}).output
        if self.mode in ("best", "ratio") and count > 1:
            active = editor.insert("mul", [active, _most_similar(editor, forget, count)]).output
        elif self.mode == "weighted":
            active = editor.insert("mul", [active, forget]).output
        if self.retain_threshold is not None:
            closed = editor.insert("actgraph.switch", [retain], {"threshold": self.retain_threshold}).output
            active = editor.insert("mul", [active, editor.insert("sub", [np.ones(1, np.float32), closed]).output]).output
        total = editor.insert("matmul", [active, np.ones((count, 1), np.float32)]).output
        least = {"weighted": _EPS, "soft": _LEAST}.get(self.mode, 1.0)
        weights = editor.insert("div", [active, editor.insert("clip", [total, least, None]).output]).output
        vector = editor.insert("matmul", [weights, vectors.astype(np.float32)]).output
        on = editor.insert("actgraph.switch", [total], {"threshold": _LEAST if self.mode == "soft" else 0.0}).output
        return vector, editor.insert("sum", [on], {"axes": (-1,), "keepdims": False}).output


def _most_similar(editor: Editor, similarity: Value, count: int) -> Value:
    """1 for the largest of ``similarity [..., k]`` (the first of equal ones), else 0.

    Each pair is compared: of two clusters the later one wins where it is larger, else the earlier one, and the most similar is
    the one that wins all its pairs. (No maximum can be inserted in both dialects.)
    """
    pairs = [(i, j) for j in range(count) for i in range(j)]
    minus, wins = np.zeros((count, len(pairs)), np.float32), np.zeros((len(pairs), count), np.float32)
    for column, (early, late) in enumerate(pairs):
        minus[[early, late], column] = -1, 1
        wins[column, [early, late]] = -1, 1
    differences = editor.insert("matmul", [similarity, minus]).output
    later = editor.insert("actgraph.switch", [differences], {"threshold": 0.0}).output
    won = editor.insert("matmul", [later, wins]).output  # beside the pairs in which it is the earlier one, won until lost
    total = editor.insert("add", [won, np.arange(count - 1, -1, -1, dtype=np.float32)]).output
    return editor.insert("actgraph.switch", [total], {"threshold": count - 1.5}).output


def _summed(editor: Editor, graph: Graph, x: Value, counted: Value | None, keep: list[Node]) -> Value:
    """The sums of ``x [batch, seq, channels]`` over the tokens so far, carried by a cache where there is one."""
    total = editor.insert("actgraph.running_sum", [x, counted])
    total = carry_sum(editor, total) if slots_of(graph) else total
    keep.append(total)
    return total.output


def _measure(file: Artifact) -> str:
    return str(file.notes.get("measure", "cosine"))


def _inside(file: Artifact) -> bool:
    """Whether the gate reads activations, and not what the host gives."""
    return file.notes.get("gate") == "activation"
